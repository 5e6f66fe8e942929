"""Whether what lies somewhere is a grain table, or a grain's bytes that a damaged field or entry leads to.

A directory entry that was damaged may name a place where a table could be.  Whoever mends the "table" there
writes into a grain that is sound.  What tells are the entries: a grain's bytes, read as such, name places
behind the end of the file, or one place many times.  A grain of zeros has no entries; there it must be known
that a grain lies there, from tables that are beyond doubt.
"""

import numpy as np

from nbd_vmdk.ops.check.scan import Numbers, TableSet, merged, touching
from nbd_vmdk.units import SECTOR


def odd(rows: Numbers, size: int) -> Numbers:
    """Entries of tables that name places behind the end of a file of ``size``, or twice the same: a mask."""
    behind: Numbers = (rows >= 2) & (rows.astype(np.int64) * SECTOR >= size)
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    again = np.zeros(rows.shape, bool)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 2)
    twice = np.zeros(rows.shape, bool)
    np.put_along_axis(twice, order, again, axis=1)
    return behind | twice


def mostly_odd(tables: TableSet, numbers: list[int], size: int) -> Numbers:
    """Those of some tables most of whose entries are odd."""
    found = []
    for number in numbers:
        rows = tables.rows(number, 1)
        if 2 * np.count_nonzero(odd(rows, size)) > np.count_nonzero(rows):
            found.append(number)
    return np.array(found, dtype=np.int64)


def part_of_tables(tables: TableSet, tried: int, size: int) -> float:
    """Which part of what was ``tried`` leads to tables; ``tables`` are those that are inside the file.

    Zeros speak neither for a table nor against it.
    """
    rows = tables.rows(0, len(tables.places))
    used = rows.any(axis=1)
    sound = used & ~odd(rows, size).any(axis=1)
    return int(sound.sum()) / max(tried - int((~used).sum()), 1)


def over_agreed(first: TableSet, second: TableSet, grain: int, places: Numbers, length: int) -> Numbers:
    """Which things of ``length`` at ``places`` lie on grains that are beyond doubt: a mask.

    That is where two copies of a table agree, or where one of them is not there, or odd.
    """
    over = np.zeros(len(places), bool)
    if not len(places):
        return over
    begins, ends = merged([(int(place), int(place) + length) for place in places])
    both = TableSet(first.storage, np.maximum(first.places, second.places), first.entries, first.width)
    for at, count in both.windows():
        rows, others = first.rows(at, count), second.rows(at, count)
        one, two = (
            odd(entries, first.storage.size) | (copy.places[at : at + count] == 0)[:, np.newaxis]
            for copy, entries in ((first, rows), (second, others))
        )
        grains = np.concatenate((rows[~one & (two | (rows == others))], others[one & ~two]))
        grains = grains[grains >= 2]
        for sector in grains[touching(begins, ends, grains, grain)].tolist():
            over |= (places < sector + grain) & (places + length > sector)
    return over


def is_over(grains: Numbers, grain: int, place: int, length: int) -> bool:
    """Whether something of ``length`` at ``place`` would lie on one of the grains."""
    return bool(((grains < place + length) & (grains.astype(np.int64) + grain > place)).any())
