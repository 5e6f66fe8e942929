"""
Builder of hosted sparse extents ("KDMV", version 1 and 2).

The usual layout of a new file is: header, descriptor area, redundant directory and its tables, directory
and its tables, zeros up to the first grain. layout() computes it; the options of write_hosted() leave it
in every way that files in circulation do, and in some that only damage does.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.images import peek
from tests.images.content import SECTOR, Content, Part

GD_AT_END = 2**64 - 1  # the header says: look in the footer

NEWLINES_VALID = 1 << 0
HAS_RGD = 1 << 1
ZERO_GTE = 1 << 2
COMPRESSED = 1 << 16
MARKERS = 1 << 17

# Edits a directory (in place) and its tables, by table number, before they are written. A table that is
# not in the dict is all zeros; adding it is allowed if the directory has an entry for it.
Edit = Callable[[list[int], dict[int, list[int]]], None]


@dataclass(frozen=True)
class Header:
    """The header of a hosted sparse extent, its fields in the order of the file; positions in sectors."""

    magic: bytes = b"KDMV"
    version: int = 1
    flags: int = NEWLINES_VALID | HAS_RGD
    capacity: int = 0
    grain_size: int = 128
    descriptor_offset: int = 0
    descriptor_size: int = 0
    gtes_per_gt: int = 512
    rgd_offset: int = 0
    gd_offset: int = 0
    overhead: int = 0
    unclean: int = 0
    newlines: bytes = b"\n \r\n"
    compress_algorithm: int = 0

    LAYOUT = struct.Struct("<4sIIQQQQIQQQB4sH433x")

    def pack(self) -> bytes:
        """The 512 bytes as they stand in the file."""
        return self.LAYOUT.pack(*(getattr(self, name) for name in self.__dataclass_fields__))

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Take the fields from a sector; nothing is checked."""
        return cls(*cls.LAYOUT.unpack(data[:SECTOR]))


@dataclass(frozen=True)
class Layout:
    """Where the tables lie, in sectors; `end` is theirs, and overhead that rounded up to a grain."""

    tables: int
    directory_sectors: int
    table_sectors: int
    rgd: int
    gd: int
    end: int
    overhead: int


def layout(
    capacity: int,
    grain_sectors: int = 128,
    gtes: int = 512,
    first: int = 21,
    *,
    rgd: bool = True,
    present: int | None = None,
) -> Layout:
    """The places in a file whose tables begin at sector `first`; `present` of them exist, None for all."""
    tables = -(-capacity // (gtes * grain_sectors))
    directory_sectors = -(-4 * tables // SECTOR)
    table_sectors = -(-4 * gtes // SECTOR)
    copy = directory_sectors + table_sectors * (tables if present is None else present)
    gd = first + copy if rgd else first
    end = gd + copy
    overhead = -(-end // grain_sectors) * grain_sectors
    return Layout(tables, directory_sectors, table_sectors, first if rgd else 0, gd, end, overhead)


@dataclass
class HostedExtent:
    """
    What write_hosted() wrote. `content` is what the extent alone shows; positions are sectors.

    gd and rgd tell where each table was written (0: it is missing), whatever an edit made of the directories.
    """

    path: str
    content: Content
    header: Header
    gd_sector: int
    rgd_sector: int  # 0 without one
    gd: list[int] = field(default_factory=list)
    rgd: list[int] = field(default_factory=list)
    grains: dict[int, int] = field(default_factory=dict)  # by grain index
    end: int = 0  # bytes

    def gde_at(self, table: int, *, redundant: bool = False) -> int:
        """Byte offset of a directory's entry in the file."""
        return (self.rgd_sector if redundant else self.gd_sector) * SECTOR + 4 * table

    def gte_at(self, grain: int, *, redundant: bool = False) -> int:
        """Byte offset of a grain's entry in the file; its table must be there."""
        table, index = divmod(grain, self.header.gtes_per_gt)
        entry = (self.rgd if redundant else self.gd)[table]
        assert entry, "the table is missing"
        return entry * SECTOR + 4 * index

    def read_gtes(self, grains: Iterable[int], *, redundant: bool = False) -> list[int]:
        """Entries as they stand in the file now, for tests that had it changed."""
        places = [self.gte_at(grain, redundant=redundant) for grain in grains]
        return [int.from_bytes(peek(self.path, place, 4), "little") for place in places]

    def grain_at(self, grain: int) -> int:
        """Byte offset of a grain's data in the file."""
        return self.grains[grain] * SECTOR


def write_hosted(
    path: str,
    content: Content,
    *,
    grain_sectors: int = 128,
    gtes: int = 512,
    version: int | None = None,
    flags: int | None = None,
    rgd: bool = True,
    preallocate_tables: bool = True,
    descriptor: bytes | None = None,
    descriptor_sectors: int | None = None,
    capacity_sectors: int | None = None,
    tables_last: bool = False,
    zero_gte: bool = False,
    shuffle_grains: int | None = None,
    misalign: int = 0,
    gap_sectors: int = 0,
    beyond: int = 0,
    overhead: int | None = None,
    unclean: bool = False,
    edit_tables: Edit | None = None,
    edit_redundant: Edit | None = None,
    header: dict[str, Any] | None = None,
) -> HostedExtent:
    """
    Write an extent that shows `content`.

    descriptor: None leaves no room for one, as in VMware's split extents; b"" reserves an area of NULs, as
    QEMU does in its split extents. zero_gte: explicit zeros become GTE 1, and flag bit 2 and version 2 are
    set unless given; otherwise they become grains of zeros. preallocate_tables=False leaves tables without
    a grain out (GDE 0). tables_last puts all tables behind the grains. shuffle_grains is a seed: grains lie
    in that order. misalign shifts all grains by sectors; gap_sectors leaves unreferenced 0xEE between them.
    beyond fills the last grain behind the end of the disk. edit_tables and edit_redundant change one copy of
    the tables before it is written. overhead overrides the header's field alone, and so does what `header`
    holds by the names of Header's fields.
    """
    grain_bytes = grain_sectors * SECTOR
    effective = content.settled(grain_bytes)
    capacity = content.sectors if capacity_sectors is None else capacity_sectors
    wanted = list(effective.touched(grain_bytes))
    zeros = {i for i in wanted if zero_gte and _part(effective, i, grain_bytes) is Part.ZERO}
    data = [i for i in wanted if i not in zeros]
    if shuffle_grains is not None:
        random.Random(shuffle_grains).shuffle(data)

    count = -(-capacity // (gtes * grain_sectors))
    present = list(range(count)) if preallocate_tables else sorted({i // gtes for i in wanted})
    area = 0 if descriptor is None else 20 if descriptor_sectors is None else descriptor_sectors
    if descriptor is not None and len(descriptor) > area * SECTOR:
        raise ValueError(f"the descriptor has {len(descriptor)} bytes, its area {area * SECTOR}")

    step = grain_sectors + gap_sectors
    places = layout(capacity, grain_sectors, gtes, 1 + area, rgd=rgd, present=len(present))
    first_grain = places.overhead + misalign
    if tables_last:
        first_grain = -(-(1 + area) // grain_sectors) * grain_sectors + misalign
        behind = first_grain + len(data) * step
        places = layout(capacity, grain_sectors, gtes, behind, rgd=rgd, present=len(present))
    grains = {index: first_grain + place * step for place, index in enumerate(data)}

    tables: dict[int, list[int]] = {}
    for index, sector in [*grains.items(), *((i, 1) for i in zeros)]:
        tables.setdefault(index // gtes, [0] * gtes)[index % gtes] = sector
    base_flags = NEWLINES_VALID | (HAS_RGD if rgd else 0) | (ZERO_GTE if zero_gte else 0)
    head = Header(
        version=(2 if zero_gte else 1) if version is None else version,
        flags=base_flags if flags is None else flags,
        capacity=capacity,
        grain_size=grain_sectors,
        descriptor_offset=1 if area else 0,
        descriptor_size=area,
        gtes_per_gt=gtes,
        rgd_offset=places.rgd,
        gd_offset=places.gd,
        overhead=(first_grain - misalign if tables_last else places.overhead)
        if overhead is None
        else overhead,
        unclean=int(unclean),
    )
    head = replace(head, **(header or {}))

    result = HostedExtent(path, effective, head, places.gd, places.rgd, grains=grains)
    with open(path, "wb") as file:

        def put(at: int, what: bytes) -> None:
            file.seek(at)
            file.write(what)

        for redundant in (True, False) if rgd else (False,):
            base = places.rgd if redundant else places.gd
            directory = [0] * count
            for place, table in enumerate(present):
                directory[table] = base + places.directory_sectors + place * places.table_sectors
            spots = list(directory)
            copy = {number: list(entries) for number, entries in tables.items()}
            edit = edit_redundant if redundant else edit_tables
            if edit is not None:
                edit(directory, copy)
            put(base * SECTOR, struct.pack(f"<{count}I", *directory))
            for number, entries in copy.items():
                assert spots[number], "the table is missing"
                put(spots[number] * SECTOR, struct.pack(f"<{gtes}I", *entries))
            (result.rgd if redundant else result.gd).extend(spots)
        for index, sector in grains.items():
            _put_grain(put, effective, index, grain_bytes, sector, beyond)
            if gap_sectors:
                put((sector + grain_sectors) * SECTOR, b"\xee" * (gap_sectors * SECTOR))
        result.end = max(
            (first_grain + len(data) * step) * SECTOR,
            places.end * SECTOR,
            0 if tables_last else places.overhead * SECTOR,
        )
        file.truncate(result.end)
        put(0, head.pack())
        put(SECTOR, descriptor or b"")
    return result


def _part(content: Content, index: int, grain_bytes: int) -> Part:
    return content.part(index * grain_bytes, (index + 1) * grain_bytes)


def _put_grain(
    put: Callable[[int, bytes], None],
    content: Content,
    index: int,
    grain_bytes: int,
    sector: int,
    beyond: int,
) -> None:
    """Write a grain's data only, so that the file stays sparse however large the grain is."""
    start = index * grain_bytes
    end = min(content.size, start + grain_bytes)
    for segment in content.segments(start, end):
        if segment.data:
            put(sector * SECTOR + segment.start - start, segment.data)
    if beyond and end < start + grain_bytes:
        put(sector * SECTOR + end - start, bytes([beyond]) * (start + grain_bytes - end))
