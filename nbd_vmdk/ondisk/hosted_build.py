"""The metadata of a new, empty hosted sparse extent, as the bytes to put into its file.

Both directories name all their tables at once, as in the files that VMware makes (and refuses to do
without).  The tables themselves are zeros, so they need not be written where a file begins as a hole; nor
does anything up to the first grain but what is given here.

Source: the VMDK spec, section "Hosted Sparse Extents", and files made by VMware Workstation.
"""

import struct
from dataclasses import replace
from typing import Final

from nbd_vmdk.ondisk.hosted import (
    FLAG_NEWLINES,
    FLAG_REDUNDANT,
    FLAG_ZEROED_GRAINS,
    MAX_ENTRY,
    HostedHeader,
    new_layout,
)
from nbd_vmdk.units import SECTOR, align_up

#: Sectors kept for the descriptor of a monolithic disk; VirtualBox and QEMU write into all of them.
DESCRIPTOR_SECTORS: Final = 20
#: The grain of every product, in sectors: 64 KiB.
DEFAULT_GRAIN: Final = 128
#: "Greater than 8" says the specification, and readers take 8 itself; ours and QEMU's largest is 1 GiB.
MIN_GRAIN: Final = 8
MAX_GRAIN: Final = 0x200000


def new_extent(
    capacity_sectors: int,
    *,
    grain_sectors: int = DEFAULT_GRAIN,
    zeroed_grains: bool = False,
    descriptor: bool = False,
) -> HostedHeader:
    """The header of a new extent; with ``descriptor`` it has room for one, as a monolithic disk needs.

    ``zeroed_grains`` makes it version 2, whose grain-table value 1 means zeros that hide the parent.
    """
    header = new_layout(
        capacity_sectors,
        grain_sectors=grain_sectors,
        flags=FLAG_NEWLINES | FLAG_REDUNDANT | (FLAG_ZEROED_GRAINS if zeroed_grains else 0),
        descriptor_sectors=DESCRIPTOR_SECTORS if descriptor else 0,
    )
    return replace(header, version=2) if zeroed_grains else header


def can_fill(header: HostedHeader) -> bool:
    """Whether every grain will have a place that a 32-bit entry can name, once all are written."""
    grains = align_up(header.capacity_sectors, header.grain_sectors)
    return header.overhead_sectors + grains - header.grain_sectors <= MAX_ENTRY


def metadata(header: HostedHeader, descriptor: bytes = b"") -> list[tuple[int, bytes]]:
    """(byte, bytes) of all that is not zero in a new extent, whose length is the header's overhead.

    ValueError if the descriptor does not fit its room.
    """
    if len(descriptor) > header.descriptor_sectors * SECTOR:
        raise ValueError(
            f"a descriptor of {len(descriptor)} bytes does not fit {header.descriptor_sectors} sectors"
        )
    pieces = [(0, header.to_bytes())]
    if descriptor:
        pieces.append((header.descriptor_sector * SECTOR, descriptor))
    directories = (header.redundant_sector, header.directory_sector)
    return pieces + [(sector * SECTOR, _directory(header, sector)) for sector in directories]


def _directory(header: HostedHeader, sector: int) -> bytes:
    """The directory that begins at ``sector``, with its tables right behind it."""
    count = header.directory_entries
    first = sector + align_up(count * 4, SECTOR) // SECTOR
    step = align_up(header.entries_per_table * 4, SECTOR) // SECTOR
    return struct.pack(f"<{count}I", *range(first, first + count * step, step))
