"""Building the records of a streamOptimized extent, in the layout of VMware's own exports.

Header (its directory is "at the end"), descriptor, the grains of a table and behind them the table, each
table so, the directory, a copy of the header that knows the directory's place, end of stream.  All of it
can be written front to back to something that can't seek, and read so.

Source: the VMDK spec, section "Stream-Optimized Compressed Sparse Extents", and files of ovftool and vSphere,
which leave out the tables of ranges without data although the specification wants them all.
"""

import struct
import sys
from array import array
from dataclasses import replace
from typing import Final

from nbd_vmdk.ondisk.hosted import (
    COMPRESSION_DEFLATE,
    FLAG_COMPRESSED,
    FLAG_MARKERS,
    FLAG_NEWLINES,
    GD_AT_END,
    HostedHeader,
)
from nbd_vmdk.ondisk.stream import GRAIN_MARKER, MarkerType
from nbd_vmdk.units import SECTOR, align_up

_METADATA_MARKER: Final = struct.Struct("<QII496x")
#: 3, because newer ESXi refuses 1 as too old.
STREAM_VERSION: Final = 3
#: The descriptor's room, as everywhere: VirtualBox adds lines to it.
DESCRIPTOR_SECTORS: Final = 20


def stream_header(
    capacity_sectors: int, *, grain_sectors: int = 128, descriptor_sectors: int = DESCRIPTOR_SECTORS
) -> HostedHeader:
    """The first header of a new extent."""
    return HostedHeader(
        version=STREAM_VERSION,
        flags=FLAG_NEWLINES | FLAG_COMPRESSED | FLAG_MARKERS,
        capacity_sectors=capacity_sectors,
        grain_sectors=grain_sectors,
        descriptor_sector=1,
        descriptor_sectors=descriptor_sectors,
        directory_sector=GD_AT_END,
        overhead_sectors=align_up(1 + descriptor_sectors, grain_sectors),
        compression=COMPRESSION_DEFLATE,
    )


def grain_record(sector: int, packed: bytes | bytearray) -> bytes:
    """A compressed grain that starts at guest ``sector``, filled up to whole sectors."""
    length = GRAIN_MARKER.size + len(packed)
    return GRAIN_MARKER.pack(sector, len(packed)) + packed + bytes(-length % SECTOR)


def metadata_record(type: MarkerType, payload: bytes = b"") -> bytes:
    """A marker and what it announces, filled up to whole sectors."""
    payload += bytes(-len(payload) % SECTOR)
    return _METADATA_MARKER.pack(len(payload) // SECTOR, 0, type) + payload


def pack_entries(entries: "array[int]") -> bytes:
    """A table or directory of 32-bit entries as it stands on disk."""
    if sys.byteorder == "big":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


def table_record(entries: "array[int]") -> bytes:
    """A grain table behind its marker."""
    return metadata_record(MarkerType.GRAIN_TABLE, pack_entries(entries))


def tail_records(header: HostedHeader, directory: "array[int]", at: int) -> bytes:
    """The end of a file, to be put at byte ``at``: directory, footer, end of stream."""
    footer = replace(header, directory_sector=at // SECTOR + 1)
    return (
        metadata_record(MarkerType.GRAIN_DIRECTORY, pack_entries(directory))
        + metadata_record(MarkerType.FOOTER, footer.to_bytes())
        + metadata_record(MarkerType.END_OF_STREAM)
    )


def head_records(header: HostedHeader, descriptor: bytes) -> bytes:
    """The beginning of a file, up to the first grain."""
    text = descriptor.ljust(header.descriptor_sectors * SECTOR, b"\0")
    return (header.to_bytes() + text).ljust(header.overhead_sectors * SECTOR, b"\0")


def empty_stream(header: HostedHeader, descriptor: bytes) -> bytes:
    """A whole file that holds no grain."""
    head = head_records(header, descriptor)
    return head + tail_records(header, array("I", bytes(4 * header.directory_entries)), len(head))
