"""Removing one link of a tree: what stands on it keeps what it shows.

A link that nothing stands on goes away with all its files, and what it holds is lost: that is what removing
means.  One in the middle is first made needless: its children are rebased to its parent one by one (see
rebase.py), which copies into each what it showed of the link.  Then nothing stands on it, and it is removed.
Stopped anywhere, it is all there or the same command goes on.

A base with children is refused: each would need a copy of it.  Merging the child into it is what is wanted
then, or making a child independent first.

A link that a machine writes to is removed only where its files are to be changed: the machine then goes back
to the parent.  It will write to that, so nothing else may stand on it, and no snapshot may have frozen it.
The machine's file is changed first: at every moment it names a disk that is there.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from nbd_vmdk.errors import InUse, VmdkError, WriteRefused
from nbd_vmdk.ops.copy import Progress
from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.machines import MachineFiles, Mention, find_mentions
from nbd_vmdk.ops.snapshot.names import final_name
from nbd_vmdk.ops.snapshot.rebase import rebase
from nbd_vmdk.ops.snapshot.records import Records, records_in
from nbd_vmdk.ops.snapshot.tree import LinkFile, children_of, parent_of


@dataclass(slots=True)
class Removal:
    """What removing a link does.

    parent    what its children will stand on
    children  links on it, and the bytes that go into each
    stale     links that name it as their parent but could not be read any more anyway
    removes   files that go away
    snapshots names of snapshots that froze it
    machines  the lines that name it as a machine's disk, and are to name its parent
    """

    link: LinkFile
    parent: LinkFile | None
    children: dict[str, int] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    removes: list[str] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)
    machines: list[Mention] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "link": self.link.label,
            "parent": self.parent and self.parent.label,
            "children": [{"child": name, "copied": count} for name, count in self.children.items()],
            "stale": self.stale,
            "removes": self.removes,
            "snapshots": self.snapshots,
            "machines": [each.as_dict() for each in self.machines],
        }


def delete_link(
    path: str | os.PathLike[str],
    *,
    apply: bool = False,
    edit_vm: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Removal:
    """Remove the link ``path``, or with ``apply`` False only say what that would do.

    ``edit_vm`` lets the machines that have it as their disk have its parent.  ``options`` are allow_dirs and
    allow_devices of OpenOptions.  Raises WriteRefused for a base that has children, for a link that a machine
    is set to write to unless that can go back to the parent, and for files that are not the link's alone;
    with ``edit_vm`` InUse while such a machine is open.
    """
    place = files.Place(path, files.opening(options, locks=apply), mend=apply)
    link = place.link
    if final_name(link.name) is not None:
        raise WriteRefused(link.label, why="another link is being merged into it", hint="finish that first")
    found = Removal(link, parent_of(link))
    if found.parent is not None and (name := final_name(found.parent.name)) is not None:
        raise WriteRefused(
            link.label,
            why=f"it is being merged into {name}, which is no whole disk without it",
            hint=f"finish that first: nbd-vmdk snapshot commit {link.word}",
        )
    links = place.links()
    children = children_of(link, links)
    found.stale = [child.label for child in children if not child.expects(link)]
    found.removes = files.existing_files(link, links)
    records = records_in(place.recorded)
    found.snapshots = [named.name for named in records.snapshots.get(link.identity, ())]
    if users := records.current.get(link.identity):
        _check_goes_back(found, users[0], links, records, wanted=edit_vm)
        assert found.parent is not None
        found.machines = find_mentions(place.recorded, link.identity, found.parent.path)
    children = [child for child in children if child.expects(link)]
    if children and not link.descriptor.has_parent:
        raise WriteRefused(
            link.label,
            why=f"it is the base of {', '.join(child.label for child in children)}",
            hint=f"nbd-vmdk snapshot commit {children[0].word} merges the child into it; "
            "nbd-vmdk snapshot rebase --flatten makes a child independent of it",
        )
    if children and (found.parent is None or not link.expects(found.parent)):
        with ExitStack() as held:
            # Opening the chain says what is wrong with it.
            files.open_for_reading(held, link, place.options)
        raise WriteRefused(link.label, why="its parent can't be read, so its children can't be moved there")
    if apply:
        _check_unused(place)
    for child in children:
        assert found.parent is not None
        moved = rebase(child.path, found.parent.path, dry_run=not apply, progress=progress, **options)
        found.children[child.label] = moved.copied
    if apply:
        _remove(place, found)
    return found


def _check_goes_back(
    found: Removal, user: str, links: Sequence[LinkFile], records: Records, *, wanted: bool
) -> None:
    """Raise WriteRefused unless the machine ``user`` may have the parent of the link instead."""
    link, parent = found.link, found.parent
    if parent is None:
        raise WriteRefused(link.label, why=f"it is the disk of {user}, and there is no parent to go back to")
    if not wanted:
        raise WriteRefused(
            link.label,
            why=f"it is the disk of {user}",
            hint="to go back to its parent, add --edit-vm; to keep its content, commit it",
        )
    if why := _why_not_writable(link, parent, links, records):
        raise WriteRefused(
            link.label,
            why=f"{user} can't write to {parent.label} instead: {why}",
            hint=f"name a new child of that in the .vmx first: nbd-vmdk snapshot create {parent.word}",
        )


def _why_not_writable(
    link: LinkFile, parent: LinkFile, links: Sequence[LinkFile], records: Records
) -> str | None:
    """Who would be hurt if ``parent`` were written to once ``link`` is gone; None if nobody is known."""
    if os.path.realpath(parent.folder.name) != os.path.realpath(link.folder.name):
        return "it is in another folder, and others may stand on it"
    for other in (*children_of(link, links), *children_of(parent, links)):
        if other.identity != link.identity:
            return f"{other.label} stands on it, too"
    if users := records.current.get(parent.identity):
        return f"it is the disk of {users[0]}"
    if frozen := records.snapshots.get(parent.identity):
        return f'the snapshot "{frozen[0].name}" froze it'
    return None


def _remove(place: files.Place, found: Removal) -> None:
    link = place.link
    left = [child.label for child in children_of(link, place.links()) if child.expects(link)]
    if left:
        raise WriteRefused(link.label, why=f"{left[0]} has come to stand on it meanwhile")
    with ExitStack() as held:
        _hold(held, place)
        MachineFiles(held, found.machines).publish()
        files.remove_files(found.removes)


def _check_unused(place: files.Place) -> None:
    """Raise InUse for a link that could not be removed in the end."""
    with ExitStack() as held:
        _hold(held, place)


def _hold(held: ExitStack, place: files.Place) -> None:
    file = files.hold(held, place.link)
    try:
        files.hold_link(held, place.link, place.options, file)
    except InUse:
        raise
    except VmdkError:
        pass  # damage does not keep it from being removed
