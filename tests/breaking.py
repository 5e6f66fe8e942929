"""
The corrupting tool: each invariant of the format broken in turn, on each kind of image.

A Break builds a sound image, damages it at one place that the builders know, and says what a check must call
it and whether a repair mends it: by itself ("yes"), when asked ("asks"), or not at all ("no").
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from tests.images import cowd, cut, desc, pad, peek, poke
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image
from tests.images.hosted import GD_AT_END, Header

#: Three tables of any kind but seSparse's, and no whole number of grains.
CONTENT = Content.random(5 * MIB + 3 * SECTOR, seed=7, grain=4 * KIB, touched=160)
#: The same for grains of 64 KiB.
COARSE = Content.random(5 * MIB + 3 * SECTOR, seed=8)
GRAIN = 8  # sectors
PAST_END = 0x00FFFFFF

Mends = Literal["yes", "asks", "no"]


@dataclass(frozen=True)
class Break:
    """One way to damage one kind of image.

    data says that only a check of all grains finds it; lossy that what is mended when asked is not what the
    guest had; qemu that QEMU reads the mended image; also are other findings that the damage makes.
    """

    name: str
    build: Callable[[str], Image]
    damage: Callable[[Image], None]
    finds: str
    mends: Mends = "no"
    severity: str = "error"
    data: bool = False
    lossy: bool = False
    qemu: bool = False
    also: tuple[str, ...] = ()


# Builders


def sparse(folder: str, **options: Any) -> Image:
    return desc.monolithic_sparse(folder, "disk", CONTENT, **({"grain_sectors": GRAIN} | options))


def built(**options: Any) -> Callable[[str], Image]:
    return lambda folder: sparse(folder, **options)


def streamed(**options: Any) -> Callable[[str], Image]:
    return lambda folder: desc.stream_optimized(folder, "disk", COARSE, **({"gtes": 32} | options))


def child_of_sparse(folder: str) -> Image:
    base = desc.monolithic_sparse(folder, "base", CONTENT, grain_sectors=GRAIN)
    top = Content.random(CONTENT.size, seed=9, grain=4 * KIB, touched=50)
    return desc.monolithic_sparse(folder, "disk", top, grain_sectors=GRAIN, parent=base)


def split(folder: str) -> Image:
    return desc.split_sparse(folder, "disk", CONTENT, extent_sectors=4096, grain_sectors=GRAIN)


def flat(folder: str) -> Image:
    return desc.monolithic_flat(folder, "disk", CONTENT)


def delta(**options: Any) -> Callable[[str], Image]:
    return lambda folder: desc.vmfs_sparse(folder, "disk", CONTENT, **options)


def newer_delta(**options: Any) -> Callable[[str], Image]:
    wide = Content.random(40 * MIB, seed=5, grain=4 * KIB, touched=60)
    return lambda folder: desc.se_sparse(folder, "disk", wide, **options)


# Places


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def grain_of(image: Image, number: int = 5) -> int:
    """A grain that has data; not the last one."""
    return sorted(image.hosted().grains)[number]


def set_header(image: Image, **fields: Any) -> None:
    """Change fields of a hosted header."""
    path = image.path
    poke(path, 0, replace(Header.unpack(peek(path, 0, SECTOR)), **fields).pack())


def header(**fields: Any) -> Callable[[Image], None]:
    return lambda image: set_header(image, **fields)


def set_gte(image: Image, grain: int, value: int, *copies: str) -> None:
    extent = image.hosted()
    for copy in copies or ("gt", "rgt"):
        poke(extent.path, extent.gte_at(grain, redundant=copy == "rgt"), u32(value))


def gte(value: int, *copies: str) -> Callable[[Image], None]:
    return lambda image: set_gte(image, grain_of(image), value, *copies)


def gde(value: int, *copies: str, table: int = 1) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        extent = image.hosted()
        for copy in copies or ("gd",):
            poke(extent.path, extent.gde_at(table, redundant=copy == "rgd"), u32(value))

    return damage


def text(old: str, new: str) -> Callable[[Image], None]:
    """Replace a part of a descriptor by one of the same length, or in a file of its own by any."""

    def damage(image: Image) -> None:
        with open(image.path, "rb") as file:
            data = file.read()
        assert data.count(old.encode()) == 1, old
        if data.startswith(b"KDMV"):
            assert len(old) == len(new)
        with open(image.path, "wb") as file:
            file.write(data.replace(old.encode(), new.encode()))

    return damage


def _both(*damages: Callable[[Image], None]) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        for each in damages:
            each(image)

    return damage


# Damage of several places, or of places that must be searched


def _zero_directory(image: Image) -> None:
    extent = image.hosted()
    poke(extent.path, extent.gd_sector * SECTOR, bytes(4 * len(extent.gd)))


def _garbage_table(image: Image) -> None:
    extent = image.hosted()
    poke(extent.path, extent.gd[1] * SECTOR, b"\xa5" * 2048)


def _garbage_redundant(image: Image) -> None:
    extent = image.hosted()
    poke(extent.path, extent.rgd[1] * SECTOR, b"\xa5" * 2048)


def _same_table_twice(image: Image) -> None:
    gde(image.hosted().gd[1], "rgd")(image)


def _table_of_another(image: Image) -> None:
    gde(image.hosted().gd[0], "gd")(image)


def _table_over_another(image: Image) -> None:
    gde(image.hosted().gd[0] + 2, "gd")(image)


def _share_grain(image: Image) -> None:
    extent = image.hosted()
    one, other = grain_of(image, 3), grain_of(image, 9)
    set_gte(image, other, extent.grains[one])


def _share_half_a_grain(image: Image) -> None:
    extent = image.hosted()
    one, other = grain_of(image, 3), grain_of(image, 9)
    set_gte(image, other, extent.grains[one] + GRAIN // 2)


def _into_tables(image: Image) -> None:
    extent = image.hosted()
    set_gte(image, grain_of(image), extent.gd[1])


def _beyond_capacity(image: Image) -> None:
    extent = image.hosted()
    last = -(-CONTENT.sectors // GRAIN)
    sector = extent.grains[grain_of(image)]
    for redundant in (False, True):
        poke(extent.path, extent.gte_at(last, redundant=redundant), u32(sector))


def _cut_last_grain(image: Image) -> None:
    """The grain that is last in the file loses bytes that the guest sees."""
    cut(image.path, -3 * SECTOR)


def _cut_hidden(image: Image) -> None:
    """The last grain of the disk, last in the file, loses bytes behind the end of the disk."""
    cut(image.path, -SECTOR)


def _zero_grain(image: Image) -> None:
    """A hole is declared to be zeros, which the header does not allow for."""
    hole = next(index for index in range(100) if index not in image.hosted().grains)
    set_gte(image, hole, 1)


def _text_lost(image: Image) -> None:
    poke(image.path, SECTOR, bytes(20 * SECTOR))


def _text_garbled(image: Image) -> None:
    data = bytearray(image.text)
    data[data.index(b"# Extent description") + 3] = 0
    poke(image.path, SECTOR, bytes(data).replace(b"# Disk Des", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8\xf7\xf6"))


def _rename_extent(image: Image) -> None:
    path = image.files[2]
    os.rename(path, path.replace("disk-s002", "renamed-s002"))


def _other_extent(image: Image) -> None:
    with open(image.files[2], "wb") as file:
        file.write(b"not an extent".ljust(SECTOR, b"."))


def _remove(index: int) -> Callable[[Image], None]:
    return lambda image: os.remove(image.files[index])


def _short_flat(image: Image) -> None:
    cut(image.files[1], -10 * SECTOR)


def _new_parent_cid(image: Image) -> None:
    assert image.parent is not None
    text(f"CID={image.parent.cid}\n", "CID=0badcafe\n")(image.parent)


def _rename_parent(image: Image) -> None:
    assert image.parent is not None
    os.rename(image.parent.path, os.path.join(os.path.dirname(image.path), "elsewhere.vmdk"))


def _remove_parent(image: Image) -> None:
    assert image.parent is not None
    os.remove(image.parent.path)


def _loop(image: Image) -> None:
    """The child's descriptor, with its own name as its parent's."""
    data = peek(image.path, SECTOR, 20 * SECTOR).rstrip(b"\0")
    data = data.replace(b'parentFileNameHint="base.vmdk"', b'parentFileNameHint="disk.vmdk"')
    assert image.parent is not None
    data = data.replace(f"parentCID={image.parent.cid}".encode(), f"parentCID={image.cid}".encode())
    poke(image.path, SECTOR, data)


# Streams


def _zero_footer(image: Image) -> None:
    footer = image.stream().footer_sector
    assert footer is not None
    poke(image.path, (footer - 1) * SECTOR, bytes(2 * SECTOR))


def _cut_footer(image: Image) -> None:
    cut(image.path, -3 * SECTOR)


def _cut_in_footer(image: Image) -> None:
    cut(image.path, -SECTOR - 100)


def _cut_in_grains(image: Image) -> None:
    cut(image.path, image.stream().grain_at(sorted(image.stream().records)[-3]) + 700)


def _footer_field(at: int, data: bytes) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        footer = image.stream().footer_sector
        assert footer is not None
        poke(image.path, footer * SECTOR + at, data)

    return damage


def _stream_gte(value: int) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        extent = image.stream()
        poke(image.path, extent.gte_at(sorted(extent.records)[4]), u32(value))

    return damage


def _stream_swapped(image: Image) -> None:
    extent = image.stream()
    one, other = sorted(extent.records)[4:6]
    poke(image.path, extent.gte_at(one), u32(extent.records[other].sector))


def _stream_gde(value: int) -> Callable[[Image], None]:
    return lambda image: poke(image.path, image.stream().gde_at(1), u32(value))


def _stream_zero_table(image: Image) -> None:
    extent = image.stream()
    poke(image.path, extent.gd[1] * SECTOR, bytes(4 * extent.header.gtes_per_gt))


def _stream_garbage_directory(image: Image) -> None:
    extent = image.stream()
    poke(image.path, extent.gd_sector * SECTOR, b"\xa5" * (4 * len(extent.gd)))


def _stream_no_marker(image: Image) -> None:
    """Directory and its marker gone, and the footer as well: tables must come from the grains."""
    extent = image.stream()
    _zero_footer(image)
    poke(image.path, (extent.gd_sector - 1) * SECTOR, b"\xa5" * SECTOR)


def _damage_record(at: int) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        extent = image.stream()
        place = extent.grain_at(sorted(extent.records)[4]) + at
        poke(image.path, place, bytes(byte ^ 0xA5 for byte in peek(image.path, place, 4)))

    return damage


# COWD and seSparse


def _cowd_moved(image: Image) -> None:
    """The directory is where the header says, only not where others put it."""
    path = image.cowd().path
    directory = peek(path, 4 * SECTOR, SECTOR)
    poke(path, 4 * SECTOR, bytes(SECTOR) + directory)
    poke(path, 20, u32(5))


def _cowd_header(at: int, value: int) -> Callable[[Image], None]:
    return lambda image: poke(image.cowd().path, at, u32(value))


def _cowd_gte(value: int) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        extent = image.cowd()
        poke(extent.path, extent.gte_at(sorted(extent.grains)[5]), u32(value))

    return damage


def _cowd_shared(image: Image) -> None:
    extent = image.cowd()
    one, other = (sorted(extent.grains)[place] for place in (3, 9))
    poke(extent.path, extent.gte_at(other), u32(extent.grains[one]))


def _cowd_into_table(image: Image) -> None:
    extent = image.cowd()
    _cowd_gte(next(entry for entry in extent.gd if entry) + 3)(image)


def _cowd_gde(value: int) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        extent = image.cowd()
        poke(extent.path, extent.gde_at(next(i for i, entry in enumerate(extent.gd) if entry)), u32(value))

    return damage


def _cowd_beyond(image: Image) -> None:
    extent = image.cowd()
    last = -(-CONTENT.sectors // extent.grain_sectors)
    poke(extent.path, extent.gte_at(last), u32(next(iter(extent.grains.values()))))


def _cowd_cut(image: Image) -> None:
    cut(image.cowd().path, -SECTOR)


def _se_header(at: int, value: int) -> Callable[[Image], None]:
    return lambda image: poke(image.sesparse().path, at, u64(value))


def _se_volatile(at: int, value: int) -> Callable[[Image], None]:
    return lambda image: poke(
        image.sesparse().path, image.sesparse().areas["volatile"][0] * SECTOR + at, u64(value)
    )


def _se_gde(value: int) -> Callable[[Image], None]:
    return lambda image: poke(image.sesparse().path, image.sesparse().gde_at(0), u64(value))


def _se_gde_twice(image: Image) -> None:
    extent = image.sesparse()
    poke(extent.path, extent.gde_at(1), peek(extent.path, extent.gde_at(0), 8))


def _se_gte(value: int) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        extent = image.sesparse()
        poke(extent.path, extent.gte_at(sorted(extent.grains)[3]), u64(value))

    return damage


def _se_shared(image: Image) -> None:
    extent = image.sesparse()
    one, other = (sorted(extent.grains)[place] for place in (3, 5))
    poke(extent.path, extent.gte_at(other), peek(extent.path, extent.gte_at(one), 8))


def _se_cut(image: Image) -> None:
    cut(image.sesparse().path, -2 * SECTOR)


BREAKS = [
    # the header
    Break("version", sparse, header(version=9), "bad-header"),
    Break("grain-size", sparse, header(grain_size=24), "bad-header"),
    Break("table-size", sparse, header(gtes_per_gt=500), "bad-header"),
    Break("incompatible", sparse, header(flags=3 | 1 << 20), "bad-header"),
    Break("text-mode", sparse, header(newlines=b"\n \n\n"), "text-mode", "yes"),
    Break("overhead", sparse, header(overhead=1 << 40), "bad-header", "yes", qemu=True),
    Break("unclean", sparse, header(unclean=1), "unclean", "yes", "warning", qemu=True),
    Break("odd-size", sparse, lambda image: pad(image.path, 100), "odd-size", "yes", "warning", qemu=True),
    # the descriptor inside
    Break("text-lost", sparse, _text_lost, "descriptor-lost", "asks", qemu=True),
    Break("text-garbled", sparse, _text_garbled, "descriptor-lost", "yes", qemu=True),
    Break("text-lost-child", child_of_sparse, _text_garbled, "descriptor-lost", "yes", qemu=True),
    Break("text-area", sparse, header(descriptor_size=1 << 20), "descriptor-area", "yes", qemu=True),
    Break("text-place", sparse, header(descriptor_offset=1 << 40), "descriptor-area", "yes", qemu=True),
    Break("text-among-grains", sparse, header(descriptor_offset=500), "descriptor-area", "yes", qemu=True),
    Break("overhead-last", built(tables_last=True), header(overhead=1 << 30), "bad-header", "yes", qemu=True),
    # the directories
    Break("gde-past-end", sparse, gde(PAST_END), "directory-entry", "yes", qemu=True),
    Break("gde-in-header", sparse, gde(1), "directory-entry", "yes", qemu=True),
    Break("gde-zero", sparse, gde(0), "directory-entry", "yes", qemu=True),
    Break("gd-zero", sparse, _zero_directory, "directory-entry", "yes", qemu=True),
    Break("gde-doubled", sparse, _table_of_another, "directory-entry", "yes", qemu=True),
    Break("gde-overlaps", sparse, _table_over_another, "directory-entry", "yes", qemu=True),
    Break("gde-moved", built(tables_last=True), gde(PAST_END), "directory-entry", "yes", qemu=True),
    Break("gde-both", sparse, gde(PAST_END, "gd", "rgd"), "directory-entry"),
    Break("gde-alone", built(rgd=False), gde(PAST_END), "directory-entry"),
    Break("rgde-past-end", sparse, gde(PAST_END, "rgd"), "redundant-directory", "yes", "warning", qemu=True),
    Break("rgde-zero", sparse, gde(0, "rgd"), "redundant-directory", "yes", "warning", qemu=True),
    Break("rgde-same", sparse, _same_table_twice, "redundant-directory", "yes", "warning", qemu=True),
    Break("gd-offset", sparse, header(gd_offset=1 << 30), "directory-outside", "yes", qemu=True),
    Break("rgd-offset", sparse, header(rgd_offset=1 << 30), "directory-outside", "yes", qemu=True),
    Break(
        "gd-offset-irregular",
        built(preallocate_tables=False),
        header(gd_offset=1 << 30),
        "directory-outside",
        "yes",
        qemu=True,
    ),
    Break("gd-offset-alone", built(rgd=False), header(gd_offset=1 << 30), "directory-outside"),
    Break("gd-at-end", sparse, header(gd_offset=GD_AT_END), "bad-header"),
    # the tables
    Break("gt-garbage", sparse, _garbage_table, "grain-past-end", "yes", qemu=True),
    Break("rgt-garbage", sparse, _garbage_redundant, "redundant-entry", "yes", "warning", qemu=True),
    Break("gte-past-end", sparse, gte(PAST_END, "gt"), "grain-past-end", "yes", qemu=True),
    Break("gte-low", sparse, gte(5, "gt"), "grain-entry", "yes", qemu=True),
    Break("gte-zero", sparse, gte(0, "gt"), "tables-differ", "yes", "warning", qemu=True),
    Break("rgte-zero", sparse, gte(0, "rgt"), "tables-differ", "yes", "warning", qemu=True),
    Break("rgte-past-end", sparse, gte(PAST_END, "rgt"), "redundant-entry", "yes", "warning", qemu=True),
    Break("gte-past-end-both", sparse, gte(PAST_END), "grain-past-end", "asks", lossy=True, qemu=True),
    Break("gte-low-both", sparse, gte(5), "grain-entry", "asks", lossy=True, qemu=True),
    Break("gte-past-end-child", child_of_sparse, gte(PAST_END, "gt"), "grain-past-end", "yes", qemu=True),
    Break("shared", sparse, _share_grain, "grains-overlap", "asks", lossy=True, qemu=True),
    Break(
        "shared-partly",
        sparse,
        _share_half_a_grain,
        "grains-overlap",
        "asks",
        lossy=True,
        qemu=True,
        also=("grain-misaligned",),
    ),
    Break(
        "over-tables",
        built(tables_last=True),
        _into_tables,
        "grain-over-tables",
        "asks",
        lossy=True,
        qemu=True,
    ),
    Break("beyond", sparse, _beyond_capacity, "entry-beyond-capacity", "yes", "warning", qemu=True),
    Break(
        "cut-visible",
        built(shuffle_grains=3),
        _cut_last_grain,
        "grain-cut-off",
        "asks",
        lossy=True,
        qemu=True,
    ),
    Break("cut-hidden", sparse, _cut_hidden, "grain-cut-off", "yes", "warning", qemu=True),
    Break("zeros", sparse, _zero_grain, "undeclared-zeros", "yes", "warning", qemu=True),
    Break("misaligned", built(misalign=3), lambda image: None, "grain-misaligned", "no", "warning"),
    Break("unused", built(gap_sectors=GRAIN), lambda image: None, "unused-space", "no", "warning"),
    Break(
        "tables-cut-off",
        lambda folder: desc.monolithic_sparse(folder, "disk", Content(5 * MIB)),
        lambda image: cut(image.path, -SECTOR),
        "tables-cut-off",
        "yes",
        qemu=True,
    ),
    # sizes and files
    Break(
        "size-larger",
        sparse,
        header(capacity=CONTENT.sectors - 1000),
        "size-differs",
        "asks",
        lossy=True,
        also=("entry-beyond-capacity",),
    ),
    Break(
        "size-smaller",
        sparse,
        text(f"RW {CONTENT.sectors} ", f"RW {CONTENT.sectors - 800:5} "),
        "size-differs",
        "no",
        "warning",
    ),
    Break("renamed", split, _rename_extent, "extent-missing", "asks", qemu=True),
    Break("missing", split, _remove(2), "extent-missing"),
    Break("other", split, _other_extent, "extent-kind"),
    Break(
        "called-flat",
        split,
        text('SPARSE "disk-s002.vmdk"', 'SESPARSE "disk-s002.vmdk"'),
        "extent-kind",
        "no",
        "warning",
    ),
    Break("named-twice", split, text("disk-s002.vmdk", "disk-s001.vmdk"), "extents-overlap"),
    Break("flat-short", flat, _short_flat, "file-short", "asks", lossy=True, qemu=True),
    Break("flat-odd", flat, lambda image: pad(image.files[1], 7), "odd-size", "yes", "warning", qemu=True),
    Break("flat-missing", flat, _remove(1), "extent-missing"),
    # the descriptor
    Break("line", flat, text("# Extent description", "Extent description"), "bad-descriptor"),
    Break("no-extents", flat, text("RW ", "#W "), "bad-descriptor"),
    Break("cid-none", flat, text("\nCID=", "\nDIC="), "bad-cid", "no", "warning"),
    Break(
        "cid-invalid",
        lambda folder: desc.monolithic_flat(folder, "disk", CONTENT, cid="ffffffff"),
        lambda image: None,
        "bad-cid",
        "yes",
        "warning",
        qemu=True,
        also=("long-content-id",),
    ),
    Break(
        "long-cid",
        flat,
        text(
            'longContentID = "0123456789abcdef01234567',
            'longContentID = "0123456789abcdef0123456700000000"\n#',
        ),
        "long-content-id",
        "yes",
        "warning",
        qemu=True,
    ),
    Break(
        "tracking",
        lambda folder: desc.monolithic_flat(
            folder, "disk", CONTENT, text={"version": 3, "extra": ['changeTrackPath="disk-ctk.vmdk"']}
        ),
        lambda image: None,
        "tracking-file",
        "yes",
        "warning",
        qemu=True,
    ),
    # the chain
    Break(
        "parent-changed",
        child_of_sparse,
        _new_parent_cid,
        "cid-mismatch",
        "asks",
        qemu=True,
        also=("long-content-id",),
    ),
    Break("parent-renamed", child_of_sparse, _rename_parent, "parent-not-found", "asks", qemu=True),
    Break("parent-gone", child_of_sparse, _remove_parent, "parent-not-found"),
    Break("parent-loop", child_of_sparse, _loop, "chain-too-deep"),
    Break(
        "parent-denied",
        child_of_sparse,
        lambda image: text(f"parentCID={image.parent and image.parent.cid}", "parentCID=ffffffff")(image),
        "parent-contradicted",
    ),
    Break(
        "parent-smaller",
        lambda folder: desc.monolithic_sparse(
            folder, "disk", CONTENT, parent=desc.monolithic_sparse(folder, "base", Content(MIB).put(0, b"x"))
        ),
        lambda image: None,
        "chain-size",
        "no",
        "warning",
    ),
    # streams
    Break("stream-magic", streamed(), header(magic=b"XXXX"), "bad-header", "yes", qemu=True),
    Break("stream-header", streamed(), header(grain_size=77), "bad-header", "yes", qemu=True),
    Break("footer-zeroed", streamed(), _zero_footer, "footer-lost", "yes", qemu=True),
    Break("footer-cut", streamed(), _cut_footer, "footer-lost", "yes", qemu=True),
    Break("footer-half", streamed(), _cut_in_footer, "footer-lost", "yes", qemu=True),
    Break("footer-place", streamed(), _footer_field(56, u64(1 << 40)), "footer-damaged", "yes", qemu=True),
    Break("footer-in-zeros", streamed(), _footer_field(56, u64(15)), "footer-damaged", "yes", qemu=True),
    Break("stream-in-zeros", streamed(layout="B"), header(gd_offset=15), "directory-entry"),
    Break("stream-grain", streamed(layout="B"), header(grain_size=64), "bad-header"),
    Break("stream-tables", streamed(layout="C"), header(gtes_per_gt=16), "bad-header"),
    Break("footer-capacity", streamed(), _footer_field(12, u64(77)), "footer-damaged", "yes", qemu=True),
    Break("footer-or-tables", streamed(), header(gtes_per_gt=64), "footer-damaged", "yes", qemu=True),
    Break("footer-or-grain", streamed(), header(grain_size=64), "footer-damaged", "yes", qemu=True),
    Break("footer-or-size", streamed(), header(capacity=COARSE.sectors + 1), "footer-damaged"),
    Break("footer-version", streamed(), _footer_field(4, u32(7)), "footer-damaged", "yes", qemu=True),
    Break("footer-and-gd", streamed(), _stream_no_marker, "footer-lost"),
    Break("stream-cut", streamed(), _cut_in_grains, "footer-lost", also=("odd-size",)),
    Break("stream-gte-past-end", streamed(), _stream_gte(PAST_END), "grain-past-end", "yes", qemu=True),
    Break("stream-gte-zero", streamed(), _stream_gte(0), "grain-unlisted", "yes", data=True, qemu=True),
    Break(
        "stream-gte-other",
        streamed(),
        _stream_swapped,
        "grain-unlisted",
        "yes",
        qemu=True,
    ),
    Break("stream-gt-zero", streamed(), _stream_zero_table, "grain-unlisted", "yes", data=True, qemu=True),
    Break("stream-gde", streamed(), _stream_gde(PAST_END), "directory-entry", "yes", qemu=True),
    Break("stream-gde-zero", streamed(), _stream_gde(0), "grain-unlisted", "yes", data=True, qemu=True),
    Break("stream-gd", streamed(), _stream_garbage_directory, "directory-entry", "yes", qemu=True),
    Break("stream-gde-c", streamed(layout="C"), _stream_gde(PAST_END), "directory-entry", "yes", qemu=True),
    Break("stream-gte-b", streamed(layout="B"), _stream_gte(PAST_END), "grain-past-end", "yes", qemu=True),
    Break("stream-gte-c", streamed(layout="C"), _stream_gte(0), "tables-differ", "yes", "warning", qemu=True),
    Break("stream-gde-b", streamed(layout="B"), _stream_gde(PAST_END), "directory-entry"),
    Break(
        "stream-text-mode",
        streamed(),
        _both(header(newlines=b"\n \n\n"), _footer_field(73, b"\n \r\n")),
        "text-mode",
        "yes",
        data=True,
        qemu=True,
    ),
    Break(
        "stream-eos",
        streamed(layout="B", eos=False),
        lambda image: None,
        "no-end-of-stream",
        "yes",
        "warning",
        qemu=True,
    ),
    Break(
        "stream-eos-a",
        streamed(),
        lambda image: cut(image.path, -SECTOR),
        "no-end-of-stream",
        "yes",
        "warning",
        qemu=True,
    ),
    Break("record-bits", streamed(), _damage_record(30), "grain-data", data=True),
    Break("record-marker", streamed(), _damage_record(0), "grain-data", data=True),
    Break("record-size", streamed(), _damage_record(8), "grain-data", data=True),
    Break("record-bits-c", streamed(layout="C"), _damage_record(30), "grain-data", data=True),
    # COWD
    Break("cowd-version", delta(), _cowd_header(4, 3), "bad-header"),
    Break(
        "cowd-free-low",
        delta(),
        _cowd_header(cowd.FREE_SECTOR_AT, 50),
        "free-sector",
        "yes",
        "warning",
        qemu=True,
    ),
    Break(
        "cowd-free-high",
        delta(),
        _cowd_header(cowd.FREE_SECTOR_AT, 1 << 30),
        "free-sector",
        "yes",
        "warning",
        qemu=True,
    ),
    Break("cowd-entries", delta(), _cowd_header(24, 50), "cowd-geometry", "yes", "warning", qemu=True),
    Break(
        "cowd-directory",
        delta(first_sector=6),
        _cowd_moved,
        "cowd-geometry",
        severity="warning",
        also=("unused-space",),
    ),
    Break("cowd-inconsistent", delta(), _cowd_header(8, 7), "inconsistent", "yes", "warning", qemu=True),
    Break("cowd-unclean", delta(unclean=True), lambda image: None, "unclean", "yes", "warning", qemu=True),
    Break(
        "cowd-generation",
        delta(generation=5, saved_generation=4),
        lambda image: None,
        "generation",
        "yes",
        "warning",
        qemu=True,
    ),
    Break("cowd-gde", delta(), _cowd_gde(PAST_END), "directory-entry", also=("free-sector",)),
    Break("cowd-gde-low", delta(), _cowd_gde(1), "directory-entry"),
    Break(
        "cowd-gte-past-end",
        delta(),
        _cowd_gte(PAST_END),
        "grain-past-end",
        "asks",
        lossy=True,
        qemu=True,
        also=("free-sector",),
    ),
    Break("cowd-gte-low", delta(), _cowd_gte(3), "grain-entry", "asks", lossy=True, qemu=True),
    Break("cowd-over-table", delta(), _cowd_into_table, "grain-over-tables", "asks", lossy=True, qemu=True),
    Break("cowd-shared", delta(), _cowd_shared, "grains-overlap", "asks", lossy=True, qemu=True),
    Break(
        "cowd-beyond",
        delta(),
        _cowd_beyond,
        "entry-beyond-capacity",
        "yes",
        "warning",
        qemu=True,
        also=("grains-overlap",),
    ),
    Break(
        "cowd-cut",
        delta(grain_sectors=GRAIN, shuffle_grains=3),
        _cowd_cut,
        "grain-cut-off",
        "asks",
        lossy=True,
        qemu=True,
    ),
    Break(
        "cowd-odd", delta(), lambda image: pad(image.cowd().path, 9), "odd-size", "yes", "warning", qemu=True
    ),
    # seSparse
    Break("se-version", newer_delta(), _se_header(8, 7), "bad-header"),
    Break("se-areas", newer_delta(), _se_header(144, 4097), "bad-header"),
    Break("se-outside", newer_delta(), _se_header(160, 1 << 40), "bad-header"),
    Break("se-volatile", newer_delta(), _se_volatile(0, 1), "bad-header"),
    Break("se-journal", newer_delta(), _se_volatile(24, 1), "journal"),
    Break("se-gde", newer_delta(), _se_gde(0x2 << 60), "directory-entry"),
    Break("se-gde-index", newer_delta(), _se_gde(0x1 << 60 | 0xFFFF), "directory-entry"),
    Break("se-gde-twice", newer_delta(), _se_gde_twice, "directory-entry", also=("grains-overlap",)),
    Break("se-state", newer_delta(), _se_gte(0x7 << 60), "grain-entry"),
    Break("se-state-hole", newer_delta(), _se_gte(5), "grain-entry"),
    Break("se-index", newer_delta(), _se_gte(0x3 << 60 | 0xFFFFFF), "grain-entry"),
    Break("se-shared", newer_delta(), _se_shared, "grains-overlap"),
    Break("se-cut", newer_delta(), _se_cut, "grain-cut-off"),
]
