"""The options that name a range of guest bytes, and a file or stream beside the image."""

from collections.abc import Callable
from typing import Any, TextIO

import click

from nbd_vmdk.errors import OptionError
from nbd_vmdk.units import parse_size


def _size(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """Bytes meant by a size such as 64M."""
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


def offset_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--offset, 0 by default."""
    return click.option("--offset", metavar="SIZE", default="0", callback=_size, help=text)


def length_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--length, None if it is not given."""
    return click.option("--length", metavar="SIZE", callback=_size, help=text)


def standard(stream: TextIO | None, word: str, hint: str) -> int:
    """The descriptor of stdin or stdout, for a disk's bytes.  Raises OptionError if it is none to use so."""
    if stream is None:  # closed by whoever started us
        raise OptionError(None, why=f"{word} is closed", hint=hint)
    if stream.isatty():
        raise OptionError(None, why=f"{word} is a terminal", hint=hint)
    return stream.fileno()
