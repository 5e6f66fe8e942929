"""Hosted sparse extents (KDMV, uncompressed): VMware Workstation, VirtualBox and QEMU."""

import logging
from array import array

from nbd_vmdk.alloc import Allocator
from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import Truncated
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.extents.tables import GrainTables
from nbd_vmdk.extents.writing import WritableSparseExtent
from nbd_vmdk.ondisk.hosted import MAX_DESCRIPTOR, MAX_GRAIN_AT, UNCLEAN_AT, HostedHeader, check_directory
from nbd_vmdk.pages import Pages
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import SECTOR, align_up

log = logging.getLogger("nbd_vmdk")

_ZERO_GRAIN = 1


class HostedTables(GrainTables):
    """Where the directory, its redundant twin and the tables of a hosted extent lie.

    The first directory is the one that is read.  If an entry of it is missing or can't be right and the
    twin's can, the twin's table is taken: that is what the twin is for.
    """

    def __init__(self, storage: Storage, header: HostedHeader, cache: Cache) -> None:
        check_directory(header, storage.size, storage.name)
        super().__init__(
            storage,
            cache,
            width=4,
            entries_per_table=header.entries_per_table,
            directory_entries=header.directory_entries,
            directory_at=header.directory_at,
            step=header.entries_per_table * 4 // SECTOR,
        )
        self.redundant = None if header.redundant_at is None else self._directory_pages(header.redundant_at)
        self._forbidden = _metadata_ranges(header)
        self._behind = max(last for _first, last in self._forbidden)
        self._seen = 0
        self._warned = False

    def _is_table(self, sector: int) -> bool:
        begin, end = sector * SECTOR, sector * SECTOR + self._length
        if end > self._seen:
            self._seen = self.storage.size  # asked for again only as the file grows
            if end > self._seen:
                return False
        return begin >= self._behind or all(end <= first or begin >= last for first, last in self._forbidden)

    def places(self, number: int) -> tuple[int, ...] | None:
        """See GrainTables."""
        sector = self.entry(self.directory, number)
        twin = 0 if self.redundant is None else self.entry(self.redundant, number)
        if sector and twin and self._is_table(sector) and self._is_table(twin):
            return sector * SECTOR, twin * SECTOR
        places = tuple(entry * SECTOR for entry in (sector, twin) if entry and self._is_table(entry))
        if not places:
            if not sector:
                return None
            raise self.bad_entry(number, sector)
        if places[0] != sector * SECTOR and not self._warned:
            self._warned = True
            log.warning(
                "%s: grain directory entry %d is damaged, its redundant twin is used",
                self.storage.name,
                number,
            )
        return places

    def _missing(self, number: int, count: int) -> int:
        """See GrainTables: a table that the twin knows is not missing, its entry is."""
        if self.redundant is None:
            return count
        page, slot = divmod(number, self.redundant.per_page)
        entries = self.redundant.get(page)
        assert entries is not None, "a directory has all its pages"
        if entries is self.redundant.empty:
            return count
        return next((i for i, entry in enumerate(entries[slot : slot + count]) if entry), count)

    @property
    def directories(self) -> list[Pages]:
        """See GrainTables."""
        return [pages for pages in (self.directory, self.redundant) if pages is not None]

    def lacking(self, number: int) -> list[Pages]:
        """See GrainTables: a place where no table can be counts as none, the twin knows better."""
        return [pages for pages in self.directories if not self._is_table(self.entry(pages, number))]


def _metadata_ranges(header: HostedHeader) -> list[tuple[int, int]]:
    """What no grain table may overlap: header, descriptor, directories."""
    size = align_up(header.directory_entries * 4, SECTOR)
    ranges = [(0, SECTOR), (header.directory_at, header.directory_at + size)]
    if header.redundant_at is not None:
        ranges.append((header.redundant_at, header.redundant_at + size))
    if header.descriptor_sector:
        begin = header.descriptor_sector * SECTOR
        size = min(header.descriptor_sectors * SECTOR, MAX_DESCRIPTOR)
        # A size that can't be must not forbid the tables behind the directories.
        ranges.append((begin, min([begin + size, *(first for first, _ in ranges if first > begin)])))
    return ranges


class HostedExtent(WritableSparseExtent):
    """A hosted sparse extent, written in place if its file is open for writing."""

    type_word = "SPARSE"

    def __init__(self, storage: Storage, header: HostedHeader, cache: Cache, *, size: int) -> None:
        self.header = header
        places = HostedTables(storage, header, cache)
        super().__init__(
            storage,
            size=size,
            grain=header.grain,
            tables=places.tables,
            empty_from=places.empty_from,
            # Nothing below the overhead is a grain; entries 0 and 1 have meanings of their own.
            lowest=max(header.overhead_sectors, 2),
            step=header.grain_sectors,
        )
        if header.zeroed_grains:
            self.zero_entry = _ZERO_GRAIN
        self._warned = False
        if storage.writable:
            last = self._end_of_last(header.capacity, lambda: HostedTables(storage, header, Cache(0)))
            allocator = Allocator(storage, header.grain, MAX_GRAIN_AT, last)
            self.enable_writing(places, allocator, unclean_at=UNCLEAN_AT, was_unclean=header.unclean)

    def _decode(self, entry: int, index: int) -> tuple[Kind, int]:
        if entry == 0:
            return Kind.HOLE, 0
        if entry == _ZERO_GRAIN:
            if not self.header.zeroed_grains and not self._warned:
                self._warned = True
                # QEMU would show the descriptor here; every other reader takes it for zeros.
                log.warning("%s: zeroed grains in a file that does not declare them", self.storage.name)
            return Kind.ZERO, 0
        raise self._bad_entry(entry, index, "points into the extent's own tables")

    def _make_ready(self, number: int, table: "array[int] | None") -> "array[int]":
        table = super()._make_ready(number, table)
        if self._places.lacking(number):
            # One directory alone names the table, after a crash or by damage; other readers may know only
            # the other one.  The second place gets what the table holds now: were it empty, a crash between
            # the writes of the next commit would leave a directory that leads to nothing.
            self._create_table(number, self._tables.encode(table))
        return table


def check_grain_area(header: HostedHeader, storage: Storage) -> None:
    """Refuse a file that ends before its first grain could begin (a download that broke off).

    Raises Truncated.
    """
    need = header.overhead_sectors * SECTOR
    if storage.size < need:
        raise Truncated(storage.name, what="its tables", need=need, have=storage.size)
