"""NBD exports as sources and sinks of the copier, by libnbd's synchronous side.

A worker thread talks on a connection of its own, as far as the server promises that several connections see
one disk (multi-conn); otherwise all take turns at one.  Bytes go straight between the socket and the
worker's buffer.

What is not done here: many requests in flight on one connection.  As many are as there are workers, which
keeps a server on the same machine busy; over a slow line, more threads help.
"""

import errno
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Self, TypeVarTuple, Unpack

from nbd_vmdk.client import binding
from nbd_vmdk.client.binding import (
    READ,
    WRITE,
    ZERO,
    Export,
    describe,
    error_class,
    in_words,
    new_handle,
    refuse_unverified,
    unreachable,
)
from nbd_vmdk.errors import NbdError
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.units import GIB, MIB, align_down, align_up

if TYPE_CHECKING:
    import nbd

T = TypeVarTuple("T")

#: Bytes asked for in one block status request; the protocol's limit is 4 GiB.
_STATUS_STEP: Final = GIB
#: Bytes zeroed by one request: a server that must write them has to answer in a reasonable time.
_ZERO_STEP: Final = 64 * MIB
#: Runs looked at to see whether an export is zeros all over.
_FRESH_RUNS: Final = 64


class NbdEnd:
    """An export, read from or written to by any number of threads; a context manager.

    How to encrypt and whom to trust, the URI says; one that leaves open whom is refused.  Raises NbdError, in
    opening as well.
    """

    def __init__(self, uri: str) -> None:
        self.name = uri
        self._failed = error_class()
        refuse_unverified(uri, None)
        handle = self._connect()
        self.export: Export = describe(handle, uri, "")
        self.size = self.export.size
        self._handles = [handle]
        self._free = [handle]
        #: Keeps threads from using more than the one connection that the server is good for.
        self._one = None if self.export.can_multi_conn else threading.Lock()
        self._guard = threading.Lock()

    def _connect(self) -> "nbd.NBD":
        handle = new_handle(None)
        end = time.monotonic() + binding.PATIENCE
        try:
            handle.aio_connect_uri(self.name)
            while handle.aio_is_connecting():
                if not _go_on(handle, end - time.monotonic()):
                    raise binding.silent(self.name, binding.PATIENCE)
        except self._failed as error:
            raise unreachable(self.name, in_words(error), error.errnum or 0) from error
        if not handle.aio_is_ready():
            raise unreachable(self.name, "the server hung up", errno.ENOTCONN)
        return handle

    def _told(self, error: "nbd.Error") -> NbdError:
        return NbdError.of(self.name, in_words(error), error.errnum or 0)

    @contextmanager
    def _handle(self) -> "Iterator[nbd.NBD]":
        """A connection that nobody else uses meanwhile."""
        if self._one is not None:
            with self._one:
                yield self._handles[0]
            return
        with self._guard:
            handle = self._free.pop() if self._free else None
        if handle is None:
            handle = self._connect()
            with self._guard:
                self._handles.append(handle)
        try:
            yield handle
        finally:
            self._free.append(handle)

    def _do(self, request: "Callable[[nbd.NBD, Unpack[T]], None]", *args: *T) -> None:
        with self._handle() as handle:
            try:
                request(handle, *args)
            except self._failed as error:
                raise self._told(error) from error

    def runs(self, offset: int, length: int) -> Iterator[tuple[Kind, int]]:
        """See Source; all is data where the server can't tell."""
        end = offset + length
        if not self.export.has_block_status:
            yield Kind.DATA, length
            return
        while offset < end:
            for flags, count in self._status(offset, min(end - offset, _STATUS_STEP)):
                count = min(count, end - offset)  # the last run may reach further than was asked
                if count:
                    yield (Kind.ZERO if flags & ZERO else Kind.DATA), count
                offset += count

    def _status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(flags, length) of the runs from ``offset`` on: at least one, maybe not all."""
        found: list[tuple[int, int]] = []

        def take(_context: str, _offset: int, entries: list[int], _error: int) -> int:
            found.extend(zip(entries[1::2], entries[0::2], strict=True))
            return 0

        minimum = self.export.minimum_block
        begin = align_down(offset, minimum)
        stop = min(align_up(offset + length, minimum), self.size)
        self._do(_block_status, stop - begin, begin, take)
        skip = offset - begin
        runs: list[tuple[int, int]] = []
        for flags, count in found:
            if count > skip:
                runs.append((flags, count - skip))
            skip = max(skip - count, 0)
        return runs or [(0, length)]

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf`` from ``offset`` on."""
        minimum = self.export.minimum_block
        if offset % minimum or len(buf) % minimum:
            begin = align_down(offset, minimum)
            whole = bytearray(min(align_up(offset + len(buf), minimum), self.size) - begin)
            self._read(memoryview(whole), begin)
            buf[:] = memoryview(whole)[offset - begin : offset - begin + len(buf)]
        else:
            self._read(buf, offset)

    def _read(self, buf: memoryview, offset: int) -> None:
        for at in range(0, len(buf), self.export.maximum_block):
            piece = buf[at : at + self.export.maximum_block]
            self._do(_read, piece, offset + at)

    def close(self) -> None:
        """Take leave of the server."""
        for handle in self._handles:
            try:
                handle.shutdown()
            except self._failed:
                pass  # the server went first
        self._handles.clear()
        self._free.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NbdSink(NbdEnd):
    """An export that is written to.  Where it is known to read as zeros all over, zeros are not sent."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        if self.export.read_only:
            self.close()
            raise NbdError(uri, why="the server lets nobody write to it")
        self.fresh = self._reads_as_zeros()

    def _reads_as_zeros(self) -> bool:
        for number, (kind, _length) in enumerate(self.runs(0, self.size)):
            if kind is not Kind.ZERO or number == _FRESH_RUNS:
                return False
        return True

    def write(self, buf: memoryview, offset: int) -> None:
        """See Sink."""
        for at in range(0, len(buf), self.export.maximum_block):
            piece = buf[at : at + self.export.maximum_block]
            self._do(_write, piece, offset + at)

    def zero(self, offset: int, length: int) -> None:
        """See Sink."""
        if self.fresh:
            return
        end = offset + length
        while offset < end:
            step = min(_ZERO_STEP, end - offset)
            if self.export.can_zero:
                self._do(_zero, step, offset)
            else:
                self.write(memoryview(bytes(step)), offset)
            offset += step

    def flush(self) -> None:
        """Make all that was written durable: each connection answers for what came by it."""
        if self.export.can_flush:
            for handle in self._handles:
                try:
                    handle.flush()
                except self._failed as error:
                    raise self._told(error) from error


def _go_on(handle: "nbd.NBD", seconds: float) -> bool:
    """Wait for the server, and let a connection take its next step; False if it is not heard of in time.

    libnbd's own waiting hears no signal, and may take a step back: told that there is something to read while
    it connects (1.14, when the server hangs up at once), it fails without saying why.
    """
    direction = handle.aio_get_direction()
    wanted = (select.POLLIN if direction & READ else 0) | (select.POLLOUT if direction & WRITE else 0)
    waiting = select.poll()
    waiting.register(handle.aio_get_fd(), wanted)
    found = waiting.poll(seconds * 1000) if seconds > 0 else []
    if not found:
        return False
    if direction & READ and found[0][1] != select.POLLOUT:
        handle.aio_notify_read()
    else:
        handle.aio_notify_write()
    return True


def _read(handle: "nbd.NBD", buf: memoryview, offset: int) -> None:
    _wait(handle, handle.aio_pread(buf, offset))


def _write(handle: "nbd.NBD", buf: memoryview, offset: int) -> None:
    _wait(handle, handle.aio_pwrite(buf, offset))


def _zero(handle: "nbd.NBD", length: int, offset: int) -> None:
    handle.zero(length, offset)


def _block_status(
    handle: "nbd.NBD", length: int, offset: int, take: Callable[[str, int, list[int], int], int]
) -> None:
    handle.block_status(length, offset, take)


def _wait(handle: "nbd.NBD", cookie: int) -> None:
    """Until a request is done; raises what it met.  The synchronous calls would copy every buffer."""
    while not handle.aio_command_completed(cookie):
        handle.poll(-1)
