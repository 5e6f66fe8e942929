"""The two levels that every sparse kind has: a directory of tables, tables of grains.

The kinds differ in how a directory entry names a table's place; that is what a subclass says.  Here is also
what makes huge empty disks cheap: tables that do not exist, or hold nothing, are passed over in bulk, by
asking the file system for holes and comparing whole stretches with zeros.
"""

from abc import ABC, abstractmethod
from typing import Final

from nbd_vmdk.alloc import Allocator
from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import BadField, FormatError
from nbd_vmdk.pages import Pages
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import KIB, SECTOR

#: Bytes of a directory that are read together.
_DIRECTORY_PAGE: Final = 4 * KIB
#: Bytes of tables that are compared with zeros together.
_WINDOW: Final = 256 * KIB
_ZEROS: Final = bytes(_WINDOW)


class GrainTables(ABC):
    """The directory of one extent and the tables that it leads to.

    ``width`` is the size of an entry of either, in bytes; ``step`` is what the directory entries of two
    tables differ by that lie one behind the other.
    """

    def __init__(
        self,
        storage: Storage,
        cache: Cache,
        *,
        width: int,
        entries_per_table: int,
        directory_entries: int,
        directory_at: int,
        step: int,
    ) -> None:
        self.storage = storage
        self._cache = cache
        self._width = width
        self._step = step
        self._directory_entries = directory_entries
        self._length = entries_per_table * width
        self.directory = self._directory_pages(directory_at)
        self.tables = Pages(
            storage,
            cache,
            width=width,
            per_page=entries_per_table,
            total=directory_entries * entries_per_table,
            locate=self.places,
        )

    def _directory_pages(self, at: int) -> Pages:
        return Pages(
            self.storage,
            self._cache,
            width=self._width,
            per_page=_DIRECTORY_PAGE // self._width,
            total=self._directory_entries,
            locate=lambda page: (at + page * _DIRECTORY_PAGE,),
        )

    @staticmethod
    def entry(directory: Pages, number: int) -> int:
        """The entry ``number`` of a directory."""
        page, slot = divmod(number, directory.per_page)
        entries = directory.get(page)
        assert entries is not None, "a directory has all its pages"
        return entries[slot]

    @abstractmethod
    def places(self, number: int) -> tuple[int, ...] | None:
        """Byte positions of a table's copies, the one to read first; None if there is no such table.

        Raises BadField if the directory names no place where a table can be.
        """

    def bad_entry(self, number: int, entry: int) -> BadField:
        """Build the error for a directory entry that leads nowhere."""
        return BadField(
            self.storage.name,
            field=f"grain directory entry {number}",
            value=f"{entry:#x}",
            why="no grain table can be there",
            hint="what other tables map can still be read; nbd-vmdk repair IMAGE shows what can be mended",
        )

    @property
    def directories(self) -> list[Pages]:
        """All directories: a kind may have a second one."""
        return [self.directory]

    # Making tables, for kinds whose directory entries are sectors.

    def lacking(self, number: int) -> list[Pages]:
        """The directories that name no place for a table; what names a place where none can be is damage."""
        return [pages for pages in self.directories if not self.entry(pages, number)]

    def reserve(self, directories: list[Pages], allocator: Allocator) -> list[int]:
        """Byte positions for a table in each of ``directories``, zeros at the end of the file."""
        return [allocator.take_table(self._length) for _ in directories]

    def enter(self, number: int, directories: list[Pages], places: list[int]) -> None:
        """Enter a table in directories.

        All that can fail came before: a table without its twin is damage to some readers.
        """
        page, slot = divmod(number, self.directory.per_page)
        for directory, at in zip(directories, places, strict=True):
            with directory.lock(page):
                directory.pin(page)[slot] = at // SECTOR
                directory.dirty.add(page)

    def empty_from(self, number: int, limit: int) -> int:
        """How many tables from ``number`` on, ``limit`` at most, hold nothing or do not exist."""
        found = 0
        while found < limit:
            page, slot = divmod(number + found, self.directory.per_page)
            entries = self.directory.get(page)
            assert entries is not None, "a directory has all its pages"
            last = min(slot + limit - found, self.directory.per_page)
            first = entries[slot]
            end = last if entries is self.directory.empty else slot + 1
            step = self._step if first else 0
            while end < last and entries[end] == first + (end - slot) * step:
                end += 1
            count = end - slot
            try:
                empty = (
                    self._empty_in_a_row(number + found, count)
                    if first
                    else self._missing(number + found, count)
                )
            except FormatError:
                break  # damage is for the one who looks the table up
            found += empty
            if empty < count:
                break
        return found

    def _missing(self, number: int, count: int) -> int:
        """How many of ``count`` tables without an entry, all in one page, do not exist indeed."""
        return count

    def _empty_in_a_row(self, number: int, count: int) -> int:
        """How many of ``count`` tables that lie one behind the other hold nothing, from the first on."""
        pinned = self.tables.pinned
        if pinned:
            # A table that is being changed may differ from the file: it is left to be looked up.
            count = next((i for i in range(count) if number + i in pinned), count)
        places, last = self.places(number), self.places(number + count - 1) if count else None
        if places is None or last is None or last[0] - places[0] != (count - 1) * self._length:
            return 0  # one of them is not where its entry says
        at, end = places[0], places[0] + count * self._length
        for length, is_data in self.storage.segments(at, end - at):
            stop = at + length
            while is_data and at < stop:
                window = min(stop - at, _WINDOW)
                if self.storage.read(at, window) != _ZEROS[:window]:
                    return (at - places[0]) // self._length
                at += window
            at = stop
        return count
