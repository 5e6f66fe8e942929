"""
A storage that keeps a log of all that is done to an image's files, in order, and can make any of it fail.

The log is enough to rebuild what the files may hold after a power cut at any moment: what was synced is
there, of the rest any part may be. Orders of writes are checked on it too (see tests/order.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Literal, NamedTuple

from nbd_vmdk.errors import FileMissing, StorageError
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder
from tests.memory import MemoryStorage

Op = Literal["write", "zero", "punch", "truncate", "sync", "mark"]


class Event(NamedTuple):
    """One call that changes a file or orders changes; `at` of a truncate is the new size.

    `file` is a plain name. A mark is made by a test; its text is in `file`.
    """

    number: int
    op: Op
    file: str
    at: int = 0
    length: int = 0
    data: bytes = b""

    @property
    def end(self) -> int:
        return self.at + self.length


class Log:
    """The events of one image's files.

    `before` is called with each event before it happens, outside of any lock: it may wait, or raise OSError
    to make the call fail, which then is in `failed` and not among the events. `after` is called when it has
    happened. `reading` is the same as `before` for reads, with file, place and length.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.initial = files
        self.events: list[Event] = []
        self.failed: list[Event] = []
        self.before: Callable[[Event], None] | None = None
        self.after: Callable[[Event], None] | None = None
        self.reading: Callable[[str, int, int], None] | None = None
        self._lock = threading.Lock()

    def do(self, action: Callable[[], None], op: Op, file: str, at: int = 0, data: bytes | int = b"") -> None:
        length, content = (data, b"") if isinstance(data, int) else (len(data), data)
        event = Event(len(self.events), op, file, at, length, content)
        if self.before is not None:
            try:
                self.before(event)
            except OSError as error:
                self.failed.append(event)
                raise StorageError.of(error, file, op) from error
        with self._lock:
            action()
            event = event._replace(number=len(self.events))
            self.events.append(event)
        if self.after is not None:
            self.after(event)

    def mark(self, text: str) -> int:
        """Note a moment, such as that a flush has returned; its place among the events."""
        with self._lock:
            self.events.append(Event(len(self.events), "mark", text))
            return len(self.events) - 1

    def since(self, number: int = 0) -> list[Event]:
        """The events from one on, without marks."""
        return [event for event in self.events[number:] if event.op != "mark"]

    def count(self, op: Op, since: int = 0) -> int:
        return sum(event.op == op for event in self.events[since:])

    def undecided(self, cut: int) -> list[Event]:
        """What was done before event `cut` and was not made durable before it."""
        found: list[Event] = []
        for event in self.events[:cut]:
            if event.op == "sync":
                found = [other for other in found if other.file != event.file]
            elif event.op != "mark":
                found.append(event)
        return found

    def state(self, cut: int, lost: Collection[int] = ()) -> dict[str, bytes]:
        """The files after a power cut before event `cut`, the events whose numbers are in `lost` not having
        reached the disk."""
        files = {name: bytearray(data) for name, data in self.initial.items()}
        for event in self.events[:cut]:
            if event.op in ("mark", "sync") or event.number in lost:
                continue
            apply(files[event.file], event)
        return {name: bytes(data) for name, data in files.items()}


def apply(data: bytearray, event: Event) -> None:
    """Do to bytes what an event did to a file."""
    if event.op == "truncate":
        if event.at > len(data):
            data.extend(bytes(event.at - len(data)))
        del data[event.at :]
    elif event.op == "write":
        if event.end > len(data):
            data.extend(bytes(event.end - len(data)))
        data[event.at : event.end] = event.data
    else:
        end = min(event.end, len(data))
        if event.at < end:
            data[event.at : end] = bytes(end - event.at)


class Recording(Storage):
    """A file as one opening sees it: what it does goes to `inner`, and into the log."""

    def __init__(self, inner: Storage, log: Log, file: str, *, writable: bool) -> None:
        self.name = file
        self.writable = writable
        self._inner = inner
        self._log = log
        self._file = file

    @property
    def size(self) -> int:
        return self._inner.size

    @property
    def identity(self) -> tuple[int, ...]:
        return self._inner.identity

    def read_into(self, buf: memoryview, at: int) -> None:
        if self._log.reading is not None:
            try:
                self._log.reading(self._file, at, len(buf))
            except OSError as error:
                raise StorageError.of(error, self.name, "read") from error
        self._inner.read_into(buf, at)

    def segments(self, at: int, length: int) -> Iterator[tuple[int, bool]]:
        return self._inner.segments(at, length)

    def write(self, buf: bytes | bytearray | memoryview, at: int) -> None:
        self._must_be_writable()
        data = bytes(buf)
        self._log.do(lambda: self._inner.write(data, at), "write", self._file, at, data)

    def zero(self, at: int, length: int) -> None:
        self._must_be_writable()
        self._log.do(lambda: self._inner.zero(at, length), "zero", self._file, at, length)

    def punch(self, at: int, length: int) -> None:
        self._must_be_writable()
        self._log.do(lambda: self._inner.punch(at, length), "punch", self._file, at, length)

    def truncate(self, size: int) -> None:
        self._must_be_writable()
        self._log.do(lambda: self._inner.truncate(size), "truncate", self._file, size)

    def sync(self) -> None:
        self._must_be_writable()
        self._log.do(self._inner.sync, "sync", self._file)

    def close(self) -> None:
        """The bytes stay: others may have the file open too."""

    def _must_be_writable(self) -> None:
        assert self.writable, f"{self._file} was opened for reading only"


class RecordingFolder(Folder):
    """A folder whose files are in memory, with a log of what is done to them."""

    def __init__(self, files: dict[str, bytes], name: str = "memory") -> None:
        self.name = name
        self.log = Log(dict(files))
        self._files = {file: MemoryStorage(data, file) for file, data in files.items()}

    @classmethod
    def load(cls, folder: str) -> RecordingFolder:
        """The files of a folder on disk; what is done to them stays in memory."""
        files = {}
        for name in os.listdir(folder):
            with open(os.path.join(folder, name), "rb") as file:
                files[name] = file.read()
        return cls(files, folder)

    def open(self, name: str, *, writable: bool = False, extent: bool = False) -> Storage:
        if name not in self._files:
            raise FileMissing(self.label(name))
        return Recording(self._files[name], self.log, name, writable=writable)

    def folder_of(self, name: str) -> RecordingFolder:
        if "/" in name:
            raise FileMissing(self.label(name))
        return self

    def names(self) -> list[str]:
        return sorted(self._files)

    def label(self, name: str) -> str:
        return name

    def content(self, name: str) -> bytes:
        """A file as it is now."""
        storage = self._files[name]
        return storage.read(0, storage.size)

    def contents(self) -> dict[str, bytes]:
        return {name: self.content(name) for name in self._files}
