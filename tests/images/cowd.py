"""
Builder of COWD extents (VMFSSPARSE), the deltas of older ESX hosts.

One directory, no second copy; tables of 4096 entries made on demand; grains of one sector by default. A table
is placed when its first grain comes, directly before it, as the host's own allocation at freeSector does.
There is no code for a grain of zeros: explicit zeros are written out.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

from tests.images import peek
from tests.images.content import SECTOR, Content

GTES = 4096
TABLE_SECTORS = 32
GD_OFFSET = 4

ROOT = 1
CHECKABLE = 2
INCONSISTENT = 4

FREE_SECTOR_AT = 28
GENERATION_AT = 1060
SAVED_GENERATION_AT = 1636
UNCLEAN_AT = 1648


@dataclass(frozen=True)
class Head:
    """The fields of a header that tell where things are, and what a writer sets; positions in sectors."""

    capacity: int
    grain_size: int
    gd_offset: int
    free_sector: int
    unclean: int

    @property
    def gtes_per_gt(self) -> int:
        """Entries of a table."""
        return GTES

    @classmethod
    def unpack(cls, data: bytes) -> Head:
        """Take the fields from the header; nothing is checked."""
        magic, _version, _flags, capacity, grain, gd, _entries, free = struct.unpack_from("<4s7I", data)
        assert magic == b"COWD"
        return cls(capacity, grain, gd, free, struct.unpack_from("<I", data, UNCLEAN_AT)[0])


@dataclass
class CowdExtent:
    """What write_cowd() wrote; grains maps grain index to sector, free_sector is the true one."""

    path: str
    content: Content
    grain_sectors: int
    gd: list[int]
    grains: dict[int, int] = field(default_factory=dict)
    free_sector: int = 0

    def gde_at(self, table: int) -> int:
        """Byte offset of a directory's entry in the file."""
        return GD_OFFSET * SECTOR + 4 * table

    def gte_at(self, grain: int) -> int:
        """Byte offset of a grain's entry in the file; its table must be there."""
        table, index = divmod(grain, GTES)
        assert self.gd[table], "the table is missing"
        return self.gd[table] * SECTOR + 4 * index

    def grain_at(self, grain: int) -> int:
        """Byte offset of a grain's data in the file."""
        return self.grains[grain] * SECTOR

    def stored_free_sector(self) -> int:
        """The freeSector that stands in the file now."""
        return int.from_bytes(peek(self.path, FREE_SECTOR_AT, 4), "little")


def header(
    capacity: int,
    *,
    grain_sectors: int = 1,
    gd_entries: int,
    free_sector: int,
    version: int = 1,
    flags: int = ROOT | CHECKABLE,
    parent_name: bytes = b"",
    generation: int = 0,
    saved_generation: int = 0,
    name: bytes = b"",
    description: bytes = b"",
    unclean: bool = False,
) -> bytes:
    """The 2048 bytes of the header. With flag ROOT the union holds a geometry, else the parent's name."""
    data = bytearray(4 * SECTOR)
    struct.pack_into(
        "<4s7I", data, 0, b"COWD", version, flags, capacity, grain_sectors, GD_OFFSET, gd_entries, free_sector
    )
    if flags & ROOT:
        struct.pack_into("<3I", data, 32, capacity // (16 * 63), 16, 63)
    else:
        struct.pack_into("<1024sI", data, 32, parent_name, generation)
    struct.pack_into("<I60s512s", data, GENERATION_AT, generation, name, description)
    struct.pack_into("<I", data, SAVED_GENERATION_AT, saved_generation)
    struct.pack_into("<I", data, UNCLEAN_AT, unclean)
    return bytes(data)


def write_cowd(
    path: str,
    content: Content,
    *,
    grain_sectors: int = 1,
    capacity_sectors: int | None = None,
    preallocate_tables: bool = False,
    shuffle_grains: int | None = None,
    first_sector: int = 0,
    free_sector: int | None = None,
    grow_to: int = 0,
    flags: int = ROOT | CHECKABLE,
    version: int = 1,
    parent_name: bytes = b"",
    generation: int = 0,
    saved_generation: int = 0,
    unclean: bool = False,
) -> CowdExtent:
    """
    Write an extent that shows `content`.

    shuffle_grains is a seed: grains, and with them their tables, are allocated in that order. first_sector:
    where that begins, if there is room before it. free_sector:
    what the header says instead of the truth (a stale one is lower). grow_to: the file is filled up with
    zeros to a multiple of so many bytes, as hosts that grow it in steps leave it.
    """
    grain_bytes = grain_sectors * SECTOR
    effective = content.settled(grain_bytes)
    capacity = content.sectors if capacity_sectors is None else capacity_sectors
    count = -(-capacity // (GTES * grain_sectors))
    result = CowdExtent(path, effective, grain_sectors, [0] * count)
    free = max(GD_OFFSET + -(-4 * count // SECTOR), first_sector)
    if preallocate_tables:
        result.gd = [free + TABLE_SECTORS * table for table in range(count)]
        free += TABLE_SECTORS * count

    wanted = list(effective.touched(grain_bytes))
    if shuffle_grains is not None:
        random.Random(shuffle_grains).shuffle(wanted)
    tables: dict[int, list[int]] = {}
    with open(path, "wb") as file:
        for grain in wanted:
            table, index = divmod(grain, GTES)
            if not result.gd[table]:
                result.gd[table] = free
                free += TABLE_SECTORS
            tables.setdefault(table, [0] * GTES)[index] = result.grains[grain] = free
            start = grain * grain_bytes
            file.seek(free * SECTOR)
            file.write(effective.read(start, min(grain_bytes, effective.size - start)))
            free += grain_sectors
        for table, entries in tables.items():
            file.seek(result.gd[table] * SECTOR)
            file.write(struct.pack(f"<{GTES}I", *entries))
        file.seek(GD_OFFSET * SECTOR)
        file.write(struct.pack(f"<{count}I", *result.gd))
        file.seek(0)
        file.write(
            header(
                capacity,
                grain_sectors=grain_sectors,
                gd_entries=count,
                free_sector=free if free_sector is None else free_sector,
                version=version,
                flags=flags,
                parent_name=parent_name,
                generation=generation,
                saved_generation=saved_generation,
                unclean=unclean,
            )
        )
        result.free_sector = free
        size = free * SECTOR
        file.truncate(-(-size // grow_to) * grow_to if grow_to else size)
    return result
