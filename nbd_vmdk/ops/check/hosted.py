"""Hosted sparse extents: the header, and what belongs to the file as a whole.

The directories are directories.py's, the entries of the tables entries.py's and twins.py's, and what is
special about compressed extents stream.py's.
"""

from dataclasses import replace
from typing import Final

from nbd_vmdk.errors import BadField, VmdkError
from nbd_vmdk.ondisk import hosted
from nbd_vmdk.ondisk.hosted import GD_OFFSET_AT, NEWLINES, NEWLINES_AT, UNCLEAN_AT, HostedHeader, parse_header
from nbd_vmdk.ondisk.stream import footer_header_offset
from nbd_vmdk.ops.check.context import Space, Subject
from nbd_vmdk.ops.check.directories import Directories
from nbd_vmdk.ops.check.entries import Rules, Survey, report_shared, survey
from nbd_vmdk.ops.check.findings import Repair, Stage
from nbd_vmdk.ops.check.places import check_text_area, is_overhead_wrong, report_overhead
from nbd_vmdk.ops.check.scan import merged
from nbd_vmdk.ops.check.stream import check_stream
from nbd_vmdk.ops.check.twins import Twins
from nbd_vmdk.ops.check.undeclared import report_zeros
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB, SECTOR, format_size

_FOOTER_SEARCH: Final = MIB


def find_footer(storage: Storage) -> bytes | None:
    """The copy of the header in the footer of a streamOptimized file, None if there is none."""
    size = storage.size - storage.size % SECTOR
    search = min(size, _FOOTER_SEARCH)
    tail = storage.read(size - search, search)
    at = footer_header_offset(tail)
    return None if at is None or at + SECTOR > len(tail) else tail[at : at + SECTOR]


def check_hosted(subject: Subject) -> HostedHeader | None:
    """Check a hosted sparse extent; its header, None if that can't be made out."""
    head = subject.storage.read(0, min(SECTOR, subject.storage.size))
    text_mode = False
    try:
        header = parse_header(head, subject.file.label)
    except VmdkError as error:
        known, text_mode = _header_anyway(subject, head, error)
        if known is None:
            return None
        header = known
    if not header.is_wrapper:
        sound = check_text_area(subject, header)
        if header.compressed:
            check_stream(subject, sound)
        else:
            check_plain(subject, sound)
    if text_mode:
        _report_text_mode(subject, header, head)
    if header.unclean:
        _report_unclean(subject)
    return header


def _header_anyway(subject: Subject, head: bytes, error: VmdkError) -> tuple[HostedHeader | None, bool]:
    """What a header that was refused must have been, and whether only its line ends were wrong."""
    label = subject.file.label
    if isinstance(error, BadField) and error.fields["field"] == "line-end check":
        try:
            mended = head[:NEWLINES_AT] + NEWLINES + head[NEWLINES_AT + len(NEWLINES) :]
            return parse_header(mended, label), True
        except VmdkError as second:
            error = second
    repair: Repair | str = "nothing in the file repeats the header"
    header = None
    copy = find_footer(subject.storage)
    if copy is not None:
        try:
            header = parse_header(copy, label)
        except VmdkError:
            pass
        else:
            header = replace(header, directory_sector=hosted.GD_AT_END)
            write = subject.write(0, header.to_bytes(), Stage.POINTERS)
            repair = Repair("write the header anew from its copy in the footer", (write,))
    subject.error("bad-header", error.message, "nothing of the extent can be read", repair, at=0)
    return header, False


def check_plain(subject: Subject, header: HostedHeader) -> None:
    """Check the tables of an uncompressed extent."""
    sectors = subject.storage.size // SECTOR
    directories = Directories(subject, header)
    if header.directory_at_end:
        what = "gdOffset says that the directory's place is in a footer, which only compressed extents have"
        subject.error(
            "bad-header", what, "nothing of the extent can be read", "no footer is there", at=GD_OFFSET_AT
        )
        return
    if not directories.load():
        return
    tables, twins = directories.tables, directories.twins
    begins, ends = merged(directories.ranges)
    rules = Rules(
        subject=subject,
        grain=header.grain_sectors,
        unit=header.grain_sectors,
        total=-(-header.capacity_sectors // header.grain_sectors),
        visible=header.capacity_sectors if subject.sectors is None else subject.sectors,
        lowest=max(int(ends[0]), 2),
        codes=2,
        begins=begins,
        ends=ends,
        zeros_declared=header.zeroed_grains,
        unclean=header.unclean,
        overhead=header.overhead_sectors,
    )
    found = survey(rules, tables, twins)
    overhead_wrong = is_overhead_wrong(header, found, sectors)
    if not overhead_wrong and header.overhead_sectors > rules.lowest:
        rules.lowest = header.overhead_sectors
        if found.before:
            found = survey(rules, tables, twins)
    space = Space(subject, header.grain)
    if found.last + rules.unit > sectors:
        space.blocked = "first the entries that name grains behind the end of the file must be mended"
    pairs = Twins(rules, tables, twins, found)
    directories.report(space, pairs.no_grain_lost)
    outcome = pairs.report()
    report_shared(rules, tables, twins, found, space, outcome.mended)
    if overhead_wrong:
        report_overhead(subject, header, found, int(ends[0]), int(ends[-1]))
    _report_misaligned(rules, found, tables.entries)
    report_zeros(rules, header, found, tables.entries)
    if not directories.damaged:
        report_unused(rules, found)
    subject.check_whole_sectors(tail_is_data=found.last + rules.unit > sectors)


def _report_misaligned(rules: Rules, found: Survey, entries: int) -> None:
    if found.misaligned:
        table, entry = divmod(found.first_misaligned, entries)
        rules.subject.warning(
            "grain-misaligned",
            f"{found.misaligned} grains do not begin at a multiple of {format_size(rules.grain * SECTOR)}",
            "none; reading and writing may be slower",
            "none is needed; converting the image gives one that is aligned",
            table=table,
            entry=entry,
            guest=rules.guest(found.first_misaligned),
        )


def report_unused(rules: Rules, found: Survey) -> None:
    """Room that nothing uses, as far as it costs space: what was trimmed is mostly a hole of the file."""
    storage = rules.subject.storage
    if found.problems or found.conflicts:
        return  # what looks unused may be what a damaged entry should name
    wasted = sum(
        length
        for begin, end in found.gaps
        for length, is_data in storage.segments(begin * SECTOR, (end - begin) * SECTOR)
        if is_data
    )
    if wasted >= rules.unit * SECTOR:
        way = "nbd-vmdk compact gives them back"
        if rules.subject.file.folder.read_only is not None:
            way = "converting the image gives a compact one"
        rules.subject.warning(
            "unused-space",
            f"{format_size(wasted)} of the file belong to no grain",
            "none: the file is larger than it needs to be",
            f"none is needed; {way}",
            at=found.gaps[0][0] * SECTOR,
        )


def _report_text_mode(subject: Subject, header: HostedHeader, head: bytes) -> None:
    found = head[NEWLINES_AT : NEWLINES_AT + len(NEWLINES)]
    repair: Repair | str = Repair(
        "restore the check bytes: all else that can be verified is sound",
        (subject.write(NEWLINES_AT, NEWLINES, Stage.FLAGS),),
    )
    if subject.unmendable:
        repair = "the file is damaged elsewhere, too: copy it again in binary mode"
    elif header.compressed and not subject.context.data:
        repair = "only if all grains are sound: check and repair with --data"
    subject.error(
        "text-mode",
        f"the header's line-end bytes are {found.hex(' ')}: a transfer in text mode changes them",
        "such a transfer damages all of the file",
        repair,
        at=NEWLINES_AT,
    )


def _report_unclean(subject: Subject) -> None:
    subject.warning(
        "unclean",
        "the file was not closed cleanly the last time it was written",
        "what was written last, and never flushed, may be lost",
        "it stays as a mark until the errors in the file are mended"
        if subject.unmendable
        else Repair("clear the mark", (subject.write(UNCLEAN_AT, b"\0", Stage.FLAGS),)),
        at=UNCLEAN_AT,
    )
