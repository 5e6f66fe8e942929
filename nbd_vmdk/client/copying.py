"""Copying one NBD export to another: what is data, with many requests in flight over several connections."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from nbd_vmdk.client.binding import Tls, zero_test
from nbd_vmdk.client.client import Client
from nbd_vmdk.client.plan import REQUEST_SIZE, WINDOW, Piece, cut, opened, pieces
from nbd_vmdk.client.workers import each
from nbd_vmdk.errors import OptionError

#: Zeros among data are left out in blocks of this size: the usual grain, below which nothing is saved.
_SPARSE = 64 << 10

#: The longest zero request: its end is what progress can tell of.
_ZEROES = 128 << 20


@dataclass(slots=True)
class Copied:
    """What a copy did, in bytes: ``written`` as data, ``zeroed`` by zero requests, ``skipped`` altogether."""

    size: int
    written: int = 0
    zeroed: int = 0
    skipped: int = 0


async def copy(
    src: str | Client,
    dst: str | Client,
    *,
    connections: int = 4,
    window: int = WINDOW,
    request_size: int = REQUEST_SIZE,
    progress: Callable[[int, int], None] | None = None,
    allocated: bool = False,
    destination_is_zero: bool = False,
    tls: Tls | None = None,
) -> Copied:
    """Copy all of ``src`` to ``dst``: URIs, or clients that are open.  Flushed when this returns.

    What the source says is zero is not read, and where zeros are found in 64 KiB of data they are not
    written: the destination is asked to zero there, which may free space; with ``allocated`` it
    is to keep the space, and with ``destination_is_zero`` it is known to read as zeros already, and not
    asked.  What the destination has beyond the source's end stays as it is.

    At most ``connections`` to each side, and ``connections * window`` requests of ``request_size`` bytes in
    memory.  ``progress`` is called with bytes done and bytes in all.  ``tls`` is for the URIs.

    The first error ends the copy and is raised: NbdError, whose ``file`` tells on which side, or OptionError
    for a destination that is too small or read-only.  The destination is then partly written.
    """
    if request_size < 1 or connections < 1 or window < 1:
        raise OptionError(None, why="connections, window and request_size must be at least 1")
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(opened(src, connections, window, tls))
        target = await stack.enter_async_context(opened(dst, connections, window, tls))
        align = _check(source, target)
        size = min(request_size, source.export.maximum_block, target.export.maximum_block)
        size = max(align, size - size % align)
        done = Copied(source.size)

        def tell() -> None:
            if progress is not None:
                progress(done.written + done.zeroed + done.skipped, done.size)

        async def zero(offset: int, length: int) -> None:
            if destination_is_zero and not allocated:
                done.skipped += length
            elif target.export.can_zero:
                await target.zero(length, offset, no_hole=allocated)
                done.zeroed += length
            else:
                await target.pwrite(bytes(length), offset)
                done.written += length

        def worker() -> Callable[[Piece], Awaitable[None]]:
            buffer = bytearray(size)
            view = memoryview(buffer)
            is_zero = zero_test(buffer)

            async def one(piece: Piece) -> None:
                offset, length, known_zero = piece
                if known_zero:
                    await zero(offset, length)
                else:
                    await source.pread_into(view[:length], offset)
                    for at, part, empty in _parts(is_zero, length, _SPARSE if not allocated else length):
                        if empty:
                            await zero(offset + at, part)
                        else:
                            await target.pwrite(view[at : at + part], offset + at)
                            done.written += part
                tell()

            return one

        width = window * max(source.connections, target.connections)
        zeroes = _ZEROES if target.export.can_zero or destination_is_zero else size
        await each(_work(source, align, size, zeroes), width, worker)
        await target.flush()
        return done


async def _work(source: Client, align: int, size: int, zeroes: int) -> AsyncIterator[Piece]:
    async for piece in pieces(source, align):
        for offset, length in cut(piece.offset, piece.length, zeroes if piece.zero else size):
            yield Piece(offset, length, piece.zero)


def _parts(is_zero: Callable[[int, int], bool], length: int, step: int) -> list[tuple[int, int, bool]]:
    """Data and zeros in a buffer by turns: offset, length, whether it is zeros."""
    parts: list[tuple[int, int, bool]] = []
    for at, count in cut(0, length, step):
        empty = is_zero(at, count)
        if parts and parts[-1][2] == empty:
            start, before, _ = parts[-1]
            parts[-1] = (start, before + count, empty)
        else:
            parts.append((at, count, empty))
    return parts


def _check(source: Client, target: Client) -> int:
    """The alignment that suits both, or why they don't suit each other."""
    if target.export.read_only:
        raise OptionError(target.uri, why="the destination is read-only")
    if target.size < source.size:
        why = f"the destination has {target.size} bytes, the source {source.size}"
        raise OptionError(target.uri, why=why)
    align = max(source.export.minimum_block, target.export.minimum_block)
    if source.size % align:
        why = f"its blocks of {align} bytes can't end where the source does, at {source.size} bytes"
        raise OptionError(target.uri, why=why)
    return align
