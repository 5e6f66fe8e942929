"""What a hosted sparse or COWD file must be after a clean close, read with the builders' own header code."""

from __future__ import annotations

import array
import os
from dataclasses import dataclass, field
from itertools import pairwise

from tests.images import cowd, hosted, peek
from tests.images.content import SECTOR
from tests.images.hosted import HAS_RGD, ZERO_GTE

#: What files with tables begin with.
MAGICS = (b"KDMV", b"COWD")
#: Where a hosted extent says that it was not closed cleanly.
UNCLEAN_AT = 72


@dataclass
class Tables:
    """The directories and tables of one file; entries are sectors, a missing table has none."""

    header: hosted.Header | cowd.Head
    size: int
    gd: list[int]
    rgd: list[int]  # empty without one
    gt: dict[int, list[int]] = field(default_factory=dict)
    rgt: dict[int, list[int]] = field(default_factory=dict)

    @property
    def grain(self) -> int:
        return self.header.grain_size * SECTOR

    @property
    def unclean_at(self) -> int:
        """The byte that says whether it was closed cleanly."""
        return UNCLEAN_AT if isinstance(self.header, hosted.Header) else cowd.UNCLEAN_AT

    @property
    def used_end(self) -> int:
        """The byte behind the last grain or table."""
        ends = [end for _, end in self.metadata_ranges()]
        return max(ends + [at + self.grain for at in self.grains.values()])

    @property
    def grains(self) -> dict[int, int]:
        """Where each grain that has a place lies, in bytes, by its index."""
        found = {}
        for number, entries in self.gt.items():
            for slot, entry in enumerate(entries):
                if entry > 1:
                    found[number * self.header.gtes_per_gt + slot] = entry * SECTOR
        return found

    def entry(self, index: int) -> tuple[int, int | None]:
        """The entry of a grain in both copies; None if there is no second one."""
        number, slot = divmod(index, self.header.gtes_per_gt)
        entries = self.gt.get(number)
        twin = self.rgt.get(number)
        return entries[slot] if entries else 0, twin[slot] if twin else None

    def table_ranges(self) -> list[tuple[int, int]]:
        """[start, end) in bytes of every table of either directory."""
        length = self.header.gtes_per_gt * 4
        return [(at * SECTOR, at * SECTOR + length) for at in [*self.gd, *self.rgd] if at]

    def metadata_ranges(self) -> list[tuple[int, int]]:
        """[start, end) in bytes of header, descriptor, directories and tables."""
        head = self.header
        ranges = [*self.table_ranges(), *self.directory_ranges()]
        if isinstance(head, cowd.Head):
            return [(0, 4 * SECTOR), *ranges]
        if head.descriptor_offset:
            begin = head.descriptor_offset * SECTOR
            ranges.append((begin, begin + head.descriptor_size * SECTOR))
        return [(0, SECTOR), *ranges]

    def directory_ranges(self) -> list[tuple[int, int]]:
        """[start, end) in bytes of both directories."""
        places = [self.header.gd_offset]
        if self.rgd:
            assert isinstance(self.header, hosted.Header)
            places.append(self.header.rgd_offset)
        return [(at * SECTOR, at * SECTOR + 4 * len(self.gd)) for at in places]


def numbers(data: bytes) -> list[int]:
    found = array.array("I", data)
    assert found.itemsize == 4
    return list(found)


def parse_tables(data: bytes) -> Tables:
    """Take a file's bytes apart."""
    head = (cowd.Head if data.startswith(b"COWD") else hosted.Header).unpack(data)
    count = -(-head.capacity // (head.gtes_per_gt * head.grain_size))

    def directory(sector: int) -> list[int]:
        return numbers(data[sector * SECTOR : sector * SECTOR + 4 * count])

    tables = Tables(
        head,
        len(data),
        directory(head.gd_offset),
        directory(head.rgd_offset) if isinstance(head, hosted.Header) and head.flags & HAS_RGD else [],
    )
    for entries, into in ((tables.gd, tables.gt), (tables.rgd, tables.rgt)):
        for number, sector in enumerate(entries):
            if sector:
                at = sector * SECTOR
                into[number] = numbers(data[at : at + 4 * head.gtes_per_gt])
    return tables


def read_tables(path: str) -> Tables:
    return parse_tables(peek(path, 0, os.path.getsize(path)))


def check_tables(tables: Tables, *, clean: bool = True) -> None:
    """Both copies agree, every grain is in the file, alone, and outside the metadata; the flag is down."""
    head = tables.header
    if clean:
        assert not head.unclean, "uncleanShutdown is set"
        if tables.rgd:
            assert [bool(entry) for entry in tables.gd] == [bool(entry) for entry in tables.rgd]
            assert tables.gt == tables.rgt, "the two copies of the tables differ"
    seen: list[tuple[int, int]] = []
    zeros = {entry for entries in tables.gt.values() for entry in entries if entry == 1}
    declared = isinstance(head, hosted.Header) and head.flags & ZERO_GTE
    assert not zeros or declared, "an entry says zeros in a file that does not declare it"
    if clean and isinstance(head, cowd.Head):
        assert tables.used_end <= head.free_sector * SECTOR <= tables.size, "freeSector is wrong"
    limit = -(-head.capacity // head.grain_size)
    for index, at in tables.grains.items():
        assert index < limit, f"grain {index} is behind the end of the disk"
        # Readers need the last grain only as far as the disk goes.
        need = min(tables.grain, (head.capacity - index * head.grain_size) * SECTOR)
        assert at + need <= tables.size, f"grain {index} reaches past the end of the file"
        seen.append((at, at + tables.grain))
    for _, end in tables.table_ranges():
        assert end <= tables.size, "a table reaches past the end of the file"
    places = sorted([*seen, *tables.metadata_ranges()])
    for (_, end), (begin, _) in pairwise(places):
        assert begin >= end, f"two things lie over each other at byte {begin}"


def check_sound(path: str) -> Tables:
    """A file that was closed cleanly; what was found in it."""
    tables = read_tables(path)
    check_tables(tables)
    return tables
