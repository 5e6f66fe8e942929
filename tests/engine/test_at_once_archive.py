"""Disks inside an archive are read at once, too; and what lies around them there is not read."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.errors import StorageError, Truncated
from nbd_vmdk.storage.local import LocalFile
from nbd_vmdk.storage.window import Window, local_file
from tests.engine import long_way, same
from tests.images import desc, peek, poke
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image
from tests.images.ova import write_tar
from tests.images.sesparse import encode
from tests.memory import MemoryStorage

GRAIN = 64 * KIB
FULL = Content.of(random.Random(1).randbytes(3 * MIB + 7 * SECTOR))
AROUND = b"around the disk " * 16 * KIB

KINDS: dict[str, Callable[[str, str], Image]] = {
    "flat": lambda folder, name: desc.monolithic_flat(folder, name, FULL),
    "split flat": lambda folder, name: desc.split_flat(folder, name, FULL, 3001),
    "sparse": lambda folder, name: desc.monolithic_sparse(folder, name, FULL),
    "COWD": lambda folder, name: desc.vmfs_sparse(folder, name, FULL, grain_sectors=16),
    "seSparse": lambda folder, name: desc.se_sparse(folder, name, FULL),
    "stream of noise": lambda folder, name: desc.stream_optimized(folder, name, FULL, level=0),
}


def packed(folder: Path, image: Image) -> tuple[str, dict[str, tuple[int, int]]]:
    """The image's files between others in an archive; its path, and where each member is."""
    files = [(os.path.basename(path), peek(path, 0, os.path.getsize(path))) for path in image.files]
    path = str(folder / "archive.ova")
    return path, write_tar(path, [("before", AROUND), *files, ("behind", AROUND)])


@pytest.mark.parametrize("kind", KINDS)
def test_who_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    image = KINDS[kind](str(tmp_path), "disk")
    path, _ = packed(tmp_path, image)
    asked = long_way(monkeypatch)
    # With a cache of a MiB, of grains of noise nothing but where they are is remembered.
    with open_disk(path, cache_size=MIB) as disk:
        ranges = [(at, SECTOR) for at in range(0, disk.size - SECTOR, 3 * SECTOR)] + [(disk.size - 1, 1)]
        for offset, length in ranges:
            same(disk.pread(length, offset), image.visible.read(offset, length), offset)
        assert bool(asked) is ("flat" not in kind)  # tables were not in memory
        asked.clear()
        for offset, length in ranges:
            same(disk.pread(length, offset), image.visible.read(offset, length), offset)
        # There is no layout of the last grain, which the disk's end cuts short.
        assert all(kind == "stream of noise" and offset >= disk.size - 7 * SECTOR for offset, _ in asked)
        same(disk.pread(disk.size, 0), image.visible.read(0, disk.size))


# seSparse grains lie side by side, and the file ends with the last one.
@pytest.mark.parametrize(
    ("kind", "back"),
    [(kind, back) for kind in ("sparse", "COWD") for back in (0, SECTOR, 3 * SECTOR)] + [("seSparse", 0)],
)
def test_entry_that_leads_out_of_the_member(tmp_path: Path, kind: str, back: int) -> None:
    """A grain that begins ``back`` bytes before the member's end, or behind it, is cut off there."""
    image = KINDS[kind](str(tmp_path), "disk")
    path, members = packed(tmp_path, image)
    name = os.path.basename(image.files[-1])
    at, size = members[name]
    first = size - back
    if kind == "seSparse":
        extent = image.sesparse()
        entry = struct.pack("<Q", encode((first - extent.index_at(0)) // (4 * KIB)))
        place = extent.gte_at(0)
        grain = 4 * KIB
    else:
        sparse = image.hosted() if kind == "sparse" else image.cowd()
        entry = struct.pack("<I", -(-first // SECTOR))
        place = sparse.gte_at(0)
        grain = GRAIN if kind == "sparse" else 16 * SECTOR
    poke(path, at + place, entry)
    with open_disk(path) as disk:
        disk.pread(SECTOR, disk.size // 2)  # the table is in memory from now on
        for offset in range(0, grain, SECTOR):
            if offset < back:
                same(disk.pread(SECTOR, offset), peek(path, at + first + offset, SECTOR), offset)
            else:
                buf = bytearray(SECTOR)
                with pytest.raises(Truncated, match=name):
                    disk.pread_into(buf, offset)
                assert not any(buf)
        if back:
            with pytest.raises(Truncated, match=name):
                disk.pread(back + 1, 0)
            assert len(disk.pread(back, 0)) == back


def test_closed(tmp_path: Path) -> None:
    image = KINDS["sparse"](str(tmp_path), "disk")
    path, _ = packed(tmp_path, image)
    disk = open_disk(path)
    disk.pread(disk.size, 0)
    read_into = disk.read_into
    disk.close()
    with pytest.raises(StorageError):
        read_into(memoryview(bytearray(SECTOR)), SECTOR)


def test_archive_that_was_cut_off(tmp_path: Path) -> None:
    image = KINDS["flat"](str(tmp_path), "disk")
    path, members = packed(tmp_path, image)
    at, _size = members["disk-flat.vmdk"]
    with open_disk(path) as disk:
        os.truncate(path, at + 10 * SECTOR)
        same(disk.pread(10 * SECTOR, 0), image.visible.read(0, 10 * SECTOR))
        with pytest.raises(Truncated):
            disk.pread(2, 10 * SECTOR - 1)


def test_windows(tmp_path: Path) -> None:
    """A file itself, a window, a window in a window; and what is not known to be read in this way."""
    path = tmp_path / "file"
    data = random.Random(2).randbytes(4000)
    path.write_bytes(data)

    def opened(kind: type[LocalFile] = LocalFile) -> LocalFile:
        return kind(os.open(path, os.O_RDONLY), str(path), writable=False)

    class Slow(LocalFile):
        """Reads in a way of its own."""

    class SlowWindow(Window):
        """So does this."""

    with closing(opened()) as plain:
        assert local_file(plain) == (plain, os.preadv)
    for depth in (1, 2, 3):
        base = file = opened()
        window: Window | LocalFile = base
        for _ in range(depth):
            window = Window(window, 100, window.size - 200, "window")
        with closing(window):
            local = local_file(window)
            assert local is not None
            found, preadv = local
            assert found is file
            inside = data[100 * depth : -100 * depth]
            for at, length in ((0, 10), (0, len(inside)), (17, 100), (len(inside) - 1, 1), (len(inside), 0)):
                buf = memoryview(bytearray(length))
                assert preadv(file.fd, (buf,), at) == length
                assert buf == inside[at : at + length]
            for at, length in (
                (-1, 10),
                (0, len(inside) + 1),
                (len(inside) - 1, 2),
                (len(inside), 1),
                (1 << 70, 1),
            ):
                buf = memoryview(bytearray(length))
                assert preadv(file.fd, (buf,), at) == -1
                assert not any(buf)
    for other in (
        MemoryStorage(data, "memory", writable=False),
        Window(MemoryStorage(data, "memory", writable=False), 0, 10, "window"),
        opened(Slow),
        Window(opened(Slow), 0, 10, "window"),
        SlowWindow(opened(), 0, 10, "window"),
        Window(SlowWindow(opened(), 0, 10, "window"), 0, 10, "window"),
    ):
        with closing(other):
            assert local_file(other) is None
