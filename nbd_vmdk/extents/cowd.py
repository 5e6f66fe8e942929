"""COWD extents (VMFSSPARSE), the deltas of ESX; read only for now."""

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import Truncated
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.extents.sparse import SparseExtent
from nbd_vmdk.extents.tables import GrainTables
from nbd_vmdk.ondisk.cowd import ENTRIES_PER_TABLE, CowdHeader
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import SECTOR


class CowdTables(GrainTables):
    """One directory, no twin; tables lie where they were needed first."""

    def __init__(self, storage: Storage, header: CowdHeader, cache: Cache) -> None:
        end = header.overhead
        if end > storage.size:
            raise Truncated(storage.name, what="its grain directory", need=end, have=storage.size)
        super().__init__(
            storage,
            cache,
            width=4,
            entries_per_table=ENTRIES_PER_TABLE,
            directory_entries=header.directory_entries,
            directory_at=header.directory_sector * SECTOR,
            step=ENTRIES_PER_TABLE * 4 // SECTOR,
        )
        self._overhead = end

    def places(self, number: int) -> tuple[int, ...] | None:
        """See GrainTables."""
        sector = self.entry(self.directory, number)
        if not sector:
            return None
        at = sector * SECTOR
        if at < self._overhead or at + self._length > self.storage.size:
            raise self.bad_entry(number, sector)
        return (at,)


class CowdExtent(SparseExtent):
    """A COWD extent: no entry for zeros, a grain is there or the parent shows."""

    type_word = "VMFSSPARSE"

    def __init__(self, storage: Storage, header: CowdHeader, cache: Cache, *, size: int) -> None:
        self.header = header
        places = CowdTables(storage, header, cache)
        super().__init__(
            storage,
            size=size,
            grain=header.grain_sectors * SECTOR,
            tables=places.tables,
            empty_from=places.empty_from,
            lowest=-(-header.overhead // SECTOR),
            step=header.grain_sectors,
        )

    def _decode(self, entry: int, index: int) -> tuple[Kind, int]:
        if entry == 0:
            return Kind.HOLE, 0
        raise self._bad_entry(entry, index, "points into the extent's own directory")
