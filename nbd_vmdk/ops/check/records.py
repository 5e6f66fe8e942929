"""What the records of a compressed extent tell, where its tables are damaged or to see whether they are.

Each grain's record carries its guest sector, so tables can be made from the records alone (walk.py).  They
are rebuilt as a whole only where the walk met no damage; a single entry is put right wherever its record is
found.
"""

import struct
from dataclasses import replace
from typing import Final

import numpy as np

from nbd_vmdk.ondisk.hosted import GD_AT_END, GD_OFFSET_AT, MAX_ENTRY, HostedHeader
from nbd_vmdk.ondisk.stream import GRAIN_MARKER, MarkerType
from nbd_vmdk.ops.check.context import Subject
from nbd_vmdk.ops.check.entries import Rules
from nbd_vmdk.ops.check.findings import Change, Repair, Resize, Stage
from nbd_vmdk.ops.check.scan import Numbers, TableSet, read_words
from nbd_vmdk.ops.check.twins import Reason
from nbd_vmdk.ops.check.walk import DISPUTED, Walked, walk
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB, SECTOR, align_up

_MARKER: Final = struct.Struct("<QII")
#: How far before the end of the file a directory's record is looked for, besides its own length.
_SEARCH: Final = MIB
#: Tables at either end of a directory that are looked into.
_TRIED: Final = 16
#: As many grains may all be damaged one by one.
_FEW: Final = 4


def metadata_marker(kind: MarkerType, sectors: int) -> bytes:
    """The sector that announces a metadata record of so many sectors."""
    return _MARKER.pack(sectors, 0, kind).ljust(SECTOR, b"\0")


def find_directory(storage: Storage, header: HostedHeader) -> int | None:
    """The sector of the grain directory by its own record near the end of the file, None if none is sound."""
    length = align_up(header.directory_entries * 4, SECTOR)
    size = storage.size - storage.size % SECTOR
    begin = max(size - _SEARCH - length, 0)
    tail = storage.read(begin, size - begin)
    for at in range(len(tail) - length - SECTOR, -1, -SECTOR):
        value, count, kind = _MARKER.unpack_from(tail, at)
        is_marker = kind == MarkerType.GRAIN_DIRECTORY and not count and value in (0, length // SECTOR)
        if is_marker and not any(tail[at + _MARKER.size : at + SECTOR]):
            sector = (begin + at) // SECTOR + 1
            if _names_tables(storage, header, sector):
                return sector
    return None


def _names_tables(storage: Storage, header: HostedHeader, sector: int) -> bool:
    """Whether each entry of what may be a directory names a table with a marker before it."""
    entries = read_words(storage, sector * SECTOR, header.directory_entries, 4)
    used = entries[entries != 0]
    if not len(used) or int(used.min()) < 2 or int(used.max()) >= sector:
        return False  # zeros are what damage leaves as well
    for table in used.tolist():
        _value, count, kind = _MARKER.unpack(storage.read((table - 1) * SECTOR, _MARKER.size))
        if count or kind != MarkerType.GRAIN_TABLE:
            return False
    return True


def names_grains(storage: Storage, header: HostedHeader, sector: int) -> bool:
    """Whether a directory leads to records that are of the grains that this header makes of their places.

    The first and the last tables are tried, and the first and the last grains of these: a header that is
    wrong about the size of grains or tables, or by much about that of the disk, goes astray there.  Without
    any grain nothing is borne out.
    """
    tried, fitting = _try_grains(storage, header, sector)
    return 0 < tried == fitting


def names_others(storage: Storage, header: HostedHeader, sector: int) -> bool:
    """Whether most that names_grains() tries is of other grains: the header is wrong then, not they."""
    tried, fitting = _try_grains(storage, header, sector)
    return tried >= _FEW and fitting * 2 < tried


def _try_grains(storage: Storage, header: HostedHeader, sector: int) -> tuple[int, int]:
    """How many grains, and tables that can't be, were tried, and how many have records of their own."""
    if not 0 < sector * SECTOR <= storage.size - header.directory_entries * 4:
        return 1, 0
    directory = read_words(storage, sector * SECTOR, header.directory_entries, 4)
    tables = np.flatnonzero(directory)
    tried = fitting = 0
    for number in {*tables[:_TRIED].tolist(), *tables[-_TRIED:].tolist()}:
        at = int(directory[number]) * SECTOR
        if at + header.entries_per_table * 4 > storage.size:
            tried += 1
            continue
        table = read_words(storage, at, header.entries_per_table, 4)
        grains = np.flatnonzero(table > 1)
        for slot in {*grains[:2].tolist(), *grains[-2:].tolist()}:
            tried += 1
            place = int(table[slot]) * SECTOR
            if place + GRAIN_MARKER.size > storage.size:
                continue
            guest, size = GRAIN_MARKER.unpack(storage.read(place, GRAIN_MARKER.size))
            expected = (number * header.entries_per_table + slot) * header.grain_sectors
            fitting += bool(size) and guest == expected and guest < header.capacity_sectors
    return tried, fitting


class Records:
    """The records of one extent; walked when first asked."""

    def __init__(self, subject: Subject, header: HostedHeader) -> None:
        self._subject = subject
        self._header = header
        self._walked: Walked | None = None
        self._rebuilt: Repair | None = None

    @property
    def walked(self) -> Walked:
        """What the records say."""
        if self._walked is None:
            # Without markers records do not say which grain they are.
            known = self._header.markers
            self._walked = (
                walk(self._subject.storage, self._header) if known else Walked(self._header.entries_per_table)
            )
        return self._walked

    def is_hole(self, grain: int) -> bool:
        """Whether all records that the file has were met, and none is of this grain."""
        number, slot = divmod(grain, self.walked.per_table)
        table = self.walked.tables.get(number)
        return self.walked.unbroken and (table is None or not table[slot])

    def agree(self, directory: Numbers) -> bool:
        """Whether every record is of a table that the directory names."""
        return all(
            number < len(directory) and bool(directory[number])
            for number, sectors in self.walked.tables.items()
            if sectors.any()
        )

    def rebuild(self) -> Repair | None:
        """Append tables, directory and footer made from the records; None if anything may be lost."""
        header, walked = self._header, self.walked
        if self._rebuilt is not None or not walked.whole or header.redundant_at is not None:
            return self._rebuilt
        subject = self._subject
        begin = align_up(subject.storage.size, SECTOR)
        pieces: list[bytes] = []
        directory = np.zeros(header.directory_entries, dtype="<u4")
        sector = begin // SECTOR
        length = align_up(header.entries_per_table * 4, SECTOR) // SECTOR
        for number, entries in sorted(walked.tables.items()):
            if (entries == DISPUTED).any() or sector >= MAX_ENTRY:
                return None
            if number < header.directory_entries:
                pieces += (metadata_marker(MarkerType.GRAIN_TABLE, length), _padded(entries))
                directory[number] = sector + 1
                sector += 1 + length
        body = _padded(directory)
        pieces += (metadata_marker(MarkerType.GRAIN_DIRECTORY, len(body) // SECTOR), body)
        place = sector + 1
        copy = replace(header, directory_sector=place).to_bytes()
        pieces += (metadata_marker(MarkerType.FOOTER, 1), copy, bytes(SECTOR))
        data = b"".join(pieces)
        changes: list[Change] = [
            Resize(subject.file, begin + len(data), exact=True),
            subject.write(begin, data, Stage.TABLES),
        ]
        if subject.storage.read(GD_OFFSET_AT, 8) != GD_AT_END.to_bytes(8, "little"):
            changes.append(subject.write(GD_OFFSET_AT, place.to_bytes(8, "little"), Stage.POINTERS))
        self._rebuilt = Repair("append tables and a directory made from the grains' records", tuple(changes))
        return self._rebuilt

    def report_entries(
        self,
        rules: Rules,
        tables: TableSet,
        twins: TableSet | None,
        lost: dict[int, Reason],
        faults: dict[int, str],
    ) -> set[int]:
        """Report grains whose entries are lost or name no sound record, and records that no entry names.

        Returns the grains that are mended.
        """
        lost = dict(lost)
        mended: set[int] = set()
        for index, why in faults.items():
            size = rules.shown(index) * SECTOR
            lost.setdefault(index, ("grain-data", why, f"{size} bytes of the disk can't be read"))
        for number, found in sorted(self.walked.tables.items()):
            lost |= self._unlisted(rules, tables, number, found, lost)
        for index in sorted(lost):
            slug, what, effect = lost[index]
            number, slot = divmod(index, tables.entries)
            repair = self._relist(tables, twins, index, slug)
            if isinstance(repair, Repair):
                mended.add(index)
            guest = rules.guest(index)
            self._subject.error(slug, what, effect, repair, table=number, entry=slot, guest=guest)
        return mended

    def _unlisted(
        self, rules: Rules, tables: TableSet, number: int, found: Numbers, lost: dict[int, Reason]
    ) -> dict[int, Reason]:
        """Grains of one table that have a record which their entry does not name."""
        reasons: dict[int, Reason] = {}
        if number >= len(tables.places):
            return reasons
        row = tables.rows(number, 1)[0]
        for slot in np.flatnonzero((found != row) & (found != 0) & (found != DISPUTED)).tolist():
            index, value = number * tables.entries + slot, int(row[slot])
            if (
                index in lost
                or index >= rules.total
                or (value >= rules.codes and self._is_record(value, index))
            ):
                continue
            what = (
                "the entry says that there is no grain"
                if value < rules.codes
                else (f"the entry names sector {value}, which is no record of this grain")
            )
            what += f", but its record is at sector {int(found[slot])}"
            reasons[index] = ("grain-unlisted", what, "the guest does not see this grain's data")
        return reasons

    def _is_record(self, sector: int, index: int) -> bool:
        """Whether the record of a grain starts at ``sector``."""
        storage = self._subject.storage
        if sector * SECTOR + GRAIN_MARKER.size > storage.size:
            return False
        guest, size = GRAIN_MARKER.unpack(storage.read(sector * SECTOR, GRAIN_MARKER.size))
        return bool(size) and guest == index * self._header.grain_sectors

    def _relist(self, tables: TableSet, twins: TableSet | None, index: int, slug: str) -> Repair | str:
        """Make the entry name the record that was found."""
        right = self.walked.sector(index)
        if right is None:
            return "its record is not in the file: get the file again"
        number, slot = divmod(index, tables.entries)
        if not int(tables.places[number]):
            return self.rebuild() or "its table is not there, and not all records of the file are sound"
        now = int(tables.rows(number, 1)[0][slot])
        if now == right or (slug == "grain-data" and not right):
            return "its record is damaged: get the file again"
        changes = tuple(
            self._subject.write(
                int(copy.places[number]) + slot * 4, right.to_bytes(4, "little"), Stage.TABLES
            )
            for copy in (tables, twins)
            if copy is not None and copy.places[number]
        )
        return Repair("name the record that was found by its own marker", changes)


def _padded(words: Numbers) -> bytes:
    data: bytes = words.tobytes()
    return data.ljust(align_up(len(data), SECTOR), b"\0")
