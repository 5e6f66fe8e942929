"""Where two disks differ, whatever kinds they are and however they store their zeros.

The runs of both are walked side by side.  A range that both know to be zeros, or that both have from the
same link, is passed over; where one has zeros the other alone is read.  The rest is cut into pieces that
several threads read and compare.  Memory is two chunks for each thread, whatever the disks' size.

Ranges are told in whole sectors, which is what a guest sees: a sector differs if any byte of it does.  What
one disk has beyond the other's end differs where it is not zeros, as qemu-img has it.
"""

import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Final, NamedTuple

from nbd_vmdk.ops.ahead import in_order
from nbd_vmdk.ops.content import Content, Holder, Range, merged
from nbd_vmdk.ops.copy import Progress
from nbd_vmdk.units import MIB, SECTOR

#: Bytes that a thread compares at once: both chunks stay in a processor's own cache.
_CHUNK: Final = MIB
#: Pieces of one chunk, so that progress is told where pieces are tiny.
_MAX_PIECES: Final = 64
_ZEROS: Final = bytes(_CHUNK)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two disks compare.

    ranges    the first ranges that differ, as many as were asked for
    count     how many there are
    length    bytes in all of them
    sizes     bytes of both disks
    """

    ranges: tuple[Range, ...]
    count: int
    length: int
    sizes: tuple[int, int]


class _Piece(NamedTuple):
    """A range to be read; a side that is not read is zeros."""

    offset: int
    length: int
    one: bool
    other: bool


class _Item(NamedTuple):
    pieces: list[_Piece]
    covered: int


def compare(
    one: Content,
    other: Content,
    *,
    limit: int | None = None,
    first_only: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Compare all of two disks, keeping the first ``limit`` ranges; with ``first_only`` stop at the first."""
    kept: list[Range] = []
    count = length = 0
    with closing(differences(one, other, progress=progress)) as found:
        for each in found:
            count += 1
            length += each.length
            if limit is None or len(kept) < limit:
                kept.append(each)
            if first_only:
                break
    return Comparison(tuple(kept), count, length, (one.size, other.size))


def differences(
    one: Content, other: Content, ranges: Iterable[Range] | None = None, *, progress: Progress | None = None
) -> Generator[Range, None, None]:
    """The ranges that differ, in order and as long as can be, of all or of ``ranges`` (which are in order).

    Beyond its end a disk is zeros.  ``progress`` is told bytes of the ranges that are done, and the larger
    disk's size.  Raises what reading raises.
    """
    size = max(one.size, other.size)
    chosen = [Range(0, size)] if ranges is None else ranges
    own = threading.local()

    def work(item: _Item) -> tuple[list[Range], int]:
        if not hasattr(own, "bufs"):
            own.bufs = bytearray(_CHUNK), bytearray(_CHUNK)
        return [
            each for piece in item.pieces for each in _compare(one, other, piece, *own.bufs)
        ], item.covered

    def found() -> Iterator[Range]:
        done = 0
        with closing(in_order(work, _items(one, other, chosen))) as results:
            for differing, covered in results:
                yield from differing
                done += covered
                if progress is not None:
                    progress(done, size)

    return merged(found())


def _items(one: Content, other: Content, ranges: Iterable[Range]) -> Iterator[_Item]:
    """What must be read of ``ranges``, in portions of at most a chunk."""
    pieces: list[_Piece] = []
    room, covered = _CHUNK, 0
    for offset, length in ranges:
        for piece in _pieces(one, other, offset, length):
            at, left, first, second = piece
            if not (first or second):
                covered += left
                continue
            while left:
                count = min(left, room)
                pieces.append(_Piece(at, count, first, second))
                at, left, room, covered = at + count, left - count, room - count, covered + count
                if not room or len(pieces) == _MAX_PIECES:
                    yield _Item(pieces, covered)
                    pieces, room, covered = [], _CHUNK, 0
    yield _Item(pieces, covered)


def _pieces(one: Content, other: Content, offset: int, length: int) -> Iterator[_Piece]:
    """A range cut where either side's holder changes; of what is known to be equal neither is to be read."""
    ones, others = _padded(one, offset, length), _padded(other, offset, length)
    first = second = None
    first_left = second_left = 0
    while length:
        if not first_left:
            first_left, first = next(ones)
        if not second_left:
            second_left, second = next(others)
        count = min(first_left, second_left)
        alike = first == second
        yield _Piece(offset, count, first is not None and not alike, second is not None and not alike)
        offset, length = offset + count, length - count
        first_left, second_left = first_left - count, second_left - count


def _padded(content: Content, offset: int, length: int) -> Iterator[tuple[int, Holder]]:
    """The holders of a range that may reach beyond the end."""
    inside = max(min(length, content.size - offset), 0)
    if inside:
        yield from content.holders(offset, inside)
    if inside < length:
        yield length - inside, None


def _compare(
    one: Content, other: Content, piece: _Piece, buf: bytearray, other_buf: bytearray
) -> Iterable[Range]:
    offset, length = piece.offset, piece.length
    there: bytes | bytearray = _ZEROS
    with memoryview(buf) as view:
        (one if piece.one else other).read_into(view[:length], offset)
    if piece.one and piece.other:
        with memoryview(other_buf) as view:
            other.read_into(view[:length], offset)
        there = other_buf
    with memoryview(there) as view:
        # Compares in place: slices would be copies, and memoryviews are compared byte by byte.
        return () if buf.startswith(view[:length]) else _differing(buf, view, offset, length)


def _differing(buf: bytearray, there: memoryview, offset: int, length: int) -> list[Range]:
    """The sectors that differ, neighbours together."""
    import numpy as np

    differ = np.frombuffer(buf, np.uint8, length) != np.frombuffer(there, np.uint8, length)
    lead = offset % SECTOR
    if lead or length % SECTOR:
        differ = np.pad(differ, (lead, -(lead + length) % SECTOR))
    sectors = differ.view(np.uint64).reshape(-1, SECTOR // 8).any(axis=1)
    edges = np.flatnonzero(np.diff(sectors, prepend=False, append=False)) * SECTOR + (offset - lead)
    edges = np.clip(edges, offset, offset + length)
    return [Range(start, end - start) for start, end in edges.reshape(-1, 2).tolist()]
