"""Removing one link of a tree: what stands on it keeps what it shows.

A link that nothing stands on goes away with all its files, and what it holds is lost: that is what removing
means.  One in the middle is first made needless: its children are rebased to its parent one by one (see
rebase.py), which copies into each what it showed of the link.  Then nothing stands on it, and it is removed.
Stopped anywhere, it is all there or the same command goes on.

A base with children is refused: each would need a copy of it.  Merging the child into it is what is wanted
then, or making a child independent first.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from nbd_vmdk.errors import InUse, VmdkError, WriteRefused
from nbd_vmdk.ops.copy import Progress
from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.names import final_name
from nbd_vmdk.ops.snapshot.rebase import rebase
from nbd_vmdk.ops.snapshot.records import records_in
from nbd_vmdk.ops.snapshot.tree import LinkFile, children_of, parent_of


@dataclass(slots=True)
class Removal:
    """What removing a link does.

    parent    what its children will stand on
    children  links on it, and the bytes that go into each
    stale     links that name it as their parent but could not be read any more anyway
    removes   files that go away
    snapshots names of snapshots that froze it
    """

    link: LinkFile
    parent: LinkFile | None
    children: dict[str, int] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    removes: list[str] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "link": self.link.label,
            "parent": self.parent and self.parent.label,
            "children": [{"child": name, "copied": count} for name, count in self.children.items()],
            "stale": self.stale,
            "removes": self.removes,
            "snapshots": self.snapshots,
        }


def delete_link(
    path: str | os.PathLike[str],
    *,
    apply: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Removal:
    """Remove the link ``path``, or with ``apply`` False only say what that would do.

    ``options`` are allow_dirs and allow_devices of OpenOptions.  Raises WriteRefused for a base that has
    children, for a link that a machine is set to write to, and for files that are not the link's alone.
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
        raise WriteRefused(
            link.label,
            why=f"it is the disk of {users[0]}",
            hint="to go back to its parent, name that in the .vmx first; to keep its content, commit it",
        )
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


def _remove(place: files.Place, found: Removal) -> None:
    link = place.link
    left = [child.label for child in children_of(link, place.links()) if child.expects(link)]
    if left:
        raise WriteRefused(link.label, why=f"{left[0]} has come to stand on it meanwhile")
    with ExitStack() as held:
        _hold(held, place)
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
