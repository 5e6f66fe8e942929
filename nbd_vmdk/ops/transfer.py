"""Guest bytes out to a stream and in from one, a bounded piece at a time.

Reading runs ahead of whoever takes the pieces: several threads read (and inflate), the caller gets the
pieces in order, and zeros as such.  Writing takes what a stream gives until it ends; nothing is known of a
pipe's length, so a pipe that is too long is found out only once the disk is full.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Final, NamedTuple

from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import InputTooLong, InputTooShort, OutOfRange
from nbd_vmdk.ops.ahead import in_order
from nbd_vmdk.ops.content import Content, Range, data_ranges
from nbd_vmdk.ops.copy import Progress
from nbd_vmdk.units import MIB, format_size

_CHUNK: Final = MIB
_ZEROS: Final = bytes(_CHUNK)


class Piece(NamedTuple):
    """The next bytes of a stream; ``data`` is None for zeros, of which there may be very many."""

    length: int
    data: bytearray | None


def check_range(content: Content, offset: int, length: int | None) -> int:
    """The length of a range, to the end if none is given.  Raises OutOfRange for one outside the disk."""
    hint = None
    if length is None:
        length = max(content.size - offset, 0)
        hint = f"--offset is behind the end of the disk ({format_size(content.size)})"
    if offset + length > content.size:
        raise OutOfRange(content.name, offset=offset, length=length, size=content.size, hint=hint)
    return length


def stream(content: Content, offset: int, length: int) -> Generator[Piece, None, None]:
    """All bytes of a range in order.  Raises what reading raises, in its place."""

    def read(wanted: Range | int) -> Piece:
        if isinstance(wanted, int):
            return Piece(wanted, None)
        buf = bytearray(wanted.length)
        with memoryview(buf) as view:
            content.read_into(view, wanted.offset)
        return Piece(wanted.length, buf)

    def wanted() -> Iterator[Range | int]:
        done = offset
        for at, count in data_ranges(content, offset, length):
            if at > done:
                yield at - done
            done = at + count
            while at < done:
                # Pieces end on chunks' edges, so that no grain is inflated for two of them.
                step = min(done - at, _CHUNK - at % _CHUNK)
                yield Range(at, step)
                at += step
        if offset + length > done:
            yield offset + length - done

    return in_order(read, wanted())


def send(
    content: Content,
    offset: int,
    length: int,
    write: Callable[[memoryview], object],
    skip: Callable[[int], object] | None = None,
    progress: Progress | None = None,
) -> None:
    """Hand a range to ``write`` in order; zeros to ``skip``, which makes a hole of them, if there is one."""
    done = 0
    with closing(stream(content, offset, length)) as pieces:
        for count, data in pieces:
            if data is None and skip is not None:
                skip(count)
                done += count
            else:
                with memoryview(_ZEROS if data is None else data) as view:
                    left = count
                    while left:
                        step = min(left, _CHUNK)
                        write(view[:step])
                        left, done = left - step, done + step
                        if progress is not None:
                            progress(done, length)
            if progress is not None:
                progress(done, length)


def receive(
    disk: Disk,
    offset: int,
    length: int | None,
    read: Callable[[memoryview], int],
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write what ``read`` gives (how many bytes it put into the buffer, 0 at the end); how much it was.

    With ``length`` so many bytes are taken, InputTooShort being raised if there are fewer; without, all,
    InputTooLong being raised if that is more than the disk has room for.  What came before is then written,
    and ``progress``, told after every write, knows how much it is.
    """
    room = disk.size - offset if length is None else length
    done = 0
    buf = memoryview(bytearray(_CHUNK))
    while done < room:
        # Writes end on chunks' edges: whole grains are written wherever the stream begins.
        wanted = min(_CHUNK - (offset + done) % _CHUNK, room - done)
        got = _fill(buf[:wanted], read)
        if got:
            disk.pwrite(buf[:got], offset + done)
            done += got
            if progress is not None:
                progress(done)
        if got < wanted:
            break
    disk.flush()
    if length is not None and done < length:
        raise InputTooShort(disk.links[0].name, got=done, length=length)
    if length is None and done == room and read(buf[:1]):
        raise InputTooLong(disk.links[0].name, got=done, size=disk.size)
    return done


def _fill(buf: memoryview, read: Callable[[memoryview], int]) -> int:
    got = 0
    while got < len(buf):
        count = read(buf[got:])
        if not count:
            break
        got += count
    return got
