"""The walk through a damaged stream: from record to record, and over what can't be one.

See salvage.py for what is made of it.
"""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from nbd_vmdk.extents.salvaged import SalvagedTables
from nbd_vmdk.extents.stream import LOST_ENTRY
from nbd_vmdk.ondisk.hosted import HostedHeader, unpack_entries
from nbd_vmdk.ondisk.stream import GRAIN_MARKER, GrainRecord, MarkerType, MetadataRecord, parse_record
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import KIB, MIB, SECTOR, align_down, align_up

#: Bytes read at once when the next record is searched: few at first, because it is near most often.
_FIRST_WINDOW: Final = 8 * KIB
_WINDOW: Final = MIB
#: Room before the first record that is searched for an earlier one.
_FRONT: Final = MIB


@dataclass(slots=True)
class Walk:
    """What walking from record to record found, besides grains.

    start      where the first record should be (sector), None if it is not there
    first      the grain that this record holds
    tables     where the table of a number is (sector), as the grains before it tell
    between    (first, last) numbers of tables that the order of tables leaves no room for, ascending
    directory  where the directory is (sector)
    damaged    something was passed over that can't be a record
    suspects   records directly behind damage, or where tables in front of them end (sectors): what spoiled
               a table may have spoiled their place, too
    """

    start: int | None
    first: int | None = None
    tables: dict[int, int] = field(default_factory=dict)
    between: list[tuple[int, int]] = field(default_factory=list)
    directory: int | None = None
    damaged: bool = False
    suspects: set[int] = field(default_factory=set)


def walk_records(storage: Storage, header: HostedHeader, tables: SalvagedTables) -> Walk:
    """Go from record to record to the end of the file, entering every grain that is whole."""
    # Beyond this no table's entry can name a record, so no writer put one there.
    size = min(storage.size, LOST_ENTRY * SECTOR)
    at = first_record(storage, header)
    walk = Walk(at // SECTOR if _is_start(storage, header, at) else None)
    if walk.start is None:
        walk.damaged = True
        at = next_record(storage, header, at - SECTOR, size)
    walk.suspects.add(at // SECTOR)
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
                if sector == walk.start:
                    walk.first = grain
                grains[grain // header.entries_per_table] += 1
            case MetadataRecord(type=MarkerType.GRAIN_TABLE):
                entries = read_table(storage, header, sector + 1)
                previous = _enter_table(walk, sector + 1, entries, tables, grains, previous)
                grains = Counter()
            case MetadataRecord(type=MarkerType.GRAIN_DIRECTORY):
                walk.directory = sector + 1
            case MetadataRecord(type=MarkerType.END_OF_STREAM) if _is_padding(storage, at, size):
                break
            case MetadataRecord() if record.type is not MarkerType.END_OF_STREAM:
                pass
            case _:
                # Damage, or a hole that a failed writer left.
                previous, walk.damaged = None, True
                at = next_record(storage, header, at, size)
                walk.suspects.add(at // SECTOR)
                continue
        at += record.length
    return walk


def _enter_table(
    walk: Walk,
    sector: int,
    entries: "array[int]",
    tables: SalvagedTables,
    grains: Counter[int],
    previous: int | None,
) -> int | None:
    """Note where a table is; which table is then the last one, None if that is not sure."""
    if not grains:
        # A table without grains, as some writers have, is behind the last one and before the next.
        return None if any(entries) else previous
    number = grains.most_common(1)[0][0]
    if len(grains) > 1 or number in walk.tables or not tables.matches(number, entries):
        walk.tables.setdefault(number, sector)
        return None
    walk.tables[number] = sector
    if previous is not None and previous < number:
        walk.between.append((previous + 1, number))
    return number


def first_place(header: HostedHeader) -> int:
    """Where the first record should be: behind the header, the descriptor and what else lies in front."""
    descriptor_end = (header.descriptor_sector + header.descriptor_sectors) * SECTOR
    return max(header.overhead_sectors * SECTOR, align_up(max(descriptor_end, SECTOR), SECTOR))


def first_record(storage: Storage, header: HostedHeader) -> int:
    """Where the first record is: by overHead, or before that, where nothing else can be.

    An overHead that names a later record would make zeros of the grains before it.
    """
    end = min(first_place(header), storage.size)
    begin = align_up(max((header.descriptor_sector + header.descriptor_sectors) * SECTOR, SECTOR), SECTOR)
    if header.directory_at_end:
        for at in range(begin, min(end, begin + _FRONT) - SECTOR + 1, SECTOR):
            if is_likely(storage.read(at, SECTOR), header):
                return at
    return first_place(header)


def is_likely(sector: bytes, header: HostedHeader) -> bool:
    """Whether a sector that nothing leads to looks like a record."""
    return any(sector[:16]) and is_plausible(parse_record(sector, header), sector)


def _is_start(storage: Storage, header: HostedHeader, at: int) -> bool:
    """Whether the records begin at ``at``; or, if there are none, the file ends there."""
    left = storage.size - at
    if left <= SECTOR:
        return left == 0 or left == SECTOR
    sector = storage.read(at, SECTOR)
    return any(sector[: GRAIN_MARKER.size + 4]) and parse_record(sector, header) is not None


def _is_padding(storage: Storage, at: int, size: int) -> bool:
    """Whether nothing but zeros follows."""
    stop = at
    for length, is_data in storage.segments(at, size - at):
        stop += length
        while is_data and at < stop:
            data = storage.read(at, min(_FIRST_WINDOW, stop - at))
            if any(data):
                return False
            at += len(data)
        at = stop
    return True


def next_record(storage: Storage, header: HostedHeader, at: int, size: int) -> int:
    """The next sector behind ``at`` that can be a record, or the end of the file; holes are passed over."""
    at += SECTOR
    stop, window = at, _FIRST_WINDOW
    for length, is_data in storage.segments(at, max(size - at, 0)):
        stop += length
        if not is_data:
            at = max(at, align_down(stop, SECTOR))
        while is_data and at < stop:
            data = storage.read(at, min(window, align_up(stop, SECTOR) - at, size - at))
            for offset in range(0, len(data), SECTOR):
                sector = data[offset : offset + SECTOR]
                if any(sector[:16]) and is_plausible(parse_record(sector, header), sector):
                    return at + offset
            at += len(data)
            window = min(2 * window, _WINDOW)
    return size


def is_plausible(record: GrainRecord | MetadataRecord | None, sector: bytes) -> bool:
    """Stricter than parsing, for a sector found by searching: a grain must begin like a zlib stream."""
    if isinstance(record, GrainRecord):
        return len(sector) > 13 and sector[12] & 0x0F == 8 and (sector[12] << 8 | sector[13]) % 31 == 0
    return record is not None and record.type is not MarkerType.END_OF_STREAM


def read_table(storage: Storage, header: HostedHeader, sector: int) -> "array[int]":
    """The table at a place that the walk found; as much of it as is there."""
    at = sector * SECTOR
    length = min(header.entries_per_table * 4, max(storage.size - at, 0))
    return unpack_entries(storage.read(at, length - length % 4) if length >= 4 else b"")
