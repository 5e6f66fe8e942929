"""What a merge would do, and how far an earlier attempt at it came: all that is known before it begins."""

import os
import shlex
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nbd_vmdk.chain import parent_candidates
from nbd_vmdk.errors import (
    ChainError,
    ChainTooDeep,
    ContentIdMismatch,
    FileExists,
    OptionError,
    ParentNotFound,
    VmdkError,
    WriteRefused,
)
from nbd_vmdk.link import Link
from nbd_vmdk.ondisk.descriptor import is_absolute
from nbd_vmdk.ops.resize.changes import Change
from nbd_vmdk.ops.resize.growing import grow_link
from nbd_vmdk.ops.rewrite import is_embedded
from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.machines import Mention, find_mentions
from nbd_vmdk.ops.snapshot.merge import Amount, amount, is_thick
from nbd_vmdk.ops.snapshot.names import final_name, merging_name
from nbd_vmdk.ops.snapshot.records import records_in
from nbd_vmdk.ops.snapshot.tree import LinkFile, ancestors_of, children_of, link_file, parent_of
from nbd_vmdk.options import OpenOptions


class Stage(Enum):
    """How far an earlier attempt came."""

    NEW = "new"  #: nothing has been changed
    NAMED = "named"  #: the parent has its other name, the child does not know it yet
    MERGING = "merging"  #: the child names the parent by its other name
    MERGED = "merged"  #: all is in the parent; what is left is to remove the child


@dataclass(slots=True)
class Plan:
    """What a commit does.

    parent         the link that is written to, by the name it has now; ``name`` is the one it will have
    amount         bytes to move
    grandchildren  links that will have the parent instead of the child
    breaks         other children of the parent, which become invalid
    removes        files that go away
    users          machines that have the child as their disk
    machines       lines of their files that name the child, which goes away
    snapshots      names of snapshots that froze the parent, whose state goes away
    room           bytes that are free where the parent is
    sizes          the parent's, before and after: it becomes as large as a child that was grown
    grows          how, in words, step by step; nothing where it is as large already
    begun          something has been changed
    marked         the parent still has the mark of an attempt that was killed, which repair can take away
    """

    child: LinkFile
    parent: LinkFile
    name: str
    stage: Stage
    amount: Amount = field(default_factory=Amount)
    grandchildren: list[LinkFile] = field(default_factory=list)
    breaks: list[LinkFile] = field(default_factory=list)
    removes: list[str] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    machines: list[Mention] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)
    room: int = 0
    sizes: tuple[int, int] = (0, 0)
    grows: list[str] = field(default_factory=list)
    begun: bool = False
    marked: bool = False

    @property
    def result(self) -> str:
        """The path of the parent when all is done."""
        return os.path.normpath(self.parent.folder.label(self.name))

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "child": self.child.label,
            "parent": self.result,
            "stage": self.stage.value,
            "bytes": self.amount.as_dict(),
            "free": self.room,
            "grows": self._growth(),
            "grandchildren": [link.label for link in self.grandchildren],
            "breaks": [link.label for link in self.breaks],
            "removes": self.removes,
            "users": self.users,
            "machines": [each.as_dict() for each in self.machines],
            "snapshots": self.snapshots,
        }

    def _growth(self) -> dict[str, Any] | None:
        if not self.grows:
            return None
        old, new = self.sizes
        return {"old-size": old, "new-size": new, "steps": self.grows}


def make_plan(place: files.Place, *, keep: bool) -> Plan:
    """Find the parent of the place's link, and who else is concerned.

    Raises WriteRefused, ContentIdMismatch, and what opening the chain raises if there is no parent.
    """
    child = place.link
    plan = _find(child, place.options)
    if any(link.identity == child.identity for link in ancestors_of(plan.parent)):
        raise ChainTooDeep(child.label, why=f"the chain of parents leads back to {child.label}")
    links = place.links(plan.parent)
    if not keep:
        plan.grandchildren = [link for link in children_of(child, links) if link.expects(child)]
    if plan.stage is Stage.NEW:
        plan.breaks = [
            link
            for link in children_of(plan.parent, links)
            if link.identity != child.identity and link.expects(plan.parent)
        ]
    elif plan.stage is Stage.MERGED and not keep:
        plan.removes = files.existing_files(child, links)
    _check_names(plan)
    records = records_in(place.recorded)
    plan.users = records.current.get(child.identity, [])
    if not keep:
        plan.machines = find_mentions(place.recorded, child.identity, plan.result, snapshots=True)
    plan.snapshots = [named.name for named in records.snapshots.get(plan.parent.identity, ())]
    return plan


def _check_names(plan: Plan) -> None:
    """The parent is renamed for a while, which is no good where its name is only a link to it."""
    parent = plan.parent
    if os.path.realpath(parent.path) != os.path.join(os.path.realpath(parent.folder.name), parent.name):
        raise WriteRefused(
            parent.label,
            why=f"{plan.child.label} names it by a symbolic link",
            hint=f"nbd-vmdk snapshot rebase --relink {plan.child.word} "
            f"--parent {shlex.quote(os.path.realpath(parent.path))}",
        )
    if is_absolute(plan.name):
        raise WriteRefused(parent.label, why="its name would be taken for a path of Windows")


def _find(child: LinkFile, options: OpenOptions) -> Plan:
    """The parent, and how far an earlier attempt came."""
    descriptor = child.descriptor
    hint = descriptor.parent_hint
    if not descriptor.has_parent or hint is None:
        hint = f"name a child of it instead: nbd-vmdk snapshot list {child.word} shows who stands on whom"
        raise WriteRefused(child.label, why="it has no parent that it could be merged into", hint=hint)
    parent = parent_of(child)
    if parent is not None and child.expects(parent):
        final = final_name(parent.name)
        if final is not None:
            return Plan(child, parent, final, Stage.MERGING)
        return Plan(child, parent, parent.name, Stage.NEW)
    begun = _find_begun(child, parent, hint)
    if begun is not None:
        return begun
    if parent is None:
        with ExitStack() as held:
            # Opening the chain knows best what is wrong: not found, or not allowed.
            files.open_for_reading(held, child, options)
        raise ParentNotFound(child.label, parent=hint, cid=f"{descriptor.parent_cid:08x}")
    raise ContentIdMismatch(
        child.label,
        parent=parent.label,
        expected=f"{descriptor.parent_cid:08x}",
        found="none" if parent.cid is None else f"{parent.cid:08x}",
        hint=f"{parent.label} was changed after this child was made, so merging would mix two disks",
    )


def _find_begun(child: LinkFile, parent: LinkFile | None, hint: str) -> Plan | None:
    """A merge that stopped where the child is refused; None if there is none."""
    for candidate, _is_guess in parent_candidates(hint):
        folder, name = os.path.split(candidate)
        if child.cid is not None:
            # The child does not know yet: its own content ID in the other name tells that it is meant.
            other = _look(child, os.path.join(folder, merging_name(name, child.cid)))
            if other is not None and (parent is None or parent.identity == other.identity):
                return Plan(child, other, name, Stage.NAMED)
        final = final_name(name)
        if parent is None and final is not None:
            # Or it knows nothing else any more: all is done but removing it.
            other = _look(child, os.path.join(folder, final))
            if other is not None and child.expects(other):
                return Plan(child, other, final, Stage.MERGED)
    return None


def _look(link: LinkFile, name: str) -> LinkFile | None:
    try:
        return link_file(link.folder, name)
    except VmdkError:
        return None


def not_writable(plan: Plan, parent: Link) -> WriteRefused:
    """The error for a parent that can't take what the child holds."""
    hint = f"nbd-vmdk convert {plan.child.word} new.vmdk makes one disk of both"
    return WriteRefused(parent.name, why=files.why_read_only(parent), hint=hint)


def measure(plan: Plan, child: Link, parent: Link, below: int) -> None:
    """Check that the child fits, and count what is to be moved; ``below`` is the size of the parent's parent.

    Raises ChainError, WriteRefused, and what growing the parent raises if it can't become as large.
    """
    flatten = f"nbd-vmdk snapshot rebase --flatten {plan.child.word} makes it a disk of its own"
    if child.size < parent.size:
        why = f"it has {child.size} bytes and its parent {parent.size}, which would lose its end"
        raise ChainError(child.name, why=why, hint=flatten)
    if not parent.writable:
        raise not_writable(plan, parent)
    assert parent.descriptor is not None
    if is_embedded(parent) and len([line for line in parent.descriptor.extents if line.sectors]) > 1:
        raise WriteRefused(parent.name, why="its descriptor is inside one of several extents")
    plan.sizes = parent.size, child.size
    if child.size > parent.size:
        try:
            with ExitStack() as held:
                plan.grows = [step.text for step in growth(held, plan, parent, child.size, below)]
        except (WriteRefused, OptionError, FileExists) as error:
            error.hint = flatten if error.hint is None else f"{error.hint}; {flatten}"
            raise
    plan.amount = amount(child, parent)
    room = os.statvfs(plan.parent.folder.name)
    plan.room = room.f_bavail * room.f_frsize


def growth(held: ExitStack, plan: Plan, parent: Link, size: int, below: int) -> list[Change]:
    """The steps that make the parent, which is open for writing, as large as its child; see grow_link().

    It keeps its content ID: what its children show of it is the same before and after.
    """
    reserve = is_thick(parent)
    return grow_link(held, parent, size, below=below, name=plan.name, reserve=reserve, keep_cid=True)
