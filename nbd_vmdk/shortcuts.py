"""How deep to look: a chain of many links, read at the cost of one.

Links that nobody writes to do not change, so what was once found out about them stays true: for each unit of
64 KiB of the disk, the first link that holds anything in it.  The links above it, all holes there, are passed
over from then on.  It is a place to start from, not an answer: within the unit the search goes on downwards
as it would from the top.

One byte a unit, in pages that live in the shared cache and are made again when they were forgotten.
"""

from collections.abc import Sequence
from typing import Final

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import FormatError
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.link import Link

_UNIT_BITS: Final = 16
_UNIT: Final = 1 << _UNIT_BITS
_PAGE_BITS: Final = 12
_SLOT: Final = (1 << _PAGE_BITS) - 1
_UNKNOWN: Final = 0  # what a new page is full of; a known depth is kept plus one


class Shortcuts:
    """Where to begin the search in ``links``, top first, of which those from ``first`` on never change."""

    def __init__(self, links: Sequence[Link], first: int, cache: Cache) -> None:
        self.first = first
        self._links = links
        self._cache = cache
        self._key = cache.namespace()
        self._size = links[0].size

    def reach(self, offset: int, length: int) -> tuple[int, int]:
        """(link to begin with, length for which that is so) for a range of the disk.

        The number of links says that none of them holds anything.
        """
        unit = offset >> _UNIT_BITS
        last = (offset + length - 1) >> _UNIT_BITS
        if unit == last:
            page = self._cache.young.get(self._key + (unit >> _PAGE_BITS))
            if page is not None and (found := page[unit & _SLOT]):
                return found - 1, length
        depth = self._depth(unit)
        while unit < last and self._depth(unit + 1) == depth:
            unit += 1
        return depth, min(length, ((unit + 1) << _UNIT_BITS) - offset)

    def _depth(self, unit: int) -> int:
        key = self._key + (unit >> _PAGE_BITS)
        page = self._cache.young.get(key) or self._cache.get(key)
        if page is None:
            page = bytearray(_SLOT + 1)
            self._cache.put(key, page)
        found = page[unit & _SLOT]
        if found == _UNKNOWN:
            # Two threads may find out the same at once, and write the same.
            found = self._search(unit << _UNIT_BITS) + 1
            page[unit & _SLOT] = found  # type: ignore[index]  # never the bytes that a cache may also hold
        return found - 1

    def _search(self, start: int) -> int:
        end = min(start + _UNIT, self._size)
        for depth in range(self.first, len(self._links)):
            link = self._links[depth]
            if link.size < end:
                return depth  # beyond its end the disk is zeros, whatever is below
            at = start
            try:
                while at < end:
                    kind, count, _source, _at = link.map(at, end - at)
                    if kind is not Kind.HOLE:
                        return depth
                    at += count
            except FormatError:
                return depth  # damage is for those to meet who read just there
        return len(self._links)
