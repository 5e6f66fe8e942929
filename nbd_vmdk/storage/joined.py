"""Several storages as one, for reading: a file that was split into pieces of plain bytes."""

# ruff: noqa: D102  the contract is in base.py

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from nbd_vmdk.errors import Truncated
from nbd_vmdk.storage.base import Storage


class Joined(Storage):
    """The bytes of ``pieces``, one after the other; the pieces are its own, and closed with it."""

    def __init__(self, pieces: Sequence[Storage], name: str) -> None:
        self.name = name
        self._pieces = tuple(pieces)
        *self._starts, self._size = accumulate((piece.size for piece in pieces), initial=0)

    @property
    def size(self) -> int:
        return self._size

    @property
    def identity(self) -> tuple[int, ...]:
        return (*self._pieces[0].identity, len(self._pieces))

    @property
    def allocated(self) -> int:
        return sum(piece.allocated for piece in self._pieces)

    def _parts(self, at: int, length: int) -> Iterator[tuple[Storage, int, int]]:
        """Split a range inside it: (piece, offset in that, length)."""
        index = bisect_right(self._starts, at) - 1
        while length > 0:
            piece, within = self._pieces[index], at - self._starts[index]
            count = min(piece.size - within, length)
            if count > 0:
                yield piece, within, count
                at += count
                length -= count
            index += 1

    def read_into(self, buf: memoryview, at: int) -> None:
        end = at + buf.nbytes
        if (at < 0 or end > self._size) and buf.nbytes:
            raise Truncated(self.name, what="a read", need=end, have=self._size)
        view, done = buf.cast("B"), 0
        for piece, within, count in self._parts(at, buf.nbytes):
            piece.read_into(view[done : done + count], within)
            done += count

    def advise(self, at: int, length: int) -> None:
        for piece, within, count in self._parts(at, min(length, self._size - at)):
            piece.advise(within, count)

    def segments(self, at: int, length: int) -> Iterator[tuple[int, bool]]:
        inside = max(0, min(length, self._size - at))
        for piece, within, count in self._parts(at, inside):
            yield from piece.segments(within, count)
        if inside < length:
            yield length - inside, True

    def lock(self, writable: bool) -> str | None:  # noqa: ARG002  it is for reading
        warnings = [piece.lock(writable=False) for piece in self._pieces]
        return next((warning for warning in warnings if warning), None)

    def writer(self) -> str | None:
        return next((writer for piece in self._pieces if (writer := piece.writer())), None)

    def close(self) -> None:
        for piece in self._pieces:
            piece.close()
