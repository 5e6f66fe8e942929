"""Bytes in memory, where a test needs a storage and no file."""

import itertools
import threading

from nbd_vmdk.errors import Truncated, WriteRefused
from nbd_vmdk.storage.base import Storage

_serial = itertools.count()


class MemoryStorage(Storage):
    """A bytearray that grows as a file does.  One lock guards it: speed is not its purpose."""

    def __init__(self, data: bytes = b"", name: str = "memory", *, writable: bool = True) -> None:
        self.name = name
        self.writable = writable
        self._data = bytearray(data)
        self._lock = threading.Lock()
        # Never equal to a file's, whose numbers are not negative.
        self._identity = (-1, next(_serial))

    @property
    def size(self) -> int:
        return len(self._data)

    @property
    def identity(self) -> tuple[int, ...]:
        return self._identity

    def read_into(self, buf: memoryview, at: int) -> None:
        if not buf.nbytes:
            return
        with self._lock:
            end = at + buf.nbytes
            if end > len(self._data):
                raise Truncated(self.name, what="a read", need=end, have=len(self._data))
            buf.cast("B")[:] = self._data[at:end]

    def write(self, buf: bytes | bytearray | memoryview, at: int) -> None:
        self._must_be_writable()
        with self._lock, memoryview(buf) as view:
            if view.nbytes:
                end = at + view.nbytes
                self._grow(end)
                self._data[at:end] = view.cast("B")

    def zero(self, at: int, length: int) -> None:
        self._must_be_writable()
        with self._lock:
            end = min(at + length, len(self._data))
            if at < end:
                self._data[at:end] = bytes(end - at)

    def punch(self, at: int, length: int) -> None:
        self.zero(at, length)

    def truncate(self, size: int) -> None:
        self._must_be_writable()
        with self._lock:
            self._grow(size)
            del self._data[size:]

    def sync(self) -> None:
        self._must_be_writable()

    def close(self) -> None:
        """Nothing is held; the bytes stay, so that a test can look at them."""

    def _grow(self, size: int) -> None:
        if size > len(self._data):
            self._data.extend(bytes(size - len(self._data)))

    def _must_be_writable(self) -> None:
        if not self.writable:
            raise WriteRefused(self.name, why="it is open for reading only")
