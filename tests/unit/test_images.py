"""
The builders of test images against QEMU's reader, and where it has none, against the format's own places.

What these tests prove is that the builders write what they say; the engine's tests rest on that.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import tarfile
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.images import cut, desc, hosted, ova, peek, poke, sesparse, stream
from tests.images.content import GIB, KIB, MIB, SECTOR, TIB, Content, Part, Segment
from tests.images.desc import Image, Row

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

ODD = Content.random(3 * MIB + 7 * SECTOR, seed=1)  # no multiple of a grain
WIDE = Content.random(40 * MIB, seed=2, grain=4 * KIB, touched=200)  # more than one grain table of any kind
PARENT = Content.random(3 * MIB, seed=3, density=1.0)  # smaller than its children


class QemuError(Exception):
    """qemu-img said no."""


def qemu(image: Image | str, offset: int = 0, length: int | None = None) -> bytes:
    """What QEMU reads, whole or a piece in whole sectors."""
    path = image if isinstance(image, str) else image.path
    source: dict[str, Any] = {"driver": "vmdk", "file": {"driver": "file", "filename": path}}
    if length is not None:
        source = {"driver": "raw", "offset": offset, "size": length, "file": source}
    return qemu_source(source, path + ".raw")


def qemu_source(source: dict[str, Any], target: str) -> bytes:
    """What QEMU reads from a tree of its block drivers."""
    command = ["qemu-img", "convert", "-O", "raw", "json:" + json.dumps(source), target]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise QemuError(done.stderr)
    data = Path(target).read_bytes()
    os.remove(target)
    return data


def same(found: bytes, wanted: bytes) -> None:
    """Compare without printing megabytes: name the first sector that differs."""
    assert len(found) == len(wanted)
    if found != wanted:
        sectors = range(0, len(wanted), SECTOR)
        bad = [at // SECTOR for at in sectors if found[at : at + SECTOR] != wanted[at : at + SECTOR]]
        pytest.fail(f"{len(bad)} sectors differ, the first is {bad[0]}")


def u32(path: str, offset: int) -> int:
    return int.from_bytes(peek(path, offset, 4), "little")


def u64(path: str, offset: int) -> int:
    return int.from_bytes(peek(path, offset, 8), "little")


# The model


def test_content_agrees_with_plain_bytes() -> None:
    rng = random.Random(4)
    size = 5000
    content = Content(size)
    parts = bytearray(size)
    data = bytearray(size)
    for _ in range(400):
        start = rng.randrange(size)
        length = rng.randrange(min(700, size - start) + 1)
        part = rng.choice(list(Part))
        new = rng.randbytes(length) if part is Part.DATA else bytes(length)
        if part is Part.DATA:
            content.put(start, new)
        elif part is Part.ZERO:
            content.zero(start, length)
        else:
            content.punch(start, length)
        parts[start : start + length] = bytes([part]) * length
        data[start : start + length] = new
        assert content.read() == data
    row = list(content.segments())
    assert [segment.start for segment in row[1:]] == [segment.end for segment in row[:-1]]
    assert b"".join(bytes([segment.part]) * (segment.end - segment.start) for segment in row) == parts
    assert content.sha256() == hashlib.sha256(data).hexdigest()
    assert list(content.touched(64)) == [i for i in range(79) if any(parts[i * 64 : i * 64 + 64])]

    piece = content.sliced(100, 900)
    assert piece.read() == data[100:1000]
    assert [s.part for s in piece.segments()] == [s.part for s in content.segments(100, 1000)]
    joined = Content.joined([content.sliced(0, 1234), content.sliced(1234, size - 1234)])
    assert joined.read() == data
    assert content.resized(6000).read() == data + bytes(1000)

    settled = content.settled(64)
    assert settled.read() == data
    for index in range(-(-size // 64)):
        whole = {s.part for s in settled.segments(index * 64, min(size, index * 64 + 64))}
        assert whole == {Part.HOLE} or Part.HOLE not in whole


def test_content_over_a_parent() -> None:
    parent = Content(1024).put(0, b"p" * 1024)
    child = Content(2048).put(100, b"c" * 100).zero(300, 100)
    shown = child.over(parent)
    assert shown.read() == b"p" * 100 + b"c" * 100 + b"p" * 100 + bytes(100) + b"p" * 624 + bytes(1024)
    assert shown.part(1024, 2048) is Part.ZERO
    assert child.solid().over(parent).read() == child.read()


def test_content_is_deterministic_and_has_everything() -> None:
    one, two = (Content.random(4 * MIB, seed=9) for _ in range(2))
    assert one.read() == two.read()
    assert one.read() != Content.random(4 * MIB, seed=10).read()
    assert {segment.part for segment in one.segments()} == set(Part)
    sectors = [one.read(at, SECTOR) for at in range(0, one.size, SECTOR)]
    full = [sector for sector in sectors if any(sector)]
    assert len(set(full)) == len(full)
    ratios = [len(zlib.compress(s.data)) / len(s.data) for s in one.segments() if len(s.data) == 64 * KIB]
    assert min(ratios) < 0.2
    assert max(ratios) > 1


def test_huge_content_costs_nothing() -> None:
    content = Content.random(64 * TIB, seed=1, grain=4 * KIB)
    touched = list(content.touched(4 * KIB))
    assert touched[0] == 0
    assert touched[-1] == 64 * TIB // (4 * KIB) - 1
    assert content.read(64 * TIB - SECTOR, SECTOR) is not None
    assert content.over(Content(TIB)).size == 64 * TIB
    with pytest.raises(ValueError, match="not inside"):
        content.read(64 * TIB, 1)


# Hosted sparse


@pytest.mark.parametrize(
    ("capacity", "first", "rgd", "gd"),
    [(20480, 21, 21, 26), (40 * GIB // SECTOR, 21, 21, 5151), (8323072, 1, 1, 510), (524288, 21, 21, 54)],
)
def test_hosted_layout_is_the_known_one(tmp_path: Path, capacity: int, first: int, rgd: int, gd: int) -> None:
    path = str(tmp_path / "x.vmdk")
    text = None if first == 1 else b"# Disk DescriptorFile\n"
    extent = hosted.write_hosted(path, Content(capacity * SECTOR), descriptor=text)
    head = hosted.Header.unpack(peek(path, 0, SECTOR))
    assert head == extent.header
    assert (head.version, head.flags, head.capacity, head.grain_size) == (1, 3, capacity, 128)
    assert (head.descriptor_offset, head.descriptor_size) == ((0, 0) if text is None else (1, 20))
    assert (head.gtes_per_gt, head.rgd_offset, head.gd_offset) == (512, rgd, gd)
    assert (head.unclean, head.newlines, head.compress_algorithm) == (0, b"\n \r\n", 0)
    count = -(-capacity // 65536)
    directory = -(-count * 4 // SECTOR)
    for base in (rgd, gd):
        found = struct.unpack(f"<{count}I", peek(path, base * SECTOR, 4 * count))
        assert found == tuple(range(base + directory, base + directory + 4 * count, 4))
    assert head.overhead % 128 == 0
    assert 0 <= head.overhead - (gd + directory + 4 * count) < 128
    assert os.path.getsize(path) == head.overhead * SECTOR
    assert extent.gde_at(1) == gd * SECTOR + 4


HOSTED: list[dict[str, Any]] = [
    {},
    {"zero_gte": True},
    {"version": 3},
    {"shuffle_grains": 3, "gap_sectors": 5, "misalign": 3, "beyond": 0xAA},
    {"grain_sectors": 1},
    {"grain_sectors": 8, "gtes": 128},
    {"grain_sectors": 2048, "gtes": 1},
    {"rgd": False},
    {"tables_last": True, "shuffle_grains": 1},
    {"tables_last": True, "preallocate_tables": False, "gtes": 16},
    {"preallocate_tables": False, "gtes": 16, "grain_sectors": 8},
    {"descriptor_sectors": 200},
]


@needs_qemu
@pytest.mark.parametrize("options", HOSTED, ids=str)
def test_qemu_reads_hosted(tmp_path: Path, options: dict[str, Any]) -> None:
    base = desc.monolithic_flat(str(tmp_path), "base", PARENT)
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD, parent=base, **options)
    same(qemu(image), image.visible.read())
    alone = desc.monolithic_sparse(str(tmp_path), "alone", ODD, **options)
    same(qemu(alone), ODD.read())


@needs_qemu
def test_qemu_reads_a_rounded_capacity(tmp_path: Path) -> None:
    rounded = -(-ODD.sectors // 128) * 128
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD, capacity_sectors=rounded, beyond=0xAA)
    # QEMU takes the header's capacity, and so shows what lies behind the descriptor's size.
    found = qemu(image)
    same(found[: ODD.size], ODD.read())
    assert len(found) == rounded * SECTOR


@needs_qemu
def test_qemu_reads_a_terabyte(tmp_path: Path) -> None:
    content = Content.random(2 * TIB - 3 * SECTOR, seed=5, touched=4)
    image = desc.monolithic_sparse(str(tmp_path), "disk", content, preallocate_tables=False)
    for grain in content.touched(64 * KIB):
        length = min(64 * KIB, content.size - grain * 64 * KIB)
        same(qemu(image, grain * 64 * KIB, length), content.read(grain * 64 * KIB, length))


def test_hosted_places(tmp_path: Path) -> None:
    extent = hosted.write_hosted(str(tmp_path / "x"), ODD, zero_gte=True, shuffle_grains=1, beyond=0xAA)
    kinds = {i: extent.content.part(i * 64 * KIB, (i + 1) * 64 * KIB) for i in range(49)}
    assert set(kinds.values()) == set(Part)
    for redundant in (False, True):
        entries = dict(enumerate(extent.read_gtes(range(49), redundant=redundant)))
        for grain, part in kinds.items():
            expected = {Part.HOLE: 0, Part.ZERO: 1}.get(part, extent.grains.get(grain))
            assert entries[grain] == expected
    assert list(extent.grains.values()) == list(range(128, 128 + 128 * len(extent.grains), 128))
    assert list(extent.grains) != sorted(extent.grains)
    assert extent.header.flags == 7
    assert extent.header.version == 2
    for grain in extent.grains:
        length = min(64 * KIB, ODD.size - grain * 64 * KIB)
        stored = peek(extent.path, extent.grain_at(grain), 64 * KIB)
        assert stored[:length] == ODD.read(grain * 64 * KIB, length)
        assert stored[length:] == b"\xaa" * (64 * KIB - length)
    assert os.path.getsize(extent.path) == extent.end


def test_hosted_damage(tmp_path: Path) -> None:
    def edit(directory: list[int], tables: dict[int, list[int]]) -> None:
        directory[1] = 0
        tables[0][0] = 0xFFFFFFFF
        tables[2] = [7] * 16

    extent = hosted.write_hosted(
        str(tmp_path / "x"),
        Content.of(bytes(3 * MIB)),
        gtes=16,
        edit_redundant=edit,
        overhead=5,
        flags=0x80000003,
        unclean=True,
        header={"newlines": b"\n \n\n", "compress_algorithm": 9},
    )
    assert u32(extent.path, extent.gde_at(1)) == extent.gd[1] != 0
    assert u32(extent.path, extent.gde_at(1, redundant=True)) == 0
    assert extent.read_gtes([0, 32]) == [extent.grains[0], extent.grains[32]]
    assert extent.read_gtes([0, 32], redundant=True) == [0xFFFFFFFF, 7]
    head = hosted.Header.unpack(peek(extent.path, 0, SECTOR))
    assert (head.overhead, head.flags, head.unclean, head.newlines) == (5, 0x80000003, 1, b"\n \n\n")
    assert peek(extent.path, 64, 16) == struct.pack("<QB4sHB", 5, 1, b"\n \n\n", 9, 0)


def test_missing_tables(tmp_path: Path) -> None:
    content = Content(64 * MIB).put(40 * MIB, b"x" * SECTOR)
    extent = hosted.write_hosted(str(tmp_path / "x"), content, preallocate_tables=False)
    assert [bool(entry) for entry in extent.gd] == [False, True]
    assert [bool(entry) for entry in extent.rgd] == [False, True]
    assert extent.header.gd_offset == 1 + 1 + 4
    assert peek(extent.path, extent.grain_at(640), SECTOR) == b"x" * SECTOR


# Streams

STREAM: list[dict[str, Any]] = [
    {},
    {"order": 2},
    {"descriptor_sectors": 1, "text": {"ddb": {"ddb.adapterType": "ide"}}},
    {"grain_sectors": 16, "gtes": 128, "level": 1},
    {"last_grain": "short"},
    {"last_grain": "full"},
    {"progress_every": 2, "metadata_val": False, "all_tables": True},
    {"zeros": "write", "all_tables": False, "overhead": 256},
    {"header": {"version": 1}},
]


@needs_qemu
@pytest.mark.parametrize("layout", ["A", "B", "C", "mixed"])
@pytest.mark.parametrize("options", STREAM, ids=str)
def test_qemu_reads_streams(tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    image = desc.stream_optimized(str(tmp_path), "disk", ODD, layout=layout, **options)
    same(qemu(image), ODD.read())


@needs_qemu
def test_qemu_on_odd_streams(tmp_path: Path) -> None:
    def made(**options: Any) -> Image:
        return desc.stream_optimized(str(tmp_path), "disk", ODD, **options)

    # Without a footer only a first header that knows the directory helps.
    same(qemu(made(layout="mixed", footer="none")), ODD.read())
    for footer in ("none", "zeroed", "lost"):
        with pytest.raises(QemuError):
            qemu(made(layout="A", footer=footer))
    with pytest.raises(QemuError, match="Invalid footer"):
        qemu(made(layout="A", trailing=7 * SECTOR))
    for layout in ("B", "C"):
        same(qemu(made(layout=layout, trailing=7 * SECTOR)), ODD.read())
    # QEMU looks neither at the LBA nor, without markers, behind the first grain's length of deflated bytes.
    first = min(made().stream().records)
    same(qemu(made(broken={first: "lba"})), ODD.read())
    texts = Content.of(b"squeeze" * 70000).resized(490 * KIB)
    same(qemu(desc.stream_optimized(str(tmp_path), "bare", texts, layout="C", record="bare")), texts.read())
    for harm in ("bits", "adler", "header", "truncated", "huge", "short", "empty", "bomb"):
        with pytest.raises(QemuError, match="Invalid argument"):
            qemu(made(broken={first: harm}))


@pytest.mark.parametrize("layout", ["A", "B", "C", "mixed"])
def test_stream_places(tmp_path: Path, layout: str) -> None:
    content = Content.random(3 * MIB + SECTOR, seed=8, grain=64 * KIB, density=0.8).punch(2 * MIB, MIB // 2)
    content.put(3 * MIB, b"end!" * 128)
    extent = desc.stream_optimized(str(tmp_path), "disk", content, layout=layout, gtes=8).stream()
    path, head = extent.path, extent.header
    streaming = layout in {"A", "mixed"}
    assert head == hosted.Header.unpack(peek(path, 0, SECTOR))
    assert (head.version, head.compress_algorithm) == (3, 1)
    assert head.flags == (0x30003 if layout == "C" else 0x30001)
    assert head.rgd_offset == (21 if layout == "C" else 0)
    assert head.gd_offset == {"A": 2**64 - 1, "B": 21, "C": 21 + 1 + 7 * 1}.get(layout, extent.gd_sector)

    for grain, record in extent.records.items():
        table = u32(path, extent.gde_at(grain // 8))
        assert u32(path, table * SECTOR + 4 * (grain % 8)) == record.sector
        assert table * SECTOR + 4 * (grain % 8) == extent.gte_at(grain)
        lba, size = struct.unpack("<QI", peek(path, extent.grain_at(grain), 12))
        assert (lba, size) == (grain * 128, record.size)
        data = zlib.decompress(peek(path, extent.grain_at(grain) + 12, size))
        wanted = content.read(grain * 64 * KIB, min(64 * KIB, content.size - grain * 64 * KIB))
        short = layout == "C" and grain == 48
        assert data == (wanted if short else wanted.ljust(64 * KIB, b"\0"))
    missing = [index for index, at in enumerate(extent.gd) if not at]
    assert missing == ([4] if streaming else [])

    end = os.path.getsize(path)
    assert end == extent.end
    if streaming:
        assert extent.footer_sector == end // SECTOR - 2
        assert peek(path, end - 1536, 16) == struct.pack("<QII", 1, 0, 3)
        foot = hosted.Header.unpack(peek(path, end - 1024, SECTOR))
        assert foot.gd_offset == extent.gd_sector
        assert peek(path, end - SECTOR, SECTOR) == bytes(SECTOR)
        for sector, kind in extent.markers:
            size_, found = struct.unpack("<8xII", peek(path, sector * SECTOR, 16))
            assert (size_, found) == (0, kind)
        assert [kind for _, kind in extent.markers] == [1] * 6 + [2, 3, 0]
    else:
        last = max(extent.records.values())
        length = last.sectors + 1 if layout == "B" else 128
        assert end == (last.sector + length) * SECTOR


def test_stream_record_framings(tmp_path: Path) -> None:
    content = Content.of(random.Random(1).randbytes(64 * KIB) + b"text" * 16384)
    noise = stream.write_stream(str(tmp_path / "noise"), content).records[0]
    assert noise.size > 64 * KIB
    assert noise.sectors == 129
    for framing, skip in (("length", 4), ("bare", 0)):
        extent = stream.write_stream(str(tmp_path / framing), content, layout="C", record=framing)
        assert extent.header.flags == 0x10003
        for grain, record in extent.records.items():
            raw = peek(extent.path, extent.grain_at(grain), skip + record.size)
            assert skip == 0 or int.from_bytes(raw[:4], "little") == record.size
            assert zlib.decompress(raw[skip:]) == content.read(grain * 64 * KIB, 64 * KIB)
    extent = stream.write_stream(str(tmp_path / "raw"), content, raw_deflate=True)
    record = extent.records[1]
    packed = peek(extent.path, extent.grain_at(1) + 12, record.size)
    assert zlib.decompress(packed, wbits=-15) == content.read(64 * KIB, 64 * KIB)
    with pytest.raises(zlib.error):
        zlib.decompress(packed)
    with pytest.raises(ValueError, match="tables first"):
        stream.write_stream(str(tmp_path / "x"), content, record="bare")


@pytest.mark.parametrize(
    ("harm", "lba", "inflated"),
    [
        ("lba", 128, 64 * KIB),
        ("short", 0, 32 * KIB),
        ("empty", 0, 0),
        ("bomb", 0, 16 * MIB + 64 * KIB),
        ("bits", 0, None),
        ("adler", 0, None),
        ("header", 0, None),
        ("truncated", 0, None),
    ],
)
def test_stream_damage(tmp_path: Path, harm: stream.Damage, lba: int, inflated: int | None) -> None:
    content = Content.of((b"0123456789abcdef" * 4096)[:-8] + b"the end.")
    extent = stream.write_stream(str(tmp_path / "x"), content, broken={0: harm})
    found, size = struct.unpack("<QI", peek(extent.path, extent.grain_at(0), 12))
    assert found == lba
    packed = peek(extent.path, extent.grain_at(0) + 12, size)
    if inflated is None:
        with pytest.raises(zlib.error):
            zlib.decompress(packed)
    else:
        assert len(zlib.decompress(packed)) == inflated


def test_stream_footers(tmp_path: Path) -> None:
    sizes = {}
    for footer in ("good", "none", "zeroed", "lost"):
        extent = stream.write_stream(str(tmp_path / footer), ODD, footer=footer)
        sizes[footer] = extent.end
        tail = peek(extent.path, extent.end - 1536, 1536)
        if footer == "lost":
            assert hosted.Header.unpack(tail[512:]).gd_offset == hosted.GD_AT_END
        if footer == "zeroed":
            assert not any(tail)
        assert (extent.footer_sector is not None) == (footer in {"good", "lost"})
    assert sizes["good"] == sizes["zeroed"] == sizes["lost"] == sizes["none"] + 1024
    path = str(tmp_path / "good")
    cut(path, -1000)
    assert os.path.getsize(path) == sizes["good"] - 1000
    poke(path, 70000, bytes(5000))
    assert not any(peek(path, 70000, 5000))


# COWD

COWD: list[dict[str, Any]] = [
    {},
    {"grain_sectors": 8, "free_sector": 5},
    {"shuffle_grains": 1},
    {"preallocate_tables": True, "unclean": True},
    {"grow_to": 16 * MIB, "generation": 3, "saved_generation": 2},
    {"flags": 2, "parent_name": b"x.vmdk"},
]


@needs_qemu
@pytest.mark.parametrize("options", COWD, ids=str)
def test_qemu_reads_cowd(tmp_path: Path, options: dict[str, Any]) -> None:
    base = desc.vmfs(str(tmp_path), "base", PARENT)
    image = desc.vmfs_sparse(str(tmp_path), "delta", ODD, parent=base, **options)
    same(qemu(image), image.visible.read())


def test_cowd_places(tmp_path: Path) -> None:
    content = Content(10 * MIB).put(5 * MIB, b"a" * SECTOR).put(9 * MIB + SECTOR, b"b" * SECTOR)
    extent = desc.vmfs_sparse(str(tmp_path), "d", content, unclean=True, generation=7).cowd()
    path = extent.path
    assert struct.unpack("<4s7I", peek(path, 0, 32)) == (b"COWD", 1, 3, 20480, 1, 4, 5, 5 + 2 * 33)
    assert (u32(path, 1060), u32(path, 1636), u32(path, 1648)) == (7, 0, 1)
    assert [u32(path, 2048 + 4 * i) for i in range(5)] == [0, 0, 5, 0, 38]
    assert u32(path, 5 * SECTOR + 4 * (10240 % 4096)) == 37 == extent.grains[10240]
    assert u32(path, extent.gte_at(18433)) == 70
    assert peek(path, 37 * SECTOR, SECTOR) == b"a" * SECTOR
    assert peek(path, extent.grain_at(18433), SECTOR) == b"b" * SECTOR
    assert os.path.getsize(path) == 71 * SECTOR == extent.free_sector * SECTOR
    stale = desc.vmfs_sparse(str(tmp_path), "s", content, free_sector=6, grow_to=16 * MIB).cowd()
    assert (stale.stored_free_sector(), stale.free_sector) == (6, 71)
    assert os.path.getsize(stale.path) == 16 * MIB
    child = desc.vmfs_sparse(str(tmp_path), "c", content, flags=2, parent_name=b"p.vmdk", generation=7)
    assert peek(child.cowd().path, 32, 7) == b"p.vmdk\0"
    assert u32(child.cowd().path, 1056) == 7


# seSparse

SESPARSE: list[dict[str, Any]] = [
    {},
    {"zero_style": "unmapped"},
    {"zero_style": "remembered", "shuffle_grains": 2},
    {"zero_style": "mixed", "first_index": 4094},
    {"first_index": 8000, "shuffle_grains": 4, "shuffle_tables": 1},
]


@needs_qemu
@pytest.mark.parametrize("options", SESPARSE, ids=str)
def test_qemu_reads_sesparse(tmp_path: Path, options: dict[str, Any]) -> None:
    base = desc.vmfs(str(tmp_path), "base", PARENT)
    image = desc.se_sparse(str(tmp_path), "delta", WIDE, parent=base, **options)
    same(qemu(image), image.visible.read())


@needs_qemu
def test_qemu_reads_64_tebibytes(tmp_path: Path) -> None:
    content = Content.random(64 * TIB, seed=6, grain=4 * KIB, touched=5)
    image = desc.se_sparse(str(tmp_path), "huge", content, first_index=1 << 29)
    for grain in content.touched(4 * KIB):
        same(qemu(image, grain * 4 * KIB, 4 * KIB), content.read(grain * 4 * KIB, 4 * KIB))
    assert Path(image.sesparse().path).stat().st_blocks * SECTOR < MIB


@needs_qemu
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay_journal": 1}, "Image is dirty"),
        ({"volatile_magic": sesparse.CONST_MAGIC}, "volatile header"),
        ({"version": 1}, "Unsupported version"),
        ({"flags": 1}, "flags"),
        ({"grain_size": 16}, "grain size"),
        ({"table_size": 32}, "grain table size"),
        ({"gdes": {0: 0x2000000000000000}}, "Invalid argument|Input/output"),
        ({"gtes": {0: 0x4000000000000000}}, "Invalid argument|Input/output"),
        ({"gtes": {0: 1}}, "Invalid argument|Input/output"),
    ],
)
def test_qemu_refuses_bad_sesparse(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    image = desc.se_sparse(str(tmp_path), "bad", WIDE, **options)
    with pytest.raises(QemuError, match=message):
        qemu(image)


def test_sesparse_places(tmp_path: Path) -> None:
    content = Content(100 * MIB).put(0, b"a" * 4096).put(99 * MIB, b"b" * 4096).zero(20 * MIB, 4096)
    image = desc.se_sparse(
        str(tmp_path), "d", content, first_index=4096, shuffle_tables=3, zero_style="remembered"
    )
    extent = image.sesparse()
    path = extent.path
    known = [1, 1, 2, 2, 2048, 2048, 4096, 2048, 6144, 2048, 8192, 2048, 10240, 2048, 12288, 204800]
    head = struct.unpack("<26Q", peek(path, 0, 208))
    assert head[:10] == (0xCAFEBABE, 0x200000001, 204800, 8, 64, 0, 0, 0, 0, 0)
    assert list(head[10:]) == known
    assert u64(path, 512) == 0xCAFECAFE
    assert u64(path, 512 + 24) == 0
    assert sorted(extent.tables) == [0, 1, 6]
    assert sorted(extent.tables.values()) == [0, 1, 2] != list(extent.tables.values())
    for table, number in extent.tables.items():
        assert u64(path, 4096 * SECTOR + 8 * table) == 0x1000000000000000 + number
    entry = u64(path, (6144 + 64 * extent.tables[6]) * SECTOR + 8 * (99 * 256 % 4096))
    assert entry == 0x3000000000000000 | (4098 & 0xFFF) << 48 | 4098 >> 12 == 0x3002000000000001
    assert u64(path, extent.gte_at(20 * 256)) == 0x1001000000000001
    assert peek(path, 12288 * SECTOR + 4098 * 4096, 4096) == b"b" * 4096
    assert peek(path, extent.index_at(4097), 4096) == b"\xee" * 4096
    assert peek(path, extent.grain_at(0), 4096) == b"a" * 4096


def test_sesparse_encoding() -> None:
    assert sesparse.encode(0) == 0x3000000000000000
    for index in (0, 1, 4095, 4096, 0x123456789A, 2**34 - 1):
        entry = sesparse.encode(index)
        assert entry >> 60 == 3
        assert ((entry >> 48) & 0xFFF) | ((entry & 0x0000FFFFFFFFFFFF) << 12) == index


# Whole images


@needs_qemu
@pytest.mark.parametrize("qemu_style", [False, True])
def test_qemu_reads_split(tmp_path: Path, qemu_style: bool) -> None:
    options = {"descriptor": b""} if qemu_style else {}
    image = desc.split_sparse(str(tmp_path), "disk", ODD, 2048, **options)
    assert len(image.extents) == 4
    same(qemu(image), ODD.read())
    head = hosted.Header.unpack(peek(image.hosted(1).path, 0, SECTOR))
    assert (head.descriptor_offset, head.descriptor_size, head.rgd_offset) == (
        (1, 20, 21) if qemu_style else (0, 0, 1)
    )
    same(qemu(desc.split_flat(str(tmp_path), "flat", ODD, 1000)), ODD.read())
    assert os.path.getsize(tmp_path / "flat-f007.vmdk") == (ODD.sectors - 6000) * SECTOR
    same(qemu(desc.monolithic_flat(str(tmp_path), "mono", ODD)), ODD.read())


@needs_qemu
def test_qemu_reads_a_chain_across_kinds(tmp_path: Path) -> None:
    folder = str(tmp_path)
    link = desc.split_sparse(folder, "base", Content.random(3 * MIB, seed=20, density=0.9), 2048)
    for seed, kind in enumerate(
        (desc.vmfs_sparse, desc.se_sparse, desc.monolithic_sparse, desc.split_sparse)
    ):
        content = Content.random(3 * MIB + seed * MIB, seed=seed, density=0.3, grain=4 * KIB)
        link = kind(folder, f"link{seed}", content, parent=link)
        same(qemu(link), link.visible.read())
    other = desc.monolithic_sparse(folder, "other", ODD, parent=link, text={"parent_cid": "00000bad"})
    with pytest.raises(QemuError, match="Invalid argument"):
        qemu(other)


def test_custom_images(tmp_path: Path) -> None:
    folder = str(tmp_path)
    pieces = [Content.random(MIB, seed=seed, density=1) for seed in range(6)]
    image = desc.custom(
        folder,
        "mix",
        [
            Row("RW", "FLAT", pieces[0], "shared.bin", 64),
            Row("RW", "ZERO", Content(MIB)),
            Row("RDONLY", "SPARSE", pieces[1]),
            Row("NOACCESS", "FLAT", pieces[2], "shared.bin", 4096),
            Row("NOACCESS", "ZERO", Content(MIB)),
            Row("RW", "SPARSE", pieces[3], "s.vmdk", builder="stream", options={"layout": "A"}),
            Row("RW", "SPARSE", pieces[4], "c.vmdk", builder="cowd"),
            Row("RW", "SESPARSE", pieces[5], "e.vmdk"),
        ],
    )
    nothing = bytes(MIB)
    wanted = [
        pieces[0].read(),
        nothing,
        *(p.read() for p in pieces[1:3]),
        nothing,
        *(p.read() for p in pieces[3:]),
    ]
    assert image.visible.read() == b"".join(wanted)
    assert image.unreadable == [(3 * MIB, MIB)]
    assert image.size == 8 * MIB
    names = ["mix.vmdk", "shared.bin", "mix-e003.vmdk", "s.vmdk", "c.vmdk", "e.vmdk"]
    assert [os.path.basename(file) for file in image.files] == names
    text = image.text.decode()
    assert text == (tmp_path / "mix.vmdk").read_text()
    assert [line for line in text.splitlines() if re.match("RW|RDONLY|NOACCESS", line)] == [
        'RW 2048 FLAT "shared.bin" 64',
        "RW 2048 ZERO",
        'RDONLY 2048 SPARSE "mix-e003.vmdk"',
        'NOACCESS 2048 FLAT "shared.bin" 4096',
        "NOACCESS 2048 ZERO",
        'RW 2048 SPARSE "s.vmdk"',
        'RW 2048 SPARSE "c.vmdk"',
        'RW 2048 SESPARSE "e.vmdk"',
    ]
    assert peek(folder + "/shared.bin", 64 * SECTOR, MIB) == pieces[0].read()
    assert peek(folder + "/shared.bin", 4096 * SECTOR, MIB) == pieces[2].read()
    assert [peek(f"{folder}/{name}.vmdk", 0, 4) for name in ("s", "c", "e")] == [
        b"KDMV",
        b"COWD",
        bytes.fromhex("bebafeca"),
    ]


def test_descriptor_texts() -> None:
    text = desc.descriptor(
        "vmfs",
        [("RW", 2048, "VMFS", "a b.vmdk"), "rw 5 zero "],
        cid="fffffffe",
        parent_cid="12ab",
        hint="C:\\x\\y.vmdk",
        ddb={"ddb.adapterType": "ide"},
        newline="\r\n",
        bom=True,
        extra=['changeTrackPath="x-ctk.vmdk"'],
        version=3,
    )
    assert text == (
        b"\xef\xbb\xbf# Disk DescriptorFile\r\nversion=3\r\n"
        b'encoding="UTF-8"\r\nCID=fffffffe\r\nparentCID=12ab\r\ncreateType="vmfs"\r\n'
        b'parentFileNameHint="C:\\x\\y.vmdk"\r\nchangeTrackPath="x-ctk.vmdk"\r\n\r\n# Extent description\r\n'
        b'RW 2048 VMFS "a b.vmdk"\r\nrw 5 zero \r\n\r\n# The Disk Data Base\r\n#DDB\r\n\r\n'
        b'ddb.adapterType = "ide"\r\n'
    )
    for name, word in (
        ("windows-1252", "Größe"),
        ("GBK", "磁盘"),
        ("Big5", "磁碟"),
        ("Shift_JIS", "ディスク"),
    ):
        raw = desc.descriptor("monolithicFlat", [("RW", 1, "FLAT", word, 0)], encoding=name)
        assert f'encoding="{name}"'.encode() in raw
        assert f'"{word}"' in raw.decode(desc.CODECS[name])
        assert word.encode() not in raw
    assert b'longContentID = "0123456789abcdef0123456712345678"' in desc.descriptor("vmfs")
    assert b'FLAT "/dev/sdz" 0' in desc.device_descriptor()
    parts = re.findall(rb"^(?:RW|NOACCESS) (\d+)", desc.device_descriptor("partitionedDevice"), re.MULTILINE)
    assert sum(map(int, parts)) == 204800
    assert b"vmwarevmcrypt" in desc.encrypted_descriptor()
    assert b"encryption.keySafe" in desc.encrypted_descriptor("workstation")


@needs_qemu
def test_other_files(tmp_path: Path) -> None:
    image = desc.monolithic_flat(str(tmp_path), "disk", ODD)
    wrapped = str(tmp_path / "wrapped.vmdk")
    desc.wrapped_descriptor(wrapped, image.text)
    same(qemu(wrapped), ODD.read())
    packed = desc.gzip_image(image.path)
    with gzip.open(packed) as file:
        assert file.read() == image.text
    desc.ctk_file(str(tmp_path / "ctk"))
    assert peek(str(tmp_path / "ctk"), 0, 4) == bytes.fromhex("a27219f6")


# Appliances


@pytest.mark.parametrize("sizes", ["octal", "base256", "pax"])
def test_ova(tmp_path: Path, sizes: ova.Sizes) -> None:
    images = [desc.stream_optimized(str(tmp_path), f"disk{i}", ODD.resized(MIB)) for i in range(2)]
    disks = [
        ova.Disk(images[0].path, MIB),
        ova.Disk(images[1].path, MIB, "packed.vmdk.gz", gzip=True),
        ova.Disk(images[1].path, MIB, "chunked.vmdk", chunk_size=100_000),
    ]
    made = ova.write_ova(
        str(tmp_path / "vm.ova"), disks, digest="sha1", sizes=sizes, extra=[("readme.txt", b"hello")]
    )
    names = list(made.members)
    assert names[:4] == ["vm.ovf", "vm.mf", "disk0.vmdk", "packed.vmdk.gz"]
    assert names[4] == "chunked.vmdk.000000000"
    data = {name: peek(made.path, *place) for name, place in made.members.items()}
    assert data["disk0.vmdk"] == Path(images[0].path).read_bytes()
    assert gzip.decompress(data["packed.vmdk.gz"]) == Path(images[1].path).read_bytes()
    chunks = [data[name] for name in names if name.startswith("chunked")]
    assert b"".join(chunks) == Path(images[1].path).read_bytes()
    for line in data["vm.mf"].decode().splitlines():
        found = re.fullmatch(r"SHA1\((.+)\)= ([0-9a-f]{40})", line)
        assert found
        assert hashlib.sha1(data[found[1]]).hexdigest() == found[2]
    root = ET.fromstring(made.ovf)
    space = "{http://schemas.dmtf.org/ovf/envelope/1}"
    files = {f.get(f"{space}id"): f.get(f"{space}href") for f in root.iter(f"{space}File")}
    table = {d.get(f"{space}diskId"): files[d.get(f"{space}fileRef")] for d in root.iter(f"{space}Disk")}
    assert list(table.values()) == ["disk0.vmdk", "packed.vmdk.gz", "chunked.vmdk"]
    with tarfile.open(made.path) as tar:
        assert [info.size for info in tar] == [size for _, size in made.members.values()]
    field = peek(made.path, made.members["disk0.vmdk"][0] - 512 + 124, 12)
    expected = {"octal": b"%011o\0" % len(data["disk0.vmdk"]), "pax": b"00000000000\0"}
    assert field == expected.get(sizes, b"\x80" + len(data["disk0.vmdk"]).to_bytes(11, "big"))


@needs_qemu
def test_qemu_reads_a_member_in_place(tmp_path: Path) -> None:
    image = desc.stream_optimized(str(tmp_path), "disk", ODD)
    made = ova.write_ova(str(tmp_path / "vm.ova"), [ova.Disk(image.path, ODD.size)])
    offset, size = made.members["disk.vmdk"]
    member = {"driver": "file", "filename": made.path}
    part = {"driver": "raw", "offset": offset, "size": size, "file": member}
    same(qemu_source({"driver": "vmdk", "file": part}, str(tmp_path / "out")), ODD.read())


def test_segment_cut() -> None:
    assert Segment(10, 20, Part.DATA, b"0123456789").cut(12, 15) == Segment(12, 15, Part.DATA, b"234")
