"""Disks and files as sources and sinks of the copier (see copy.py)."""

import threading
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import Difference
from nbd_vmdk.extents.base import NOTHING, Kind
from nbd_vmdk.ops.copy import Share, Sink, Source
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB

_ZEROS = bytes(MIB)


#: A file that has bytes as they are, where in it, and how many of them.
Place = tuple[Storage, int, int]


@runtime_checkable
class Placed(Source, Protocol):
    """A source whose data may lie in files as it is."""

    def place(self, offset: int, length: int) -> Place | None:
        """Where the data at ``offset`` is, or the beginning of it; None if no file has it like that."""


class Sharing(Sink, Protocol):
    """A new sink that may take its data from files without copying it."""

    def share(self, place: Place, offset: int) -> bool:
        """Have what is in that place at ``offset`` as well; False where it must be written."""


def sharing(source: Source, sink: Sharing) -> Share | None:
    """What shares data between these two, for :func:`copy`: reflinks, as XFS and btrfs have them.

    A file system shares whole blocks, so that grains at odd places are copied.  None is tried after the first
    that can't be shared, as others hardly can, unless some could before.
    """
    if not isinstance(source, Placed):
        return None
    placed = source
    given_up = has_shared = False

    def share(offset: int, length: int) -> int:
        nonlocal given_up, has_shared
        done = 0
        while done < length and not given_up:
            place = placed.place(offset + done, length - done)
            if place is None or not sink.share(place, offset + done):
                given_up = place is not None and not has_shared
                break
            has_shared = True
            done += place[2]
        return done

    return share


class DiskSource:
    """A whole chain, flattened: what no link holds is zeros."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.size = disk.size
        self.read_into = disk.read_into

    def place(self, offset: int, length: int) -> Place | None:
        """See Placed."""
        return self._disk.place(offset, length)

    def runs(self, offset: int, length: int) -> Iterator[tuple[Kind, int]]:
        """See Source; lost ranges count as data, so that reading them raises."""
        for run in self._disk.runs(offset, length):
            yield (Kind.ZERO if run.kind in NOTHING else Kind.DATA), run.length


class DiskSink:
    """A disk that is open for writing.  ``fresh`` says that it reads as zeros all over."""

    def __init__(self, disk: Disk, *, fresh: bool) -> None:
        self._disk = disk
        self._fresh = fresh

    def share(self, place: Place, offset: int) -> bool:
        """See Sharing."""
        storage, at, length = place
        return self._disk.share(storage, at, length, offset)

    def write(self, buf: memoryview, offset: int) -> None:
        """See Sink."""
        self._disk.pwrite(buf, offset)

    def zero(self, offset: int, length: int) -> None:
        """See Sink."""
        if not self._fresh:
            self._disk.zero(length, offset, may_trim=True)


class StorageSource:
    """The raw bytes of a file or device; its holes are zeros."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.size = storage.size
        self.read_into = storage.read_into

    def place(self, offset: int, length: int) -> Place | None:
        """See Placed."""
        return self._storage, offset, length

    def runs(self, offset: int, length: int) -> Iterator[tuple[Kind, int]]:
        """See Source."""
        for count, is_data in self._storage.segments(offset, length):
            yield (Kind.DATA if is_data else Kind.ZERO), count


class StorageSink:
    """A raw file or device.

    ``fresh`` says that it reads as zeros all over, as a new file does; else ``punch`` gives the space of
    zeros back.  A device keeps it, as somebody chose to give it all of it.
    """

    def __init__(self, storage: Storage, *, fresh: bool, punch: bool = False) -> None:
        self._storage = storage
        self._fresh = fresh
        self._zero = storage.punch if punch else storage.zero

    def share(self, place: Place, offset: int) -> bool:
        """See Sharing."""
        storage, at, length = place
        return self._storage.share(storage, at, length, offset)

    def write(self, buf: memoryview, offset: int) -> None:
        """See Sink."""
        self._storage.write(buf, offset)

    def zero(self, offset: int, length: int) -> None:
        """See Sink."""
        if not self._fresh:
            self._zero(offset, length)


class Comparer:
    """A sink that writes nothing and raises Difference where ``other`` does not have the same bytes."""

    def __init__(self, other: Source, name: str) -> None:
        self._other = other
        self._name = name
        self._own = threading.local()

    def write(self, buf: memoryview, offset: int) -> None:
        """Compare with data."""
        there: bytearray | None = getattr(self._own, "buf", None)
        if there is None or len(there) < len(buf):
            there = self._own.buf = bytearray(max(len(buf), MIB))
        with memoryview(there) as view:
            self._other.read_into(view[: len(buf)], offset)
        if not there.startswith(buf):
            raise Difference(self._name, offset=offset + _first_difference(bytes(buf), there))

    def zero(self, offset: int, length: int) -> None:
        """Compare with zeros; what ``other`` knows to be zeros is not read."""
        for kind, count in self._other.runs(offset, length):
            end = offset + count
            while kind not in NOTHING and offset < end:
                step = min(end - offset, len(_ZEROS))
                with memoryview(_ZEROS) as zeros:
                    self.write(zeros[:step], offset)
                offset += step
            offset = end


def _first_difference(one: bytes, other: bytearray) -> int:
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
