"""``nbd-vmdk compact``: an image that occupies no more than it needs."""

from typing import Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.managing import allow_dir_option, dry_run_option
from nbd_vmdk.cli.opening import Number, drop_ctk_option, image_argument, json_option
from nbd_vmdk.cli.progress import progress
from nbd_vmdk.errors import OptionError
from nbd_vmdk.units import format_size


@click.command(short_help="Give back the space of zeros and of what is not used.")
@click.option(
    "--rewrite", is_flag=True, help="Make the files anew, in the order of the disk; needs room beside."
)
@click.option(
    "--compress-level",
    "level",
    type=Number(1, 12),
    metavar="N",
    help="With --rewrite, of streamOptimized images: 1 is fastest, 12 smallest.  [default: 6]",
)
@dry_run_option
@drop_ctk_option
@allow_dir_option
@json_option
@image_argument
def compact(image: str, rewrite: bool, dry_run: bool, as_json: bool, **options: Any) -> int:
    """Make IMAGE smaller without changing what its disk shows.

    Grains that are all zeros are released, and space in the files that nothing uses.  IMAGE may be any link
    of a chain: its children stay valid, its parents are not touched.  If it is stopped, by whatever, nothing
    is lost, and the same command goes on.  Files without tables lose the space of zeros even if it was set
    aside for them.
    """
    from nbd_vmdk.codec import MAX_LEVEL
    from nbd_vmdk.ops.compact import compact as run

    if (options["level"] or 0) > MAX_LEVEL:
        raise OptionError(None, why=f"--compress-level goes up to {MAX_LEVEL} here: libdeflate is missing")
    with progress("looking for zeros" if dry_run else "compacting") as told:
        done = run(image, rewrite=rewrite, dry_run=dry_run, progress=told, **options)
    if as_json:
        output.json_object({"done": not dry_run, **done.as_dict()})
        return 0
    name = output.clean(done.image)
    if dry_run:
        freed = f"{format_size(done.freed)} of zeros and {format_size(done.unused)} that nothing uses"
        output.line(f"{name}: {format_size(done.before)}; {freed} could be given back")
    elif done.after is not None:
        output.line(f"{name}: {format_size(done.before)} -> {format_size(done.after)}")
    for note in done.notes:
        output.message("note", note)
    return 0
