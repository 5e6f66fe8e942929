"""The callbacks of the nbdkit plugin: glue between NBD requests and disks.

``plugin.py`` at the top of a checkout hands them to nbdkit.  A request costs one dict lookup (see
threadstates.py) and one call of the engine; here is also the only place where the engine's errors become
errno values and log lines.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import cycle
from operator import sub
from threading import get_ident
from typing import Concatenate, NoReturn, ParamSpec, TypeVar

import nbdkit

from nbd_vmdk import __version__
from nbd_vmdk.codec import INFLATE_LIBRARY
from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import Closed, OptionError, VmdkError, printable
from nbd_vmdk.plugin import aborting, ending
from nbd_vmdk.plugin.connections import make_room
from nbd_vmdk.plugin.descriptors import warn_of_few
from nbd_vmdk.plugin.errorlog import ErrorLog
from nbd_vmdk.plugin.exports import Exports, describe, open_exports
from nbd_vmdk.plugin.heap import keep_freed_memory
from nbd_vmdk.plugin.parameters import HELP, Parameters
from nbd_vmdk.plugin.sharing import Turns
from nbd_vmdk.plugin.stats import CountedDisk, Stats
from nbd_vmdk.plugin.threadstates import KeptStates
from nbd_vmdk.units import MIB

__all__ = [
    "API_VERSION",
    "after_fork",
    "block_size",
    "cache",
    "can_cache",
    "can_extents",
    "can_fast_zero",
    "can_flush",
    "can_fua",
    "can_multi_conn",
    "can_trim",
    "can_write",
    "can_zero",
    "cleanup",
    "close",
    "config",
    "config_complete",
    "default_export",
    "dump_plugin",
    "export_description",
    "extents",
    "flush",
    "get_ready",
    "get_size",
    "list_exports",
    "open",
    "pread",
    "preconnect",
    "pwrite",
    "thread_model",
    "trim",
    "zero",
]

API_VERSION = 2

#: The largest request that clients may make; nbdkit itself refuses more than 64 MiB.
_MAX_REQUEST = 32 * MIB
#: Runs told in one answer about block status; the client asks again for the rest.
_MAX_RUNS = 16384
#: What reads as zeros, in the words of NBD.
_EMPTY = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
#: Exports that an error lists.
_LISTED = 20

P = ParamSpec("P")
R = TypeVar("R")


class Plugin:
    """All that is global: what was configured, and the disks that are served."""

    def __init__(self) -> None:
        self.told = Parameters()
        self.turns: Turns | None = None
        self.stats: Stats | None = None
        self.exports: Exports | None = None

    def start(self) -> None:
        """Open the disks and check everything that can be checked before serving."""
        told, options = self.told, self.told.options
        if told.stats is not None:
            self.stats = Stats(told.stats, options.cache_size)
        self.exports = open_exports(
            told.files,
            options,
            snapshot=told.snapshot,
            skip_broken=told.skip_broken,
            overlays=told.overlays,
            scratch=told.scratch,
            cache=None if self.stats is None else self.stats.cache,
        )
        if self.stats is not None:
            self.stats.count(self.exports.disks)
            self.stats.listen()
        for warning in (*self.exports.warnings, *warn_of_few()):
            sys.stderr.write(f"warning: {printable(warning)}\n")
        sys.stderr.flush()

    def advise(self, error: VmdkError) -> None:
        """Put the disk's name into an error's hint."""
        if self.exports is not None:
            self.exports.advise(error)

    def flush(self) -> None:
        """Make all that was written durable, because nbdkit ends without closing anything."""
        done = "all that was written is flushed"
        for disk in self.exports.disks.values() if self.exports is not None else ():
            try:
                if disk.writable:
                    disk.flush()
            except Closed:
                pass  # which has flushed it, or told why it could not
            except VmdkError as error:
                sys.stderr.write(f"error: {error}\n")
                done = "not all that was written could be flushed"
        sys.stderr.write(f"warning: nbdkit fails over a client that vanished; {done}\n")
        sys.stderr.flush()


class Handle:
    """A connection: its disk, whether it may write, and its threads' states."""

    __slots__ = ("disk", "pread", "pwrite", "states", "threads", "writable")

    def __init__(self, disk: Disk | CountedDisk, *, writable: bool) -> None:
        self.disk = disk
        self.pread = disk.read_into
        self.pwrite = disk.write_from
        self.writable = writable
        self.states = KeptStates()
        self.threads = self.states.threads


# Errors.


def _fail(error: VmdkError) -> NoReturn:
    """Tell nbdkit which errno the client gets; the one place where that is decided."""
    nbdkit.set_error(errno.EOPNOTSUPP if error.errno == errno.ENOTSUP else error.errno)
    raise error


def _request(function: Callable[Concatenate[Handle, P], R]) -> Callable[Concatenate[Handle, P], R]:
    """Wrap a request's callback: keep the thread's state, translate errors."""

    @wraps(function)
    def wrapper(h: Handle, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if get_ident() not in h.threads:
            h.states.keep()
        try:
            return function(h, *args, **kwargs)
        except VmdkError as error:
            _fail(error)

    return wrapper


# The life of the server.

_plugin = Plugin()
_errors = ErrorLog(_plugin.advise)
_errors.install()


def dump_plugin() -> None:
    """Print what ``nbdkit python plugin.py --dump-plugin`` tells of this plugin."""
    sys.stdout.write(
        f"nbd_vmdk_version={__version__}\n"
        f"nbd_vmdk_parameters={' '.join(HELP)}\n"
        f"nbd_vmdk_inflate={INFLATE_LIBRARY}\n"
        + "".join(f"nbd_vmdk_parameter_{key.replace('-', '_')}={text}\n" for key, text in HELP.items())
    )
    sys.stdout.flush()


def config(key: str, value: str) -> None:
    """Take one key=value of the command line."""
    _plugin.told.take(key, value)


def config_complete() -> None:
    """Check that there is something to serve."""
    if not _plugin.told.files:
        raise OptionError(None, why="no image to serve", hint="add file=DISK.vmdk to nbdkit's command line")


def thread_model() -> int:
    """Let requests run in parallel, on one connection and over several."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def get_ready() -> None:
    """Open and check all images; what is wrong with one stops nbdkit here."""
    keep_freed_memory()
    _plugin.start()


def after_fork() -> None:
    """Begin to wait for the signal to end; threads must not be started earlier."""
    ending.watch(nbdkit.shutdown)
    aborting.watch(_plugin.flush)
    if _plugin.told.share is not None:
        _plugin.turns = Turns(_plugin.told.share)
    if _plugin.stats is not None:
        _plugin.stats.answer()


def cleanup() -> None:
    """Close the images cleanly; as nbdkit exits with 0 whatever is raised here, a failure leaves at once."""
    exports, _plugin.exports = _plugin.exports, None
    if exports is None:
        return
    closed = False
    try:
        failed = exports.close()
        for line in _errors.counted():
            sys.stderr.write(f"warning: {line}\n")
        for error in failed:
            exports.advise(error)
            sys.stderr.write(f"error: {error}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        if _plugin.stats is not None:
            sys.stderr.write(_plugin.stats.line())
            _plugin.stats.close()
        sys.stderr.flush()
        closed = not failed
    finally:
        if not closed:
            if sys.exc_info()[1] is not None:
                traceback.print_exc()  # a bug
            sys.stderr.flush()
            os._exit(ending.CLOSE_FAILED)


# Exports and connections.


def list_exports(readonly: bool, is_tls: bool) -> Iterable[tuple[str, str]]:  # noqa: ARG001
    """Name what is served."""
    assert _plugin.exports is not None
    return [(name, describe(disk.links)) for name, disk in _plugin.exports.disks.items()]


def default_export(readonly: bool, is_tls: bool) -> str:  # noqa: ARG001
    """Name the export that a client gets who asks for none."""
    assert _plugin.exports is not None
    return _plugin.exports.first


def preconnect(readonly: bool) -> None:  # noqa: ARG001
    """Let the client in, before nbdkit says a word."""
    if _plugin.turns is not None:
        _plugin.turns.seat()
    make_room()


def open(readonly: bool) -> Handle:
    """Begin a connection; an unknown export name is refused."""
    exports, name = _plugin.exports, nbdkit.export_name()
    assert exports is not None
    disk = exports.get(name)
    if disk is None:
        names = list(exports.disks)
        there = ", ".join(names[:_LISTED]) + (" ..." if len(names) > _LISTED else "")
        raise OptionError(None, why=f"no export {name!r}", hint=f"there is {there}")
    writable = disk.writable and not readonly
    if _plugin.stats is not None:
        return Handle(_plugin.stats.connected(name or exports.first), writable=writable)
    return Handle(disk, writable=writable)


def close(h: Handle) -> None:
    """End a connection."""
    h.states.give_back()
    if _plugin.stats is not None:
        _plugin.stats.disconnected()


def export_description(h: Handle) -> str:
    """Tell clients what they got."""
    return describe(h.disk.links)


def get_size(h: Handle) -> int:
    """Tell the disk's size in bytes."""
    return h.disk.size


def block_size(h: Handle) -> tuple[int, int, int]:
    """Tell (minimum, preferred, maximum): mostly any alignment will do, and grains are best."""
    minimum = h.disk.minimum_block if h.writable else 1
    return minimum, max(h.disk.preferred_block, minimum), _MAX_REQUEST


def can_write(h: Handle) -> bool:
    """Tell whether this connection may write."""
    return h.writable


def can_flush(h: Handle) -> bool:
    """Tell whether flush does something."""
    return h.writable


def can_trim(h: Handle) -> bool:
    """Tell whether space can be given back."""
    return h.writable


def can_zero(h: Handle) -> bool:
    """Tell whether zeroing is more than writing zeros."""
    return h.writable


def can_fast_zero(h: Handle) -> bool:
    """Tell whether a zero that must be fast is understood."""
    return h.writable and h.disk.can_fast_zero


def can_fua(h: Handle) -> int:
    """Tell that a write can be made durable before its reply."""
    return int(nbdkit.FUA_NATIVE if h.writable else nbdkit.FUA_NONE)


def can_multi_conn(h: Handle) -> bool:  # noqa: ARG001
    """Tell that a flush on one connection covers all."""
    return True


def can_cache(h: Handle) -> int:  # noqa: ARG001
    """Tell that prefetching is possible."""
    return int(nbdkit.CACHE_NATIVE)


def can_extents(h: Handle) -> bool:  # noqa: ARG001
    """Tell that block status is known."""
    return True


# Requests.


def pread(h: Handle, buf: memoryview, offset: int, flags: int) -> None:  # noqa: ARG001
    """Read; written out without the wrapper, because this is the hottest path."""
    if get_ident() not in h.threads:
        h.states.keep()
    try:
        h.pread(buf, offset)
    except VmdkError as error:
        _fail(error)


def pwrite(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    """Write, durably with FUA; written out as well."""
    if get_ident() not in h.threads:
        h.states.keep()
    try:
        if flags:
            h.pwrite(buf, offset, fua=bool(flags & nbdkit.FLAG_FUA))
        else:
            h.pwrite(buf, offset)
    except VmdkError as error:
        _fail(error)


@_request
def flush(h: Handle, flags: int) -> None:  # noqa: ARG001
    """Make all that was written on any connection durable."""
    h.disk.flush()


@_request
def trim(h: Handle, count: int, offset: int, flags: int) -> None:
    """Give space back."""
    h.disk.trim(count, offset, fua=bool(flags & nbdkit.FLAG_FUA))


@_request
def zero(h: Handle, count: int, offset: int, flags: int) -> None:
    """Zero a range, giving space back if that is allowed; a fast one fails where it would have to write."""
    h.disk.zero(
        count,
        offset,
        may_trim=bool(flags & nbdkit.FLAG_MAY_TRIM),
        fua=bool(flags & nbdkit.FLAG_FUA),
        fast=bool(flags & nbdkit.FLAG_FAST_ZERO),
    )


@_request
def cache(h: Handle, count: int, offset: int, flags: int) -> None:  # noqa: ARG001
    """Fetch a range into memory."""
    h.disk.cache(count, offset)


@_request
def extents(h: Handle, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
    """Tell what is data and what is zeros, as (offset, length, status); with REQ_ONE only the first piece."""
    most = 1 if flags & nbdkit.FLAG_REQ_ONE else _MAX_RUNS
    places, is_data = h.disk.edges(offset, count, most)
    # nbdkit takes any iterable. This one is gone through in C, and zip() makes one tuple do for all pieces.
    lengths = map(sub, places[1:], places)
    return zip(places, lengths, cycle((0, _EMPTY) if is_data else (_EMPTY, 0)), strict=False)
