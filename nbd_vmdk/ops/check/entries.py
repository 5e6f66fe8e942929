"""The entries of grain tables that are plain sector numbers: hosted sparse and COWD extents.

All tables are looked at once, in windows, for what is wrong with any of their entries; tables with something
wrong are then looked at one by one (twins.py), and places that two grains claim are traced back to them.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from nbd_vmdk.ondisk.hosted import MAX_GRAIN_AT
from nbd_vmdk.ops.check.claims import Claims
from nbd_vmdk.ops.check.context import Space, Subject
from nbd_vmdk.ops.check.findings import Change, Copy, Repair, Resize, Stage
from nbd_vmdk.ops.check.scan import Numbers, TableSet, touching
from nbd_vmdk.units import SECTOR, align_up

#: Grains in conflict that are listed; more are counted.
_MAX_OWNERS: Final = 1 << 16


@dataclass(slots=True, kw_only=True)
class Rules:
    """What an entry of one extent may be.

    grain         guest sectors of a grain
    unit          sectors that a grain takes in the file at least: the grain, or 1 where it is compressed
    total         grains that the capacity needs; entries behind them mean nothing
    visible       guest sectors that are shown
    lowest        first sector in which a grain can be
    codes         entries below this are codes: 0 a hole, 1 zeros
    begins, ends  sectors of all that is no grain, as ranges
    packed        grains are compressed: their length in the file is not known
    zeros_declared   the header says that value 1 means zeros
    unclean       the file was not closed cleanly, so that a table may be newer than its twin
    overhead      first sector in which a grain can be, as the header says
    furthest      a grain behind that is none that was cut off: twice what the disk needs would lie before it
    """

    subject: Subject
    grain: int
    unit: int
    total: int
    visible: int
    lowest: int
    codes: int
    begins: Numbers
    ends: Numbers
    packed: bool = False
    zeros_declared: bool = True
    unclean: bool = False
    overhead: int = 0
    sectors: int = field(init=False)
    furthest: int = field(init=False)

    def __post_init__(self) -> None:
        self.sectors = self.subject.storage.size // SECTOR
        tables = int(self.ends[-1]) if len(self.ends) else 0
        self.furthest = 2 * (tables + self.total * (self.grain + 1))

    def good(self, entries: Numbers) -> Numbers:
        """Which entries are codes, or name a place where a whole grain can be: a mask."""
        ok = (entries >= self.lowest) & (entries <= max(self.sectors - self.unit, 0))
        if len(self.ends) and ok.any() and int(entries[ok].min()) < int(self.ends[-1]):
            found = np.flatnonzero(ok)
            ok[found[touching(self.begins, self.ends, entries[found], self.unit)]] = False
        return ok | (entries < self.codes)

    def all_good(self, used: Numbers) -> bool:
        """Whether all entries that are no codes are good; quick where they are."""
        low, high = int(used.min()), int(used.max())
        if low < self.lowest or high + self.unit > self.sectors:
            return False
        return not len(self.ends) or low >= int(self.ends[-1]) or bool(self.good(used).all())

    def guest(self, index: int) -> int:
        """The byte of the disk at which a grain begins."""
        return self.subject.start + index * self.grain * SECTOR

    def shown(self, index: int) -> int:
        """Sectors of a grain that the guest can see."""
        return max(min(self.grain, self.visible - index * self.grain), 0)


@dataclass(slots=True)
class Survey:
    """What looking at all tables told.

    problems     tables with something wrong in them, in either copy
    zeros        grains that are declared to be zeros, and the first of them
    misaligned   grains that do not begin at a multiple of their size, and the first of them
    conflicts    bins in which grains overlap
    claims       who uses what, None if the file was too large to keep that
    gaps         sectors, [begin, end), that nothing uses although a grain has room in them
    first        the lowest sector that a good entry names
    last         the highest sector that any entry names
    used         grains that have a place
    before       grains that lie before what the header says is the first
    """

    problems: set[int] = field(default_factory=set)
    zeros: int = 0
    first_zero: int = 0
    misaligned: int = 0
    first_misaligned: int = 0
    conflicts: list[int] = field(default_factory=list)
    claims: Claims | None = None
    gaps: list[tuple[int, int]] = field(default_factory=list)
    first: int = 1 << 32
    last: int = 0
    used: int = 0
    before: int = 0

    def is_shared(self, rules: Rules, entries: Numbers) -> Numbers:
        """Which entries name a place that overlaps another grain's: a mask."""
        bins = (entries // rules.unit).astype(np.int64)
        conflicts = np.array(self.conflicts, dtype=np.int64)
        # One that begins with its bin does not reach into the next.
        follows = np.isin(bins + 1, conflicts) & (entries & (rules.unit - 1) != 0)
        shared: Numbers = (np.isin(bins, conflicts) | follows) & (entries >= rules.codes)
        return shared

    def is_skewed(self, rules: Rules, entries: Numbers) -> Numbers:
        """Which entries name a place that is not aligned although nearly all are: a mask."""
        if self.misaligned * 2 >= self.used:
            return np.zeros(len(entries), bool)
        skewed: Numbers = (entries & (rules.unit - 1) != 0) & (entries >= rules.codes)
        return skewed

    def is_free(self, rules: Rules, sector: int, but: int | None = None) -> bool:
        """Whether it is known that a grain at ``sector`` is in nobody's way, and aligned as others are.

        ``but`` is the place of a grain whose way does not count.
        """
        if self.claims is None or (self.misaligned * 2 < self.used and sector % rules.unit):
            return False
        return self.claims.is_free(sector, but)


def survey(rules: Rules, tables: TableSet, twins: TableSet | None) -> Survey:
    """Look at all entries of ``tables``, and compare them with their ``twins``."""
    found = Survey()
    context = rules.subject.context
    context.expect(sum(each.bytes for each in (tables, twins) if each))
    reached = rules.lowest
    for number, claims in enumerate(Claims.passes(rules.unit, rules.sectors)):
        for first, count in tables.windows():
            rows = tables.rows(first, count)
            if number == 0:
                _compare(rules, found, first, rows, None if twins is None else twins.rows(first, count))
                context.advance(sum(each.bytes_in(first, count) for each in (tables, twins) if each))
            rows.reshape(-1)[max(rules.total - first * tables.entries, 0) :] = 0  # what is behind the disk
            if number == 0 and rows.any():
                _look(rules, found, first, rows)
            used = rows[rows >= rules.codes]
            if len(used):
                claims.add(used if rules.all_good(used) else used[rules.good(used)])
        found.conflicts += claims.conflicts()
        if not rules.packed:
            gaps, reached = claims.gaps(rules.begins, rules.ends, reached)
            found.gaps += gaps
        found.claims = claims if number == 0 else None
    if not rules.packed and rules.sectors - reached >= rules.unit:
        found.gaps.append((reached, rules.sectors))
    return found


def _compare(rules: Rules, found: Survey, first: int, rows: Numbers, twins: Numbers | None) -> None:
    """Note tables that differ from their twins, or go on behind the end of the disk."""
    bad = np.zeros(len(rows), dtype=bool)
    if twins is not None and not np.array_equal(rows, twins):
        bad |= (rows != twins).any(axis=1)
    entries = rows.shape[1]
    inside = max(rules.total - first * entries, 0)
    if inside < rows.size:
        surplus = np.flatnonzero(rows.reshape(-1)[inside:])
        bad[np.unique((surplus + inside) // entries)] = True
    found.problems.update((np.flatnonzero(bad) + first).tolist())


def _look(rules: Rules, found: Survey, first: int, rows: Numbers) -> None:
    """Note what is special about the entries of one window, and tables with one that can't be right."""
    entries = rows.shape[1]
    flat = rows.reshape(-1)
    if rules.codes > 1 and (ones := np.flatnonzero(flat == 1)).size:
        found.first_zero = found.first_zero if found.zeros else int(ones[0]) + first * entries
        found.zeros += len(ones)
    mask = flat >= rules.codes
    used = flat[mask]
    if not len(used):
        return
    found.last = max(found.last, int(used.max()))
    found.used += len(used)
    if not rules.all_good(used):
        good = rules.good(flat)
        found.problems.update((np.flatnonzero(~good.reshape(rows.shape).all(axis=1)) + first).tolist())
        mask &= good
        used = flat[mask]
    if len(used):
        found.first = min(found.first, int(used.min()))
        found.before += int((used < rules.overhead).sum()) if found.first < rules.overhead else 0
    if rules.unit > 1 and (used & (rules.unit - 1)).any():
        askew = np.flatnonzero(mask & (flat & (rules.unit - 1) != 0))
        if not found.misaligned:
            found.first_misaligned = int(askew[0]) + first * entries
        found.misaligned += len(askew)


def owners(rules: Rules, tables: TableSet, bins: list[int]) -> Iterator[tuple[int, int, int]]:
    """Trace conflicts back: (grain, the grain before it that it overlaps, its sector), for each pair."""
    wanted = np.unique(np.array([bins, np.array(bins) - 1], dtype=np.int64))
    starts: list[Numbers] = []
    indexes: list[Numbers] = []
    count = 0
    for first, number in tables.windows():
        rows = tables.rows(first, number).reshape(-1)
        hits = np.flatnonzero(rows >= rules.codes)
        hits = hits[np.isin(rows[hits] // rules.unit, wanted) & (hits + first * tables.entries < rules.total)]
        hits = hits[rules.good(rows[hits])]
        starts.append(rows[hits].astype(np.int64))
        indexes.append(hits + first * tables.entries)
        count += len(hits)
        if count > _MAX_OWNERS:
            break
    places, grains = np.concatenate(starts), np.concatenate(indexes)
    order = np.argsort(places, kind="stable")
    places, grains = places[order], grains[order]
    for at in np.flatnonzero(np.diff(places) < rules.unit).tolist():
        yield int(grains[at + 1]), int(grains[at]), int(places[at + 1])


def report_shared(
    rules: Rules,
    tables: TableSet,
    twins: TableSet | None,
    found: Survey,
    space: Space,
    mended: Collection[int],
) -> None:
    """Report grains that share their place in the file, but for those that the twin table tells apart."""
    if not found.conflicts:
        return
    subject = rules.subject
    for grain, other, sector in owners(rules, tables, found.conflicts):
        if grain in mended or other in mended:
            continue
        table, entry = divmod(grain, tables.entries)
        subject.error(
            "grains-overlap",
            f"the grain shares bytes of the file, from {sector * SECTOR} on, with the grain at guest offset "
            f"{rules.guest(other)}",
            "one of the two shows the other's data, and a write to either changes both",
            space.blocked or _own_copy(rules, (tables, twins), grain, sector, space),
            table=table,
            entry=entry,
            guest=rules.guest(grain),
            at=sector * SECTOR,
        )


def _own_copy(
    rules: Rules, copies: tuple[TableSet | None, ...], grain: int, sector: int, space: Space
) -> Repair | str:
    """Give a grain, which shares its place, a place of its own."""
    subject = rules.subject
    length = rules.unit * SECTOR
    free = space.take(align_up(length, space.align))
    if free + length > MAX_GRAIN_AT:
        return "the file is as large as its tables can address"
    changes: list[Change] = [
        Copy(subject.file, Stage.CONTENT, free, sector * SECTOR, length),
        Resize(subject.file, free + length),
    ]
    for copy in copies:
        if copy is not None:
            table, entry = divmod(grain, copy.entries)
            if copy.places[table]:
                at = int(copy.places[table]) + entry * copy.width
                changes.append(subject.write(at, (free // SECTOR).to_bytes(4, "little"), Stage.TABLES))
    if space.pointer is not None:
        end = (free + length) // SECTOR
        changes.append(subject.write(space.pointer, end.to_bytes(4, "little"), Stage.POINTERS))
    return Repair(
        "give the grain a copy of its own at the end of the file",
        tuple(changes),
        "to which of the two the bytes belong is not known",
    )
