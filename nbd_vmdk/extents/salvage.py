"""Reading a damaged streamOptimized file: what is left is read, what is lost gives EIO, never zeros.

Here is what is believed; walk.py finds the records, salvaged.py holds the tables that come of it.

Records and tables say the same thing twice: a grain's record carries its guest sector, and a table names the
record.  Walking from record to record finds the grains, whatever became of the tables.  What no walk can
find out is why a grain is absent: exporters leave out grains of zeros, so absence is either zeros or loss.
Only the tables know.  So an absent grain is

*   tried where a table names a place for it (its marker and checksum then tell whether it is the grain);
*   zeros where a table that is there has no entry for it, or where the directory has no table;
*   lost otherwise.

Where record and table contradict each other, a record that another entry of the tables claims is in the
wrong place and is not believed; nor is one directly behind damage that may have hit its table, too.  Any
other is, and no absence is believed of a table that contradicts a record.

A file that broke off has lost its directory, which is last.  Its tables stand behind their grains, which
tell the number of each; between two tables that follow each other without damage there is no other.

One piece of damage, or a cut, can't turn data into zeros that way, wherever it is (unless it is itself a
long piece of such a stream): the tables lie before all records, and then damage to both also hits the first
record, without which no absence is believed; or behind theirs, with markers between.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import BadField, FormatError, Unsupported
from nbd_vmdk.extents.base import Kind, Mapping
from nbd_vmdk.extents.flat import LostSource
from nbd_vmdk.extents.hosted import HostedTables
from nbd_vmdk.extents.salvaged import SalvagedTables
from nbd_vmdk.extents.stream import LOST_ENTRY, StreamExtent, refuse_huge_grains, with_directory
from nbd_vmdk.extents.walk import Walk, first_place, read_table, walk_records
from nbd_vmdk.ondisk.hosted import HostedHeader
from nbd_vmdk.ondisk.stream import MarkerType, MetadataRecord, parse_record
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import SECTOR

_LOST_HINT = "only a whole copy of the file has it; all else can be read"


class SalvagedExtent(StreamExtent):
    """A streamOptimized extent read by its markers and by what is left of its tables."""

    def __init__(self, storage: Storage, header: HostedHeader, cache: Cache, *, size: int) -> None:
        refuse_huge_grains(storage, header)
        if not header.markers:
            raise Unsupported(
                storage.name,
                what="a compressed disk without markers, which salvage needs",
                hint="read it without --salvage: what its tables lead to can be read",
            )
        self._salvaged = salvage(storage, header, cache)
        self._setup(storage, header, self._salvaged, self._salvaged.empty_from, size)
        self._lost = LostSource(storage.name, "this part of the damaged stream is lost", _LOST_HINT)

    def map(self, offset: int, length: int) -> Mapping:
        """See Extent."""
        kind, count, source, at = super().map(offset, length)
        coverage = self._entries * self.grain
        number = offset // coverage
        if number not in self._pinned:
            count = min(length, self._salvaged.alike_until(number) * coverage - offset)
        if kind is Kind.LOST:
            return kind, count, self._lost, self.origin + offset
        return kind, count, source, at

    def _decode(self, entry: int, index: int) -> tuple[Kind, int]:
        if entry == LOST_ENTRY:
            return Kind.LOST, 0
        return super()._decode(entry, index)


def salvage(storage: Storage, header: HostedHeader, cache: Cache) -> SalvagedTables:
    """Put together the tables of a stream.

    Memory is that of the tables of the parts that have data; time that of reading one sector a grain.
    """
    tables = SalvagedTables(storage, header, cache)
    walk = walk_records(storage, header, tables)
    directory = _directory(storage, header, tables, walk)
    if directory is None:
        for first, last in walk.between:
            tables.absent(first, last)
        for number, sector in walk.tables.items():
            tables.compare(number, read_table(storage, header, sector), zeros=True)
        tables.settle_doubts((read_table(storage, header, sector) for sector in walk.tables.values()), set())
    else:
        _follow(directory, tables)
        tables.settle_doubts(directory.all(), walk.suspects if directory.in_front else set())
    return tables


class _Directory(HostedTables):
    """The directory of a stream, as far as it is whole; ``header`` says where it is.

    What it and the tables leave out is believed if they lie in front of the records and the first record is
    there and named by them, or behind them and their own markers are there: the same damage that erased an
    entry has then left the record that it named.
    """

    def __init__(self, storage: Storage, header: HostedHeader, cache: Cache, walk: Walk) -> None:
        super().__init__(storage, header, cache)
        self.count = header.directory_entries
        self._header = header
        self._walk = walk
        unknown = set(walk.tables.values())
        tables = 0
        for page in range(-(-self.count // self.directory.per_page)):
            entries = self.directory.get(page)
            if entries is not None and entries is not self.directory.empty:
                unknown.difference_update(entries)
                tables += len(entries) - entries.count(0)
        if tables * self._length > storage.size:
            # Also what bounds the time that looking at all of them takes.
            raise BadField(storage.name, field="grain directory", value=tables, why="more tables than fit")
        self._starts_well = walk.start is not None and self._names_first(walk)
        self.in_front = self._in_front(header.directory_at)
        self.believed = self._is_believed(header.directory_sector, MarkerType.GRAIN_DIRECTORY)
        self._found = {number: sector for number, sector in walk.tables.items() if sector in unknown}

    def _names_first(self, walk: Walk) -> bool:
        """Whether the first record is the one that a table has there; a file may end before any."""
        assert walk.start is not None
        if walk.first is None:
            return walk.start * SECTOR >= self.storage.size - SECTOR
        number, slot = divmod(walk.first, self._header.entries_per_table)
        try:
            table = self.tables.get(number)
        except FormatError:
            return False
        return table is not None and table[slot] == walk.start

    def _in_front(self, at: int) -> bool:
        return at < first_place(self._header)

    def _is_believed(self, sector: int, kind: MarkerType) -> bool:
        if self._in_front(sector * SECTOR):
            return self._starts_well
        marker = parse_record(self.storage.read((sector - 1) * SECTOR, SECTOR), self._header)
        return isinstance(marker, MetadataRecord) and marker.type is kind

    def missing(self, number: int, limit: int) -> int:
        """How many tables from ``number`` on, ``limit`` at most, have no entry."""
        found = 0
        while found < limit:
            page, slot = divmod(number + found, self.directory.per_page)
            entries = self.directory.get(page)
            assert entries is not None, "a directory has all its pages"
            last = min(slot + limit - found, self.directory.per_page)
            count = last - slot
            if entries is not self.directory.empty:
                count = next((i for i in range(count) if entries[slot + i]), count)
            empty = self._missing(number + found, count)
            found += empty
            if empty < last - slot:
                break
        return found

    def table(self, number: int) -> "tuple[array[int], bool] | None":
        """A table, by the directory or else where the walk found it; and whether its zeros are believed."""
        try:
            places = self.places(number)
            table = self.tables.get(number)
        except FormatError:
            places = table = None
        if table is not None and places is not None:
            believed = self._is_believed(places[0] // SECTOR, MarkerType.GRAIN_TABLE)
            # Behind the records an empty table is rare, and all that damage leaves of another.
            return table, believed and (any(table) or self._in_front(places[0]) or not self._walk.damaged)
        if number in self._found:
            return read_table(self.storage, self._header, self._found[number]), True
        return None

    def all(self) -> "Iterator[array[int]]":
        """All tables that are there."""
        number = 0
        while (number := number + self.missing(number, self.count - number)) < self.count:
            found = self.table(number)
            if found is not None:
                yield found[0]
            number += 1


def _follow(directory: _Directory, tables: SalvagedTables) -> None:
    """Compare all tables that the directory names with the records that were found."""
    found = sorted(tables.pinned)
    number = 0
    while number < directory.count:
        index = bisect_left(found, number)
        stop = found[index] if index < len(found) else directory.count
        if number < stop and (missing := directory.missing(number, stop - number)):
            if directory.believed:
                tables.absent(number, number + missing)
            number += missing
            continue
        there = directory.table(number)
        if there is None:
            tables.doubt(number)
        elif number in tables.pinned or (there[0] is not directory.tables.empty and any(there[0])):
            tables.compare(number, there[0], zeros=there[1])
        elif there[1]:
            tables.absent(number, number + 1)
        number += 1


def _directory(
    storage: Storage, header: HostedHeader, tables: SalvagedTables, walk: Walk
) -> _Directory | None:
    """The directory: where header or footer say, or where the walk found it.  None if it is lost."""
    candidates = []
    try:
        candidates.append(with_directory(storage, header)[1])
    except (FormatError, Unsupported):
        pass  # the walk has to do
    if walk.directory is not None:
        candidates.append(replace(header, directory_sector=walk.directory, redundant_sector=0))
    directories = []
    for candidate in candidates:
        try:
            directories.append(_Directory(storage, candidate, tables.cache, walk))
        except FormatError:
            continue
    return max(directories, key=lambda directory: directory.believed, default=None)
