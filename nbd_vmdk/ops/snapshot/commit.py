"""Merging a child into its parent, so that it can be started again after whatever stopped it.

A merge writes into the parent what the child holds.  Seen through the child nothing changes by that, at any
moment; but the parent itself is neither the old disk nor the new one until all is done, and its other
children read wrong data.  So nobody may take it for what it was:

    0. grow       the parent becomes as large as the child, if that was grown; see below
    1. name       the parent gets a second name that says what is happening, ``disk.merging-CCCCCCCC.vmdk``
                  with the child's content ID (a hard link)
    2. identify   it gets a new content ID, so that its other children notice
    3. point      the child names it by that name and content ID; then its old name is taken away
    4. merge      copy what the child holds, make it durable
    5. name       the parent gets its old name again, beside the other
    6. point      the child's own children name the parent by it, with its content ID
    7. remove     the other name, and then the child's files, its descriptor last; before that the machines'
                  files are changed, if they are to be

Wherever this stops, the child (from 3 to 6) and its children read what they always read, or are refused; the
parent can't be found by its old name while it is no whole disk; and the names and content IDs that are
there say how far it came, so the same command goes on from there.  Names can be changed by hand: before a
child is removed whose parent seems to be whole, reading proves that it is.  Where a file system knows no hard
links the parent is renamed instead, and the child is refused for a moment.

A child that was grown (see resize) is larger than its parent, whose end reads as zeros through it.  The
parent gets those zeros first: nothing that any child shows of it changes by that, so its content ID stays,
and a merge that stops then has done nothing but to make the chain even.

What is not done: children in folders that are not looked at are not found.  A child of the child there is
refused afterwards (its parent is gone) until it is pointed to the merged one.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from nbd_vmdk.cache import Cache
from nbd_vmdk.chain import plain_name
from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import Difference, FileMissing, InUse, VmdkError, WriteRefused
from nbd_vmdk.opener import open_link
from nbd_vmdk.opening import open_in
from nbd_vmdk.ops.check.runner import check_in
from nbd_vmdk.ops.copy import Progress, copy
from nbd_vmdk.ops.repair import apply_in
from nbd_vmdk.ops.repair import make_plan as make_repair
from nbd_vmdk.ops.rewrite import DescriptorFile, mend_folder, real_path, sync_folder
from nbd_vmdk.ops.sides import Comparer, DiskSource
from nbd_vmdk.ops.snapshot import files, secondname
from nbd_vmdk.ops.snapshot.machines import MachineFiles
from nbd_vmdk.ops.snapshot.merge import LinkSource, MergeSink, zero_block
from nbd_vmdk.ops.snapshot.names import final_name, merging_name
from nbd_vmdk.ops.snapshot.plan import Plan, Stage, growth, make_plan, measure, not_writable
from nbd_vmdk.ops.snapshot.tree import link_file, parent_of
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.units import MIB, SECTOR

log = logging.getLogger("nbd_vmdk")


def plan_commit(path: str | os.PathLike[str], *, keep: bool = False, **options: Any) -> Plan:
    """What commit() would do to the child ``path``; nothing is changed.

    ``options`` are allow_dirs, allow_devices and drop_ctk of OpenOptions.  Raises what commit() would.
    """
    place = files.Place(path, files.opening(options, locks=False))
    plan = make_plan(place, keep=keep)
    if plan.stage is not Stage.MERGED:
        with ExitStack() as held:
            child = open_link(place.link.folder, place.link.name, place.options, _cache(), writable=False)
            held.callback(child.close)
            with files.writable_wanted():
                parent = open_link(
                    plan.parent.folder, plan.parent.name, place.options, _cache(), writable=True
                )
            held.callback(parent.close)
            below = parent_of(plan.parent)
            measure(plan, child, parent, below.descriptor.total_sectors * SECTOR if below is not None else 0)
            if not keep:
                plan.removes = files.own_files(place.link, child.storages, place.links(plan.parent))
    return plan


def commit(
    path: str | os.PathLike[str],
    *,
    keep: bool = False,
    break_children: bool = False,
    edit_vm: bool = False,
    progress: Progress | None = None,
    threads: int | None = None,
    **options: Any,
) -> Plan:
    """Merge the child ``path`` into its parent, and remove it; what was done.

    With ``keep`` the child stays as a link on the merged parent.  With ``break_children`` other children of
    the parent are given up.  With ``edit_vm`` the machines' files that name the child name the parent from
    then on.  ``options`` are those of plan_commit().  Raises WriteRefused, ChainError and InUse before
    anything is changed; after any later error the same call goes on where it stopped.
    """
    place = files.Place(path, files.opening(options), mend=True)
    mend_folder(make_plan(place, keep=keep).parent.folder)
    plan = make_plan(place, keep=keep)
    if plan.breaks and not break_children:
        names = ", ".join(link.label for link in plan.breaks)
        raise WriteRefused(
            plan.parent.label,
            why=f"it has other children, which merging into it would make invalid: {names}",
            hint=f"nbd-vmdk snapshot rebase --flatten {plan.breaks[0].word} makes one independent; "
            "--break-children gives them up",
        )
    try:
        _commit(plan, place, keep=keep, edit_vm=edit_vm, progress=progress, threads=threads)
    except VmdkError as error:
        if plan.begun:
            error.hint = _unfinished(plan) if error.hint is None else f"{error.hint}; {_unfinished(plan)}"
        raise
    except KeyboardInterrupt:
        if plan.begun:
            log.warning("%s: %s", plan.child.label, _unfinished(plan))
        raise
    if plan.stage in (Stage.MERGING, Stage.MERGED):
        plan.marked = not _clear_mark(plan, place.options)
    return plan


def _clear_mark(plan: Plan, options: OpenOptions) -> bool:
    """Take the mark away that a killed attempt left in the parent: not closed cleanly.  False if it stays.

    It goes only if a check finds that nothing else is to be mended.
    """
    chosen = OpenOptions(
        allow_dirs=options.allow_dirs, allow_devices=options.allow_devices, locks=False, cache_size=MIB
    )
    repairs = make_repair(check_in(plan.parent.folder, plan.name, chosen)).chosen
    slugs = {finding.slug for _repair, findings in repairs for finding in findings}
    if slugs == {"unclean"}:
        apply_in(plan.parent.folder, plan.name, chosen, undo=None)
        return True
    return "unclean" not in slugs


def _commit(
    plan: Plan,
    place: files.Place,
    *,
    keep: bool,
    edit_vm: bool,
    progress: Progress | None,
    threads: int | None,
) -> None:
    with ExitStack() as held:
        machines = MachineFiles(held, plan.machines if edit_vm else ())
        child = files.hold(held, place.link)
        below = [files.hold(held, link) for link in plan.grandchildren]
        if plan.stage is Stage.MERGED:
            _prove_merged(plan, place, child, progress, threads)
            _finish(plan, child, below, keep=keep)
            machines.publish()
            held.close()
            files.remove_files(plan.removes)
            return
        link = files.hold_link(held, place.link, place.options, child)
        disk = held.enter_context(_open_parent(plan, place.options))
        measure(plan, link, disk.links[0], _size_below(disk))
        if not keep:
            plan.removes = files.own_files(place.link, link.storages, place.links(plan.parent))
        if plan.grows:
            _grow(plan, disk)
            disk = held.enter_context(_open_parent(plan, place.options))
        _begin(plan, child, disk)
        copy(
            LinkSource(link),
            MergeSink(disk),
            zero_grain=zero_block(disk.links[0]),
            progress=progress,
            threads=threads,
        )
        disk.flush()
        _finish(plan, child, below, keep=keep)
        machines.publish()
        disk.close()
        files.remove_files(plan.removes)


def _prove_merged(
    plan: Plan,
    place: files.Place,
    child: DescriptorFile,
    progress: Progress | None,
    threads: int | None,
) -> None:
    """Raise WriteRefused unless the parent has all that the child holds.

    Names say so, but somebody may have given the parent its old name by hand while the merge was under way.
    """
    with ExitStack() as held:
        try:
            link = files.hold_link(held, place.link, place.options, child)
        except FileMissing:
            return  # its files are being removed, which begins when all is merged
        parent = files.open_for_reading(held, plan.parent, place.options)
        try:
            copy(
                LinkSource(link),
                Comparer(DiskSource(parent), plan.parent.label),
                progress=progress,
                threads=threads,
            )
        except Difference:
            raise WriteRefused(
                plan.parent.label,
                why=f"a merge of {plan.child.label} into it has begun, and not all of that is in it",
                hint=f"name it {_merging_path(child, '')} again, as it was when the merge was stopped: "
                "the same command then goes on",
            ) from None


def _unfinished(plan: Plan) -> str:
    return (
        "no data is lost: what reads through the child reads what it did before, and the same command goes "
        f"on with merging it into {plan.name}"
    )


def _cache() -> Cache:
    return Cache(files.CACHE)


def _open_parent(plan: Plan, options: OpenOptions) -> Disk:
    chosen = OpenOptions(
        writable=True,
        write_parent=True,
        drop_ctk=options.drop_ctk,
        allow_dirs=options.allow_dirs,
        allow_devices=options.allow_devices,
        cache_size=options.cache_size,
    )
    with files.writable_wanted():
        disk = open_in(plan.parent.folder, plan.parent.name, chosen)
    top = disk.links[0]
    if disk.writable and (top.storages[0].identity, top.cid) == (plan.parent.identity, plan.parent.cid):
        return disk
    disk.close()
    if disk.writable:
        raise InUse(plan.parent.label, how="it has just been changed", hint="try again")
    raise not_writable(plan, top)


def _grow(plan: Plan, disk: Disk) -> None:
    """Step 0: the parent becomes as large as the child; ``disk``, which is the parent, is closed by that."""
    plan.begun = True
    _have_one_name(plan)
    with disk, ExitStack() as held:
        for change in growth(held, plan, disk.links[0], plan.sizes[1], _size_below(disk)):
            change.apply()
    grown = link_file(plan.parent.folder, plan.parent.name)
    assert grown is not None
    plan.parent = grown


def _size_below(disk: Disk) -> int:
    return disk.links[1].size if len(disk.links) > 1 else 0


def _have_one_name(plan: Plan) -> None:
    """Take away what the parent is called besides.

    A descriptor that is a file of its own is replaced, and another name would stay with the old one.  Where
    an earlier attempt gave it one, the name that it is found by now says as much.
    """
    kept = os.path.realpath(plan.parent.path)
    names = [name for name in plan.parent.folder.names() if plan.name in (name, final_name(name))]
    secondname.keep_one_name(kept, [os.path.join(os.path.dirname(kept), name) for name in names])


def _begin(plan: Plan, child: DescriptorFile, disk: Disk) -> None:
    """Steps 1 to 3, as far as they are still to do."""
    plan.begun = True
    parent = disk.links[0]
    now = real_path(parent.storages[0])
    folder = os.path.dirname(now)
    old = os.path.join(folder, plan.name)
    if plan.stage is Stage.MERGING:
        parent.keep_cid()
        new = now
    else:
        assert plan.child.cid is not None
        new = os.path.join(folder, merging_name(plan.name, plan.child.cid))
        secondname.add_name(now, new)
        changed = parent.change_cid()
        assert changed is not None
        changed.sync()
        assert parent.cid is not None
        files.point(child, new, parent.cid)
    secondname.drop_name(old, new)


def _finish(plan: Plan, child: DescriptorFile, below: Sequence[DescriptorFile], *, keep: bool) -> None:
    """Steps 5 to 7, without removing the child's files."""
    folder = os.path.realpath(plan.parent.folder.name)
    final = os.path.join(folder, plan.name)
    assert plan.child.cid is not None
    other = os.path.join(folder, merging_name(plan.name, plan.child.cid))
    cid = child.descriptor.parent_cid
    assert cid is not None
    if plan.stage is not Stage.MERGED:
        other = _merging_path(child, folder)
        secondname.add_name(other, final)
    for file in below:
        files.point(file, final, cid)
    if keep:
        files.point(child, final, cid)
    if plan.stage is not Stage.MERGED:
        secondname.drop_name(other, final)
    sync_folder(folder)


def _merging_path(child: DescriptorFile, folder: str) -> str:
    hint = child.descriptor.parent_hint
    assert hint is not None
    # This hint is ours, with slashes: a backslash or a colon in it is a part of the name.
    return os.path.join(folder, plain_name(hint))
