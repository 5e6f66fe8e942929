"""The parent of a new child link: opened for reading, looked at, kept as it is until the child is made."""

import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nbd_vmdk.chain import MAX_LINKS
from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import ChainTooDeep, InUse, Unsupported
from nbd_vmdk.link import Link
from nbd_vmdk.ondisk.descriptor import NO_PARENT
from nbd_vmdk.opening import open_disk
from nbd_vmdk.ops.create.child import is_elsewhere, parent_hint
from nbd_vmdk.ops.create.options import CreateOptions
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.storage.locks import vmware_lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """What a child needs to know.

    hint   how it names its parent
    words  the types of that one's extents
    depth  the links below the child
    """

    name: str
    hint: str
    size: int
    cid: int
    create_type: str
    words: tuple[str, ...] = ()
    depth: int
    warnings: list[str] = field(default_factory=list)


@contextmanager
def held_parent(path: str, options: CreateOptions) -> Iterator[Parent | None]:
    """The parent that a child at ``path`` will have, None if it has none; nobody writes it meanwhile.

    Raises Unsupported for what can't be a parent, InUse while somebody writes it, ChainTooDeep, and all that
    opening raises.
    """
    if options.parent is None:
        yield None
        return
    # Its own folder is open to it; the way from one to the other is the child's matter.
    with open_disk(options.parent, allow_dirs=options.allow_dirs) as disk:
        yield _look(disk, path, options)


def _look(disk: Disk, path: str, options: CreateOptions) -> Parent:
    top = disk.links[0]
    assert options.parent is not None
    if top.descriptor is None:
        raise Unsupported(
            top.name, what="it has no descriptor, so no content ID that a child could hold on to"
        )
    if top.cid is None or top.cid == NO_PARENT:
        what = "it has no valid content ID, so it can't be a parent"
        hint = "nbd-vmdk convert makes a copy that has one"
        if top.cid == NO_PARENT:
            hint = f"nbd-vmdk repair --apply {shlex.quote(top.name)} gives it one"
        raise Unsupported(top.name, what=what, hint=hint)
    if not isinstance(top.folder, LocalFolder):
        what = "a child can't name a parent inside an archive"
        raise Unsupported(top.name, what=what, hint="unpack the archive first")
    if len(disk.links) >= MAX_LINKS:
        raise ChainTooDeep(top.name, why=f"{len(disk.links)} links are as many as there can be")
    refuse_written(top, hint="a child needs a parent that nobody changes any more")
    way = options.parent_hint
    warnings = list(disk.warnings)
    if way is None:
        way = parent_hint(os.fspath(options.parent), os.path.dirname(path))
        if is_elsewhere(way):
            where = os.path.dirname(os.path.realpath(options.parent))
            warnings.append(f"the parent is in another folder: opening the child takes --allow-dir {where}")
    return parent_in(disk, way, warnings)


def refuse_written(link: Link, *, hint: str) -> None:
    """Raise InUse, with this hint, while somebody writes ``link``."""
    users = [vmware_lock(link.folder, os.path.basename(link.name))]
    users += [file.writer() for file in link.storages]
    for user in users:
        if user:
            raise InUse(link.name, how=user, hint=hint)


def parent_in(disk: Disk, hint: str, warnings: Iterable[str] = ()) -> Parent:
    """The open ``disk``, whose top link has a content ID, as the parent that a child names by ``hint``."""
    top = disk.links[0]
    assert top.cid is not None
    return Parent(
        name=top.name,
        hint=hint,
        size=disk.size,
        cid=top.cid,
        create_type=top.create_type,
        words=() if top.descriptor is None else tuple(line.type for line in top.descriptor.extents),
        depth=len(disk.links),
        warnings=list(warnings),
    )
