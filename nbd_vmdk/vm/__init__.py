"""Which disks are behind a path: an image, a folder, a machine, one of its snapshots, an appliance.

Every door of this package takes the same words for a disk.  A path that leads to one disk is that disk;
where there are several, ``app.ova:disk1.vmdk`` (also ``app.ovf:disk1.vmdk``, ``vm.vmx:disk1.vmdk`` and
``vm.vmx:scsi0:0``) is one of them.  A file that is really called so comes first.

What a machine or an appliance names is untrusted, and opened through the gate of the file that names it.
"""

import os
from collections.abc import Iterable, Sequence

from nbd_vmdk.errors import NotVmdk, OptionError, VmdkError
from nbd_vmdk.look import kind_of, vmdk_names
from nbd_vmdk.ondisk.probe import FileKind
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.vm.found import FoundDisk, alone, listed, name_uniquely, natural, only_disk

__all__ = ["FoundDisk", "container_of", "find_all", "find_disks", "leads_to_disks", "locate"]

_Paths = Iterable[str | os.PathLike[str]]
_MACHINES = (".vmx", ".vmtx")


def find_all(
    paths: _Paths, *, snapshot: str | None = None, allow_dirs: _Paths = (), allow_devices: bool = False
) -> list[FoundDisk]:
    """The disks behind all of ``paths``, each once, in order, with names that differ; at least one.

    Raises as find_disks does.
    """
    found: list[FoundDisk] = []
    for path in paths:
        found += find_disks(path, snapshot=snapshot, allow_dirs=allow_dirs, allow_devices=allow_devices)
    found = _each_once(found)
    if not found:
        raise OptionError(None, why="no image to serve")
    name_uniquely(found)
    return found


def find_disks(
    path: str | os.PathLike[str],
    *,
    snapshot: str | None = None,
    allow_dirs: _Paths = (),
    allow_devices: bool = False,
) -> list[FoundDisk]:
    """The disks behind what a user named, in the order in which a machine has them.

    ``snapshot`` (name or number) asks for the disks of a machine as they were then.  A disk that is named and
    can't be had is among them, with its fault; what is wrong with the path itself is raised as a VmdkError:
    among others NotVmdk where there is no disk, and OptionError for a snapshot or a disk that is not there.
    """
    disks, container, what = _find(os.fspath(path), snapshot, tuple(allow_dirs), allow_devices)
    if not disks:
        raise NotVmdk(container, what=f"{what} without a disk in it")
    return disks


def locate(
    path: str | os.PathLike[str], *, allow_dirs: _Paths = (), allow_devices: bool = False
) -> FoundDisk:
    """The only disk behind what a user named.

    Raises as find_disks does, NotVmdk with the words for each where there are several, and its fault if it
    can't be had.
    """
    disks, container, what = _find(os.fspath(path), None, tuple(allow_dirs), allow_devices)
    return only_disk(disks, container, what)


def leads_to_disks(path: str | os.PathLike[str]) -> bool:
    """Whether a path names what has disks, or one of them, rather than a file that may be one itself.

    That is a folder, a machine, an appliance, or ``app.ova:disk1.vmdk``.  Who takes files that are no VMDKs
    as well, raw ones, had better ask first.
    """
    container, wanted = _split(os.fspath(path))
    endings = (*_MACHINES, ".vmsd", ".ovf", ".ova")
    return wanted is not None or os.path.isdir(container) or container.lower().endswith(endings)


def container_of(path: str | os.PathLike[str]) -> str:
    """The file or folder that has the disk that a user named: ``vm.vmx`` for ``vm.vmx:scsi0:0``."""
    return _split(os.fspath(path))[0]


def _find(
    path: str, snapshot: str | None, allow_dirs: tuple[str | os.PathLike[str], ...], allow_devices: bool
) -> tuple[list[FoundDisk], str, str]:
    """The disks, the file or folder that has them, and what that is, in words."""
    container, wanted = _split(path)
    if os.path.isdir(container):
        _no_snapshot(path, snapshot)
        folder = LocalFolder.for_folder(container, allow_dirs, allow_devices)
        return _in_folder(folder), container, "a folder"
    inside, name = LocalFolder.for_image(container, allow_dirs, allow_devices)
    several = _several(inside, name, snapshot)
    if several is None:
        _no_snapshot(path, snapshot)
        if wanted is not None:
            inside, name = LocalFolder.for_image(path, allow_dirs, allow_devices)
        label = inside.label(name)
        return [FoundDisk(inside, name, label, alone=label)], label, "an image"
    disks, what = several
    alone(disks, container)
    if wanted is not None:
        disks = [_choose(disks, container, wanted)]
    return disks, container, what


def _split(path: str) -> tuple[str, str | None]:
    """The file that has several disks, and the words for one of them; None if the path is all of it."""
    at = -1 if os.path.lexists(path) else path.rfind(":")
    while at > 0:
        if os.path.isfile(path[:at]):
            return path[:at], path[at + 1 :]
        at = path.rfind(":", 0, at)
    return path, None


def _several(folder: Folder, name: str, snapshot: str | None) -> tuple[list[FoundDisk], str] | None:
    """The disks of a file that may have several; None for one that is an image, or can't be read."""
    # What a single image does not need is imported where it is needed.
    ending = os.path.splitext(name)[1].lower()
    if ending in (*_MACHINES, ".vmsd"):
        from nbd_vmdk.vm.machine import disks_of_machine, disks_of_snapshot

        if ending == ".vmsd":
            return disks_of_snapshot(folder, name, snapshot), "a snapshot"
        return disks_of_machine(folder, name, snapshot), "a machine"
    if ending == ".ovf":
        from nbd_vmdk.vm.package import disks_of_envelope

        return disks_of_envelope(folder, name), "an appliance"
    if kind_of(folder, name) is not FileKind.TAR:
        return None  # of what can't be read, opening it as an image says why
    from nbd_vmdk.vm.package import disks_in_archive

    return disks_in_archive(folder, name), "an archive"


def _in_folder(folder: LocalFolder) -> list[FoundDisk]:
    from nbd_vmdk.vm.tops import find_tops

    tops = find_tops(folder, sorted(vmdk_names(folder), key=natural))
    if not tops:
        names = sorted(folder.names(), key=natural)
        others = [name for name in names if name.lower().endswith((*_MACHINES, ".ova", ".ovf"))]
        hint = "name a .vmdk, or the folder that has one"
        if others:
            hint = f"there is {folder.label(others[0])}: name that"
        raise NotVmdk(folder.name, what="a folder without a disk in it", hint=hint)
    found = _each_once(
        [FoundDisk(folder, name, folder.label(name), alone=folder.label(name)) for name in tops]
    )
    name_uniquely(found)
    return found


def _each_once(found: list[FoundDisk]) -> list[FoundDisk]:
    """The disks without those that are one before them by another name."""
    if len(found) < 2:
        return found
    return list({_identity(disk): disk for disk in reversed(found)}.values())[::-1]


def _choose(disks: Sequence[FoundDisk], container: str, wanted: str) -> FoundDisk:
    """The disk that ``wanted`` means: by its name, or by its place if that is one disk's alone."""
    named = [disk for disk in disks if disk.name == wanted] or [
        disk for disk in disks if wanted in (disk.place, disk.file)
    ]
    if len(named) == 1:
        return named[0]
    hint = f"there is {listed(disks)}" if disks else None
    raise NotVmdk(container, what=f"no disk {wanted!r} in it", hint=hint)


def _no_snapshot(path: str, snapshot: str | None) -> None:
    if snapshot is not None:
        raise OptionError(path, why="a snapshot can be chosen only of a machine: of a .vmx or a .vmsd")


def _identity(disk: FoundDisk) -> tuple[int, ...] | str:
    """Equal for two that are the same file."""
    try:
        storage = disk.folder.open(disk.file)
    except VmdkError:
        return disk.path
    storage.close()
    return storage.identity
