"""A new child on an image, by the names and in the kind that VMware's products would give it."""

import os
import stat
from contextlib import ExitStack
from typing import Any, Final

from nbd_vmdk.errors import OptionError, StorageError, WriteRefused
from nbd_vmdk.ops.create import Created, create_image
from nbd_vmdk.ops.rewrite import real_path, sync_folder
from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.names import final_name, next_child, next_clone
from nbd_vmdk.ops.snapshot.tree import LinkFile

_WRITABLE: Final = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


def create_child(
    image: str | os.PathLike[str],
    child: str | os.PathLike[str] | None = None,
    *,
    protect: bool = False,
    **options: Any,
) -> Created:
    """Make an empty child link of ``image``; from now on writes belong into the child.

    Without ``child`` it gets the next free number beside ``image``; a folder as ``child`` gets a linked clone
    with the next free name.  ``protect`` takes the permission to write from the parent's files.  ``options``
    are those of create_image(), the kind among them, and allow_dirs.  Raises InUse while ``image`` is
    written, and what opening it or creating the child raises.
    """
    place = files.Place(image, files.opening({"allow_dirs": tuple(options.get("allow_dirs", ()))}))
    parent = place.link
    if final_name(parent.name) is not None:
        raise WriteRefused(parent.label, why="another link is being merged into it", hint="finish that first")
    path = _child_path(parent, None if child is None else os.fspath(child))
    made = create_image(path, parent=parent.path, **options)
    if protect:
        _protect(place)
    return made


def _child_path(parent: LinkFile, wanted: str | None) -> str:
    try:
        if wanted is None:
            return parent.folder.label(next_child(parent.name, parent.folder.names()))
        if wanted.endswith("/") or os.path.isdir(wanted):
            return os.path.join(wanted, next_clone(parent.name, os.listdir(wanted)))
    except ValueError as error:
        raise OptionError(None, why=str(error), hint="name the child yourself") from None
    except OSError as error:
        raise StorageError.of(error, wanted, "list") from error
    if not wanted.lower().endswith(".vmdk"):
        raise OptionError(None, why=f"{wanted} is no name of an image", hint="it should end in .vmdk")
    return wanted


def _protect(place: files.Place) -> None:
    with ExitStack() as held:
        disk = files.open_for_reading(held, place.link, place.options)
        for storage in disk.links[0].storages:
            path = real_path(storage)
            try:
                os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) & ~_WRITABLE)
            except OSError as error:
                raise StorageError.of(error, path, "take the permission to write away") from error
            sync_folder(os.path.dirname(path))
