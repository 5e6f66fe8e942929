"""Growing an extent with tables where it is: first what the larger one needs, then one sector of the header.

Everything that the new capacity needs is put where the old one does not look: new tables behind the end of
the file, their entries behind those of the old directory where its last sector has room.  Where it has not,
a hosted extent gets both directories anew behind the end, as their places are fields of the header.  COWD
has its directory at its place, and readers take nothing in front of its end for data: so what stands behind
it, tables and grains, is copied to the end of the file, pointed to there, and only then is its place taken.

All that is made durable; then capacity and places change with one write of the header's sector.  A power cut
before it leaves the old extent, with space at the end that nothing names.

Space that was behind the old end and inside the last grain or table must read as zeros: it is cleared first.

Sources: the VMDK spec, sections "Hosted Sparse Extents" and "ESX Server Sparse Extents".
"""

import struct
from array import array
from dataclasses import replace

from nbd_vmdk.errors import OptionError, StorageError
from nbd_vmdk.ondisk import cowd, cowd_build, hosted, hosted_build
from nbd_vmdk.ondisk.cowd import CowdHeader
from nbd_vmdk.ondisk.descriptor_build import Geometry
from nbd_vmdk.ondisk.hosted import HostedHeader
from nbd_vmdk.ops.resize.changes import Change, is_zero
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import SECTOR, align_up, format_size


def grow_hosted(storage: Storage, header: HostedHeader, size: int, sectors: int) -> list[Change]:
    """Give a hosted extent, of which ``size`` bytes are in use, a capacity of ``sectors``.

    Raises OptionError if its tables could not name all grains.
    """
    larger = replace(header, capacity_sectors=sectors)
    _check_room(storage, hosted_build.can_fill(larger), sectors)
    table = align_up(header.entries_per_table * 4, SECTOR)
    directories = [header.directory_at]
    if header.redundant_at is not None:
        directories.insert(0, header.redundant_at)
    changes = [
        Change(
            f"{storage.name}: what lies behind the old end becomes zeros",
            lambda: _clear(
                storage,
                directories,
                header.directory_entries,
                header.entries_per_table,
                header.grain,
                size,
            ),
        )
    ]
    if sectors <= header.capacity_sectors:
        return changes
    count = larger.directory_entries - header.directory_entries
    moved = larger.directory_entries * 4 > align_up(header.directory_entries * 4, SECTOR)
    if count:
        where = ", and the directory moves there too" if moved else ""
        made = format_size(count * table * len(directories))
        text = f"{storage.name}: {count} more grain tables behind its end ({made}){where}"
    else:
        text = f"{storage.name}: its header says the new capacity"

    def apply() -> None:
        places = directories
        if count:
            places = _add_tables(storage, header, larger, directories, table, moved=moved)
        fields = {hosted.CAPACITY_AT: sectors, hosted.GD_OFFSET_AT: places[-1] // SECTOR}
        if len(places) > 1:
            fields[hosted.RGD_OFFSET_AT] = places[0] // SECTOR
        _patch(storage, fields, "<Q")

    return [*changes, Change(text, apply)]


def _add_tables(
    storage: Storage,
    header: HostedHeader,
    larger: HostedHeader,
    directories: list[int],
    table: int,
    *,
    moved: bool,
) -> list[int]:
    """Make the tables that ``larger`` needs besides, enter them; the places of its directories."""
    old, new = header.directory_entries, larger.directory_entries
    at = align_up(storage.size, header.grain)
    places, pieces = [], []
    for directory in directories:
        place, content = directory, b""
        if moved:
            content = storage.read(directory, old * 4)
            place = at
            at += align_up(new * 4, SECTOR)
        first = at // SECTOR
        more = struct.pack(
            f"<{new - old}I", *range(first, first + (new - old) * table // SECTOR, table // SECTOR)
        )
        pieces.append((place if moved else directory + old * 4, content + more))
        at += (new - old) * table
        places.append(place)
    size = storage.size
    try:
        storage.truncate(at)
        for place, content in pieces:
            storage.write(content, place)
        storage.sync()
    except StorageError:
        storage.truncate(size)  # no room: nothing names what was made
        raise
    return places


def shrink_hosted(storage: Storage, sectors: int) -> None:
    """Give a hosted extent a smaller capacity; the tables behind it stay where they are."""
    _patch(storage, {hosted.CAPACITY_AT: sectors}, "<Q")


def grow_cowd(
    storage: Storage, header: CowdHeader, size: int, sectors: int, geometry: Geometry
) -> list[Change]:
    """Give a COWD extent, of which ``size`` bytes are in use, a capacity of ``sectors``; see grow_hosted."""
    _check_room(storage, cowd_build.can_fill(sectors, grain_sectors=header.grain_sectors), sectors)
    directory = header.directory_sector * SECTOR
    grain = header.grain_sectors * SECTOR
    changes = [
        Change(
            f"{storage.name}: what lies behind the old end becomes zeros",
            lambda: _clear(
                storage, [directory], header.directory_entries, cowd.ENTRIES_PER_TABLE, grain, size
            ),
        )
    ]
    if sectors <= header.capacity_sectors:
        return changes
    entries = -(-sectors // (cowd.ENTRIES_PER_TABLE * header.grain_sectors))
    begin = directory + header.directory_entries * 4
    end = directory + align_up(entries * 4, SECTOR)
    needed = align_up(begin, SECTOR)
    if end > needed:
        text = f"{storage.name}: what stands behind its directory moves to the end, and that takes the place"
        changes.append(Change(text, lambda: _make_way(storage, header, needed, end)))

    def apply() -> None:
        # Entries in front of the new end, behind those that count now, may be anything.
        storage.write(bytes(end - begin), begin)
        storage.sync()
        head = storage.read(0, SECTOR)
        fields = {cowd.CAPACITY_AT: sectors, cowd.ENTRIES_AT: entries}
        free = int.from_bytes(head[cowd.FREE_SECTOR_AT : cowd.FREE_SECTOR_AT + 4], "little")
        fields[cowd.FREE_SECTOR_AT] = max(free, end // SECTOR)
        if int.from_bytes(head[cowd.FLAGS_AT : cowd.FLAGS_AT + 4], "little") & cowd.FLAG_ROOT:
            fields.update({cowd.GEOMETRY_AT + 4 * i: number for i, number in enumerate(geometry)})
        if storage.size < end:
            storage.truncate(end)
        _patch(storage, fields, "<I")

    changes.append(Change(f"{storage.name}: its header says the new capacity", apply))
    return changes


def shrink_cowd(storage: Storage, header: CowdHeader, sectors: int) -> None:
    """Give a COWD extent a smaller capacity; what stands behind the directory stays where it is."""
    entries = -(-sectors // (cowd.ENTRIES_PER_TABLE * header.grain_sectors))
    _patch(storage, {cowd.CAPACITY_AT: sectors, cowd.ENTRIES_AT: entries}, "<I")


def _make_way(storage: Storage, header: CowdHeader, begin: int, end: int) -> None:
    """Move tables and grains of a COWD extent out of [begin, end), to the end of the file."""
    table, grain = cowd.ENTRIES_PER_TABLE * 4, header.grain_sectors * SECTOR
    directory = header.directory_sector * SECTOR
    # (byte of the entry, byte where it points)
    tables: list[tuple[int, int]] = []
    grains: list[tuple[int, int]] = []
    for index, sector in enumerate(_words(storage, directory, header.directory_entries)):
        if not sector:
            continue
        if sector * SECTOR < end and sector * SECTOR + table > begin:
            tables.append((directory + index * 4, sector * SECTOR))
        entries = _words(storage, sector * SECTOR, cowd.ENTRIES_PER_TABLE)
        if min(filter(None, entries), default=end // SECTOR) * SECTOR < end:
            grains += [
                (sector * SECTOR + slot * 4, entry * SECTOR)
                for slot, entry in enumerate(entries)
                if entry and begin < entry * SECTOR + grain and entry * SECTOR < end
            ]
    # Grains first: a table that moves takes the entries with it that were changed in its old place.
    _move(storage, grains, grain, align_up(end, grain))
    _move(storage, tables, table, end)


def _move(storage: Storage, moves: list[tuple[int, int]], length: int, lowest: int) -> None:
    """Copy what entries name to the end of the file, then let them name it there, each step durable."""
    if not moves:
        return
    at = max(align_up(storage.size, SECTOR), lowest)
    places = []
    for _entry, place in moves:
        storage.write(storage.read(place, min(length, storage.size - place)).ljust(length, b"\0"), at)
        places.append(at)
        at += length
    head = storage.read(0, SECTOR)
    free = int.from_bytes(head[cowd.FREE_SECTOR_AT : cowd.FREE_SECTOR_AT + 4], "little")
    _patch(storage, {cowd.FREE_SECTOR_AT: max(free, -(-at // SECTOR))}, "<I")
    for (entry, _place), new in zip(moves, places, strict=True):
        storage.write((new // SECTOR).to_bytes(4, "little"), entry)
    storage.sync()


def _clear(
    storage: Storage, directories: list[int], tables: int, per_table: int, grain: int, size: int
) -> None:
    """Make everything behind the first ``size`` bytes of an extent with so many tables read as zeros."""
    whole, rest = divmod(size, grain)
    first, slot = divmod(whole, per_table)
    changed = False
    for directory in directories:
        entries = _words(storage, directory + first * 4, max(tables - first, 0))
        for sector in filter(None, entries):
            at = sector * SECTOR
            if sector == entries[0]:
                at += slot * 4
                if rest:
                    changed |= _clear_grain(storage, _words(storage, at, 1)[0] * SECTOR, rest, grain)
                    at += 4
            length = sector * SECTOR + per_table * 4 - at
            if storage.read(at, length).count(0) != length:
                storage.write(bytes(length), at)
                changed = True
    if changed:
        storage.sync()


def _clear_grain(storage: Storage, place: int, used: int, grain: int) -> bool:
    """Clear what is behind the first bytes of a grain, and have it whole; whether something changed."""
    if place <= SECTOR:  # entries 0 and 1 are no places
        return False
    size = storage.size
    if size < place + grain:
        storage.truncate(place + grain)  # nothing else may be put where it is to be
    length = min(place + grain, size) - place - used
    if length <= 0 or is_zero(storage, place + used, length):
        return size < place + grain
    storage.zero(place + used, length)
    return True


def _words(storage: Storage, at: int, count: int) -> "array[int]":
    return hosted.unpack_entries(storage.read(at, count * 4))


def _patch(storage: Storage, fields: dict[int, int], form: str) -> None:
    """Change fields of the header's first sector, all in one write, durably before and after."""
    storage.sync()
    head = bytearray(storage.read(0, SECTOR))
    for at, value in fields.items():
        struct.pack_into(form, head, at, value)
    storage.write(head, 0)
    storage.sync()


def _check_room(storage: Storage, fits: bool, sectors: int) -> None:
    if not fits:
        raise OptionError(
            storage.name,
            why=f"{format_size(sectors * SECTOR)} are too much for it: a sparse extent holds less than 2 TiB",
            hint="nbd-vmdk convert makes a copy of another --type, such as twoGbMaxExtentSparse",
        )
