"""An extent line against its file: is it there, and does its size agree."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from nbd_vmdk.errors import VmdkError
from nbd_vmdk.look import EXTENT_SUFFIX, head_of
from nbd_vmdk.ondisk.descriptor import Descriptor, ExtentLine, last_component
from nbd_vmdk.ondisk.hosted import parse_header
from nbd_vmdk.ondisk.probe import FileKind, identify
from nbd_vmdk.ops.check.context import Subject
from nbd_vmdk.ops.check.findings import Repair, Text
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.units import SECTOR, align_up

#: Kinds of extent with tables, and what a descriptor calls them.
SPARSE_KINDS: Final = {FileKind.HOSTED: "SPARSE", FileKind.COWD: "VMFSSPARSE", FileKind.SESPARSE: "SESPARSE"}
NOT_OPEN: Final = "the image can't be opened"


def report_missing(link: Subject, text: Text, folder: Folder, line: ExtentLine, start: int) -> None:
    """Report an extent that is not there, or has another name now."""
    repair: Repair | str = "copy it beside the descriptor"
    found = list(_renamed(folder, text.descriptor, line))
    if len(found) == 1:
        index = text.descriptor.extents.index(line)
        asks = f"that {found[0]} is this extent can't be told from its contents alone"
        repair = text.repair(
            f"name {found[0]} in the descriptor", lambda old: old.set_extent_name(index, found[0]), asks
        )
    what = f"line {line.line}: the extent {line.name} is not there"
    link.error("extent-missing", what, NOT_OPEN, repair, guest=start)


def _renamed(folder: Folder, descriptor: Descriptor, line: ExtentLine) -> Iterator[str]:
    """Files beside the descriptor that can be the extent and that no line names."""
    suffix = EXTENT_SUFFIX.search(line.name or "")
    known = {last_component(other.name) for other in descriptor.extents if other.name}
    for name in folder.names():
        match = EXTENT_SUFFIX.search(name)
        if suffix is None or match is None or match[0].lower() != suffix[0].lower() or name in known:
            continue
        try:
            storage = folder.open(name)
        except VmdkError:
            continue
        try:
            if _can_be(storage, line):
                yield name
        except VmdkError:
            continue
        finally:
            storage.close()


def _can_be(storage: Storage, line: ExtentLine) -> bool:
    """Whether a file can be the extent of a line, by its size or its header."""
    if line.is_raw:
        return storage.size == (line.offset_sectors + line.sectors) * SECTOR
    head = head_of(storage)
    kind = identify(head)
    if kind is not FileKind.HOSTED:
        return SPARSE_KINDS.get(kind) == line.type
    header = parse_header(head, storage.name)
    fits = line.sectors <= header.capacity_sectors < line.sectors + header.grain_sectors
    return line.type == "SPARSE" and fits


def check_size(subject: Subject, text: Text, line: ExtentLine, capacity: int, grain: int) -> None:
    """Check the size in the descriptor: up to a grain less than the extent has, and never more."""
    said = f"line {line.line} of the descriptor says {line.sectors} sectors, the extent's header {capacity}"
    if line.sectors > align_up(capacity, grain):

        def believe_header(old: Descriptor) -> Descriptor:
            index = text.descriptor.extents.index(line)
            extents = list(old.extents)
            extents[index] = replace(extents[index], sectors=capacity)
            return old.replace_extents(extents)

        asks = "which of the two is right is not known, and the disk becomes smaller"
        repair = text.repair("believe the extent's header", believe_header, asks)
        subject.error("size-differs", said, "readers refuse it, or show another size", repair)
    elif line.sectors <= capacity - grain:
        effect = "what the extent has behind that is not shown"
        which = (
            "which of the two is right is not known; after a resize that was stopped, the same one goes on"
        )
        subject.warning("size-differs", said, effect, which)
