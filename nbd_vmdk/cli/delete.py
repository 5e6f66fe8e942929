"""``nbd-vmdk delete``: all files of an image."""

import sys
from typing import Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.managing import allow_dir_option, as_given, dry_run_option
from nbd_vmdk.cli.opening import image_argument, json_option


@click.command(short_help="Delete an image with all its files.")
@click.option("--with-children", is_flag=True, help="Delete all links that stand on it, too.")
@dry_run_option
@allow_dir_option
@json_option
@image_argument
def delete(image: str, dry_run: bool, as_json: bool, **options: Any) -> int:
    """Delete IMAGE: its descriptor and all files that are its alone.  Its parents stay.

    An image on which others stand is refused, and so is one that is in use.  Files outside its folder are
    never touched.  A symbolic link is refused: rm removes it, and delete the image by its own name.
    """
    from nbd_vmdk.ops.linkset.delete import delete as run

    done = run(image, dry_run=dry_run, **options)
    if as_json:
        output.json_object({"done": not dry_run, **done.as_dict()})
        return 0
    for path in done.removes:
        shown = as_given(path, image, *options["allow_dirs"])
        output.line(f"{'to be removed' if dry_run else 'removed'}: {shown}")
    sys.stdout.flush()
    for user in done.users:
        output.message("note", f"{user} names it, and will not find it")
    return 0
