"""The grain directory of a hosted extent and its redundant twin: where they lie, and what they name.

A directory entry is the sector of a grain table.  Each copy of the directory has tables of its own.  An entry
that can't be right is mended from the other copy: its table is made anew where it was, which the
regular layout of the other tables tells, or behind the end of the file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from nbd_vmdk.ondisk.hosted import (
    FLAG_REDUNDANT,
    FLAGS_AT,
    GD_OFFSET_AT,
    MAX_ENTRY,
    RGD_OFFSET_AT,
    HostedHeader,
)
from nbd_vmdk.ops.check.context import NOT_INVENTED, Space, Subject
from nbd_vmdk.ops.check.findings import Copy, Repair, Resize, Stage
from nbd_vmdk.ops.check.impostors import is_over, odd, over_agreed, part_of_tables
from nbd_vmdk.ops.check.scan import Numbers, TableSet, merged, overlapping, read_words, touching
from nbd_vmdk.units import SECTOR, align_up, format_size

_FIELD_AT: Final = {"rgdOffset": RGD_OFFSET_AT, "gdOffset": GD_OFFSET_AT}
#: Tables that are looked into at either end of a directory.
_TRIED: Final = 16


@dataclass(slots=True)
class Side:
    """One copy of the directory: where it lies and its entries, in sectors; which of them can be right."""

    field: str
    sector: int
    entries: Numbers
    good: Numbers
    #: Where tables would be if they lay one behind the other, as nearly always; None if they do not.
    base: int | None = None


class Directories:
    """Both directories of a hosted extent, checked.

    ``tables`` and ``twins`` are what can be read: a table stands for its twin where only that is sound.
    """

    def __init__(self, subject: Subject, header: HostedHeader) -> None:
        self.subject = subject
        self.header = header
        self.count = header.directory_entries
        self.size = subject.storage.size
        self._area = align_up(self.count * 4, SECTOR) // SECTOR
        self._step = align_up(header.entries_per_table * 4, SECTOR) // SECTOR
        #: Sectors that a grain takes at least.
        self._room = 1 if header.compressed else header.grain_sectors
        #: Entries of the directory to go by that lead to what is no table, though it could be by its place.
        self.astray: set[int] = set()

    def load(self) -> bool:
        """Find and read both; False if there is no directory to go by."""
        header = self.header
        places: dict[str, int | None] = {"gdOffset": header.directory_sector}
        if header.redundant_at is not None:
            places["rgdOffset"] = header.redundant_sector
        for name, sector in places.items():
            if sector is not None and not self._fits(sector):
                places[name] = self._report_area(name, sector, places)
        self._exclude_astray_area(places)
        if places["gdOffset"] is None and places.get("rgdOffset") is None:
            return False
        self._metadata = self._own_ranges([sector for sector in places.values() if sector is not None])
        sides = [self._side(name, sector) for name, sector in places.items() if sector is not None]
        # Without a sound directory the redundant one is all there is to go by.
        self.primary = sides[0]
        self.redundant = sides[1] if len(sides) > 1 else None
        self._exclude_overlapping(sides)
        self._exclude_astray(sides)
        return True

    def _fits(self, sector: int) -> bool:
        """Whether a directory can lie at ``sector``: in the file, and on nothing else."""
        header = self.header
        first, last = header.descriptor_sector, header.descriptor_sector + header.descriptor_sectors
        over_text = bool(first) and sector < last and sector + self._area > first
        return sector >= 1 and sector * SECTOR + self.count * 4 <= self.size and not over_text

    def _exclude_astray_area(self, places: dict[str, int | None]) -> None:
        """Leave out the one of two directories that is neither in its usual place nor leads to tables.

        What is there instead may be a grain's bytes, which mending entries would destroy.  In front of the
        grains there are none; there it is a directory whose first tables a power cut left to the other one.
        """
        first, second = places["gdOffset"], places.get("rgdOffset")
        if first is None or second is None or first - second == self._area + self.count * self._step:
            return
        leads = {name: self._leads(sector) for name, sector in places.items() if sector is not None}
        worst = min(leads, key=leads.__getitem__)
        place = places[worst] or 0
        behind = place + self._area > self.header.overhead_sectors
        if behind and leads[worst] * 2 <= 1 and leads[worst] < max(leads.values()):
            places[worst] = self._report_area(worst, place, places)

    def _leads(self, sector: int) -> float:
        """Which part of the entries of what may be a directory leads to tables in use; some are tried."""
        entries = read_words(self.subject.storage, sector * SECTOR, self.count, 4)
        named = entries[entries != 0]
        tried = np.concatenate((named[:_TRIED], named[_TRIED:][-_TRIED:]))
        inside = (tried > 1) & (tried * SECTOR + self.header.entries_per_table * 4 <= self.size)
        return part_of_tables(self._set(tried[inside]), len(tried), self.size)

    def _own_ranges(self, sectors: list[int]) -> list[tuple[int, int]]:
        """What no table may lie on: header, descriptor, directories."""
        header = self.header
        ranges = [(0, 1), *((sector, sector + self._area) for sector in sectors)]
        if header.descriptor_sector:
            first = header.descriptor_sector
            ranges.append((first, first + header.descriptor_sectors))
        return ranges

    def _report_area(self, name: str, sector: int, places: dict[str, int | None]) -> int | None:
        """A directory that is not where the header says; where it is found, None if nowhere."""
        other_name = "rgdOffset" if name == "gdOffset" else "gdOffset"
        other = places.get(other_name)
        usable = other is not None and self._fits(other)
        found = self._search(name, other) if usable and other is not None else None
        write = self.subject.write
        repair: Repair | str = NOT_INVENTED
        if found is not None:
            data = found.to_bytes(8, "little")
            repair = Repair(f"set {name} to {found}", (write(_FIELD_AT[name], data, Stage.POINTERS),))
        elif usable and other is not None and self._leads(other) * 2 > 1:
            flags = (self.header.flags & ~FLAG_REDUNDANT).to_bytes(4, "little")
            changes = [write(FLAGS_AT, flags, Stage.POINTERS)]
            changes.append(write(_FIELD_AT["rgdOffset"], bytes(8), Stage.POINTERS))
            if name == "gdOffset":
                changes.append(write(_FIELD_AT[name], other.to_bytes(8, "little"), Stage.POINTERS))
            missing = bool((read_words(self.subject.storage, other * SECTOR, self.count, 4) == 0).any())
            repair = Repair(
                "go on with the other copy of the directory alone",
                tuple(changes),
                "tables that only this copy knew, if there are any, are given up" if missing else None,
            )
        self.subject.error(
            "directory-outside",
            f"{name} is {sector}: no grain directory of {self.count} entries can be there",
            "none of the extent can be read"
            if name == "gdOffset"
            else "none for the guest; the second copy of the tables is lost, and readers refuse the file",
            repair,
            at=_FIELD_AT[name],
        )
        return found

    def _search(self, name: str, other: int) -> int | None:
        """Where a directory should be by the usual layout, if one like the other is really there."""
        shift = self._area + self.count * self._step
        sector = other + shift if name == "gdOffset" else other - shift
        if not self._fits(sector) or abs(sector - other) < self._area:
            return None
        here = read_words(self.subject.storage, sector * SECTOR, self.count, 4)
        there = read_words(self.subject.storage, other * SECTOR, self.count, 4)
        # Some entries of either may be damaged, but most must be of tables that are twins.
        pairs = (here != 0) & (there != 0) & (here != there) & ((here + self._step) * SECTOR <= self.size)
        alike = 2 * np.count_nonzero(pairs) > np.count_nonzero(here | there)
        return sector if alike else None

    def _side(self, name: str, sector: int) -> Side:
        entries = read_words(self.subject.storage, sector * SECTOR, self.count, 4)
        begins, ends = merged(self._metadata)
        length = self.header.entries_per_table * 4
        good = (entries > 0) & (entries * SECTOR + length <= self.size)
        good &= ~touching(begins, ends, entries, self._step)
        return Side(name, sector, entries, good)

    def _exclude_overlapping(self, sides: list[Side]) -> None:
        """Of tables that overlap, those that are not where the regular layout has them are no good."""
        for attempt in (True, False):
            for side in sides:
                side.base = self._base(side)
            owner = np.concatenate([np.full(self.count, at) for at in range(len(sides))])
            index = np.concatenate([np.arange(self.count)] * len(sides))
            entries = np.concatenate([side.entries for side in sides])
            good = np.flatnonzero(np.concatenate([side.good for side in sides]))
            clash = good[overlapping(entries[good], self._step)] if len(good) else good
            if not len(clash):
                return
            for at in clash.tolist():
                side, number = sides[int(owner[at])], int(index[at])
                if not (attempt and side.base == side.entries[number] - number * self._step):
                    side.good[number] = False

    def _exclude_astray(self, sides: list[Side]) -> None:
        """Leave out what is no table, though one could be there: mending its entries would destroy a grain.

        It is not where the layout has it, and most of its entries are odd, or it is unlike its twin and
        grains that both copies know lie there.
        """
        found = []
        for side, twin in (sides, sides[::-1]) if len(sides) > 1 else ((sides[0], None),):
            numbers = np.flatnonzero(side.good & ~self._regular(side))
            tables = self._set(side.entries[numbers])
            for first, count in tables.windows():
                chosen = numbers[first : first + count]
                rows = tables.rows(first, count)
                astray = 2 * odd(rows, self.size).sum(axis=1) > np.count_nonzero(rows, axis=1)
                if twin is not None:
                    there = twin.good[chosen]
                    others = self._set(np.where(there, twin.entries[chosen], 0)).rows(0, count)
                    differ = (rows != others).sum(axis=1)
                    unlike = np.flatnonzero(there & ~astray & (differ > 0))
                    astray[unlike] = self._over_grains(sides, side.entries[chosen[unlike]])
                    # One entry that names a table is damage of it; where most differ the twin is to be heard.
                    wholly = there & (2 * differ > np.count_nonzero(others, axis=1))
                    for at in np.flatnonzero(wholly & ~astray).tolist():
                        place = int(side.entries[chosen[at]])
                        astray[at] = is_over(others[at][others[at] >= 2], self._room, place, self._step)
                found.append((side, chosen[astray]))
        for side, numbers in found:
            side.good[numbers] = False
            if side is sides[0]:
                self.astray.update(numbers.tolist())

    def _regular(self, side: Side) -> Numbers:
        """Which tables lie where the layout has them: a mask.

        Away from the usual place, behind the directory, one table makes no layout, nor do any without twins:
        entries of a table, taken for a directory, may be as regular.
        """
        if side.base is None:
            return np.zeros(self.count, bool)
        regular: Numbers = side.entries == side.base + np.arange(self.count) * self._step
        usual = side.base == side.sector + self._area
        several = self.redundant is not None and np.count_nonzero(regular & side.good) > 1
        return regular & (usual or several)

    def _over_grains(self, sides: list[Side], sectors: Numbers) -> Numbers:
        """Which of the places that tables should have lie on grains on which both copies agree: a mask."""
        copies = [self._set(np.where(side.good, side.entries, 0)) for side in sides]
        return over_agreed(copies[0], copies[1], self._room, sectors, self._step)

    def _base(self, side: Side) -> int | None:
        """Where the table of entry 0 is, or would be, if all lie one behind the other."""
        numbers = np.flatnonzero(side.good)
        if not len(numbers):
            return side.sector + self._area
        values, counts = np.unique(side.entries[numbers] - numbers * self._step, return_counts=True)
        best = int(counts.argmax())
        return int(values[best]) if int(counts[best]) * 2 >= len(numbers) else None

    @property
    def tables(self) -> TableSet:
        """The tables to go by."""
        places = np.where(self.primary.good, self.primary.entries, 0)
        if self.redundant is not None:
            second = np.where(self.redundant.good, self.redundant.entries, 0)
            places = np.where(places == 0, second, places)
        return self._set(places)

    @property
    def twins(self) -> TableSet | None:
        """The second copies, where both are sound."""
        if self.redundant is None:
            return None
        both = self.primary.good & self.redundant.good
        return self._set(np.where(both, self.redundant.entries, 0))

    def _set(self, sectors: Numbers) -> TableSet:
        return TableSet(self.subject.storage, sectors * SECTOR, self.header.entries_per_table, 4)

    @property
    def damaged(self) -> bool:
        """Whether an entry of the directory to go by can't be right."""
        return bool((~self.primary.good & (self.primary.entries != 0)).any())

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Sectors of all that is no grain: header, descriptor, directories and tables."""
        sides = [self.primary] if self.redundant is None else [self.primary, self.redundant]
        starts = np.concatenate([side.entries[side.good] for side in sides])
        # Tables mostly lie one behind the other: made few here, so that no list gets long.
        begins, ends = merged([(0, 0)]) if not len(starts) else _runs(starts, self._step)
        return [*self._metadata, *zip(begins.tolist(), ends.tolist(), strict=True)]

    def report(self, space: Space, no_grain_lost: Callable[[], bool]) -> None:
        """Report every entry that can't be right, or that one copy has and the other lacks.

        ``no_grain_lost`` tells whether a twin can be believed that says of many grains that there is none.
        """
        if self.redundant is None:
            self.report_single(NOT_INVENTED)
            return
        odd = self.primary.good != self.redundant.good
        odd |= ~self.primary.good & ((self.primary.entries != 0) | (self.redundant.entries != 0))
        taken = merged(self.ranges)
        for number in np.flatnonzero(odd).tolist():
            self._report_entry(number, taken, space, no_grain_lost)

    def report_single(self, repair: Repair | str) -> None:
        """Report every entry that can't be right, where there is one copy."""
        side = self.primary
        for number in np.flatnonzero(~side.good & (side.entries != 0)).tolist():
            self._tell(side, number, "directory-entry", "and there is no second copy", repair, lost=True)

    def _report_entry(
        self,
        number: int,
        taken: tuple[Numbers, Numbers],
        space: Space,
        no_grain_lost: Callable[[], bool],
    ) -> None:
        first, second = self.primary, self.redundant
        assert second is not None
        if not first.good[number] and not second.good[number]:
            why = "and its redundant twin is no better"
            self._tell(first, number, "directory-entry", why, NOT_INVENTED, lost=True)
            return
        bad, sound = (second, first) if first.good[number] else (first, second)
        repair = self._mend(bad, sound, number, taken, space)
        if isinstance(repair, Repair) and bad is first and number in self.astray and not no_grain_lost():
            # What reads now by what is there instead of the table raises, or is wrong and told.
            asks = "something in the file is named by nobody: grains that the twin does not know may be lost"
            repair = Repair(repair.text, repair.changes, asks)
        if bad is first:
            self._tell(first, number, "directory-entry", "its redundant twin is sound", repair, lost=True)
        else:
            self._tell(
                second, number, "redundant-directory", "the directory's own is sound", repair, lost=False
            )

    def _mend(
        self, bad: Side, sound: Side, number: int, taken: tuple[Numbers, Numbers], space: Space
    ) -> Repair | str:
        """Make a table anew from its twin, and name it."""
        length = self.header.entries_per_table * 4
        sector = None if bad.base is None else bad.base + number * self._step
        changes: list[Copy | Resize] = []
        if sector is None or not self._is_free(sector, taken):
            if space.blocked is not None:
                return space.blocked
            sector = space.take(length) // SECTOR
            if sector > MAX_ENTRY:
                return "there is no room for a copy that an entry could name"
            changes.append(Resize(self.subject.file, (sector + self._step) * SECTOR))
        source = int(sound.entries[number]) * SECTOR
        return Repair(
            f"copy the table from its twin to sector {sector}, and name it in the directory",
            (
                *changes,
                Copy(self.subject.file, Stage.CONTENT, sector * SECTOR, source, length),
                self.subject.write(
                    bad.sector * SECTOR + number * 4, sector.to_bytes(4, "little"), Stage.POINTERS
                ),
            ),
        )

    def _is_free(self, sector: int, taken: tuple[Numbers, Numbers]) -> bool:
        """Whether a table can be put at ``sector``: among the tables, before all grains, on nothing else."""
        if sector < 1 or sector + self._step > self.header.overhead_sectors:
            return False
        if (sector + self._step) * SECTOR > self.size:
            return False
        return not touching(*taken, np.array([sector]), self._step).any()

    def _tell(
        self, side: Side, number: int, slug: str, why: str, repair: Repair | str, *, lost: bool
    ) -> None:
        header, value = self.header, int(side.entries[number])
        coverage = header.entries_per_table * header.grain
        span = min(coverage, header.capacity - number * coverage)
        state = "is 0" if not value else f"names sector {value}, where no table of its own can be"
        copy = "redundant directory" if slug == "redundant-directory" else "directory"
        what = f"entry {number} of the {copy} {state}; {why}"
        place = {
            "table": number,
            "guest": self.subject.start + number * coverage,
            "at": side.sector * SECTOR + number * 4,
        }
        if not lost:
            self.subject.warning(slug, what, "none for the guest; the second copy is lost", repair, **place)
            return
        effect = (
            f"{format_size(span)} of the disk can't be read"
            if value
            else (f"{format_size(span)} of the disk read as {self.subject.hole}")
        )
        self.subject.error(slug, what, effect, repair, **place)


def _runs(starts: Numbers, length: int) -> tuple[Numbers, Numbers]:
    """Things of one length as merged ranges."""
    starts = np.unique(starts)
    fresh = np.concatenate(([True], np.diff(starts) > length))
    last = np.concatenate((fresh[1:], [True]))
    return starts[fresh], starts[last] + length
