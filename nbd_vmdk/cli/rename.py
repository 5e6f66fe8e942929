"""``nbd-vmdk rename``: another name or another place for an image."""

import sys
from typing import Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.managing import (
    allow_dir_option,
    as_given,
    dry_run_option,
    edit_vm_option,
    tell_machines,
)
from nbd_vmdk.cli.opening import ImagePath, json_option
from nbd_vmdk.cli.progress import progress


@click.command(short_help="Rename an image, or move it, with all its files.")
@edit_vm_option
@dry_run_option
@allow_dir_option
@json_option
@click.argument("old", type=ImagePath())
@click.argument("new", type=ImagePath(), metavar="NEW|FOLDER")
def rename(old: str, new: str, edit_vm: bool, dry_run: bool, as_json: bool, **options: Any) -> int:
    """Call the image OLD NEW, or move it to FOLDER: all its files, and the names inside.

    Its children, in its own and the new folder and in those of --allow-dir, are told.  If it is stopped, by
    whatever, the same command goes on.  To another file system the files are copied first.
    """
    from nbd_vmdk.ops.linkset.rename import rename as run

    with progress("copying") as told:
        done = run(old, new, edit_vm=edit_vm, dry_run=dry_run, progress=told, **options)
    if as_json:
        output.json_object({"done": not dry_run, **done.as_dict()})
        return 0
    for before, after in done.files:
        output.line(f"{as_given(before, old, *options['allow_dirs'])} -> {as_given(after, new, old)}")
    sys.stdout.flush()
    for child in done.children:
        output.message("note", f"{child} {'would be' if dry_run else 'was'} told the new name of its parent")
    for hint in done.hints:
        output.message("note", hint)
    tell_machines(done.machines, done.old, edited=edit_vm, dry_run=dry_run)
    return 0
