"""An NBD client for asyncio: one export, over one connection or several."""

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from nbd_vmdk.client.binding import FAST_ZERO, FUA, HOLE, NO_HOLE, ZERO, Export, Tls
from nbd_vmdk.client.connection import Connection
from nbd_vmdk.client.workers import each
from nbd_vmdk.errors import NbdError, OptionError, OutOfRange

#: Seconds that leaving a client waits for the answers to what is in flight, and for the goodbye.
CLOSE_TIMEOUT = 5.0

#: The longest zero, trim or cache request, and the longest range that one block status request asks for.
#: Not a limit of the protocol: a request that takes long can't be cancelled at the server.
_LONGEST = 1 << 30

#: The first block status request asks for so much, the next ones for more while answers are short lists.
_FIRST_STATUS = 1 << 27
_FEW_ENTRIES = 4096

#: Pieces of one long request that are in flight at once, on each connection.
_PIECES = 4


class Run(NamedTuple):
    """A piece of the disk in one state.

    ``zero``: it reads as zeros.  ``hole``: no space is allocated for it, as far as the server tells.
    """

    offset: int
    length: int
    hole: bool
    zero: bool


class Client:
    """An open export.  Made by :func:`connect`.

    ``export`` tells what the server offers.  Any number of calls may wait at once; each raises NbdError with
    the ``errno`` that the server gave, or ENOTCONN if the connection was lost, and OutOfRange.  A call
    that is cancelled, by ``asyncio.timeout`` or else, returns at once, but its request can't be taken back: a
    write may or may not happen, and until :meth:`settled` returns the buffer of a ``pread_into`` may
    still be written to.  Order: a request that is sent before another one was answered may overtake it.
    """

    def __init__(self, export: Export, connections: list[Connection]) -> None:
        self.export = export
        self.uri = export.uri
        self.size = export.size
        self._connections = connections

    @property
    def connections(self) -> int:
        """How many there are: one, if the server does not promise that they see each other's writes."""
        return len(self._connections)

    async def pread(self, length: int, offset: int) -> bytearray:
        """Read ``length`` bytes at ``offset``."""
        self._within(length, offset)
        buffer = bytearray(length)
        await self.pread_into(buffer, offset)
        return buffer

    async def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill a writable buffer with what is at ``offset``; nothing is copied on the way.

        When this raises, or is cancelled, what the buffer holds is undefined.
        """
        view = memoryview(buffer).cast("B")
        length = len(view)
        self._within(length, offset)
        if length <= self.export.maximum_block:
            if length:
                await self._free().pread_into(view, offset)
            return

        async def part(at: int, count: int) -> None:
            await self._free().pread_into(view[at : at + count], offset + at)

        await self._split(part, length, self.export.maximum_block)

    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int, *, fua: bool = False) -> None:
        """Write ``data`` at ``offset``; with ``fua``, durable when this returns.

        ``data`` must not change before this returns.
        """
        view = memoryview(data).cast("B")
        length = len(view)
        self._within(length, offset)
        flags = FUA if fua else 0
        if length <= self.export.maximum_block:
            if length:
                await self._free().pwrite(view, offset, flags)
            return

        async def part(at: int, count: int) -> None:
            await self._free().pwrite(view[at : at + count], offset + at, flags)

        await self._split(part, length, self.export.maximum_block)

    async def flush(self) -> None:
        """Make durable all writes that have returned; nothing, where the server has no flush."""
        if self.export.can_flush:
            await self._free().flush()

    async def zero(
        self, length: int, offset: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> None:
        """Make ``length`` bytes at ``offset`` read as zeros.

        With ``no_hole`` their space stays allocated; with ``fast``, fail with ENOTSUP instead of being slow.
        """
        flags = (FUA if fua else 0) | (NO_HOLE if no_hole else 0) | (FAST_ZERO if fast else 0)
        await self._ranged(lambda at, count: self._free().zero(count, at, flags), length, offset)

    async def trim(self, length: int, offset: int, *, fua: bool = False) -> None:
        """Tell the server that the content is not needed any more; what it reads as then is undefined."""
        flags = FUA if fua else 0
        await self._ranged(lambda at, count: self._free().trim(count, at, flags), length, offset)

    async def cache(self, length: int, offset: int) -> None:
        """Tell the server that the content will be read soon."""
        await self._ranged(lambda at, count: self._free().cache(count, at), length, offset)

    async def block_status(self, length: int | None = None, offset: int = 0) -> list[Run]:
        """The runs of a range (default: up to the end of the disk), in order, merged, without gaps.

        However short the server's answers are, all of the range is told.
        """
        found: list[Run] = []
        async for run in self.runs(length, offset):
            if found and (found[-1].hole, found[-1].zero) == (run.hole, run.zero):
                found[-1] = found[-1]._replace(length=found[-1].length + run.length)
            else:
                found.append(run)
        return found

    async def runs(self, length: int | None = None, offset: int = 0) -> AsyncIterator[Run]:
        """What :meth:`block_status` tells, as it comes: for disks whose runs are too many to hold.

        Neighbours may be in the same state.  A server that knows no block status has one run of data.
        """
        if length is None:
            length = max(0, self.size - offset)
        self._within(length, offset)
        end = offset + length
        if length and not self.export.has_block_status:
            yield Run(offset, length, hole=False, zero=False)
            return
        step = _FIRST_STATUS
        while offset < end:
            entries = await self._free().block_status(min(step, end - offset), offset)
            if len(entries) < _FEW_ENTRIES:
                step = min(2 * step, _LONGEST)
            start = offset
            for told, state in zip(entries[::2], entries[1::2], strict=True):
                # An answer may reach beyond what was asked.
                count = min(told, end - offset)
                if count:
                    yield Run(offset, count, hole=bool(state & HOLE), zero=bool(state & ZERO))
                offset += count
            if offset == start:
                raise NbdError.of(self.uri, f"the server tells no status at {offset}", errno.EIO)

    async def settled(self) -> None:
        """Wait until every request has been answered, also those whose callers were cancelled."""
        for connection in self._connections:
            await connection.settled()

    def _free(self) -> Connection:
        """The connection that has the least to do."""
        if len(self._connections) == 1:
            return self._connections[0]
        return min(self._connections, key=_load)

    def _within(self, length: int, offset: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRange(self.uri, offset=offset, length=length, size=self.size)

    async def _ranged(self, request: Callable[[int, int], Awaitable[None]], length: int, offset: int) -> None:
        self._within(length, offset)
        if 0 < length <= _LONGEST:
            await request(offset, length)
        else:
            await self._split(lambda at, count: request(offset + at, count), length, _LONGEST)

    async def _split(self, part: Callable[[int, int], Awaitable[None]], length: int, step: int) -> None:
        """Do a long request in parts, some at once; the first error ends it."""

        async def one(piece: tuple[int, int]) -> None:
            await part(*piece)

        await each(_pieces(length, step), _PIECES * len(self._connections), lambda: one)


@asynccontextmanager
async def connect(
    uri: str, *, export: str | None = None, connections: int = 1, window: int = 64, tls: Tls | None = None
) -> AsyncIterator[Client]:
    """Connect to an NBD server for as long as the block runs.

    ``uri`` is an NBD URI as libnbd understands it, its path the name of the export; ``export`` takes the
    place of that.  There are at most ``connections``, and at most ``window`` requests in flight on each;
    more callers wait.  Leaving the block waits for what is in flight, for CLOSE_TIMEOUT seconds at most.

    Raises NbdError: libnbd is missing, the server can't be reached, or has no such export.
    """
    if connections < 1 or window < 1:
        raise OptionError(None, why="connections and window must be at least 1")
    if export is not None:
        uri = export_uri(uri, export)
    first = Connection(uri, tls, window)
    opened = [first]
    try:
        await first.connect()
        offered = first.describe(first.export_name)
        if offered.can_multi_conn:
            more = [Connection(uri, tls, window) for _ in range(connections - 1)]
            opened += more
            await each(more, len(more), lambda: Connection.connect)
            if any(other.describe(offered.name) != offered for other in more):
                raise NbdError.of(uri, "the server tells each connection something else", errno.EIO)
        yield Client(offered, opened)
    finally:
        await each(opened, len(opened), lambda: _close)


async def list_exports(uri: str, *, tls: Tls | None = None) -> list[Export]:
    """What a server offers, in its own order.  Raises NbdError; a server may refuse to tell."""
    connection = Connection(uri, tls)
    try:
        await connection.connect(listing=True)
        found = []
        for name, description in await connection.exports():
            await connection.ask_about(name)
            found.append(connection.describe(name, description, export_uri(uri, name)))
        return found
    finally:
        await connection.close(CLOSE_TIMEOUT)


def export_uri(uri: str, name: str) -> str:
    """The URI of another export of the same server."""
    parts = urlsplit(uri)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}/{quote(name, safe='')}{query}"


def _load(connection: Connection) -> int:
    return connection.load


async def _close(connection: Connection) -> None:
    await connection.close(CLOSE_TIMEOUT)


def _pieces(length: int, step: int) -> Iterator[tuple[int, int]]:
    return ((at, min(step, length - at)) for at in range(0, length, step))
