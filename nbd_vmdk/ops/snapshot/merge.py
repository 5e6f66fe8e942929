"""The bytes of a merge: what a child holds itself goes to its parent, and nothing else.

The same copier that converts does it; here are its two ends.  Zeros stay what they are: known ones are told
to the parent as such, and so are blocks of the child that are all zeros.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import Unreadable, WriteRefused
from nbd_vmdk.extents.base import NOTHING, Kind
from nbd_vmdk.extents.flat import FlatExtent, ZeroExtent
from nbd_vmdk.link import Link
from nbd_vmdk.units import KIB

#: Data is looked at for zeros in blocks of a grain, within this.
_MIN_BLOCK, _MAX_BLOCK = 4 * KIB, 1024 * KIB


@dataclass(slots=True)
class Amount:
    """Bytes that a merge moves: ``data`` is written, ``zeros`` are told; ``new`` have no place there yet."""

    data: int = 0
    zeros: int = 0
    new: int = 0

    def as_dict(self) -> dict[str, int]:
        """For ``--json``."""
        return {"data": self.data, "zeros": self.zeros, "new": self.new}


class LinkSource:
    """What one link holds, without its parents; see copy.Source."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.size = link.size

    def runs(self, offset: int, length: int) -> Iterator[tuple[Kind, int]]:
        """See Source."""
        for kind, count, _source, _at in self._link.runs(offset, length):
            yield kind, count

    def read_into(self, buf: memoryview, offset: int) -> None:
        """See Source; raises Unreadable where the link holds nothing any more."""
        done = 0
        while done < len(buf):
            kind, count, source, at = self._link.map(offset + done, len(buf) - done)
            piece = buf[done : done + count]
            if kind is Kind.ZERO:
                piece[:] = bytes(count)
            elif source is None:
                why = "it is no longer there"
                raise Unreadable(self._link.name, offset=offset + done, length=count, why=why)
            else:
                source.read_into(piece, at)
            done += count


class MergeSink:
    """The parent, open for writing; see copy.Sink.  A flat file that has all its space keeps it."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._may_trim = not is_thick(disk.links[0])

    def write(self, buf: memoryview, offset: int) -> None:
        """See Sink."""
        self._disk.pwrite(buf, offset)

    def zero(self, offset: int, length: int) -> None:
        """See Sink."""
        self._disk.zero(length, offset, may_trim=self._may_trim)


def is_thick(link: Link) -> bool:
    """Whether a link is flat files whose space was set aside beforehand."""
    return all(
        isinstance(entry.extent, FlatExtent) and entry.extent.storage.allocated >= entry.extent.size
        for entry in link.extents
    )


def zero_block(link: Link) -> int:
    """The size of the pieces in which data for ``link`` is looked at for zeros."""
    return min(max(link.grain, _MIN_BLOCK), _MAX_BLOCK)


def amount(child: Link, parent: Link) -> Amount:
    """What merging ``child`` into ``parent``, once that is as large, moves.

    Raises WriteRefused if it would have to write where ``parent`` can't be written, Unreadable if some of
    the child can't be read.
    """
    found = Amount()
    thick = is_thick(parent)
    if thick:
        found.new = child.size - parent.size  # it is set aside as the parent grows
    offset = 0
    for kind, length, _source, _at in child.runs(0, child.size):
        if kind is Kind.LOST:
            raise Unreadable(child.name, offset=offset, length=length, why="its place can't be found")
        if kind is not Kind.HOLE:
            _check_place(parent, offset, length, zeros=kind is Kind.ZERO)
        if kind is Kind.ZERO:
            found.zeros += length
        elif kind is not Kind.HOLE:
            found.data += length
            inside = max(min(length, parent.size - offset), 0)
            there = parent.runs(offset, inside)
            found.new += sum(count for kind, count, _source, _at in there if kind in NOTHING)
            if not thick:
                found.new += length - inside
        offset += length
    return found


def _check_place(parent: Link, offset: int, length: int, *, zeros: bool) -> None:
    for entry in parent.extents:
        if entry.writable is not None or (zeros and isinstance(entry.extent, ZeroExtent)):
            continue
        # The last extent is the one that grows.
        end = inf if entry is parent.extents[-1] else entry.start + entry.extent.size
        if entry.start < offset + length and offset < end:
            what = entry.access if entry.access != "RW" else entry.extent.type_word
            raise WriteRefused(
                parent.name,
                why=f"guest bytes {offset}+{length}, which the child has, are in a {what} extent here",
            )
