"""A part of a storage as a storage of its own, for reading."""

# ruff: noqa: D102  the contract is in base.py

from collections.abc import Iterator

from nbd_vmdk.errors import Truncated
from nbd_vmdk.storage.base import Storage


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
