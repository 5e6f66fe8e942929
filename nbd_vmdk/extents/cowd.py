"""COWD extents (VMFSSPARSE), the deltas of ESX before seSparse: written in place as hosted extents are.

There is one directory and no twin, and a table is made when the first of its grains is written.  Entries know
no zeros: over a parent they are written out, and without one a grain of zeros loses its space.

freeSector, where free space begins, is never believed: QEMU appends to the file and leaves the field as it
was, and a grain put there would lie on another.  New space is taken behind the end of the file, where nothing
can be.  But other writers believe the field.  So it is written ahead of the tables, in the step of a commit
that sets the unclean flag: after a crash it may be too high, which wastes space, and never too low.

What is not done here: the space between freeSector and the end of a file that a host has lengthened by
megabytes at a time stays unused; what is in it is not known without reading all tables.  The generation
numbers and the flags of the header are left as they are: only ESX knows what it compares them with.
"""

from nbd_vmdk.alloc import Allocator
from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import Truncated
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.extents.tables import GrainTables
from nbd_vmdk.extents.writing import WritableSparseExtent
from nbd_vmdk.ondisk.cowd import ENTRIES_PER_TABLE, FREE_SECTOR_AT, MAX_END, UNCLEAN_AT, CowdHeader
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


class CowdExtent(WritableSparseExtent):
    """A COWD extent: no entry for zeros, a grain is there or the parent shows."""

    type_word = "VMFSSPARSE"

    def __init__(self, storage: Storage, header: CowdHeader, cache: Cache, *, size: int) -> None:
        self.header = header
        places = CowdTables(storage, header, cache)
        grain = header.grain_sectors * SECTOR
        super().__init__(
            storage,
            size=size,
            grain=grain,
            tables=places.tables,
            empty_from=places.empty_from,
            lowest=-(-header.overhead // SECTOR),
            step=header.grain_sectors,
        )
        if storage.writable:
            #: Where freeSector points, once something was handed out; before that it is left as it is.
            self._free_at = storage.size
            capacity = header.capacity_sectors * SECTOR
            last = self._end_of_last(capacity, lambda: CowdTables(storage, header, Cache(0)))
            allocator = Allocator(storage, grain, MAX_END - grain, last)
            self.enable_writing(places, allocator, unclean_at=UNCLEAN_AT, was_unclean=header.unclean)

    def _decode(self, entry: int, index: int) -> tuple[Kind, int]:
        if entry == 0:
            return Kind.HOLE, 0
        raise self._bad_entry(entry, index, "points into the extent's own directory")

    def announce(self) -> None:
        """See WritableExtent: set the unclean flag, and freeSector behind all that has been handed out."""
        used = self._allocator.used
        if used != self._free_at:
            self.storage.write((used // SECTOR).to_bytes(4, "little"), FREE_SECTOR_AT)
            self.touched = True
            self._free_at = used
        super().announce()
