"""The headers and table entries of a seSparse extent, ESXi's space-efficient delta.

VMware never published the format; what is known comes from log output and black-box work by several
readers.  All fields are 64-bit.  Reading needs the two headers, the grain directory, the grain tables and
the grains; the journal's records, the free bitmap and the back map are not understood, which is why an
extent with a journal to replay is refused and none is ever written.
"""

import struct
from dataclasses import dataclass
from typing import Final

from nbd_vmdk.errors import NEWER, BadField, NotVmdk, Truncated, Unsupported
from nbd_vmdk.units import MAX_OFFSET, SECTOR, TIB

CONST_MAGIC: Final = 0x00000000CAFEBABE
VOLATILE_MAGIC: Final = 0x00000000CAFECAFE
MAGIC: Final = struct.pack("<Q", CONST_MAGIC)
VERSION: Final = 0x0000000200000001

ENTRY_UNALLOCATED: Final = 0
ENTRY_UNMAPPED: Final = 1
ENTRY_ZERO: Final = 2
ENTRY_ALLOCATED: Final = 3
#: An entry's state is in its top nibble.  Below it is the number of a grain, stored rotated: its low 12 bits
#: in bits 48 to 59, the rest from bit 0 on.
STATE_AT: Final = 60
LOW_AT: Final = 48
LOW_BITS: Final = 12
LOW_MASK: Final = (1 << LOW_BITS) - 1
REST_MASK: Final = (1 << LOW_AT) - 1
#: Adding this to an allocated entry names the next grain of the file (until the 12 bits overflow).
ENTRY_STEP: Final = 1 << LOW_AT

_CONST: Final = struct.Struct("<26Q")
#: The byte of the constant header from which on it has the offset and the size of each area.
AREAS_AT: Final = 80
_AREAS: Final = (
    "volatileHeader",
    "journalHeader",
    "journal",
    "grainDirectory",
    "grainTables",
    "freeBitmap",
    "backMap",
    "grain",
)
#: Those that reading needs.
_READ: Final = frozenset({"volatileHeader", "grainDirectory", "grainTables", "grain"})
_VOLATILE: Final = struct.Struct("<4Q")
TABLE_TAG: Final = 0x10000000
_TABLE_SECTORS: Final = 64
_GRAIN_SECTORS: Final = 8
ENTRIES_PER_TABLE: Final = _TABLE_SECTORS * SECTOR // 8
_MAX_CAPACITY: Final = 64 * TIB


@dataclass(frozen=True, slots=True)
class Area:
    """A part of the file, in bytes."""

    at: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeSparseHeader:
    """A valid constant header: sizes and the areas that reading needs."""

    capacity_sectors: int
    volatile: Area
    directory: Area
    tables: Area
    grains: Area

    @property
    def grain(self) -> int:
        """Bytes of one grain."""
        return _GRAIN_SECTORS * SECTOR

    @property
    def directory_entries(self) -> int:
        """Grain tables that the capacity needs."""
        return -(-self.capacity_sectors // (ENTRIES_PER_TABLE * _GRAIN_SECTORS))

    @property
    def grain_count(self) -> int:
        """Grains that the grain area has room for: no entry names one behind them."""
        return self.grains.length // self.grain


def parse_header(data: bytes, file: str) -> SeSparseHeader:
    """Read and validate the constant header, the first 512 bytes.

    Raises NotVmdk, Truncated, BadField or Unsupported.
    """
    if data[:8] != MAGIC:
        raise NotVmdk(file, what="not a seSparse extent")
    if len(data) < SECTOR:
        raise Truncated(file, what="its header", need=SECTOR, have=len(data))
    _magic, version, capacity, grain, table, flags, *rest = _CONST.unpack_from(data)

    def refuse(field: str, value: object, why: str) -> BadField:
        return BadField(file, field=field, value=value, why=why)

    if version != VERSION:
        raise Unsupported(file, what=f"seSparse version {version:#x}, only {VERSION:#x} is known", hint=NEWER)
    if flags or any(rest[:4]):
        raise Unsupported(file, what="seSparse with flags or fields that are not known", hint=NEWER)
    if grain != _GRAIN_SECTORS:
        raise refuse("grainSize", grain, f"only {_GRAIN_SECTORS} sectors are known")
    if table != _TABLE_SECTORS:
        raise refuse("grainTableSize", table, f"only {_TABLE_SECTORS} sectors are known")
    if not 0 < capacity * SECTOR <= _MAX_CAPACITY:
        raise refuse("capacity", capacity, "must be up to 64 TiB")
    areas = areas_of(data)
    for name, area in areas.items():
        if not area.at or area.at + area.length > MAX_OFFSET:
            raise refuse(f"{name}Offset", area.at // SECTOR, "outside any file")
    header = SeSparseHeader(
        capacity_sectors=capacity,
        volatile=areas["volatileHeader"],
        directory=areas["grainDirectory"],
        tables=areas["grainTables"],
        grains=areas["grain"],
    )
    if header.directory_entries * 8 > header.directory.length:
        raise refuse(
            "grainDirectorySize", header.directory.length // SECTOR, f"too small for {capacity} sectors"
        )
    areas["volatileHeader"] = Area(header.volatile.at, SECTOR)  # all of it that is ever read
    met = _met(areas)
    if met is not None:
        one, other = met
        raise refuse(f"{other}Offset", areas[other].at // SECTOR, f"the area would lie over {one}")
    return header


def _met(areas: dict[str, Area]) -> tuple[str, str] | None:
    """The first two areas of which one lies over the other, and one at least is of use for reading.

    Text of a journal taken for a directory would be holes, and show the parent's data.  Those that nobody
    reads may lie as they please.
    """
    reached = {True: (SECTOR, "the header"), False: (SECTOR, "the header")}
    for at, length, name in sorted((area.at, area.length, name) for name, area in areas.items()):
        if not length:
            continue
        is_read = name in _READ
        end, before = max(reached[True], reached[False]) if is_read else reached[True]
        if at < end:
            return before, name
        reached[is_read] = max(reached[is_read], (at + length, name))
    return None


def areas_of(data: bytes) -> dict[str, Area]:
    """The areas that a constant header names, wherever they are, in its order."""
    words = _CONST.unpack_from(data)[AREAS_AT // 8 :]
    return {
        name: Area(words[2 * index] * SECTOR, words[2 * index + 1] * SECTOR)
        for index, name in enumerate(_AREAS)
    }


def check_volatile(data: bytes, file: str) -> None:
    """Validate the volatile header: right magic, and no journal that waits to be replayed.

    Raises BadField or Unsupported.
    """
    magic, _free, _sequence, replay = _VOLATILE.unpack_from(data)
    if magic != VOLATILE_MAGIC:
        raise BadField(file, field="volatile magic", value=f"{magic:#x}", why="the header is damaged")
    if replay:
        raise Unsupported(
            file,
            what="seSparse after a crash: its journal must be replayed first, in a format that is not known",
            hint="let the ESXi host open the disk once, which replays the journal",
        )


def table_index(entry: int, header: SeSparseHeader, file: str) -> int | None:
    """Which table a directory entry names, None for no table.  BadField for anything not known."""
    if not entry:
        return None
    index = entry & 0xFFFFFFFF
    if entry >> 32 != TABLE_TAG or (index + 1) * _TABLE_SECTORS * SECTOR > header.tables.length:
        raise BadField(file, field="grain directory entry", value=f"{entry:#x}", why="names no grain table")
    return index


def grain_at(entry: int, header: SeSparseHeader, file: str) -> int:
    """Byte position of the grain that an allocated entry (top nibble 3) names.  BadField if outside."""
    index = _grain_index(entry)
    if index >= header.grain_count:
        raise BadField(file, field="grain table entry", value=f"{entry:#x}", why="names no grain of the file")
    return header.grains.at + index * header.grain


def grains_behind(entry: int, header: SeSparseHeader) -> int:
    """How often :data:`ENTRY_STEP` can be added to an allocated entry and name the next grain of the file."""
    index = _grain_index(entry)
    return min(LOW_MASK - (index & LOW_MASK), header.grain_count - 1 - index)


def _grain_index(entry: int) -> int:
    return (entry & REST_MASK) << LOW_BITS | entry >> LOW_AT & LOW_MASK
