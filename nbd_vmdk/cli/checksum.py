"""``nbd-vmdk checksum``: a number for what a guest sees."""

from typing import Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import image_argument, json_option, open_options
from nbd_vmdk.cli.progress import progress


@click.command(short_help="Compute a checksum of a disk's content, the same for every kind.")
@click.option(
    "--algorithm",
    type=click.Choice(["sha256", "blake2b"]),
    default="sha256",
    show_default=True,
    help="The hash function; sha256 is the faster one on processors of our days.",
)
@click.option("--plain", is_flag=True, help="Hash all bytes in order, as sha256sum or b2sum would.")
@click.option("--raw", is_flag=True, help="Take IMAGE as raw bytes, whatever it begins with.")
@open_options
@json_option
@image_argument
def checksum(image: str, algorithm: str, plain: bool, raw: bool, as_json: bool, **options: Any) -> int:
    """Compute a checksum of what a guest sees in IMAGE: a VMDK with its chain, or a raw file or device.

    It is the same for all kinds of image that show the same bytes.  By default it is the hash of a tree, for
    which zeros need not be read and all processors are used; how it is defined is told in the package's
    module nbd_vmdk.ops.checksum.  With --plain it is the hash of all bytes, which other tools compute too,
    and takes as long as the disk is large.
    """
    from nbd_vmdk.ops.checksum import BLOCK, plain_checksum, tree_checksum
    from nbd_vmdk.ops.content import open_content

    with open_content(image, raw=raw, **options) as content, progress("summing up") as told:
        compute = plain_checksum if plain else tree_checksum
        digest = compute(content, algorithm, told)
        size = content.size
    if as_json:
        facts = {"filename": image, "virtual-size": size, "algorithm": algorithm, "tree": not plain}
        output.json_object(facts | ({} if plain else {"block-size": BLOCK}) | {"checksum": digest})
    else:
        output.line(f"{'' if plain else f'tree-{algorithm}:'}{digest}  {output.clean(image)}")
    return 0
