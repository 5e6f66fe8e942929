"""Space in a file with tables that nothing names, found and given back.

It is what crashed writers and freed grains leave.  Everything that may be in use counts as used: header,
descriptor, directories, the tables that either directory names, the grains that either table names.  What is
between goes back to the file system as a hole, and what is behind the last of it is cut off.

Memory is four bytes for each grain in use, and as much again while they are put in order.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np

from nbd_vmdk.extents.cowd import CowdExtent
from nbd_vmdk.extents.hosted import HostedExtent
from nbd_vmdk.ondisk import cowd
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import KIB, MIB, SECTOR, align_down, align_up

#: Smaller holes give no block back.
_LEAST: Final = 4 * KIB
_ENTRIES: Final = np.dtype("<u4")


class Unused:
    """What is unused in the file of one extent: ``gaps`` as (byte, length), and where the last use ends."""

    def __init__(self, extent: HostedExtent | CowdExtent) -> None:
        self.storage = extent.storage
        self._is_cowd = isinstance(extent, CowdExtent)
        if isinstance(extent, HostedExtent):
            header = extent.header
            directories = [header.directory_at]
            if header.redundant_at is not None:
                directories.append(header.redundant_at)
            count, per_table, lowest = header.directory_entries, header.entries_per_table, 2
            front = max(header.overhead_sectors, header.descriptor_sector + header.descriptor_sectors, 1)
        else:
            directories = [extent.header.directory_sector * SECTOR]
            count, per_table, lowest = extent.header.directory_entries, cowd.ENTRIES_PER_TABLE, 1
            front = -(-extent.header.overhead // SECTOR)
        table = align_up(per_table * 4, SECTOR) // SECTOR
        area = align_up(count * 4, SECTOR) // SECTOR
        tables = np.unique(np.concatenate([_words(self.storage, at, count) for at in directories]))
        tables = tables[tables > 0]
        found = [grains[grains >= lowest] for grains in _read_tables(self.storage, tables, per_table)]
        grains = np.unique(np.concatenate(found)) if found else np.zeros(0, _ENTRIES)
        begins = np.concatenate(
            [
                np.array([0, *(at // SECTOR for at in directories)], np.int64),
                tables.astype(np.int64),
                grains.astype(np.int64),
            ]
        )
        lengths = np.concatenate(
            [
                np.array([front, *(area for _ in directories)], np.int64),
                np.full(len(tables), table, np.int64),
                np.full(len(grains), extent.grain // SECTOR, np.int64),
            ]
        )
        order = np.argsort(begins, kind="stable")
        begins = begins[order]
        reached = np.maximum.accumulate(begins + lengths[order])
        wide = np.flatnonzero((begins[1:] - reached[:-1]) * SECTOR >= _LEAST)
        gaps = [(int(reached[i]) * SECTOR, int(begins[i + 1]) * SECTOR) for i in wide.tolist()]
        # Whole blocks: what is left of one that is in use can't be given back.
        inner = [(align_up(begin, _LEAST), align_down(end, _LEAST)) for begin, end in gaps]
        self.gaps = [(begin, end - begin) for begin, end in inner if end > begin]
        #: What a last grain reaches beyond the end of the file was never written.
        self.end = min(int(reached[-1]) * SECTOR, self.storage.size)

    @property
    def occupied(self) -> int:
        """Bytes that would be given back."""
        rest = self.storage.size - self.end
        return sum(occupied_in(self.storage, at, length) for at, length in [*self.gaps, (self.end, rest)])

    def release(self) -> None:
        """Give all of it back."""
        for at, length in self.gaps:
            self.storage.punch(at, length)
        if self.end < self.storage.size:
            if self._is_cowd:
                # Other writers go on at freeSector: a file that ends before it has room that is not used.
                free = (-(-self.end // SECTOR)).to_bytes(4, "little")
                self.storage.truncate(align_up(self.end, SECTOR))
                self.storage.write(free, cowd.FREE_SECTOR_AT)
            else:
                self.storage.truncate(self.end)
        self.storage.sync()


def occupied_in(storage: Storage, at: int, length: int) -> int:
    """Bytes of a range of a file that are no hole."""
    length = min(length, storage.size - at)
    return sum(count for count, is_data in storage.segments(at, length) if is_data) if length > 0 else 0


def _words(storage: Storage, at: int, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint32]]":
    return np.frombuffer(storage.read(at, count * 4), _ENTRIES)


def _read_tables(
    storage: Storage, sectors: "np.ndarray[tuple[int], np.dtype[np.uint32]]", per_table: int
) -> "Iterator[np.ndarray[tuple[int], np.dtype[np.uint32]]]":
    """The entries of tables; those that lie one behind the other are read together."""
    step = align_up(per_table * 4, SECTOR) // SECTOR
    at = 0
    places = sectors.tolist()
    while at < len(places):
        end = at + 1
        while (
            end < len(places) and places[end] == places[end - 1] + step and (end - at) * per_table * 4 < MIB
        ):
            end += 1
        together = per_table * 4 % SECTOR == 0
        if not together:
            end = at + 1
        yield _words(storage, places[at] * SECTOR, (end - at) * per_table)
        at = end
