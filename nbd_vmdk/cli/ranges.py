"""The options that name a range of guest bytes, and a file or stream beside the image."""

import os
from collections.abc import Callable
from typing import Any, TextIO

import click

from nbd_vmdk.cli.opening import as_bytes
from nbd_vmdk.errors import OptionError


def offset_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--offset, 0 by default."""
    return click.option("--offset", metavar="SIZE", default="0", callback=as_bytes, help=text)


def length_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--length, None if it is not given."""
    return click.option("--length", metavar="SIZE", callback=as_bytes, help=text)


def no_dash(_context: click.Context, _parameter: click.Parameter, path: str | None) -> str | None:
    """None for ``-``, by which everybody means stdin or stdout; OptionError for nothing."""
    if path == "":
        raise OptionError(None, why=f"{path!r} is no file name", hint="is a variable of the shell empty?")
    return None if path == "-" else path


def standard(stream: TextIO | None, word: str, hint: str) -> int:
    """The descriptor of stdin or stdout, for a disk's bytes.  Raises OptionError if it is none to use so."""
    if (
        stream is None or getattr(stream, "name", None) == os.devnull
    ):  # it was closed beforehand: see output.prepare
        raise OptionError(None, why=f"{word} is closed", hint=hint)
    if stream.isatty():
        raise OptionError(None, why=f"{word} is a terminal", hint=hint)
    return stream.fileno()
