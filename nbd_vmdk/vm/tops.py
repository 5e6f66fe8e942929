"""The disks in a folder: every link that is no other's parent.

A folder of VMDKs holds disks, their extents, the parents of snapshots and files that track changes.  What is
a disk's extent or another link's parent is part of that; what holds no disk data is passed over; whatever is
left is a disk, or a file that somebody should know to be broken.
"""

from typing import Final

from nbd_vmdk.errors import OptionError
from nbd_vmdk.look import has_tables, kind_of, read_descriptor
from nbd_vmdk.ondisk.descriptor import Descriptor, last_component
from nbd_vmdk.ondisk.probe import FileKind
from nbd_vmdk.storage.folder import Folder

#: Links in one folder.  A datastore's folder has those of one machine: dozens.
_MAX_LINKS: Final = 2000


def find_tops(folder: Folder, names: list[str]) -> list[str]:
    """Those of the files ``names`` of ``folder`` that are disks by themselves, in the same order.

    What can't be read is among them, so that opening it says why.  OptionError if there are too many.
    """
    if len(names) > _MAX_LINKS:
        raise OptionError(
            folder.name, why=f"{len(names)} .vmdk files in one folder", hint="name the disks one by one"
        )
    links = {name: read_descriptor(folder, name) for name in names}
    parts: set[str] = set()
    for name, link in links.items():
        if link is not None:
            parts |= _extents(folder, name, link)
            parts |= _parents(name, link, links)
    return [
        name
        for name in names
        if name not in parts
        and (links[name] is not None or kind_of(folder, name) is not FileKind.CHANGE_TRACKING)
    ]


def _extents(folder: Folder, name: str, link: Descriptor) -> set[str]:
    """The other files that a link's extents are in.

    A monolithic one is its own extent whatever its line calls it: a copy's calls it as the original, which is
    a disk of its own.
    """
    others = {_beside(name, line.name) for line in link.extents if line.name is not None} - {name}
    if others and len(link.extents) == 1 and has_tables(folder, name):
        return set()
    return others


def _parents(name: str, link: Descriptor, links: dict[str, Descriptor | None]) -> set[str]:
    if not link.has_parent or link.parent_hint is None:
        return set()
    parent = _beside(name, link.parent_hint)
    there = links.get(parent)
    elsewhere = last_component(link.parent_hint) != link.parent_hint
    if parent == name or (elsewhere and (there is None or there.cid != link.parent_cid)):
        return set()  # a file of that name, but the link means one in another folder
    return {parent}


def _beside(name: str, other: str) -> str:
    """The name of the file that ``other`` leads to beside ``name``; archives have folders in their names."""
    folder, slash, _ = name.rpartition("/")
    return f"{folder}{slash}{last_component(other)}"
