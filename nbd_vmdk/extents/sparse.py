"""What hosted sparse, COWD and seSparse extents share: mapping and writing through grain tables.

The kinds differ in their headers, in the width and coding of a table entry and in where a table lies.
That is what the subclasses hold; lookups, coalescing of neighbouring grains and copy-on-write are here, once.

Threads: mapping takes no lock.  Whoever changes a table entry holds the lock of its table from looking at
it until the entry is set, so two writers of one new grain are serialised; the entry is set after the
grain's bytes are in the file, so a reader sees the old state or the new one, never a grain half filled.

What is not done here: an entry is set in memory only; commit.py brings it to disk.
"""

import threading
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator
from itertools import compress
from operator import ne
from typing import Final

from nbd_vmdk.alloc import Allocator
from nbd_vmdk.errors import BadField, FormatError, VmdkError
from nbd_vmdk.extents.base import Below, Edges, Extent, Kind, Mapping, WritableExtent
from nbd_vmdk.extents.flat import LostSource
from nbd_vmdk.extents.tables import GrainTables
from nbd_vmdk.pages import Pages
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB, SECTOR

#: Looking a member of an enum up takes as long as a step of arithmetic, and each request does it.
_DATA: Final = Kind.DATA
#: Copy-on-write of grains larger than this goes piece by piece.
_PIECE = MIB
#: Memory that a freed grain occupies until its blocks are given back, roughly.
_FREED_COST = 160


class SparseExtent(Extent):
    """An extent whose grains are found through a directory and tables.

    ``lowest`` is the smallest entry that is simply the sector of a grain; what is below, or every entry
    where sectors are coded otherwise, goes through :meth:`_decode`.  ``step`` added to an entry gives that of
    the next grain in the file.
    """

    storage: Storage
    #: The entry that says that a grain is zeros, whatever the parent has; None if there is none.
    zero_entry: int | None = None

    def __init__(
        self,
        storage: Storage,
        *,
        size: int,
        grain: int,
        tables: Pages,
        empty_from: Callable[[int, int], int],
        lowest: int,
        step: int,
    ) -> None:
        """``empty_from(number, limit)`` counts tables that hold nothing, see GrainTables."""
        self.storage = storage
        self.size = size
        self.grain = grain
        self._tables = tables
        self._empty_from = empty_from
        self._cache = tables.cache
        self._key = tables.key
        self._pinned = tables.pinned
        self._entries = tables.per_page
        self._lowest = lowest
        self._step = step

    @abstractmethod
    def _decode(self, entry: int, index: int) -> tuple[Kind, int]:
        """Kind and byte position that an entry stands for; ``index`` is the grain's, for messages."""

    def map(self, offset: int, length: int) -> Mapping:
        """See Extent; a mapping never crosses a grain table's edge."""
        grain = self.grain
        index = offset // grain
        within = offset - index * grain
        number = index // self._entries
        slot = index - number * self._entries
        table = self._pinned.get(number) or self._cache.young.get(self._key + number)
        if table is None:
            table = self._tables.get(number)
            if table is None:
                return Kind.HOLE, min((number + 1) * self._entries * grain - offset, length), None, 0
        entry = table[slot]
        if entry >= self._lowest:
            kind, at = _DATA, entry * SECTOR
        else:
            kind, at = self._decode(entry, index)
        room = grain - within
        if length > room:
            length = min(length, room + self._following(table, slot, entry, kind, length - room))
        if kind is _DATA:
            return kind, length, self.storage, at + within
        return kind, length, None, 0

    def _following(
        self, table: "array[int] | bytes | bytearray", slot: int, entry: int, kind: Kind, length: int
    ) -> int:
        """Bytes behind a grain, up to ``length``, whose entries go on in the same way."""
        first = slot + 1
        last = min(self._entries, first - (-length // self.grain))
        if table is self._tables.empty:
            return (last - first) * self.grain
        step = self._step if kind is Kind.DATA else 0
        slot = first
        while slot < last and table[slot] == (entry := entry + step):
            slot += 1
        return (slot - first) * self.grain

    def runs(self, offset: int, length: int) -> Iterator[Mapping]:
        """See Extent; tables that hold nothing are passed over in bulk, what can't be looked up is lost."""
        coverage = self._entries * self.grain
        end = offset + length
        while offset < end:
            try:
                mapping = self.map(offset, end - offset)
            except FormatError as error:
                mapping = self._lost_part(offset, end - offset, error)
            offset += mapping[1]
            if mapping[0] is Kind.HOLE and offset % coverage == 0 and end - offset >= coverage:
                empty = self._empty_from(offset // coverage, (end - offset) // coverage) * coverage
                mapping = Kind.HOLE, mapping[1] + empty, None, 0
                offset += empty
            yield mapping

    def edges(self, offset: int, length: int) -> Iterator[Edges]:
        """See Extent: a table is looked through as a whole, without a step of Python for each grain."""
        coverage = self._entries * self.grain
        end = offset + length
        while offset < end:
            number = offset // coverage
            stop = min((number + 1) * coverage, end)
            try:
                table = self._tables.get(number)
            except FormatError:
                yield from super().edges(offset, stop - offset)
            else:
                if table is None or table is self._tables.empty:
                    yield [offset], False
                    if end - stop >= coverage:
                        stop += self._empty_from(number + 1, (end - stop) // coverage) * coverage
                else:
                    yield from self._edges_of(table, number, offset, stop)
            offset = stop

    def _edges_of(self, table: "array[int]", number: int, offset: int, stop: int) -> Iterator[Edges]:
        grain = self.grain
        first = offset // grain
        entries = table[first - number * self._entries : -(-stop // grain) - number * self._entries]
        smallest = min(filter(None, entries), default=self._lowest)
        if smallest >= self._lowest:
            there = bytes(map(bool, entries))
        else:
            there = bytes(map(self._lowest.__le__, entries))
            zeros = 0 if self.zero_entry is None else entries.count(self.zero_entry)
            if there.count(1) + entries.count(0) + zeros != len(entries):
                # Entries that only the kind understands are decoded one by one.
                yield from super().edges(offset, stop - offset)
                return
        changes = map(ne, there[1:], there)
        yield [offset, *compress(range((first + 1) * grain, stop, grain), changes)], there[0] == 1

    def presence(self, offset: int, length: int, unit: int) -> bytes:
        """See Extent: an entry that is 0 is a hole in every kind."""
        grain = self.grain
        grains = unit // grain
        coverage = self._entries * grain
        if unit % grain or offset % unit or coverage % unit:
            return super().presence(offset, length, unit)
        found = []
        end = offset + length
        while offset < end:
            number = offset // coverage
            stop = min((number + 1) * coverage, end)
            try:
                table = self._tables.get(number)
            except FormatError:
                found.append(super().presence(offset, stop - offset, unit))
            else:
                if table is None or table is self._tables.empty:
                    found.append(bytes(-(-(stop - offset) // unit)))
                else:
                    slot = offset // grain - number * self._entries
                    entries = table[slot : slot - (offset - stop) // grain]
                    if grains == 1:
                        found.append(bytes(map(bool, entries)))
                    else:
                        data = entries.tobytes()
                        step = grains * entries.itemsize
                        zeros = bytes(step)
                        found.append(bytes([data[i : i + step] != zeros for i in range(0, len(data), step)]))
            offset = stop
        return b"".join(found)

    def _lost_part(self, offset: int, length: int, error: FormatError) -> Mapping:
        """What can't be looked up from ``offset`` on: a grain by its entry, or all that a table maps."""
        number, slot = divmod(offset // self.grain, self._entries)
        try:
            self._tables.get(number)
            slot += 1
        except FormatError:
            slot = self._entries
        length = min((number * self._entries + slot) * self.grain - offset, length)
        return Kind.LOST, length, LostSource(self.storage.name, error.message), offset

    def _bad_entry(self, entry: int, index: int, why: str) -> BadField:
        return BadField(
            self.storage.name, field=f"the table entry of grain {index}", value=f"{entry:#x}", why=why
        )


class WritableSparseExtent(SparseExtent, WritableExtent):
    """A sparse extent whose tables may be changed: the writing half, for kinds with 32-bit entries.

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
        self._freed: list[int] = []
        self._unclean_at = unclean_at
        self._was_unclean = was_unclean
        self._announced = False
        self._announce_lock = threading.Lock()
        self.writable = True

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
        total = len(self._freed) * _FREED_COST
        for pages in self.tables:
            total += len(pages.pinned) * pages.pinned_cost
        return total

    def take_freed(self) -> list[int]:
        """See WritableExtent."""
        freed = self._freed
        taken = freed[:]
        del freed[: len(taken)]
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

    def write(self, buf: memoryview, offset: int, below: Below | None) -> None:
        """See WritableExtent."""
        ticket = self._allocator.ticket()
        try:
            self._write(buf, offset, below)
        finally:
            self._allocator.writing.discard(ticket)

    def _write(self, buf: memoryview, offset: int, below: Below | None) -> None:
        length = len(buf)
        done = 0
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
            kind, _at = self._decode(entry, index)
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
                if count % grain:
                    self._write_partial(piece, within, at, index, below if kind is Kind.HOLE else None)
                else:
                    self.storage.write(piece, at)
            except VmdkError:
                # No table names the space yet; what did get written there is released with the next commit.
                self._freed += range(at, at + grains * grain, grain)
                raise
            self.touched = True
            table = self._tables.pin(number)
            table[slot] = at // SECTOR
            for i in range(1, grains):
                table[slot + i] = (at + i * grain) // SECTOR
            self._tables.mark_dirty(number)
        return count

    def _table_for_change(self, number: int) -> "array[int]":
        """The table to look at before changing it, made if it does not exist; its lock is held.

        It is pinned only after all that can fail.
        """
        table = self._tables.load(number)
        if table is None:
            self._create_table(number)
            table = self._tables.create(number)
        return table

    def _decode_slot(self, table: "array[int]", slot: int, index: int) -> tuple[Kind, int]:
        entry = table[slot]
        return (Kind.DATA, entry * SECTOR) if entry >= self._lowest else self._decode(entry, index)

    def _write_partial(self, buf: memoryview, within: int, at: int, index: int, below: Below | None) -> None:
        """Fill a new grain: ``buf`` at ``within``, the rest from below; new space is zeros already."""
        if below is None:
            self.storage.write(buf, at + within)
            return
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
                table = self._tables.pin(number)
                for i in (*holes, *(i for i, _at in places)):
                    table[slot + i] = entry
                self._tables.mark_dirty(number)
                self._freed += [at for _i, at in places]
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
