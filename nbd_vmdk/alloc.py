"""Where new grains and tables go: into space that was freed before, else at the end of the file.

No field of a hosted sparse extent records its free space; every writer appends.  COWD has one, freeSector,
but not every writer keeps it, and behind one that is too low lie grains: it is written, never read (cowd.py).
The file grows in steps, so that the file system sees few changes of size, and a clean close cuts the last
step off.  After a crash the step stays: a hole that costs no blocks, behind which the next writer appends.

Space handed out here reads as zeros until somebody writes: it has never been used, or it was punched out.

Freed grains are known only as long as the image is open.  One is given out again when three things are true:
the table entry that freed it is durable (commit.py hands it over only then), it was punched out, and every
overwrite that was under way at that moment has ended, because such a writer may have looked the grain up
before it was freed and would write into its next owner; what it did write is punched out again.  A reader in
that position finds out by itself, see Disk.read_into.
"""

import errno
import itertools
import threading
from collections import deque

from nbd_vmdk.errors import StorageError
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB, SECTOR, align_up

#: Grains by which the file grows at least, bounded by :data:`_MAX_STEP`; in a prototype 512 grains
#: of 64 KiB were a quarter faster for small allocating writes than growing with each.
_STEP_GRAINS = 512
_MAX_STEP = 32 * MIB
#: Freed ranges that are kept in mind, some MiB of memory; more than that only make the file no shorter.
_MAX_FREE = 1 << 15


class Allocator:
    """Hands out the space behind the end of one file.

    ``grain`` is the unit in bytes that grains are aligned to; ``limit`` is the last byte at which a grain
    may start, by the width of the table entries; ``taken`` is where the last one ends, if the file ends
    before it.
    """

    def __init__(self, storage: Storage, grain: int, limit: int, taken: int = 0) -> None:
        self._storage = storage
        self._grain = grain
        self._limit = limit
        self._lock = threading.Lock()
        self._end = align_up(max(storage.size, taken), grain)
        self._set_grown(storage.size)
        self._used = storage.size
        self._step = max(min(_STEP_GRAINS * grain, _MAX_STEP), grain)
        self._table_at = self._table_end = 0
        #: Tickets of the overwrites under way; each takes one before it looks up where to write.
        self.writing: set[int] = set()
        #: The numbers of tickets, for those who take theirs without a call of :meth:`ticket`.
        self.tickets = itertools.count()
        #: Freed ranges as (tickets to wait for, position, length), and those that nobody can write to.
        self._cooling: deque[tuple[frozenset[int], int, int]] = deque()
        self._free: list[tuple[int, int]] = []

    @property
    def end(self) -> int:
        """Where unused space begins: no grain that anybody wrote lies beyond."""
        return self._end

    @property
    def used(self) -> int:
        """Where the last grain or table that was handed out ends; the file's size if none was."""
        return self._used

    def take_grains(self, count: int) -> int:
        """Byte position of ``count`` new grains in a row; StorageError with ENOSPC if there is no room."""
        length = count * self._grain
        with self._lock:
            if self._free or self._cooling:
                at = self._reuse(length)
                if at is not None:
                    return at
            at = self._end
            if at + length > self._room:
                return self._take(length)
            self._end = self._used = at + length
            return at

    def ticket(self) -> int:
        """Begin an overwrite: until the ticket is taken out of ``writing``, no grain changes its owner."""
        ticket = next(self.tickets)
        self.writing.add(ticket)
        return ticket

    def give_back(self, at: int, length: int) -> None:
        """Take back grains that read as zeros and that no durable table entry names."""
        with self._lock:
            if len(self._free) + len(self._cooling) < _MAX_FREE:
                self._cooling.append((frozenset(self.writing.copy()), at, length))

    def untake(self, at: int, length: int) -> None:
        """Take back grains that were just handed out, read as zeros again, and never had an owner."""
        with self._lock:
            if at + length == self._end:
                self._end = self._used = at
                return
        self.give_back(at, length)

    def _reuse(self, length: int) -> int | None:
        """Freed space of ``length`` bytes, if there is some that nobody can be writing to."""
        while self._cooling and self._cooling[0][0].isdisjoint(self.writing):
            tickets, at, size = self._cooling.popleft()
            try:
                if tickets:  # one of those writers may have come after the space was punched out
                    self._storage.punch(at, size)
            except StorageError:
                continue  # it stays unused
            self._free.append((at, size))
        if not self._free or self._free[-1][1] < length:
            return None
        at, size = self._free.pop()
        if size > length:
            self._free.append((at + length, size - length))
        return at

    def take_table(self, length: int) -> int:
        """Byte position of ``length`` bytes for a table; tables share grains, so that few are spent.

        A directory names tables by sector, so each begins on one, however short it is.
        """
        length = align_up(length, SECTOR)
        with self._lock:
            if self._table_end - self._table_at < length:
                size = align_up(length, self._grain)
                self._table_at = self._take(size)
                self._table_end = self._table_at + size
            at = self._table_at
            self._table_at += length
            return at

    def _take(self, length: int) -> int:
        at = self._end
        if at + length - self._grain > self._limit:
            full = OSError(errno.ENOSPC, "the extent file has reached the size its tables can address")
            raise StorageError.of(full, self._storage.name, "allocate a grain")
        if at + length > self._grown:
            self._grow(at + length)
        self._end = self._used = at + length
        return at

    def _grow(self, need: int) -> None:
        """Make the file at least ``need`` bytes long: by a whole step, unless no file can be that large."""
        grown = align_up(need, self._step)
        try:
            self._storage.truncate(grown)
        except StorageError:
            grown = need
            self._storage.truncate(grown)
        self._set_grown(grown)

    def _set_grown(self, size: int) -> None:
        self._grown = size
        #: Where space ends that can be handed out without more ado.
        self._room = min(size, self._limit + self._grain)

    def trim_tail(self) -> None:
        """Cut off what was grown and never handed out (at a clean close)."""
        with self._lock:
            if self._grown > self._used:
                self._storage.truncate(self._used)
                self._set_grown(self._used)
