"""What a file tells about entries on which a grain table and its twin disagree.

Two questions.  Is a place free, which the twin names: then nobody else has it, neither by a table's entry nor
by another twin's that is to be believed as well.  And may a grain be lost: then it lies somewhere in the file
and no entry names it.  So if all room of a grain's length is accounted for, or holds zeros where a hole reads
as zeros, no grain was lost, and an entry that can't be right never named one.
"""

from collections.abc import Callable, Iterator
from typing import Final

from nbd_vmdk.ops.check.claims import Claims
from nbd_vmdk.ops.check.entries import Rules, Survey
from nbd_vmdk.ops.check.scan import Numbers, TableSet
from nbd_vmdk.units import MIB, SECTOR

#: Room that nothing names is read to see if it holds zeros, but not more of it than this.
_MOST_READ: Final = 64 * MIB

#: The entries of a table that is known by now, those in doubt being 0.
Settled = Callable[[int, Numbers], Numbers]


class Evidence:
    """The grains of one uncompressed extent, as witnesses."""

    def __init__(self, rules: Rules, tables: TableSet, found: Survey) -> None:
        self._rules = rules
        self._tables = tables
        self._found = found
        self._conflicts = set(found.conflicts)
        #: Grains that only twins name, and places at which these overlap each other.
        self._offered = Claims(rules.unit, rules.sectors)
        self._contested: set[int] | None = None
        self._room: tuple[bool, bool] | None = None

    def offer(self, places: Numbers) -> None:
        """Enter places that twins name and that would be believed; all before the first question."""
        self._offered.add(places)

    def is_free(self, place: int, own: int) -> bool:
        """Whether no other grain has ``place``; ``own`` is what the grain's own table says of it."""
        if self._contested is None:
            self._contested = set(self._offered.conflicts())
        at = place // self._rules.unit
        if at in self._contested or at + 1 in self._contested:
            return False
        # Of several grains in one bin only one is remembered.
        but = None if own // self._rules.unit in self._conflicts else own
        return self._found.is_free(self._rules, place, but)

    def no_grain_lost(self, settled: Settled, *, reads_zeros: bool) -> bool:
        """Whether no grain can be lost whose loss would be seen, if an entry is made a code.

        ``reads_zeros``: the code reads as zeros, so that a lost grain of zeros is none.  Over a parent a hole
        and zeros differ, and where both are in use nothing tells which of them it was.
        """
        if self._rules.subject.child and self._rules.zeros_declared:
            return False
        return self.all_explained(settled, or_zeros=reads_zeros)

    def all_explained(self, settled: Settled, *, or_zeros: bool) -> bool:
        """Whether all room for grains is named by an entry; ``or_zeros``: or holds zeros."""
        if self._room is None:
            self._room = self._unexplained(settled)
        some, data = self._room
        return not (data if or_zeros else some)

    def _unexplained(self, settled: Settled) -> tuple[bool, bool]:
        """Whether there is room for a grain that nothing names, and whether some of it holds data."""
        rules, tables = self._rules, self._tables
        reached = rules.lowest
        gaps: list[tuple[int, int]] = []
        for claims in Claims.passes(rules.unit, rules.sectors):
            for first, count in tables.windows():
                rows = tables.rows(first, count)
                for number in range(first, first + count):
                    if number in self._found.problems:
                        rows[number - first] = settled(number, rows[number - first])
                rows.reshape(-1)[max(rules.total - first * tables.entries, 0) :] = 0
                used = rows[rows >= rules.codes]
                if len(used):
                    claims.add(used if rules.all_good(used) else used[rules.good(used)])
            if claims.conflicts():
                return True, True  # where grains overlap it is not known whose place is missing
            found, reached = claims.gaps(rules.begins, rules.ends, reached)
            gaps += found
        if rules.sectors - reached >= rules.unit:
            gaps.append((reached, rules.sectors))
        return bool(gaps), any(self._pieces(gaps))

    def _pieces(self, gaps: list[tuple[int, int]]) -> Iterator[bool]:
        """Look at the bytes of gaps, piece by piece: whether there are any that are not zeros."""
        storage, left = self._rules.subject.storage, _MOST_READ
        for begin, end in gaps:
            at = begin * SECTOR
            for length, is_data in storage.segments(at, (end - begin) * SECTOR):
                stop = at + length
                while is_data and at < stop:
                    piece = storage.read(at, min(stop - at, MIB))
                    left -= len(piece)
                    yield left < 0 or any(piece)
                    at += len(piece)
                at = stop
