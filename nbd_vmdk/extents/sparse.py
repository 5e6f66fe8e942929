"""What hosted sparse, COWD and seSparse extents share: mapping through grain tables.

The kinds differ in their headers, in the width and coding of a table entry and in where a table lies.
That is what the subclasses hold; lookups and the coalescing of neighbouring grains are here, once, and
copy-on-write is in writing.py.

Threads: mapping takes no lock.  An entry is set after the grain's bytes are in the file, so a reader sees the
old state or the new one, never a grain half filled.
"""

from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator
from itertools import compress
from operator import ne
from typing import Final

from nbd_vmdk.errors import BadField, FormatError
from nbd_vmdk.extents.base import Edges, Extent, Kind, Mapping, Reader
from nbd_vmdk.extents.flat import LostSource
from nbd_vmdk.extents.rows import MOST, is_row
from nbd_vmdk.pages import Pages
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.window import local_file
from nbd_vmdk.units import SECTOR

#: Looking a member of an enum up takes as long as a step of arithmetic, and each request does it.
_DATA: Final = Kind.DATA
#: Fewer entries are as quickly looked at one by one.
_MANY: Final = 8


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
        self._clean = tables.clean
        self._pinned = tables.pinned
        self._entries = tables.per_page
        self._lowest = lowest
        self._step = step
        self._is_row = is_row(tables.width, step)
        self._is_repeated = is_row(tables.width, 0)

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
        table = self._pinned.get(number) or self._clean.young.get(number)
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

    def _split(self) -> tuple[int, int, int, int]:
        """How an offset is taken apart: (bits of a grain, of what a table maps, mask of a grain, of a table).

        ``offset >> table bits`` is the table, ``offset >> grain bits & table mask`` the slot in it.  Both
        hold powers of two: what has others was refused.
        """
        grain_bits = self.grain.bit_length() - 1
        return grain_bits, grain_bits + self._entries.bit_length() - 1, self.grain - 1, self._entries - 1

    def reader(self, otherwise: Reader) -> Reader:
        """See Extent: what lies in one grain, or in a few side by side, in a file of this machine."""
        local = local_file(self.storage)
        # Where no entry is plain there is nothing to find.
        if local is None or self._lowest.bit_length() > 8 * self._tables.width:
            return otherwise
        file, preadv = local
        size, grain, lowest = self.size, self.grain, self._lowest
        clean, pinned = self._clean, self._pinned
        grain_bits, table_bits, in_grain, in_table = self._split()
        entries, side_by_side = self._entries, self._is_row

        def several(table: "array[int] | bytes | bytearray", entry: int, offset: int, end: int) -> bool:
            slot = offset >> grain_bits & in_table
            count = (end - 1 >> grain_bits) - (offset >> grain_bits) + 1
            return count <= MOST and slot + count <= entries and side_by_side(table, slot, entry, count)

        def read(buf: memoryview, offset: int) -> None:
            length = len(buf)
            number = offset >> table_bits
            # A table on its way from one to the other is in both.  One that is missed takes the longer way.
            table = clean.young.get(number)
            if table is None:
                table = pinned.get(number)
            if table is not None and offset + length <= size:
                entry = table[offset >> grain_bits & in_table]
                within = offset & in_grain
                if entry >= lowest and (
                    within + length <= grain or several(table, entry, offset, offset + length)
                ):
                    try:
                        if preadv(file.fd, (buf,), entry * SECTOR + within) == length:
                            return
                    except OSError:
                        pass
            otherwise(buf, offset)

        return read

    def _following(
        self, table: "array[int] | bytes | bytearray", slot: int, entry: int, kind: Kind, length: int
    ) -> int:
        """Bytes behind a grain, up to ``length``, whose entries go on in the same way."""
        first = slot + 1
        last = min(self._entries, first - (-length // self.grain))
        if table is self._tables.empty:
            return (last - first) * self.grain
        step, go_on = (self._step, self._is_row) if kind is Kind.DATA else (0, self._is_repeated)
        slot = first
        while (count := min(last - slot, MOST)) >= _MANY and go_on(table, slot, entry + step, count):
            slot += count
            entry += step * count
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
        source = LostSource(self.storage.name, error.message, error.hint)
        return Kind.LOST, length, source, self.origin + offset

    def _bad_entry(self, entry: int, index: int, why: str) -> BadField:
        return BadField(
            self.storage.name, field=f"the table entry of grain {index}", value=f"{entry:#x}", why=why
        )
