"""The header and the directory of a new, empty COWD extent.

Its tables are made when they are needed, so a new file is only this long.

Source: the VMDK spec, section "ESX Server Sparse Extents".
"""

import struct
from typing import Final

from nbd_vmdk.ondisk.cowd import ENTRIES_PER_TABLE, MAGIC
from nbd_vmdk.units import SECTOR, align_up

#: ESX gives its deltas grains of one sector; the largest that readers take is 1 MiB.
DEFAULT_GRAIN: Final = 1
MIN_GRAIN: Final = 1
MAX_GRAIN: Final = 2048

_HEADER: Final = struct.Struct("<4sIIIIIIIIII")
_VERSION: Final = 1
#: ROOT (the header has a geometry, no parent's name) and CHECKCAPABLE; ESX sets them in deltas, too.
_FLAGS: Final = 3
_DIRECTORY_SECTOR: Final = 4
_MAX_SECTOR: Final = 0xFFFFFFFF


def new_extent(
    capacity_sectors: int, *, grain_sectors: int = DEFAULT_GRAIN, geometry: tuple[int, int, int] = (0, 0, 0)
) -> bytes:
    """The whole file of an empty extent; ``geometry`` is cylinders, heads and sectors.

    ValueError if the extent could not be filled: all its places are numbers of 32 bits.
    """
    if not can_fill(capacity_sectors, grain_sectors=grain_sectors):
        raise ValueError("a COWD extent holds less than 2 TiB")
    tables = _tables(capacity_sectors, grain_sectors)
    end = _DIRECTORY_SECTOR + align_up(tables * 4, SECTOR) // SECTOR
    header = _HEADER.pack(
        MAGIC, _VERSION, _FLAGS, capacity_sectors, grain_sectors, _DIRECTORY_SECTOR, tables, end, *geometry
    )
    return header.ljust(end * SECTOR, b"\0")


def can_fill(capacity_sectors: int, *, grain_sectors: int = DEFAULT_GRAIN) -> bool:
    """Whether freeSector can still name the end of the file once every grain is written."""
    tables = _tables(capacity_sectors, grain_sectors)
    overhead = _DIRECTORY_SECTOR + align_up(tables * 4, SECTOR) // SECTOR
    overhead += tables * ENTRIES_PER_TABLE * 4 // SECTOR
    return overhead + align_up(capacity_sectors, grain_sectors) <= _MAX_SECTOR


def _tables(capacity_sectors: int, grain_sectors: int) -> int:
    return -(-capacity_sectors // (ENTRIES_PER_TABLE * grain_sectors))
