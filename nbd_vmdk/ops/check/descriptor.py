"""What a descriptor must say of itself, how its text is changed, and how a lost one is made anew."""

import re
from typing import Final

from nbd_vmdk.errors import FileMissing, TrustError, VmdkError
from nbd_vmdk.look import DELTA_NAME, descriptors_in
from nbd_vmdk.ondisk.descriptor import (
    FRESH_CID,
    NO_PARENT,
    Descriptor,
    ExtentLine,
    build_descriptor,
    last_component,
    random_cid,
)
from nbd_vmdk.ondisk.descriptor_text import HEX32
from nbd_vmdk.ondisk.hosted import MAX_DESCRIPTOR, HostedHeader
from nbd_vmdk.ops.check.context import Subject
from nbd_vmdk.ops.check.findings import Repair, Stage, Text
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.units import SECTOR

_CID: Final = re.compile(rb"(?<![A-Za-z])CID\s*=\s*([0-9a-f]{1,8})", re.IGNORECASE)
_PARENT_CID: Final = re.compile(rb"parentCID\s*=\s*([0-9a-f]{1,8})", re.IGNORECASE)
_HINT: Final = re.compile(rb'parentFileNameHint\s*=\s*"([^"\0\r\n]+)"', re.IGNORECASE)
_PIECE: Final = re.compile(r"-s\d{3,}\.vmdk$", re.IGNORECASE)


def check_descriptor(subject: Subject, text: Text, folder: Folder) -> None:
    """Check the content IDs and the change tracking of a descriptor."""
    _check_content_ids(subject, text)
    _check_tracking(subject, text, folder)


def _check_content_ids(subject: Subject, text: Text) -> None:
    descriptor = text.descriptor
    cid = descriptor.cid
    if cid is None:
        effect = "a snapshot of this disk can't tell whether the disk was changed"
        subject.warning("bad-cid", "the descriptor has no content ID", effect, "none can be made up")
        return
    if cid == NO_PARENT:
        new = f"{random_cid(descriptor.cid_digits):0{descriptor.cid_digits}x}"
        effect = "readers take a snapshot of this disk for one without a parent"
        what = "the content ID is ffffffff, which means that there is none"
        repair = text.repair("give it a new content ID", lambda old: old.set("CID", new))
        subject.warning("bad-cid", what, effect, repair)
        return
    long_id = descriptor.long_content_id or ""
    # VMware's own libraries leave the end that a fresh disk has as it is.
    if HEX32.fullmatch(long_id) and int(long_id[-8:], 16) not in (cid, FRESH_CID):
        whole = f"{long_id[:-8]}{cid:08x}"
        what = f"ddb.longContentID ends in {long_id[-8:]}, and the content ID is {cid:08x}"
        effect = "none for the guest; a product may take one for stale"
        repair = text.repair("make its end the content ID", lambda old: old.set("ddb.longContentID", whole))
        subject.warning("long-content-id", what, effect, repair)


def _check_tracking(subject: Subject, text: Text, folder: Folder) -> None:
    path = text.descriptor.change_track_path
    if path is None or _is_there(folder, path) or _is_there(folder, last_component(path)):
        return
    subject.warning(
        "tracking-file",
        f"the change-tracking file {path} is not there",
        "none for the guest; some products refuse the disk",
        text.repair("take change tracking out of the descriptor", Descriptor.without_ctk),
    )


def _is_there(folder: Folder, name: str) -> bool:
    try:
        folder.open(name).close()
    except (FileMissing, TrustError):
        return False
    except VmdkError:
        return True  # it is there, and something else is the matter with it
    return True


def report_lost(
    subject: Subject,
    there: HostedHeader | None,
    header: HostedHeader,
    folder: Folder,
    name: str,
    why: str | None,
) -> None:
    """Report the descriptor of a monolithic extent that is lost (``why`` None) or can't be understood.

    ``there`` is the header that knows the descriptor's true place, None if it has none.
    """
    if header.descriptor_sector and not (why is None and _PIECE.search(name)):
        what = why or "its descriptor is lost: where it should be is nothing"
        effect = "it can't be written, and has no parent"
        at = header.descriptor_sector * SECTOR
        repair: Repair | str = "the header has no place for one"
        if there is not None:
            at = there.descriptor_sector * SECTOR
            length = min(there.descriptor_sectors * SECTOR, MAX_DESCRIPTOR, subject.storage.size - at)
            area = subject.storage.read(at, length)
            repair = _rebuilt(subject, there, folder, name, area)
        subject.error("descriptor-lost", what, effect, repair, at=at)
        return
    subject.warning(
        "no-descriptor",
        "an extent without its descriptor",
        "it can only be read, as it is; what its holes show may be in a parent that is not known",
        "the descriptor must be found",
    )


def _rebuilt(subject: Subject, header: HostedHeader, folder: Folder, name: str, area: bytes) -> Repair | str:
    """A descriptor made from the header and from what is left of the old one."""
    if subject.storage.size % SECTOR:
        return "the file is no whole number of sectors: bytes are missing, not only the descriptor"
    found = {
        key: pattern.search(area)
        for key, pattern in (("cid", _CID), ("parent", _PARENT_CID), ("hint", _HINT))
    }
    words = {key: match[1].decode("latin-1") for key, match in found.items() if match}
    parent = int(words.get("parent", "ffffffff"), 16)
    if parent == NO_PARENT and (DELTA_NAME.search(name) or "hint" in words):
        return "it is a snapshot's, and its parent is not known: the descriptor must be found"
    if parent != NO_PARENT and "hint" not in words:
        return (
            f"it has a parent with content ID {parent:08x}, whose name is lost: the descriptor must be found"
        )
    cid = int(words["cid"], 16) if "cid" in words else _cid_by_children(folder, name)
    compressed = header.compressed
    try:
        text = build_descriptor(
            create_type="streamOptimized" if compressed else "monolithicSparse",
            extents=[ExtentLine("RW", header.capacity_sectors, "SPARSE", name)],
            cid=FRESH_CID if cid is None or cid == NO_PARENT else cid,
            parent_cid=parent,
            parent_hint=words.get("hint") if parent != NO_PARENT else None,
            ddb={"ddb.adapterType": "lsilogic"},
            embedded=True,
        )
    except ValueError as error:
        return str(error)
    if len(text) > len(area):
        return "the descriptor's area has no room for one"
    at = header.descriptor_sector * SECTOR
    change = subject.write(at, text.ljust(len(area), b"\0"), Stage.POINTERS)
    asks = None if "parent" in words else "whether the disk is a snapshot, and of what, is not known any more"
    return Repair("make a minimal descriptor; its adapter type is a guess", (change,), asks)


def _cid_by_children(folder: Folder, name: str) -> int | None:
    """The content ID that snapshots of this disk expect it to have."""
    for sibling, child in descriptors_in(folder):
        if sibling != name and child.has_parent and last_component(child.parent_hint or "") == name:
            return child.parent_cid
    return None
