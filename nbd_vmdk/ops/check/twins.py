"""Grain tables and their redundant twins: what is wrong in them, and what mends it.

What becomes of each pair of entries pairs.py says; where it depends on what else is in the file the witnesses
are asked (evidence.py, for compressed extents the records).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from nbd_vmdk.ops.check.context import NOT_INVENTED
from nbd_vmdk.ops.check.entries import Rules, Survey
from nbd_vmdk.ops.check.evidence import Evidence
from nbd_vmdk.ops.check.findings import Change, Copy, Repair, Resize, Stage
from nbd_vmdk.ops.check.pairs import Pair
from nbd_vmdk.ops.check.scan import Numbers, TableSet
from nbd_vmdk.ops.check.verdicts import NUMBERS, State, Verdict
from nbd_vmdk.units import SECTOR

#: A difference longer than this is told to the repair as "copy it from the twin" rather than by its bytes.
_COPY_FROM: Final = 64
_UNCERTAIN: Final = "which of the two is right is not known"

#: Whether it is known that a grain of a compressed extent has no record.
IsHole = Callable[[int], bool]


#: Slug, what is wrong, and its effect.
Reason = tuple[str, str, str]


@dataclass(slots=True)
class Outcome:
    """Grains whose entries are mended from the twin, and those of compressed extents that are lost."""

    mended: set[int] = field(default_factory=set)
    lost: dict[int, Reason] = field(default_factory=dict)


class Twins:
    """All tables of an extent that the survey found wanting, with their twins if there are any.

    For an extent with compressed grains ``is_hole`` tells whether a grain has no record.
    """

    def __init__(
        self,
        rules: Rules,
        tables: TableSet,
        twins: TableSet | None,
        found: Survey,
        is_hole: IsHole | None = None,
    ) -> None:
        self._rules = rules
        self._tables = tables
        self._twins = twins
        self._found = found
        self._is_hole = is_hole
        self._evidence = Evidence(rules, tables, found)
        for number in found.problems if twins is not None else ():
            self._evidence.offer(self._pair(number).offered)

    def _pair(self, number: int, table: Numbers | None = None) -> Pair:
        there = self._twins is not None and bool(self._twins.places[number])
        twin = self._twins.rows(number, 1)[0] if self._twins is not None and there else None
        if table is None:
            table = self._tables.rows(number, 1)[0]
        return Pair(number, table, twin, self._rules, self._found)

    def _settled(self, number: int, table: Numbers) -> Numbers:
        pair = self._pair(number, table)
        pair.judge(self._evidence)
        return pair.settled

    def no_grain_lost(self, value: int = 0) -> bool:
        """Whether nothing in the file speaks for a grain that no entry names, if one becomes ``value``."""
        reads_zeros = bool(value) or not self._rules.subject.child
        return self._evidence.no_grain_lost(self._settled, reads_zeros=reads_zeros)

    def _is_twin_right(self, pair: Pair, at: int, grain: int) -> bool:
        """Whether the file bears the twin out: with no grain, or with one that the table does not know."""
        value = 0 if pair.twin is None else int(pair.twin[at])
        if self._is_hole is not None:
            return self._is_hole(grain) is (value < self._rules.codes)
        if value < self._rules.codes:
            return self.no_grain_lost(value)
        return self._evidence.all_explained(self._settled, or_zeros=not self._rules.subject.child)

    def report(self) -> Outcome:
        """Report what is wrong.

        Where grains are compressed, those whose entries are lost are not reported but returned: the records
        that the entries should name may tell more.
        """
        rules, tables = self._rules, self._tables
        outcome = Outcome()
        for number in sorted(self._found.problems):
            first = number * tables.entries
            pair = self._pair(number)
            pair.judge(self._evidence)
            for at in pair.unsure:
                pair.settle(at, self._is_twin_right(pair, at, first + at))
            outcome.mended.update((np.flatnonzero((pair.should != pair.table) & ~pair.left) + first).tolist())
            repair = _repair(pair, tables, self._twins)
            _report_pair(pair, repair)
            for at in np.flatnonzero(pair.left & (pair.table == 0)).tolist():
                _report_wiped(pair, at, tables)
            for at in np.flatnonzero(~pair.good[: pair.inside]).tolist():
                reason = _reason(rules, int(pair.table[at]), first + at)
                if rules.packed and pair.left[at]:
                    outcome.lost[first + at] = reason
                else:
                    _report_entry(pair, at, reason, repair, tables, self._twins)
        return outcome


def _repair(pair: Pair, tables: TableSet, twins: TableSet | None) -> Repair | None:
    """What makes both copies what they should be; what is left stays as it is in each."""
    changes: list[Change] = []
    there = int(tables.places[pair.number])
    other = int(twins.places[pair.number]) if pair.twin is not None and twins is not None else 0
    for place, now, elsewhere, theirs in (
        (there, pair.table, other, pair.twin),
        (other, pair.twin, there, pair.table),
    ):
        if not place or now is None:
            continue
        should = np.where(pair.left, now, pair.should)
        wrong = np.flatnonzero(should != now)
        if not len(wrong):
            continue
        first, last = int(wrong[0]), int(wrong[-1]) + 1
        begin, length = first * tables.width, (last - first) * tables.width
        if (
            length > _COPY_FROM
            and theirs is not None
            and np.array_equal(should[first:last], theirs[first:last])
        ):
            copied = Copy(pair.rules.subject.file, Stage.TABLES, place + begin, elsewhere + begin, length)
            changes.append(copied)
        else:
            data = should[first:last].tobytes()
            changes.append(pair.rules.subject.write(place + begin, data, Stage.TABLES))
    return (
        Repair("bring the table and its twin to what the sound one says", tuple(changes)) if changes else None
    )


def _report_pair(pair: Pair, repair: Repair | None) -> None:
    """What is wrong with the table as a whole."""
    subject, inside = pair.rules.subject, pair.inside
    first = pair.number * len(pair.table)
    surplus = np.flatnonzero(pair.table[inside:] if pair.twin is None else (pair.table | pair.twin)[inside:])
    if len(surplus):
        assert repair is not None, "what lies behind the capacity can always be cleared"
        subject.warning(
            "entry-beyond-capacity",
            f"{len(surplus)} table entries behind the end of the disk are in use",
            "none: the guest can't reach them",
            Repair("set them to 0", repair.changes) if repair else NOT_INVENTED,
            table=pair.number,
            entry=inside + int(surplus[0]),
        )
    if pair.twin is None:
        return
    spoilt = pair.good & ~pair.twin_good
    differ = pair.good & pair.twin_good & (pair.table != pair.twin)
    for slug, mask, what, effect in (
        (
            "redundant-entry",
            spoilt,
            "entries of the redundant table can't be right",
            "none as long as the table itself is sound",
        ),
        (
            "tables-differ",
            differ,
            "entries differ between the table and its redundant twin",
            "readers may disagree on these grains, as after a crash while they were written",
        ),
    ):
        left = pair.left & (pair.table != 0)  # the others are told one by one
        for chosen, mend in ((mask & ~pair.left, repair or NOT_INVENTED), (mask & left, _UNCERTAIN)):
            places = np.flatnonzero(chosen[:inside])
            if len(places):
                subject.warning(
                    slug,
                    f"{len(places)} {what}",
                    effect,
                    mend,
                    table=pair.number,
                    entry=int(places[0]),
                    guest=pair.rules.guest(first + int(places[0])),
                )


def _report_wiped(pair: Pair, at: int, tables: TableSet) -> None:
    """One entry of the table that says that there is no grain, and may have been wiped."""
    rules, subject = pair.rules, pair.rules.subject
    assert pair.twin is not None
    twin = int(pair.twin[at])
    mend: Repair | str = "the grain is cut off: get the file again"
    says, effect = f"names sector {twin}, of which the end of the file left a part", "data may be lost"
    if pair.twin_good[at]:
        says = "says that it is zeros" if twin < rules.codes else f"names sector {twin}"
        effect = f"what reads as {subject.hole} may have been something else"
        place = int(tables.places[pair.number]) + at * tables.width
        mend = Repair(
            "believe the twin",
            (subject.write(place, twin.to_bytes(tables.width, "little"), Stage.TABLES),),
            f"what reads as {subject.hole} now will be {'zeros' if twin < rules.codes else 'that grain'}",
        )
    subject.error(
        "tables-differ",
        f"the entry says that there is no grain, and its twin {says}",
        effect,
        mend,
        table=pair.number,
        entry=at,
        guest=rules.guest(pair.number * len(pair.table) + at),
    )


def _report_entry(
    pair: Pair, at: int, reason: Reason, repair: Repair | None, tables: TableSet, twins: TableSet | None
) -> None:
    """One entry of the table that can't be right."""
    rules, subject = pair.rules, pair.rules.subject
    value = int(pair.table[at])
    index = pair.number * len(pair.table) + at
    slug, what, effect = reason
    tell = subject.error
    mend: Repair | str
    entry_at = int(tables.places[pair.number]) + at * tables.width
    verdict = pair.verdicts[at]
    if verdict == NUMBERS[Verdict.TWIN]:
        assert repair is not None
        mend = repair
    elif verdict == NUMBERS[Verdict.CUT]:
        of_twin = pair.states[at] != State.CUT
        assert pair.twin is not None or not of_twin
        place = int(pair.twin[at]) if of_twin and pair.twin is not None else value
        end = (place + rules.unit) * SECTOR
        changes: list[Change] = [Resize(subject.file, end)]
        if of_twin:
            data = place.to_bytes(tables.width, "little")
            changes.append(subject.write(entry_at, data, Stage.TABLES))
        hidden = place + rules.shown(index) <= rules.sectors and not of_twin
        mend = Repair(
            f"lengthen the file to {end} bytes" + (", and take the twin's entry" if of_twin else ""),
            tuple(changes),
            None if hidden else "the guest's bytes that were cut off become zeros",
        )
        tell = subject.warning if hidden else subject.error
    elif verdict == NUMBERS[Verdict.ASK]:
        assert pair.twin is not None
        code = int(pair.twin[at])
        data = code.to_bytes(tables.width, "little")
        what += f"; its twin says that {'it is zeros' if code else 'there is no grain'}"
        mend = Repair(
            "believe the twin",
            (subject.write(entry_at, data, Stage.TABLES),),
            "if there was a grain, what it held is given up: "
            f"it will read as {'zeros' if code else subject.hole}",
        )
    else:
        mend = Repair(
            "make the grain a hole",
            tuple(
                subject.write(
                    int(copy.places[pair.number]) + at * copy.width, bytes(copy.width), Stage.TABLES
                )
                for copy in (tables, twins)
                if copy is not None and copy.places[pair.number]
            ),
            f"what it held is given up: it will read as {subject.hole}",
        )
    tell(
        slug,
        what,
        effect,
        mend,
        table=pair.number,
        entry=at,
        guest=rules.guest(index),
        at=value * SECTOR,
    )


def _reason(rules: Rules, value: int, index: int) -> Reason:
    """Slug, what is wrong and its effect, for an entry that can't be right."""
    size = rules.shown(index) * SECTOR
    lost = f"{size} bytes of the disk can't be read"
    if value >= rules.sectors:
        what = f"the entry is sector {value}, behind the end of the file (sector {rules.sectors})"
        return "grain-past-end", what, f"{lost}, and writing elsewhere may give the place to another grain"
    if value < rules.lowest:
        what = (
            f"the entry is sector {value}, where the extent's own tables are (grains begin at {rules.lowest})"
        )
        return "grain-entry", what, lost
    if value + rules.unit > rules.sectors:
        cut = (value + rules.unit) * SECTOR - rules.subject.storage.size
        what = f"the grain at sector {value} is cut off: {cut} bytes of it are behind the end of the file"
        hidden = value + rules.shown(index) <= rules.sectors
        return "grain-cut-off", what, "none: the guest does not see what was cut off" if hidden else lost
    what = f"the entry is sector {value}, where a table or the directory lies"
    if rules.packed:
        return "grain-over-tables", what, lost
    return "grain-over-tables", what, "the guest sees table entries as data, and a write destroys them"
