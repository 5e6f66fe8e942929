"""A part of a storage as a storage of its own, for reading."""

# ruff: noqa: D102  the contract is in base.py

import os
from collections.abc import Callable, Iterator
from typing import TypeAlias

from nbd_vmdk.errors import Truncated
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.local import LocalFile

#: os.preadv, or what is called as it is: (descriptor, buffers, place).
Preadv: TypeAlias = Callable[[int, tuple[memoryview], int], int]


class Window(Storage):
    """``length`` bytes of ``base`` from ``offset`` on.

    What lies around it can't be seen.  ``base`` is the window's own, and closed with it.
    """

    def __init__(self, base: Storage, offset: int, length: int, name: str) -> None:
        self.name = name
        self._base = base
        self._offset = offset
        self._length = length

    @property
    def size(self) -> int:
        return self._length

    @property
    def identity(self) -> tuple[int, ...]:
        return (*self._base.identity, self._offset, self._length)

    @property
    def allocated(self) -> int:
        return sum(length for length, data in self.segments(0, self._length) if data)

    def read_into(self, buf: memoryview, at: int) -> None:
        end = at + buf.nbytes
        if (at < 0 or end > self._length) and buf.nbytes:
            raise Truncated(self.name, what="a read", need=end, have=self._length)
        self._base.read_into(buf, self._offset + at)

    def advise(self, at: int, length: int) -> None:
        self._base.advise(self._offset + at, min(length, self._length - at))

    def segments(self, at: int, length: int) -> Iterator[tuple[int, bool]]:
        inside = max(0, min(length, self._length - at))
        yield from self._base.segments(self._offset + at, inside)
        if inside < length:
            yield length - inside, True

    def lock(self, writable: bool) -> str | None:  # noqa: ARG002  a window is for reading
        return self._base.lock(writable=False)

    def writer(self) -> str | None:
        return self._base.writer()

    def close(self) -> None:
        self._base.close()

    def local_file(self) -> tuple[LocalFile, Preadv] | None:
        """See :func:`local_file`."""
        around = local_file(self._base)
        if around is None:
            return None
        file, base_preadv = around
        offset, length = self._offset, self._length

        def preadv(fd: int, buffers: tuple[memoryview], at: int) -> int:
            if 0 <= at <= length - len(buffers[0]):
                return base_preadv(fd, buffers, offset + at)
            return -1

        return file, preadv


def local_file(storage: Storage) -> tuple[LocalFile, Preadv] | None:
    """The file of this machine that ``storage`` is, or lies in as it is; and what reads it there.

    That is for those who read at once (see Extent.reader), with the file's descriptor, a buffer of bytes and
    a place in ``storage``.  Whatever has not filled the buffer, or raises OSError, is to be asked for again
    by read_into().  What lies around a window is not read.  None says that read_into() is the only way.
    """
    # Of these alone it is known that nobody has changed what reading does.
    if type(storage) is LocalFile:
        return storage, os.preadv
    return storage.local_file() if type(storage) is Window else None
