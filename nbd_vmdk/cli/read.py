"""``nbd-vmdk read``: a range of the disk to a file or a pipe."""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import image_argument, json_option, open_options
from nbd_vmdk.cli.progress import Progress, progress
from nbd_vmdk.cli.ranges import length_option, no_dash, offset_option, standard
from nbd_vmdk.errors import OptionError, StorageError

if TYPE_CHECKING:
    from nbd_vmdk.ops.content import Content


@click.command(short_help="Write a range of the disk to stdout or to a file.")
@offset_option("Where to begin, such as 1M or 2048s (sectors).  [default: 0]")
@length_option("How much.  [default: all that follows]")
@click.option(
    "--output",
    "to",
    type=click.Path(readable=False),
    metavar="FILE",
    callback=no_dash,
    help="A new file, or a device, instead of stdout.",
)
@click.option("--raw", is_flag=True, help="Take IMAGE as raw bytes, whatever it begins with.")
@open_options
@json_option
@image_argument
def read(
    image: str, offset: int, length: int | None, to: str | None, raw: bool, as_json: bool, **options: Any
) -> int:
    """Write the bytes of a range of IMAGE, as a guest sees them, to stdout.

    IMAGE is a VMDK of any kind, with its chain, or a raw file or device.  A file whose name does not end in
    .vmdk is raw, but only if it does not look like something else; --raw says that it is.

    With --output they go to a new file, which appears when it is whole, with holes where the disk has
    zeros; or to a device or a pipe that is there.
    """
    from nbd_vmdk.ops.content import open_content
    from nbd_vmdk.ops.transfer import check_range, send

    stdout = -1
    if to is None:
        if as_json:
            raise OptionError(None, why="--json needs --output: stdout is for the disk's bytes")
        stdout = standard(sys.stdout, "stdout", "name a file with --output, or add: | xxd | less")
    with open_content(image, raw=raw, **options) as content, progress("reading") as told:
        length = check_range(content, offset, length)
        if to is None:
            with _told("stdout"):
                send(content, offset, length, lambda buf: _write(stdout, buf), progress=told)
        elif _is_special(to):
            _to_special(content, offset, length, to, told)
        else:
            _to_file(content, offset, length, to, told)
    if as_json:
        output.json_object({"filename": image, "start": offset, "length": length, "output": to})
    return 0


def _write(descriptor: int, buf: memoryview) -> None:
    done = 0
    while done < len(buf):
        done += os.write(descriptor, buf[done:])


@contextmanager
def _told(to: str) -> Iterator[None]:
    """Say where writing failed.  A reader that left is its own affair: main() knows what to do then."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError.of(error, to, "write") from error


def _is_special(path: str) -> bool:
    """Whether there is something that is no file, and so can't be replaced by one."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _to_special(content: "Content", offset: int, length: int, to: str, told: Progress) -> None:
    """To a device or a pipe that is there."""
    from nbd_vmdk.ops.transfer import send

    with _told(to), open(to, "wb", buffering=0) as file:
        send(content, offset, length, lambda buf: _write(file.fileno(), buf), progress=told)
        if stat.S_ISBLK(os.fstat(file.fileno()).st_mode):
            os.fsync(file.fileno())


def _to_file(content: "Content", offset: int, length: int, to: str, told: Progress) -> None:
    """To a new file, which nobody sees before it is whole."""
    from nbd_vmdk.ops.transfer import send
    from nbd_vmdk.storage.newfiles import NewFiles

    with NewFiles(to) as new:
        name = os.path.basename(to)
        with _told(to), open(new.path(name), "xb", buffering=0) as file:
            send(
                content,
                offset,
                length,
                lambda buf: _write(file.fileno(), buf),
                lambda count: file.seek(count, os.SEEK_CUR),
                told,
            )
            file.truncate(length)
        new.publish(main=name)
