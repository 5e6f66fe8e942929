"""The header of an ESX COWD extent (type VMFSSPARSE), the delta of VMFS before seSparse.

Format facts: VMware's Virtual Disk Format technical note, "ESX Server sparse extents".
"""

import struct
from dataclasses import dataclass
from typing import Final

from nbd_vmdk.errors import NEWER, BadField, NotVmdk, Truncated
from nbd_vmdk.units import MIB, SECTOR

MAGIC: Final = b"COWD"
ENTRIES_PER_TABLE: Final = 4096
#: The header has a geometry, and no parent's name.
FLAG_ROOT: Final = 1
FLAG_INCONSISTENT: Final = 4
#: Bytes of the header at which it is changed: flags, numSectors, gdOffset, numGDEntries, freeSector, the
#: geometry and what follows it, generation, savedGeneration, uncleanShutdown.
FLAGS_AT: Final = 8
CAPACITY_AT: Final = 12
DIRECTORY_AT: Final = 20
ENTRIES_AT: Final = 24
FREE_SECTOR_AT: Final = 28
GEOMETRY_AT: Final = 32
GENERATION_AT: Final = 1060
SAVED_AT: Final = 1636
UNCLEAN_AT: Final = 1648
#: The sector at which every writer that is known puts the directory: behind the header.
USUAL_DIRECTORY: Final = 4
#: The last byte at which a grain of any size may end, so that freeSector, 32 bits wide, can name it.
MAX_END: Final = 0xFFFF_FFFF * SECTOR

_HEADER: Final = struct.Struct("<4sIIIIIII")
_SIZE: Final = 2048
_UNCLEAN: Final = struct.Struct("<I")
_MAX_GRAIN_SECTORS: Final = MIB // SECTOR
_MAX_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CowdHeader:
    """A valid header; ``free_sector`` is only a hint, QEMU never updates it."""

    version: int
    flags: int
    capacity_sectors: int
    grain_sectors: int
    directory_sector: int
    directory_entries: int
    free_sector: int
    unclean: bool

    @property
    def overhead(self) -> int:
        """The byte before which no table or grain can lie."""
        return self.directory_sector * SECTOR + self.directory_entries * 4

    @property
    def suspect(self) -> bool:
        """Whether its last writer left a mark that he did not come to an end."""
        return self.unclean or bool(self.flags & FLAG_INCONSISTENT)


def parse_header(data: bytes, file: str) -> CowdHeader:
    """Read and validate the first 2048 bytes of ``file``.

    Raises NotVmdk, Truncated or BadField.
    """
    if data[:4] != MAGIC:
        raise NotVmdk(file, what="not a COWD extent")
    if len(data) < _SIZE:
        raise Truncated(file, what="its header", need=_SIZE, have=len(data))
    _magic, version, flags, capacity, grain, directory, entries, free = _HEADER.unpack_from(data)

    def refuse(field: str, value: object, why: str, hint: str | None = None) -> BadField:
        return BadField(file, field=field, value=value, why=why, hint=hint)

    if version > _MAX_VERSION:
        raise refuse("version", version, "only 1 is known", NEWER)
    if not 1 <= grain <= _MAX_GRAIN_SECTORS or grain & (grain - 1):
        raise refuse("grainSize", grain, f"must be a power of two up to {_MAX_GRAIN_SECTORS} sectors")
    needed = -(-capacity // (ENTRIES_PER_TABLE * grain))
    if entries < needed:
        raise refuse("numGDEntries", entries, f"{needed} are needed for {capacity} sectors")
    if directory * SECTOR < _SIZE:
        raise refuse("gdOffset", directory, "the directory would lie over the header")
    return CowdHeader(
        version=version,
        flags=flags,
        capacity_sectors=capacity,
        grain_sectors=grain,
        directory_sector=directory,
        directory_entries=needed,
        free_sector=free,
        unclean=bool(_UNCLEAN.unpack_from(data, UNCLEAN_AT)[0]),
    )
