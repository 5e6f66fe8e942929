"""What an image is: kind, sizes, extents, chain; and for what can't be opened, all that can be known.

Keys are qemu-img info's where the fact is the same, so that its users' scripts read ours; the rest is added
beside them.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from nbd_vmdk.cache import Cache
from nbd_vmdk.chain import follow_chain
from nbd_vmdk.errors import FileMissing, VmdkError
from nbd_vmdk.extents.base import Extent
from nbd_vmdk.extents.cowd import CowdExtent
from nbd_vmdk.extents.hosted import HostedExtent
from nbd_vmdk.extents.stream import StreamExtent
from nbd_vmdk.link import Link, occupied
from nbd_vmdk.look import head_of, read_descriptor
from nbd_vmdk.ondisk.descriptor import Descriptor, ExtentLine
from nbd_vmdk.ondisk.hosted import parse_header
from nbd_vmdk.ondisk.probe import FileKind, identify
from nbd_vmdk.opener import own_line
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.refusal import suggest
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.units import MIB, SECTOR
from nbd_vmdk.vm import FoundDisk, find_disks, locate

_CACHE = MIB
_DDB_FACTS = {
    "adapter-type": "ddb.adapterType",
    "hardware-version": "ddb.virtualHWVersion",
    "tools-version": "ddb.toolsVersion",
    "uuid": "ddb.uuid",
}
_MAX_DIGITS = 20
_NOT_VMDK = (FileKind.OTHER, FileKind.EMPTY, FileKind.CHANGE_TRACKING)


def image_info(path: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """Describe the image ``path``; keywords are those of :class:`~nbd_vmdk.options.OpenOptions`.

    Nothing is locked and nothing is changed.  If the image can't be opened, ``error`` says why and the other
    facts are what could be found out all the same.  Raises nothing but OptionError.
    """
    chosen = OpenOptions.of(**{**options, "locks": False, "writable": False, "cache_size": _CACHE})
    facts: dict[str, Any] = {"schema": 1, "filename": os.fspath(path)}
    links: list[Link] = []
    try:
        found = locate(path, allow_dirs=chosen.allow_dirs, allow_devices=chosen.allow_devices)
    except VmdkError as error:
        return facts | _several(path, chosen) | {"error": _told(error)}
    folder, name = found.folder, found.file
    fault: VmdkError | None = None
    try:
        links.extend(follow_chain(folder, name, chosen, Cache(_CACHE)))
    except VmdkError as error:
        fault = error
        # Once more, as far down the chain as it goes, without holding content IDs against it.
        _close(links)
        links = []
        with contextlib.suppress(VmdkError):
            links.extend(follow_chain(folder, name, replace(chosen, ignore_cid=True), Cache(_CACHE)))
    try:
        facts |= _of_links(links) if links else _of_file(folder, name)
    finally:
        _close(links)
    if found.warnings:
        facts["warnings"] = [*found.warnings, *facts.get("warnings", ())]
    if fault is not None:
        facts["error"] = _told(fault)
    return facts


def _told(fault: VmdkError) -> dict[str, object]:
    if isinstance(fault, FileMissing):
        suggest(fault)
    return fault.as_dict()


def _several(path: str | os.PathLike[str], options: OpenOptions) -> dict[str, Any]:
    """The disks behind a path that leads to more than one, with the word for each."""
    try:
        found = find_disks(path, allow_dirs=options.allow_dirs, allow_devices=options.allow_devices)
    except VmdkError:
        return {}
    return {"disks": [_one_of_several(disk) for disk in found]} if len(found) > 1 else {}


def _one_of_several(disk: FoundDisk) -> dict[str, Any]:
    descriptor = read_descriptor(disk.folder, disk.file) if disk.fault is None else None
    return {
        "name": disk.place or disk.name,
        "virtual-size": None if descriptor is None else descriptor.total_sectors * SECTOR,
        "filename": disk.path,
        "state": "there" if disk.fault is None else disk.fault.message,
    }


def _close(links: Sequence[Link]) -> None:
    for link in links:
        link.close()


def _of_links(links: Sequence[Link]) -> dict[str, Any]:
    top = links[0]
    facts: dict[str, Any] = {
        "format": "vmdk",
        "virtual-size": top.size,
        "actual-size": occupied(storage for link in links for storage in link.storages),
    }
    if top.grain:
        facts["cluster-size"] = top.grain
    data: dict[str, Any] = {"create-type": top.create_type}
    if top.descriptor is not None:
        data |= _content_ids(top.descriptor)
    data["extents"] = [_extent(entry.extent, entry.access) for entry in top.extents]
    facts["format-specific"] = {"type": "vmdk", "data": data}
    facts["dirty-flag"] = any(
        isinstance(entry.extent, HostedExtent | StreamExtent | CowdExtent) and entry.extent.header.unclean
        for entry in top.extents
    )
    if top.descriptor is not None:
        facts |= _parent_facts(top.descriptor, links)
        facts |= _ddb(links)
    facts["chain"] = [_in_chain(link, links[depth + 1 :]) for depth, link in enumerate(links)]
    facts["warnings"] = [warning for link in links for warning in link.warnings]
    return facts


def _content_ids(descriptor: Descriptor) -> dict[str, Any]:
    ids = {"cid": descriptor.cid, "parent-cid": descriptor.parent_cid}
    return {key: value for key, value in ids.items() if value is not None}


def _extent(extent: Extent, access: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"virtual-size": extent.size, "format": _format(extent), "access": access}
    if extent.storage is not None:
        facts["filename"] = extent.storage.name
        facts["actual-size"] = extent.storage.allocated
    if extent.grain:
        facts["cluster-size"] = extent.grain
    return facts


def _format(extent: Extent) -> str:
    """What the file is, which its extent line need not say truly."""
    if isinstance(extent, StreamExtent):
        return "SPARSE compressed"
    if isinstance(extent, HostedExtent):
        return f"SPARSE v{extent.header.version}"
    return extent.type_word


def _parent_facts(descriptor: Descriptor, links: Sequence[Link]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if descriptor.has_parent and descriptor.parent_hint is not None:
        facts["backing-filename"] = descriptor.parent_hint
    if len(links) > 1:
        facts["full-backing-filename"] = links[1].name
        facts["backing-filename-format"] = "vmdk"
    return facts


def _ddb(links: Sequence[Link]) -> dict[str, Any]:
    """Facts of the disk database; a delta inherits what it does not say, as VMware reads it."""

    def lookup(key: str) -> str | None:
        for link in links:
            value = link.descriptor.get(key) if link.descriptor is not None else None
            if value is not None:
                return value
        return None

    facts: dict[str, Any] = {name: value for name, key in _DDB_FACTS.items() if (value := lookup(key))}
    geometry = {
        part: int(value)
        for part in ("cylinders", "heads", "sectors")
        # Python refuses to convert thousands of digits.
        if (value := lookup(f"ddb.geometry.{part}")) and value.isdecimal() and len(value) < _MAX_DIGITS
    }
    if geometry:
        facts["geometry"] = geometry
    return facts


def _in_chain(link: Link, below: Sequence[Link]) -> dict[str, Any]:
    """One link of the chain; ``agrees`` tells whether its parent still has the content ID it expects."""
    facts: dict[str, Any] = {
        "filename": link.name,
        "create-type": link.create_type,
        "virtual-size": link.size,
        "actual-size": link.actual_size,
    }
    if link.descriptor is not None:
        facts |= _content_ids(link.descriptor)
        if link.descriptor.has_parent:
            facts["agrees"] = bool(below) and below[0].cid == link.descriptor.parent_cid
    return facts


def _of_file(folder: Folder, name: str) -> dict[str, Any]:
    """What can be said of an image whose top link can't be opened."""
    try:
        storage = folder.open(name)
    except VmdkError:
        return {}
    try:
        facts: dict[str, Any] = {"actual-size": storage.allocated}
        head = head_of(storage)
    except VmdkError:
        return {}
    finally:
        storage.close()
    kind = identify(head)
    facts["file-kind"] = kind.value
    if kind not in (*_NOT_VMDK, FileKind.TAR):
        facts["format"] = "vmdk"
    descriptor = read_descriptor(folder, name)
    if descriptor is not None:
        facts["virtual-size"] = descriptor.total_sectors * SECTOR
        data: dict[str, Any] = {"create-type": descriptor.create_type, **_content_ids(descriptor)}
        data["extents"] = list(_named_extents(folder, name, descriptor, head))
        facts["format-specific"] = {"type": "vmdk", "data": data}
        if descriptor.has_parent and descriptor.parent_hint is not None:
            facts["backing-filename"] = descriptor.parent_hint
    return facts


def _own_line(name: str, descriptor: Descriptor, head: bytes) -> ExtentLine | None:
    """The line that means the file itself, which begins with ``head``; None if none does."""
    lines = [line for line in descriptor.extents if line.sectors]
    if identify(head) is not FileKind.HOSTED or not lines:
        return None
    try:
        header = parse_header(head, name)
    except VmdkError:
        return None
    return None if header.is_wrapper else own_line(name, lines, header)


def _named_extents(
    folder: Folder, name: str, descriptor: Descriptor, head: bytes
) -> Iterator[dict[str, Any]]:
    """What the descriptor of the file ``name``, which begins with ``head``, says of its extents."""
    own = _own_line(name, descriptor, head)
    for line in descriptor.extents:
        facts: dict[str, Any] = {
            "virtual-size": line.sectors * SECTOR,
            "format": line.type,
            "access": line.access,
        }
        if line is own:
            facts |= {"filename": folder.label(name), "state": "there"}
        elif line.name is not None:
            facts["filename"] = line.name
            try:
                folder.open(line.name).close()
                facts["state"] = "there"
            except VmdkError as error:
                facts["state"] = error.message
        yield facts
