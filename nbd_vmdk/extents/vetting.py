"""Whether an extent with tables may be written: the fast part of a check.

Whoever writes trusts the tables.  An entry that names the place of a table, or a place behind the end of the
file where the next new grain will go, turns that trust into damage elsewhere.  So before the first write all
directories and tables are looked at once.

A crash leaves none of what is refused here: data come before tables, tables before directories, and the file
is lengthened before all.  What a crash does leave is let through: a table that differs from its twin, an
entry that one of the directories lacks, a freeSector that is wrong.

Grains that share a place (shared.py) are refused, too, for a write to one would change the other.  They come
about where a power cut leaves an entry that points behind the end of the file, and the next grain is put
there; QEMU does that, and marks nothing.

Who opens an image whose tables would take long to look at, and that was closed cleanly, asks only whether one
of them reaches past the end of the file (reaches_past_end).  That can do new harm: then a grain that is
made now lies where an entry pointed to already, and a read error becomes another grain's data.  What is not
seen there are grains that share a place inside the file, and entries that name a table among the grains.
Looking at each table before it is changed for the first time would not see them: the other grain that has the
place is mostly in another table, and nothing but all tables tells; and a write to a grain that is there does
not look at its table at all but for the place, once a request, so each request would pay for the question
whether it was looked at.  What such a write spoils is a grain that showed another's data before.

Without numpy, which takes longer to import than most images take to be looked at: reading runs of tables and
comparing whole tables is the work, and Python's max() and min() do the rest.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from nbd_vmdk.errors import BadField, Truncated
from nbd_vmdk.extents.shared import Slots
from nbd_vmdk.ondisk import cowd
from nbd_vmdk.ondisk.cowd import CowdHeader
from nbd_vmdk.ondisk.hosted import HostedHeader, check_directory, unpack_entries
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB, SECTOR, align_up

#: Tables that follow each other are read together, as many bytes as this.
_READ: Final = MIB
#: Tables of an extent of 64 TiB, as everybody makes them; a header may speak of sixteen times as many.
_MOST_TABLES: Final = 1 << 21
_HINT: Final = (
    "nbd-vmdk check IMAGE tells more, nbd-vmdk repair IMAGE shows what can be mended; or read it with -r"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """What the kinds differ in; places and lengths in sectors.

    directories   name -> byte at which it begins; the first one is that which readers go by
    entries       how many each of them has
    areas         [begin, end) of all that is neither a grain nor a table
    lowest        where grains may begin
    codes         entries of tables below this are codes, no places
    """

    directories: dict[str, int]
    entries: int
    entries_per_table: int
    grain: int
    capacity: int
    areas: list[tuple[int, int]]
    lowest: int
    codes: int

    @property
    def table(self) -> int:
        """Sectors of a table."""
        return align_up(self.entries_per_table * 4, SECTOR) // SECTOR


def quick_check(storage: Storage, header: HostedHeader) -> None:
    """Look at the directories and tables of an uncompressed hosted extent; ``header`` is its own.

    Takes 0.8 ms for an image of 1 GiB, 80 ms for 100 GiB, and for 2000 GiB 0.2 s if it is empty, 2 s if it is
    full.  Raises BadField for the first thing that makes writing dangerous, and what check_directory raises.
    """
    check_directory(header, storage.size, storage.name)
    area = align_up(header.directory_entries * 4, SECTOR) // SECTOR
    directories = {"grain directory": header.directory_at}
    areas = [(0, 1), (header.directory_sector, header.directory_sector + area)]
    if header.redundant_at is not None:
        directories["redundant directory"] = header.redundant_at
        areas.append((header.redundant_sector, header.redundant_sector + area))
    if header.descriptor_sector:
        first = header.descriptor_sector
        areas.append((first, first + header.descriptor_sectors))
    layout = _Layout(
        directories=directories,
        entries=header.directory_entries,
        entries_per_table=header.entries_per_table,
        grain=header.grain_sectors,
        capacity=header.capacity_sectors,
        areas=areas,
        lowest=max(header.overhead_sectors, 2),
        codes=2,
    )
    _look(storage, layout)


def reaches_past_end(storage: Storage, header: HostedHeader) -> bool:
    """Whether a table or an entry of one is, or may be, behind the end of the file; quick_check tells which.

    Takes 0.1 s for an image of 2000 GiB that is empty and 0.26 s if it is full, for which quick_check takes
    1.7 s.
    Raises what check_directory raises.
    """
    check_directory(header, storage.size, storage.name)
    length = header.entries_per_table * 4
    directory = unpack_entries(storage.read(header.directory_at, header.directory_entries * 4))
    if header.redundant_at is not None and 0 in directory:
        twin = unpack_entries(storage.read(header.redundant_at, len(directory) * 4))
        directory = _completed(directory, twin)
    if max(directory, default=0) * SECTOR + length > storage.size:
        return True
    last = storage.size // SECTOR - header.grain_sectors
    empty = bytes(max(_READ, length))
    for _number, raw in _rows(storage, directory, length):
        if raw != empty[: len(raw)] and max(unpack_entries(raw.tobytes())) > last:
            return True
    return False


def quick_check_cowd(storage: Storage, header: CowdHeader) -> None:
    """The same for a COWD extent with grains of a sector.  Takes 5 ms for 64 MiB of data, 80 ms for 1 GiB.

    Raises BadField, or Truncated if there is no room for the directory.
    """
    if header.overhead > storage.size:
        raise Truncated(storage.name, what="its grain directory", need=header.overhead, have=storage.size)
    if header.directory_sector != cowd.USUAL_DIRECTORY:
        # If that is damage, zeros there would be a directory without tables, and tables be made over grains.
        why = f"every writer known puts the directory at sector {cowd.USUAL_DIRECTORY}"
        raise _bad(storage, "gdOffset", header.directory_sector, why)
    front = -(-header.overhead // SECTOR)
    layout = _Layout(
        directories={"grain directory": header.directory_sector * SECTOR},
        entries=header.directory_entries,
        entries_per_table=cowd.ENTRIES_PER_TABLE,
        grain=header.grain_sectors,
        capacity=header.capacity_sectors,
        areas=[(0, front)],
        lowest=front,
        codes=1,
    )
    _look(storage, layout)


def _look(storage: Storage, layout: _Layout) -> None:
    if layout.entries > _MOST_TABLES:
        why = f"tables in it are looked at before writing, but not more than {_MOST_TABLES}"
        raise _bad(storage, "the size of the grain directory", layout.entries, why)
    places: dict[str, array[int]] = {}
    for name, at in layout.directories.items():
        entries = places[name] = unpack_entries(storage.read(at, layout.entries * 4))
        last = max(storage.size // SECTOR - layout.table, 0)
        if max(entries, default=0) > last:
            number = next(number for number, entry in enumerate(entries) if entry > last)
            raise _bad(
                storage, f"entry {number} of the {name}", entries[number], "no grain table can be there"
            )
    metadata = _metadata(storage, layout, _ascending(places.values()))
    directory, *twins = places.values()
    for twin in twins:
        directory = _completed(directory, twin)
    _check_entries(storage, layout, directory, metadata)


def _completed(directory: "array[int]", twin: "array[int]") -> "array[int]":
    """The directory by which tables are read: where it has no entry, its twin's counts (see HostedTables)."""
    if 0 not in directory:
        return directory
    return array("I", [entry or other for entry, other in zip(directory, twin, strict=True)])


def _bad(storage: Storage, field: str, value: int, why: str) -> BadField:
    return BadField(storage.name, field=field, value=value, why=why, hint=_HINT)


def _ascending(directories: "Iterable[array[int]]") -> "array[int]":
    """Where all tables are, in order."""
    found = array("I")
    for entries in sorted(directories, key=lambda entries: next(filter(None, entries), 0)):
        found.extend(filter(None, entries))
    # As a list of integers it takes ten times the memory, and mostly both directories are in order.
    return array("I", sorted(found)) if any(one > two for one, two in pairwise(found)) else found


@dataclass(frozen=True, slots=True)
class _Metadata:
    """What no grain may lie on: tables of ``length`` from each of ``tables``, and ``others``; in sectors."""

    tables: "array[int]"
    length: int
    others: list[tuple[int, int]]

    def tables_between(self, first: int, last: int) -> "array[int]":
        """The tables of which some part lies in [first, last)."""
        begin = bisect_left(self.tables, max(first - self.length + 1, 0))
        return self.tables[begin : bisect_left(self.tables, last, begin)]

    def meets(self, first: int, last: int) -> bool:
        """Whether a table has some part in [first, last)."""
        index = bisect_left(self.tables, max(first - self.length + 1, 0))
        return index < len(self.tables) and self.tables[index] < last


def _metadata(storage: Storage, layout: _Layout, tables: "array[int]") -> _Metadata:
    """Where header, descriptor, directories and tables lie; none may lie on another."""
    others = sorted(layout.areas)
    length = layout.table
    found = _Metadata(tables, length, others)
    twice = [two for one, two in pairwise(tables) if two - one < length]
    twice += [begin for (_, end), (begin, _) in pairwise(others) if begin < end]
    twice += [begin for begin, end in others if found.meets(begin, end)]
    if twice:
        raise _bad(storage, "a grain table's place", twice[0], "another table or a directory lies there")
    return found


def _check_entries(storage: Storage, layout: _Layout, directory: "array[int]", metadata: _Metadata) -> None:
    """Every entry must be a code, or name a place for a whole grain: behind the overhead, on no table."""
    lowest, grain = layout.lowest, layout.grain
    sectors = storage.size // SECTOR
    last_grain = (layout.capacity - 1) // grain
    slots = Slots(sectors, grain, layout.entries_per_table, layout.codes)
    for number, table in _tables(storage, directory, layout.entries_per_table * 4):
        high, low = max(table), min(filter(None, table))
        if high + grain > sectors or low < lowest:
            for slot, entry in enumerate(table):
                index = number * layout.entries_per_table + slot
                # Of the last grain only the part is needed that the guest can see.
                need = layout.capacity - index * grain if index == last_grain else grain
                if entry >= layout.codes and index <= last_grain and not lowest <= entry <= sectors - need:
                    why = "no grain can be there"
                    raise _bad(storage, f"the table entry of grain {index}", entry, why)
        # Tables that were made later lie among the grains.
        near = metadata.tables_between(max(low, lowest), high + grain)
        others = [(begin, end) for begin, end in metadata.others if end > lowest and begin < high + grain]
        if near or others:
            _refuse_over_tables(storage, layout, number, table, metadata, near, others)
        # What lies behind the end of the disk means nothing, whatever it names.
        inside = table[: last_grain + 1 - number * layout.entries_per_table]
        slots.add(inside, low if len(inside) == len(table) else 0)
    if slots.shared():
        raise _shared(storage, layout, directory)


def _shared(storage: Storage, layout: _Layout, directory: "array[int]") -> BadField:
    """The error for grains that share a place, which names one that meets another."""
    slots = Slots(storage.size // SECTOR, layout.grain, layout.entries_per_table, layout.codes)
    last_grain = (layout.capacity - 1) // layout.grain
    for number, table in _tables(storage, directory, layout.entries_per_table * 4):
        first = number * layout.entries_per_table
        slot = slots.enter_until_shared(table[: last_grain + 1 - first])
        if slot is not None:
            why = "another grain lies there, too"
            return _bad(storage, f"the table entry of grain {first + slot}", table[slot], why)
    return _bad(
        storage, "the number of grains", last_grain + 1, "some lie in one place, and the file is changing"
    )


def _refuse_over_tables(
    storage: Storage,
    layout: _Layout,
    number: int,
    table: "array[int]",
    metadata: _Metadata,
    near: "array[int]",
    others: list[tuple[int, int]],
) -> None:
    grain = layout.grain
    entries = [entry for entry in sorted(table) if entry >= layout.codes]
    if len(near) < len(entries):
        others = [*others, *((begin, begin + metadata.length) for begin in near)]
        bad = []
    else:
        bad = [entry for entry in entries if metadata.meets(entry, entry + grain)]
    for begin, end in others:
        at = bisect_left(entries, begin - grain + 1)
        bad += entries[at : at + 1] if at < len(entries) and entries[at] < end else []
    if bad:
        field = f"an entry of grain table {number}"
        raise _bad(storage, field, bad[0], "another table or a directory lies there")


def _tables(storage: Storage, directory: "array[int]", length: int) -> "Iterator[tuple[int, array[int]]]":
    """The tables that are not all zeros, by number; those that follow each other are read together."""
    empty = bytes(length)
    for first, raw in _rows(storage, directory, length):
        for at in range(0, len(raw), length):
            piece = raw[at : at + length]
            if piece != empty:
                yield first + at // length, unpack_entries(piece.tobytes())


def _rows(storage: Storage, directory: "array[int]", length: int) -> Iterator[tuple[int, memoryview]]:
    """The bytes of all tables that may hold something, row by row, and the number of the first of each."""
    most = max(_READ // length, 1)
    first = 0
    while first < len(directory):
        if not directory[first]:
            first += 1
            continue
        count = 1
        while (
            count < most
            and first + count < len(directory)
            and directory[first + count] * SECTOR == directory[first] * SECTOR + count * length
        ):
            count += 1
        at = directory[first] * SECTOR
        # Tables that lie in a hole of the file are empty: a large new image has no others.
        if any(is_data for _length, is_data in storage.segments(at, count * length)):
            yield first, memoryview(storage.read(at, count * length))
        first += count
