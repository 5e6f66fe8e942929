"""seSparse extents.  Their format is known in part only, so what is wrong is told and nothing is mended.

A free bitmap and a back map repeat what the tables say, in a coding that is not known: a table entry that is
put right here would contradict them.
"""

from typing import Final

import numpy as np

from nbd_vmdk.errors import Unsupported, VmdkError
from nbd_vmdk.ondisk.sesparse import (
    AREAS_AT,
    ENTRIES_PER_TABLE,
    ENTRY_ALLOCATED,
    TABLE_TAG,
    SeSparseHeader,
    areas_of,
    check_volatile,
    parse_header,
)
from nbd_vmdk.ops.check.claims import Claims
from nbd_vmdk.ops.check.context import Subject
from nbd_vmdk.ops.check.scan import Numbers, TableSet, read_words
from nbd_vmdk.units import SECTOR, format_size

_WHY_NOT: Final = "the format is not known well enough to change it; convert the image, or let ESXi mend it"
_NOTHING: Final = "nothing of the extent can be read"


def check_sesparse(subject: Subject) -> SeSparseHeader | None:
    """Check a seSparse extent; its header, None if that can't be made out."""
    storage = subject.storage
    head = storage.read(0, min(SECTOR, storage.size))
    try:
        header = parse_header(head, subject.file.label)
    except VmdkError as error:
        subject.error("bad-header", error.message, _NOTHING, _WHY_NOT, at=0)
        return None
    if not _check_areas(subject, head):
        return header
    try:
        check_volatile(storage.read(header.volatile.at, SECTOR), subject.file.label)
    except Unsupported as error:
        effect = "metadata in the file may be stale, so readers refuse it"
        why = "the journal's format is not known: let the ESXi host open the disk once"
        subject.error("journal", error.message, effect, why, at=header.volatile.at)
    except VmdkError as error:
        subject.error("bad-header", error.message, _NOTHING, _WHY_NOT, at=header.volatile.at)
    entries = read_words(storage, header.directory.at, header.directory_entries, 8)
    tables = _tables(subject, header, entries)
    subject.context.expect(tables.bytes)
    _Grains(subject, header, tables).check()
    subject.check_whole_sectors(tail_is_data=True)
    return header


def _check_areas(subject: Subject, head: bytes) -> bool:
    """The areas must be disjoint and in the file; that of the grains may reach further than what is used."""
    areas = sorted((area.at, area.length, name) for name, area in areas_of(head).items())
    sound = True
    reached, before = SECTOR, "the header"
    for at, length, name in areas:
        if at < reached or (name != "grain" and at + length > subject.storage.size):
            where = f"overlaps {before}" if at < reached else "reaches behind the end of the file"
            what = f"the area {name}, {length} bytes from {at} on, {where}"
            subject.error("bad-header", what, _NOTHING, _WHY_NOT, at=AREAS_AT)
            sound = False
        reached, before = max(reached, at + length), name
    return sound


def _tables(subject: Subject, header: SeSparseHeader, entries: Numbers) -> TableSet:
    """The tables that directory entries name; entries that name none, or one that is taken, are reported."""
    length = ENTRIES_PER_TABLE * 8
    index = (entries & np.uint64(0xFFFFFFFF)).astype(np.int64)
    used = entries != 0
    known = used & (entries >> np.uint64(32) == TABLE_TAG) & ((index + 1) * length <= header.tables.length)
    numbers = np.flatnonzero(known)
    order = np.argsort(index[numbers], kind="stable")
    again = np.zeros(len(entries), dtype=bool)
    again[numbers[order[1:]][np.diff(index[numbers][order]) == 0]] = True
    span = ENTRIES_PER_TABLE * header.grain
    for number in np.flatnonzero((used & ~known) | again).tolist():
        why = "names a table that another entry names, too" if again[number] else "names no grain table"
        lost = format_size(min(span, header.capacity_sectors * SECTOR - number * span))
        subject.error(
            "directory-entry",
            f"entry {number} of the directory is {int(entries[number]):#x}, which {why}",
            f"{lost} of the disk are another part's data"
            if again[number]
            else f"{lost} of the disk can't be read",
            _WHY_NOT,
            table=number,
            guest=subject.start + number * span,
            at=header.directory.at + number * 8,
        )
    places = np.where(known, header.tables.at + index * length, 0)
    return TableSet(subject.storage, places, ENTRIES_PER_TABLE, 8)


class _Grains:
    """The entries of all tables of one extent."""

    def __init__(self, subject: Subject, header: SeSparseHeader, tables: TableSet) -> None:
        self._subject = subject
        self._header = header
        self._tables = tables
        self._total = -(-header.capacity_sectors * SECTOR // header.grain)
        room = max(subject.storage.size - header.grains.at, 0) // header.grain
        self._named = header.grains.length // header.grain
        self._room = min(room, self._named)

    def check(self) -> None:
        """Look at every entry, then trace grains that two of them name."""
        conflicts: list[int] = []
        for number, claims in enumerate(Claims.passes(1, self._room)):
            for first, count in self._tables.windows():
                rows = self._tables.rows(first, count).reshape(-1)
                if number == 0:
                    self._look(first, rows)
                    self._subject.context.advance(self._tables.bytes_in(first, count))
                claims.add(self._indexes(rows)[1])
            conflicts += claims.conflicts()
        if conflicts:
            self._report_shared(np.array(conflicts))

    def _indexes(self, rows: Numbers) -> tuple[Numbers, Numbers]:
        """Where grains of the file are named, and which ones; only those that are there."""
        at = np.flatnonzero(rows >> np.uint64(60) == ENTRY_ALLOCATED)
        index = _decode(rows[at])
        there = index < self._room
        return at[there], index[there]

    def _look(self, first: int, rows: Numbers) -> None:
        if not rows.any():
            return
        start = first * ENTRIES_PER_TABLE
        state = rows >> np.uint64(60)
        odd = (state > ENTRY_ALLOCATED) | ((state == 0) & (rows != 0))
        for at in np.flatnonzero(odd).tolist():
            self._tell(start + at, "grain-entry", f"the entry is {int(rows[at]):#x}, no state that is known")
        used = np.flatnonzero(state == ENTRY_ALLOCATED)
        index = _decode(rows[used])
        for at in np.flatnonzero(index >= self._room).tolist():
            number, grain = int(index[at]), start + int(used[at])
            if number >= self._named:
                self._tell(
                    grain, "grain-entry", f"the entry names grain {number}; the area has {self._named}"
                )
                continue
            begin = self._header.grains.at + number * self._header.grain
            cut = begin < self._subject.storage.size
            where = "is cut off by the end of the file" if cut else "is behind the end of the file"
            self._tell(
                grain, "grain-cut-off" if cut else "grain-past-end", f"the grain at byte {begin} {where}"
            )
        surplus = np.flatnonzero(rows[max(self._total - start, 0) :])
        if len(surplus):
            grain = max(self._total, start) + int(surplus[0])
            self._subject.warning(
                "entry-beyond-capacity",
                f"{len(surplus)} table entries behind the end of the disk are in use",
                "none: the guest can't reach them",
                _WHY_NOT,
                table=grain // ENTRIES_PER_TABLE,
                entry=grain % ENTRIES_PER_TABLE,
            )

    def _report_shared(self, conflicts: Numbers) -> None:
        owners: dict[int, int] = {}
        for first, count in self._tables.windows():
            at, index = self._indexes(self._tables.rows(first, count).reshape(-1))
            shared = np.isin(index, conflicts)
            for place, number in zip(at[shared].tolist(), index[shared].tolist(), strict=True):
                grain = first * ENTRIES_PER_TABLE + place
                other = owners.setdefault(number, grain)
                if other == grain:
                    continue
                what = (
                    f"the grain has its place in the file, number {number}, together with the grain at guest "
                    f"offset {self._guest(other)}"
                )
                effect = "one of the two shows the other's data"
                self._tell(grain, "grains-overlap", what, effect)

    def _guest(self, grain: int) -> int:
        return self._subject.start + grain * self._header.grain

    def _tell(self, grain: int, slug: str, what: str, effect: str = "") -> None:
        self._subject.error(
            slug,
            what,
            effect or f"{self._header.grain} bytes of the disk can't be read",
            _WHY_NOT,
            table=grain // ENTRIES_PER_TABLE,
            entry=grain % ENTRIES_PER_TABLE,
            guest=self._guest(grain),
        )


def _decode(entries: Numbers) -> Numbers:
    """Numbers of the grains that allocated entries name: their low 12 bits stand above the rest."""
    low = (entries >> np.uint64(48)) & np.uint64(0xFFF)
    high = (entries & np.uint64(0xFFFFFFFFFFFF)) << np.uint64(12)
    return (low | high).astype(np.int64)
