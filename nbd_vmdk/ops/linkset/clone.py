"""Copying an image with all its parents, file by file, into one folder and under names of their own.

Every link stays the link it is, with what it holds and its content ID; only names change, and the UUIDs by
which products tell disks apart.  All files appear at once, the descriptor of the top link last.
"""

import logging
import os
import random
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import InUse, Unsupported, WriteRefused
from nbd_vmdk.link import Link
from nbd_vmdk.ondisk.descriptor import Descriptor
from nbd_vmdk.ondisk.descriptor_build import random_uuid
from nbd_vmdk.opening import open_in
from nbd_vmdk.ops.convert import final_names
from nbd_vmdk.ops.copy import Progress
from nbd_vmdk.ops.linkset.copying import Copier
from nbd_vmdk.ops.linkset.names import chain_names, new_names, target_path, with_names
from nbd_vmdk.ops.rewrite import real_path
from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.names import final_name
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.storage.newfiles import NewFiles

log = logging.getLogger("nbd_vmdk")

#: Keys with a UUID of the disk as VMware writes it, and as VirtualBox does; the latter link a chain.
_VMWARE_UUID: Final = "ddb.uuid"
_UUIDS: Final = ("ddb.uuid.image", "ddb.uuid.parent", "ddb.uuid.modification", "ddb.uuid.parentmodification")


@dataclass(slots=True)
class Cloned:
    """What cloning does, or did: the new top link, and which file became which, top link first."""

    image: str
    files: list[tuple[str, str]] = field(default_factory=list)
    bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "image": self.image,
            "files": [{"from": old, "to": new} for old, new in self.files],
            "bytes": self.bytes,
        }


def clone(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Cloned:
    """Copy the image ``source`` and all its parents; the copy of its top link is ``target``, or in there.

    ``options`` are allow_dirs of OpenOptions.  Raises InUse while one of them is written, FileExists,
    WriteRefused for files outside the folders of their links, and what opening the chain raises; then there
    is no new file.
    """
    opening = files.opening(options)
    warnings: list[str] = []
    folder, name = LocalFolder.for_image(files.image_in(source, opening, warnings), opening.allow_dirs)
    for warning in warnings:
        log.warning("%s", warning)
    path = target_path(target, name)
    with ExitStack() as held:
        disk = held.enter_context(open_in(folder, name, opening))
        _check(disk)
        mains = [os.path.basename(link.name) for link in disk.links]
        home = os.path.dirname(path)
        there = LocalFolder.for_image(path)[0].names()
        chosen = chain_names(mains, os.path.basename(path), there)
        found = Cloned(path)
        found.bytes = sum(storage.size for link in disk.links for storage in link.storages)
        uuids: dict[str, str] = {}
        work: list[tuple[Link, dict[str, str], Descriptor]] = []
        for depth, link in enumerate(disk.links):
            descriptor = link.descriptor
            assert descriptor is not None
            descriptor = _renewed(descriptor.without_ctk(), uuids)
            paths = _paths(link)
            names = new_names(link, paths, mains[depth], chosen[depth])
            hint = chosen[depth + 1] if depth + 1 < len(disk.links) else None
            work.append((link, names, with_names(descriptor, link, names, hint=hint)))
            found.files += [(old, os.path.join(home, names[os.path.basename(old)])) for old in paths]
        new_paths = [new for _old, new in found.files]
        if len(set(new_paths)) != len(new_paths):
            raise WriteRefused(path, why="two files of the chain would get the same name")
        if not dry_run:
            with NewFiles(path) as new, final_names(new.folder, path):
                for made in new_paths:
                    new.check_free(os.path.basename(made))
                copier = Copier(new, found.bytes, progress)
                for link, names, descriptor in reversed(work):
                    copier.link(link, names, descriptor)
                new.publish(main=chosen[0])
    return found


def _check(disk: Disk) -> None:
    for link in disk.links:
        if link.descriptor is None or not isinstance(link.folder, LocalFolder):
            raise Unsupported(
                link.name,
                what="only images in files with a descriptor are cloned",
                hint="nbd-vmdk convert makes a copy of anything",
            )
        if final_name(os.path.basename(link.name)) is not None:
            raise WriteRefused(link.name, why="another link is being merged into it")
        for storage in link.storages:
            if how := storage.writer():
                raise InUse(storage.name, how=how, hint="stop the other user: a copy of what changes is none")


def _paths(link: Link) -> list[str]:
    """The paths of the link's files, the main one last; WriteRefused if one is in another folder."""
    paths = [real_path(storage) for storage in {each.identity: each for each in link.storages}.values()]
    for path in paths:
        if os.path.dirname(path) != os.path.dirname(paths[0]):
            raise WriteRefused(
                link.name,
                why=f"one of its files, {path}, is in another folder",
                hint="nbd-vmdk convert makes a copy of anything",
            )
    return paths[::-1]


def _renewed(descriptor: Descriptor, uuids: dict[str, str]) -> Descriptor:
    """The descriptor with UUIDs of its own; ``uuids`` are the new ones of the chain by the old ones."""
    if descriptor.get(_VMWARE_UUID):
        descriptor = descriptor.set(_VMWARE_UUID, random_uuid())
    for key in _UUIDS:
        old = descriptor.get(key)
        if old and old.strip("0-"):
            new = uuids.setdefault(old, str(uuid.UUID(int=random.getrandbits(128), version=4)))
            descriptor = descriptor.set(key, new)
    return descriptor
