"""Serving images from Python: ``async with serve(path) as server``.

The images are opened here first, so that what is wrong with one is raised as the error it is; then they are
closed, which releases their locks, and nbdkit (see supervisor.py) opens them again with the plugin.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, fields, replace
from inspect import signature
from typing import Any

from nbd_vmdk.errors import OptionError, ServerError
from nbd_vmdk.options import OpenOptions, no_option
from nbd_vmdk.serving.address import Address
from nbd_vmdk.serving.asking import SUFFIX
from nbd_vmdk.serving.handshake import Export
from nbd_vmdk.serving.overlays import Overlays
from nbd_vmdk.serving.restarts import Restart
from nbd_vmdk.serving.supervisor import Server
from nbd_vmdk.serving.tls import ServerTls
from nbd_vmdk.serving.worker import log

#: Requests of one connection that nbdkit takes at once; its own default is 16.  2 cores, several runs, 16
#: against 8: what is cached is read at 0.74 to 1.03 of the rate at depth 16, for 1.1 to 1.3 of the CPU time,
#: large reads at 0.92, small writes at 0.76 to 1.02; a flush after each 32 writes does 0.84 to 1.9 times as
#: well, FUA 0.88 to 1.4.  Where each read waits for 0.1 ms, 4 threads make 8.7, 8 make 20.6 and 16 make 45.9
#: K/s.  With 4 connections it hardly matters, see threadstates.py.  So 8 lose little that is cached, and who
#: serves a slow disk to clients with many requests in flight does well to ask for more.  See docs/PROFILE.md.
DEFAULT_THREADS = 8

#: Options of opening that are not for who serves to choose.
_OURS = ("writable", "locks")
_OPENING = tuple(field.name for field in fields(OpenOptions) if field.name not in _OURS)

__all__ = [
    "Checked",
    "Overlays",
    "Restart",
    "Server",
    "ServerTls",
    "log",
    "plugin_config",
    "plugin_path",
    "serve",
]

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Checked:
    """What opening the images told: warnings, the exports, and the seconds that it took."""

    warnings: tuple[str, ...] = ()
    exports: tuple[Export, ...] = ()
    seconds: float = 0.0


@asynccontextmanager
async def serve(
    path: Path | Sequence[Path],
    *,
    read_only: bool = False,
    snapshot: str | None = None,
    skip_broken: bool = False,
    socket: Path | None = None,
    socket_mode: int | None = None,
    socket_group: str | int | None = None,
    port: int | None = None,
    bind: str | None = None,
    vsock: int | None = None,
    activated: bool = False,
    tls: ServerTls | None = None,
    insecure: bool = False,
    max_connections: int | None = None,
    scratch: bool = False,
    scratch_dir: Path | None = None,
    overlay: Path | None = None,
    stats: bool = False,
    threads: int | None = None,
    workers: int = 1,
    pidfile: Path | None = None,
    restart: Restart | bool | None = None,
    **options: Any,
) -> AsyncIterator[Server]:
    """Serve the disks behind ``path``, or behind several, over NBD for as long as the block runs.

    A path is that of an image, a folder of images, a machine (.vmx), its snapshots (.vmsd) or an appliance
    (.ovf, .ova).  ``snapshot`` chooses one of a machine's by name or number.  ``server.exports`` tells the
    name, size and kind of each disk, ``server.uris`` where it is.  With ``skip_broken`` a disk that can't be
    opened is left out with a warning.

    By default on a private unix socket; ``socket`` names another, with permissions ``socket_mode`` and for
    ``socket_group``; ``port`` (0: any) and ``bind`` (default 127.0.0.1) ask for TCP instead, ``vsock`` for
    that port between this machine and its guests.  With ``activated`` the socket that a service manager
    handed over is used, if there is one.  ``tls`` encrypts, and then refuses who does not; where others can
    reach the address it must be given, unless ``insecure`` allows to go without.  ``max_connections`` is how
    many clients may be connected at once.

    ``scratch`` keeps the images as they are and throws away at the end what clients have written, which is
    in ``scratch_dir`` meanwhile (default: $TMPDIR or /var/tmp); ``overlay`` keeps it, in a child link of that
    name, which may be there already.  ``stats`` counts: ``server.stats_path`` is the socket to ask, and
    ``server.stats`` are the last numbers.

    ``threads`` is how many requests of one connection nbdkit takes at once.  ``workers`` is how many nbdkits
    share the address and the clients, for ``read_only`` alone; they divide ``cache_size`` among them.
    ``restart`` says when to start one again that fails, True being ``Restart()``; by default never, but for
    several workers, with whom nothing that was written is lost.  The other ``options`` are those of
    :class:`~nbd_vmdk.options.OpenOptions`, without ``writable`` and ``locks``: a server always locks.

    Raises what :func:`~nbd_vmdk.open_disk` raises, InUse if the address is taken, and ServerError.
    """
    _check_options(options)
    wanted = OpenOptions(writable=not read_only, locks=True, **options)
    overlays = Overlays(scratch, scratch_dir, overlay)
    overlays.check(wanted)
    address = Address(socket, socket_mode, socket_group, port, bind, vsock, activated)
    if threads is not None and threads < 1:
        raise OptionError(None, why="threads must be at least 1")
    if max_connections is not None and max_connections < 1:
        raise OptionError(None, why="a server takes at least one connection")
    _check_workers(workers, read_only=read_only, max_connections=max_connections)
    if restart is None:
        restart = workers > 1
    policy = Restart() if restart is True else restart or None
    paths = [os.fspath(path)] if isinstance(path, str | os.PathLike) else [os.fspath(each) for each in path]
    warnings = [] if tls is None else tls.check()
    with ExitStack() as ending:
        tops, told = await asyncio.to_thread(
            overlays.make, paths, wanted, ending, snapshot=snapshot, skip_broken=skip_broken
        )
        warnings += told
        checked = await asyncio.to_thread(_check, paths, wanted, snapshot, skip_broken, tops)
        listener = address.listen(insecure=insecure or tls is not None)
        share = replace(wanted, cache_size=wanted.cache_size // workers)
        config = plugin_config(paths, share, snapshot=snapshot, skip_broken=skip_broken)
        config += [("overlay", top) for top in tops]
        if scratch:
            config.append(("scratch", "true"))
        _check_spelling(config)
        server = Server(
            listener,
            plugin_path(),
            config,
            read_only=read_only,
            threads=threads or DEFAULT_THREADS,
            workers=workers,
            pidfile=pidfile,
            warnings=(*warnings, *checked.warnings),
            opening=checked.seconds,
            restart=policy,
            tls=tls,
            max_connections=max_connections,
            known=checked.exports,
            stats_path=listener.beside(SUFFIX) if stats else None,
        )
        await server.start()
        kinds = {export.name: export.kind for export in checked.exports}
        server.exports = [replace(export, kind=kinds.get(export.name, "")) for export in server.exports]
        async with _until_stopped(server):
            yield server


def _check_options(options: Iterable[str]) -> None:
    """Raise OptionError for what is no option of opening, or not one for who serves."""
    for name in options:
        if name not in _OPENING:
            ours = signature(serve).parameters.values()
            own = [each.name for each in ours if each.kind is each.KEYWORD_ONLY]
            hint = "read_only says whether a server writes; it always locks" if name in _OURS else None
            raise no_option(name, [*own, *_OPENING], hint)


def _check_workers(workers: int, *, read_only: bool, max_connections: int | None) -> None:
    """Raise OptionError for what several workers can't do."""
    if workers < 1:
        raise OptionError(None, why="a server has at least one worker")
    if workers > 1 and not read_only:
        why = f"{workers} workers can only read: each has tables of its own, and would not see others' writes"
        raise OptionError(None, why=why, hint="add -r (--read-only), or serve with one worker")
    if workers > 1 and max_connections is not None:
        why = "connections are counted by each worker, so there is no limit for all of them"
        raise OptionError(None, why=why, hint="leave out --max-connections or --workers")


@asynccontextmanager
async def _until_stopped(server: Server) -> AsyncIterator[None]:
    """Stop the server in the end, and raise the first thing that went wrong."""
    try:
        yield
    except Exception:
        # The first error is the one to raise; being cancelled is none, and must not hide a failed close.
        try:
            await server.stop()
        except ServerError as error:
            log.error("%s", error)
        raise
    except BaseException:
        await server.stop()
        raise
    else:
        await server.stop()


def plugin_path() -> str:
    """The file that nbdkit loads: ``nbdkit python FILE file=disk.vmdk`` serves without this module."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    link = os.path.join(os.path.dirname(folder), "plugin.py")
    shim = os.path.join(folder, "nbdkit_shim.py")
    return link if os.path.islink(link) and os.path.samefile(link, shim) else shim


def plugin_config(
    paths: Sequence[Path], options: OpenOptions, *, snapshot: str | None = None, skip_broken: bool = False
) -> list[tuple[str, str]]:
    """The plugin's parameters that open ``paths`` with ``options``; only what differs from the default."""
    config = [("file", os.path.abspath(path)) for path in paths]
    if snapshot is not None:
        config.append(("snapshot", snapshot))
    if skip_broken:
        config.append(("skip-broken", "true"))
    default = OpenOptions()
    for option in fields(OpenOptions):
        value = getattr(options, option.name)
        if option.name == "writable" or value == getattr(default, option.name):
            continue
        key = option.name.replace("_", "-")
        if option.name == "parent":
            config.append((key, os.path.abspath(value)))
        elif option.name == "allow_dirs":
            config += [("allow-dir", os.path.abspath(folder)) for folder in value]
        else:
            config.append((key, str(value).lower()))
    return config


def _check_spelling(config: Sequence[tuple[str, str]]) -> None:
    """ServerError for a name that is not UTF-8: nbdkit can give it to no plugin in Python."""
    for _key, value in config:
        try:
            os.fsencode(value).decode()
        except UnicodeDecodeError:
            why = "the name is not UTF-8, and nbdkit takes no other"
            raise ServerError(value, why=why, hint="rename the file, or the folder of that name") from None


def _check(
    paths: Sequence[str],
    options: OpenOptions,
    snapshot: str | None,
    skip_broken: bool,
    overlays: Sequence[str],
) -> Checked:
    """Open and close the images."""
    from nbd_vmdk.plugin.exports import describe, open_exports

    begin = time.monotonic()
    exports = open_exports(paths, options, snapshot=snapshot, skip_broken=skip_broken, overlays=overlays)
    found = []
    for name, disk in exports.disks.items():
        # Below an overlay is what tells more than the overlay.
        top = disk.links[1 if overlays and len(disk.links) > 1 else 0]
        found.append(Export(name, disk.size, not disk.writable, describe(disk.links), top.create_type))
    warnings = exports.warnings
    for error in exports.close():
        raise error
    return Checked(warnings, tuple(found), time.monotonic() - begin)
