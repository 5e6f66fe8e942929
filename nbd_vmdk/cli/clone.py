"""``nbd-vmdk clone``: a copy of an image with all its parents, or a child of it."""

from typing import Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.managing import allow_dir_option, as_given, dry_run_option
from nbd_vmdk.cli.opening import ImagePath, json_option
from nbd_vmdk.cli.progress import progress
from nbd_vmdk.errors import OptionError
from nbd_vmdk.units import format_size


@click.command(short_help="Copy an image with all its parents, file by file.")
@click.option("--linked", is_flag=True, help="Make a child of SOURCE instead, which needs it from then on.")
@dry_run_option
@allow_dir_option
@json_option
@click.argument("source", type=ImagePath())
@click.argument("target", type=ImagePath(), metavar="TARGET|FOLDER")
def clone(
    source: str,
    target: str,
    linked: bool,
    dry_run: bool,
    as_json: bool,
    allow_dirs: tuple[str, ...],
) -> int:
    """Copy the image SOURCE and all its parents to TARGET, each link as it is, holes kept.

    The copies stand in one folder and know each other by their new names; the top link's is printed.  Where a
    file system lets files share blocks, as XFS and btrfs do, they share those of SOURCE.  To put a chain
    together into one image, convert it.
    """
    options: dict[str, Any] = {"allow_dirs": allow_dirs}
    if linked:
        from nbd_vmdk.ops.snapshot.create import create_child

        if dry_run:
            raise OptionError(None, why="--dry-run is not for --linked, which makes one small file")
        made = create_child(source, target, **options)
        for warning in made.warnings:
            output.log.warning("%s", warning)
        for note in made.notes:
            output.message("note", note)
        if as_json:
            output.json_object({"done": True, "image": made.path, "linked": True})
        else:
            output.line(output.clean(made.path))
        return 0
    from nbd_vmdk.ops.linkset.clone import clone as run

    with progress("copying") as told:
        done = run(source, target, dry_run=dry_run, progress=told, **options)
    if as_json:
        output.json_object({"done": not dry_run, "linked": False, **done.as_dict()})
        return 0
    if dry_run:
        for before, after in done.files:
            output.line(f"{as_given(before, source, *allow_dirs)} -> {output.clean(after)}")
        output.message("note", f"{format_size(done.bytes)} in files, holes among them")
    else:
        output.line(output.clean(done.image))
    return 0
