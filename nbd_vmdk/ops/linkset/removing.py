"""Removing the files of a link so that no moment leaves a descriptor that names what is gone.

The descriptor first gets another name, by which nobody takes it for a disk, ``NAME.vmdk.deleting``; then the
extents go, and it goes last.  Stopped between, it still tells what is left to remove.
"""

import os
from collections.abc import Sequence
from typing import Final

from nbd_vmdk.errors import StorageError, VmdkError
from nbd_vmdk.look import find_owner
from nbd_vmdk.ondisk.descriptor import MAX_DESCRIPTOR, Descriptor
from nbd_vmdk.ops.rewrite import sync_folder
from nbd_vmdk.ops.snapshot.files import remove_files
from nbd_vmdk.ops.snapshot.tree import links_in
from nbd_vmdk.storage.localfolder import LocalFolder

#: What is put behind the name of a descriptor whose files are being removed.
DELETING: Final = ".deleting"


def remove_set(paths: Sequence[str]) -> None:
    """Remove all files of a link, the last of which is its descriptor; StorageError."""
    *others, main = paths
    if not others:
        remove_files([main])
        return
    marked = main + DELETING
    try:
        os.rename(main, marked)
    except OSError as error:
        raise StorageError.of(error, main, "remove") from error
    sync_folder(os.path.dirname(main))
    remove_files(others)
    remove_files([marked])


def left_of(path: str) -> list[str]:
    """The files that are left of the link ``path``, whose removal was stopped; empty if it was not.

    Only plain names of .vmdk files count that no descriptor in the folder names.
    """
    folder, name = LocalFolder.for_image(path)
    if name in folder.names() or name + DELETING not in folder.names():
        return []
    storage = folder.open(name + DELETING)
    try:
        text = storage.read(0, min(storage.size, MAX_DESCRIPTOR + 1))
    finally:
        storage.close()
    home = os.path.realpath(folder.name)
    try:
        descriptor = Descriptor.parse(text, storage.name)
    except VmdkError:
        descriptor = None  # it was not ours
    if descriptor is None:
        return []
    there = folder.names()
    names = [line.name for line in descriptor.extents if line.name is not None]
    tracking = descriptor.change_track_path
    if tracking is not None and tracking.endswith("-ctk.vmdk"):
        others = {link.descriptor.change_track_path for link in links_in(folder)}
        if tracking not in others:
            names.append(tracking)
    found = [
        os.path.join(home, each)
        for each in dict.fromkeys(names)
        if each in there and each.lower().endswith(".vmdk") and find_owner(folder, each) is None
    ]
    return [*found, os.path.join(home, name + DELETING)]
