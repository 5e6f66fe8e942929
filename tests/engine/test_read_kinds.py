"""
Every kind and layout of extent, read whole and in pieces across its edges, against the builders' content.

The builders and the engine are two independent readings of the format; tests/unit/test_images.py holds the
builders to what QEMU reads. Here QEMU also writes images of its own for the engine.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import threading
import time
import tracemalloc
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import Disk, open_disk
from nbd_vmdk.errors import (
    BadDescriptor,
    BadField,
    FormatError,
    NotVmdk,
    OutOfRange,
    Truncated,
    Unreadable,
    Unsupported,
)
from nbd_vmdk.extents.base import Kind
from tests.engine import reads, refused, runs, same, shows, unreadable
from tests.images import cut, desc, pad, peek, poke, sesparse
from tests.images.content import GIB, KIB, MIB, SECTOR, TIB, Content
from tests.images.cowd import write_cowd
from tests.images.desc import Image, Row
from tests.images.hosted import HAS_RGD, NEWLINES_VALID, ZERO_GTE, write_hosted

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

ODD = Content.random(3 * MIB + 7 * SECTOR, seed=1)  # no multiple of a grain
WIDE = Content.random(40 * MIB, seed=2, grain=4 * KIB, touched=200)  # more than one grain table of any kind
PARENT = Content.random(3 * MIB, seed=3, density=1.0)  # smaller than its children
GRAIN = 64 * KIB


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


# Hosted sparse

HOSTED: list[dict[str, Any]] = [
    {},
    {"zero_gte": True},
    {"version": 2},
    {"version": 3},
    {"shuffle_grains": 3, "gap_sectors": 5, "misalign": 3, "beyond": 0xAA},
    {"grain_sectors": 1},
    {"grain_sectors": 1, "gtes": 1},
    {"grain_sectors": 8, "gtes": 128, "beyond": 0xAA},
    {"grain_sectors": 16, "gtes": 65536},
    {"grain_sectors": 2048, "gtes": 1},
    {"grain_sectors": 0x200000, "gtes": 2, "rgd": False},
    {"rgd": False},
    {"flags": NEWLINES_VALID, "header": {"rgd_offset": 0xFFFFFFFF}},
    {"flags": 0, "header": {"newlines": b"\r\n\n\n"}},
    {"flags": 0xFFF8 | NEWLINES_VALID | HAS_RGD},
    {"tables_last": True, "shuffle_grains": 1},
    {"tables_last": True, "preallocate_tables": False, "gtes": 16},
    {"preallocate_tables": False, "gtes": 16, "grain_sectors": 8},
    {"descriptor_sectors": 200},
    {"unclean": True},
    {"header": {"overhead": 0}},
]


@pytest.mark.parametrize("content", [ODD, WIDE], ids=["odd", "wide"])
@pytest.mark.parametrize("options", HOSTED, ids=str)
def test_hosted(tmp_path: Path, options: dict[str, Any], content: Content) -> None:
    warnings = shows(desc.monolithic_sparse(str(tmp_path), "disk", content, **options))
    expected = []
    if options.get("unclean"):
        expected.append("not closed cleanly")
    if options.get("gtes", 512) != 512:
        expected.append("unusual")
    assert len(warnings) == len(expected)
    assert all(part in warning for part, warning in zip(expected, warnings, strict=True))


@pytest.mark.parametrize("writable", [False, True])
def test_any_buffer_is_filled(tmp_path: Path, writable: bool) -> None:
    content = Content(WIDE.size).put(MIB - 100, b"data" * 50)
    image = desc.monolithic_sparse(str(tmp_path), "disk", content)
    packed = desc.stream_optimized(str(tmp_path), "packed", content)
    with open_disk(image.path, writable=writable) as disk, open_disk(packed.path) as inflated:
        for offset, length in ((0, 16), (MIB - 200, 400), (MIB - GRAIN, 2 * GRAIN), (MIB - 100, 64), (5, 0)):
            for buffer in (
                bytearray(b"x" * length),
                array("I", b"x" * length),
                memoryview(bytearray(length)),
            ):
                for source in (disk, inflated):
                    source.pread_into(buffer, offset)
                    same(bytes(buffer), content.read(offset, length))
        with pytest.raises(OutOfRange):
            disk.pread_into(bytearray(2), disk.size - 1)


@pytest.mark.parametrize("options", HOSTED, ids=str)
def test_hosted_over_a_parent(tmp_path: Path, options: dict[str, Any]) -> None:
    base = desc.monolithic_flat(str(tmp_path), "base", PARENT)
    shows(desc.monolithic_sparse(str(tmp_path), "disk", ODD, parent=base, **options))


def test_zeroed_grains_hide_the_parent_and_are_told_as_zeros(tmp_path: Path) -> None:
    content = Content(4 * MIB).zero(MIB, MIB).put(3 * MIB, b"x" * GRAIN)
    base = desc.monolithic_flat(str(tmp_path), "base", Content(4 * MIB).put(0, b"p" * (4 * MIB)))
    image = desc.monolithic_sparse(str(tmp_path), "disk", content, parent=base, zero_gte=True)
    with open_disk(image.path) as disk:
        found = runs(disk, image.visible)
    assert [(run.kind, run.depth) for run in found] == [
        (Kind.DATA, 1),
        (Kind.ZERO, 0),
        (Kind.DATA, 1),
        (Kind.DATA, 0),
        (Kind.DATA, 1),
    ]


def test_zeroed_grains_that_the_header_does_not_declare(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """QEMU reads sector 1 there, which is the descriptor."""
    image = desc.monolithic_sparse(
        str(tmp_path), "disk", ODD, zero_gte=True, version=1, flags=NEWLINES_VALID | HAS_RGD
    )
    shows(image)
    assert sum("zeroed grains" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("flags", [7, 5])
def test_declared_zeroed_grains_in_any_version(tmp_path: Path, flags: int) -> None:
    for version in (1, 2, 3):
        shows(desc.monolithic_sparse(str(tmp_path), "disk", ODD, zero_gte=True, version=version, flags=flags))


@pytest.mark.parametrize("behind", [0, 1, 127])
def test_the_descriptor_has_the_size_not_the_header(tmp_path: Path, behind: int) -> None:
    """VirtualBox rounds the capacity up; what lies behind the descriptor's size must not show."""
    capacity = -(-ODD.sectors // 128) * 128 + behind
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD, capacity_sectors=capacity, beyond=0xAA)
    shows(image)


def test_a_capacity_below_the_size(tmp_path: Path) -> None:
    """Less than a grain is rounding, the last grain being whole; more can't be mapped."""
    shows(desc.monolithic_sparse(str(tmp_path), "disk", ODD, capacity_sectors=ODD.sectors - 6))
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD.resized(2 * MIB))
    short = desc.descriptor("monolithicSparse", [("RW", 2 * MIB // SECTOR + 1, "SPARSE", "disk.vmdk")])
    poke(image.path, SECTOR, short.ljust(20 * SECTOR, b"\0"))
    assert "the descriptor says 4097 sectors" in str(refused(image.path, BadField))


def test_a_descriptor_far_from_its_usual_place(tmp_path: Path) -> None:
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD)
    end = os.path.getsize(image.path)
    poke(image.path, end, image.text)
    poke(image.path, SECTOR, b"\xaa" * len(image.text))
    poke(image.path, 28, struct.pack("<QQ", end // SECTOR, 3))  # the last sector is cut off
    shows(image)


def test_a_descriptor_area_of_nuls_is_no_descriptor(tmp_path: Path) -> None:
    """As in the extents of a split disk that QEMU made."""
    image = desc.split_sparse(str(tmp_path), "disk", ODD, 1000, descriptor=b"")
    assert peek(image.files[1], 28, 16) == struct.pack("<QQ", 1, 20)
    shows(image)


def test_surplus_entries_and_trailing_text_do_not_matter(tmp_path: Path) -> None:
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD)
    extent = image.hosted()
    poke(extent.path, extent.gte_at(49), words(*[0x7FFFFFFF] * (512 - 49)))
    poke(extent.path, extent.end, desc.descriptor("monolithicSparse", [("RW", 1, "ZERO")]))
    shows(image)


def damaged(tmp_path: Path, **options: Any) -> tuple[Image, Content]:
    """A disk of 64 MiB with a grain of data at the start of each of its two tables."""
    content = Content(64 * MIB).put(0, b"a" * GRAIN).put(GRAIN, b"b" * GRAIN).put(32 * MIB, b"c" * GRAIN)
    return desc.monolithic_sparse(str(tmp_path), "disk", content, **options), content


BAD_TABLES = {
    "in sector 1": lambda extent: 1,
    "in the descriptor": lambda extent: 5,
    "in the redundant directory": lambda extent: extent.rgd_sector,
    "in the directory": lambda extent: extent.gd_sector,
    "over the directory's start": lambda extent: extent.gd_sector - 1,
    "past the end": lambda extent: extent.end // SECTOR,
    "across the end": lambda extent: extent.end // SECTOR - 1,
    "far away": lambda extent: 0xFFFFFFFF,
}


@pytest.mark.parametrize("place", BAD_TABLES)
def test_a_bad_directory_entry_and_a_good_twin(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    image, _content = damaged(tmp_path)
    extent = image.hosted()
    poke(extent.path, extent.gde_at(1), words(BAD_TABLES[place](extent)))
    shows(image)
    assert any("redundant twin is used" in record.message for record in caplog.records)


@pytest.mark.parametrize("rgd", [True, False])
@pytest.mark.parametrize("place", BAD_TABLES)
def test_a_bad_directory_entry_alone(tmp_path: Path, place: str, rgd: bool) -> None:
    """What it maps can't be read, what others map can."""
    if place == "in the redundant directory" and not rgd:
        pytest.skip("there is none")
    image, content = damaged(tmp_path, rgd=rgd)
    extent = image.hosted()
    bad = words(BAD_TABLES[place](extent))
    poke(extent.path, extent.gde_at(1), bad)
    if rgd:
        poke(extent.path, extent.gde_at(1, redundant=True), bad)
    with open_disk(image.path) as disk:
        same(disk.pread(32 * MIB, 0), content.read(0, 32 * MIB))
        for offset in (32 * MIB, 48 * MIB, 64 * MIB - 1):
            assert "grain directory entry 1" in str(unreadable(disk, offset, 1))
        unreadable(disk, 32 * MIB - 1, 2)
        found = list(disk.runs())
    assert [(run.offset, run.length, run.kind) for run in found[-2:]] == [
        (2 * GRAIN, 32 * MIB - 2 * GRAIN, Kind.HOLE),
        (32 * MIB, 32 * MIB, Kind.LOST),
    ]


def test_a_bad_twin_does_not_matter(tmp_path: Path) -> None:
    image, _ = damaged(tmp_path)
    extent = image.hosted()
    poke(extent.path, extent.gde_at(0, redundant=True), words(0xFFFFFFFF, 2))
    shows(image)


def test_a_table_that_only_the_twin_has(tmp_path: Path) -> None:
    """A directory that lost an entry must not show zeros where the redundant one knows better."""
    image, _ = damaged(tmp_path)
    extent = image.hosted()
    poke(extent.path, extent.gde_at(1), words(0))
    shows(image)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("redundant", [False, True])
def test_a_change_mends_the_directory_that_lost_a_table(tmp_path: Path, redundant: bool, known: bool) -> None:
    """Readers that know only the other directory must see what we write."""
    image, content = damaged(tmp_path)
    extent = image.hosted()
    poke(extent.path, extent.gde_at(1, redundant=redundant), words(0))
    content.put(40 * MIB, b"new!" * 1000)
    with open_disk(image.path, writable=True) as disk:
        if known:
            disk.pread(SECTOR, 40 * MIB)
        disk.pwrite(b"new!" * 1000, 40 * MIB)
        reads(disk, content)
    entries = [peek(extent.path, extent.gde_at(1, redundant=copy), 4) for copy in (False, True)]
    tables = [peek(extent.path, int.from_bytes(entry, "little") * SECTOR, 2048) for entry in entries]
    assert entries[0] != entries[1]
    assert tables[0] == tables[1]
    assert any(tables[0])
    shows(image.path, content)
    poke(extent.path, extent.gde_at(1, redundant=not redundant), words(0))
    shows(image.path, content)


BAD_GRAINS = {
    "in sector 2": lambda extent: 2,
    "in the descriptor": lambda extent: 20,
    "in a table": lambda extent: extent.gd[0],
    "just below the first": lambda extent: extent.header.overhead - 1,
    "past the end": lambda extent: -(-extent.end // SECTOR),
    "across the end": lambda extent: extent.end // SECTOR - 127,
    "far away": lambda extent: 0xFFFFFFFF,
}


@pytest.mark.parametrize("place", BAD_GRAINS)
def test_a_bad_table_entry(tmp_path: Path, place: str) -> None:
    image, content = damaged(tmp_path)
    extent = image.hosted()
    poke(extent.path, extent.gte_at(1), words(BAD_GRAINS[place](extent)))
    with open_disk(image.path) as disk:
        same(disk.pread(GRAIN, 0), content.read(0, GRAIN))
        unreadable(disk, 2 * GRAIN - SECTOR, SECTOR)
        unreadable(disk, 0, MIB)
        unreadable(disk, GRAIN, 2 * GRAIN)
        assert not any(disk.pread(MIB, 2 * GRAIN))
        found = list(disk.runs())
    assert sum(run.length for run in found) == disk.size
    if "end" not in place and "far" not in place:
        assert [(run.offset, run.length, run.kind) for run in found[:3]] == [
            (0, GRAIN, Kind.DATA),
            (GRAIN, GRAIN, Kind.LOST),
            (2 * GRAIN, 32 * MIB - 2 * GRAIN, Kind.HOLE),
        ]


def test_a_last_grain_that_is_cut_off(tmp_path: Path) -> None:
    """What is there is read; QEMU gives zeros for the rest."""
    image = desc.monolithic_sparse(str(tmp_path), "disk", Content.of(b"0123456789abcdef" * 8192))
    cut(image.path, -3 * SECTOR)
    with open_disk(image.path) as disk:
        kept = disk.size - 3 * SECTOR
        same(disk.pread(kept, 0), image.content.read(0, kept))
        unreadable(disk, kept, 1)
        unreadable(disk, 0, disk.size)
    odd = desc.monolithic_sparse(str(tmp_path), "odd", Content.of(b"0123456789abcdef" * 160))
    cut(odd.path, odd.hosted().grain_at(0) + odd.size)  # nothing is lost of a grain that holds less
    shows(odd)


def test_a_file_that_ends_before_its_first_grain(tmp_path: Path) -> None:
    for content in (ODD, Content(MIB)):
        image = desc.monolithic_sparse(str(tmp_path), "disk", content)
        cut(image.path, image.hosted().header.overhead * SECTOR - 1)
        assert "its tables" in str(refused(image.path, Truncated))


@pytest.mark.parametrize(
    ("field", "value", "error", "part"),
    [
        ("version", 0, BadField, "version"),
        ("version", 4, BadField, "version"),
        ("flags", 0x40003, Unsupported, "incompatible"),
        ("flags", 0x80000003, Unsupported, "incompatible"),
        ("flags", 0x20003, BadField, "markers"),
        ("grain_size", 0, BadField, "grainSize"),
        ("grain_size", 3, BadField, "grainSize"),
        ("grain_size", 0x400000, BadField, "grainSize"),
        ("grain_size", 2**63, BadField, "grainSize"),
        ("gtes_per_gt", 0, BadField, "numGTEsPerGT"),
        ("gtes_per_gt", 3, BadField, "numGTEsPerGT"),
        ("gtes_per_gt", 0x20000, BadField, "numGTEsPerGT"),
        ("capacity", 2**64 - 1, BadField, "capacity"),
        ("capacity", 2**53, BadField, "capacity"),
        ("gd_offset", 0, BadField, "gdOffset"),
        ("gd_offset", 2**40, Truncated, "gdOffset"),
        ("gd_offset", 2**64 - 1, BadField, "gdOffset"),
        ("rgd_offset", 2**40, Truncated, "rgdOffset"),
        ("overhead", 2**40, Truncated, "tables"),
        ("overhead", 2**63, BadField, "overHead"),
        ("descriptor_offset", 2**63, BadField, "descriptorOffset"),
        ("descriptor_offset", 2**40, Truncated, "descriptor"),
        ("descriptor_size", 0, BadField, "descriptorSize"),
        ("newlines", b"\n \n\n", BadField, "text-mode"),
        ("newlines", b"\r\n \r", BadField, "text-mode"),
        ("compress_algorithm", 2, Unsupported, "method 2"),
        ("magic", b"kdmv", NotVmdk, "never finished"),
    ],
)
def test_headers_that_can_not_be(
    tmp_path: Path, field: str, value: Any, error: type[FormatError], part: str
) -> None:
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD, header={field: value})
    assert part in str(refused(image.path, error))


def test_a_huge_descriptor_area_costs_nothing(tmp_path: Path) -> None:
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD)
    poke(image.path, 36, struct.pack("<Q", 2**63))
    shows(image)


def test_an_embedded_descriptor_that_is_too_long(tmp_path: Path) -> None:
    """As much of it as is read names one extent of two: the disk would be shorter than it says."""
    (tmp_path / "flat").write_bytes(bytes(SECTOR))
    line = b'RW 1 FLAT "flat" 0\n'
    text = desc.descriptor("custom", [("RW", 1, "FLAT", "flat", 0)])
    text += b"#".ljust(MIB - len(text) - 1, b"x") + b"\n" + line
    path = str(tmp_path / "disk.vmdk")
    desc.wrapped_descriptor(path, text, sectors=3000)
    assert "more than" in str(refused(path, NotVmdk))
    cut(path, SECTOR + MIB)
    with open_disk(path) as disk:
        assert disk.size == SECTOR


# Split, flat, mixed


def test_split_sparse(tmp_path: Path) -> None:
    for sectors in (128, 1000, 2049):  # no multiple of a grain, too
        shows(desc.split_sparse(str(tmp_path), "disk", ODD, sectors))


def test_many_extents(tmp_path: Path) -> None:
    content = Content.random(520 * 16 * KIB, seed=4, grain=16 * KIB)
    image = desc.split_flat(str(tmp_path), "disk", content, 32)
    assert len(image.extents) == 520
    shows(image)
    with open_disk(image.path) as disk:
        same(disk.pread(content.size, 0), content.read())
    # 50 ms, and 0.1 ms for each extent file.
    assert min(opening(image.path) for _ in range(5)) < 0.05 + 520 * 0.0001


def test_flat_kinds(tmp_path: Path) -> None:
    for make in (desc.monolithic_flat, desc.vmfs):
        image = make(str(tmp_path), "disk", ODD)
        shows(image)
        pad(image.files[1], 4096)  # longer than the disk: VMware's own are, at times
        shows(image)
    shows(desc.split_flat(str(tmp_path), "disk", ODD, 1001))


def test_a_flat_file_that_is_too_short(tmp_path: Path) -> None:
    image = desc.monolithic_flat(str(tmp_path), "disk", ODD)
    cut(image.files[1], -1)
    error = refused(image.path, Truncated)
    assert "line 9 of disk.vmdk" in str(error)
    assert error.hint is not None
    assert "cut off" in error.hint


def test_a_flat_file_that_shrinks_under_us(tmp_path: Path) -> None:
    image = desc.monolithic_flat(str(tmp_path), "disk", ODD)
    with open_disk(image.path) as disk:
        cut(image.files[1], MIB)
        same(disk.pread(MIB, 0), ODD.read(0, MIB))
        unreadable(disk, MIB, SECTOR)
        assert sum(run.length for run in disk.runs()) == disk.size


EVERYTHING = [
    Row("RW", "FLAT", ODD, "part.vmdk", 9),
    Row("RW", "ZERO", Content(3 * SECTOR)),
    Row("RDONLY", "SPARSE", ODD.sliced(0, 100 * SECTOR)),
    Row("RW", "SPARSE", ODD.sliced(0, 129 * SECTOR), builder="cowd"),
    Row("RW", "SPARSE", ODD.sliced(0, 133 * SECTOR), builder="stream", options={"layout": "A"}),
    Row("RW", "VMFSSPARSE", ODD.sliced(MIB, 77 * SECTOR), options={"grain_sectors": 4}),
    Row("RW", "SESPARSE", ODD.sliced(MIB, 78 * SECTOR)),
    Row("RW", "VMFS", ODD.sliced(MIB, 79 * SECTOR), "vmfs.vmdk"),
    Row("NOACCESS", "ZERO", Content(5 * SECTOR)),
    Row("RW", "FLAT", ODD.sliced(0, SECTOR), "part.vmdk", 1),  # one file twice
    Row("RW", "SPARSE", ODD.sliced(0, 2 * SECTOR), options={"grain_sectors": 1, "gtes": 1}),
]


def test_a_disk_of_every_kind(tmp_path: Path) -> None:
    shows(desc.custom(str(tmp_path), "disk", EVERYTHING))
    base = desc.monolithic_flat(str(tmp_path), "base", PARENT)
    shows(desc.custom(str(tmp_path), "child", EVERYTHING, parent=base))


def test_a_type_word_may_be_wrong_but_the_magic_is_not(tmp_path: Path) -> None:
    rows = [
        Row("RW", "VMFSSPARSE", ODD, builder="SPARSE"),
        Row("RW", "SESPARSE", ODD, builder="cowd"),
        Row("RW", "SPARSE", ODD, builder="SESPARSE"),
    ]
    shows(desc.custom(str(tmp_path), "disk", rows, create_type="monolithicFlat"))
    raw = Row("RW", "SPARSE", ODD, "raw.vmdk", builder="FLAT")
    image = desc.custom(str(tmp_path), "raw", [raw])
    refused(image.path, FormatError)


def test_noaccess_can_not_be_read(tmp_path: Path) -> None:
    rows = [Row("RW", "FLAT", ODD), Row("NOACCESS", "FLAT", PARENT, "secret.vmdk"), Row("RW", "FLAT", ODD)]
    image = desc.custom(str(tmp_path), "disk", rows)
    os.remove(tmp_path / "secret.vmdk")  # nobody needs it
    with open_disk(image.path) as disk:
        same(disk.pread(ODD.size, 0), ODD.read())
        same(disk.pread(ODD.size, ODD.size + PARENT.size), ODD.read())
        for offset, length in ((ODD.size, 1), (ODD.size - 1, 2), (ODD.size + PARENT.size - 1, 2)):
            assert "no access" in str(unreadable(disk, offset, length))
        lost = [run for run in disk.runs() if run.kind is Kind.LOST]
    assert [(run.offset, run.length) for run in lost] == [(ODD.size, PARENT.size)] == image.unreadable


def test_errors_name_guest_bytes_of_the_disk(tmp_path: Path) -> None:
    """Also of what lies in an extent that is not the first one."""
    full = Content.random(MIB, seed=5, density=1.0).without_zeros()
    grain = max(full.touched(GRAIN))
    rows = [
        Row("RW", "FLAT", ODD),
        Row("NOACCESS", "FLAT", PARENT),
        Row("RW", "SPARSE", full, builder="stream", options={"broken": {grain: "adler"}}),
        Row("RW", "SPARSE", full, builder="stream"),
    ]
    image = desc.custom(str(tmp_path), "disk", rows)
    cut(image.files[-1], 200 * KIB)
    second, third = ODD.size, ODD.size + PARENT.size
    with open_disk(image.path, salvage=True) as disk:
        last = [run.offset for run in disk.runs() if run.kind is Kind.LOST][-1]
        assert last >= third + MIB
        for at in (second, second + 5, last, last + 5):
            assert unreadable(disk, at, 2).fields["offset"] == at
    rows[-1] = Row("RW", "FLAT", full)
    with open_disk(desc.custom(str(tmp_path), "disk", rows).path) as disk:
        at = third + grain * GRAIN
        assert unreadable(disk, at + 5, 2).fields["offset"] == at


def test_empty_extents_are_passed_over(tmp_path: Path) -> None:
    """VirtualBox writes one of them into the skeleton of a descriptor."""
    image = desc.custom(str(tmp_path), "disk", [Row("RW", "FLAT", ODD, "flat.vmdk", 0)])
    text = image.text.replace(b"RW 6151", b'NOACCESS 0 ZERO \nRW 0 SPARSE "gone.vmdk"\nRW 6151')
    assert text != image.text
    Path(image.path).write_bytes(text)
    shows(image)
    nothing = desc.descriptor("custom", [("RW", 0, "ZERO")])
    Path(image.path).write_bytes(nothing)
    assert "names no extents" in str(refused(image.path, BadDescriptor))


@pytest.mark.parametrize("words_", ["VMFSRDM", "VSANSPARSE"])
def test_what_is_not_in_a_file(tmp_path: Path, words_: str) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes(desc.descriptor("custom", [("RW", 8, words_, "disk-rdm.vmdk")]))
    refused(str(path), Unsupported)


def test_more_than_the_line_says_is_not_shown(tmp_path: Path) -> None:
    """Each extent ends where its line says, whatever its own header has."""
    row = Row("RW", "SPARSE", ODD, options={"capacity_sectors": ODD.sectors + 1000, "beyond": 0xAA})
    shows(desc.custom(str(tmp_path), "disk", [row, row._replace(name="two.vmdk")]))


# COWD and seSparse

COWD: list[dict[str, Any]] = [
    {},
    {"grain_sectors": 2048},
    {"grain_sectors": 8, "shuffle_grains": 1},
    {"preallocate_tables": True, "shuffle_grains": 1},
    {"free_sector": 5, "grow_to": 16 * MIB},
    {"unclean": True, "generation": 4, "saved_generation": 3},
    {"flags": 2, "parent_name": b"gone.vmdk", "version": 0},
]


@pytest.mark.parametrize("options", COWD, ids=str)
def test_cowd(tmp_path: Path, options: dict[str, Any]) -> None:
    warnings = shows(desc.vmfs_sparse(str(tmp_path), "alone", WIDE, **options))
    assert len(warnings) == ("unclean" in options)
    base = desc.vmfs(str(tmp_path), "base", PARENT)
    shows(desc.vmfs_sparse(str(tmp_path), "disk", ODD, parent=base, **options))


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (4, 2, BadField),  # version
        (16, 0, BadField),  # grainSize
        (16, 3, BadField),
        (16, 4096, BadField),
        (20, 3, BadField),  # gdOffset, over the header
        (20, 0x7FFFFFFF, Truncated),
        (24, 0, BadField),  # numGDEntries
        (12, 5000, BadField),  # numSectors, less than the line says
        (12, 0xFFFFFFFF, BadField),
    ],
)
def test_cowd_headers_that_can_not_be(tmp_path: Path, at: int, value: int, error: type[FormatError]) -> None:
    image = desc.vmfs_sparse(str(tmp_path), "disk", ODD)
    poke(image.files[1], at, words(value))
    refused(image.path, error)


def test_cowd_that_is_cut_off(tmp_path: Path) -> None:
    image = desc.vmfs_sparse(str(tmp_path), "disk", ODD)
    cut(image.files[1], 2000)
    refused(image.path, Truncated)


@pytest.mark.parametrize("value", [1, 4, 0x7FFFFFFF, 0xFFFFFFFF])
def test_cowd_entries_that_can_not_be(tmp_path: Path, value: int) -> None:
    content = Content.of(b"x" * 4 * MIB)
    image = desc.vmfs_sparse(str(tmp_path), "disk", content)
    extent = image.cowd()
    poke(extent.path, extent.gte_at(1), words(value))
    poke(extent.path, extent.gde_at(1), words(value))
    with open_disk(image.path) as disk:
        same(disk.pread(SECTOR, 0), content.read(0, SECTOR))
        same(disk.pread(MIB, MIB), content.read(MIB, MIB))
        unreadable(disk, SECTOR, 1)
        unreadable(disk, 0, 2 * SECTOR)
        for offset in (2 * MIB, 4 * MIB - 1):
            unreadable(disk, offset, 1)
        kinds = [(run.kind, run.offset, run.length) for run in disk.runs()]
    assert kinds[-1] == (Kind.LOST, 2 * MIB, 2 * MIB)


SESPARSE: list[dict[str, Any]] = [
    {},
    {"zero_style": "unmapped"},
    {"zero_style": "mixed", "first_index": 4096 * 3 - 5, "capacity_sectors": 200 * MIB // SECTOR},
    {"zero_style": "remembered", "shuffle_grains": 1, "shuffle_tables": 2},
    {"first_index": 4090, "capacity_sectors": 100 * MIB // SECTOR},
]


@pytest.mark.parametrize("options", SESPARSE, ids=str)
def test_sesparse(tmp_path: Path, options: dict[str, Any]) -> None:
    solid = Content(40 * MIB).put(MIB, b"solid" * (MIB // 5)).pasted(0, WIDE.segments())
    for name, content in (("odd", ODD), ("wide", solid)):
        shows(desc.se_sparse(str(tmp_path), name, content, **options))
    base = desc.vmfs(str(tmp_path), "base", PARENT)
    shows(desc.se_sparse(str(tmp_path), "disk", ODD, parent=base, **options))


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"replay_journal": 1}, Unsupported, "journal"),
        ({"version": 0x300000001}, Unsupported, "version"),
        ({"flags": 1}, Unsupported, "flags"),
        ({"grain_size": 16}, BadField, "grainSize"),
        ({"table_size": 32}, BadField, "grainTableSize"),
        ({"volatile_magic": 0xCAFEBABE}, BadField, "volatile"),
        ({"capacity_sectors": 0}, BadField, "capacity"),
        ({"capacity_sectors": ODD.sectors - 100}, BadField, "capacity"),
    ],
)
def test_sesparse_headers_that_can_not_be(
    tmp_path: Path, options: dict[str, Any], error: type[FormatError], part: str
) -> None:
    image = desc.se_sparse(str(tmp_path), "disk", ODD, **options)
    assert part in str(refused(image.path, error))


@pytest.mark.parametrize("field", [16, 80, 128, 136, 144, 152, 192, 200])
def test_sesparse_areas_that_can_not_be(tmp_path: Path, field: int) -> None:
    """Capacity, places and sizes: refused at once, or when what they spoil is read."""
    image = desc.se_sparse(str(tmp_path), "disk", ODD)
    poke(image.files[1], field, struct.pack("<Q", 2**63))
    refused(image.path, FormatError)
    poke(image.files[1], field, struct.pack("<Q", 2**40))
    if field == 200:  # what is last may be as large as it likes
        shows(image)
        return
    try:
        disk = open_disk(image.path)
    except FormatError:
        return
    with disk:
        unreadable(disk, 0, disk.size)


@pytest.mark.parametrize(
    ("field", "sector", "name"),
    [
        (80, 0x1000, "grainDirectory"),  # volatile header
        (104, 0xFFF, "grainDirectory"),
        (112, 0x1001, "journal"),
        (128, 2, "grainDirectory"),  # zeros of the journal there would be holes
        (128, 0x2800, "backMap"),
        (136, 0x801, "grainTables"),
        (144, 0x1001, "grainTables"),
        (144, 1, "grainTables"),
        (160, 1, "freeBitmap"),
        (160, 0x3000, "grain"),
        (192, 0x2000, "grain"),
        (192, 0x2FFF, "grain"),
    ],
)
def test_sesparse_areas_that_overlap(tmp_path: Path, field: int, sector: int, name: str) -> None:
    """A directory that is read from where another area is would say that nothing is there."""
    image = desc.se_sparse(str(tmp_path), "disk", ODD)
    poke(image.files[1], field, struct.pack("<Q", sector))
    assert name in str(refused(image.path, BadField))


@pytest.mark.parametrize(("field", "sectors"), [(96, 3), (104, 0xFFE), (168, 0), (184, 0), (176, 0x2000)])
def test_sesparse_areas_that_nobody_reads(tmp_path: Path, field: int, sectors: int) -> None:
    """Journal, bitmap and back map may be empty, or lie over each other."""
    image = desc.se_sparse(str(tmp_path), "disk", ODD)
    poke(image.files[1], field, struct.pack("<Q", sectors))
    shows(image)


def test_sesparse_that_is_cut_off(tmp_path: Path) -> None:
    image = desc.se_sparse(str(tmp_path), "disk", ODD)
    for size in (2 * MIB, 512, 100):
        cut(image.files[1], size)
        refused(image.path, Truncated)


@pytest.mark.parametrize(
    "value",
    [1, 1 << 59, 4 << 60, 0xF << 60, sesparse.encode(1 << 59), sesparse.encode(2**32), sesparse.encode(256)],
)
def test_sesparse_entries_that_can_not_be(tmp_path: Path, value: int) -> None:
    content = Content.of(b"x" * MIB)  # 256 grains, and as much room
    image = desc.se_sparse(str(tmp_path), "disk", content, gtes={7: value})
    with open_disk(image.path) as disk:
        same(disk.pread(28 * KIB, 0), content.read(0, 28 * KIB))
        same(disk.pread(MIB - 32 * KIB, 32 * KIB), content.read(32 * KIB))
        unreadable(disk, 28 * KIB, 1)
        unreadable(disk, 0, MIB)
        assert [(run.offset, run.length) for run in disk.runs() if run.kind is Kind.LOST] == [
            (28 * KIB, 4 * KIB)
        ]


@pytest.mark.parametrize("value", [1, 1 << 60 | 1 << 32, 2 << 60, 1 << 60 | 64, 0xFFFFFFFFFFFFFFFF])
def test_sesparse_directory_entries_that_can_not_be(tmp_path: Path, value: int) -> None:
    image = desc.se_sparse(str(tmp_path), "disk", WIDE, gdes={1: value})
    with open_disk(image.path) as disk:
        same(disk.pread(16 * MIB, 0), WIDE.read(0, 16 * MIB))
        unreadable(disk, 16 * MIB, 1)
        unreadable(disk, 32 * MIB - 1, 1)
        same(disk.pread(8 * MIB, 32 * MIB), WIDE.read(32 * MIB))
        assert (16 * MIB, 16 * MIB) in [
            (run.offset, run.length) for run in disk.runs() if run.kind is Kind.LOST
        ]


def test_sesparse_grains_do_not_run_on_into_another_state(tmp_path: Path) -> None:
    """Grain 4095 of the file is followed by 4096, whose entry is not the next number."""
    content = Content.of(bytes(range(1, 251)) * 1049).resized(64 * 4 * KIB)
    image = desc.se_sparse(
        str(tmp_path), "disk", content, first_index=4090, capacity_sectors=100 * MIB // SECTOR
    )
    shows(image)
    extent = image.sesparse()
    assert extent.grains[5] == 4095
    poke(extent.path, extent.gte_at(6), struct.pack("<Q", sesparse.encode(4095) + (1 << 48)))
    with open_disk(image.path) as disk:
        unreadable(disk, 24 * KIB, 1)
        unreadable(disk, 0, 64 * KIB)


def test_grains_do_not_run_on_past_their_area(tmp_path: Path) -> None:
    content = Content.of(b"x" * MIB)
    image = desc.se_sparse(str(tmp_path), "disk", content, first_index=100, gtes={0: sesparse.encode(255)})
    extent = image.sesparse()
    poke(extent.path, extent.gte_at(1), struct.pack("<Q", sesparse.encode(256)))
    with open_disk(image.path) as disk:
        assert disk.pread(4 * KIB, 0)
        unreadable(disk, 4 * KIB, 1)
        unreadable(disk, 0, 8 * KIB)


# Large


def test_a_file_beyond_two_gib(tmp_path: Path) -> None:
    """Grains and flat data behind byte 2**32 of their file."""
    content = Content(5 * GIB + 3 * SECTOR)
    for at in (0, 2 * GIB - SECTOR, 4 * GIB - 2 * SECTOR, 5 * GIB):
        content.put(at, at.to_bytes(8, "big") * (3 * SECTOR // 8))
    shows(desc.monolithic_flat(str(tmp_path), "flat", content))
    shows(desc.vmfs(str(tmp_path), "vmfs", content))
    shows(desc.split_flat(str(tmp_path), "split", content))
    shows(desc.split_sparse(str(tmp_path), "sparse", content, 8323072))  # newer Workstations' split size
    shows(desc.monolithic_sparse(str(tmp_path), "far", content, misalign=0xF0000000))
    cowd = Content.random(4 * MIB, seed=3)
    image = desc.vmfs_sparse(str(tmp_path), "cowd", cowd)
    extent = image.cowd()
    last = max(extent.grains)
    far = 0xFFFFFFF0
    poke(extent.path, far * SECTOR, peek(extent.path, extent.grain_at(last), SECTOR))
    poke(extent.path, extent.gte_at(last), words(far))
    shows(image)


def test_one_grain_of_a_gib(tmp_path: Path) -> None:
    content = Content(2 * GIB + SECTOR).put(100, b"near").put(GIB - 3, b"middle").put(2 * GIB, b"far")
    image = desc.monolithic_sparse(str(tmp_path), "disk", content, grain_sectors=0x200000, rgd=False)
    with open_disk(image.path) as disk:
        for at, text in ((100, b"near"), (GIB - 3, b"middle"), (2 * GIB, b"far")):
            assert disk.pread(len(text), at) == text
        same(disk.pread(MIB, GIB - MIB // 2), content.read(GIB - MIB // 2, MIB))
        assert disk.preferred_block == MIB


def huge_sesparse(folder: str) -> Image:
    return desc.se_sparse(folder, "huge", Content.random(64 * TIB, seed=6, grain=4 * KIB, touched=40))


def huge_hosted(folder: str) -> Image:
    content = Content.random(2000 * GIB, seed=7, touched=10)
    return desc.monolithic_sparse(folder, "huge", content, preallocate_tables=False)


def huge_cowd(folder: str) -> Image:
    return desc.vmfs_sparse(folder, "huge", Content.random(2 * TIB - MIB, seed=8, grain=SECTOR, touched=40))


HUGE: dict[str, Callable[[str], Image]] = {
    "sesparse": huge_sesparse,
    "hosted": huge_hosted,
    "cowd": huge_cowd,
}


def opening(path: str) -> float:
    """Seconds that opening takes."""
    start = time.perf_counter()
    disk = open_disk(path)
    took = time.perf_counter() - start
    disk.close()
    return took


@pytest.mark.parametrize("kind", HUGE)
def test_huge_disks_cost_nothing(tmp_path: Path, kind: str) -> None:
    image = HUGE[kind](str(tmp_path))
    took = min(opening(image.path) for _ in range(5))
    tracemalloc.start()
    try:
        disk = open_disk(image.path)
        opened = tracemalloc.get_traced_memory()[1]
        with disk:
            reads(disk, image.visible)
            read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert took < 0.05, f"opening took {took * 1000:.0f} ms"
    assert opened < MIB
    assert read < 16 * MIB


def test_mapping_a_huge_disk_is_bounded(tmp_path: Path) -> None:
    """Every entry of the directory is looked at: 1,000,000 times less than there are grains."""
    image = huge_sesparse(str(tmp_path))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with open_disk(image.path, cache_size=MIB) as disk:
        runs(disk, image.visible)
    took = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * KIB
    assert took < 20, f"{took:.1f} s"
    assert grown < 32 * MIB


def test_tables_do_not_outgrow_the_cache(tmp_path: Path) -> None:
    """All tables of this disk are 16 MiB; a cache of 1 MiB must do."""
    content = Content.random(2 * GIB, seed=9, grain=SECTOR, touched=3000)
    image = desc.vmfs_sparse(str(tmp_path), "disk", content)
    tracemalloc.start()
    try:
        with open_disk(image.path, cache_size=MIB) as disk:
            before = tracemalloc.get_traced_memory()[0]
            for grain in content.touched(SECTOR):
                assert disk.pread(SECTOR, grain * SECTOR) == content.read(grain * SECTOR, SECTOR)
            grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 2 * MIB


@pytest.mark.parametrize("size", [0, 1, 1 << 40])
def test_any_cache_size(tmp_path: Path, size: int) -> None:
    base = desc.stream_optimized(str(tmp_path), "base", PARENT)
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD, parent=base, gtes=16)
    shows(image, cache_size=size)


def test_many_readers(tmp_path: Path) -> None:
    """Threads share a disk, and tables come and go under them."""
    base = desc.stream_optimized(str(tmp_path), "base", WIDE)
    image = desc.se_sparse(str(tmp_path), "disk", ODD.resized(WIDE.size), parent=base)
    failed: list[BaseException] = []

    def work(disk: Disk, seed: int) -> None:
        try:
            for _ in range(3):
                reads(disk, image.visible, seed)
        except BaseException as error:  # noqa: BLE001  a thread's failure is the test's
            failed.append(error)

    with open_disk(image.path, cache_size=256 * KIB) as disk:
        threads = [threading.Thread(target=work, args=(disk, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed, failed


def test_requests_outside_the_disk(tmp_path: Path) -> None:
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD)
    with open_disk(image.path) as disk:
        for offset, length in ((-1, 1), (0, ODD.size + 1), (ODD.size, 1), (2**63, 1), (0, -1)):
            with pytest.raises(Exception, match="outside the disk") as caught:
                disk.pread(length, offset)
            assert caught.value.errno == 22
        assert disk.pread(0, ODD.size) == b""


# What QEMU makes


def qemu(*words_: str) -> bytes:
    done = subprocess.run(words_, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def qemu_makes(folder: Path, name: str, subformat: str, content: Content, *more: str) -> str:
    raw, path = str(folder / "raw"), str(folder / f"{name}.vmdk")
    Path(raw).unlink(missing_ok=True)
    desc.write_flat(raw, content)
    options = ",".join((f"subformat={subformat}", *more))
    qemu("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", options, raw, path)
    return path


@needs_qemu
@pytest.mark.parametrize(
    "subformat",
    [
        "monolithicSparse",
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
        "streamOptimized",
    ],
)
@pytest.mark.parametrize("sectors", [1, 129, 6151])
def test_what_qemu_makes(tmp_path: Path, subformat: str, sectors: int) -> None:
    content = ODD.resized(sectors * SECTOR).put(0, b"first")
    path = qemu_makes(tmp_path, "disk", subformat, content)
    shows(path, content)


@needs_qemu
def test_qemus_extents_beyond_two_gib(tmp_path: Path) -> None:
    content = Content.random(4 * GIB + 9 * SECTOR, seed=3, touched=5)
    for subformat in ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicSparse"):
        path = qemu_makes(tmp_path, subformat, subformat, content)
        shows(path, content)


@needs_qemu
def test_qemus_zeroed_grains_over_a_parent(tmp_path: Path) -> None:
    base = qemu_makes(tmp_path, "base", "monolithicSparse", PARENT)
    child = str(tmp_path / "child.vmdk")
    options = "subformat=monolithicSparse,zeroed_grain=on"
    qemu("qemu-img", "create", "-f", "vmdk", "-o", options, "-b", base, "-F", "vmdk", child)
    writes = ["-c", "write -z 0 1M", "-c", "write -P 7 1049088 1000", "-c", "write -z 2M 64k"]
    qemu("qemu-io", "-f", "vmdk", *writes, child)
    content = Content(PARENT.size).pasted(0, PARENT.segments())
    content.zero(0, MIB).put(1049088, b"\7" * 1000).zero(2 * MIB, GRAIN)
    shows(child, content)
    wanted = str(tmp_path / "wanted")
    qemu("qemu-img", "convert", "-O", "raw", child, wanted)
    same(Path(wanted).read_bytes(), content.read())


@needs_qemu
def test_qemu_and_we_map_alike(tmp_path: Path) -> None:
    """Where an image has data, and in which link, read by both."""
    base = desc.monolithic_sparse(str(tmp_path), "base", PARENT)
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD, parent=base, zero_gte=True)
    rows = json.loads(qemu("qemu-img", "map", "--output=json", image.path))
    with open_disk(image.path) as disk:
        found = runs(disk, image.visible)
    ours = [(run.offset, run.length, run.kind is Kind.DATA, run.at) for run in found]
    theirs = [(row["start"], row["length"], row["data"], row.get("offset")) for row in rows]
    data = [row for row in ours if row[2]]
    assert data == [row for row in theirs if row[2]]


def test_extents_that_nothing_names(tmp_path: Path) -> None:
    """Hosted and COWD files without a descriptor show what they hold."""
    hosted = write_hosted(str(tmp_path / "bare.vmdk"), ODD)
    warnings = shows(hosted.path, ODD)
    assert "without its descriptor" in warnings[0]
    old = write_cowd(str(tmp_path / "old.vmdk"), Content.of(b"x" * 100 * SECTOR))
    shows(old.path, old.content)


def test_zero_entries_in_a_disk_without_flags(tmp_path: Path) -> None:
    """Bit 2 without a redundant directory, and the other way round."""
    for flags in (ZERO_GTE, ZERO_GTE | HAS_RGD):
        shows(desc.monolithic_sparse(str(tmp_path), "disk", ODD, zero_gte=True, flags=flags))


def test_unreadable_is_one_error_class(tmp_path: Path) -> None:
    rows = [Row("NOACCESS", "FLAT", ODD)]
    with open_disk(desc.custom(str(tmp_path), "disk", rows).path) as disk:
        assert isinstance(unreadable(disk, 5, 7), Unreadable)
