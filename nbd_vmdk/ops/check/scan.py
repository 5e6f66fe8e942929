"""Grain tables many at a time: read in long sequential pieces, to be looked at with numpy.

The engine reads a table when a request needs it; a check needs all of them, and is as fast as they can be
read: 2000 GiB are 128 MiB of tables in each of two copies.  They come in windows, so that memory is bounded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB

#: Bytes of tables looked at together: small enough for the processor's cache to help, large enough that
#: numpy's cost per call does not matter.
_WINDOW: Final = 2 * MIB

#: A row of integers, as they stand in the file or as places computed from them.
Numbers = npt.NDArray[Any]


def read_words(storage: Storage, at: int, count: int, width: int) -> Numbers:
    """``count`` little-endian integers of ``width`` bytes from byte ``at`` on, as 64-bit ones."""
    raw = np.frombuffer(storage.read(at, count * width), dtype=f"<u{width}")
    return raw.astype(np.uint64 if width == 8 else np.int64)


@dataclass(frozen=True, slots=True)
class TableSet:
    """The grain tables of one directory.

    places   byte position of each table, 0 where there is none to read; each lies inside the file
    entries  integers in a table
    width    bytes of one
    """

    storage: Storage
    places: Numbers
    entries: int
    width: int

    @property
    def length(self) -> int:
        """Bytes of one table."""
        return self.entries * self.width

    @property
    def bytes(self) -> int:
        """Bytes of all tables that are there."""
        return self.bytes_in(0, len(self.places))

    def bytes_in(self, first: int, count: int) -> int:
        """Bytes of those tables that are there, of ``count`` from ``first`` on."""
        return int(np.count_nonzero(self.places[first : first + count])) * self.length

    def windows(self) -> Iterator[tuple[int, int]]:
        """Split the tables into windows, (first table, number of tables); those without any are left out."""
        step = max(_WINDOW // self.length, 1)
        for first in range(0, len(self.places), step):
            if self.places[first : first + step].any():
                yield first, min(step, len(self.places) - first)

    def rows(self, first: int, count: int) -> Numbers:
        """Some tables, one a row; one that is not there is all zeros.  Neighbours are read in one go."""
        rows = np.zeros((count, self.entries), dtype=f"<u{self.width}")
        places = self.places[first : first + count]
        there = np.flatnonzero(places)
        if not len(there):
            return rows
        apart = (np.diff(places[there]) != self.length) | (np.diff(there) != 1)
        edges = np.flatnonzero(apart) + 1
        view = rows.reshape(-1).view(np.uint8).data
        for run in np.split(there, edges):
            begin, end = int(run[0]), int(run[-1]) + 1
            piece = view[begin * self.length : end * self.length]
            self.storage.read_into(piece, int(places[begin]))
        return rows


def overlapping(starts: Numbers, length: int) -> Numbers:
    """Indexes of the things of ``length`` that overlap another one, each starting at one of ``starts``."""
    order = np.argsort(starts, kind="stable")
    near = np.diff(starts[order]) < length
    return np.unique(np.concatenate((order[1:][near], order[:-1][near])))


def merged(ranges: list[tuple[int, int]]) -> tuple[Numbers, Numbers]:
    """Ranges [begin, end) sorted, neighbours and overlapping ones made one: all begins, all ends."""
    if not ranges:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    pairs = np.array(ranges, dtype=np.int64)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    ends = np.maximum.accumulate(pairs[:, 1])
    fresh = np.concatenate(([True], pairs[1:, 0] > ends[:-1]))
    last = np.concatenate((fresh[1:], [True]))
    return pairs[fresh, 0], ends[last]


def touching(begins: Numbers, ends: Numbers, starts: Numbers, length: int) -> Numbers:
    """Which of the things of ``length`` at ``starts`` overlap one of the merged ranges: a mask."""
    if not len(begins):
        return np.zeros(len(starts), dtype=bool)
    next_end = np.searchsorted(ends, starts, side="right")
    inside = next_end < len(begins)
    found = np.zeros(len(starts), dtype=bool)
    found[inside] = begins[next_end[inside]] < starts[inside].astype(np.int64) + length
    return found
