"""The options that say how a new VMDK is made: the same for create and convert."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from nbd_vmdk.cli.opening import all_of, as_bytes

F = TypeVar("F", bound=Callable[..., Any])

#: Their names, as create_image knows them.
SHAPE: Final = ("adapter", "hwversion", "grain_size", "extent_size", "preallocation", "zeroed_grain")


def shape_options(adapter: str) -> Callable[[F], F]:
    """The options called :data:`SHAPE`; ``adapter`` says which one is the default."""
    return all_of(
        click.option(
            "--adapter", metavar="NAME", help=f"ide, buslogic, lsilogic or legacyESX.  [default: {adapter}]"
        ),
        click.option("--hwversion", type=int, metavar="N", help="Virtual hardware version.  [default: 10]"),
        click.option(
            "--grain-size",
            callback=as_bytes,
            metavar="SIZE",
            help="Unit of allocation.  [default: 64K; vmfsSparse: 512]",
        ),
        click.option(
            "--extent-size",
            callback=as_bytes,
            metavar="SIZE",
            help="Size of the pieces of twoGb kinds.  [default: 2047M]",
        ),
        click.option(
            "--preallocation",
            type=click.Choice(["off", "falloc", "full"]),
            help="For flat kinds: take space as it is written, reserve it, or write it out.  "
            "vmfs with off is thin.",
        ),
        click.option(
            "--zeroed-grain", is_flag=True, help="Let tables say 'zeros' (version 2 of the header)."
        ),
    )
