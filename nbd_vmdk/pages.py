"""Grain directories and tables in memory: loaded on first touch, pinned while dirty, written at commit.

A `Pages` is an array of fixed-width integers that lies on disk in equal pages: the grain tables of an
extent are one (a page is a table), its grain directory is another.  Clean pages live in the shared cache and
may vanish at any time; a page that somebody changes is pinned until a commit has made it durable.  A pinned
page that was in the cache stays there: it is the same array, so whoever finds it sees the changes.

Locking: `lock(page)` serialises loading a page with changing it.  A load holds it from reading the disk to
putting the page into the cache, so a stale copy can never overtake a change.  Whoever changes a page holds
it too.  Looking up a page that is pinned or cached takes no lock.
"""

import functools
import sys
import threading
from array import array
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

from nbd_vmdk.cache import Cache
from nbd_vmdk.storage.base import Storage

_BIG_ENDIAN = sys.byteorder == "big"
_STRIPES = 16
_TYPECODES = {4: "I", 8: "Q"}
#: What a pinned page costs beside its bytes, roughly: dict and set entries, the array's head.
_OVERHEAD = 250


class DirtyPage(NamedTuple):
    """A page as it was when a commit began, and where its copies go."""

    page: int
    data: bytes
    places: tuple[int, ...]


class Changes(Protocol):
    """What a commit asks of tables: what has changed, as pages to be written, and how it went."""

    @property
    def storage(self) -> Storage:
        """The file they are in."""

    @property
    def dirty(self) -> Collection[int] | bool:
        """Not empty, or True, where there are changes that no commit has taken yet."""

    def take_dirty(self, taken: list[DirtyPage]) -> None:
        """Put copies of all that has changed into ``taken``."""

    def settle(self, taken: list[DirtyPage], *, durable: bool) -> None:
        """End the commit that took them: they are durable, or changed still."""


@functools.cache
def _zeros(typecode: str, count: int) -> tuple["array[int]", bytes]:
    """A page of zeros and its bytes, which all `Pages` of a shape share: a split disk has thousands."""
    zeros = array(typecode, [0]) * count
    return zeros, zeros.tobytes()


class Pages:
    """Integers on disk, in pages.

    ``locate(page)`` gives the byte positions of a page's copies, the first one being read, or None where
    the page does not exist.  ``width`` is the size of an integer in bytes, ``per_page`` how many a page
    holds, ``total`` how many there are in all (the last page may be short).
    """

    def __init__(
        self,
        storage: Storage,
        cache: Cache,
        *,
        width: int,
        per_page: int,
        total: int,
        locate: Callable[[int], tuple[int, ...] | None],
    ) -> None:
        self.storage = storage
        self.cache = cache
        #: The pages that can be read again, or are pinned as well.
        self.clean = cache.part()
        self.per_page = per_page
        self._total = total
        self.width = width
        self._typecode = _TYPECODES[width]
        self._locate = locate
        #: Memory that a pinned page takes and the shared cache can't take back.
        self.pinned_cost = per_page * width + _OVERHEAD
        #: Pages that differ from the disk, or are being written there.
        self.pinned: dict[int, array[int]] = {}
        #: Pinned pages with changes that no commit has taken yet; who makes one holds the page's lock.
        self.dirty: set[int] = set()
        # A split disk has thousands of extents, and their directories mostly have one page.
        self._stripes = max(min(_STRIPES, -(-total // per_page)), 1)
        self._locks = [threading.Lock() for _ in range(self._stripes)]
        #: Stands for every page of zeros, so that an empty disk costs no memory.
        self.empty, self._zeros = _zeros(self._typecode, per_page)

    def lock(self, page: int) -> threading.Lock:
        """The lock to hold while a page is changed."""
        return self._locks[page % self._stripes]

    def get(self, page: int) -> "array[int] | None":
        """The page for looking up, or None if it does not exist."""
        found = self.pinned.get(page) or self.clean.young.get(page) or self.clean.get(page)
        if found is None:
            with self.lock(page):
                return self.load(page)
        assert isinstance(found, array)
        return found

    def load(self, page: int) -> "array[int] | None":
        """Find or read a page for looking at it; the caller holds its lock."""
        found = self.pinned.get(page) or self.clean.young.get(page) or self.clean.get(page)
        if found is not None:
            assert isinstance(found, array)
            return found
        places = self._locate(page)
        if places is None:
            return None
        count = min(self.per_page, self._total - page * self.per_page)
        raw = self.storage.read(places[0], count * self.width)
        if raw == self._zeros:
            self.clean.put(page, self.empty, shared=True)
            return self.empty
        table = array(self._typecode, raw)
        if _BIG_ENDIAN:
            table.byteswap()
        self.clean.put(page, table)
        return table

    def pin(self, page: int) -> "array[int]":
        """The page, which exists, for changing it; the caller holds its lock and adds it to ``dirty``."""
        table = self.pinned.get(page)
        if table is None:
            table = self.load(page)
            assert table is not None, "only a page that exists is pinned"
            if table is self.empty:
                table = self.pinned[page] = array(self._typecode, table)
                self.clean.drop(page)
            else:
                # If it is in the cache it stays there, and there is no other one that could be out of date.
                self.pinned[page] = table
        return table

    def create(self, page: int) -> "array[int]":
        """Pin a page of zeros that has just been given a place; the caller holds its lock."""
        table = array(self._typecode, self.empty)
        self.pinned[page] = table
        self.dirty.add(page)
        return table

    def encode(self, table: "array[int]") -> bytes:
        """A page as it stands on disk."""
        if _BIG_ENDIAN:
            table = array(self._typecode, table)
            table.byteswap()
        return table.tobytes()

    def take_dirty(self, taken: list[DirtyPage]) -> None:
        """Copy all changed pages to ``taken`` for a commit; later changes make them dirty again.

        If that raises (a directory can't be read any more), the pages not in ``taken`` are dirty still.
        """
        for page in sorted(self.dirty.copy()):
            with self.lock(page):
                places = self._locate(page)
                assert places is not None, "a dirty page has a place"
                taken.append(DirtyPage(page, self.encode(self.pinned[page]), places))
                self.dirty.discard(page)

    def settle(self, taken: list[DirtyPage], *, durable: bool) -> None:
        """End a commit: pages that are now durable are unpinned, otherwise they are dirty again."""
        for dirty in taken:
            with self.lock(dirty.page):
                if not durable:
                    self.dirty.add(dirty.page)
                elif dirty.page not in self.dirty:
                    table = self.pinned[dirty.page]
                    if self.clean.young.get(dirty.page) is not table:
                        self.clean.put(dirty.page, table)
                    del self.pinned[dirty.page]
