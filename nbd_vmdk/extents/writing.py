"""Writing through grain tables: new grains, copy-on-write, zeroing and trimming, the same for all kinds.

Threads: whoever changes a table entry holds the lock of its table from looking at it until the entry is set,
so two writers of one new grain are serialised; the entry is set after the grain's bytes are in the file.
Overwriting a grain takes no lock.

What is not done here: an entry is set in memory only; commit.py brings it to disk.
"""

import threading
from array import array
from collections.abc import Callable, Iterator
from typing import Final

from nbd_vmdk.alloc import Allocator
from nbd_vmdk.errors import StorageError, VmdkError
from nbd_vmdk.extents.base import Below, Kind, WritableExtent, Writer
from nbd_vmdk.extents.sparse import SparseExtent
from nbd_vmdk.extents.tables import GrainTables
from nbd_vmdk.pages import Pages
from nbd_vmdk.units import MIB, SECTOR

#: Looking a member of an enum up takes as long as a step of arithmetic, and each request does it.
_DATA: Final = Kind.DATA
#: Copy-on-write of grains larger than this goes piece by piece.
_PIECE = MIB
#: Memory that a freed grain occupies until its blocks are given back, roughly.
_FREED_COST = 160


class WritableSparseExtent(SparseExtent, WritableExtent):
    """A sparse extent whose tables may be changed, of a kind with 32-bit entries.

    A subclass calls :meth:`enable_writing` where its file is open for that.
    """

    tables: tuple[Pages, ...] = ()

    def enable_writing(
        self, places: GrainTables, allocator: Allocator, *, unclean_at: int, was_unclean: bool
    ) -> None:
        """Make the extent writable.

        ``unclean_at`` is the byte that says that the file is being written; ``was_unclean``: it says so now.
        """
        self._places = places
        self._allocator = allocator
        # Directories come after the tables that they name.
        self.tables = (self._tables, *places.directories)
        self.freed: list[int] = []
        #: Tables that need nothing more before they are changed.
        self._ready: set[int] = set()
        self._unclean_at = unclean_at
        self._was_unclean = was_unclean
        self._announced = False
        self._announce_lock = threading.Lock()
        self.writable = True

    def _end_of_last(self, capacity: int, look: Callable[[], GrainTables]) -> int:
        """Where the last grain of ``capacity`` bytes ends, or would; 0 if there is none, or it is seen whole.

        A writer may leave out of the file what the guest does not see.  Where grains do not begin at
        multiples of their size that reaches to the place of the next one.  ``look`` gives tables for this
        question alone, which keep nothing: what is asked later is looked up in the file as it is then.
        """
        index, rest = divmod(capacity, self.grain)
        if not rest:
            return 0
        try:
            table = look().tables.get(index // self._entries)
        except VmdkError:
            return 0  # whoever reads there is told
        entry = 0 if table is None else table[index % self._entries]
        return entry * SECTOR + self.grain if entry >= self._lowest else 0

    def _create_table(self, number: int, content: bytes = b"") -> None:
        """Give table ``number`` a place wherever a directory names none; its lock is held by the caller."""
        directories = self._places.lacking(number)
        places = self._places.reserve(directories, self._allocator)
        if content:
            for at in places:
                self.storage.write(content, at)
        self.touched = True  # what is behind a directory's entry must be durable before the entry
        self._places.enter(number, directories, places)

    def announce(self) -> None:
        """See WritableExtent: set the unclean flag."""
        with self._announce_lock:
            if not self._announced:
                self.storage.write(b"\x01", self._unclean_at)
                self.touched = self._announced = True

    def finish(self) -> None:
        """See WritableExtent: cut the tail off, clear the unclean flag.

        A flag that an earlier crash left is not ours to clear.
        """
        self._allocator.trim_tail()
        with self._announce_lock:
            if self._announced and not self._was_unclean:
                self.storage.write(b"\x00", self._unclean_at)
                self.storage.sync()
                self._announced = False

    @property
    def held(self) -> int:
        """See WritableExtent."""
        total = len(self.freed) * _FREED_COST
        for pages in self.tables:
            total += len(pages.pinned) * pages.pinned_cost
        return total

    def take_freed(self) -> list[int]:
        """See WritableExtent."""
        taken = self.freed[:]
        del self.freed[: len(taken)]
        return taken

    def release(self, positions: list[int]) -> None:
        """See WritableExtent: neighbours are given back in one piece."""
        positions = sorted(positions)
        first = 0
        for index, at in enumerate(positions, 1):
            if index == len(positions) or positions[index] != at + self.grain:
                start, length = positions[first], (index - first) * self.grain
                self.storage.punch(start, length)
                self._allocator.give_back(start, length)
                first = index

    def writer(self, *, alone: bool) -> Writer:
        """See WritableExtent: into one grain, which may be new where its table is ready for changes."""
        storage, size, grain, lowest = self.storage, self.size, self.grain, self._lowest
        clean, pinned, dirty = self._clean, self._pinned, self._tables.dirty
        grain_bits, table_bits, in_grain, in_table = self._split()
        lock, allocator, take_grains = self._tables.lock, self._allocator, self._allocator.take_grains
        tickets, writing, ready = allocator.tickets, allocator.writing, self._ready

        def write(buf: memoryview, offset: int) -> "WritableSparseExtent | None":
            length = len(buf)
            number = offset >> table_bits
            slot = offset >> grain_bits & in_table
            within = offset & in_grain
            ticket = next(tickets)
            writing.add(ticket)  # before the entry is looked at, as in _write_rest()
            try:
                # A table that others write to is pinned, mostly; one on its way to the others is in both.
                table = pinned.get(number) or clean.young.get(number)
                if table is None or within + length > grain or offset + length > size:
                    return None
                entry = table[slot]
                if entry >= lowest:
                    at = entry * SECTOR + within
                    if at + length > allocator.end:
                        return None
                    storage.write(buf, at)
                    self.touched = True
                    return self
            finally:
                writing.discard(ticket)
            # There is nothing yet.  What follows is _fill() for one grain, without a parent.
            if entry or not alone or number not in ready:
                return None
            with lock(number):
                # Meanwhile the cache may have forgotten the table, or another writer have made the grain.
                table = pinned.get(number) or clean.young.get(number)
                if table is None or table[slot]:
                    return None
                at = take_grains(1)
                try:
                    storage.write(buf, at + within)
                    # This may be another array: the cache may have forgotten that one, or it stood for zeros.
                    table = pinned.get(number) or self._pin(number)
                except VmdkError:
                    self._abandon(at, 1)
                    raise
                self.touched = True
                table[slot] = at // SECTOR
                dirty.add(number)
                return self

        return write

    def write(self, buf: memoryview, offset: int, below: Below | None) -> None:
        """See WritableExtent."""
        length = len(buf)
        done = 0
        if offset % self.grain + length <= self.grain:
            number, slot = divmod(offset // self.grain, self._entries)
            table = self._pinned.get(number) or self._clean.young.get(number)
            if table is not None and table[slot] < self._lowest:
                # There is no grain yet: the way that looks up where it is would do so in vain.
                done = self._fill(buf, offset, below)
        if done < length:
            ticket = self._allocator.ticket()
            try:
                self._write_rest(buf, offset, done, below)
            finally:
                self._allocator.writing.discard(ticket)

    def _write_rest(self, buf: memoryview, offset: int, done: int, below: Below | None) -> None:
        length = len(buf)
        while done < length:
            kind, count, _source, at = self.map(offset + done, length - done)
            piece = buf if count == length else buf[done : done + count]
            if kind is _DATA:
                if at + count > self._allocator.end:
                    # The file was cut off. Writing there would make it longer behind the allocator's back.
                    index = (offset + done) // self.grain
                    raise self._bad_entry(at // SECTOR, index, "points beyond the end of the file")
                self.storage.write(piece, at)
                self.touched = True
            else:
                count = self._fill(piece, offset + done, below)
            done += count

    def _fill(self, buf: memoryview, offset: int, below: Below | None) -> int:
        """Write to grains without space, all in one table; how many bytes, 0 if another writer came first."""
        grain = self.grain
        index = offset // grain
        within = offset - index * grain
        number, slot = divmod(index, self._entries)
        with self._tables.lock(number):
            # A table that is changed already was made ready for it then.
            table = self._pinned.get(number) or self._table_for_change(number)
            entry = table[slot]
            if entry >= self._lowest:
                return 0
            kind = self._decode(entry, index)[0] if entry else Kind.HOLE
            if kind is _DATA:
                return 0
            grains = 1
            count = len(buf)
            if within or count < grain:
                count = min(grain - within, count)
            else:
                while (grains + 1) * grain <= len(buf) and self._decode_slot(
                    table, slot + grains, index + grains
                )[0] is not _DATA:
                    grains += 1
                count = grains * grain
            piece = buf if count == len(buf) else buf[:count]
            at = self._allocator.take_grains(grains)
            try:
                if below is not None and kind is Kind.HOLE and count % grain:
                    self._write_partial(piece, within, at, index, below)
                else:
                    self.storage.write(piece, at + within)  # new space is zeros already
                table = self._pinned.get(number) or self._pin(number)
            except VmdkError:
                self._abandon(at, grains)
                raise
            self.touched = True
            table[slot] = at // SECTOR
            for i in range(1, grains):
                table[slot + i] = (at + i * grain) // SECTOR
            self._tables.dirty.add(number)
        return count

    def _abandon(self, at: int, grains: int) -> None:
        """Give back new grains that no table names, and what is in them; or have the next commit do it."""
        length = grains * self.grain
        try:
            self.storage.punch(at, length)
        except StorageError:
            self.freed += range(at, at + length, self.grain)
            self.holds_more = True
        else:
            self._allocator.untake(at, length)

    def _table_for_change(self, number: int) -> "array[int]":
        """The table to look at before changing it, made if it does not exist; its lock is held.

        It is pinned only after all that can fail.
        """
        table = self._tables.load(number)
        if table is None or number not in self._ready:
            table = self._make_ready(number, table)
            self._ready.add(number)
        return table

    def _make_ready(self, number: int, table: "array[int] | None") -> "array[int]":
        """Do what must be done once before a table is changed; ``table`` is None where there is none."""
        if table is None:
            self._create_table(number)
            table = self._tables.create(number)
            self.holds_more = True
        return table

    def _pin(self, number: int) -> "array[int]":
        table = self._tables.pin(number)
        self.holds_more = True
        return table

    def _decode_slot(self, table: "array[int]", slot: int, index: int) -> tuple[Kind, int]:
        entry = table[slot]
        return (Kind.DATA, entry * SECTOR) if entry >= self._lowest else self._decode(entry, index)

    def _write_partial(self, buf: memoryview, within: int, at: int, index: int, below: Below) -> None:
        """Fill a new grain: ``buf`` at ``within``, the rest from below."""
        start = index * self.grain
        end = within + len(buf)
        # The last grain may reach past the extent's end; what is there stays zeros.
        stop = min(self.grain, self.size - start)
        if self.grain <= _PIECE:
            whole = memoryview(bytearray(stop))
            if within:
                below(whole[:within], start)
            whole[within:end] = buf
            if end < stop:
                below(whole[end:], start + end)
            self.storage.write(whole, at)
        else:
            self._copy_below(below, start, at, 0, within)
            self.storage.write(buf, at + within)
            self._copy_below(below, start, at, end, stop)

    def _copy_below(self, below: Below, start: int, at: int, first: int, last: int) -> None:
        for begin in range(first, last, _PIECE):
            piece = bytearray(min(_PIECE, last - begin))
            below(memoryview(piece), start + begin)
            if piece.count(0) != len(piece):
                self.storage.write(piece, at + begin)

    def must_write_zeros(self, offset: int, length: int, below: Below | None, *, may_trim: bool) -> bool:
        """See WritableExtent."""
        return any(
            self._needs_writing(*piece, below, may_trim=may_trim)
            for piece in self._pieces(offset, length, below)
        )

    def zero(self, offset: int, length: int, below: Below | None, *, may_trim: bool) -> None:
        """See WritableExtent.

        Whole grains lose their space if they may and if an entry can say "zeros" here; a grain that keeps its
        space is zeroed in the file, which file systems do without writing.  Only a grain that must be
        made to hide the parent costs data writes.
        """
        for start, count in self._pieces(offset, length, below):
            if not self._zero_piece(start, count, below, may_trim=may_trim):
                for begin in range(start, start + count, _PIECE):
                    self.write(memoryview(bytes(min(_PIECE, start + count - begin))), begin, below)

    def trim(self, offset: int, length: int, below: Below | None) -> None:
        """See WritableExtent.

        Whole grains lose their space if an entry can say "zeros" here; else a grain stays and the blocks
        inside go back to the file system.  Over the parent's bytes that no entry can hide, nothing happens.
        """
        for start, count in self._pieces(offset, length, below):
            self._zero_piece(start, count, below, may_trim=True)

    def _pieces(self, offset: int, length: int, below: Below | None) -> Iterator[tuple[int, int]]:
        """Split a range into parts of a grain and rows of whole ones, without what reads as zeros already.

        A row lies in one table, and its grains were of one kind when they were looked at.
        """
        grain = self.grain
        end = offset + length
        while offset < end:
            kind, count, _source, _at = self.map(offset, end - offset)
            stop = offset + count
            if kind is Kind.ZERO or (kind is Kind.HOLE and below is None):
                offset = stop
            while offset < stop:
                edge = stop if stop == self.size else stop - stop % grain
                if offset % grain or edge <= offset:
                    edge = min(stop, (offset // grain + 1) * grain)
                yield offset, edge - offset
                offset = edge

    def _is_whole(self, offset: int, length: int) -> bool:
        return offset % self.grain == 0 and (length % self.grain == 0 or offset + length == self.size)

    def _needs_writing(self, offset: int, length: int, below: Below | None, *, may_trim: bool) -> bool:
        """Zeroing this part of a grain means writing zeros.

        The parent shows and no entry can hide it, or the grain is kept and the file system can't zero it.
        """
        has_entry = self._is_whole(offset, length) and (below is None or self.zero_entry is not None)
        if self.map(offset, length)[0] is Kind.DATA:
            return not (has_entry and may_trim) and not self.storage.zeroes_fast(punch=may_trim)
        return not has_entry and below is not None

    def _zero_piece(self, offset: int, length: int, below: Below | None, *, may_trim: bool) -> bool:
        """Zero a part of a grain, or a row of whole ones, without writing data.

        False where that can't be; grains of its own are then zeros all the same.
        """
        index = offset // self.grain
        number, slot = divmod(index, self._entries)
        grains = -(-(offset % self.grain + length) // self.grain)
        entry = self.zero_entry if below is not None else 0
        if not self._is_whole(offset, length):
            entry = None
        with self._tables.lock(number):
            table = self._tables.load(number)
            if table is None and below is None:
                return True
            # What must change: grains in the file by their places, and those that nothing is there of.
            places, holes = [], []
            for i in range(grains):
                kind, at = (Kind.HOLE, 0) if table is None else self._decode_slot(table, slot + i, index + i)
                if kind is Kind.DATA:
                    places.append((i, at))
                elif kind is Kind.HOLE and below is not None:
                    holes.append(i)
            if entry is None or not may_trim:
                self._zero_places(places, offset, length, may_trim=may_trim)
                places = []
            if entry is not None and (places or holes):
                self._table_for_change(number)
                table = self._pin(number)
                for i in (*holes, *(i for i, _at in places)):
                    table[slot + i] = entry
                self._tables.dirty.add(number)
                self.freed += [at for _i, at in places]
                self.holds_more = True
            return entry is not None or not holes

    def _zero_places(
        self, places: list[tuple[int, int]], offset: int, length: int, *, may_trim: bool
    ) -> None:
        """Zero grains where they are, or a part of one; neighbours in one call."""
        within = offset % self.grain
        first = 0
        for last, (number, at) in enumerate(places, 1):
            if last == len(places) or places[last][1] != at + self.grain:
                begin = places[first][1] + within
                end = at + min(self.grain, within + length - number * self.grain)
                (self.storage.punch if may_trim else self.storage.zero)(begin, end - begin)
                self.touched = True
                first = last
