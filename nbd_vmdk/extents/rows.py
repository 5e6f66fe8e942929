"""Grains that lie one behind the other in the file: their entries differ by one step from each to the next.

Where grains are small (COWD's are mostly of 512 bytes) a request takes many, and looking at them one by one
takes longer than reading them.  Entries side by side are the digits of one large number, in the base that
their width says; so is a row from its first entry on, and two numbers are compared in C.  A row whose last
entries do not fit into the width is a number with more digits, and equals none.
"""

import functools
import sys
from array import array
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

#: Entries that are compared together.  What they are compared with is kept for each number of them.
MOST: Final = 128

#: Tells of a table, a slot in it, an entry and a count whether as many entries from the slot on are the row
#: that begins with that entry.  They are inside the table, and MOST at most.
IsRow: TypeAlias = Callable[["array[int] | bytes | bytearray", int, int, int], bool]


@functools.cache
def is_row(width: int, step: int) -> IsRow:
    """A function that knows rows of entries ``width`` bytes wide, each ``step`` larger than the one before.

    All extents have it in common: a split disk has thousands.
    """
    bits = 8 * width
    order: Literal["little", "big"] = sys.byteorder
    from_bytes = int.from_bytes
    known: dict[int, tuple[int, int, int]] = {}

    def learn(count: int) -> tuple[int, int, int]:
        ones = steps = 0
        for number in range(count):
            at = bits * (number if order == "little" else count - 1 - number)
            ones |= 1 << at
            steps |= number * step << at
        known[count] = found = ones, steps, (count - 1) * step
        return found

    def look(table: "array[int] | bytes | bytearray", slot: int, entry: int, count: int) -> bool:
        ones, steps, last = known.get(count) or learn(count)
        if table[slot + count - 1] != entry + last:
            return False  # nearly everything that is no row
        return from_bytes(table[slot : slot + count], order) == entry * ones + steps

    return look
