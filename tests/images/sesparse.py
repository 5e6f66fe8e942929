"""
Builder of seSparse extents, the deltas of newer ESXi hosts.

All integers are 64 bit. The directory names tables by index, tables name grains by an index whose low twelve
bits stand above the rest (encode()), and the top nibble of an entry says what it is. The areas are laid out
as in the one disk whose numbers are known, each rounded up to 1 MiB; free bitmap and back map stay empty,
which no reader needs.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from typing import Literal

from tests.images.content import MIB, SECTOR, Content, Part

GRAIN_SECTORS = 8
GRAIN = GRAIN_SECTORS * SECTOR
TABLE_SECTORS = 64
GTES = 4096
STEP = MIB // SECTOR

CONST_MAGIC = 0x00000000CAFEBABE
VOLATILE_MAGIC = 0x00000000CAFECAFE
VERSION = 0x0000000200000001
GDE_PRESENT = 0x1 << 60
UNMAPPED, ZERO, ALLOCATED = 1, 2, 3  # top nibbles of a table's entry; 0 is a hole

AREAS = ("volatile", "journal_header", "journal", "directory", "tables", "free_bitmap", "back_map", "grains")

ZeroStyle = Literal["zero", "unmapped", "remembered", "mixed"]


def encode(index: int, nibble: int = ALLOCATED) -> int:
    """An entry for grain number `index`: its low 12 bits go to bits 48-59, the rest to bits 0-47."""
    return nibble << 60 | (index & 0xFFF) << 48 | index >> 12


@dataclass
class SeSparseExtent:
    """What write_sesparse() wrote: areas as (offset, size) in sectors; grains: guest grain to index."""

    path: str
    content: Content
    areas: dict[str, tuple[int, int]]
    tables: dict[int, int] = field(default_factory=dict)  # directory entry -> table index
    grains: dict[int, int] = field(default_factory=dict)
    remembered: dict[int, int] = field(default_factory=dict)  # unmapped grains -> the index they still name

    def gde_at(self, table: int) -> int:
        """Byte offset of a directory's entry in the file."""
        return self.areas["directory"][0] * SECTOR + 8 * table

    def gte_at(self, grain: int) -> int:
        """Byte offset of a grain's entry in the file; its table must be there."""
        table, entry = divmod(grain, GTES)
        return (self.areas["tables"][0] + self.tables[table] * TABLE_SECTORS) * SECTOR + 8 * entry

    def index_at(self, index: int) -> int:
        """Byte offset of the grain with an index in the file."""
        return (self.areas["grains"][0] + index * GRAIN_SECTORS) * SECTOR

    def grain_at(self, grain: int) -> int:
        """Byte offset of a guest grain's data in the file."""
        return self.index_at(self.grains[grain])


def areas(capacity: int, tables_room: int | None = None) -> dict[str, tuple[int, int]]:
    """Where a disk of so many sectors has its areas; all tables have their room from the start."""
    tables = -(-capacity // (GTES * GRAIN_SECTORS)) if tables_room is None else tables_room
    grains = -(-capacity // GRAIN_SECTORS)
    result = {"volatile": (1, 1), "journal_header": (2, 2), "journal": (STEP, STEP)}
    at = 2 * STEP
    for name, sectors in (
        ("directory", -(-8 * tables // SECTOR)),
        ("tables", tables * TABLE_SECTORS),
        ("free_bitmap", -(-grains // (8 * SECTOR))),
        ("back_map", -(-8 * grains // SECTOR)),
        ("grains", grains * GRAIN_SECTORS),
    ):
        size = -(-sectors // STEP) * STEP
        result[name] = (at, size)
        at += size
    return result


def write_sesparse(
    path: str,
    content: Content,
    *,
    capacity_sectors: int | None = None,
    zero_style: ZeroStyle = "zero",
    first_index: int = 0,
    shuffle_grains: int | None = None,
    shuffle_tables: int | None = None,
    replay_journal: int = 0,
    version: int = VERSION,
    flags: int = 0,
    grain_size: int = GRAIN_SECTORS,
    table_size: int = TABLE_SECTORS,
    volatile_magic: int = VOLATILE_MAGIC,
    gdes: dict[int, int] | None = None,
    gtes: dict[int, int] | None = None,
) -> SeSparseExtent:
    """
    Write an extent that shows `content`.

    zero_style: explicit zeros become nibble 2 ("zero"), 1 with nothing else ("unmapped"), or 1 with the bits
    of an old grain ("remembered"; what lies there is 0xEE); "mixed" takes turns. first_index: the index of
    the first grain in the file; from 4096 on the rotation of the bits shows. shuffle_grains and
    shuffle_tables are seeds. gdes and gtes put arbitrary values in place of entries, by number; flags, sizes
    and magics are written as given while the layout stays the usual one.
    """
    effective = content.settled(GRAIN)
    capacity = content.sectors if capacity_sectors is None else capacity_sectors
    places = areas(capacity)
    result = SeSparseExtent(path, effective, places)
    wanted = list(effective.touched(GRAIN))

    used = sorted({grain // GTES for grain in [*wanted, *(gtes or {})]})
    numbers = list(range(len(used)))
    if shuffle_tables is not None:
        random.Random(shuffle_tables).shuffle(numbers)
    result.tables = dict(zip(used, numbers, strict=True))

    values: dict[int, int] = {}
    stored: list[int] = []
    styles: tuple[ZeroStyle, ...] = ("zero", "unmapped", "remembered")
    for count, grain in enumerate(wanted):
        style = styles[count % 3] if zero_style == "mixed" else zero_style
        zero = effective.part(grain * GRAIN, (grain + 1) * GRAIN) is Part.ZERO
        if zero and style != "remembered":
            values[grain] = (ZERO if style == "zero" else UNMAPPED) << 60
        else:
            stored.append(grain)
            if zero:
                result.remembered[grain] = 0
    if shuffle_grains is not None:
        random.Random(shuffle_grains).shuffle(stored)
    for index, grain in enumerate(stored, first_index):
        old = grain in result.remembered
        (result.remembered if old else result.grains)[grain] = index
        values[grain] = encode(index, UNMAPPED if old else ALLOCATED)
    values.update(gtes or {})

    with open(path, "wb") as file:

        def put(at: int, what: bytes) -> None:
            file.seek(at)
            file.write(what)

        pairs = [number for name in AREAS for number in places[name]]
        const = (CONST_MAGIC, version, capacity, grain_size, table_size, flags, 0, 0, 0, 0, *pairs)
        put(0, struct.pack("<26Q", *const).ljust(SECTOR, b"\0"))
        volatile = (volatile_magic, len(used), 1, replay_journal)
        put(places["volatile"][0] * SECTOR, struct.pack("<4Q", *volatile).ljust(SECTOR, b"\0"))
        for table, number in result.tables.items():
            put(result.gde_at(table), struct.pack("<Q", GDE_PRESENT | number))
        for table, value in (gdes or {}).items():
            put(result.gde_at(table), struct.pack("<Q", value))
        for grain, value in values.items():
            put(result.gte_at(grain), struct.pack("<Q", value))
        for grain in stored:
            start = grain * GRAIN
            if grain in result.remembered:
                put(result.index_at(result.remembered[grain]), b"\xee" * GRAIN)
            else:
                data = effective.read(start, min(GRAIN, effective.size - start))
                put(result.grain_at(grain), data.ljust(GRAIN, b"\0"))
        file.truncate(result.index_at(first_index + len(stored)))
    return result
