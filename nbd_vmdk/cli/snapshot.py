"""``nbd-vmdk snapshot``: make child links, show their tree, merge, move and remove them."""

import os
import shlex
import stat
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.managing import (
    allow_dir_option,
    as_given,
    dry_run_option,
    edit_vm_option,
    edit_vmx_option,
    tell_machines,
)
from nbd_vmdk.cli.opening import ImagePath, all_of, drop_ctk_option, image_argument, json_option
from nbd_vmdk.cli.progress import progress
from nbd_vmdk.errors import OptionError
from nbd_vmdk.units import format_size

if TYPE_CHECKING:
    from nbd_vmdk.ops.snapshot.delete import Removal
    from nbd_vmdk.ops.snapshot.listing import Row
    from nbd_vmdk.ops.snapshot.plan import Plan

_STATES = {
    "old": "its parent was changed after it was made",
    "lost": "its parent was not found here",
}

_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH

_place_options = all_of(
    allow_dir_option,
    click.option("--allow-devices", is_flag=True, help="Let images name block devices in an allowed folder."),
)


class _Work(click.Group):
    """What can be done; who forgets to say that and names an image at once is told of it."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """See Group; OptionError for a file instead of a command."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            if not os.path.exists(args[0]):
                raise
            verb, word = ctx.command_path, shlex.quote(args[0])
            hint = f"{verb} list {word} shows its tree, {verb} create {word} makes a child of it"
            why = f"it is not said what to do with {args[0]}"
            raise OptionError(None, why=why, hint=hint) from None


@click.group(cls=_Work, short_help="Make child links, show their tree, merge, move and remove them.")
def snapshot() -> None:
    """Work on the links of disks: every snapshot freezes one, and a child of it takes the writes.

    What is merged, moved or removed never changes what the links that stand on it show.  No other program may
    use them meanwhile; locks see to that.
    """


@snapshot.command(short_help="Make a child of an image, for all further writes.")
@click.option(
    "--for",
    "product",
    type=click.Choice(["workstation", "esxi", "ova", "qemu", "virtualbox"]),
    help="Pick a kind that this product takes.",
)
@click.option("--type", "kind", metavar="KIND", help="The kind of the child, if not the one that fits.")
@click.option("--protect", is_flag=True, help="Take the permission to write from all files of IMAGE.")
@edit_vmx_option
@allow_dir_option
@json_option
@image_argument
@click.argument("child", type=ImagePath(), required=False)
def create(image: str, child: str | None, edit_vm: bool, as_json: bool, **options: Any) -> int:
    """Make an empty CHILD of IMAGE: IMAGE stays as it is now, further writes belong into the child.

    Without CHILD it is called as VMware would call it (disk-000001.vmdk, the next free number).  A folder as
    CHILD gets a linked clone.  IMAGE may be a machine: VM.vmx, or VM.vmx:scsi0:0 for one of several disks.
    The new top of the chain is printed.

    VMware's list of snapshots (.vmsd) gets no entry: that takes a state of the whole machine, which only
    VMware can write.  'snapshot delete --edit-vm' goes back.
    """
    from nbd_vmdk.ops.snapshot.create import create_child

    made = create_child(image, child, edit_vm=edit_vm, **options)
    for warning in made.warnings:
        output.log.warning("%s", warning)
    for note in made.notes:
        output.message("note", note)
    if as_json:
        output.json_object(made.as_dict())
        return 0
    output.line(output.clean(made.path))
    sys.stdout.flush()
    output.message(
        "note", f"write to {made.path} from now on: writing to {made.base} makes the child invalid"
    )
    is_clone = made.parent is not None and "/" in made.parent
    if is_clone and not edit_vm:
        for each in made.machines:
            now = "a child of its own, made beside it"
            output.message("note", f"{each.file} names {each.old}: it must name {now} from now on")
    else:
        tell_machines(made.machines, made.base, edited=edit_vm)
    return 0


@snapshot.command("list", short_help="Show the tree of links in a folder.")
@_place_options
@json_option
@click.argument("place", type=ImagePath(), metavar="FOLDER|IMAGE")
def list_(place: str, as_json: bool, **options: Any) -> int:
    """Show all links in FOLDER, or in the folders of IMAGE and its parents, as trees.

    For each: whether its parent is still what it was made on, what it occupies, which machine (.vmx) writes
    to it, and which snapshots (.vmsd) froze it.
    """
    from nbd_vmdk.ops.snapshot.listing import list_links

    rows, warnings = list_links(place, **options)
    for warning in warnings:
        output.log.warning("%s", warning)
    if as_json:
        output.json_object({"links": [row.as_dict() for row in rows]})
    elif rows:
        _print_tree(rows)
    else:
        output.message("note", f"{place}: no link of a disk is in there")
    return 0


def _print_tree(rows: "Sequence[Row]") -> None:
    table = [("link", "size", "holds", "kind", "")]
    for row in rows:
        descriptor = row.link.descriptor
        name = "  " * row.level + output.clean(row.link.label)
        size = format_size(descriptor.total_sectors * 512)
        kind = output.clean(descriptor.create_type or "")
        table.append((name, size, format_size(row.occupied), kind, output.clean("; ".join(_remarks(row)))))
    widths = [max(len(line[column]) for line in table) for column in range(4)]
    for line in table:
        cells = [
            line[0].ljust(widths[0]),
            line[1].rjust(widths[1]),
            line[2].rjust(widths[2]),
            line[3].ljust(widths[3]),
            line[4],
        ]
        output.line("  ".join(cells).rstrip())


def _remarks(row: "Row") -> list[str]:
    remarks = [f"current: {user}" for user in row.current]
    for named in row.snapshots:
        when = f" of {named.taken:%Y-%m-%d %H:%M} UTC" if named.taken else ""
        remarks.append(f'frozen by "{named.name}"{when}')
    if row.state in _STATES:
        remarks.append(f"unusable: {_STATES[row.state]} ({row.link.descriptor.parent_hint})")
    if row.merging:
        remarks.append(f"{row.merging} before, a merge into it has not been finished")
    return remarks


@snapshot.command(short_help="Merge a child into its parent, and remove it.")
@click.option("--keep", is_flag=True, help="Keep CHILD, as a link on the merged parent.")
@click.option("--break-children", is_flag=True, help="Give up other children of the parent.")
@edit_vm_option
@dry_run_option
@drop_ctk_option
@_place_options
@json_option
@click.argument("child", type=ImagePath())
def commit(
    child: str,
    keep: bool,
    break_children: bool,
    edit_vm: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Merge CHILD into its parent: the parent becomes what CHILD shows, and CHILD goes away.

    What stands on CHILD stands on the parent afterwards and shows what it showed.  The state that the parent
    had is lost.  If CHILD was made larger, the parent becomes as large first.  If it is stopped, by whatever,
    the same command goes on; until then the parent is called NAME.merging-ID.vmdk and CHILD can be used as
    before.
    """
    from nbd_vmdk.ops.snapshot.commit import commit as run
    from nbd_vmdk.ops.snapshot.commit import plan_commit

    plan = plan_commit(child, keep=keep, **options)
    _tell_plan(plan, [as_given(path, child, *options["allow_dirs"]) for path in plan.removes])
    if not dry_run:
        with progress("merging") as told:
            plan = run(
                child, keep=keep, break_children=break_children, edit_vm=edit_vm, progress=told, **options
            )
    if as_json:
        output.json_object({"done": not dry_run, **plan.as_dict()})
    elif not dry_run:
        output.line(output.clean(plan.result))
    sys.stdout.flush()
    if plan.marked:
        what = f"{plan.result} keeps a mark of the attempt that was killed"
        output.message("hint", f"{what}: nbd-vmdk repair {shlex.quote(plan.result)}")
    if not keep:
        tell_machines(plan.machines, plan.child.label, edited=edit_vm, dry_run=dry_run)
    return 0


def _tell_plan(plan: "Plan", removes: Sequence[str]) -> None:
    amount = plan.amount
    told = f"{format_size(amount.data)} to write, {format_size(amount.new)} of it in new space"
    output.message("note", f"{plan.child.label} goes into {plan.result}: {told}")
    if plan.stage.value != "new":
        output.message("note", "an earlier attempt was stopped; this goes on with it")
    if plan.grows:
        old, new = (format_size(size) for size in plan.sizes)
        output.message("note", f"{plan.result} becomes as large as the child first: {old} -> {new}")
    if amount.new > plan.room:
        free = format_size(plan.room)
        output.log.warning("only %s are free there, which may be too little", free)
    for link in plan.grandchildren:
        output.message("note", f"{link.label} will stand on {plan.result}")
    for link in plan.breaks:
        output.message("note", f"{link.label} will be invalid: it needs {plan.result} as it is now")
    for name in plan.snapshots:
        output.message("note", f'the snapshot "{name}" will be gone: it is what {plan.result} is now')
    if removes:
        output.message("note", f"to be removed: {', '.join(removes)}")


@snapshot.command(short_help="Give a child another parent, without changing what it shows.")
@click.option("--parent", type=ImagePath(), metavar="FILE", help="The new parent.")
@click.option("--flatten", is_flag=True, help="No parent at all: make CHILD independent.")
@click.option("--relink", is_flag=True, help="Change the pointer alone, if nothing has to be copied.")
@click.option("--unchecked", is_flag=True, help="With --relink: don't prove that the parents are alike.")
@dry_run_option
@drop_ctk_option
@_place_options
@json_option
@click.argument("child", type=ImagePath())
def rebase(
    child: str,
    parent: str | None,
    flatten: bool,
    relink: bool,
    unchecked: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Make FILE the parent of CHILD, or with --flatten none; what CHILD shows stays the same.

    What the two parents show differently through CHILD is copied into it first.  With --relink nothing is
    copied: after both have been read and found alike, the pointer is changed.
    """
    from nbd_vmdk.ops.snapshot.rebase import rebase as run

    if (parent is None) is not flatten:
        why = "--parent and --flatten exclude each other" if flatten else "the new parent is missing"
        raise OptionError(None, why=why, hint="use either --parent FILE or --flatten")
    if unchecked and not relink:
        raise OptionError(None, why="--unchecked belongs to --relink")
    if flatten and relink:
        raise OptionError(None, why="--flatten copies, and --relink forbids that")
    with progress("comparing") as told:
        done = run(
            child, parent, relink=relink, unchecked=unchecked, dry_run=dry_run, progress=told, **options
        )
    if as_json:
        output.json_object({"done": not dry_run, **done.as_dict()})
        return 0
    where = "has no parent" if done.parent is None else f"stands on {output.clean(done.parent)}"
    copied = f"{format_size(done.copied)} copied into it"
    output.line(f"{output.clean(child)}: {'would be so: ' if dry_run else ''}{where}, {copied}")
    return 0


@snapshot.command(short_help="Show what removing a link would do; with --apply, remove it.")
@click.option("--apply", is_flag=True, help="Remove it.")
@edit_vmx_option
@drop_ctk_option
@_place_options
@json_option
@click.argument("link", type=ImagePath())
def delete(link: str, apply: bool, edit_vm: bool, as_json: bool, **options: Any) -> int:
    """Show what removing LINK would do.  With --apply, remove it and all its files.

    Links that stand on it get its parent instead, after what they show of LINK has been copied into them.
    What a link holds on which nothing stands is lost.  A base with children is refused: commit a child into
    it instead.  A link that a machine writes to is refused, too; with --edit-vm the machine goes back to the
    parent, if it may write to that: if nothing else stands on it and no snapshot froze it.
    """
    from nbd_vmdk.ops.snapshot.delete import delete_link

    with progress("copying") as told:
        found = delete_link(link, edit_vm=edit_vm, progress=None if apply else told, **options)
        _tell_removal(found)
        if apply:
            found = delete_link(link, apply=True, edit_vm=edit_vm, progress=told, **options)
    if as_json:
        output.json_object({"applied": apply, **found.as_dict()})
        return 0
    for path in found.removes:
        shown = as_given(path, link, *options["allow_dirs"])
        output.line(f"{'removed' if apply else 'to be removed'}: {shown}")
    sys.stdout.flush()
    if edit_vm:
        tell_machines(found.machines, found.link.label, edited=True, dry_run=not apply)
        if found.machines and found.parent and not os.stat(found.parent.path).st_mode & _WRITABLE:
            what = "nobody may write to it until you allow that again: chmod u+w"
            output.message("note", f"{found.parent.label}: {what}, all its files")
    if not apply:
        output.message("note", "--apply does it")
    return 0


def _tell_removal(found: "Removal") -> None:
    for child, copied in found.children.items():
        parent = found.parent.label if found.parent else "nothing"
        output.message("note", f"{child} will stand on {parent}, with {format_size(copied)} copied into it")
    if not found.children:
        output.message("note", f"what {found.link.label} holds will be lost")
    for stale in found.stale:
        output.message("note", f"{stale} names it as its parent, but was invalid before")
    for name in found.snapshots:
        output.log.warning('%s: the snapshot "%s" can\'t be gone back to without it', found.link.label, name)
