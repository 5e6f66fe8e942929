"""seSparse extents, the deltas of newer ESXi; read only.

A writer could not be proven right, because four things that it must keep are known by name alone:

*   the free bitmap has a bit for each grain of the file, but in which order the bits of a byte count is not
    known; with one wrong bit ESXi gives a grain that is in use to another place of the disk;
*   the back map says for each grain of the file which table uses it, in an encoding that nobody has told;
    ESXi moves grains by it when it gives space back;
*   the journal's records and its header are unknown, so a commit can't be made as ESXi makes it, and after a
    crash in the middle ESXi would replay what an earlier session left there;
*   the volatile header's freeGTNumber and nextTxnSeqNumber are inferred from few files, and what ESXi
    concludes from a number that does not fit is unknown.

Directory and tables alone could be written as those of other kinds are, and readers that know no more than
these would be content.  But ESXi is what the kind is for, and it would lose data.  What it takes are images
before and after known writes on ESXi itself, each with its bitmap, back map and journal; the proof would be
the opposite way, ESXi's own check of what was written here.  Till then a hosted child over it can be written.
"""

from array import array
from typing import Final

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import Truncated
from nbd_vmdk.extents.base import Kind, Reader
from nbd_vmdk.extents.rows import MOST
from nbd_vmdk.extents.sparse import SparseExtent
from nbd_vmdk.extents.tables import GrainTables
from nbd_vmdk.ondisk import sesparse
from nbd_vmdk.ondisk.sesparse import SeSparseHeader
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.window import local_file

#: Above every 64-bit entry: none of them is a plain sector number.
_NO_PLAIN_ENTRY: Final = 1 << 64


class SeSparseTables(GrainTables):
    """A directory whose entries name tables by index, in an area that has room for all of them."""

    def __init__(self, storage: Storage, header: SeSparseHeader, cache: Cache) -> None:
        end = header.directory.at + header.directory_entries * 8
        if end > storage.size:
            raise Truncated(storage.name, what="its grain directory", need=end, have=storage.size)
        super().__init__(
            storage,
            cache,
            width=8,
            entries_per_table=sesparse.ENTRIES_PER_TABLE,
            directory_entries=header.directory_entries,
            directory_at=header.directory.at,
            step=1,
        )
        self._header = header

    def places(self, number: int) -> tuple[int, ...] | None:
        """See GrainTables."""
        index = sesparse.table_index(self.entry(self.directory, number), self._header, self.storage.name)
        return None if index is None else (self._header.tables.at + index * self._length,)


class SeSparseExtent(SparseExtent):
    """A seSparse extent: 64-bit entries that carry their own state."""

    type_word = "SESPARSE"

    def __init__(self, storage: Storage, header: SeSparseHeader, cache: Cache, *, size: int) -> None:
        self.header = header
        places = SeSparseTables(storage, header, cache)
        super().__init__(
            storage,
            size=size,
            grain=header.grain,
            tables=places.tables,
            empty_from=places.empty_from,
            lowest=_NO_PLAIN_ENTRY,
            step=sesparse.ENTRY_STEP,
        )

    def reader(self, otherwise: Reader) -> Reader:
        """See Extent: as SparseExtent's, of entries that are taken apart as sesparse.grain_at() does."""
        local = local_file(self.storage)
        if local is None:
            return otherwise
        file, preadv = local
        size, grain = self.size, self.grain
        first, count = self.header.grains.at, self.header.grain_count
        clean = self._clean  # nothing is pinned, as nothing is changed
        grain_bits, table_bits, in_grain, in_table = self._split()
        allocated, state_at = sesparse.ENTRY_ALLOCATED, sesparse.STATE_AT - sesparse.LOW_AT
        low_at, low_bits = sesparse.LOW_AT, sesparse.LOW_BITS
        low_mask, rest_mask = sesparse.LOW_MASK, sesparse.REST_MASK
        entries, side_by_side = self._entries, self._is_row

        def several(table: "array[int] | bytes | bytearray", entry: int, offset: int, end: int) -> bool:
            slot = offset >> grain_bits & in_table
            many = (end - 1 >> grain_bits) - (offset >> grain_bits) + 1
            if many > MOST or slot + many > entries:
                return False
            # If they are a row, and the last one is a grain of the file, all are.
            last = table[slot + many - 1]
            top = last >> low_at
            return (
                top >> state_at == allocated
                and ((last & rest_mask) << low_bits | top & low_mask) < count
                and side_by_side(table, slot, entry, many)
            )

        def read(buf: memoryview, offset: int) -> None:
            length = len(buf)
            table = clean.young.get(offset >> table_bits)
            if table is not None and offset + length <= size:
                entry = table[offset >> grain_bits & in_table]
                within = offset & in_grain
                top = entry >> low_at  # state and low bits: a small number, which is quick to calculate with
                if top >> state_at == allocated and (
                    within + length <= grain or several(table, entry, offset, offset + length)
                ):
                    index = (entry & rest_mask) << low_bits | top & low_mask
                    if index < count:
                        try:
                            if preadv(file.fd, (buf,), first + index * grain + within) == length:
                                return
                        except OSError:
                            pass
            otherwise(buf, offset)

        return read

    def _following(
        self, table: "array[int] | bytes | bytearray", slot: int, entry: int, kind: Kind, length: int
    ) -> int:
        if kind is Kind.DATA:
            # Beyond these entries ENTRY_STEP does not lead to the file's next grain.
            length = min(length, sesparse.grains_behind(entry, self.header) * self.grain)
        return super()._following(table, slot, entry, kind, length)

    def _decode(self, entry: int, index: int) -> tuple[Kind, int]:
        if entry == 0:
            return Kind.HOLE, 0
        state = entry >> 60
        if state == sesparse.ENTRY_ALLOCATED:
            return Kind.DATA, sesparse.grain_at(entry, self.header, self.storage.name)
        # A grain that the guest unmapped remembers where it was; QEMU's authors saw such grains read as
        # zeros on ESXi, even over a parent that has data.
        if state in (sesparse.ENTRY_UNMAPPED, sesparse.ENTRY_ZERO):
            return Kind.ZERO, 0
        raise self._bad_entry(entry, index, "not a state that is known")
