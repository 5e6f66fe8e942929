"""``nbd-vmdk compare``: where two disks differ."""

from typing import TYPE_CHECKING

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import ImagePath, Number, json_option, open_options
from nbd_vmdk.cli.progress import progress
from nbd_vmdk.errors import VmdkError
from nbd_vmdk.units import format_size

if TYPE_CHECKING:
    from nbd_vmdk.ops.compare import Comparison

EQUAL, DIFFERENT, TROUBLE = 0, 1, 2
_LIMIT = 20


@click.command(short_help="Show where two disks differ.")
@click.option(
    "--raw",
    type=click.Choice(["a", "b", "both"]),
    help="Take A, B or both as raw bytes, whatever they begin with.",
)
@click.option("--limit", type=Number(min=0), default=_LIMIT, show_default=True, metavar="N",
              help="List the first N ranges; 0 lists all.")  # fmt: skip
@click.option("--first", is_flag=True, help="Stop at the first difference.")
@click.option("--strict", is_flag=True, help="Disks of different sizes differ, whatever they hold.")
@open_options
@json_option
@click.argument("a", type=ImagePath())
@click.argument("b", type=ImagePath())
def compare(
    a: str,
    b: str,
    raw: str | None,
    limit: int,
    first: bool,
    strict: bool,
    as_json: bool,
    parent: str | None,
    **options: object,
) -> int:
    """Show the ranges in which A and B differ, in whole sectors.

    Each is a VMDK of any kind, with its chain, or a raw file or device.  A file whose name does not end in
    .vmdk is raw, but only if it does not look like something else; --raw says that it is.  What both know
    to be zeros, or have from the same parent, is not read.  If one is larger, what it has beyond the
    other's end must be zeros; with --strict the sizes must be equal too.  --parent is for A.

    Exit code, as diff's: 0 equal, 1 different, 2 they could not be compared.
    """
    from nbd_vmdk.ops import compare as comparing
    from nbd_vmdk.ops.content import open_content

    try:
        with (
            open_content(a, raw=raw in ("a", "both"), parent=parent, **options) as one,
            open_content(b, raw=raw in ("b", "both"), **options) as other,
            progress("comparing") as told,
        ):
            found = comparing.compare(one, other, limit=limit or None, first_only=first, progress=told)
    except VmdkError as error:
        error = output.advised(error)
        if as_json:
            output.json_object({"error": error.as_dict()})
        output.error(error)
        return TROUBLE
    size_a, size_b = found.sizes
    equal = not found.count and not (strict and size_a != size_b)
    if as_json:
        output.json_object(
            {
                "equal": equal,
                "a": {"filename": a, "virtual-size": size_a},
                "b": {"filename": b, "virtual-size": size_b},
                "complete": not (first and found.count),
                "range-count": found.count,
                "different-bytes": found.length,
                "ranges": [{"start": each.offset, "length": each.length} for each in found.ranges],
            }
        )
    else:
        _show(found, stopped=first)
        names = f"{output.clean(a)} and {output.clean(b)}"
        if size_a != size_b:
            output.line(f"{names} have different sizes: {size_a} and {size_b} bytes")
        if equal:
            output.line(f"{names} are equal" + ("" if size_a == size_b else " but for zeros at the end"))
        elif found.count and not first:
            ranges = "1 range" if found.count == 1 else f"{found.count} ranges"
            output.line(f"{names} differ in {ranges}, {format_size(found.length)} ({found.length} bytes)")
        else:
            output.line(f"{names} differ")
    return EQUAL if equal else DIFFERENT


def _show(found: "Comparison", *, stopped: bool) -> None:
    """The ranges as a table, and how many are not in it."""
    if not found.ranges:
        return
    width = max(len(str(max(found.sizes))), len("length"))
    output.line(f"{'start':>{width}}  {'length':>{width}}")
    for offset, length in found.ranges:
        output.line(f"{offset:>{width}}  {length:>{width}}")
    left = found.count - len(found.ranges)
    if left and not stopped:
        output.line(f"{'…':>{width}}  and {left} more (--limit 0 lists all)")
