"""Where new grains and tables go: at the end of the file.

No field of a hosted sparse extent records its free space; every writer appends.  The file grows in steps, so
that the file system sees few changes of size, and a clean close cuts the last step off.  After a crash
the step stays: a hole that costs no blocks, behind which the next writer appends.

Space handed out here has never been used, so it reads as zeros until somebody writes.
A freed grain is not given out again while the image is open: a request that looked it up before may still be
on its way to it.  Its blocks go back to the file system instead (see commit.py).
"""

import errno
import threading

from nbd_vmdk.errors import StorageError
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB, SECTOR, align_up

#: Grains by which the file grows at least, bounded by :data:`_MAX_STEP`; 512 grains of 64 KiB were measured
#: a quarter faster for small allocating writes than growing with each.
_STEP_GRAINS = 512
_MAX_STEP = 32 * MIB


class Allocator:
    """Hands out the space behind the end of one file.

    ``grain`` is the unit in bytes that grains are aligned to; ``limit`` is the last byte at which a grain
    may start, by the width of the table entries.
    """

    def __init__(self, storage: Storage, grain: int, limit: int) -> None:
        self._storage = storage
        self._grain = grain
        self._limit = limit
        self._lock = threading.Lock()
        self._end = align_up(storage.size, grain)
        self._grown = storage.size
        self._used = storage.size
        self._step = max(min(_STEP_GRAINS * grain, _MAX_STEP), grain)
        self._table_at = self._table_end = 0

    @property
    def end(self) -> int:
        """Where unused space begins: no grain that anybody wrote lies beyond."""
        return self._end

    def take_grains(self, count: int) -> int:
        """Byte position of ``count`` new grains in a row; StorageError with ENOSPC if there is no room."""
        with self._lock:
            return self._take(count * self._grain)

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
        self._grown = grown

    def trim_tail(self) -> None:
        """Cut off what was grown and never handed out (at a clean close)."""
        with self._lock:
            if self._grown > self._used:
                self._storage.truncate(self._used)
                self._grown = self._used
