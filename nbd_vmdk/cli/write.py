"""``nbd-vmdk write``: bytes of a file or a pipe into the disk."""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import (
    change_options,
    drop_ctk_option,
    image_argument,
    json_option,
    write_parent_option,
)
from nbd_vmdk.cli.progress import progress
from nbd_vmdk.cli.ranges import length_option, no_dash, offset_option, standard
from nbd_vmdk.errors import (
    FileMissing,
    InputTooLong,
    InputTooShort,
    OptionError,
    StorageError,
    VmdkError,
)
from nbd_vmdk.units import GIB

if TYPE_CHECKING:
    from nbd_vmdk.disk import Disk

#: Bytes zeroed or trimmed between two looks at the clock; a multiple of every grain.
_STEP: Final = GIB


@click.command(short_help="Write bytes from stdin or a file into the disk.")
@offset_option("Where to begin, such as 1M or 2048s (sectors).  [default: 0]")
@length_option("How much to take of the input.  [default: all]")
@click.option(
    "--input",
    "source",
    type=click.Path(readable=False),
    metavar="FILE",
    callback=no_dash,
    help="Take FILE instead of stdin.",
)
@click.option("--zero", is_flag=True, help="Make --length bytes read as zeros; no input is read.")
@click.option("--trim", is_flag=True, help="Give the space of --length bytes back; no input is read.")
@write_parent_option
@drop_ctk_option
@change_options
@json_option
@image_argument
def write(
    image: str,
    offset: int,
    length: int | None,
    source: str | None,
    zero: bool,
    trim: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Write the bytes of stdin into IMAGE from --offset on, as a guest would; when it ends they are durable.

    Any bytes may be written, parts of sectors too.  What is longer than the disk has room for is refused
    before anything is changed; a pipe, whose length nobody knows, fills the disk to its end and fails then.
    Nobody else may use the image meanwhile, and parents are never written.
    """
    nothing_to_read = zero or trim
    if zero and trim:
        raise OptionError(None, why="--zero and --trim exclude each other")
    if nothing_to_read and (length is None or source is not None):
        raise OptionError(None, why="--zero and --trim need --length, and no --input")
    from nbd_vmdk.opening import open_disk
    from nbd_vmdk.ops.content import DiskContent
    from nbd_vmdk.ops.transfer import check_range

    with _input(None if nothing_to_read else source, wanted=not nothing_to_read) as (descriptor, known):
        if length is not None and known is not None and known < length:
            why = f"the input has {known} bytes, not {length}"
            raise OptionError(source, why=why, hint="nothing was written")
        wanted = length if length is not None else known
        with open_disk(image, writable=True, **options) as disk:
            for warning in disk.warnings:
                output.log.warning("%s", warning)
            if not disk.writable:
                raise disk.no_writing()
            check_range(DiskContent(disk), offset, wanted or 0)
            if descriptor is not None and _is_part(disk, descriptor):
                raise OptionError(source, why="the input is a file of the image itself")
            if descriptor is None:
                assert length is not None
                _clear(disk, offset, length, trim=trim)
                done = length
            else:
                done = _copy(disk, offset, wanted, descriptor, source or "stdin")
    if as_json:
        what = "zeroed" if zero else "trimmed" if trim else "written"
        output.json_object({"filename": image, "start": offset, "length": done, "done": what})
    return 0


def _is_part(disk: "Disk", descriptor: int) -> bool:
    """Whether the input is what is being written, which would be changing under the reader."""
    found = os.fstat(descriptor)
    files = {storage.identity for link in disk.links for storage in link.storages}
    return (found.st_dev, found.st_ino) in files


def _copy(disk: "Disk", offset: int, length: int | None, descriptor: int, name: str) -> int:
    """Write what the input gives; where that fails half way, say how far it went."""
    from nbd_vmdk.ops.transfer import receive

    done = 0

    with progress("writing") as told:

        def tell(count: int) -> None:
            nonlocal done
            done = count
            told(count, length if length is not None else disk.size - offset)

        def take(buf: memoryview) -> int:
            try:
                return os.readv(descriptor, (buf,))
            except OSError as error:
                raise StorageError.of(error, name, "read") from error

        try:
            return receive(disk, offset, length, take, tell)
        except (InputTooLong, InputTooShort):
            raise
        except VmdkError:
            if done:
                output.message("note", f"{done} bytes were written before that")
            raise


def _clear(disk: "Disk", offset: int, length: int, *, trim: bool) -> None:
    with progress("trimming" if trim else "zeroing") as told:
        done = 0
        while done < length:
            step = min(length - done, _STEP - (offset + done) % _STEP)
            if trim:
                disk.trim(step, offset + done)
            else:
                disk.zero(step, offset + done, may_trim=True)
            done += step
            told(done, length)
    disk.flush()


@contextmanager
def _input(source: str | None, *, wanted: bool) -> Iterator[tuple[int | None, int | None]]:
    """The descriptor to read from, and how many bytes it will give if that is known."""
    if not wanted:
        yield None, None
    elif source is None:
        descriptor = standard(sys.stdin, "stdin", "name a file with --input, or redirect stdin: < FILE")
        yield descriptor, _left(descriptor)
    else:
        try:
            descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise FileMissing(source) from error
        except OSError as error:
            raise StorageError.of(error, source, "open") from error
        try:
            yield descriptor, _left(descriptor)
        finally:
            os.close(descriptor)


def _left(descriptor: int) -> int | None:
    """Bytes from where a file stands to its end; None for a pipe."""
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        return None
    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    end = os.lseek(descriptor, 0, os.SEEK_END)
    os.lseek(descriptor, at, os.SEEK_SET)
    return max(end - at, 0)
