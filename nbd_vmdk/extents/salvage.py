"""Reading a damaged streamOptimized file: what is left is read, what is lost gives EIO, never zeros.

Records and tables say the same thing twice: a grain's record carries its guest sector, and a table names the
record.  Walking from record to record finds the grains, whatever became of the tables.  What no walk can
find out is why a grain is absent: exporters leave out grains of zeros, so absence is either zeros or loss.
Only the tables know.  So an absent grain is

*   tried where a table names a place for it (its marker and checksum then tell whether it is the grain);
*   zeros where a table that is there has no entry for it, or where the directory has no table;
*   lost otherwise.

Where record and table contradict each other, a record that another entry of the tables claims is in the
wrong place and is not believed; any other is, and no absence is believed of a damaged piece of a table.

A file that broke off has lost its directory, which is last.  Its tables stand behind their grains, which
tell the number of each; between two tables that follow each other without damage there is no other.

One piece of damage, or a cut, can't turn data into zeros that way, wherever it is: the tables lie before all
records (then damage to both also hits the first record, and no absence is believed) or behind theirs, with
markers between.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import FormatError, Unsupported
from nbd_vmdk.extents.base import Kind, Mapping
from nbd_vmdk.extents.flat import LostSource
from nbd_vmdk.extents.hosted import HostedTables
from nbd_vmdk.extents.stream import LOST_ENTRY, StreamExtent, refuse_huge_grains, with_directory
from nbd_vmdk.ondisk.hosted import HostedHeader
from nbd_vmdk.ondisk.stream import GRAIN_MARKER, GrainRecord, MarkerType, MetadataRecord, parse_record
from nbd_vmdk.pages import Pages
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB, SECTOR, align_up

_WINDOW = MIB
#: Zero sectors this near the end of the file are padding, not damage.
_END_PADDING = 64 * 1024


class SalvagedTables(Pages):
    """Grain tables put together in memory: those with a grain are pinned, the others need no memory."""

    def __init__(self, storage: Storage, header: HostedHeader, cache: Cache) -> None:
        super().__init__(
            storage,
            cache,
            width=4,
            per_page=header.entries_per_table,
            total=header.directory_entries * header.entries_per_table,
            locate=lambda _page: None,
        )
        self._grain_sectors = header.grain_sectors
        #: Starts and ends, alternating and ascending, of the ranges of tables known to be all holes.
        self._holes: list[int] = []
        self._lost = array("I", [LOST_ENTRY]) * self.per_page
        self._disputed: set[int] = set()
        #: Records that a table has no entry for, by their sectors; and the entries of all tables for them.
        self._doubtful: dict[int, int] = {}

    def add(self, grain: int, sector: int) -> None:
        """Enter a record that was found.  Of two that claim to be the same grain neither is believed."""
        number, slot = divmod(grain, self.per_page)
        table = self.pinned.get(number)
        if table is None:
            table = self.pinned[number] = array("I", self._lost)
        if table[slot] != LOST_ENTRY:
            self._disputed.add(grain)
        table[slot] = LOST_ENTRY if grain in self._disputed else sector

    def absent(self, first: int, last: int) -> None:
        """Note that no tables exist from ``first`` up to ``last``; calls come in ascending order."""
        if self._holes and self._holes[-1] == first:
            self._holes[-1] = last
        elif first < last:
            self._holes += (first, last)

    def compare(self, number: int, entries: "array[int]", *, zeros: bool) -> None:
        """Bring a table in line with the file's; ``zeros`` says to believe what that leaves out."""
        table = self.pinned.get(number)
        if table is None:
            table = self.pinned[number] = array("I", self._lost)
        for slot, entry in enumerate(entries):
            found = table[slot]
            if found == LOST_ENTRY:
                if entry > 1 or zeros:
                    table[slot] = entry
            elif entry <= 1:
                self._doubtful[found] = number * self.per_page + slot
            elif entry != found and self._is_at(number * self.per_page + slot, entry):
                table[slot] = entry

    def doubt(self, number: int) -> None:
        """Note that the directory knows nothing of a table that has records."""
        self.compare(number, array("I", bytes(self.per_page * 4)), zeros=False)

    def _is_at(self, grain: int, sector: int) -> bool:
        at = sector * SECTOR
        if at + GRAIN_MARKER.size > self.storage.size:
            return False
        found, size = GRAIN_MARKER.unpack(self.storage.read(at, GRAIN_MARKER.size))
        return found == grain * self._grain_sectors and size > 0

    def settle_doubts(self, tables: "Iterator[array[int]]") -> None:
        """Drop every record that its own table lacks and another entry claims; ``tables`` are all of them."""
        if not self._doubtful:
            return
        for entries in tables:
            for sector in self._doubtful.keys() & set(entries):
                number, slot = divmod(self._doubtful.pop(sector), self.per_page)
                self.pinned[number][slot] = LOST_ENTRY

    def get(self, page: int) -> "array[int] | None":
        """See Pages: None for a table of holes."""
        return self.pinned.get(page) or (None if bisect_right(self._holes, page) % 2 else self._lost)

    def empty_from(self, number: int, limit: int) -> int:
        """See GrainTables: how many tables from ``number`` on are all holes."""
        found = 0
        while found < limit and self.get(number + found) is None:
            found += 1
        return found


class SalvagedExtent(StreamExtent):
    """A streamOptimized extent read by its markers and by what is left of its tables."""

    def __init__(self, storage: Storage, header: HostedHeader, cache: Cache, *, size: int) -> None:
        refuse_huge_grains(storage, header)
        if not header.markers:
            raise Unsupported(storage.name, what="a compressed disk without markers, which salvage needs")
        tables = salvage(storage, header, cache)
        self._setup(storage, header, tables, tables.empty_from, size)
        self._lost = LostSource(storage.name, "this part of the damaged stream is lost")

    def map(self, offset: int, length: int) -> Mapping:
        """See Extent."""
        kind, length, source, at = super().map(offset, length)
        if kind is Kind.LOST:
            return kind, length, self._lost, offset
        return kind, length, source, at

    def _decode(self, entry: int, index: int) -> tuple[Kind, int]:
        if entry == LOST_ENTRY:
            return Kind.LOST, 0
        return super()._decode(entry, index)


@dataclass(slots=True)
class _Walk:
    """What walking from record to record found, besides grains.

    start      where the first record should be, None if it is not there
    tables     where the table of a number is (sector), as the grains before it tell
    between    (first, last) numbers of tables that the order of tables leaves no room for, ascending
    directory  where the directory is (sector)
    """

    start: int | None
    tables: dict[int, int] = field(default_factory=dict)
    between: list[tuple[int, int]] = field(default_factory=list)
    directory: int | None = None


def salvage(storage: Storage, header: HostedHeader, cache: Cache) -> SalvagedTables:
    """Put together the tables of a stream.

    Memory is that of the tables of the parts that have data; time that of reading one sector a grain.
    """
    tables = SalvagedTables(storage, header, cache)
    walk = _walk(storage, header, tables)
    directory = _directory(storage, header, cache, walk)
    if directory is None:
        for first, last in walk.between:
            tables.absent(first, last)
        for number, sector in walk.tables.items():
            tables.compare(number, _read(storage, header, sector), zeros=True)
        tables.settle_doubts(_read(storage, header, sector) for sector in walk.tables.values())
    else:
        _follow(directory, walk, tables)
        tables.settle_doubts(table for _, table in directory.all(walk) if table is not None)
    return tables


class _Directory(HostedTables):
    """The directory of a stream, as far as it is whole.

    ``header`` says where it is.  Tables that lie in front of the records are believed in what they leave out if
    the first record is where it should be.
    """

    def __init__(self, storage: Storage, header: HostedHeader, cache: Cache, walk: _Walk) -> None:
        super().__init__(storage, header, cache)
        self.count = header.directory_entries
        self.header = header
        self.believed = header.directory_at >= _first_place(header) or walk.start is not None
        found = sum(self.entry(self.directory, number) == at for number, at in walk.tables.items())
        #: Most of the tables that the walk found are where this directory says.
        self.agrees = found * 2 > len(walk.tables) or not walk.tables

    def table(self, number: int, walk: _Walk) -> "array[int] | None":
        """A table by the directory, or else where the walk found it."""
        try:
            table = self.tables.get(number)
        except FormatError:
            table = None
        if table is None and number in walk.tables:
            return _read(self.storage, self.header, walk.tables[number])
        return table

    def all(self, walk: _Walk) -> "Iterator[tuple[int, array[int] | None]]":
        """All tables but those that hold nothing; None for one that can't be had."""
        number = 0
        while (number := number + self.empty_from(number, self.count - number)) < self.count:
            yield number, self.table(number, walk)
            number += 1


def _follow(directory: _Directory, walk: _Walk, tables: SalvagedTables) -> None:
    """Compare all tables that the directory names with the records that were found."""
    found = sorted(tables.pinned)
    number = 0
    while number < directory.count:
        index = bisect_left(found, number)
        stop = found[index] if index < len(found) else directory.count
        if number < stop and (empty := directory.empty_from(number, stop - number)):
            if directory.believed:
                tables.absent(number, number + empty)
            number += empty
            continue
        table = directory.table(number, walk)
        if table is not None:
            tables.compare(number, table, zeros=directory.believed)
        elif number in tables.pinned:
            tables.doubt(number)
        number += 1


def _read(storage: Storage, header: HostedHeader, sector: int) -> "array[int]":
    """The table at a place that the walk found; as much of it as is there."""
    at = sector * SECTOR
    length = min(header.entries_per_table * 4, max(storage.size - at, 0))
    return array("I", storage.read(at, length - length % 4) if length >= 4 else b"")


def _directory(storage: Storage, header: HostedHeader, cache: Cache, walk: _Walk) -> _Directory | None:
    """The directory: where header or footer say, or where the walk found it.  None if it is lost."""
    candidates = []
    try:
        candidates.append(with_directory(storage, header)[1])
    except (FormatError, Unsupported):
        pass  # the walk has to do
    if walk.directory is not None:
        candidates.append(replace(header, directory_sector=walk.directory, redundant_sector=0))
    for candidate in candidates:
        try:
            directory = _Directory(storage, candidate, cache, walk)
        except FormatError:
            continue
        if directory.agrees:
            return directory
    return None


def _walk(storage: Storage, header: HostedHeader, tables: SalvagedTables) -> _Walk:
    """Go from record to record to the end of the file, entering every grain that is whole."""
    size = storage.size
    at = _first_place(header)
    walk = _Walk(at if _is_start(storage, header, at) else None)
    if walk.start is None:
        at = _next_record(storage, header, at - SECTOR, size)
    #: The table that came last, None if it is not known; and to which tables the grains since then belong.
    previous = None if walk.start is None else -1
    grains: Counter[int] = Counter()
    while at < size:
        record = parse_record(storage.read(at, min(SECTOR, size - at)), header)
        sector = at // SECTOR
        match record:
            case GrainRecord() if at + GRAIN_MARKER.size + record.size <= size:
                grain = record.sector // header.grain_sectors
                tables.add(grain, sector)
                grains[grain // header.entries_per_table] += 1
            case MetadataRecord(type=MarkerType.GRAIN_TABLE):
                previous = _enter_table(storage, header, walk, sector + 1, grains, previous)
                grains = Counter()
            case MetadataRecord(type=MarkerType.GRAIN_DIRECTORY):
                walk.directory = sector + 1
            case MetadataRecord(type=MarkerType.END_OF_STREAM) if size - at <= _END_PADDING:
                break
            case MetadataRecord() if record.type is not MarkerType.END_OF_STREAM:
                pass
            case _:
                # Damage, or a hole that a failed writer left.
                previous = None
                at = _next_record(storage, header, at, size)
                continue
        at += record.length
    return walk


def _enter_table(
    storage: Storage,
    header: HostedHeader,
    walk: _Walk,
    sector: int,
    grains: Counter[int],
    previous: int | None,
) -> int | None:
    """Note where a table is; which table is then the last one, None if that is not sure."""
    if not grains:
        # A table without grains, as some writers have, is behind the last one and before the next.
        return None if any(_read(storage, header, sector)) else previous
    number = grains.most_common(1)[0][0]
    if len(grains) > 1 or number in walk.tables:
        walk.tables.setdefault(number, sector)
        return None
    walk.tables[number] = sector
    if previous is not None and previous < number:
        walk.between.append((previous + 1, number))
    return number


def _first_place(header: HostedHeader) -> int:
    """Where the first record should be: behind the header, the descriptor and what else lies in front."""
    descriptor_end = (header.descriptor_sector + header.descriptor_sectors) * SECTOR
    return max(header.overhead_sectors * SECTOR, align_up(max(descriptor_end, SECTOR), SECTOR))


def _is_start(storage: Storage, header: HostedHeader, at: int) -> bool:
    """Whether the records begin at ``at``; or, if there are none, the file ends there."""
    left = storage.size - at
    if left <= SECTOR:
        return left == 0 or left == SECTOR
    sector = storage.read(at, SECTOR)
    return any(sector[: GRAIN_MARKER.size + 4]) and parse_record(sector, header) is not None


def _next_record(storage: Storage, header: HostedHeader, at: int, size: int) -> int:
    """The next sector behind ``at`` that can be a record, or the end of the file."""
    at += SECTOR
    while at < size:
        window = storage.read(at, min(_WINDOW, size - at))
        for offset in range(0, len(window), SECTOR):
            sector = window[offset : offset + SECTOR]
            if any(sector[:16]) and _plausible(parse_record(sector, header), sector):
                return at + offset
        at += len(window)
    return size


def _plausible(record: GrainRecord | MetadataRecord | None, sector: bytes) -> bool:
    """Stricter than parsing, for a sector found by searching: a grain must begin like a zlib stream."""
    if isinstance(record, GrainRecord):
        return len(sector) > 13 and sector[12] & 0x0F == 8 and (sector[12] << 8 | sector[13]) % 31 == 0
    return record is not None and record.type is not MarkerType.END_OF_STREAM
