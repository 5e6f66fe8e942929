"""A grain table and its redundant twin, entry by entry: what each is, the verdict, and what both should be.

The cases and their reasons are in verdicts.py.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from nbd_vmdk.ops.check.entries import Rules, Survey
from nbd_vmdk.ops.check.evidence import Evidence
from nbd_vmdk.ops.check.scan import Numbers
from nbd_vmdk.ops.check.verdicts import NUMBERS, State, Verdict, verdicts
from nbd_vmdk.units import SECTOR

#: States of entries that are right if they stand in the table.
_SURE: Final = (State.HOLE, State.ZEROS, State.STRAY, State.GRAIN)
#: Verdicts that leave both entries as they are.
_LEFT: Final = (Verdict.SURE, Verdict.WIPED, Verdict.ASK, Verdict.CUT, Verdict.LOST, Verdict.LEAVE)


@dataclass(slots=True)
class Pair:
    """One table with its twin, as they are and as they should be."""

    number: int
    table: Numbers
    twin: Numbers | None
    rules: Rules
    found: Survey
    good: Numbers = field(init=False)
    twin_good: Numbers = field(init=False)
    states: Numbers = field(init=False)
    #: As NUMBERS of verdicts.
    verdicts: Numbers = field(init=False)
    inside: int = field(init=False)

    def __post_init__(self) -> None:
        entries = len(self.table)
        self.inside = max(min(entries, self.rules.total - self.number * entries), 0)
        self.good = self.rules.good(self.table)
        self.twin_good = np.zeros(entries, bool) if self.twin is None else self.rules.good(self.twin)
        self.states = self._states(self.table, self.good)
        self.states[self.found.is_shared(self.rules, self.table) & self.good] = State.SHARED

    def _states(self, entries: Numbers, good: Numbers) -> Numbers:
        """What entries are by themselves; a place is taken to be nobody else's."""
        rules = self.rules
        states = np.full(len(entries), State.NOWHERE, np.uint8)
        states[good] = State.GRAIN
        skewed = self.found.is_skewed(rules, entries)
        if not rules.unclean:  # else a difference has a better reason, and writers differ in how they align
            states[good & skewed] = State.SKEWED
        behind = ~good & (entries >= rules.lowest) & (entries.astype(np.int64) + rules.unit > rules.sectors)
        states[behind & ~skewed & (entries <= rules.furthest)] = State.PAST
        states[behind & (entries < rules.sectors)] = State.CUT
        states[entries == 0] = State.HOLE
        if rules.codes > 1:
            states[entries == 1] = State.ZEROS if rules.zeros_declared else State.STRAY
        return states

    def doubts(self) -> Numbers:
        """Entries in whose stead the twin's is taken if it names a place that nobody else has: a mask."""
        grain = np.full(len(self.table), State.GRAIN, np.uint8)
        taken = np.isin(self._look_up(grain), [NUMBERS[Verdict.TWIN], NUMBERS[Verdict.WIPED]])
        doubts: Numbers = self.twin_differs & taken
        return doubts

    @property
    def twin_differs(self) -> Numbers:
        """Entries of the disk which are others in the twin: a mask."""
        differs = np.zeros(len(self.table), bool) if self.twin is None else self.table != self.twin
        differs[self.inside :] = False
        return differs

    @property
    def offered(self) -> Numbers:
        """Places that only the twin names and that would be believed."""
        if self.twin is None:
            return self.table[:0]
        return self.twin[self.doubts() & self.twin_good & (self.twin >= self.rules.codes)]

    def _look_up(self, twins: Numbers) -> Numbers:
        rules = self.rules
        return verdicts(self.states, twins, unclean=rules.unclean, child=rules.subject.child)

    def judge(self, evidence: Evidence) -> None:
        """Come to a verdict on each entry, as far as tables alone tell."""
        if self.twin is None:
            twins = np.full(len(self.table), State.NONE, np.uint8)
        else:
            twins = self._states(self.twin, self.twin_good)
            named = self.doubts() & self.twin_good & (self.twin >= self.rules.codes)
            for at in np.flatnonzero(named).tolist():
                if not evidence.is_free(int(self.twin[at]), int(self.table[at])):
                    twins[at] = State.SHARED
        self.verdicts = self._look_up(twins)
        if self.twin is not None:
            self.verdicts[(self.table == self.twin) & self.good] = NUMBERS[Verdict.KEEP]
            self.verdicts[self.at(Verdict.WIPED) & self._in_wiped_sector(self.twin)] = NUMBERS[Verdict.TWIN]
        self.verdicts[self.inside :] = NUMBERS[Verdict.KEEP]

    def _in_wiped_sector(self, twin: Numbers) -> Numbers:
        """Entries in sectors of the table that are all zeros where the twin's name several grains: a mask."""
        width = min(SECTOR // 4, len(twin))
        wiped = ~self.table.reshape(-1, width).any(axis=1)
        wiped &= (twin >= self.rules.codes).reshape(-1, width).sum(axis=1) > 1
        return np.repeat(wiped, width)

    def at(self, *found: Verdict) -> Numbers:
        """Entries with one of these verdicts: a mask."""
        return np.isin(self.verdicts, [NUMBERS[verdict] for verdict in found])

    @property
    def should(self) -> Numbers:
        """What the entries of both should be; it means nothing where both are left."""
        should = self.table.copy()
        if self.twin is not None:
            take = self.at(Verdict.TWIN)
            should[take] = self.twin[take]
        should[self.inside :] = 0
        return should

    @property
    def left(self) -> Numbers:
        """Entries that stay as they are in both: a mask."""
        return self.at(*_LEFT)

    @property
    def settled(self) -> Numbers:
        """The places of those grains that are sure, or would be if the table was wiped; 0 for all others."""
        agreed = self.good if self.twin is None else self.good & (self.table == self.twin)
        agreed |= self.at(Verdict.KEEP) & np.isin(self.states, _SURE)
        agreed |= self.at(Verdict.TWIN)
        places: Numbers = np.where(agreed, self.should, 0)
        return places if self.twin is None else np.where(self.at(Verdict.WIPED), self.twin, places)

    @property
    def unsure(self) -> list[int]:
        """Entries that depend on what else is in the file."""
        return np.flatnonzero(self.at(Verdict.SURE, Verdict.WIPED)).tolist()

    def settle(self, at: int, twin_is_right: bool) -> None:
        """Settle one of those."""
        verdict = Verdict.LEAVE if self.good[at] else Verdict.ASK
        self.verdicts[at] = NUMBERS[Verdict.TWIN if twin_is_right else verdict]
