"""``nbd-vmdk resize``: another size for a disk, in place."""

from typing import Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.managing import allow_dir_option, dry_run_option
from nbd_vmdk.cli.opening import drop_ctk_option, image_argument, json_option
from nbd_vmdk.cli.progress import progress
from nbd_vmdk.units import format_size, parse_size


class _Sizes(click.Command):
    """A command whose arguments may begin with a minus sign and a digit."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Let -1G pass for an argument, as there is no such option."""
        if "--" not in args:
            minus = [word for word in args if word[:1] == "-" and word[1:2].isdigit()]
            args = [word for word in args if word not in minus] + (["--", *minus] if minus else [])
        return super().parse_args(ctx, args)


def _size(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, int]:
    """(-1 or 1 for a difference, 0 for a size; bytes)."""
    sign = {"+": 1, "-": -1}.get(text[:1], 0)
    try:
        return sign, parse_size(text[1:] if sign else text)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


@click.command(cls=_Sizes, short_help="Give an image another size, in place.")
@click.option("--shrink", is_flag=True, help="Give up data that lies behind the new end.")
@click.option("--reserve", is_flag=True, help="For flat kinds: take the space of what is added at once.")
@dry_run_option
@drop_ctk_option
@allow_dir_option
@json_option
@image_argument
@click.argument("size", callback=_size, metavar="SIZE|+SIZE|-SIZE")
def resize(image: str, size: tuple[int, int], dry_run: bool, as_json: bool, **options: Any) -> int:
    """Make IMAGE as large as SIZE, or larger or smaller by it.

    Whatever stops it leaves the old disk or the new one, and the same command goes on.  It shrinks only if
    what is cut off is all zeros, and a disk on which others stand keeps its size.  Partitions and file
    systems inside are not changed: make them larger afterwards, or smaller before, in the guest.
    """
    from nbd_vmdk.ops.resize import resize as run

    sign, amount = size
    with progress("looking for data") as told:
        done = run(
            image,
            None if sign else amount,
            by=sign * amount,
            dry_run=dry_run,
            progress=told,
            **options,
        )
    if as_json:
        output.json_object({"done": not dry_run, **done.as_dict()})
        return 0
    for step in done.steps if dry_run else ():
        output.line(output.clean(step))
    if done.lost is not None:
        word = "would be" if dry_run else "is"
        output.log.warning("%s: data from byte %d on %s lost", done.image, done.lost, word)
    if done.old_size == done.new_size:
        output.line(f"{output.clean(done.image)}: {format_size(done.new_size)}, as before")
        return 0
    sizes = f"{format_size(done.old_size)} -> {format_size(done.new_size)}"
    output.line(f"{output.clean(done.image)}: {'would be ' if dry_run else ''}{sizes}")
    if done.new_size > done.old_size:
        output.message("note", "partitions and file systems inside are as they were: the guest can grow them")
    return 0
