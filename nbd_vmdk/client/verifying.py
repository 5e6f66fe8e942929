"""Comparing two NBD exports, without reading where both say that they hold zeros."""

import bisect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import NamedTuple

from nbd_vmdk.client.binding import Tls, zero_test
from nbd_vmdk.client.client import Client
from nbd_vmdk.client.plan import REQUEST_SIZE, WINDOW, cut, opened, pieces
from nbd_vmdk.client.workers import each
from nbd_vmdk.errors import OptionError
from nbd_vmdk.units import SECTOR


class Range(NamedTuple):
    """A piece of the disk, in bytes."""

    offset: int
    length: int


class _Task(NamedTuple):
    """A piece to compare; what is known to be zero, or lies beyond a disk's end, is not read."""

    offset: int
    length: int
    read_a: bool
    read_b: bool


async def verify(
    a: str | Client,
    b: str | Client,
    *,
    connections: int = 4,
    window: int = WINDOW,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    tls: Tls | None = None,
) -> list[Range]:
    """Where two exports differ, in whole sectors, in order; an empty list if they hold the same.

    What the longer one has beyond the end of the shorter one is equal if it is zeros.  With ``limit``,
    comparing ends once so many ranges are found (1: only whether they differ, and where first); the
    last one may then be longer than told.  The other parameters are those of ``copy``, and so are the errors.
    """
    if connections < 1 or window < 1 or (limit is not None and limit < 1):
        raise OptionError(None, why="connections, window and limit must be at least 1")
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(opened(a, connections, window, tls))
        second = await stack.enter_async_context(opened(b, connections, window, tls))
        size = max(first.size, second.size)
        found: list[Range] = []
        done = 0

        async def work() -> AsyncIterator[_Task]:
            async for task in _tasks(first, second):
                if not task.read_a and not task.read_b:
                    count(task.length)
                    continue
                for offset, length in cut(task.offset, task.length, REQUEST_SIZE):
                    # What is before the ranges found is in hand already, so none of the first is missed.
                    if limit is not None and len(found) >= limit:
                        return
                    yield task._replace(offset=offset, length=length)

        def count(length: int) -> None:
            nonlocal done
            done += length
            if progress is not None:
                progress(done, size)

        def worker() -> Callable[[_Task], Awaitable[None]]:
            mine, other = bytearray(REQUEST_SIZE), bytearray(REQUEST_SIZE)
            mine_zero, other_zero = zero_test(mine), zero_test(other)

            async def one(task: _Task) -> None:
                offset, length, read_a, read_b = task
                if read_a:
                    await first.pread_into(memoryview(mine)[:length], offset)
                if read_b:
                    await second.pread_into(memoryview(other)[:length], offset)
                if read_a and read_b:
                    differing = _differing(mine, other, length)
                else:
                    differing = _filled(mine_zero if read_a else other_zero, length)
                for at, part in differing:
                    _insert(found, Range(offset + at, part))
                count(length)

            return one

        await each(work(), window * max(first.connections, second.connections), worker)
        return found[:limit]


def _differing(mine: bytearray, other: bytearray, length: int) -> list[tuple[int, int]]:
    if mine == other or mine[:length] == other[:length]:
        return []
    sectors = cut(0, length, SECTOR)
    return [(at, count) for at, count in sectors if mine[at : at + count] != other[at : at + count]]


def _filled(is_zero: Callable[[int, int], bool], length: int) -> list[tuple[int, int]]:
    if is_zero(0, length):
        return []
    return [(at, count) for at, count in cut(0, length, SECTOR) if not is_zero(at, count)]


def _insert(found: list[Range], new: Range) -> None:
    """Put a range in its place; neighbours become one."""
    at = bisect.bisect(found, new)
    if at and found[at - 1].offset + found[at - 1].length == new.offset:
        at -= 1
        new = Range(found[at].offset, found[at].length + new.length)
        del found[at]
    if at < len(found) and new.offset + new.length == found[at].offset:
        new = Range(new.offset, new.length + found[at].length)
        del found[at]
    found.insert(at, new)


async def _tasks(a: Client, b: Client) -> AsyncIterator[_Task]:
    """All of the longer disk, in pieces in which neither changes between data and zeros."""
    align = max(a.export.minimum_block, b.export.minimum_block)
    if a.size % align or b.size % align:
        small = a if a.size % align else b
        raise OptionError(small.uri, why=f"its size is not a multiple of the other's blocks of {align} bytes")
    sides = [pieces(a, align), pieces(b, align)]
    sizes = (a.size, b.size)
    ends = [0, 0]
    data = [False, False]
    at, end = 0, max(sizes)
    while at < end:
        for side in range(2):
            if ends[side] == at:
                if at == sizes[side]:
                    ends[side], data[side] = end, False
                else:
                    piece = await anext(sides[side])
                    ends[side], data[side] = at + piece.length, not piece.zero
        stop = min(ends)
        yield _Task(at, stop - at, data[0], data[1])
        at = stop
