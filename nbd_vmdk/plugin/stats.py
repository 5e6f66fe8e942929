"""What a server has done, in numbers: kept only if the user asks for it, so that else it costs nothing.

A connection's disk is then wrapped in a :class:`CountedDisk`, which takes the time of each request, and the
cache is a :class:`CountedCache`.  Where nobody asks, neither is there: no request finds out that it is not
counted.  A request costs about a microsecond more where it is.

The numbers are told as one JSON object to whoever connects to a unix socket; a thread answers, one asker
after the other.  The last word is a line of the server's output, once the disks are closed.

What is not done here: numbers over time.  They only grow, from the start of this process on, and who wants
rates asks twice.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nbd_vmdk.cache import Cache, Generation, Part, Value
from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import StorageError, VmdkError

#: What requests are called.
KINDS = ("read", "write", "zero", "trim", "flush", "cache", "extents")
#: Times are sorted by powers of two of a microsecond: 1, 2, 4 ... 2**24 (17 s), and all that is longer.
STEPS = 25
#: Seconds that one who asks may take to listen.
_PATIENCE = 5.0
#: Seconds until the next try when there are no descriptors for one who asks.
_PAUSE = 0.1


class Counters:
    """The requests of one kind to one export; times in nanoseconds."""

    __slots__ = ("bytes", "count", "errors", "longest", "steps", "time")

    def __init__(self) -> None:
        self.count = self.bytes = self.errors = self.time = self.longest = 0
        self.steps = [0] * (STEPS + 1)

    def as_dict(self) -> dict[str, Any]:
        """The numbers for JSON; ``histogram`` has those below 1, 2, 4 ... microseconds, and the rest."""
        return {
            "count": self.count,
            "bytes": self.bytes,
            "errors": self.errors,
            "seconds": self.time / 1e9,
            "longest": self.longest / 1e9,
            "histogram": list(self.steps),
        }


class DiskStats:
    """The requests to one export."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.kinds = {kind: Counters() for kind in KINDS}
        self._lock = threading.Lock()

    def note(self, kind: str, length: int, begin: int, *, failed: bool) -> None:
        """Count a request that began at ``begin`` of time.perf_counter_ns."""
        taken = time.perf_counter_ns() - begin
        step = min((taken // 1000).bit_length(), STEPS)
        counters = self.kinds[kind]
        with self._lock:
            counters.count += 1
            counters.steps[step] += 1
            counters.time += taken
            if taken > counters.longest:
                counters.longest = taken
            if failed:
                counters.errors += 1
            else:
                counters.bytes += length

    @contextmanager
    def timing(self, kind: str, length: int) -> Iterator[None]:
        """Count what is done meanwhile as one request."""
        begin = time.perf_counter_ns()
        failed = True
        try:
            yield
            failed = False
        finally:
            self.note(kind, length, begin, failed=failed)


class CountedDisk:
    """A disk whose requests are counted; all else is the disk's own."""

    def __init__(self, disk: Disk, stats: DiskStats) -> None:
        self._disk = disk
        self._stats = stats
        self._read = disk.read_into

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def read_into(self, buf: memoryview, offset: int) -> None:
        """See Disk; written out, because there are the most of it."""
        begin = time.perf_counter_ns()
        try:
            self._read(buf, offset)
        except VmdkError:
            self._stats.note("read", 0, begin, failed=True)
            raise
        self._stats.note("read", len(buf), begin, failed=False)

    def write_from(self, buf: memoryview, offset: int, *, fua: bool = False) -> None:
        """See Disk."""
        begin = time.perf_counter_ns()
        try:
            self._disk.write_from(buf, offset, fua=fua)
        except VmdkError:
            self._stats.note("write", 0, begin, failed=True)
            raise
        self._stats.note("write", len(buf), begin, failed=False)

    def zero(self, length: int, offset: int, **how: bool) -> None:
        """See Disk."""
        with self._stats.timing("zero", length):
            self._disk.zero(length, offset, **how)

    def trim(self, length: int, offset: int, *, fua: bool = False) -> None:
        """See Disk."""
        with self._stats.timing("trim", length):
            self._disk.trim(length, offset, fua=fua)

    def flush(self) -> None:
        """See Disk."""
        with self._stats.timing("flush", 0):
            self._disk.flush()

    def cache(self, length: int, offset: int) -> None:
        """See Disk."""
        with self._stats.timing("cache", length):
            self._disk.cache(length, offset)

    def edges(self, offset: int, length: int, most: int) -> tuple[list[int], bool]:
        """See Disk; the answer may end before the range does, so what counts is how far it goes."""
        begin = time.perf_counter_ns()
        try:
            found = self._disk.edges(offset, length, most)
        except VmdkError:
            self._stats.note("extents", 0, begin, failed=True)
            raise
        self._stats.note("extents", found[0][-1] - offset, begin, failed=False)
        return found


class _CountedGeneration(dict[int, "Value"]):
    """A part's young generation that tells when something is found in it."""

    def __init__(self, cache: "CountedCache") -> None:
        super().__init__()
        #: None once it is the old one: what is found there then, the cache's get() finds.
        self.cache: CountedCache | None = cache

    def get(self, key: int, default: Any = None) -> Any:
        found = super().get(key, default)
        if found is not None and self.cache is not None:
            self.cache.hit()
        return found


class CountedCache(Cache):
    """A cache that counts what was found in it and what was not.

    Readers look into the young generation first and then ask get(), so a hit is one or the other, and
    a miss is what get() does not find.  A request that could not be answered at once looks a second time, and
    may count two hits.
    """

    def __init__(self, budget: int) -> None:
        self.hits = self.misses = 0
        self._counting = threading.Lock()
        super().__init__(budget)

    def generation(self) -> Generation:
        """See Cache."""
        return _CountedGeneration(self)

    def _turn(self) -> None:
        for part in self._young:
            assert isinstance(part.young, _CountedGeneration)
            part.young.cache = None
        super()._turn()

    def hit(self) -> None:
        """Count what was found."""
        with self._counting:
            self.hits += 1

    def get(self, part: Part, key: int) -> "Value | None":
        """See Cache."""
        found = super().get(part, key)
        if found is None:
            with self._counting:
                self.misses += 1
        else:
            self.hit()
        return found


class Stats:
    """The numbers of a whole server, and the socket where they are told."""

    def __init__(self, path: str, budget: int) -> None:
        self.path = path
        self.cache = CountedCache(budget)
        self._disks: dict[str, DiskStats] = {}
        self._began = time.time()
        self._open = self._opened = 0
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def count(self, disks: dict[str, Disk]) -> None:
        """Begin to count the requests to ``disks``."""
        self._disks = {name: DiskStats(disk) for name, disk in disks.items()}

    def connected(self, name: str) -> CountedDisk:
        """A connection to that export begins; the disk that it is to use."""
        with self._lock:
            self._open += 1
            self._opened += 1
        stats = self._disks[name]
        return CountedDisk(stats.disk, stats)

    def disconnected(self) -> None:
        """A connection ends."""
        with self._lock:
            self._open -= 1

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "pid": os.getpid(),
            "started": self._began,
            "uptime": time.time() - self._began,
            "connections": {"open": self._open, "total": self._opened},
            "cache": {"hits": self.cache.hits, "misses": self.cache.misses, "budget": self.cache.budget},
            "exports": {
                name: {
                    "size": stats.disk.size,
                    "commits": stats.disk.commits,
                    "requests": {kind: each.as_dict() for kind, each in stats.kinds.items() if each.count},
                }
                for name, stats in self._disks.items()
            },
        }

    def line(self) -> str:
        """The last word, as a line of the server's output."""
        return f"stats: {json.dumps(self.as_dict())}\n"

    def listen(self) -> None:
        """Make the socket, for this user alone; one that a dead server left behind is replaced."""
        try:
            if os.path.lexists(self.path):
                os.unlink(self.path)
            made = socket.socket(socket.AF_UNIX)
            made.bind(self.path)
            os.chmod(self.path, 0o600)
            made.listen()
        except OSError as error:
            raise StorageError.of(error, self.path, "make a socket") from error
        self._socket = made

    def answer(self) -> None:
        """Begin to answer; called when there may be threads."""
        threading.Thread(target=self._answer, name="stats", daemon=True).start()

    def _answer(self) -> None:
        assert self._socket is not None
        while True:
            try:
                asker, _ = self._socket.accept()
            except OSError:
                if self._socket.fileno() < 0:
                    return  # closed
                time.sleep(_PAUSE)
                continue
            with asker:
                try:
                    asker.settimeout(_PATIENCE)
                    asker.sendall(json.dumps(self.as_dict()).encode() + b"\n")
                except OSError:
                    pass  # he went away

    def close(self) -> None:
        """Answer nobody any more."""
        if self._socket is not None:
            self._socket.close()
            try:
                os.unlink(self.path)
            except OSError:
                pass
