"""
Builder of streamOptimized extents: deflated grains behind markers, in the layouts that are in circulation.

A      a true stream, as exports are: gdOffset all ones; each table behind its grains and a marker; directory,
       footer and end of stream last.
mixed  as A, but the first header too says where the directory is.
B      directory and tables first, without markers; grains; end of stream. No footer.
C      QEMU's: both copies of the tables first, as in a plain sparse extent; the last grain deflated
       short; no end of stream; the file is as long as if the last record filled a whole grain.
"""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Literal, NamedTuple

from tests.images.content import MIB, SECTOR, Content, Part
from tests.images.hosted import COMPRESSED, GD_AT_END, HAS_RGD, MARKERS, NEWLINES_VALID, Header
from tests.images.hosted import layout as table_layout

EOS, GT, GD, FOOTER, PROGRESS = range(5)

Shape = Literal["A", "B", "C", "mixed"]
Framing = Literal["marker", "length", "bare"]
Damage = Literal["lba", "bits", "adler", "header", "truncated", "huge", "short", "empty", "bomb"]
FooterState = Literal["good", "none", "zeroed", "lost"]


class Record(NamedTuple):
    """Where a grain's record lies: its first sector, the bytes deflated, and the sectors it takes."""

    sector: int
    size: int
    sectors: int


@dataclass
class StreamExtent:
    """What write_stream() wrote. `header` is the one at the start of the file; positions in sectors."""

    path: str
    content: Content
    header: Header
    gd_sector: int = 0
    gd: list[int] = field(default_factory=list)
    records: dict[int, Record] = field(default_factory=dict)  # by grain index, in the order of the file
    markers: list[tuple[int, int]] = field(default_factory=list)  # (sector, type) of all metadata markers
    footer_sector: int | None = None
    end: int = 0  # bytes, trailing zeros included

    def gde_at(self, table: int) -> int:
        """Byte offset of a directory's entry in the file."""
        return self.gd_sector * SECTOR + 4 * table

    def gte_at(self, grain: int) -> int:
        """Byte offset of a grain's entry in the file; its table must be there."""
        table, index = divmod(grain, self.header.gtes_per_gt)
        return self.gd[table] * SECTOR + 4 * index

    def grain_at(self, grain: int) -> int:
        """Byte offset of a grain's record, marker first."""
        return self.records[grain].sector * SECTOR


def marker(kind: int, val: int = 0) -> bytes:
    """The sector of a metadata marker; val counts the payload's sectors, and some writers leave it 0."""
    return struct.pack("<QII", val, 0, kind).ljust(SECTOR, b"\0")


def deflated(data: bytes, level: int = 6, *, raw: bool = False) -> bytes:
    """A zlib stream of the data, or a bare deflate stream."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -15 if raw else 15)
    return packer.compress(data) + packer.flush()


@dataclass(kw_only=True)
class StreamOptions:
    """How write_stream() writes; None stands for what the layout does."""

    layout: Shape = "A"
    grain_sectors: int = 128
    gtes: int = 512
    level: int = 6
    descriptor: bytes = b""
    descriptor_sectors: int = 20
    capacity_sectors: int | None = None
    overhead: int | None = None  # sector of the first grain
    order: int | None = None  # a seed: records lie shuffled; in A and mixed, within their table
    last_grain: Literal["full", "short"] | None = None
    zeros: Literal["omit", "write"] = "omit"  # whether a grain of zeros gets a record
    all_tables: bool | None = None  # whether tables without a grain exist
    progress_every: int = 0  # a marker of the undocumented type 4 behind each so many grains
    metadata_val: bool = True  # False: val is 0 in metadata markers
    eos: bool | None = None
    footer: FooterState = "good"
    trailing: int = 0  # zero bytes behind the end
    record: Framing = "marker"  # before the data: a marker, 4 bytes of length, nothing
    raw_deflate: bool = False
    broken: dict[int, Damage] = field(default_factory=dict)  # by grain index
    header: dict[str, Any] = field(default_factory=dict)  # overrides of the header's fields

    def __post_init__(self) -> None:
        if self.streaming and self.record != "marker":
            raise ValueError("a stream without markers needs its tables first")
        if len(self.descriptor) > self.descriptor_sectors * SECTOR:
            raise ValueError("the descriptor is larger than its area")
        if self.last_grain is None:
            self.last_grain = "short" if self.layout == "C" else "full"
        if self.all_tables is None:
            self.all_tables = not self.streaming
        if self.eos is None:
            self.eos = self.layout != "C"

    @property
    def streaming(self) -> bool:
        """Whether tables follow their grains."""
        return self.layout in {"A", "mixed"}


def write_stream(path: str, content: Content, **options: Any) -> StreamExtent:
    """
    Write an extent that shows `content`; options by the names of StreamOptions.

    footer: "none" and "zeroed" lose marker and footer (and keep the end of stream); "lost" writes a footer
    that doesn't know the directory either. record: "length" and "bare" clear flag bit 17, and need layout B
    or C.
    """
    return _Writer(path, content, StreamOptions(**options)).write()


class _Writer:
    """One image being written: the file, its position, and what was written where."""

    def __init__(self, path: str, content: Content, options: StreamOptions) -> None:
        self.options = options
        self.grain_bytes = options.grain_sectors * SECTOR
        content = content.settled(self.grain_bytes)
        if options.zeros == "omit":
            content = _without_zero_grains(content, self.grain_bytes)
        self.by_table: dict[int, list[int]] = {}
        for grain in content.touched(self.grain_bytes):
            self.by_table.setdefault(grain // options.gtes, []).append(grain)
        self.capacity = content.sectors if options.capacity_sectors is None else options.capacity_sectors
        count = -(-self.capacity // (options.gtes * options.grain_sectors))
        self.present = list(range(count)) if options.all_tables else sorted(self.by_table)
        self.places = table_layout(
            self.capacity,
            options.grain_sectors,
            options.gtes,
            1 + options.descriptor_sectors,
            rgd=options.layout == "C",
            present=len(self.present),
        )
        header = self._first_header()
        self.first_grain = header.overhead
        self.result = StreamExtent(path, content, replace(header, **options.header), gd=[0] * count)
        self.file: BinaryIO

    def _first_header(self) -> Header:
        options, places = self.options, self.places
        flags = NEWLINES_VALID | COMPRESSED | (MARKERS if options.record == "marker" else 0)
        match options.layout:
            case "C":
                flags, overhead = flags | HAS_RGD, places.overhead
            case "B":
                overhead = places.end
            case _:
                overhead = (
                    -(-(1 + options.descriptor_sectors) // options.grain_sectors) * options.grain_sectors
                )
        return Header(
            version=3,
            flags=flags,
            capacity=self.capacity,
            grain_size=options.grain_sectors,
            descriptor_offset=1 if options.descriptor_sectors else 0,
            descriptor_size=options.descriptor_sectors,
            gtes_per_gt=options.gtes,
            rgd_offset=places.rgd,
            gd_offset=GD_AT_END if options.streaming else places.gd,
            overhead=overhead if options.overhead is None else options.overhead,
            compress_algorithm=1,
        )

    def write(self) -> StreamExtent:
        """Write the whole file."""
        with open(self.result.path, "wb") as self.file:
            self.file.write(bytes(SECTOR) + self.options.descriptor)
            self._at(self.first_grain)
            if self.options.streaming:
                self._write_stream()
            else:
                self._write_tables_first()
            self.file.seek(0)
            self.file.write(self.result.header.pack())
            self.result.end += self.options.trailing
            self.file.truncate(self.result.end)
        return self.result

    def _write_stream(self) -> None:
        result = self.result
        for table in self.present:
            self._grains(self.by_table.get(table, []))
            result.gd[table] = self._metadata(GT, self._table(table))
        result.gd_sector = self._metadata(GD, _words(result.gd, self.places.directory_sectors))
        known = replace(result.header, gd_offset=result.gd_sector)
        if self.options.layout == "mixed":
            result.header = known
        match self.options.footer:
            case "good":
                result.footer_sector = self._metadata(FOOTER, known.pack())
            case "lost":
                result.footer_sector = self._metadata(FOOTER, replace(known, gd_offset=GD_AT_END).pack())
            case "zeroed":
                self.file.write(bytes(2 * SECTOR))
            case "none":
                pass
        self._end_of_stream()

    def _write_tables_first(self) -> None:
        result, places = self.result, self.places
        self._grains([grain for table in self.present for grain in self.by_table.get(table, [])])
        last = max((record.sector for record in result.records.values()), default=None)
        if self.options.eos:
            self._end_of_stream()
        result.end = self.file.tell()
        if self.options.layout == "C" and last is not None:
            result.end = max(result.end, (last + self.options.grain_sectors) * SECTOR)
        result.gd_sector = places.gd
        for base in (places.rgd, places.gd) if places.rgd else (places.gd,):
            for place, table in enumerate(self.present):
                result.gd[table] = base + places.directory_sectors + place * places.table_sectors
                if table in self.by_table:
                    self._at(result.gd[table])
                    self.file.write(self._table(table))
            self._at(base)
            self.file.write(_words(result.gd, places.directory_sectors))

    def _at(self, sector: int) -> None:
        self.file.seek(sector * SECTOR)

    def _sector(self) -> int:
        return self.file.tell() // SECTOR

    def _metadata(self, kind: int, payload: bytes) -> int:
        """Write a marker and its payload; return the payload's sector."""
        self.result.markers.append((self._sector(), kind))
        self.file.write(marker(kind, len(payload) // SECTOR if self.options.metadata_val else 0))
        sector = self._sector()
        self.file.write(payload)
        return sector

    def _end_of_stream(self) -> None:
        if self.options.eos:
            self._metadata(EOS, b"")
        self.result.end = self.file.tell()

    def _table(self, table: int) -> bytes:
        entries = [0] * self.options.gtes
        for grain in self.by_table.get(table, []):
            entries[grain % self.options.gtes] = self.result.records[grain].sector
        return _words(entries, self.places.table_sectors)

    def _grains(self, grains: list[int]) -> None:
        if self.options.order is not None:
            grains = random.Random(self.options.order).sample(grains, len(grains))
        for grain in grains:
            start = grain * self.grain_bytes
            data = self.result.content.read(start, min(self.grain_bytes, self.result.content.size - start))
            if self.options.last_grain == "full":
                data = data.ljust(self.grain_bytes, b"\0")
            lba, size, packed = self._damaged(grain, data)
            match self.options.record:
                case "marker":
                    whole = struct.pack("<QI", lba, size) + packed
                case "length":
                    whole = struct.pack("<I", size) + packed
                case "bare":
                    whole = packed
            sectors = -(-len(whole) // SECTOR)
            self.result.records[grain] = Record(self._sector(), len(packed), sectors)
            self.file.write(whole.ljust(sectors * SECTOR, b"\0"))
            if self.options.progress_every and len(self.result.records) % self.options.progress_every == 0:
                self.result.markers.append((self._sector(), PROGRESS))
                self.file.write(marker(PROGRESS, grain * self.options.grain_sectors))

    def _damaged(self, grain: int, data: bytes) -> tuple[int, int, bytes]:
        """LBA, size and deflated bytes of a record, after the damage that is wished for this grain."""
        lba = grain * self.options.grain_sectors
        how = self.options.broken.get(grain)
        match how:
            case "short":
                data = data[: len(data) // 2]
            case "empty":
                data = b""
            case "bomb":
                data += bytes(16 * MIB)
            case "lba":
                lba += self.options.grain_sectors
        packed = bytearray(deflated(data, self.options.level, raw=self.options.raw_deflate))
        size = len(packed)
        match how:
            case "bits":
                middle = slice(size // 2, size // 2 + 8)
                packed[middle] = bytes(byte ^ 0xA5 for byte in packed[middle])
            case "adler":
                packed[-1] ^= 1
            case "header":
                packed[:2] = b"\xff\xff"
            case "truncated":
                size //= 2
            case "huge":
                size = 0xFFFFFFFF
        return lba, size, bytes(packed)


def _words(entries: list[int], sectors: int) -> bytes:
    return struct.pack(f"<{len(entries)}I", *entries).ljust(sectors * SECTOR, b"\0")


def _without_zero_grains(content: Content, grain_bytes: int) -> Content:
    """The content with grains that hold nothing but zeros made holes, as all writers of streams do."""
    for index in list(content.touched(grain_bytes)):
        start = index * grain_bytes
        length = min(grain_bytes, content.size - start)
        if content.part(start, start + length) is Part.ZERO or not any(content.read(start, length)):
            content.punch(start, length)
    return content
