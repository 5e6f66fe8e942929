"""Where to look: a chain of many links, read at the cost of one.

Links that nobody writes to do not change, so what was once found out about them stays true.  For each unit of
64 KiB of the disk it is kept: the place in a file where all of it lies in one piece, which answers a read at
once; or else the first link that holds anything in it.  The links above that one, all holes there, are passed
over from then on.  The latter is a place to start from, not an answer: within the unit the search goes on
downwards as it would from the top.

One number a unit, in pages that live in the shared cache and are made again when they were forgotten.

The first read in a group of units searches for its own unit alone, so that reads far apart do not pay for
what nobody asks.  The second one searches for the whole group, link by link: whole pieces of grain tables are
then looked through at once, which costs a fourth.
"""

import os
import threading
from array import array
from collections.abc import Sequence
from typing import Final

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import FormatError
from nbd_vmdk.extents.base import Kind, Mapping, Reader, Source
from nbd_vmdk.link import Link
from nbd_vmdk.storage.local import LocalFile

_UNIT_BITS: Final = 16
_UNIT: Final = 1 << _UNIT_BITS
_WITHIN: Final = _UNIT - 1
#: A page stands for 32 MiB of the disk, as a grain table does; larger ones would mostly be empty where reads
#: are far apart.
_PAGE_BITS: Final = 9
_SLOT: Final = (1 << _PAGE_BITS) - 1
#: Units that are searched together once two of them were asked for: few enough that no read waits long, and
#: so many that it pays to ask a link for all of them.
_GROUP: Final = 128
_IN_GROUP: Final = _GROUP - 1
#: What is kept for a unit: 0 if nothing is known, the first link's depth plus one, or the position in a
#: file with the number of its source above these bits.
_PLACE_BITS: Final = 48
_PLACE: Final = (1 << _PLACE_BITS) - 1
_MAX_SOURCES: Final = 0xFFFF
_DATA: Final = Kind.DATA


class Shortcuts:
    """Where to begin the search in ``links``, top first, of which those from ``first`` on never change."""

    def __init__(self, links: Sequence[Link], first: int, cache: Cache) -> None:
        self.first = first
        self._links = links
        self._pages = cache.part()
        self._size = links[0].size
        #: The sources that places are in, each with the depth of its link, and their numbers.
        self._sources: list[Source | None] = [None]  # number 0 is not used
        self._depths = [0]
        #: The sources that are files of this machine, by the same numbers.
        self._files: list[LocalFile | None] = [None]
        self._numbers: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()

    def find(self, offset: int, length: int) -> Mapping | None:
        """What backs a range that is known to lie in one piece in a file; None says nothing."""
        unit = offset >> _UNIT_BITS
        page = self._pages.young.get(unit >> _PAGE_BITS)
        if page is None:
            return None
        found = page[unit & _SLOT]
        within = offset & _WITHIN
        if found <= _PLACE or within + length > _UNIT:
            return None
        return _DATA, length, self._sources[found >> _PLACE_BITS], (found & _PLACE) + within

    def reader(self, otherwise: Reader) -> Reader:
        """A function that reads at once what is known to lie in one piece; see Extent.reader."""
        pages, files, size = self._pages, self._files, self._size
        preadv = os.preadv

        def read(buf: memoryview, offset: int) -> None:
            length = len(buf)
            page = pages.young.get(offset >> _UNIT_BITS + _PAGE_BITS)
            if page is not None:
                found = page[offset >> _UNIT_BITS & _SLOT]
                within = offset & _WITHIN
                file = files[found >> _PLACE_BITS]
                if file is not None and within + length <= _UNIT and offset + length <= size:
                    try:
                        if preadv(file.fd, (buf,), (found & _PLACE) + within) == length:
                            return
                    except OSError:
                        pass
            otherwise(buf, offset)

        return read

    def reach(self, offset: int, length: int) -> tuple[int, int]:
        """(link to begin with, length for which that is so) for a range of the disk.

        The number of links says that none of them holds anything.
        """
        unit = offset >> _UNIT_BITS
        last = (offset + length - 1) >> _UNIT_BITS
        depth = self._depth(unit)
        while unit < last and self._depth(unit + 1) == depth:
            unit += 1
        return depth, min(length, ((unit + 1) << _UNIT_BITS) - offset)

    def _depth(self, unit: int) -> int:
        number = unit >> _PAGE_BITS
        page = self._pages.young.get(number) or self._pages.get(number)
        if page is None:
            page = array("Q", bytes(8 << _PAGE_BITS))
            self._pages.put(number, page)
        assert isinstance(page, array)
        slot = unit & _SLOT
        if not page[slot]:
            # Two threads may find out the same at once, and write the same.
            begin = slot & ~_IN_GROUP
            if any(page[begin : begin + _GROUP]):
                first = unit & ~_IN_GROUP
                group = range(first, min(first + _GROUP, -(-self._size >> _UNIT_BITS)))
                self._search(page, [other for other in group if not page[other & _SLOT]])
            else:
                self._search(page, [unit])
        found = page[slot]
        return found - 1 if found <= _PLACE else self._depths[found >> _PLACE_BITS]

    def _search(self, page: "array[int]", units: list[int]) -> None:
        """Find out what to keep for units, ascending and all in one page."""
        for depth in range(self.first, len(self._links)):
            if not units:
                return
            link = self._links[depth]
            first = units[0]
            there = link.presence(first << _UNIT_BITS, (units[-1] + 1 - first) << _UNIT_BITS, _UNIT)
            below = []
            for unit in units:
                if there[unit - first] and (found := self._look(depth, unit << _UNIT_BITS)):
                    page[unit & _SLOT] = found
                else:
                    below.append(unit)
            units = below
        for unit in units:
            page[unit & _SLOT] = len(self._links) + 1

    def _look(self, depth: int, start: int) -> int:
        """What to keep for the unit at ``start`` by what one link has of it; 0 if it is all hole."""
        link = self._links[depth]
        end = min(start + _UNIT, self._size)
        if link.size < end:
            return depth + 1  # beyond its end the disk is zeros, whatever is below
        at = start
        try:
            while at < end:
                kind, count, source, place = link.map(at, end - at)
                if kind is _DATA and source is not None and count == end - start:
                    return self._place(depth, source, place)
                if kind is not Kind.HOLE:
                    return depth + 1
                at += count
        except FormatError:
            return depth + 1  # damage is for those to meet who read just there
        return 0

    def _place(self, depth: int, source: Source, at: int) -> int:
        """What stands for byte ``at`` of a source; the depth alone where numbers are too small for it."""
        key = depth, id(source)
        number = self._numbers.get(key)
        if number is None:
            with self._lock:
                number = self._numbers.get(key)
                if number is None and len(self._sources) <= _MAX_SOURCES:
                    self._depths.append(depth)
                    self._sources.append(source)
                    self._files.append(source if type(source) is LocalFile else None)
                    number = self._numbers[key] = len(self._sources) - 1
        return depth + 1 if number is None or at > _PLACE else number << _PLACE_BITS | at
