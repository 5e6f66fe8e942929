"""What ``nbd-vmdk snapshot list`` tells: every link of a folder's disks, what it stands on, who named it."""

import os
from dataclasses import dataclass
from typing import Any

from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.names import final_name
from nbd_vmdk.ops.snapshot.records import Named, records_in
from nbd_vmdk.ops.snapshot.tree import Branch, LinkFile, ancestors_of, forest, links_of
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.units import SECTOR
from nbd_vmdk.vm import find_disks, leads_to_disks


@dataclass(frozen=True, slots=True)
class Row:
    """A link in the tree; ``level`` counts from the root that is shown, for which it is 0.

    state      "base", "good", "old" (its parent was changed after it was made), "lost" (no parent found)
    current    machines that have it as their disk
    snapshots  snapshots that froze it
    merging    the name that it will have again when the merge into it is finished
    """

    link: LinkFile
    level: int
    parent: LinkFile | None
    state: str
    current: tuple[str, ...]
    snapshots: tuple[Named, ...]
    merging: str | None
    occupied: int

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        descriptor = self.link.descriptor
        return {
            "filename": self.link.label,
            "level": self.level,
            "state": self.state,
            "create-type": descriptor.create_type,
            "virtual-size": descriptor.total_sectors * SECTOR,
            "actual-size": self.occupied,
            "cid": descriptor.cid,
            "parent-cid": descriptor.parent_cid if descriptor.has_parent else None,
            "backing-filename": descriptor.parent_hint,
            "full-backing-filename": self.parent and self.parent.label,
            "current": list(self.current),
            "snapshots": [
                {
                    "name": named.name,
                    "description": named.description,
                    "taken": named.taken and named.taken.isoformat(timespec="seconds"),
                }
                for named in self.snapshots
            ],
            "merging": self.merging,
        }


def list_links(path: str | os.PathLike[str], **options: Any) -> tuple[list[Row], list[str]]:
    """The links in the folder ``path``, or those around an image or a machine's disks, and what was odd.

    Parents come before their children.  ``options`` are allow_dirs and allow_devices of OpenOptions.
    Nothing is locked and nothing is changed.
    """
    named = os.fspath(path)
    folders: list[Folder] = []
    recorded: list[Folder] = []
    warnings: list[str] = []
    chosen = files.opening(options)
    if os.path.isdir(named):
        # Any name will do: it is the folder that is opened to the links in it.
        beside = os.path.join(named, "disk.vmdk")
        folders.append(LocalFolder.for_image(beside, chosen.allow_dirs, chosen.allow_devices)[0])
        for other in chosen.allow_dirs:
            beside = os.path.join(os.fspath(other), "disk.vmdk")
            folders.append(LocalFolder.for_image(beside, chosen.allow_dirs, chosen.allow_devices)[0])
    else:
        for image in _images(named, chosen, warnings):
            place = files.Place(image, chosen)
            folders += place.folders
            folders += [link.folder for link in ancestors_of(place.link)]
            recorded += place.recorded
    folders = _unique(folders)
    records = records_in(_unique([*folders, *recorded]))
    rows = []
    waiting = [(branch, 0) for branch in reversed(forest(links_of(folders)))]
    while waiting:
        branch, level = waiting.pop()
        rows.append(_row(branch, level, records.current, records.snapshots))
        waiting += [(child, level + 1) for child in reversed(branch.children)]
    return rows, warnings + records.warnings


def _images(path: str, options: OpenOptions, warnings: list[str]) -> list[str]:
    """The image, or the words for each disk of a machine; one that can't be had is warned of."""
    if not leads_to_disks(path):
        return [path]
    found = find_disks(path, allow_dirs=options.allow_dirs, allow_devices=options.allow_devices)
    if len(found) == 1:
        return [path]
    warnings += [f"{disk.place}: {disk.fault}" for disk in found if disk.fault is not None]
    return [disk.alone for disk in found if disk.fault is None]


def _unique(folders: list[Folder]) -> list[Folder]:
    return list({os.path.realpath(folder.name): folder for folder in folders}.values())


def _row(
    branch: Branch,
    level: int,
    current: dict[tuple[int, ...], list[str]],
    snapshots: dict[tuple[int, ...], list[Named]],
) -> Row:
    identity = branch.link.identity
    return Row(
        link=branch.link,
        level=level,
        parent=branch.parent,
        state=branch.state,
        current=tuple(current.get(identity, ())),
        snapshots=tuple(snapshots.get(identity, ())),
        merging=final_name(branch.link.name),
        occupied=files.occupied_by(branch.link),
    )
