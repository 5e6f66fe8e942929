"""Whether two grains of an extent lie in one place of its file, told from the entries of its tables.

The file is cut into slots of a grain's size.  A mark for each slot says that a grain begins in it, and how
far behind the slot's beginning.  Two grains that begin in one slot overlap, and so do two in neighbouring
slots if the second begins less far into its own.  Most writers put grains at multiples of their size, so the
second case is looked at only if one was met that is not.

It takes 30 ns for a grain, and a byte for each slot of the file, as long as grains are aligned and have
64 KiB or less.  Nothing is told of files with more than :data:`MOST_SLOTS`: `nbd-vmdk check` is for those.
"""

import sys
from array import array
from typing import Final

#: As many as a file of 2 TiB has, which is as far as entries reach, with grains of 32 KiB.
MOST_SLOTS: Final = 1 << 26
#: The largest grain, in sectors, of which a distance and "none" are told apart in a byte.
_FITS_BYTE: Final = 128


class Slots:
    """The grains of one extent, entered table by table.

    ``sectors`` is the length of the file and ``grain`` that of a grain, a power of two; a table has
    ``entries``, of which those below ``codes`` are codes.
    """

    def __init__(self, sectors: int, grain: int, entries: int, codes: int) -> None:
        self._grain = grain
        self._codes = codes
        self._shift = grain.bit_length() - 1
        count = (sectors >> self._shift) + 1
        self._known = count <= MOST_SLOTS
        if not self._known:
            count = 0
        #: How far into each slot a grain begins, and one; 0 where none does.
        self._marks = bytearray(count) if grain <= _FITS_BYTE else array("I", bytes(4 * count))
        # All entries of a table at once: what is left of them is how far into their slots they begin.
        self._distances = int.from_bytes(array("I", [grain - 1] * entries).tobytes(), sys.byteorder)
        self._entered = 0
        self._aligned = True
        #: Of the grains that begin in the first slot, where codes would leave their marks.
        self._first: list[int] = []

    def add(self, table: "array[int]", lowest: int) -> None:
        """Enter the grains of a table, all of them inside the file.

        ``lowest`` is the lowest entry that is not 0.
        """
        if not self._known:
            return
        marks, shift = self._marks, self._shift
        words = int.from_bytes(table.tobytes(), sys.byteorder)
        if lowest >= max(self._grain, self._codes) and not words & self._distances:
            for entry in table:
                marks[entry >> shift] = 1
            self._entered += len(table) - table.count(0)
            return
        self._aligned = False
        for entry in table:
            if entry >= self._codes:
                if entry < self._grain:
                    self._first.append(entry)
                else:
                    marks[entry >> shift] = entry % self._grain + 1
                    self._entered += 1

    def shared(self) -> bool:
        """Whether two of the grains overlap; to be asked when all are entered."""
        if not self._known:
            return False
        marks = self._marks
        marks[0] = 0
        if len(marks) - marks.count(0) < self._entered or len(self._first) > 1:
            return True
        if self._aligned:
            return False
        marks[0] = self._first[0] + 1 if self._first else 0
        before = 0
        for mark in marks:
            if 0 < mark < before:
                return True
            before = mark
        return False

    def enter_until_shared(self, table: "array[int]") -> int | None:
        """Enter the grains of a table up to one that overlaps another; its index in the table, or None.

        Slower, and not to be mixed with :meth:`add`.
        """
        marks = self._marks
        last = len(marks) - 1
        for index, entry in enumerate(table):
            if entry < self._codes or last < 0:
                continue
            slot, within = divmod(entry, self._grain)
            mark = within + 1
            if (
                marks[slot]
                or (slot and marks[slot - 1] > mark)
                or (slot < last and 0 < marks[slot + 1] < mark)
            ):
                return index
            marks[slot] = mark
        return None
