"""Options of the verbs that change whole images: resize, compact, rename, clone, delete, snapshot."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import allow_dir

if TYPE_CHECKING:
    from nbd_vmdk.ops.snapshot.machines import Mention

dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
allow_dir_option = allow_dir("Let images name files in DIR, and look for relatives there too.")
edit_vm_option = click.option(
    "--edit-vm", is_flag=True, help="Change the lines that name it in the .vmx and .vmsd files beside it."
)
#: The same for verbs that leave the snapshots of machines alone.
edit_vmx_option = click.option(
    "--edit-vm", is_flag=True, help="Change the line that names it as a machine's disk in the .vmx beside it."
)


def tell_machines(machines: "Iterable[Mention]", image: str, *, edited: bool, dry_run: bool = False) -> None:
    """Say which lines of machines' files name something new, or have to; ``image`` is what they named."""
    if edited and not machines:
        output.log.warning("%s: no machine's file beside it names it", image)
    for each in machines:
        line = f'{each.key} = "{each.new}"'
        if edited:
            output.message("note", f"{each.file} {'would say' if dry_run else 'now says'} {line}")
        else:
            # Once it is done the same command does not go on with it.
            has_to, does = ("would have to", "; --edit-vm does that") if dry_run else ("must now", "")
            output.message("note", f"{each.file} {has_to} say {line}{does}")


def as_given(path: str, *given: str) -> str:
    """A file's real path as one would write it who named the files or folders ``given``, fit to be shown.

    What is in none of their folders is shown as it is.
    """
    from nbd_vmdk.vm import container_of

    for word in given:
        container = container_of(word)
        folder = container if os.path.isdir(container) else os.path.dirname(container)
        real = os.path.realpath(folder or os.curdir)
        if os.path.commonpath((path, real)) == real:
            return output.clean(os.path.normpath(os.path.join(folder, os.path.relpath(path, real))))
    return output.clean(path)
