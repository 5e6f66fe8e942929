"""The appending end of a streamOptimized file: grains, the tables behind them, the footer.

A file is written front to back, as VMware's exports are (see ondisk/stream_build.py).  Whoever has whole
grains deflates them with :meth:`StreamWriter.record`, on any thread, and appends the records; tables and
directory are kept in memory until :meth:`StreamWriter.finish`.  A table is written when the first grain of a
later one comes, so that a reader that can't seek has all it needs; where it is known that grains come in the
order of the disk (``in_order``), memory holds one table only.
"""

import errno
import os
import threading
from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

from nbd_vmdk.codec import DEFAULT_LEVEL, deflate
from nbd_vmdk.errors import StorageError
from nbd_vmdk.ondisk.hosted import MAX_ENTRY, HostedHeader
from nbd_vmdk.ondisk.stream_build import grain_record, table_record, tail_records
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import SECTOR

_TYPECODE: Final = "I"


class Record(NamedTuple):
    """A grain, ready to be appended: its number and the bytes of its record."""

    grain: int
    data: bytes


class Tail(NamedTuple):
    """The end of a file: tables, from ``directory_at`` on the directory, footer and end of stream."""

    at: int
    data: bytes
    directory_at: int

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.at + len(self.data)


class StreamWriter:
    """Appends to ``storage`` from byte ``end`` on, which at first is where the first record goes.

    ``tables`` are those with grains: all of them, or in order those not written yet.  Any number of threads
    may make records; appending takes ``lock``.
    """

    def __init__(
        self, storage: Storage, header: HostedHeader, *, level: int = DEFAULT_LEVEL, in_order: bool
    ) -> None:
        self._storage = storage
        self._header = header
        self._level = level
        self._in_order = in_order
        self.lock = threading.RLock()
        self.end = header.overhead_sectors * SECTOR
        self.tables: dict[int, array[int]] = {}
        self._directory = array(_TYPECODE, bytes(4 * header.directory_entries))
        #: The last table that has a grain.
        self._latest = -1
        #: Tables that differ from what is in the file.
        self._changed: set[int] = set()

    @property
    def changed(self) -> bool:
        """Grains were appended that no table in the file names."""
        return bool(self._changed)

    def record(self, index: int, plain: memoryview) -> Record:
        """Deflate grain ``index``; a last grain that is cut short is filled with zeros.

        VMware's and VirtualBox's readers refuse a grain that inflates to less than a whole one.
        """
        whole: bytes | memoryview = plain
        if len(plain) < self._header.grain:
            whole = bytes(plain).ljust(self._header.grain, b"\0")
        return Record(index, grain_record(index * self._header.grain_sectors, deflate(whole, self._level)))

    def records(self, buf: memoryview, offset: int) -> list[Record]:
        """The records of guest bytes that begin with a grain, and end with one or with the disk."""
        grain = self._header.grain
        first = offset // grain
        return [
            self.record(first + number, buf[at : at + grain])
            for number, at in enumerate(range(0, len(buf), grain))
        ]

    def append(self, records: Sequence[Record]) -> None:
        """Put records behind each other, each grain only once.

        Where a write fails no record has been entered in a table, and the end is where it was.  Raises
        StorageError.
        """
        with self.lock:
            pieces: list[bytes] = []
            entered: list[tuple[array[int], int]] = []
            at = self.end
            try:
                for record in records:
                    number, slot = divmod(record.grain, self._header.entries_per_table)
                    if number > self._latest:
                        tables = self._changed_tables(at)
                        if self._in_order:
                            self.tables.clear()
                        pieces.append(tables)
                        at += len(tables)
                        self._latest = number
                    if number not in self.tables:
                        self.tables[number] = array(_TYPECODE, bytes(4 * self._header.entries_per_table))
                    self.tables[number][slot] = self._sector(at)
                    self._changed.add(number)
                    entered.append((self.tables[number], slot))
                    pieces.append(record.data)
                    at += len(record.data)
                self._put(b"".join(pieces))
            except BaseException:
                for table, slot in entered:
                    table[slot] = 0
                self._changed.update(self.tables)
                raise

    def _put(self, data: bytes) -> None:
        """Write at the end, which then is behind it."""
        end = self.end + len(data)
        self._sector(end)
        self._storage.write(data, self.end)
        self.end = end

    def _sector(self, at: int) -> int:
        """The sector of byte ``at``, as tables and directory name it; StorageError beyond what they can."""
        sector = at // SECTOR
        if sector > MAX_ENTRY:
            error = OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            raise StorageError.of(error, self._storage.name, "make a streamOptimized file of 2 TiB or more")
        return sector

    def _changed_tables(self, at: int) -> bytes:
        """The tables that differ from the file, to be put at byte ``at``, where the directory finds them."""
        pieces = []
        for number in sorted(self._changed):
            data = table_record(self.tables[number])
            self._directory[number] = self._sector(at + SECTOR)  # behind the marker
            pieces.append(data)
            at += len(data)
        self._changed.clear()
        return b"".join(pieces)

    def take_tail(self) -> Tail:
        """What makes the file whole as it is now, to be written where it says; records go behind it."""
        with self.lock:
            at = self.end
            tables = self._changed_tables(at)
            data = tables + tail_records(self._header, self._directory, at + len(tables))
            self.end += len(data)
            return Tail(at, data, at + len(tables))

    def change_all(self) -> None:
        """Forget that any table is in the file: a tail could not be written."""
        with self.lock:
            self._changed.update(self.tables)

    def finish(self) -> None:
        """Write what is left, tables, directory, footer, end of stream, and nothing behind it."""
        tail = self.take_tail()
        self._storage.write(tail.data, tail.at)
        self._storage.truncate(self.end)
