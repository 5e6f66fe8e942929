"""Deleting an image: all files of a link, and on request of all links that stand on it."""

import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from nbd_vmdk.errors import InUse, OptionError, VmdkError, WriteRefused
from nbd_vmdk.ops.linkset.removing import left_of, remove_set
from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.names import final_name
from nbd_vmdk.ops.snapshot.records import records_in
from nbd_vmdk.ops.snapshot.tree import LinkFile, children_of
from nbd_vmdk.vm import container_of


@dataclass(slots=True)
class Deleted:
    """What deleting does, or did: the links, what is on others first, their files, and who names them."""

    links: list[str] = field(default_factory=list)
    removes: list[str] = field(default_factory=list)
    users: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"links": self.links, "removes": self.removes, "users": self.users}


def delete(
    path: str | os.PathLike[str], *, with_children: bool = False, dry_run: bool = False, **options: Any
) -> Deleted:
    """Delete the link ``path``; ``with_children`` also all that stand on it, the ones on top first.

    Its parents stay.  ``options`` are allow_dirs and allow_devices of OpenOptions.  Raises WriteRefused for a
    link with children, for files that are not the link's alone and for a symbolic link, InUse; then nothing
    has changed.  A deletion that was stopped goes on when it is asked for again.
    """
    chosen = files.opening(options, locks=not dry_run)
    source = files.whole_image_in(path, chosen, "rm", os.fspath(path))
    if source != os.fspath(path) == container_of(path):
        raise OptionError(
            os.fspath(path),
            why="is no image, and what has disks is not deleted with them",
            hint=f"to delete its disk, name that: {shlex.quote(source)}",
        )
    if os.path.islink(source):
        real = shlex.quote(os.path.realpath(source))
        raise WriteRefused(
            source,
            why="it is a symbolic link to an image, and not clear which of the two is to go",
            hint=f"to delete the image: nbd-vmdk delete {real}; the link alone: rm {shlex.quote(source)}",
        )
    if left := left_of(source):
        if not dry_run:
            files.remove_files(left)
        return Deleted([source], left)
    place = files.Place(path, chosen, mend=not dry_run)
    links = place.links()
    doomed = _with_all_on_it(place.link, links)
    if len(doomed) > 1 and not with_children:
        names = ", ".join(link.label for link in doomed[:-1])
        raise WriteRefused(
            place.link.label,
            why=f"other links stand on it: {names}",
            hint="--with-children deletes them too; nbd-vmdk snapshot rebase --flatten makes one independent",
        )
    others = [link for link in links if link.identity not in {each.identity for each in doomed}]
    found = Deleted()
    sets: list[list[str]] = []
    records = records_in(place.recorded)
    with ExitStack() as held:
        for link in doomed:
            if final_name(link.name) is not None:
                raise WriteRefused(link.label, why="another link is being merged into it")
            sets.append(files.existing_files(link, [*others, link]))
            found.links.append(link.label)
            found.removes += sets[-1]
            found.users += records.current.get(link.identity, [])
            found.users += [
                f'{named.file}, snapshot "{named.name}"' for named in records.snapshots.get(link.identity, ())
            ]
            if not dry_run:
                _hold(held, place, link)
        if not dry_run:
            for paths in sets:
                remove_set(paths)
    return found


def _with_all_on_it(link: LinkFile, links: Sequence[LinkFile]) -> list[LinkFile]:
    """The link and everything that stands on it, what is on top first."""
    found: list[LinkFile] = []
    seen: set[tuple[int, ...]] = set()
    waiting = [link]
    while waiting:
        one = waiting.pop()
        if one.identity not in seen:
            seen.add(one.identity)
            found.append(one)
            waiting += children_of(one, links)
    return found[::-1]


def _hold(held: ExitStack, place: files.Place, link: LinkFile) -> None:
    file = files.hold(held, link)
    try:
        files.hold_link(held, link, place.options, file)
    except InUse:
        raise
    except VmdkError:
        pass  # damage does not keep it from being deleted
