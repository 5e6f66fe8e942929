"""Where the header of a hosted extent says that things are: the descriptor, and the first grain."""

from dataclasses import replace
from typing import Final

from nbd_vmdk.errors import VmdkError
from nbd_vmdk.ondisk.descriptor import Descriptor
from nbd_vmdk.ondisk.hosted import DESCRIPTOR_OFFSET_AT, GD_AT_END, OVERHEAD_AT, HostedHeader
from nbd_vmdk.ops.check.context import Subject
from nbd_vmdk.ops.check.entries import Survey
from nbd_vmdk.ops.check.findings import Repair, Resize, Stage
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import SECTOR, align_up

#: Every writer puts the descriptor behind the header, and most keep so much room for it.
_USUAL_TEXT: Final = 1
_USUAL_ROOM: Final = 20


def _fault(storage: Storage, header: HostedHeader) -> str | None:
    """What is wrong with the descriptor's area, None if nothing is."""
    first, last = header.descriptor_sector, header.descriptor_sector + header.descriptor_sectors
    if last * SECTOR > storage.size:
        return "reaches behind the end of the file"
    places = {"overHead": header.overhead_sectors}
    if not header.compressed:
        places |= {"gdOffset": header.directory_sector, "rgdOffset": header.redundant_sector}
    for name, sector in places.items():
        if first < sector < last and sector != GD_AT_END:
            return f"reaches into {name}"
    return "is among the grains" if 1 < header.overhead_sectors <= first else None


def with_text(storage: Storage, header: HostedHeader) -> HostedHeader | None:
    """The header with the descriptor's true place: its own, or the usual one if a descriptor is there.

    None if there is no room for a descriptor at all.
    """
    if not header.descriptor_sector:
        return None
    if _fault(storage, header) is None:
        return header
    places = (header.overhead_sectors, header.directory_sector, header.redundant_sector)
    behind = min(sector for sector in (*places, _USUAL_TEXT + _USUAL_ROOM) if sector > _USUAL_TEXT)
    usual = replace(header, descriptor_sector=_USUAL_TEXT, descriptor_sectors=behind - _USUAL_TEXT)
    if _fault(storage, usual) is not None:
        return None
    try:
        Descriptor.parse(storage.read(SECTOR, usual.descriptor_sectors * SECTOR), storage.name)
    except VmdkError:
        return None
    return usual


def check_text_area(subject: Subject, header: HostedHeader) -> HostedHeader:
    """Check the room for the descriptor: in the file, and before whatever lies behind it.

    Returns the header to go on with, which knows the true place, or of none.
    """
    fault = _fault(subject.storage, header) if header.descriptor_sector else None
    if fault is None:
        return header
    usual = with_text(subject.storage, header)
    repair: Repair | str = "where the descriptor is, if it is anywhere, is not known"
    if usual is not None:
        words = (usual.descriptor_sector, usual.descriptor_sectors)
        data = b"".join(word.to_bytes(8, "little") for word in words)
        write = subject.write(DESCRIPTOR_OFFSET_AT, data, Stage.POINTERS)
        repair = Repair(f"say that it is at sector {words[0]}, where there is one", (write,))
    subject.error(
        "descriptor-area",
        f"the descriptor's area, sectors {header.descriptor_sector}+{header.descriptor_sectors}, {fault}",
        "readers do not find the descriptor, or a longer one destroys tables",
        repair,
        at=DESCRIPTOR_OFFSET_AT,
    )
    return usual or replace(header, descriptor_sector=0, descriptor_sectors=0)


def is_overhead_wrong(header: HostedHeader, found: Survey, sectors: int) -> bool:
    """Whether the field overHead is wrong, rather than the entries that name grains before it."""
    return header.overhead_sectors > sectors or found.before * 2 > found.used


def report_overhead(subject: Subject, header: HostedHeader, found: Survey, front: int, behind: int) -> None:
    """Report a wrong overHead, or a file that ends before it.

    ``front`` is the end of what lies at the file's beginning, ``behind`` that of all tables.
    """
    overhead, size = header.overhead_sectors, subject.storage.size
    grain = header.grain_sectors
    if not found.before and (overhead * SECTOR <= size or overhead <= align_up(behind, grain) + grain):
        if overhead * SECTOR > size:
            subject.error(
                "tables-cut-off",
                f"the file ends before sector {overhead}, where its grains should begin",
                "readers refuse the file",
                "tables are cut off as well"
                if subject.unmendable
                else Repair("lengthen the file to there", (Resize(subject.file, overhead * SECTOR),)),
                at=OVERHEAD_AT,
            )
        return
    right = min(found.first, align_up(front, grain))
    data = right.to_bytes(8, "little")
    subject.error(
        "bad-header",
        f"overHead is {overhead}, but grains can begin at sector {right}",
        "grains before it can't be read",
        Repair("set overHead to where grains begin", (subject.write(OVERHEAD_AT, data, Stage.POINTERS),)),
        at=OVERHEAD_AT,
    )
