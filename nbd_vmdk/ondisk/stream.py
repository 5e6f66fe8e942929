"""The records of a streamOptimized extent: markers, compressed grains, footer.

Every record starts on a sector.  A grain record is a 12-byte marker (guest sector, compressed size) and the
compressed bytes; a metadata record is one sector that names what follows (type, sectors).
Three layouts are in circulation: tables behind their grains with a footer at the end (VMware's and
VirtualBox's exports), tables first without a footer (open-vmdk), and tables first without even an
end-of-stream record (QEMU).
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from nbd_vmdk.ondisk.hosted import MAGIC, HostedHeader
from nbd_vmdk.units import SECTOR, align_up

GRAIN_MARKER: Final = struct.Struct("<QI")
_MARKER: Final = struct.Struct("<QII")

#: A footer is three sectors: its marker, a copy of the header, the end of stream.
FOOTER_LENGTH: Final = 3 * SECTOR


class MarkerType(IntEnum):
    """What a metadata record announces.  PROGRESS is undocumented; some vSphere exports hold it."""

    END_OF_STREAM = 0
    GRAIN_TABLE = 1
    GRAIN_DIRECTORY = 2
    FOOTER = 3
    PROGRESS = 4


@dataclass(frozen=True, slots=True)
class GrainRecord:
    """A compressed grain: guest ``sector``, ``size`` compressed bytes, whole record ``length`` bytes."""

    sector: int
    size: int

    @property
    def length(self) -> int:
        """Bytes to the next record."""
        return align_up(GRAIN_MARKER.size + self.size, SECTOR)


@dataclass(frozen=True, slots=True)
class MetadataRecord:
    """A marker sector and the payload behind it; ``length`` covers both."""

    type: MarkerType
    length: int


def footer_header_offset(tail: bytes) -> int | None:
    """Where the footer's copy of the header is in the last bytes of a file, or None.

    A tar or an export may pad the file, so the footer is searched backwards over the tail; the end of
    stream behind it is itself zeros, which is why the marker and the header's magic are what is looked for.
    """
    at = len(tail)
    while (at := tail.rfind(MAGIC, 0, at)) >= 0:
        marker = tail[at - SECTOR : at - SECTOR + _MARKER.size] if at >= SECTOR else b""
        if len(marker) == _MARKER.size:
            _value, size, kind = _MARKER.unpack(marker)
            if size == 0 and kind == MarkerType.FOOTER:
                return at
    return None


def parse_record(data: bytes, header: HostedHeader) -> GrainRecord | MetadataRecord | None:
    """The record that starts with ``data`` (a sector), or None if no record can look like this.

    The payload of a metadata record is sized by its type: some writers leave the sector count 0.
    A grain may be larger compressed than plain, up to twice its size.
    """
    if len(data) < _MARKER.size:
        return None
    value, size, kind = _MARKER.unpack_from(data)
    if size:
        plausible = (
            size <= 2 * header.grain and value < header.capacity_sectors and value % header.grain_sectors == 0
        )
        return GrainRecord(value, size) if plausible else None
    if any(data[_MARKER.size : SECTOR]) or kind not in MarkerType._value2member_map_:
        return None
    payload = {
        MarkerType.GRAIN_TABLE: header.entries_per_table * 4,
        MarkerType.GRAIN_DIRECTORY: align_up(header.directory_entries * 4, SECTOR),
        MarkerType.FOOTER: SECTOR,
    }.get(MarkerType(kind), 0)
    return MetadataRecord(MarkerType(kind), SECTOR + align_up(payload, SECTOR))
