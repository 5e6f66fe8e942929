"""Disks and files as sources and sinks of the copier (see copy.py)."""

import threading
from collections.abc import Iterator

from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import Difference
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.ops.copy import Source
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB

_NOTHING = (Kind.HOLE, Kind.ZERO)
_ZEROS = bytes(MIB)


class DiskSource:
    """A whole chain, flattened: what no link holds is zeros."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.size = disk.size
        self.read_into = disk.read_into

    def runs(self, offset: int, length: int) -> Iterator[tuple[Kind, int]]:
        """See Source; lost ranges count as data, so that reading them raises."""
        for run in self._disk.runs(offset, length):
            yield (Kind.ZERO if run.kind in _NOTHING else Kind.DATA), run.length


class DiskSink:
    """A disk that is open for writing.  ``fresh`` says that it reads as zeros all over."""

    def __init__(self, disk: Disk, *, fresh: bool) -> None:
        self._disk = disk
        self._fresh = fresh

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
            while kind not in _NOTHING and offset < end:
                step = min(end - offset, len(_ZEROS))
                with memoryview(_ZEROS) as zeros:
                    self.write(zeros[:step], offset)
                offset += step
            offset = end


def _first_difference(one: bytes, other: bytearray) -> int:
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
