"""A grain table and its redundant twin: which entries are right, and what both should be.

Writers change the table first and the twin second, so after a crash either may be the newer one, and both
are sound.  After damage usually one is sound.  So entries are weighed one by one:

*   a good entry beats a bad one;
*   of two good ones that differ, the table's is taken, as the newer one; but the twin's, if that names a
    grain that nobody else has while the table says "hole", in a file that was closed cleanly (losing a grain
    can't be mended later, a grain too many does no harm), or if the table's is odd: it names a place that
    another grain has as well, or, in a file that was closed cleanly, one that is not aligned as nearly all
    others are, or says "zeros" in a file that has no such entries;
*   where both are bad nothing is changed, unless the user asks for a hole.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from nbd_vmdk.ops.check.context import NOT_INVENTED
from nbd_vmdk.ops.check.entries import Rules, Survey
from nbd_vmdk.ops.check.findings import Change, Copy, Repair, Resize, Stage
from nbd_vmdk.ops.check.scan import Numbers, TableSet
from nbd_vmdk.units import SECTOR

#: A difference longer than this is told to the repair as "copy it from the twin" rather than by its bytes.
_COPY_FROM: Final = 64


@dataclass(slots=True)
class Pair:
    """One table with its twin, as they are and as they should be."""

    number: int
    table: Numbers
    twin: Numbers | None
    rules: Rules
    good: Numbers = field(init=False)
    twin_good: Numbers = field(init=False)
    should: Numbers = field(init=False)
    #: Entries that neither copy tells.
    lost: Numbers = field(init=False)
    inside: int = field(init=False)

    def __post_init__(self) -> None:
        entries = len(self.table)
        self.inside = max(min(entries, self.rules.total - self.number * entries), 0)
        self.good = self.rules.good(self.table)
        self.twin_good = np.zeros(entries, bool) if self.twin is None else self.rules.good(self.twin)

    def resolve(self, survey: Survey) -> None:
        """Work out what the entries should be."""
        rules = self.rules
        self.should = self.table.copy()
        self.lost = ~self.good
        if self.twin is not None:
            doubtful = ~self.good | survey.is_odd(rules, self.table)
            if not rules.unclean:  # else the grain was given up just before the crash
                doubtful |= self.table == 0
            if not rules.zeros_declared:
                doubtful |= self.table == 1
            better = doubtful & self.twin_good & (self.twin != self.table)
            named = np.flatnonzero(better & (self.twin >= rules.codes))
            better[[at for at in named.tolist() if not survey.is_free(rules, int(self.twin[at]))]] = False
            # A hole is as good as zeros; only a grain is better.
            better &= (self.table != 0) | (self.twin >= rules.codes)
            self.should[better] = self.twin[better]
            self.lost &= ~better
        self.should[self.inside :] = 0
        self.lost[self.inside :] = False


#: Slug, what is wrong, and its effect.
Reason = tuple[str, str, str]


@dataclass(slots=True)
class Outcome:
    """Grains whose entries are mended from the twin, and those of compressed extents that are lost."""

    mended: set[int] = field(default_factory=set)
    lost: dict[int, Reason] = field(default_factory=dict)


def report_tables(rules: Rules, tables: TableSet, twins: TableSet | None, found: Survey) -> Outcome:
    """Report what is wrong in the tables that the survey found wanting.

    Where grains are compressed, those whose entries are lost are not reported but returned: the records that
    the entries should name may tell more.
    """
    outcome = Outcome()
    for number in sorted(found.problems):
        table = tables.rows(number, 1)[0]
        has_twin = twins is not None and bool(twins.places[number])
        twin = twins.rows(number, 1)[0] if twins is not None and has_twin else None
        pair = Pair(number, table, twin, rules)
        pair.resolve(found)
        first = number * tables.entries
        outcome.mended.update((np.flatnonzero(pair.should != table) + first).tolist())
        repair = _repair(pair, tables, twins)
        _report_pair(pair, repair)
        for at in np.flatnonzero(~pair.good[: pair.inside]).tolist():
            reason = _reason(rules, int(table[at]), first + at)
            if rules.packed and pair.lost[at]:
                outcome.lost[first + at] = reason
            else:
                _report_entry(pair, at, reason, repair, tables, twins)
    return outcome


def _repair(pair: Pair, tables: TableSet, twins: TableSet | None) -> Repair | None:
    """What makes both copies what they should be; an entry that is lost stays as it is in each."""
    changes: list[Change] = []
    there = int(tables.places[pair.number])
    other = int(twins.places[pair.number]) if pair.twin is not None and twins is not None else 0
    for place, now, elsewhere, theirs in (
        (there, pair.table, other, pair.twin),
        (other, pair.twin, there, pair.table),
    ):
        if not place or now is None:
            continue
        should = np.where(pair.lost, now, pair.should)
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
    spoilt = np.flatnonzero((pair.good & ~pair.twin_good)[:inside])
    differ = np.flatnonzero((pair.good & pair.twin_good & (pair.table != pair.twin))[:inside])
    for slug, places, what, effect in (
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
        if len(places):
            subject.warning(
                slug,
                f"{len(places)} {what}",
                effect,
                repair or NOT_INVENTED,
                table=pair.number,
                entry=int(places[0]),
                guest=pair.rules.guest(first + int(places[0])),
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
    if not pair.lost[at]:
        assert repair is not None
        mend = repair
    elif slug == "grain-cut-off":
        end = value + rules.unit
        hidden = value + rules.shown(index) <= rules.sectors
        mend = Repair(
            f"lengthen the file to {end * SECTOR} bytes",
            (Resize(subject.file, end * SECTOR),),
            None if hidden else "the guest's bytes that were cut off become zeros",
        )
        tell = subject.warning if hidden else subject.error
    else:
        changes = tuple(
            subject.write(int(copy.places[pair.number]) + at * copy.width, bytes(copy.width), Stage.TABLES)
            for copy in (tables, twins)
            if copy is not None and copy.places[pair.number]
        )
        mend = Repair(
            "make the grain a hole", changes, f"what it held is given up: it will read as {subject.hole}"
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
