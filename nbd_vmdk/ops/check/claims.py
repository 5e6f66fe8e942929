"""Who uses which part of a file: grains that share a place, and places that nobody uses.

Two grains of g sectors overlap exactly if their starts differ by less than g.  So the file is divided into
bins of g sectors, and each bin remembers where in it a grain starts, if one does.  A second start in a bin is
an overlap; and neighbouring bins overlap if the later start is nearer to its bin's begin.  That is exact
wherever grains lie, and costs a byte or two for each grain's room of the file.  Files with more bins than
memory is spent on are looked at in several passes, each over all tables and a part of the file; parts and
pieces of parts in which no grain starts cost nothing, so that a hole of terabytes is no work.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np

from nbd_vmdk.ops.check.scan import Numbers
from nbd_vmdk.units import MIB

#: Memory for the bins of one pass: for grains of 64 KiB that covers 4 TiB of file.
_MAX_BYTES: Final = 64 * MIB
#: Bins looked at together when all are filled.
_PIECE: Final = 1 << 20
#: Conflicting places that are remembered; more are only counted.
_MAX_CONFLICTS: Final = 1 << 16
#: Gaps that are remembered.
_MAX_GAPS: Final = 1 << 16


class Claims:
    """The starts of all grains in one part of a file, in sectors.

    ``unit`` is a grain's length in the file.  Conflicts are remembered as bins; who is in them is for the
    caller to find out by looking at the tables again.
    """

    def __init__(self, unit: int, sectors: int, part: int = 0) -> None:
        self.unit = unit
        dtype = np.dtype(np.uint8 if unit < 1 << 8 else np.uint16 if unit < 1 << 16 else np.uint32)
        self._part = part
        self._step = _MAX_BYTES // dtype.itemsize * unit
        self.first = part * self._step
        self.end = min(self.first + self._step, max(sectors, self.first))
        # Zero is no start, so a start is kept plus one: one bin more at the end is never used.
        self._bins = np.zeros(-(-(self.end - self.first) // unit) + 1, dtype=dtype)
        self._touched: set[int] = set()
        #: The last bin of the part directly before this one, and how far the file was searched for gaps.
        self._before = self._searched = 0
        #: Later parts, in which grains were seen to start.
        self._others: set[int] = set()
        self._phase: set[int] = set()
        self._conflicts: set[int] = set()

    @classmethod
    def passes(cls, unit: int, sectors: int) -> Iterator["Claims"]:
        """The claims of each part of a file of ``sectors`` in which grains start, one after the other.

        Every one must have been given all grains before the next is asked for.
        """
        part = cls(unit, sectors)
        yield part
        while part._others:
            following = cls(unit, sectors, min(part._others))
            following._others = part._others - {following._part}
            following._searched = part._searched
            if following._part == part._part + 1:
                following._before = int(part._bins[-2])
            part = following
            yield part

    def add(self, starts: Numbers) -> None:
        """Enter grains; those outside this part of the file are passed over."""
        if not len(starts):
            return
        low, high = int(starts.min()), int(starts.max())
        if low < self.first or high >= self.end:
            outside = starts[starts >= self.end]
            self._others.update(np.unique(outside // outside.dtype.type(self._step)).tolist())
            starts = starts[(starts >= self.first) & (starts < self.end)]
            if not len(starts):
                return
        if self.first:
            starts = starts - starts.dtype.type(self.first)
        bins = starts // starts.dtype.type(self.unit)
        within = starts - bins * starts.dtype.type(self.unit)
        if len(self._phase) < 2:
            self._phase.update((int(within.min()), int(within.max())))
        low, high = int(bins.min()) // _PIECE, int(bins.max()) // _PIECE
        if low == high:
            self._touched.add(low)
        else:
            self._touched.update(np.unique(bins // bins.dtype.type(_PIECE)).tolist())
        taken = self._bins[bins] != 0
        if taken.any():
            self._note(bins[taken])
        if not (bins[1:] > bins[:-1]).all():
            ordered = np.sort(bins)
            self._note(ordered[1:][ordered[1:] == ordered[:-1]])
        self._bins[bins] = within + 1

    def _note(self, bins: Numbers) -> None:
        for each in np.unique(bins)[:_MAX_CONFLICTS].tolist():
            if len(self._conflicts) < _MAX_CONFLICTS:
                self._conflicts.add(each)

    def conflicts(self) -> list[int]:
        """The bins, counted from the begin of the file, in which grains overlap; called once, at the end."""
        if len(self._phase) > 1:  # else all grains are in step, and can only meet in one bin
            for number in sorted(self._touched):
                at = number * _PIECE
                before = self._bins[at - 1] if at else 0
                piece = self._bins[at : at + _PIECE]
                near = (piece != 0) & np.less(piece, np.concatenate(([before], piece[:-1])))
                self._note(np.flatnonzero(near) + at)
        if 0 < int(self._bins[0]) < self._before:
            self._note(np.zeros(1, dtype=np.int64))
        skipped = self.first // self.unit
        return sorted(each + skipped for each in self._conflicts)

    def is_free(self, start: int, but: int | None = None) -> bool:
        """Whether it is known that a grain at ``start`` would overlap none that was entered, ``but`` one."""
        if not self.first <= start < self.end:
            return False
        at = (start - self.first) // self.unit
        for each in range(max(at - 1, 0), at + 2):
            if mark := int(self._bins[each]):
                other = self.first + each * self.unit + mark - 1
                if other != but and abs(other - start) < self.unit:
                    return False
        return True

    def gaps(self, begins: Numbers, ends: Numbers, reached: int) -> tuple[list[tuple[int, int]], int]:
        """Where room for a grain or more is used by nothing, [begin, end); how far the last thing reaches.

        ``begins`` and ``ends`` are what else lies in the file; ``reached`` is where the search starts, or the
        answer of the part before this one.  Of very many gaps not all are told; where grains overlap, not
        exactly.
        """
        found: list[tuple[int, int]] = []
        for number in [*sorted(self._touched), None]:
            if number is None and self._others:
                break  # what else lies behind the last grain is looked at with the last part
            at = 0 if number is None else number * _PIECE
            piece = self._bins[:0] if number is None else self._bins[at : at + _PIECE]
            used = np.flatnonzero(piece)
            starts = (used + at) * self.unit + piece[used].astype(np.int64) - 1 + self.first
            others = ends > self._searched
            if number is not None:
                high = min((at + _PIECE) * self.unit + self.first, self.end)
                others &= begins < high
                self._searched = high
            firsts = np.concatenate((starts, begins[others]))
            lasts = np.concatenate((starts + self.unit, ends[others]))
            order = np.argsort(firsts, kind="stable")
            reach = np.maximum.accumulate(np.concatenate(([reached], lasts[order])))
            wide = np.flatnonzero(firsts[order] - reach[:-1] >= self.unit)
            if len(found) < _MAX_GAPS:
                found += zip(reach[wide].tolist(), firsts[order][wide].tolist(), strict=True)
            reached = int(reach[-1])
        return found, reached
