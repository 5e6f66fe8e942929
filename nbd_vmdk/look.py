"""A first look at files that may be links: which there are, what describes them, what names may mean.

Nothing here opens a disk: that is the opener's work, which begins with what is found here.
"""

import re
from collections.abc import Iterator
from contextlib import closing

from nbd_vmdk.errors import Truncated, VmdkError
from nbd_vmdk.ondisk import hosted
from nbd_vmdk.ondisk.descriptor import (
    MAX_DESCRIPTOR,
    Descriptor,
    is_absolute,
    last_component,
    windows_to_posix,
)
from nbd_vmdk.ondisk.probe import PROBE_LENGTH, FileKind, identify
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.units import SECTOR

#: What is put behind a disk's name to name its extents.
EXTENT_SUFFIX = re.compile(r"(?:-[sf]\d{3,}|-flat|-delta|-sesparse)(?=\.vmdk$)", re.IGNORECASE)
#: The end of the names that VMware gives to the files of a snapshot.
DELTA_NAME = re.compile(r"-\d{6}(?:-s\d{3,}|-delta|-sesparse)?\.vmdk$", re.IGNORECASE)


def head_of(storage: Storage) -> bytes:
    """The first bytes of a file, as many as tell what it is."""
    return storage.read(0, min(PROBE_LENGTH, storage.size))


def kind_of(folder: Folder, name: str) -> FileKind | None:
    """What a file in ``folder`` is; None if it can't be read."""
    try:
        with closing(folder.open(name)) as storage:
            return identify(head_of(storage))
    except VmdkError:
        return None


def embedded_text(storage: Storage, header: hosted.HostedHeader) -> bytes:
    """The descriptor inside a hosted sparse extent, without its padding; empty if there is none.

    QEMU reserves the room for one in the extents of split disks and leaves it all NULs.  Of a text that is
    too long for a descriptor there is one byte more than any may have, so that parsing it tells.
    """
    if not header.descriptor_sector:
        return b""
    at = header.descriptor_sector * SECTOR
    length = min(header.descriptor_sectors * SECTOR, hosted.MAX_DESCRIPTOR + 1, storage.size - at)
    if length <= 0:
        raise Truncated(storage.name, what="its descriptor", need=at + SECTOR, have=storage.size)
    return storage.read(at, length).partition(b"\0")[0]


def read_descriptor(folder: Folder, name: str) -> Descriptor | None:
    """The descriptor of a file in ``folder``, of its own or embedded; None if there is none to read."""
    try:
        with closing(folder.open(name)) as storage:
            head = head_of(storage)
            if head.startswith(hosted.MAGIC):
                text = embedded_text(storage, hosted.parse_header(head, storage.name))
            elif identify(head) is FileKind.DESCRIPTOR:
                text = storage.read(0, min(storage.size, MAX_DESCRIPTOR))
            else:
                return None
            return Descriptor.parse(text, storage.name) if text else None
    except VmdkError:
        return None


def vmdk_names(folder: Folder) -> list[str]:
    """The names in a folder that may be links', in the order in which to look: those like extents' come last.

    A split disk of some TiB has a thousand extents, and one small file that tells of them.
    """
    names = [name for name in folder.names() if name.lower().endswith(".vmdk")]
    return sorted(names, key=lambda name: EXTENT_SUFFIX.search(name) is not None)


def descriptors_in(folder: Folder) -> Iterator[tuple[str, Descriptor]]:
    """The links in a folder, by name.

    However many they are: a child that is not looked at would not protect its parent.
    """
    for name in vmdk_names(folder):
        descriptor = read_descriptor(folder, name)
        if descriptor is not None:
            yield name, descriptor


def spellings(name: str) -> Iterator[str]:
    """How a name may be meant: as written, with slashes turned, or, if it is absolute, beside."""
    yield name
    if "\\" in name:
        yield windows_to_posix(name)
    if is_absolute(name):
        yield last_component(name)


def find_owner(folder: Folder, name: str) -> str | None:
    """The descriptor in ``folder`` that names ``name`` as one of its extents, or None."""
    guess = EXTENT_SUFFIX.sub("", name)
    siblings = [sibling for sibling in vmdk_names(folder) if sibling != name]
    for sibling in sorted(siblings, key=lambda sibling: sibling != guess):
        descriptor = read_descriptor(folder, sibling)
        if (
            descriptor is not None
            and any(
                line.name is not None and last_component(line.name) == name for line in descriptor.extents
            )
            and not (len(descriptor.extents) == 1 and has_tables(folder, sibling))
        ):
            return sibling
    return None


def has_tables(folder: Folder, name: str) -> bool:
    """Whether a file is itself the only extent that its descriptor names, whatever it calls it."""
    try:
        with closing(folder.open(name)) as storage:
            head = head_of(storage)
            return head.startswith(hosted.MAGIC) and not hosted.parse_header(head, storage.name).is_wrapper
    except VmdkError:
        return False
