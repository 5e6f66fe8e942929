"""The options that say how to open an image, the same for every verb that opens one."""

import os
import shlex
from collections.abc import Callable
from typing import Any, TypeVar

import click

from nbd_vmdk.errors import OptionError
from nbd_vmdk.options import DEFAULT_CACHE_SIZE
from nbd_vmdk.units import parse_size

F = TypeVar("F", bound=Callable[..., Any])


class ImagePath(click.Path):
    """An image, or a file of another sort, as the user names it.

    Whether it is there and may be read is the engine's to say; only that a URL is none is said here, and
    that a slash at the end means a folder.  With ``exports`` those of NBD exports are taken as well.
    """

    def __init__(self, *, exports: bool = False) -> None:
        super().__init__(readable=False)
        self._exports = exports

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See ParamType; OptionError for a URL, for a file named as if it were a folder, and for nothing."""
        if value == "":
            raise OptionError(
                None, why=f"{value!r} is no file name", hint="is a variable of the shell empty?"
            )
        if isinstance(value, str) and "://" in value and not os.path.lexists(value):
            from nbd_vmdk.converting.targets import is_uri

            if not is_uri(value):
                raise OptionError(
                    value, why="a URL, and no file", hint="download it, and name the file that you get"
                )
            if not self._exports:
                hint = f"make an image of it first: nbd-vmdk convert {shlex.quote(value)} new.vmdk"
                raise OptionError(value, why="an NBD export, and no file", hint=hint)
        if isinstance(value, str) and value.endswith("/"):
            plain = value.rstrip("/")
            if os.path.exists(plain) and not os.path.isdir(plain):
                hint = f"without the slash at its end: {shlex.quote(plain)}"
                raise OptionError(value, why="is a file, and no folder", hint=hint)
        return super().convert(value, param, ctx)


class Number(click.IntRange):
    """A whole number in a range; what is none is called no number, not 'no valid integer range'."""

    name = "number"


image_argument = click.argument("image", type=ImagePath())

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def as_bytes(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """Bytes meant by a size such as 64M; None if it is not given.  For click to call."""
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


def all_of(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator that gives a command several options; ``--help`` shows them in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def allow_dir(text: str) -> Callable[[F], F]:
    """--allow-dir, and what that means."""
    return click.option(
        "--allow-dir",
        "allow_dirs",
        type=click.Path(readable=False),
        metavar="DIR",
        multiple=True,
        help=f"{text}  May be repeated.",
    )


write_parent_option = click.option(
    "--write-parent", is_flag=True, help="Write although a snapshot stands on this image, and spoil that."
)
drop_ctk_option = click.option(
    "--drop-ctk", is_flag=True, help="Write although changes are tracked, and end the tracking."
)

#: Which files an image may be made of.  The names of these options, and of all below, are OpenOptions'.
place_options = all_of(
    click.option("--parent", type=ImagePath(), metavar="FILE", help="Use FILE as the parent of IMAGE."),
    allow_dir("Let the image name files in DIR, besides those in its own folder."),
    click.option(
        "--allow-devices", is_flag=True, help="Let the image name block devices in an allowed folder."
    ),
)

#: What every verb takes that opens an image to write to it.
change_options = all_of(
    place_options,
    click.option("--ignore-cid", is_flag=True, help="Warn of content IDs that do not agree, and go on."),
)

#: What every verb takes that opens an image.
open_options = all_of(
    change_options,
    click.option(
        "--salvage",
        is_flag=True,
        help="Read what is left of a damaged streamOptimized image; the rest is EIO.",
    ),
)

#: What matters only where an image is served.
serve_options = all_of(
    write_parent_option,
    drop_ctk_option,
    click.option(
        "--cache-size",
        callback=as_bytes,
        metavar="SIZE",
        default=str(DEFAULT_CACHE_SIZE),
        help="Memory for tables and inflated grains; a new streamOptimized disk takes 32M besides.  "
        "[default: 64M]",
    ),
)
