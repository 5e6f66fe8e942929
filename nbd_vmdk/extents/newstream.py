"""A new, empty streamOptimized extent, written to: grains in any order, each of them once.

A grain is deflated as a whole and can't be changed once it is in the file.  Clients, though, send pieces of
grains (QEMU cuts what it copies at zeros of 4 KiB), several at a time and out of order.  So what is written
stays in a window of memory first, where it may be added to and changed; when the window is full, the grains
that come first on the disk are deflated, by whoever writes then, and appended.  So grains are in the order of
the disk for all clients that write front to back, as some readers that can't seek need.  A flush empties the
window.  Writing or zeroing a grain that has left it is refused; a trim of one does nothing.

Tables stay in memory (2 KiB for each 32 MiB that hold a grain) until a commit appends a tail: the changed
tables, the directory, the footer.  Only what is behind the file's last tail can be lost in a crash, because
nothing of the file is ever overwritten, except

* the tail of the empty file, at first;
* the header, once records are put behind a durable tail: a footer that is not at the end is not found, so
  the header then says where that tail's directory is, until the next one is durable;
* tails in the middle of the file, at the end of the session: directory, footer and end of stream become
  markers that readers skip, so that the file can be read front to back.  The header is as it was, too.
"""

import threading
from array import array
from collections.abc import Collection
from dataclasses import replace
from typing import Final

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import VmdkError, WriteRefused
from nbd_vmdk.extents.base import Below, Kind, Mapping, WritableExtent
from nbd_vmdk.extents.stream import Inflater, with_directory
from nbd_vmdk.extents.streamwriter import StreamWriter, Tail
from nbd_vmdk.ondisk.hosted import HostedHeader, check_directory
from nbd_vmdk.ondisk.stream import MarkerType
from nbd_vmdk.ondisk.stream_build import metadata_record
from nbd_vmdk.pages import DirtyPage
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB, SECTOR

#: Bytes of grains in memory: twice what qemu-img has under way (8 requests of 2 MiB), which is how far a
#: grain can be overtaken.
_WINDOW: Final = 32 * MIB
#: Bytes of grains that are taken out of a full window at once, to be one write.
_BATCH: Final = MIB
_SKIPPED: Final = metadata_record(MarkerType.PROGRESS)


def is_new(storage: Storage, header: HostedHeader) -> bool:
    """Whether a compressed extent has VMware's layout and no grain yet.

    Then its directory is where the first grain will be, behind its marker.  One elsewhere that is all zeros
    proves nothing: the footer may be damaged, and point to any zeros of a file full of grains.
    """
    if not (header.directory_at_end and header.markers):
        return False
    try:
        _found, real = with_directory(storage, header)
        check_directory(real, storage.size, storage.name)
        if real.directory_sector != header.overhead_sectors + 1:
            return False
        return not any(storage.read(real.directory_at, real.directory_entries * 4))
    except VmdkError:
        return False  # opening it for reading tells what is wrong


class _Tables:
    """The tables of a :class:`StreamWriter` as readers and commits see them; see pages.Changes."""

    def __init__(self, storage: Storage, header: HostedHeader) -> None:
        self.storage = storage
        self.writer = StreamWriter(storage, header, in_order=False)
        self._header = header
        #: The last tail that is durable, and the one that a commit is writing.
        self._durable: Tail | None = None
        self._taken: Tail | None = None
        self._exposed = False
        #: (at, length) of what stands in the way of reading front to back.
        self._stale: list[tuple[int, int]] = []

    def get(self, page: int) -> "array[int] | None":
        """See stream.Tables."""
        return self.writer.tables.get(page)

    def take(self) -> DirtyPage:
        """A tail, to be written where it says; then comes :meth:`settle`."""
        with self.writer.lock:
            self.before_append()
            self._taken = tail = self.writer.take_tail()
        return DirtyPage(0, tail.data, (tail.at,))

    def settle(self, *, durable: bool) -> None:
        """The tail that was taken is durable, or may be in the file in part."""
        with self.writer.lock:
            tail, self._taken = self._taken, None
            if tail is None:
                return
            if not durable:
                self._stale.append((tail.at, len(tail.data)))
                self.writer.change_all()
                return
            if self._durable is not None:
                last = self._durable
                self._stale.append((last.directory_at, last.end - last.directory_at))
            self._durable = tail
            if self.writer.end != tail.end:
                try:
                    self._expose()
                except BaseException:
                    self.writer.change_all()  # so that the next flush tries again
                    raise

    def before_append(self) -> None:
        """Make sure that the last durable tail is found although the file grows; the lock is held."""
        if self._durable is not None and self.writer.end == self._durable.end:
            self._expose()

    def _expose(self) -> None:
        """Say in the header where the durable directory is."""
        assert self._durable is not None
        sector = self._durable.directory_at // SECTOR + 1
        self.storage.write(replace(self._header, directory_sector=sector).to_bytes(), 0)
        self.storage.sync()
        self._exposed = True

    def finish(self) -> None:
        """Make the file one that can be read front to back; its tail is durable."""
        with self.writer.lock:
            if self._durable is None:
                return
            for at, length in self._stale:
                self.storage.write(_SKIPPED * (length // SECTOR), at)
            self._stale.clear()
            if self.storage.size != self._durable.end:
                # What a failed write left: the footer must be at the end before the header says that it is.
                self.storage.truncate(self._durable.end)
                self.storage.sync()
            if self._exposed:
                self.storage.write(self._header.to_bytes(), 0)
                self._exposed = False
            self.storage.sync()


class NewStreamExtent(WritableExtent):
    """See the module.  It is its own table of changes, and the source of what it maps as packed."""

    type_word = "SPARSE"
    storage: Storage
    lazy = True

    def __init__(self, storage: Storage, header: HostedHeader, cache: Cache, *, size: int) -> None:
        self.storage = storage
        self.name = storage.name
        self.header = header
        self.size = size
        self.grain = header.grain
        self.writable = True
        self.tables = (self,)
        self._entries = header.entries_per_table
        self._tables = _Tables(storage, header)
        self._writer = self._tables.writer
        self._inflater = Inflater(storage, header, self._tables, cache, size)
        #: Guards the window; it is never held while something is deflated or written.
        self._lock = threading.Lock()
        self._window: dict[int, bytearray] = {}
        #: Grains that have left the window and are being deflated.
        self._leaving: dict[int, bytearray] = {}
        self._room = max(_WINDOW // self.grain, 4)
        self._batch = max(_BATCH // self.grain, 1)
        #: Batches are appended in the order in which they left the window.
        self._turn = threading.Condition()
        self._batches = self._appended = 0

    # Reading.

    def _present(self, index: int) -> bool:
        if index in self._window or index in self._leaving:
            return True
        table = self._writer.tables.get(index // self._entries)
        return table is not None and table[index % self._entries] != 0

    def map(self, offset: int, length: int) -> Mapping:
        """See Extent."""
        index = offset // self.grain
        number = index // self._entries
        end = min((number + 1) * self._entries, -(-(offset + length) // self.grain))
        with self._lock:
            present = self._present(index)
            if not present and number not in self._writer.tables:
                # Nothing of it is in the file: look for what is in the window.
                waiting = [found for found in (*self._window, *self._leaving) if index < found < end]
                stop = min(waiting, default=end)
            else:
                stop = index + 1
                while stop < end and self._present(stop) is present:
                    stop += 1
        count = min(stop * self.grain - offset, length)
        return (Kind.PACKED, count, self, offset) if present else (Kind.HOLE, count, None, 0)

    def read_into(self, buf: memoryview, at: int) -> None:
        """See Source; what is in memory is copied."""
        done = 0
        while done < len(buf):
            index, within = divmod(at + done, self.grain)
            count = min(self.grain - within, len(buf) - done)
            piece = buf[done : done + count]
            with self._lock:
                plain = self._window.get(index) or self._leaving.get(index)
                if plain is not None:
                    piece[:] = memoryview(plain)[within : within + count]
            if plain is None:
                self._read_packed(piece, index, at + done)
            done += count

    def advise(self, at: int, length: int) -> None:
        """See Source: what has just been written is in memory, of this process or of the kernel."""

    def _read_packed(self, piece: memoryview, index: int, at: int) -> None:
        table = self._writer.tables.get(index // self._entries)
        if table is None or not table[index % self._entries]:
            piece[:] = bytes(len(piece))  # only zeros were in it when it left the window
        else:
            self._inflater.read_into(piece, at)

    # Writing.

    def write(self, buf: memoryview, offset: int, below: Below | None) -> None:
        """See Extent; WriteRefused, changing nothing, if a grain has left the window."""
        self._change(offset, len(buf), buf)

    def zero(self, offset: int, length: int, below: Below | None, *, may_trim: bool) -> None:
        """See WritableExtent: what is absent is zeros; WriteRefused for a grain that has left the window."""
        self._change(offset, length, None)

    def trim(self, offset: int, length: int, below: Below | None) -> None:
        """See WritableExtent: nothing is given back."""

    def must_write_zeros(self, offset: int, length: int, below: Below | None, *, may_trim: bool) -> bool:
        """See WritableExtent: never, for what can't be zeroed is refused."""
        return False

    def _change(self, offset: int, length: int, buf: memoryview | None) -> None:
        """Put bytes, or zeros where ``buf`` is None, into grains in the window."""
        grain, end = self.grain, offset + length
        grains = range(offset // grain, -(-end // grain))
        with self._lock:
            self._refuse_written(grains)
            # Zeros make no grain: only those that are in the window have anything to be changed.
            for index in grains if buf is not None else self._waiting(grains):
                plain = self._window.get(index)
                if plain is None:
                    plain = self._window[index] = bytearray(grain)
                begin, stop = max(index * grain, offset), min((index + 1) * grain, end)
                inside = slice(begin - index * grain, stop - index * grain)
                plain[inside] = bytes(stop - begin) if buf is None else buf[begin - offset : stop - offset]
                self.touched = True
        while len(self._window) > self._room:
            self._release_batch()

    def _waiting(self, grains: range) -> list[int]:
        """Grains of a range that are in the window; whichever is shorter is searched."""
        if len(self._window) < len(grains):
            return [index for index in self._window if index in grains]
        return [index for index in grains if index in self._window]

    def _refuse_written(self, grains: range) -> None:
        found = self._first_written(grains)
        if found is not None:
            raise WriteRefused(
                self.storage.name,
                why=f"grain {found} of a streamOptimized disk is in the file already and can't be changed",
                hint="write front to back, or to another kind of disk and convert that to streamOptimized",
            )

    def _first_written(self, grains: range) -> int | None:
        leaving = [index for index in self._leaving if index in grains]
        if leaving:
            return min(leaving)
        for number in range(grains.start // self._entries, -(-grains.stop // self._entries)):
            table = self._writer.tables.get(number)
            if table is None:
                continue
            first = number * self._entries
            for index in range(max(first, grains.start), min(first + self._entries, grains.stop)):
                if table[index - first]:
                    return index
        return None

    def _release_batch(self) -> None:
        """Deflate and append the grains in the window that come first on the disk."""
        with self._lock:
            chosen = sorted(self._window)[: self._batch]
            leaving = {index: self._window.pop(index) for index in chosen}
            self._leaving.update(leaving)
            ticket, self._batches = self._batches, self._batches + 1
        try:
            nothing = bytes(self.grain)
            records = [
                self._writer.record(index, memoryview(plain))
                for index, plain in leaving.items()
                if plain != nothing
            ]
        except BaseException:
            self._take_back(leaving)
            self._end_turn(ticket)
            raise
        with self._turn:
            while self._appended != ticket:
                self._turn.wait()
        try:
            with self._writer.lock:
                self._tables.before_append()
                self._writer.append(records)
            self.touched = True
            self._forget(leaving)
        except BaseException:
            self._take_back(leaving)
            raise
        finally:
            self._end_turn(ticket)

    def _end_turn(self, ticket: int) -> None:
        with self._turn:
            while self._appended != ticket:
                self._turn.wait()
            self._appended += 1
            self._turn.notify_all()

    def _take_back(self, leaving: dict[int, bytearray]) -> None:
        with self._lock:
            self._window.update(leaving)
        self._forget(leaving)

    def _forget(self, leaving: Collection[int]) -> None:
        with self._lock:
            for index in leaving:
                self._leaving.pop(index, None)

    # What a commit asks; see pages.Changes.

    @property
    def dirty(self) -> bool:
        """See pages.Changes."""
        return bool(self._window or self._leaving) or self._writer.changed

    def take_dirty(self, taken: list[DirtyPage]) -> None:
        """See pages.Changes: the window is emptied first, of all that was in it when this began."""
        with self._lock:
            wanted = {*self._window, *self._leaving}
        while wanted:
            if not wanted.isdisjoint(self._window):
                self._release_batch()
            else:
                with self._turn:
                    last = self._batches
                    while self._appended < last:  # what others took out of the window
                        self._turn.wait()
            with self._lock:
                wanted.intersection_update({*self._window, *self._leaving})
        self.touched = True
        taken.append(self._tables.take())

    def settle(self, taken: list[DirtyPage], *, durable: bool) -> None:
        """See pages.Changes."""
        if taken:
            self._tables.settle(durable=durable)

    def finish(self) -> None:
        """See WritableExtent."""
        self._tables.finish()
