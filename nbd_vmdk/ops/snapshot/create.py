"""A new child on an image, by the names and in the kind that VMware's products would give it."""

import os
import stat
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from typing import Any, Final

from nbd_vmdk.errors import FileMissing, OptionError, StorageError, WriteRefused
from nbd_vmdk.ops.create import Created, create_image
from nbd_vmdk.ops.rewrite import real_path, sync_folder
from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.machines import MachineFiles, Mention, find_mentions
from nbd_vmdk.ops.snapshot.names import final_name, next_child, next_clone
from nbd_vmdk.ops.snapshot.tree import LinkFile

_WRITABLE: Final = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Child(Created):
    """A child that was made.

    base      its parent's path, as a user would write it
    machines  the lines that name that as a machine's disk, or did
    """

    base: str
    machines: tuple[Mention, ...]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**Created.as_dict(self), "machines": [each.as_dict() for each in self.machines]}


def create_child(
    image: str | os.PathLike[str],
    child: str | os.PathLike[str] | None = None,
    *,
    protect: bool = False,
    edit_vm: bool = False,
    **options: Any,
) -> Child:
    """Make an empty child link of ``image``; from now on writes belong into the child.

    Without ``child`` it gets the next free number beside ``image``; a folder as ``child`` gets a linked clone
    with the next free name.  ``protect`` takes the permission to write from the parent's files; ``edit_vm``
    lets the machines that have ``image`` as their disk have the child.  ``options`` are those of
    create_image(), the kind among them, and allow_dirs.  Raises InUse while ``image`` is written, or with
    ``edit_vm`` while such a machine is open, and what opening it or creating the child raises.
    """
    place = files.Place(image, files.opening({"allow_dirs": tuple(options.get("allow_dirs", ()))}))
    parent = place.link
    if final_name(parent.name) is not None:
        raise WriteRefused(parent.label, why="another link is being merged into it", hint="finish that first")
    path = _child_path(parent, None if child is None else os.fspath(child))
    machines = find_mentions(place.recorded, parent.identity, path)
    with ExitStack() as held:
        changing = MachineFiles(held, machines if edit_vm else ())
        made = create_image(path, parent=parent.path, **options)
        try:
            changing.publish()
        except BaseException:
            # The machine goes on with the parent, and would make the child invalid: it is as if never made.
            if changing.are_as_before():
                with suppress(StorageError):
                    files.remove_files([os.path.abspath(file.path) for file in reversed(made.files)])
            raise
    if protect:
        _protect(place)
    known = {each.name: getattr(made, each.name) for each in fields(made)}
    return Child(**known, base=parent.label, machines=tuple(machines))


def _child_path(parent: LinkFile, wanted: str | None) -> str:
    try:
        if wanted is None:
            return parent.folder.label(next_child(parent.name, parent.folder.names()))
        if wanted.endswith("/") or os.path.isdir(wanted):
            return os.path.join(wanted, next_clone(parent.name, os.listdir(wanted)))
    except ValueError as error:
        raise OptionError(None, why=str(error), hint="name the child yourself") from None
    except FileNotFoundError as error:
        raise FileMissing(wanted, hint="make that folder first") from error
    except OSError as error:
        raise StorageError.of(error, wanted, "list") from error
    if not wanted.lower().endswith(".vmdk"):
        hint = "it should end in .vmdk, or be a folder that is there"
        raise OptionError(None, why=f"{wanted} is no name of an image", hint=hint)
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
