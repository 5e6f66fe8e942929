"""streamOptimized extents: footer, end of stream, and the records that the tables name.

Tables of a compressed extent name records, and each record says for which guest sector it is.  So what a
table has lost can be found again by walking from record to record (records.py), which costs a read for each
grain: it is done where the tables are damaged, or with --data, which inflates every grain besides
(packed.py).
"""

from dataclasses import dataclass, replace
from typing import Final

from nbd_vmdk.errors import VmdkError
from nbd_vmdk.extents.stream import MAX_PACKED_GRAIN
from nbd_vmdk.ondisk.hosted import GD_AT_END, HostedHeader, parse_header
from nbd_vmdk.ondisk.stream import FOOTER_LENGTH, MarkerType, footer_header_offset
from nbd_vmdk.ops.check.context import Space, Subject
from nbd_vmdk.ops.check.directories import Directories
from nbd_vmdk.ops.check.entries import Rules, report_shared, survey
from nbd_vmdk.ops.check.findings import Change, Repair, Resize, Stage
from nbd_vmdk.ops.check.records import (
    Records,
    find_directory,
    metadata_marker,
    names_grains,
    names_others,
)
from nbd_vmdk.ops.check.scan import Numbers, merged, read_words
from nbd_vmdk.ops.check.twins import Twins
from nbd_vmdk.ops.check.undeclared import report_zeros
from nbd_vmdk.units import MIB, SECTOR, align_up

_FOOTER_SEARCH: Final = MIB
#: Fields of the header that decide where a grain is.
_GEOMETRY: Final = frozenset({"capacity_sectors", "grain_sectors", "entries_per_table"})
_SALVAGE: Final = "what is left can be read with --salvage"
_NO_TABLES: Final = "nothing of the extent can be read, unless with --salvage"


@dataclass(slots=True)
class Footer:
    """What the end of the file says.

    at      byte of the footer's copy of the header, 0 if there is none
    header  the header with the directory's place filled in, None if nothing tells that
    wrong   what is wrong with the end of the file, None if nothing is
    tail    what mends that
    why     why nothing can, where that is known
    """

    at: int = 0
    header: HostedHeader | None = None
    tail: Repair | None = None
    wrong: str | None = None
    why: str | None = None


def check_stream(subject: Subject, header: HostedHeader) -> None:
    """Check a compressed extent."""
    if header.grain > MAX_PACKED_GRAIN:
        what = f"compressed grains of {header.grain} bytes, more than {MAX_PACKED_GRAIN}"
        subject.error("unsupported", what, "the extent can't be read", "such grains are not supported")
        return
    footer = _read_footer(subject, header)
    known = footer.header or header
    records = Records(subject, replace(known, directory_sector=header.directory_sector))
    if footer.wrong is None and footer.header is not None and _knows_nothing(subject, footer.header, records):
        sector = footer.header.directory_sector
        wrong = f"gdOffset is {sector:#x}, where a directory knows no grain, and the file has some"
        footer = _without_footer(subject, header, wrong, footer.at)
    if footer.wrong is not None:
        if footer.header is not None and not records.agree(_directory(subject, footer.header)):
            # What spoiled the footer has spoiled the directory, too: its holes are none.
            footer.header = footer.tail = None
        slug = (
            "footer-damaged" if footer.at else "footer-lost" if header.directory_at_end else "directory-entry"
        )
        repair = footer.tail or footer.why or records.rebuild() or f"grains are lost: {_SALVAGE}"
        subject.error(slug, footer.wrong, _NO_TABLES, repair, at=footer.at or None)
    if footer.header is None:
        subject.check_whole_sectors(tail_is_data=True)
        return
    if known.markers and names_others(subject.storage, footer.header, footer.header.directory_sector):
        what = "the tables lead to records of other grains: grainSize or numGTEsPerGT is not what it was"
        subject.error(
            "bad-header", what, "most of the extent can't be read", "what is right is not known", at=0
        )
        return
    _check_tables(subject, footer, records)
    _check_end(subject, footer)


def _knows_nothing(subject: Subject, header: HostedHeader, records: Records) -> bool:
    """Whether what is taken for the directory is nothing but zeros, in a file with grains.

    The directory of an empty disk is where the first grain will be: what lies there was written by who did
    not come to an end.
    """
    at, length = header.directory_at, header.directory_entries * 4
    if not 0 < at <= subject.storage.size - length or header.redundant_at is not None:
        return False  # there is more to be said of that, or to be asked
    if at == (header.overhead_sectors + 1) * SECTOR:
        return False
    directory = _directory(subject, header)
    return not directory.any() and not records.agree(directory)


def _directory(subject: Subject, header: HostedHeader) -> Numbers:
    return read_words(subject.storage, header.directory_sector * SECTOR, header.directory_entries, 4)


def _read_footer(subject: Subject, header: HostedHeader) -> Footer:
    """Find the footer, compare it with the header, and where it is lost find the directory without it."""
    storage = subject.storage
    size = storage.size - storage.size % SECTOR
    search = min(size, _FOOTER_SEARCH if header.directory_at_end else FOOTER_LENGTH)
    tail = storage.read(size - search, search)
    within = footer_header_offset(tail)
    if within is None and not header.directory_at_end:
        return Footer(header=header)
    if within is None:
        wrong = "the footer, which tells where the grain directory is, is not there"
        return _without_footer(subject, header, wrong, 0)
    at = size - search + within
    try:
        copy = parse_header(tail[within : within + SECTOR], subject.file.label)
    except VmdkError as error:
        return _without_footer(subject, header, f"the footer is no copy of the header: {error.message}", at)
    fields = [
        name
        for name in ("capacity_sectors", "grain_sectors", "entries_per_table", "version", "flags")
        if getattr(copy, name) != getattr(header, name)
    ]
    sector = copy.directory_sector
    length = header.directory_entries * 4
    if _GEOMETRY.intersection(fields):
        return _contradicted(subject, header, copy, at, fields)
    if fields or sector == GD_AT_END or not 0 < sector * SECTOR <= storage.size - length:
        wrong = f"the footer differs from the header in {', '.join(fields)}"
        if not fields:
            wrong = f"the footer's gdOffset is {sector:#x}, where no directory can be"
        return _without_footer(subject, header, wrong, at)
    return Footer(at=at, header=replace(header, directory_sector=sector))


def _contradicted(
    subject: Subject, header: HostedHeader, copy: HostedHeader, at: int, fields: list[str]
) -> Footer:
    """Header and footer differ in what decides where a grain is: which of them the records bear out."""
    storage = subject.storage
    wrong = f"the footer differs from the header in {', '.join(fields)}"
    sector = find_directory(storage, header)
    if sector is None and not header.directory_at_end:
        sector = header.directory_sector
    header_fits = sector is not None and names_grains(storage, header, sector)
    footer_fits = names_grains(storage, copy, copy.directory_sector)
    if header_fits and not footer_fits:
        return _without_footer(subject, header, wrong, at)
    if header_fits or not footer_fits:
        return Footer(at=at, wrong=wrong, why="which of the two is right is not known")
    mended = replace(
        header,
        capacity_sectors=copy.capacity_sectors,
        grain_sectors=copy.grain_sectors,
        entries_per_table=copy.entries_per_table,
    )
    write = subject.write(0, mended.to_bytes(), Stage.POINTERS)
    repair = Repair("write the header anew: the records bear the footer out", (write,))
    known = replace(mended, directory_sector=copy.directory_sector)
    return Footer(at=at, header=known, wrong=wrong, tail=repair)


def _without_footer(subject: Subject, header: HostedHeader, wrong: str, at: int) -> Footer:
    """Go on with the directory as its own record tells, if that is there."""
    sector = find_directory(subject.storage, header)
    if sector is None:
        known = None if header.directory_at_end else header
        return Footer(at=at, header=known, wrong=wrong)
    known = replace(header, directory_sector=sector)
    end = sector * SECTOR + align_up(header.directory_entries * 4, SECTOR)
    changes = footer_changes(subject, known, _place_for_footer(subject, end))
    tail = Repair("write the footer anew: the directory was found by its own record", changes)
    return Footer(at=at, header=known, wrong=wrong, tail=tail)


def _place_for_footer(subject: Subject, end: int) -> int:
    """Right behind the directory, if only zeros and pieces of a footer are there; else behind all."""
    storage = subject.storage
    rest = storage.size - end
    if rest <= _FOOTER_SEARCH:
        data = storage.read(end, max(rest, 0))
        if not any(data[FOOTER_LENGTH:]):
            return end
    return align_up(storage.size, SECTOR)


def footer_changes(subject: Subject, header: HostedHeader, at: int) -> tuple[Change, ...]:
    """A footer and the end of stream at byte ``at``, where the file then ends but for these."""
    record = metadata_marker(MarkerType.FOOTER, 1) + header.to_bytes() + bytes(SECTOR)
    return (
        subject.write(at, record, Stage.POINTERS),
        Resize(subject.file, at + len(record), exact=True),
    )


def _check_tables(subject: Subject, footer: Footer, records: Records) -> None:
    header = footer.header
    assert header is not None
    directories = Directories(subject, header)
    if not directories.load():
        return
    tables, twins = directories.tables, directories.twins
    begins, ends = merged(directories.ranges)
    rules = Rules(
        subject=subject,
        grain=header.grain_sectors,
        unit=1,
        total=-(-header.capacity_sectors // header.grain_sectors),
        visible=header.capacity_sectors if subject.sectors is None else subject.sectors,
        lowest=2,
        codes=2,
        packed=True,
        begins=begins,
        ends=ends,
        zeros_declared=header.zeroed_grains,
        unclean=header.unclean,
    )
    found = survey(rules, tables, twins)
    space = Space(subject, SECTOR, "no record tells to which of the two it belongs")
    if directories.damaged and twins is None:
        directories.report_single(records.rebuild() or f"its grains are lost: {_SALVAGE}")
    else:
        # The records tell of what the tables do not know.
        directories.report(space, lambda: True)
    outcome = Twins(rules, tables, twins, found, records.is_hole).report()
    lost = outcome.lost
    report_zeros(rules, header, found, tables.entries, footer.at)
    faults: dict[int, str] = {}
    if subject.context.data:
        from nbd_vmdk.ops.check.packed import damaged_grains

        faults = damaged_grains(rules, header, tables, found.used)
    if lost or faults or found.conflicts or subject.context.data:
        outcome.mended |= records.report_entries(rules, tables, twins, lost, faults)
    report_shared(rules, tables, twins, found, space, outcome.mended)


def _check_end(subject: Subject, footer: Footer) -> None:
    """The end-of-stream record must be there, but for QEMU, which never writes it."""
    header, storage = footer.header, subject.storage
    assert header is not None
    mend = Repair(
        "append an end-of-stream record",
        (Resize(subject.file, align_up(storage.size, SECTOR) + SECTOR),),
    )
    if footer.wrong is not None:
        return
    if footer.at:
        missing = storage.size < footer.at + 2 * SECTOR
    else:
        end = storage.size - storage.size % SECTOR
        missing = header.redundant_at is None and any(storage.read(end - SECTOR, SECTOR))
    if missing:
        subject.warning(
            "no-end-of-stream",
            "the end-of-stream record is not there",
            "none; a reader of streams may take the file for cut off",
            mend,
            at=storage.size,
        )
    else:
        subject.check_whole_sectors(tail_is_data=False)
