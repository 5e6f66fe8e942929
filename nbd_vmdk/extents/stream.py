"""streamOptimized extents: compressed grains, read through the tables.

A compressed grain can't be overwritten in place, so the extent is read only; a new, empty one is filled by
newstream.py, and what is left of a damaged one is read by salvage.py.  A mapping of kind PACKED names the
inflater as its source and counts in the extent's own bytes, so the read loop treats packed data as any other.
"""

import struct
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol

from nbd_vmdk.cache import Cache
from nbd_vmdk.codec import CorruptGrain, inflate
from nbd_vmdk.errors import NEWER, BadField, FormatError, Truncated, Unreadable, Unsupported
from nbd_vmdk.extents.base import Kind, Mapping, Reader
from nbd_vmdk.extents.hosted import HostedTables
from nbd_vmdk.extents.sparse import SparseExtent
from nbd_vmdk.extents.stored import layout_of, read_stored, span
from nbd_vmdk.ondisk.hosted import HostedHeader, parse_header
from nbd_vmdk.ondisk.stream import (
    FOOTER_LENGTH,
    GRAIN_MARKER,
    GrainRecord,
    footer_header_offset,
    parse_record,
)
from nbd_vmdk.pages import Pages
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.window import local_file
from nbd_vmdk.units import MIB, SECTOR

#: Inflating needs a whole grain in memory; no writer makes compressed grains over 64 KiB.
MAX_PACKED_GRAIN: Final = 32 * MIB
#: How far from the end of the file a footer is looked for (tar slack, padding by an export).
_FOOTER_SEARCH: Final = MIB
#: Tables looked at, from the last one backwards, to see whether the file's tail is there.
_TAIL_TABLES: Final = 1024
_SALVAGE_HINT: Final = (
    "nbd-vmdk repair IMAGE shows what can be mended; to read what is left of it, add --salvage: "
    "what was lost gives read errors"
)
_GRAIN_HINT: Final = "get the file again; nbd-vmdk check --data IMAGE lists all grains that are damaged"
_LENGTH: Final = struct.Struct("<I")
#: A table entry of salvaged tables: nobody knows what was there.
LOST_ENTRY: Final = 0xFFFFFFFF


class Tables(Protocol):
    """What maps grains to the sectors of their records: tables of the file, or salvaged ones."""

    def get(self, page: int) -> "array[int] | None":
        """The table ``page``, or None if all its grains are holes."""


class Inflater:
    """Reads guest bytes by inflating the grains that hold them; see extents.base.Source.

    Inflated grains go to the shared cache, but for those that a larger request takes whole: a disk that is
    read from one end to the other would push everything out and come back to nothing.  When nearly half of
    the cache has been filled so, of a grain whose bytes are only stored (see stored.py) nothing but the
    layout is kept.  Copying bytes out of the cache is faster than reading the file, but that is faster than
    inflating again.

    Every way in which a record can be wrong ends in an error that names it: a marker for another grain, a
    size that can't be, a broken stream, a grain that inflates short.
    """

    def __init__(
        self, storage: Storage, header: HostedHeader, tables: Tables, cache: Cache, size: int
    ) -> None:
        self.name = storage.name
        self._storage = storage
        self._header = header
        self._tables = tables
        self._grains = cache.part()
        self._size = size
        #: Guest byte of the disk at which the extent begins, for messages.
        self.origin = 0
        self._grain = header.grain
        self._grain_sectors = header.grain_sectors
        self._per_table = header.entries_per_table
        # What lies behind the capacity is no loss.
        self._needed = min(size, header.capacity)
        self._file_size = storage.size
        # Where a file is not one of this machine (it is inside gzip data), reading again may be dear.
        self._direct = local_file(storage) is not None
        #: Grains whose bytes are still to be kept, though they may be only stored.  A generation of the cache
        #: holds them all and many layouts: it would end all the time if they filled it.
        self._room = cache.budget // 16 * 7 // self._grain

    def read_into(self, buf: memoryview, at: int) -> None:
        """Fill ``buf`` with the extent's bytes from ``at`` on, all of which lie in packed grains."""
        grain = self._grain
        index = at // grain
        within = at - index * grain
        length = len(buf)
        if within + length <= grain:
            self._read_grain(buf, index, within, keep=True)
            return
        done = 0
        while done < length:
            count = min(grain - within, length - done)
            # Whoever asks for several grains at once reads on, and does not come back to those he got whole.
            self._read_grain(buf[done : done + count], index, within, keep=count < grain)
            done += count
            index += 1
            within = 0

    def reader(self, otherwise: Reader) -> Reader:
        """See Extent.reader: what lies in a grain whose bytes, or whose layout, were used lately."""
        grains, storage, grain, size = self._grains, self._storage, self._grain, self._size

        def read(buf: memoryview, offset: int) -> None:
            length = len(buf)
            index = offset // grain
            known = grains.young.get(index)
            if known is not None and offset + length <= size:
                within = offset - index * grain
                if within + length <= grain:
                    if isinstance(known, array):
                        read_stored(storage, known, buf, within)
                        return
                    piece = memoryview(known)[within : within + length]
                    if len(piece) == length:
                        buf[:] = piece
                        return
            otherwise(buf, offset)

        return read

    def _read_grain(self, buf: memoryview, index: int, within: int, *, keep: bool) -> None:
        known = self._grains.young.get(index) or self._grains.get(index)
        if isinstance(known, array):
            read_stored(self._storage, known, buf, within)
            return
        plain = known or self._learn(index, keep=keep)
        piece = memoryview(plain)[within : within + len(buf)]
        if len(piece) != len(buf):
            raise self._damaged(index, f"it inflates to {len(plain)} bytes only")
        buf[:] = piece

    def advise(self, at: int, length: int) -> None:
        """Bring the grains that hold these bytes into the cache."""
        for index in range(at // self._grain, -(-(at + length) // self._grain)):
            known = self._grains.get(index)
            if known is None:
                self._learn(index, keep=True)
            elif isinstance(known, array):
                self._storage.advise(known[0], span(known))

    def _learn(self, index: int, *, keep: bool) -> bytes | bytearray:
        """Inflate a grain; with ``keep`` remember its bytes, or where they are stored."""
        number, slot = divmod(index, self._per_table)
        table = self._tables.get(number)
        assert table is not None, "a packed grain has a table"
        sector = table[slot]
        # Writers put records one behind the other, so the next entry mostly tells where this one ends.
        following = table[slot + 1] if slot + 1 < len(table) else 0
        stream, place, plain = self._inflated(index, sector * SECTOR, (following - sector) * SECTOR)
        if keep:
            self._keep(index, plain, stream, place)
        return plain

    def _keep(self, index: int, plain: bytes | bytearray, stream: memoryview, place: int) -> None:
        if self._direct and self._room <= 0:
            layout = layout_of(stream, place, self._grain)
            if layout is not None:
                self._grains.put(index, layout)
                return
        self._room -= 1
        self._grains.put(index, plain)

    def _inflated(self, index: int, at: int, likely: int) -> tuple[memoryview, int, bytes | bytearray]:
        """The grain whose record starts at ``at`` and probably is ``likely`` bytes long.

        That is its stream, the byte of the file where that begins, and what it inflates to.
        """
        if not 0 < likely <= 2 * self._grain:
            likely = self._grain // 2 + SECTOR  # deflated grains are seldom larger
        if at + likely > self._file_size:
            self._file_size = self._storage.size  # it may have grown
        guess = min(self._file_size - at, likely)
        if guess < GRAIN_MARKER.size:
            need = at + SECTOR
            raise Truncated(
                self.name, what=f"grain {index}", need=need, have=self._file_size, hint=_SALVAGE_HINT
            )
        data = self._storage.read(at, guess)
        need = min(self._grain, self._needed - index * self._grain)
        problem = ""
        for begin, size in self._payloads(index, data, self._file_size - at):
            if begin + size > len(data):
                data += self._storage.read(at + len(data), begin + size - len(data))
            try:
                stream = memoryview(data)[begin : begin + size]
                plain = inflate(stream, self._grain)
            except CorruptGrain as error:
                problem = problem or str(error)
                continue
            if len(plain) >= need:
                return stream, at + begin, plain
            problem = problem or f"it inflates to {len(plain)} bytes only"
        raise self._damaged(index, problem)

    def _payloads(self, index: int, data: bytes, room: int) -> list[tuple[int, int]]:
        """Where the compressed bytes can begin in a record, and how many there are: the likeliest first.

        ``data`` is the record's beginning, ``room`` what the file has from there on.
        """
        sector, size = GRAIN_MARKER.unpack_from(data)
        if sector == index * self._grain_sectors and size:
            if size > 2 * self._grain:
                raise self._damaged(index, f"its compressed size {size} can't be")
            return [(GRAIN_MARKER.size, size)]
        if self._header.markers:
            raise self._damaged(index, f"its marker is for guest sector {sector}")
        # Compression without markers: the technical note's reader expects a length, QEMU bare deflate.
        (size,) = _LENGTH.unpack_from(data)
        bare = (0, min(2 * self._grain, room))
        return (
            [(_LENGTH.size, size), bare] if 0 < size <= min(2 * self._grain, room - _LENGTH.size) else [bare]
        )

    def _damaged(self, index: int, why: str) -> Unreadable:
        offset = index * self._grain
        return Unreadable(
            self.name,
            offset=self.origin + offset,
            length=min(self._grain, self._size - offset),
            why=f"compressed grain {index} is damaged, {why}",
            hint=_GRAIN_HINT,
        )


class StreamExtent(SparseExtent):
    """A streamOptimized extent read through its tables."""

    type_word = "SPARSE"

    def __init__(self, storage: Storage, header: HostedHeader, cache: Cache, *, size: int) -> None:
        refuse_huge_grains(storage, header)
        has_footer, header = with_directory(storage, header)
        try:
            places = HostedTables(storage, header, cache)
        except Truncated as error:
            error.hint = _SALVAGE_HINT
            raise
        self._setup(storage, header, places.tables, places.empty_from, size)
        self._check_first(places)
        if not has_footer:
            self._check_tail(places)

    def _setup(
        self,
        storage: Storage,
        header: HostedHeader,
        tables: Pages,
        empty_from: Callable[[int, int], int],
        size: int,
    ) -> None:
        self.header = header
        super().__init__(
            storage,
            size=size,
            grain=header.grain,
            tables=tables,
            empty_from=empty_from,
            lowest=LOST_ENTRY + 1,  # no entry is plain data
            step=0,
        )
        self._inflater = Inflater(storage, header, tables, tables.cache, size)

    def place(self, origin: int) -> None:
        """See Extent."""
        super().place(origin)
        self._inflater.origin = origin

    def reader(self, otherwise: Reader) -> Reader:
        """See Extent: what is remembered of grains."""
        return self._inflater.reader(otherwise)

    def map(self, offset: int, length: int) -> Mapping:
        """See Extent: packed grains that follow each other are one mapping."""
        kind, length, source, at = super().map(offset, length)
        if kind is Kind.PACKED:
            return kind, length, self._inflater, offset
        return kind, length, source, at

    def _decode(self, entry: int, index: int) -> tuple[Kind, int]:
        if entry > 1:
            return Kind.PACKED, 0
        # Value 1 can only be zeros here, declared or not: a record never lies in sector 1.
        return (Kind.ZERO if entry else Kind.HOLE), 0

    def _following(
        self, table: "array[int] | bytes | bytearray", slot: int, entry: int, kind: Kind, length: int
    ) -> int:
        first = slot + 1
        last = min(self._entries, first - (-length // self.grain))
        if table is self._tables.empty:
            return (last - first) * self.grain
        slot = first
        while slot < last and self._decode(table[slot], 0)[0] is kind:
            slot += 1
        return (slot - first) * self.grain

    def _check_first(self, places: HostedTables) -> None:
        """Refuse a directory that knows no grain at all of a file that begins with one.

        Its place, in header or footer, is then damaged and names some zeros of the file.  The directory of an
        empty disk is where the first grain will be: what lies there was written by who did not come to an
        end.  Raises BadField.
        """
        header = self.header
        at = header.overhead_sectors * SECTOR
        if at in (0, header.directory_at - SECTOR) or at > self.storage.size - SECTOR:
            return
        record = parse_record(self.storage.read(at, SECTOR), header)
        if not isinstance(record, GrainRecord):
            return
        tables = header.directory_entries
        number = record.sector // header.grain_sectors // header.entries_per_table
        if not places.empty_from(number, 1) or places.empty_from(0, tables) < tables:
            return
        raise BadField(
            self.storage.name,
            field="gdOffset",
            value=header.directory_sector,
            why="the directory there knows no grain, and the file has some",
            hint=_SALVAGE_HINT,
        )

    def _check_tail(self, places: HostedTables) -> None:
        """Refuse a file without footer whose last grain is cut off.

        Writers append grains in guest order, so the last table with any names the last record; records out
        of order that are cut off give a read error instead.  Raises Truncated.
        """
        tables = self.header.directory_entries
        for number in range(tables - 1, max(tables - 1 - _TAIL_TABLES, -1), -1):
            try:
                table = places.tables.get(number)
            except FormatError:
                continue  # damage of another sort, which whoever reads there is told
            at = max(table or (0,)) * SECTOR
            if at <= SECTOR:  # nothing but holes, and grains of zeros
                continue
            end = at + SECTOR
            if self.header.markers and at + GRAIN_MARKER.size <= self.storage.size:
                marker = self.storage.read(at, GRAIN_MARKER.size)
                end = at + GRAIN_MARKER.size + GRAIN_MARKER.unpack(marker)[1]
            if end > self.storage.size:
                raise Truncated(
                    self.storage.name,
                    what="its last grain",
                    need=end,
                    have=self.storage.size,
                    hint=_SALVAGE_HINT,
                )
            return


def refuse_huge_grains(storage: Storage, header: HostedHeader) -> None:
    """Raise Unsupported for grains that no writer makes and inflating which would take too much memory."""
    if header.grain > MAX_PACKED_GRAIN:
        raise Unsupported(
            storage.name,
            what=f"compressed grains of {header.grain} bytes; {MAX_PACKED_GRAIN} is the most",
            hint=NEWER,
        )


def has_footer(storage: Storage) -> bool:
    """Whether a file whose header tells nothing ends as a compressed extent does."""
    size = storage.size - storage.size % SECTOR
    search = min(size, _FOOTER_SEARCH)
    return footer_header_offset(storage.read(size - search, search)) is not None


def with_directory(storage: Storage, header: HostedHeader) -> tuple[bool, HostedHeader]:
    """The header that says where the directory is, and whether it came from a footer.

    A footer tells where the directory is, whatever the first header says; in all else they are equal.
    Raises Truncated if the directory's place was in a footer that is not there, BadField if the footer is
    not this header's.
    """
    size = storage.size - storage.size % SECTOR
    search = min(size, _FOOTER_SEARCH if header.directory_at_end else FOOTER_LENGTH)
    tail = storage.read(size - search, search)
    at = footer_header_offset(tail)
    if at is None:
        if header.directory_at_end:
            raise Truncated(
                storage.name,
                what="its footer, which holds the place of the grain directory",
                need=storage.size + FOOTER_LENGTH,
                have=storage.size,
                hint="the file was cut off: get it again; else " + _SALVAGE_HINT,
            )
        return False, header
    try:
        footer = parse_header(tail[at : at + SECTOR], storage.name)
    except (FormatError, Unsupported) as error:
        raise BadField(
            storage.name, field="footer", value="damaged", why=error.message, hint=_SALVAGE_HINT
        ) from None
    if footer.directory_at_end or _geometry(footer) != _geometry(header):
        raise BadField(
            storage.name,
            field="footer",
            value=f"gdOffset {footer.directory_sector:#x}, capacity {footer.capacity_sectors}, "
            f"grainSize {footer.grain_sectors}, numGTEsPerGT {footer.entries_per_table}",
            why="does not belong to this file's header",
            hint=_SALVAGE_HINT,
        )
    return True, replace(
        header, directory_sector=footer.directory_sector, redundant_sector=footer.redundant_sector
    )


def _geometry(header: HostedHeader) -> tuple[int, int, int]:
    return header.capacity_sectors, header.grain_sectors, header.entries_per_table
