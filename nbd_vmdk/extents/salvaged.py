"""Grain tables put together in memory, from the records of a damaged stream and what is left of its tables.

See salvage.py for what is believed, and why.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import Unsupported
from nbd_vmdk.extents.stream import LOST_ENTRY
from nbd_vmdk.ondisk.hosted import HostedHeader
from nbd_vmdk.ondisk.stream import GRAIN_MARKER
from nbd_vmdk.pages import Pages
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB, SECTOR

#: Bytes of tables in memory at most; the usual ones of 64 KiB grains are those of 2 TiB.
_MAX_TABLES: Final = 128 * MIB


class SalvagedTables(Pages):
    """Grain tables put together in memory: those with a grain are pinned, the others need no memory."""

    def __init__(self, storage: Storage, header: HostedHeader, cache: Cache) -> None:
        super().__init__(
            storage,
            cache,
            width=4,
            per_page=header.entries_per_table,
            total=header.directory_entries * header.entries_per_table,
            locate=lambda _page: None,
        )
        self._count = header.directory_entries
        self._grain_sectors = header.grain_sectors
        #: Starts and ends, alternating and ascending, of the ranges of tables known to be all holes.
        self._holes: list[int] = []
        self._lost = array("I", [LOST_ENTRY]) * self.per_page
        self._numbers: list[int] = []  # of the tables in memory, ascending, once somebody asks
        self._disputed: set[int] = set()
        #: Records that a table has no entry for, by their sectors; and the entries of all tables for them.
        self._doubtful: dict[int, int] = {}

    def add(self, grain: int, sector: int) -> None:
        """Enter a record that was found.  Of two that claim to be the same grain neither is believed."""
        number, slot = divmod(grain, self.per_page)
        table = self._made(number)
        if table[slot] != LOST_ENTRY:
            self._disputed.add(grain)
        table[slot] = LOST_ENTRY if grain in self._disputed else sector

    def _made(self, number: int) -> "array[int]":
        """A table in memory, made of lost entries if it was not there."""
        table = self.pinned.get(number)
        if table is None:
            if (len(self.pinned) + 1) * self.per_page * 4 > _MAX_TABLES:
                raise Unsupported(
                    self.storage.name, what=f"its tables would need more than {_MAX_TABLES} bytes of memory"
                )
            table = self.pinned[number] = array("I", self._lost)
        return table

    def absent(self, first: int, last: int) -> None:
        """Note that no tables exist from ``first`` up to ``last``; calls come in ascending order."""
        if self._holes and self._holes[-1] == first:
            self._holes[-1] = last
        elif first < last:
            self._holes += (first, last)

    def compare(self, number: int, entries: "array[int]", *, zeros: bool) -> None:
        """Bring a table in line with the file's.

        What that leaves out is believed if ``zeros`` is true and it agrees with every record that was found.
        """
        zeros = zeros and self.matches(number, entries)
        table = self._made(number)
        for slot, entry in enumerate(entries):
            record = table[slot]
            if record == LOST_ENTRY:
                if entry > 1 or zeros:
                    table[slot] = entry
            elif entry not in (0, 1, record) and self._is_at(number * self.per_page + slot, entry):
                table[slot] = entry
            elif entry != record:
                self._doubtful[record] = number * self.per_page + slot

    def matches(self, number: int, entries: "array[int]") -> bool:
        """Whether a table of the file names the records that were found, and there are some."""
        pairs = zip(self.pinned.get(number, ()), entries, strict=False)
        found = [record == entry for record, entry in pairs if record != LOST_ENTRY]
        return bool(found) and all(found)

    def doubt(self, number: int) -> None:
        """Note that nothing is known of a table, though it may have records."""
        if number in self.pinned:
            self.compare(number, array("I", bytes(self.per_page * 4)), zeros=False)

    def _is_at(self, grain: int, sector: int) -> bool:
        at = sector * SECTOR
        if at + GRAIN_MARKER.size > self.storage.size:
            return False
        found, size = GRAIN_MARKER.unpack(self.storage.read(at, GRAIN_MARKER.size))
        return (found, size > 0) == (grain * self._grain_sectors, True)

    def settle_doubts(self, tables: "Iterator[array[int]]", suspects: set[int]) -> None:
        """Drop every record that its own table lacks and another entry claims; ``tables`` are all of them.

        ``suspects`` (sectors) are dropped without being claimed.
        """
        self._drop(suspects)
        if self._doubtful:
            for entries in tables:
                self._drop(set(entries))

    def _drop(self, sectors: set[int]) -> None:
        for sector in self._doubtful.keys() & sectors:
            number, slot = divmod(self._doubtful.pop(sector), self.per_page)
            self.pinned[number][slot] = LOST_ENTRY

    def get(self, page: int) -> "array[int] | None":
        """See Pages: None for a table of holes."""
        return self.pinned.get(page) or (None if bisect_right(self._holes, page) % 2 else self._lost)

    def empty_from(self, number: int, limit: int) -> int:
        """See GrainTables: how many tables from ``number`` on are all holes."""
        found = 0
        while found < limit and self.get(number + found) is None:
            found = min(limit, self.alike_until(number + found) - number)
        return found

    def alike_until(self, number: int) -> int:
        """The table where those that are not in memory, as ``number``, end to be all holes or all lost."""
        if len(self._numbers) != len(self.pinned):
            self._numbers = sorted(self.pinned)
        ends = []
        for edges in (self._numbers, self._holes):
            index = bisect_right(edges, number)
            ends += edges[index : index + 1]
        return min(ends, default=self._count)
