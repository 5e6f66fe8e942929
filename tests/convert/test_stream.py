"""New streamOptimized files: VMware's layout record by record, and the same bytes for every reader."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk import open_disk
from nbd_vmdk.codec import MAX_LEVEL
from nbd_vmdk.converting.conversion import convert
from nbd_vmdk.errors import StorageError
from nbd_vmdk.extents import streamwriter
from nbd_vmdk.extents.streamwriter import StreamWriter
from nbd_vmdk.ondisk.hosted import parse_header
from nbd_vmdk.ondisk.stream_build import empty_stream, stream_header
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.convert import Work, fill_stream
from nbd_vmdk.ops.sides import StorageSource
from tests.convert import qemu_raw, raw_file
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.memory import MemoryStorage


def front_to_back(data: bytes, size: int) -> tuple[bytes, list[str]]:
    """The disk's bytes and the kinds of records, as somebody reads them who can't seek."""
    magic, version, flags, capacity, grain, at, room, entries, rgd, gd, overhead = struct.unpack_from(
        "<4sIIQQQQIQQQ", data
    )
    assert (magic, version, flags, rgd, gd) == (b"KDMV", 3, 0x30001, 0, 0xFFFFFFFFFFFFFFFF)
    assert data[73:79] == b"\n \r\n\1\0"
    assert capacity * SECTOR == size
    assert (at, room) == (1, 20)
    plain = bytearray(-(-size // (grain * SECTOR)) * grain * SECTOR)
    directory = [0] * -(-capacity // (entries * grain))
    table = [0] * entries
    number = None
    kinds: list[str] = []
    last = -1
    at = overhead * SECTOR
    while True:
        value, length, kind = struct.unpack_from("<QII", data, at)
        if length:
            assert value > last, "guest sectors go up"
            assert value % grain == 0
            last = value
            packed = data[at + 12 : at + 12 + length]
            content = zlib.decompress(packed)
            assert len(content) == grain * SECTOR, "every grain is whole"
            assert any(content), "grains of zeros are left out"
            plain[value * SECTOR : value * SECTOR + len(content)] = content
            if number != value // grain // entries:
                assert not any(table), "a table is written before the next one's grains"
                number = value // grain // entries
            table[value // grain % entries] = at // SECTOR
            at += -(-(12 + length) // SECTOR) * SECTOR
            if kinds[-1:] != ["grains"]:
                kinds.append("grains")
            continue
        assert not any(data[at + 16 : at + SECTOR])
        at += SECTOR
        kinds.append(("end", "table", "directory", "footer")[kind])
        payload = data[at : at + value * SECTOR]
        at += value * SECTOR
        if kind == 1:
            assert list(struct.unpack(f"<{entries}I", payload)) == table
            assert number is not None
            directory[number] = (at - len(payload)) // SECTOR
            table = [0] * entries
        elif kind == 2:
            assert list(struct.unpack_from(f"<{len(directory)}I", payload)) == directory
            directory_at = (at - len(payload)) // SECTOR
        elif kind == 3:
            assert payload == data[:56] + struct.pack("<Q", directory_at) + data[64:SECTOR]
        else:
            assert at == len(data)
            return bytes(plain[:size]), kinds


def stream_of(content: Content, level: int = 6, grain_sectors: int = 128, threads: int = 3) -> bytes:
    storage = MemoryStorage(empty_stream(stream_header(content.sectors, grain_sectors=grain_sectors), b"x"))
    header = parse_header(storage.read(0, SECTOR), "memory")
    source = StorageSource(MemoryStorage(content.read()))
    fill_stream(source, storage, header, Work(level=level, threads=threads))
    return storage.read(0, storage.size)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 1000), st.sampled_from([1, 8, 128, 256]), st.sampled_from([1, 6]))
def test_layout(sectors: int, seed: int, grain_sectors: int, level: int) -> None:
    content = Content.random(sectors * SECTOR, seed, density=0.6, grain=grain_sectors * SECTOR)
    plain, kinds = front_to_back(stream_of(content, level, grain_sectors), content.size)
    assert plain == content.read()
    tables = kinds.count("table")
    assert kinds == ["grains", "table"] * tables + ["directory", "footer", "end"]


def test_empty() -> None:
    plain, kinds = front_to_back(stream_of(Content(40 * MIB)), 40 * MIB)
    assert plain == bytes(40 * MIB)
    assert kinds == ["directory", "footer", "end"]


def test_tables_without_grains_are_left_out() -> None:
    content = Content(100 * MIB).put(0, b"a" * SECTOR).put(50 * MIB, b"b" * KIB).put(100 * MIB - 1, b"c")
    _plain, kinds = front_to_back(stream_of(content), content.size)
    assert kinds.count("table") == 3  # of four


@pytest.mark.parametrize("level", [1, 2, 6, 9, MAX_LEVEL])
def test_levels(level: int) -> None:
    content = Content.random(2 * MIB, level)
    assert front_to_back(stream_of(content, level), content.size)[0] == content.read()


def test_the_same_bytes_whatever_the_threads() -> None:
    content = Content.random(20 * MIB, 5)
    assert stream_of(content, threads=1) == stream_of(content, threads=7)


@pytest.mark.parametrize("size", [SECTOR, 64 * KIB, 3 * MIB + 5 * SECTOR, 34 * MIB])
def test_other_readers(tmp_path: Path, size: int) -> None:
    content = Content.random(size, size)
    raw = raw_file(tmp_path / "a.raw", content)
    made = str(tmp_path / "a.vmdk")
    convert(raw, made, kind="streamOptimized", work=Work(verify=True))
    assert qemu_raw(made, tmp_path / "b.raw") == content.read()
    with open(made, "rb") as file:
        assert front_to_back(file.read(), size)[0] == content.read()
    assert check_image(made, data=True).findings == []
    with open_disk(made) as disk:
        assert disk.pread(size, 0) == content.read()


def test_a_file_of_2_tib_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamwriter, "MAX_ENTRY", 200)
    header = stream_header(10 * MIB // SECTOR)
    writer = StreamWriter(MemoryStorage(), header, in_order=True)
    noise = Content.random(MIB, 1, density=1).read()
    with pytest.raises(StorageError, match="2 TiB"):
        writer.append(writer.records(memoryview(noise), 0))


def test_tables_behind_2_tib_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grains that can be named are no use in a file whose tables can't."""
    storage = MemoryStorage()
    writer = StreamWriter(storage, stream_header(10 * MIB // SECTOR), in_order=True)
    writer.append(writer.records(memoryview(Content.random(MIB, 1, density=1).read()), 0))
    end = writer.end
    monkeypatch.setattr(streamwriter, "MAX_ENTRY", end // SECTOR)
    with pytest.raises(StorageError, match="2 TiB"):
        writer.finish()
    assert storage.size == writer.end == end
