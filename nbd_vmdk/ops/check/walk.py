"""Walking a compressed extent from record to record, whatever its tables say.

Each grain's record carries its guest sector and its length, so one leads to the next.  Nothing else of the
file is believed; what the tables say is for others to compare with.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from nbd_vmdk.extents.walk import first_record, is_likely, next_record
from nbd_vmdk.ondisk.hosted import HostedHeader
from nbd_vmdk.ondisk.stream import GRAIN_MARKER, GrainRecord, MarkerType, MetadataRecord, parse_record
from nbd_vmdk.ops.check.scan import Numbers
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import SECTOR

#: In place of a sector: two records claim to be this grain.
DISPUTED: Final = 0xFFFFFFFF
#: Zero sectors this near the end of the file are the end of the stream or padding, not damage.
_END_PADDING: Final = 64 * 1024


@dataclass(slots=True)
class Walked:
    """What was found: sectors of records by grain, in tables of ``per_table``; 0 where there is none.

    ``whole`` says that the directory's own record was reached without meeting damage: then a grain without
    a record is a hole.  ``unbroken`` says that no damage was met up to there or, in a file without that
    record, up to the file's end, which may have been cut off.
    """

    per_table: int
    tables: dict[int, Numbers] = field(default_factory=dict)
    whole: bool = False
    unbroken: bool = False

    def enter(self, grain: int, sector: int) -> None:
        """Note a record."""
        number, slot = divmod(grain, self.per_table)
        table = self.tables.get(number)
        if table is None:
            table = self.tables[number] = np.zeros(self.per_table, dtype=np.uint32)
        table[slot] = DISPUTED if table[slot] else sector

    def sector(self, grain: int) -> int | None:
        """The sector of a grain's record, 0 if it is sure that there is none, None if that is not known."""
        number, slot = divmod(grain, self.per_table)
        table = self.tables.get(number)
        found = 0 if table is None else int(table[slot])
        if found == DISPUTED:
            return None
        return found or (0 if self.whole else None)


def walk(storage: Storage, header: HostedHeader) -> Walked:
    """Find all records.  The time is that of reading one sector a grain."""
    found = Walked(header.entries_per_table)
    size = storage.size
    at = first_record(storage, header)
    undamaged = at < size and is_likely(storage.read(at, min(SECTOR, size - at)), header)
    if not undamaged:
        at = next_record(storage, header, at - SECTOR, size)
    while at < size:
        record = parse_record(storage.read(at, min(SECTOR, size - at)), header)
        match record:
            case GrainRecord() if at + GRAIN_MARKER.size + record.size <= size:
                found.enter(record.sector // header.grain_sectors, at // SECTOR)
                at += record.length
            case MetadataRecord(type=MarkerType.GRAIN_DIRECTORY) if undamaged:
                found.whole = True
                break
            case MetadataRecord(type=MarkerType.END_OF_STREAM) if size - at <= _END_PADDING:
                break
            case MetadataRecord() if record.type is not MarkerType.END_OF_STREAM:
                at += record.length
            case _:
                undamaged = False
                at = next_record(storage, header, at, size)
    found.unbroken = undamaged
    return found
