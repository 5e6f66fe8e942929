"""Extents without tables: FLAT and VMFS (a piece of a file or device), ZERO, and what can't be read."""

from collections.abc import Collection, Iterator, Sequence

from nbd_vmdk.errors import Unreadable, WriteRefused
from nbd_vmdk.extents.base import Below, Extent, Kind, Mapping, Reader, WritableExtent, Writer
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.window import local_file


class FlatExtent(WritableExtent):
    """Guest bytes that lie in a file one after the other, from byte ``start`` on: nothing but data."""

    type_word = "FLAT"

    def __init__(self, storage: Storage, *, start: int, size: int) -> None:
        self.storage = storage
        self.start = start
        self.size = size
        self.writable = storage.writable

    def map(self, offset: int, length: int) -> Mapping:
        """See Extent: always data, without asking the file system."""
        return Kind.DATA, length, self.storage, self.start + offset

    def runs(self, offset: int, length: int) -> Iterator[Mapping]:
        """See Extent: holes of the file are told as zeros."""
        at = self.start + offset
        for count, is_data in self.storage.segments(at, length):
            yield (Kind.DATA, count, self.storage, at) if is_data else (Kind.ZERO, count, None, 0)
            at += count

    def reader(self, otherwise: Reader) -> Reader:
        """See Extent: any range, in a file of this machine."""
        local = local_file(self.storage)
        if local is None:
            return otherwise
        file, preadv = local
        start, size = self.start, self.size

        def read(buf: memoryview, offset: int) -> None:
            length = len(buf)
            if 0 <= offset <= size - length:
                try:
                    if preadv(file.fd, (buf,), start + offset) == length:
                        return
                except (OSError, OverflowError):
                    pass
            otherwise(buf, offset)

        return read

    def write(self, buf: memoryview, offset: int, below: Below | None) -> None:
        """See WritableExtent."""
        self.storage.write(buf, self.start + offset)
        self.touched = True

    def writer(self, *, alone: bool) -> Writer:
        """See WritableExtent."""
        storage, start, size = self.storage, self.start, self.size

        def write(buf: memoryview, offset: int) -> "FlatExtent | None":
            if not 0 <= offset <= size - len(buf):
                return None
            storage.write(buf, start + offset)
            self.touched = True
            return self

        return write

    def share(self, other: Storage, at: int, offset: int, length: int) -> bool:
        """See WritableExtent."""
        if not self.storage.share(other, at, length, self.start + offset):
            return False
        self.touched = True
        return True

    def zero(self, offset: int, length: int, below: Below | None, *, may_trim: bool) -> None:
        """See WritableExtent."""
        (self.storage.punch if may_trim else self.storage.zero)(self.start + offset, length)
        self.touched = True

    def trim(self, offset: int, length: int, below: Below | None) -> None:
        """See WritableExtent."""
        self.storage.punch(self.start + offset, length)
        self.touched = True


def refuse_shared(flat: Sequence[tuple[FlatExtent, bool]], others: Collection[tuple[int, ...]]) -> None:
    """Refuse to write where that would change a second place of the disk, or what says where things are.

    ``flat`` are a link's raw extents, and whether each may be written; ``others`` are the identities of its
    files that hold something else.  Extents may share bytes as long as no guest writes these.

    Raises WriteRefused.
    """
    reached: dict[tuple[int, ...], tuple[int, int]] = {}
    for extent, is_written in sorted(flat, key=lambda each: each[0].start):
        file, end = extent.storage.identity, extent.start + extent.size
        # How far into the file those before it go, and those among them that are written.
        any_end, written_end = reached.get(file, (0, 0))
        reached[file] = max(any_end, end), max(written_end, end if is_written else 0)
        if (is_written and file in others) or extent.start < (any_end if is_written else written_end):
            raise WriteRefused(
                extent.storage.name,
                why="more than one line of the descriptor names a part of it, or it holds more than raw "
                "data: a write to one place of the disk would change another",
                hint="read the disk with -r",
            )


class ZeroExtent(Extent):
    """Zeros without a file.  Zeroing and trimming succeed, writing is refused by the link."""

    type_word = "ZERO"

    def __init__(self, *, size: int) -> None:
        self.size = size

    def map(self, offset: int, length: int) -> Mapping:
        """See Extent."""
        return Kind.ZERO, length, None, 0


class LostExtent(Extent):
    """Guest bytes that exist and can't be had: access NOACCESS, for one."""

    type_word = "NOACCESS"

    def __init__(self, name: str, *, size: int, why: str) -> None:
        self.size = size
        self._source = LostSource(name, why)

    def map(self, offset: int, length: int) -> Mapping:
        """See Extent."""
        return Kind.LOST, length, self._source, self.origin + offset


class LostSource:
    """A source whose every read fails; ``at`` counts guest bytes of the disk, which the error names."""

    def __init__(self, name: str, why: str, hint: str | None = None) -> None:
        self.name = name
        self._why = why
        self._hint = hint

    def read_into(self, buf: memoryview, at: int) -> None:
        """Raise Unreadable."""
        raise Unreadable(self.name, offset=at, length=len(buf), why=self._why, hint=self._hint)

    def advise(self, at: int, length: int) -> None:
        """See Source: there is nothing to be read."""
