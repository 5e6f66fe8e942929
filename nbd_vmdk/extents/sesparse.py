"""seSparse extents, the deltas of newer ESXi; read only, for the reasons ondisk/sesparse.py gives."""

from array import array
from typing import Final

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import Truncated
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.extents.sparse import SparseExtent
from nbd_vmdk.extents.tables import GrainTables
from nbd_vmdk.ondisk import sesparse
from nbd_vmdk.ondisk.sesparse import SeSparseHeader
from nbd_vmdk.storage.base import Storage

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
