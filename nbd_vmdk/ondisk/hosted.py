"""The header of a hosted sparse extent ("KDMV"), streamOptimized included.

Format facts: VMware's Virtual Disk Format technical note, and files of each writer named below.
Versions 1, 2 and 3 share one layout; 2 says that grain-table value 1 means "zeros", 3 is written by
streamOptimized exporters.
"""

import struct
import sys
from array import array
from dataclasses import dataclass, replace
from typing import Final

from nbd_vmdk.errors import NEWER, BadField, NotVmdk, Truncated, Unsupported
from nbd_vmdk.units import MAX_OFFSET, MIB, SECTOR, align_up

MAGIC: Final = b"KDMV"
#: open-vmdk writes this first and the real magic last: a file that has it was never finished.
MAGIC_UNFINISHED: Final = b"kdmv"

FLAG_NEWLINES: Final = 1 << 0
FLAG_REDUNDANT: Final = 1 << 1
FLAG_ZEROED_GRAINS: Final = 1 << 2
FLAG_COMPRESSED: Final = 1 << 16
FLAG_MARKERS: Final = 1 << 17
#: Bits 18 to 31 say "do not open unless you know me"; 3 to 15 may be ignored.
_INCOMPATIBLE: Final = 0xFFFC0000

GD_AT_END: Final = 0xFFFFFFFFFFFFFFFF
COMPRESSION_NONE: Final = 0
COMPRESSION_DEFLATE: Final = 1
NEWLINES: Final = b"\n \r\n"

#: Bytes of the header at which it is changed: version, flags, capacity, descriptorOffset, rgdOffset,
#: gdOffset, overHead, uncleanShutdown, and the four characters that follow it.
VERSION_AT: Final = 4
FLAGS_AT: Final = 8
CAPACITY_AT: Final = 12
DESCRIPTOR_OFFSET_AT: Final = 28
RGD_OFFSET_AT: Final = 48
GD_OFFSET_AT: Final = 56
OVERHEAD_AT: Final = 64
UNCLEAN_AT: Final = 72
NEWLINES_AT: Final = 73
#: Entries are 32-bit sector numbers, so no grain or table can start beyond this sector, or this byte.
MAX_ENTRY: Final = 0xFFFFFFFF
MAX_GRAIN_AT: Final = MAX_ENTRY * SECTOR

_HEADER: Final = struct.Struct("<4sIIQQQQIQQQB4sH433x")
_MAX_GRAIN_SECTORS: Final = 0x200000
_MAX_ENTRIES: Final = 65536
_MAX_DIRECTORY: Final = 128 * MIB
#: More descriptor text than this is not read (no writer comes near; QEMU has the same limit).
MAX_DESCRIPTOR: Final = MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedHeader:
    """A valid header.  Numbers in sectors carry it in their names, the properties are in bytes."""

    version: int = 1
    flags: int = FLAG_NEWLINES | FLAG_REDUNDANT
    capacity_sectors: int
    grain_sectors: int = 128
    descriptor_sector: int = 0
    descriptor_sectors: int = 0
    entries_per_table: int = 512
    redundant_sector: int = 0
    directory_sector: int = 0
    overhead_sectors: int = 0
    unclean: bool = False
    compression: int = COMPRESSION_NONE

    @property
    def capacity(self) -> int:
        """Guest bytes that the tables map."""
        return self.capacity_sectors * SECTOR

    @property
    def grain(self) -> int:
        """Bytes of one grain."""
        return self.grain_sectors * SECTOR

    @property
    def directory_entries(self) -> int:
        """Grain tables that the capacity needs."""
        return -(-self.capacity_sectors // (self.entries_per_table * self.grain_sectors))

    @property
    def directory_at(self) -> int:
        """Byte where the grain directory starts (meaningless while :attr:`directory_at_end`)."""
        return self.directory_sector * SECTOR

    @property
    def directory_at_end(self) -> bool:
        """The directory's place is in the footer."""
        return self.directory_sector == GD_AT_END

    @property
    def redundant_at(self) -> int | None:
        """Byte where the redundant directory starts, or None if there is none."""
        if self.flags & FLAG_REDUNDANT and self.redundant_sector not in (0, GD_AT_END):
            return self.redundant_sector * SECTOR
        return None

    @property
    def zeroed_grains(self) -> bool:
        """Grain-table value 1 means zeros that hide the parent."""
        return bool(self.flags & FLAG_ZEROED_GRAINS)

    @property
    def compressed(self) -> bool:
        """Grains are deflated; some writers set only one of the two fields that say so."""
        return bool(self.flags & FLAG_COMPRESSED) or self.compression == COMPRESSION_DEFLATE

    @property
    def markers(self) -> bool:
        """Each grain is preceded by a 12-byte marker with its place and size."""
        return bool(self.flags & FLAG_MARKERS)

    @property
    def is_wrapper(self) -> bool:
        """Only a wrapper round a descriptor: the old Workstation way to store one."""
        return self.capacity_sectors == 0 and self.descriptor_sector != 0

    def to_bytes(self) -> bytes:
        """The 512 bytes as they stand on disk."""
        return _HEADER.pack(
            MAGIC,
            self.version,
            self.flags,
            self.capacity_sectors,
            self.grain_sectors,
            self.descriptor_sector,
            self.descriptor_sectors,
            self.entries_per_table,
            self.redundant_sector,
            self.directory_sector,
            self.overhead_sectors,
            self.unclean,
            NEWLINES,
            self.compression,
        )


def parse_header(data: bytes, file: str) -> HostedHeader:
    """Read and validate the first 512 bytes of ``file``.

    Raises NotVmdk, Truncated, BadField or Unsupported (an incompatible flag, an unknown compression).
    """
    if data[:4] == MAGIC_UNFINISHED:
        raise NotVmdk(
            file,
            what="a sparse extent whose writing never finished",
            hint="run the export or conversion that made it again",
        )
    if data[:4] != MAGIC:
        raise NotVmdk(file, what="not a hosted sparse extent")
    if len(data) < _HEADER.size:
        raise Truncated(file, what="its header", need=_HEADER.size, have=len(data))
    (
        _magic,
        version,
        flags,
        capacity,
        grain,
        descriptor_sector,
        descriptor_sectors,
        entries,
        redundant,
        directory,
        overhead,
        unclean,
        newlines,
        compression,
    ) = _HEADER.unpack_from(data)

    def refuse(field: str, value: object, why: str, hint: str | None = None) -> BadField:
        return BadField(file, field=field, value=value, why=why, hint=hint)

    if version not in (1, 2, 3):
        raise refuse("version", version, "only 1, 2 and 3 are known", NEWER)
    if flags & FLAG_NEWLINES and newlines != NEWLINES:
        raise BadField(
            file,
            field="line-end check",
            value=newlines.hex(" "),
            why="the file went through a text-mode transfer, which damages all of it",
            hint="copy it again in binary mode",
        )
    if flags & _INCOMPATIBLE:
        raise Unsupported(
            file,
            what=f"header flags {flags:#x} hold an incompatible feature that is not known",
            hint=NEWER,
        )
    if flags & FLAG_MARKERS and not flags & FLAG_COMPRESSED:
        raise refuse("flags", f"{flags:#x}", "markers without compression do not exist")
    if compression not in (COMPRESSION_NONE, COMPRESSION_DEFLATE):
        raise Unsupported(file, what=f"grains are compressed with unknown method {compression}", hint=NEWER)
    if not 1 <= grain <= _MAX_GRAIN_SECTORS or grain & (grain - 1):
        raise refuse("grainSize", grain, f"must be a power of two up to {_MAX_GRAIN_SECTORS} sectors")
    if not 1 <= entries <= _MAX_ENTRIES or entries & (entries - 1):
        raise refuse("numGTEsPerGT", entries, f"must be a power of two up to {_MAX_ENTRIES}")
    if capacity * SECTOR > MAX_OFFSET:
        raise refuse("capacity", capacity, "larger than any file")
    header = HostedHeader(
        version=version,
        flags=flags,
        capacity_sectors=capacity,
        grain_sectors=grain,
        descriptor_sector=descriptor_sector,
        descriptor_sectors=descriptor_sectors,
        entries_per_table=entries,
        redundant_sector=redundant,
        directory_sector=directory,
        overhead_sectors=overhead,
        unclean=bool(unclean),
        compression=compression,
    )
    if header.directory_entries * 4 > _MAX_DIRECTORY:
        raise refuse("capacity", capacity, f"its grain directory would exceed {_MAX_DIRECTORY} bytes")
    for field, sector in (("descriptorOffset", descriptor_sector), ("overHead", overhead)):
        if sector * SECTOR > MAX_OFFSET:
            raise refuse(field, sector, "beyond the end of any file")
    if descriptor_sector and not descriptor_sectors:
        raise refuse("descriptorSize", descriptor_sectors, "there is a descriptorOffset")
    return header


def unpack_entries(raw: bytes) -> "array[int]":
    """The entries of a table or a directory of 32-bit entries, hosted or COWD, as it stands on disk."""
    entries = array("I", raw)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def check_directory(header: HostedHeader, size: int, file: str) -> None:
    """Check that the directories lie inside a file of ``size`` bytes, behind the header.

    Raises BadField or Truncated.
    """
    length = header.directory_entries * 4
    places = {"gdOffset": header.directory_sector}
    if header.redundant_at is not None:
        places["rgdOffset"] = header.redundant_sector
    for field, sector in places.items():
        if length and sector < 1:
            raise BadField(file, field=field, value=sector, why="the directory would lie over the header")
        if sector * SECTOR + length > size:
            raise Truncated(
                file, what=f"its grain directory ({field})", need=sector * SECTOR + length, have=size
            )


def new_layout(
    capacity_sectors: int,
    *,
    grain_sectors: int = 128,
    version: int = 1,
    flags: int = FLAG_NEWLINES | FLAG_REDUNDANT,
    descriptor_sectors: int = 20,
) -> HostedHeader:
    """The header of a new extent as VMware lays one out.

    Descriptor area, redundant directory and tables, directory and tables, grains; ``descriptor_sectors``
    is 0 for the extents of a split disk.
    """
    header = HostedHeader(
        version=version,
        flags=flags,
        capacity_sectors=capacity_sectors,
        grain_sectors=grain_sectors,
        descriptor_sector=1 if descriptor_sectors else 0,
        descriptor_sectors=descriptor_sectors,
    )
    tables = header.directory_entries * header.entries_per_table * 4 // SECTOR
    directory = align_up(header.directory_entries * 4, SECTOR) // SECTOR
    redundant = 1 + descriptor_sectors
    primary = redundant + directory + tables
    return replace(
        header,
        redundant_sector=redundant,
        directory_sector=primary,
        overhead_sectors=align_up(primary + directory + tables, grain_sectors),
    )
