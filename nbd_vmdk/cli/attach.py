"""``nbd-vmdk attach``, ``detach``, ``mount`` and ``umount``: an image as a block device, or as a file."""

import shlex
from collections.abc import Sequence
from typing import Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import ImagePath, Number, json_option, open_options
from nbd_vmdk.errors import OptionError
from nbd_vmdk.units import format_size


@click.command(short_help="Make an image, or an NBD export, a block device (as root).")
@click.option("-r", "--read-only", is_flag=True, help="For reading only; nothing is changed.")
@click.option(
    "--connections",
    type=Number(1, 64),
    default=4,
    metavar="N",
    help="Connections by which the kernel talks to the server.  [default: 4]",
)
@open_options
@json_option
@click.argument("image", type=ImagePath(exports=True), metavar="IMAGE|URI")
@click.argument("device", required=False)
def attach(
    image: str, device: str | None, as_json: bool, read_only: bool, connections: int, **options: Any
) -> int:
    """Attach IMAGE, or what an NBD URI names, to DEVICE, or to the first NBD device that is free.

    An encrypted server is one like 'nbds://HOST/NAME?tls-certificates=DIR', with ca-cert.pem in DIR, and
    client-cert.pem and client-key.pem if it wants to see one.

    Returns when the device and its partitions are there, and prints their names.  The server stays in the
    background until the device is detached: 'nbd-vmdk detach' does that, and makes sure.  It takes nbd-client
    and the kernel's module (modprobe nbd).
    """
    from nbd_vmdk.attaching import devices

    kernel = devices.Kernel()
    found = devices.attach(
        image,
        device,
        read_only=read_only,
        connections=connections,
        options=_words(image, options),
        kernel=kernel,
    )
    for warning in found.warnings:
        output.message("warning", warning)
    if as_json:
        facts = {"device": found.device, "size": found.size, "partitions": list(found.partitions)}
        output.json_object({**facts, "warnings": list(found.warnings)})
    else:
        for path in (found.device, *found.partitions):
            output.line(path)
        output.message("note", f"{format_size(found.size)}; to end it: nbd-vmdk detach {found.device}")
    return 0


@click.command(short_help="Take an attached device away, cleanly, and make sure that it is gone.")
@json_option
@click.argument("device")
def detach(device: str, as_json: bool) -> int:
    """Flush DEVICE, detach it, and wait until the kernel has let go of it and the image is closed."""
    from nbd_vmdk.attaching import devices

    return _ended(device, devices.detach(device, kernel=devices.Kernel()), as_json)


@click.command(short_help="Show an image, or an NBD export, as a raw file; root is not needed.")
@click.option("-r", "--read-only", is_flag=True, help="For reading only; nothing is changed.")
@open_options
@json_option
@click.argument("image", type=ImagePath(exports=True), metavar="IMAGE|URI")
@click.argument("folder", type=ImagePath(), metavar="DIR")
def mount(image: str, folder: str, as_json: bool, read_only: bool, **options: Any) -> int:
    """Show the disk of IMAGE, or of an NBD URI, as the raw file DIR/nbd, and print its name.

    DIR is an empty folder.  The server stays in the background until 'nbd-vmdk umount DIR'.  It takes nbdfuse
    and, for who is not root, fusermount3.
    """
    from nbd_vmdk.attaching import mounts

    file = mounts.mount(image, folder, read_only=read_only, options=_words(image, options))
    commands = mounts.next_commands(file, read_only=read_only)
    if as_json:
        output.json_object({"file": file, "commands": [command for _what, command in commands]})
    else:
        output.line(file)
        for what, command in commands:
            output.message("note", f"{what}: {command}")
        output.message("note", f"to end it: nbd-vmdk umount {shlex.quote(folder)}")
    return 0


@click.command(short_help="Take a mount away, cleanly, and wait until the image is closed.")
@json_option
@click.argument("folder", type=ImagePath(), metavar="DIR")
def umount(folder: str, as_json: bool) -> int:
    """Write out what was written to DIR/nbd, unmount DIR, and wait until the image is closed."""
    from nbd_vmdk.attaching import mounts

    return _ended(folder, mounts.umount(folder), as_json)


def _ended(what: str, warnings: Sequence[str], as_json: bool) -> int:
    for warning in warnings:
        output.message("warning", warning)
    if as_json:
        output.json_object({"ended": what, "warnings": list(warnings)})
    return 0


def _words(image: str, options: dict[str, Any]) -> list[str]:
    """The options for opening an image as words for ``serve``; a URI has none."""
    words = []
    for name, value in options.items():
        word = "--" + ("allow-dir" if name == "allow_dirs" else name.replace("_", "-"))
        if value is True:
            words.append(word)
        elif isinstance(value, tuple):
            words += [each for folder in value for each in (word, folder)]
        elif value:
            words += [word, value]
    if "://" in image:
        if words:
            raise OptionError(image, why=f"{words[0]} is for opening an image, and this is a server's")
        return []
    from nbd_vmdk.vm import locate

    # One disk is wanted: where there are several, this says how to name one.
    locate(image, allow_dirs=options["allow_dirs"], allow_devices=options["allow_devices"])
    return words
