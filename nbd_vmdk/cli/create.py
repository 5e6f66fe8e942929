"""``nbd-vmdk create``: a new, empty image, a child of another one, or a disk put together from files."""

from typing import Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import ImagePath, allow_dir, as_bytes, json_option
from nbd_vmdk.cli.progress import progress
from nbd_vmdk.cli.shaping import shape_options
from nbd_vmdk.units import format_size


@click.command(short_help="Make a new, empty image.")
@click.option(
    "--type",
    "kind",
    metavar="KIND",
    help="monolithicSparse (the usual one), monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, "
    "streamOptimized, vmfs, vmfsSparse or custom.",
)
@click.option(
    "--for",
    "product",
    metavar="PRODUCT",
    help="Choose what workstation, esxi, ova, qemu or virtualbox takes, and say why.",
)
@click.option("--parent", type=ImagePath(), metavar="FILE", help="Make a child of FILE, of the same size.")
@shape_options("lsilogic")
@click.option(
    "--extent",
    "extents",
    metavar="LINE",
    multiple=True,
    help="For custom: an extent as a descriptor has it, 'RW 2048 FLAT \"data.img\" 0', sizes in sectors. "
    "The file is used as it is, or made if it is not there.  Repeat in the order of the disk.",
)
@allow_dir("Let the image and its parents name files in DIR, too.")
@json_option
@click.argument("image", type=ImagePath())
@click.argument("size", callback=as_bytes, required=False)
def create(image: str, size: int | None, as_json: bool, **options: Any) -> int:
    """Make IMAGE, an empty disk of SIZE (20G, 512M, or bytes).

    All its files appear at once, and none in the place of another.  With --parent, SIZE is the parent's; the
    parent is only read, and must not be written from then on.
    """
    from nbd_vmdk.ops.create import create_image

    with progress("writing zeros") as told:
        made = create_image(image, size, progress=told, **options)
    for warning in made.warnings:
        output.log.warning("%s", warning)
    for note in made.notes:
        output.message("note", note)
    if as_json:
        output.json_object(made.as_dict())
        return 0
    for file in made.files:
        what = f"{made.create_type}, {format_size(made.size)}" if file is made.files[-1] else file.what
        output.line(f"{output.clean(file.path)}: {what}")
    return 0
