"""COWD extents, the deltas of older ESX hosts: one directory, tables made on demand, a free pointer."""

import struct
from typing import Final

import numpy as np

from nbd_vmdk.errors import VmdkError
from nbd_vmdk.ondisk.cowd import (
    DIRECTORY_AT,
    ENTRIES_AT,
    ENTRIES_PER_TABLE,
    FLAG_INCONSISTENT,
    FLAGS_AT,
    FREE_SECTOR_AT,
    GENERATION_AT,
    SAVED_AT,
    UNCLEAN_AT,
    USUAL_DIRECTORY,
    CowdHeader,
    parse_header,
)
from nbd_vmdk.ops.check.context import NOT_INVENTED, Space, Subject
from nbd_vmdk.ops.check.entries import Rules, Survey, report_shared, survey
from nbd_vmdk.ops.check.findings import Repair, Stage
from nbd_vmdk.ops.check.hosted import report_unused
from nbd_vmdk.ops.check.impostors import mostly_odd
from nbd_vmdk.ops.check.scan import Numbers, TableSet, merged, overlapping, read_words
from nbd_vmdk.ops.check.twins import Twins
from nbd_vmdk.units import SECTOR, format_size

_HEADER: Final = 2048
_TABLE: Final = ENTRIES_PER_TABLE * 4 // SECTOR


def check_cowd(subject: Subject) -> CowdHeader | None:
    """Check a COWD extent; its header, None if that can't be made out."""
    storage = subject.storage
    head = storage.read(0, min(_HEADER, storage.size))
    try:
        header = parse_header(head, subject.file.label)
    except VmdkError as error:
        why = "nothing in the file repeats the header"
        subject.error("bad-header", error.message, "nothing of the extent can be read", why, at=0)
        return None
    if header.overhead > storage.size:
        what = f"the file ends before its grain directory does (byte {header.overhead})"
        subject.error("directory-outside", what, "none of the extent can be read", NOT_INVENTED)
        return header
    _report_geometry(subject, header, head)
    entries = read_words(storage, header.directory_sector * SECTOR, header.directory_entries, 4)
    good = _good_tables(subject, header, entries)
    tables, rules, found = _look(subject, header, entries, good)
    if len(impostors := mostly_odd(tables, sorted(found.problems), storage.size)):
        good[impostors] = False
        _report_tables(subject, header, entries, impostors, "what lies there is no table")
        tables, rules, found = _look(subject, header, entries, good)
    sound = good | (entries == 0)
    space = Space(subject, SECTOR, pointer=FREE_SECTOR_AT)
    past_end = found.last + rules.unit > rules.sectors
    if past_end:
        space.blocked = "first the entries that name grains behind the end of the file must be mended"
    outcome = Twins(rules, tables, None, found).report()
    report_shared(rules, tables, None, found, space, outcome.mended)
    # Hosts let the file grow in large steps: what lies behind the free pointer is no waste.
    found.gaps = [(begin, min(end, header.free_sector)) for begin, end in found.gaps]
    found.gaps = [(begin, end) for begin, end in found.gaps if begin < end]
    if sound.all():
        report_unused(rules, found)
    _report_free(subject, header, found, int(rules.ends[-1]), rules.unit, past_end=past_end)
    _report_state(subject, header, head)
    subject.check_whole_sectors(tail_is_data=past_end)
    return header


def _look(
    subject: Subject, header: CowdHeader, entries: Numbers, good: Numbers
) -> tuple[TableSet, Rules, Survey]:
    """Look at the tables that ``good`` entries of the directory name."""
    tables = TableSet(subject.storage, np.where(good, entries, 0) * SECTOR, ENTRIES_PER_TABLE, 4)
    front = -(-header.overhead // SECTOR)
    begins, ends = merged([(0, front), *((int(at), int(at) + _TABLE) for at in entries[good])])
    rules = Rules(
        subject=subject,
        grain=header.grain_sectors,
        unit=header.grain_sectors,
        total=-(-header.capacity_sectors // header.grain_sectors),
        visible=header.capacity_sectors if subject.sectors is None else subject.sectors,
        lowest=front,
        codes=1,
        begins=begins,
        ends=ends,
    )
    return tables, rules, survey(rules, tables, None)


def _report_geometry(subject: Subject, header: CowdHeader, head: bytes) -> None:
    (count,) = struct.unpack_from("<I", head, ENTRIES_AT)
    if count != header.directory_entries:
        data = header.directory_entries.to_bytes(4, "little")
        subject.warning(
            "cowd-geometry",
            f"numGDEntries is {count}, but the capacity needs {header.directory_entries}",
            "none; some readers trust the number",
            Repair("set it to what the capacity needs", (subject.write(ENTRIES_AT, data, Stage.POINTERS),)),
            at=ENTRIES_AT,
        )
    if header.directory_sector != USUAL_DIRECTORY:
        subject.warning(
            "cowd-geometry",
            f"gdOffset is {header.directory_sector}, and every writer known puts the directory at sector 4",
            "none as long as it is true",
            "the directory is where the header says",
            at=DIRECTORY_AT,
        )


def _good_tables(subject: Subject, header: CowdHeader, entries: Numbers) -> Numbers:
    """Which directory entries name a table: a mask.  The others are reported, but for those that are 0."""
    front = -(-header.overhead // SECTOR)
    good = (entries >= front) & ((entries + _TABLE) * SECTOR <= subject.storage.size)
    named = np.flatnonzero(good)
    clash = set(named[overlapping(entries[named], _TABLE)].tolist()) if len(named) else set()
    outside = np.flatnonzero(~good & (entries != 0))
    _report_tables(subject, header, entries, outside, "no table can be there")
    twice = np.array(sorted(clash), dtype=np.int64)
    good[twice] = False
    _report_tables(subject, header, entries, twice, "another table lies there, too")
    return good


def _report_tables(
    subject: Subject, header: CowdHeader, entries: Numbers, numbers: Numbers, why: str
) -> None:
    """Report entries of the directory that name no table of their own."""
    span = ENTRIES_PER_TABLE * header.grain_sectors * SECTOR
    for number in numbers.tolist():
        lost = format_size(min(span, header.capacity_sectors * SECTOR - number * span))
        subject.error(
            "directory-entry",
            f"entry {number} of the directory names sector {int(entries[number])}: {why}",
            f"{lost} of the disk can't be read",
            NOT_INVENTED,
            table=number,
            guest=subject.start + number * span,
            at=header.directory_sector * SECTOR + number * 4,
        )


def _report_free(
    subject: Subject, header: CowdHeader, found: Survey, tables_end: int, unit: int, *, past_end: bool
) -> None:
    """The field freeSector must be behind all that is used, and inside the file."""
    end = max(tables_end, found.last + unit if found.used else 0)
    sectors = subject.storage.size // SECTOR
    stored = header.free_sector
    if end <= stored <= max(sectors, end):
        return
    data = end.to_bytes(8, "little")[:4]
    subject.warning(
        "free-sector",
        f"freeSector is {stored}, but tables and grains end at sector {end}, the file at {sectors}",
        "none for a reader; a host that trusts it overwrites grains" if stored < end else "none for a reader",
        "first the entries behind the end of the file must be mended"
        if past_end or subject.unmendable
        else Repair(f"set it to {end}", (subject.write(FREE_SECTOR_AT, data, Stage.POINTERS),)),
        at=FREE_SECTOR_AT,
    )


def _report_state(subject: Subject, header: CowdHeader, head: bytes) -> None:
    """The marks that a host leaves while it writes."""
    later = "it stays as a mark until the errors in the file are mended"

    def clear(at: int, data: bytes) -> Repair | str:
        if subject.unmendable:
            return later
        return Repair("clear the mark", (subject.write(at, data, Stage.FLAGS),))

    effect = "what was written last, and never flushed, may be lost"
    if header.unclean:
        what = "the file was not closed cleanly the last time it was written"
        subject.warning("unclean", what, effect, clear(UNCLEAN_AT, bytes(4)), at=UNCLEAN_AT)
    if header.flags & FLAG_INCONSISTENT:
        flags = (header.flags & ~FLAG_INCONSISTENT).to_bytes(4, "little")
        what = "the header's flags mark the file as inconsistent"
        subject.warning("inconsistent", what, effect, clear(FLAGS_AT, flags), at=FLAGS_AT)
    (generation,), (saved,) = (struct.unpack_from("<I", head, at) for at in (GENERATION_AT, SAVED_AT))
    if saved and generation != saved:
        what = f"savedGeneration is {saved} and generation {generation}: a host may have crashed in between"
        data = generation.to_bytes(4, "little")
        mend: Repair | str = later
        if not subject.unmendable:
            mend = Repair("make them equal", (subject.write(SAVED_AT, data, Stage.FLAGS),))
        subject.warning("generation", what, effect, mend, at=SAVED_AT)
