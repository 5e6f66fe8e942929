"""
The guest's view of a disk, as a sparse model: what a reader must return, and from where it may take it.

A content is a row of segments, each data or explicit zeros; all between them is hole. A hole reads as
zeros in a disk without a parent and falls through to the parent in a child; explicit zeros hide the
parent. Sizes up to 64 TiB and more cost nothing but the segments that were put.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

SECTOR = 512
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_WORDS = [
    "boot",
    "kernel",
    "the",
    "of",
    "directory",
    "0x00ff",
    "module",
    "and",
    "disk",
    "link",
    "grain",
    "a\n",
]


class Part(IntEnum):
    """What a stretch of the content is."""

    HOLE = 0
    ZERO = 1
    DATA = 2


class Segment(NamedTuple):
    """The bytes [start, end) of the disk; `data` holds them for DATA and is empty for the others."""

    start: int
    end: int
    part: Part
    data: bytes = b""

    def cut(self, start: int, end: int) -> Segment:
        """Return the piece of this segment that lies in [start, end), which it must touch."""
        first, last = max(start, self.start), min(end, self.end)
        data = self.data[first - self.start : last - self.start] if self.data else b""
        return Segment(first, last, self.part, data)


class Content:
    """A sparse guest disk of `size` bytes. put(), zero() and punch() change it and return it for chaining."""

    def __init__(self, size: int, segments: Iterable[Segment] = ()) -> None:
        self.size = size
        self._segments = [segment for segment in segments if segment.part is not Part.HOLE]
        self._starts = [segment.start for segment in self._segments]

    def __repr__(self) -> str:
        return f"Content({self.size}, {len(self._segments)} segments)"

    @property
    def sectors(self) -> int:
        """The size in sectors; the disk must be a whole number of them."""
        assert self.size % SECTOR == 0
        return self.size // SECTOR

    # Building

    def put(self, offset: int, data: bytes) -> Content:
        """Place data bytes at an offset."""
        return self._replace(Segment(offset, offset + len(data), Part.DATA, bytes(data)))

    def zero(self, offset: int, length: int) -> Content:
        """Place explicit zeros, which hide a parent."""
        return self._replace(Segment(offset, offset + length, Part.ZERO))

    def punch(self, offset: int, length: int) -> Content:
        """Make a hole, which shows the parent."""
        return self._replace(Segment(offset, offset + length, Part.HOLE))

    def _replace(self, new: Segment) -> Content:
        if not 0 <= new.start <= new.end <= self.size:
            raise ValueError(f"[{new.start}, {new.end}) is not inside a disk of {self.size} bytes")
        if new.start == new.end:
            return self
        first, last = self._touching(new.start, new.end)
        row = [] if new.part is Part.HOLE else [new]
        if first < last:
            if self._segments[first].start < new.start:
                row.insert(0, self._segments[first].cut(0, new.start))
            if self._segments[last - 1].end > new.end:
                row.append(self._segments[last - 1].cut(new.end, self.size))
        self._segments[first:last] = row
        self._starts[first:last] = [segment.start for segment in row]
        return self

    def _touching(self, start: int, end: int) -> tuple[int, int]:
        """Indexes [first, last) of the segments that share a byte with [start, end)."""
        first = max(0, bisect_right(self._starts, start) - 1)
        if first < len(self._segments) and self._segments[first].end <= start:
            first += 1
        last = first
        while last < len(self._segments) and self._segments[last].start < end:
            last += 1
        return first, last

    @classmethod
    def of(cls, data: bytes) -> Content:
        """A disk that is all data."""
        return cls(len(data)).put(0, data)

    @classmethod
    def random(
        cls, size: int, seed: int = 0, density: float = 0.5, grain: int = 64 * KIB, touched: int | None = None
    ) -> Content:
        """
        A mix of grains: text, noise, a few sectors of noise in a hole, explicit zeros, and holes.

        `density` is the share of grains that are not holes; of those one in five is explicit zeros. With
        `touched` only so many grains are considered, the first and the last always among them; without it
        that happens by itself when the disk has more than 4096 grains. No two sectors of data are alike,
        so that a reader which takes one for another is found out.
        """
        rng = random.Random(f"content {seed} {size} {grain}")
        grains = -(-size // grain)
        if touched is None and grains > 4096:
            touched = 256
        if touched is None or touched >= grains:
            chosen = [index for index in range(grains) if rng.random() < density]
        else:
            chosen = sorted({0, grains - 1} | {rng.randrange(grains) for _ in range(touched)})
        segments = []
        for index in chosen:
            start = index * grain
            end = min(size, start + grain)
            match rng.randrange(5):
                case 0:
                    segments.append(Segment(start, end, Part.ZERO))
                case 1 | 2:
                    segments.append(Segment(start, end, Part.DATA, text(rng, start, end - start)))
                case 3:
                    segments.append(Segment(start, end, Part.DATA, rng.randbytes(end - start)))
                case _:
                    first = start + rng.randrange(-(-(end - start) // SECTOR)) * SECTOR
                    last = min(end, first + 3 * SECTOR)
                    segments.append(Segment(first, last, Part.DATA, rng.randbytes(last - first)))
        return cls(size, segments)

    # Looking

    def segments(self, start: int = 0, end: int | None = None) -> Iterator[Segment]:
        """Give [start, end) as segments in order, holes included, nothing left out."""
        end = self.size if end is None else end
        at = start
        first, last = self._touching(start, end)
        for index in range(first, last):
            segment = self._segments[index].cut(start, end)
            if segment.start > at:
                yield Segment(at, segment.start, Part.HOLE)
            yield segment
            at = segment.end
        if at < end:
            yield Segment(at, end, Part.HOLE)

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes that must be read there, holes as zeros."""
        length = self.size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} are not inside a disk of {self.size} bytes")
        pieces = (
            segment.data or bytes(segment.end - segment.start)
            for segment in self.segments(offset, offset + length)
        )
        return b"".join(pieces)

    def part(self, start: int, end: int) -> Part:
        """HOLE or ZERO if all of [start, end) is that, otherwise DATA."""
        found = {segment.part for segment in self.segments(start, min(end, self.size))}
        return found.pop() if len(found) == 1 else Part.DATA

    def touched(self, unit: int) -> Iterator[int]:
        """The indexes of the units of `unit` bytes that aren't entirely hole, ascending."""
        done = 0
        for segment in self._segments:
            for index in range(max(done, segment.start // unit), -(-segment.end // unit)):
                yield index
                done = index + 1

    def sha256(self) -> str:
        """The digest of the whole disk as read, holes as zeros; the time is that of hashing `size` bytes."""
        digest = hashlib.sha256()
        nothing = bytes(MIB)
        for segment in self.segments():
            if segment.data:
                digest.update(segment.data)
                continue
            for at in range(segment.start, segment.end, MIB):
                digest.update(nothing[: min(MIB, segment.end - at)])
        return digest.hexdigest()

    # Deriving

    def settled(self, unit: int) -> Content:
        """This content once units of `unit` bytes are written whole: holes in touched ones become zeros."""
        result: list[Segment] = []
        covered = 0
        for segment in self._segments:
            start = max(covered, segment.start // unit * unit)
            covered = max(covered, min(self.size, -(-segment.end // unit) * unit))
            # Each round takes the units that this segment opens, and what later segments have in them.
            result += [
                piece._replace(part=Part.ZERO) if piece.part is Part.HOLE else piece
                for piece in self.segments(start, covered)
            ]
        return Content(self.size, result)

    def solid(self) -> Content:
        """This content without holes, as a flat file has it: what was hole is explicit zeros."""
        return Content(self.size).zero(0, self.size).pasted(0, self._segments)

    def without_zeros(self) -> Content:
        """This content with explicit zeros left out, as a writer does that knows no parent."""
        return Content(self.size, [segment for segment in self._segments if segment.part is Part.DATA])

    def over(self, parent: Content) -> Content:
        """What a child with this content shows over a parent; past the parent's end there are zeros."""
        result: list[Segment] = []
        for segment in self.segments():
            if segment.part is not Part.HOLE:
                result.append(segment)
                continue
            end = min(segment.end, parent.size)
            if segment.start < end:
                result.extend(parent.segments(segment.start, end))
            if max(segment.start, parent.size) < segment.end:
                result.append(Segment(max(segment.start, parent.size), segment.end, Part.ZERO))
        return Content(self.size, result)

    def resized(self, size: int) -> Content:
        """This content cut off, or with a hole behind it."""
        return Content(size, list(self.segments(0, min(size, self.size))))

    def sliced(self, start: int, length: int) -> Content:
        """The bytes [start, start+length) as a disk of their own."""
        return Content(length).pasted(-start, self.segments(start, start + length))

    def pasted(self, shift: int, segments: Iterable[Segment]) -> Content:
        """This content with other segments, moved by `shift` bytes, put over it."""
        for segment in segments:
            self._replace(segment._replace(start=segment.start + shift, end=segment.end + shift))
        return self

    @classmethod
    def joined(cls, pieces: Iterable[Content]) -> Content:
        """Contents one after the other, as the extents of a disk lie."""
        pieces = list(pieces)
        result = cls(sum(piece.size for piece in pieces))
        at = 0
        for piece in pieces:
            result.pasted(at, piece.segments())
            at += piece.size
        return result


def text(rng: random.Random, offset: int, length: int) -> bytes:
    """Bytes like a log file, which deflate well, each sector naming its own place on the disk."""
    page = " ".join(rng.choices(_WORDS, k=100)).ljust(SECTOR)
    sectors = range(offset // SECTOR, -(-(offset + length) // SECTOR))
    return "".join(f"{sector:016x} {page}"[:SECTOR] for sector in sectors).encode()[:length]
