"""
What is read, or written, at once: small requests that take no more than a look at a table in memory.

That every kind reads and writes right, across all edges, is in test_read_kinds.py and test_write_model.py,
which come by here. This is about who answers, and about what must not be answered so.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import Disk, open_disk
from nbd_vmdk.alloc import Allocator
from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import Closed, OutOfRange, StorageError, Truncated, VmdkError, WriteRefused
from nbd_vmdk.extents.flat import FlatExtent
from nbd_vmdk.extents.writing import WritableSparseExtent
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.pages import Pages
from tests.engine import long_way, outside, same
from tests.images import desc, peek, poke
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image

GRAIN = 64 * KIB
# Nothing but data, more than a table of 2 MiB or of 512 KiB holds, and the last grain is no whole one.
FULL = Content.of(random.Random(1).randbytes(5 * MIB + 7 * SECTOR))
EMPTY = Content(FULL.size)
TEXT = Content.of(b"".join(b"%8d" % number for number in range(FULL.size // 8)))


def chain(folder: str, name: str) -> Image:
    rng = random.Random(3)
    image = desc.monolithic_sparse(folder, f"{name}-base", FULL)
    for number in range(3):
        own = Content(FULL.size)
        for grain in rng.sample(range(FULL.size // GRAIN), 20):
            own.put(grain * GRAIN, rng.randbytes(GRAIN))
        image = desc.monolithic_sparse(folder, f"{name}{number}", own, parent=image)
    return image


KINDS: dict[str, Callable[[str, str], Image]] = {
    "flat": lambda folder, name: desc.monolithic_flat(folder, name, FULL),
    "split flat": lambda folder, name: desc.split_flat(folder, name, FULL, 3001),
    "sparse": lambda folder, name: desc.monolithic_sparse(folder, name, FULL, grain_sectors=8, gtes=128),
    "split sparse": lambda folder, name: desc.split_sparse(folder, name, FULL, 3072),
    "COWD": lambda folder, name: desc.vmfs_sparse(folder, name, FULL, grain_sectors=16),
    "chain": chain,
}
#: What has grains to be made.
NEW: dict[str, Callable[[str, str], Image]] = {
    "sparse": lambda folder, name: desc.monolithic_sparse(folder, name, EMPTY, grain_sectors=8, gtes=128),
    "split sparse": lambda folder, name: desc.split_sparse(folder, name, EMPTY, 3072),
    "COWD": lambda folder, name: desc.vmfs_sparse(folder, name, EMPTY, grain_sectors=16),
}
#: What is read at once, and not written.
PACKED: dict[str, Callable[[str, str], Image]] = {
    "stream": lambda folder, name: desc.stream_optimized(folder, name, TEXT),
    "stream of noise": lambda folder, name: desc.stream_optimized(folder, name, FULL, level=0),
}


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[Any]:
    """Note whoever asks for a method of a class."""
    calls: list[Any] = []
    original = getattr(owner, name)

    def noting(self: Any, *args: Any) -> Any:
        calls.append(args)
        return original(self, *args)

    monkeypatch.setattr(owner, name, noting)
    return calls


def inside(disk: Disk, seed: int) -> list[tuple[int, int]]:
    """(offset, length) of ranges of any alignment, each in one piece of 512 bytes to 4 KiB; and the edges."""
    rng = random.Random(seed)
    grain = min(disk.links[0].grain, GRAIN) or SECTOR
    found = [(0, SECTOR), (disk.size - SECTOR, SECTOR), (disk.size - 1, 1)]
    while len(found) < 300:
        start, length = rng.randrange(disk.size), rng.randrange(1, 4 * KIB)
        if start // grain == (start + length - 1) // grain and start + length <= disk.size:
            extents = [entry.start for entry in disk.links[0].extents]
            if not any(start < edge < start + length for edge in extents):
                found.append((start, length))
    return found


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_who_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, writable: bool) -> None:
    image = KINDS[kind](str(tmp_path), "disk")
    with open_disk(image.path, writable=writable) as disk:
        same(disk.pread(disk.size, 0), image.visible.read(0, disk.size))  # brings the tables into memory
    asked = long_way(monkeypatch)
    with open_disk(image.path, writable=writable) as disk:
        ranges = inside(disk, seed=4)
        for offset, length in ranges:
            same(disk.pread(length, offset), image.visible.read(offset, length), offset)
        first = len(asked)
        for offset, length in ranges:
            same(disk.pread(length, offset), image.visible.read(offset, length), offset)
        if kind == "chain" and writable:
            assert first < len(asked) < first + len(ranges)  # what the top has, and nothing else
        else:
            assert len(asked) == first
        assert first == 0 if "flat" in kind else 0 < first < len(ranges)


@pytest.mark.parametrize("cache_size", [64 * MIB, MIB])
@pytest.mark.parametrize("kind", PACKED)
def test_who_reads_what_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cache_size: int
) -> None:
    """Grains in the cache, by their bytes or by where they are stored; with a small one many are not."""
    image = PACKED[kind](str(tmp_path), "disk")
    asked = long_way(monkeypatch)
    with open_disk(image.path, cache_size=cache_size) as disk:
        ranges = inside(disk, seed=7)
        for turn in range(3):
            first = len(asked)
            for offset, length in ranges:
                same(disk.pread(length, offset), image.visible.read(offset, length), offset)
            fewer = len(asked) - first
            if turn:
                assert fewer == 0 if cache_size > 8 * MIB else fewer < len(ranges)
        for offset in (-1, disk.size - 1, disk.size, 1 << 62):
            with pytest.raises(OutOfRange):
                disk.read_into(memoryview(bytearray(SECTOR)), offset)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "chain"])
def test_who_writes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    image = KINDS[kind](str(tmp_path), "disk")
    model = bytearray(image.visible.read(0, FULL.size))
    asked = [counted(monkeypatch, owner, "write") for owner in (FlatExtent, WritableSparseExtent)]
    rng = random.Random(5)
    with open_disk(image.path, writable=True) as disk:
        disk.pread(disk.size, 0)
        commits = disk.commits
        for offset, length in inside(disk, seed=6):
            data = rng.randbytes(length)
            disk.pwrite(data, offset)
            model[offset : offset + length] = data
        assert asked == [[], []]
        disk.flush()
        assert disk.commits == commits + 1
        same(disk.pread(disk.size, 0), bytes(model))
    with open_disk(image.path) as disk:
        same(disk.pread(disk.size, 0), bytes(model))


@pytest.mark.parametrize("kind", NEW)
def test_who_makes_new_grains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The first change of a table in a session goes the longer way, and no other."""
    image = NEW[kind](str(tmp_path), "disk")
    model = bytearray(FULL.size)
    asked = counted(monkeypatch, WritableSparseExtent, "write")
    rng = random.Random(8)
    with open_disk(image.path, writable=True) as disk:
        grain = disk.links[0].grain
        for parity in range(2):  # of the grains that are written to: the second half are new ones again
            for offset, length in inside(disk, seed=9):
                if offset // grain % 2 == parity:
                    data = rng.randbytes(length)
                    disk.pwrite(data, offset)
                    model[offset : offset + length] = data
            changed = [pages for member in disk._members for pages in member.tables[:1] if pages.dirty]
            if not parity:
                tables = sum(len(pages.dirty) for pages in changed)
            assert changed
            assert len(asked) == tables < 50
            disk.flush()
            same(disk.pread(disk.size, 0), bytes(model))
    with open_disk(image.path) as disk:
        same(disk.pread(disk.size, 0), bytes(model))
    assert not check_image(image.path).findings


def test_new_grain_that_there_is_no_room_for(tmp_path: Path) -> None:
    """An error, a hole as before; and what did get written has gone when the space is used again."""
    image = NEW["sparse"](str(tmp_path), "disk")
    with open_disk(image.path, writable=True) as disk:
        disk.pwrite(b"first", 0)  # the table is changed, so what comes is made at once
        with pytest.MonkeyPatch.context() as patched:
            pwrite = os.pwrite

            def half(fd: int, data: Any, at: int) -> int:
                if len(data) <= 3:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return pwrite(fd, data[:3], at)

            patched.setattr(os, "pwrite", half)
            with pytest.raises(StorageError) as caught:
                disk.pwrite(b"secret", 8 * KIB)
        assert caught.value.errno == errno.ENOSPC
        assert not any(disk.pread(4 * KIB, 8 * KIB))
        disk.flush()
        size = os.path.getsize(image.path)
        disk.pwrite(b"x", 8 * KIB)
        same(disk.pread(4 * KIB, 8 * KIB), b"x" + bytes(4 * KIB - 1))
        disk.flush()
        assert os.path.getsize(image.path) == size
    assert not check_image(image.path).findings


def test_two_writers_of_a_new_grain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second waits until there is one, and writes into it."""
    taken: list[int] = []
    take = Allocator.take_grains

    def taking(self: Allocator, count: int) -> int:
        taken.append(take(self, count))
        if len(taken) == 2:
            second.start()
            second.join(0.2)
        return taken[-1]

    monkeypatch.setattr(Allocator, "take_grains", taking)
    image = NEW["sparse"](str(tmp_path), "disk")
    with open_disk(image.path, writable=True) as disk:
        second = threading.Thread(target=disk.pwrite, args=(b"b" * SECTOR, 8 * KIB + SECTOR))
        disk.pwrite(b"first", 0)
        disk.pwrite(b"a" * SECTOR, 8 * KIB)
        second.join()
        assert len(taken) == 2
        same(disk.pread(4 * KIB, 8 * KIB), b"a" * SECTOR + b"b" * SECTOR + bytes(4 * KIB - 2 * SECTOR))


@pytest.mark.parametrize("moment", ["before", "written before", "after"])
def test_table_that_is_forgotten_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Other tables push it out of the cache, before a new grain is made or while that is written."""
    hooks: list[Callable[[], None]] = []
    lock, pwrite = Pages.lock, os.pwrite

    def locking(self: Pages, page: int) -> Any:
        while hooks and moment != "after":
            hooks.pop()()
        return lock(self, page)

    def writing(fd: int, data: Any, at: int) -> int:
        while hooks and moment == "after":
            hooks.pop()()
        return pwrite(fd, data, at)

    monkeypatch.setattr(Pages, "lock", locking)
    monkeypatch.setattr(os, "pwrite", writing)
    image = NEW["sparse"](str(tmp_path), "disk")
    model = bytearray(64 * KIB)

    def write(data: bytes, offset: int) -> None:
        disk.pwrite(data, offset)
        model[offset : offset + len(data)] = data

    with open_disk(image.path, writable=True) as disk:
        tables = disk._members[0].tables[0]
        assert isinstance(tables, Pages)

        def forget() -> None:
            if moment == "written before":
                tables.clean.drop(0)  # so that it is another array that is changed
                write(b"b" * SECTOR, 8 * KIB + SECTOR)
                disk.flush()
            assert 0 not in tables.pinned
            tables.clean.drop(0)

        write(b"first", 0)
        disk.flush()
        hooks.append(forget)
        write(b"a" * SECTOR, 8 * KIB)
        assert not hooks
        same(disk.pread(len(model), 0), bytes(model))
    with open_disk(image.path) as disk:
        same(disk.pread(len(model), 0), bytes(model))
    assert not check_image(image.path).findings


def test_table_that_holds_nothing_again(tmp_path: Path) -> None:
    """One array stands for all of them in memory, which must not be changed."""
    image = NEW["sparse"](str(tmp_path), "disk")
    with open_disk(image.path, writable=True) as disk:
        tables = disk._members[0].tables[0]
        assert isinstance(tables, Pages)
        for data in (b"a" * SECTOR, b"b" * SECTOR):
            disk.pwrite(data, 0)
            same(disk.pread(2 * SECTOR, 0), data + bytes(SECTOR))
            assert not any(disk.pread(MIB, MIB)), "another table is changed, too"
            disk.trim(8 * KIB, 0)
            disk.flush()
            tables.clean.drop(0)
            assert not any(disk.pread(SECTOR, 0))
            assert tables.get(0) is tables.empty
        disk.pwrite(b"c", 0)
        assert not any(tables.empty)
    assert not check_image(image.path).findings


@pytest.mark.parametrize("kind", ["hosted", "COWD"])
@pytest.mark.parametrize("committed", [False, True])
def test_damaged_entry_of_a_table_that_is_changed(tmp_path: Path, kind: str, committed: bool) -> None:
    """It is refused whoever meets it, and stays what it is."""
    if kind == "COWD":
        image = desc.vmfs_sparse(str(tmp_path), "disk", Content(MIB).put(0, b"x"), grain_sectors=16)
        extent: Any = image.cowd()
    else:
        image = desc.monolithic_sparse(str(tmp_path), "disk", Content(MIB).put(0, b"x"), grain_sectors=16)
        extent = image.hosted()
    place = extent.gte_at(2)
    with open_disk(image.path, writable=True) as disk:
        poke(extent.path, place, b"\2\0\0\0")  # had it been there before, the disk would be read only
        for _ in range(2):
            disk.pwrite(b"new", 8 * KIB)  # the table is changed, and may be changed at once from then on
            if committed:
                disk.flush()
            for length in (1, SECTOR, 8 * KIB):
                with pytest.raises(VmdkError, match="grain 2"):
                    disk.pwrite(b"y" * length, 16 * KIB)
        disk.pwrite(b"z", 24 * KIB)
        same(disk.pread(1, 24 * KIB), b"z")
    assert peek(extent.path, place, 4) == b"\2\0\0\0"


@pytest.mark.parametrize("split", [False, True])
def test_new_grains_of_a_child(tmp_path: Path, split: bool) -> None:
    """What is not written is the parent's, so a new grain is more than what is written."""
    base = desc.monolithic_sparse(str(tmp_path), "base", FULL)
    if split:
        image = desc.split_sparse(str(tmp_path), "child", EMPTY, 3072, parent=base)
    else:
        image = desc.monolithic_sparse(str(tmp_path), "child", EMPTY, parent=base)
    with open_disk(image.path, writable=True) as disk:
        model = bytearray(FULL.read(0, FULL.size))
        for offset in range(0, disk.size, GRAIN):
            disk.pwrite(b"x", offset)
            model[offset] = ord("x")
        same(disk.pread(disk.size, 0), bytes(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writable", [False, True])
def test_outside(tmp_path: Path, kind: str, writable: bool) -> None:
    """A table's last entries may be for what lies beyond the disk's end, and have grains."""
    image = KINDS[kind](str(tmp_path), "disk")
    buf = memoryview(bytearray(SECTOR))
    with open_disk(image.path, writable=writable) as disk:
        disk.pread(disk.size, 0)
        for offset in outside(disk.size, GRAIN):
            with pytest.raises(OutOfRange):
                disk.read_into(buf, offset)
            if writable:
                with pytest.raises(OutOfRange):
                    disk.write_from(buf, offset)
        disk.read_into(buf[:0], disk.size)
        same(disk.pread(disk.size, 0), image.visible.read(0, disk.size))


@pytest.mark.parametrize("kind", KINDS)
def test_read_only(tmp_path: Path, kind: str) -> None:
    image = KINDS[kind](str(tmp_path), "disk")
    with open_disk(image.path) as disk:
        disk.pread(disk.size, 0)
        with pytest.raises(WriteRefused):
            disk.pwrite(b"x" * SECTOR, 0)
        same(disk.pread(SECTOR, 0), image.visible.read(0, SECTOR))


@pytest.mark.parametrize("kind", KINDS)
def test_closed(tmp_path: Path, kind: str) -> None:
    """The number of a closed file may be another file's by then, and who kept the function still reads."""
    image = KINDS[kind](str(tmp_path), "disk")
    disk = open_disk(image.path)
    disk.pread(disk.size, 0)
    read_into = disk.read_into
    disk.close()
    others = []
    for number in range(8):
        path = tmp_path / f"other{number}"
        path.write_bytes(b"other" * MIB)
        others.append(os.open(path, os.O_RDWR))
    try:
        buf = bytearray(SECTOR)
        with pytest.raises(StorageError):
            read_into(memoryview(buf), SECTOR)
        with pytest.raises(Closed):
            disk.read_into(memoryview(buf), SECTOR)
        assert not any(buf)
    finally:
        for fd in others:
            os.close(fd)


@pytest.mark.parametrize("kind", ["flat", "sparse", "COWD"])
def test_file_that_was_cut_off(tmp_path: Path, kind: str) -> None:
    """Reading what is not there any more is an error, not zeros."""
    image = KINDS[kind](str(tmp_path), "disk")
    data = str(tmp_path / "disk-flat.vmdk") if kind == "flat" else str(image.path)
    if kind == "COWD":
        data = next(str(path) for path in tmp_path.iterdir() if path.stat().st_size > MIB)
    with open_disk(image.path) as disk:
        disk.pread(disk.size, 0)
        os.truncate(data, os.path.getsize(data) - GRAIN)
        failures = 0
        for offset in range(0, disk.size - SECTOR, 4 * KIB):
            try:
                same(disk.pread(SECTOR, offset), image.visible.read(offset, SECTOR), offset)
            except Truncated:
                failures += 1
        assert 0 < failures <= GRAIN // (4 * KIB) + 1


def test_cut_off_while_it_is_written_to(tmp_path: Path) -> None:
    """Writing over what was cut off would make the file longer, with a hole for what others had there."""
    image = desc.monolithic_sparse(str(tmp_path), "disk", FULL)
    disk = open_disk(image.path, writable=True)
    disk.pread(disk.size, 0)
    [last] = disk.runs(disk.size - SECTOR, SECTOR)
    assert last.at is not None
    with pytest.MonkeyPatch.context() as patched:
        # As it is told to who opens a file that was cut off before.
        extent = disk._members[0]
        assert isinstance(extent, WritableSparseExtent)
        patched.setattr(extent._allocator, "_end", last.at)
        with pytest.raises(VmdkError, match="beyond the end of the file"):
            disk.pwrite(b"x" * SECTOR, disk.size - SECTOR)
    same(disk.pread(SECTOR, disk.size - SECTOR), image.visible.read(disk.size - SECTOR, SECTOR))
    disk.close()


def test_read_while_it_changes_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look into the table and the read a grain is freed and given to other bytes of the guest."""
    image = desc.monolithic_sparse(str(tmp_path), "disk", FULL.resized(16 * MIB), zero_gte=True)
    hooks: list[Callable[[int], None]] = []
    preadv = os.preadv

    def reading(fd: int, buffers: Any, at: int) -> int:
        for hook in hooks:
            hook(at)
        return preadv(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", reading)
    with open_disk(image.path, writable=True) as disk:
        disk.pread(SECTOR, 0)
        [run] = disk.runs(GRAIN, GRAIN)

        def once(at: int) -> None:
            if at == run.at:
                hooks.clear()
                disk.trim(GRAIN, GRAIN, fua=True)
                disk.pwrite(b"secret" * 1000, 8 * MIB)

        hooks.append(once)
        found = disk.pread(GRAIN, GRAIN)
        assert not hooks
        [other] = disk.runs(8 * MIB, GRAIN)
        assert other.at == run.at, "the space was not used again, so this proves nothing"
        same(found, bytes(GRAIN))


def test_extents_that_may_not_be_had(tmp_path: Path) -> None:
    rows = [
        desc.Row(access, "FLAT", FULL.resized(MIB), f"disk-f00{number}.vmdk")
        for number, access in enumerate(("RW", "RDONLY", "NOACCESS"), 1)
    ]
    image = desc.custom(str(tmp_path), "disk", rows, create_type="custom")
    with open_disk(image.path, writable=True) as disk:
        for _ in range(2):
            disk.pwrite(b"x" * SECTOR, MIB - SECTOR)
            same(disk.pread(SECTOR, MIB - SECTOR), b"x" * SECTOR)
            same(disk.pread(SECTOR, MIB), FULL.read(0, SECTOR))
            with pytest.raises(WriteRefused):
                disk.pwrite(b"x" * SECTOR, MIB)
            for call in (lambda: disk.pread(1, 2 * MIB), lambda: disk.pwrite(b"x", 2 * MIB)):
                with pytest.raises(VmdkError):
                    call()


def test_generations_of_a_cache() -> None:
    """Two parts and a common budget: what was asked for lately stays, and nothing is another's."""
    cache = Cache(10_000)
    one, two = cache.part(), cache.part()
    one.put(1, b"one" * 300)
    two.put(1, b"two" * 300)
    for key in range(2, 40):
        two.put(key, bytes(1000))
        assert one.get(1) == b"one" * 300
        assert sum(len(part.young) + len(part.old) for part in (one, two)) < 14
    assert two.get(1) is None
    one.drop(1)
    assert one.get(1) is None
    one.put(1, bytes(6000))  # more than half of it all
    assert one.get(1) is None


def test_written_over_after_it_was_freed(tmp_path: Path) -> None:
    """A grain that is trimmed is nobody's: what comes later makes a new one."""
    image = desc.monolithic_sparse(str(tmp_path), "disk", FULL, zero_gte=True)
    with open_disk(image.path, writable=True) as disk:
        disk.pread(disk.size, 0)
        disk.pwrite(b"a" * SECTOR, GRAIN)
        disk.zero(GRAIN, GRAIN, may_trim=True)
        assert not any(disk.pread(GRAIN, GRAIN))
        disk.pwrite(b"b" * SECTOR, GRAIN)
        same(disk.pread(GRAIN, GRAIN), b"b" * SECTOR + bytes(GRAIN - SECTOR))
        disk.flush()
        disk.pwrite(b"c" * SECTOR, GRAIN)
        same(disk.pread(GRAIN, GRAIN), b"c" * SECTOR + bytes(GRAIN - SECTOR))


def test_admitted_again(tmp_path: Path) -> None:
    """Too much is held, and then nothing: whoever only writes over data does not pay a commit for each."""
    image = desc.monolithic_sparse(str(tmp_path), "disk", FULL)
    with open_disk(image.path, writable=True) as disk:
        disk.pread(disk.size, 0)
        disk._committer.admits = False  # as one who was late may leave it
        for number in range(10):
            disk.pwrite(b"a" * SECTOR, number * SECTOR)
        assert disk.commits <= 1


def test_latched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a sync has failed nothing is written over either."""
    image = desc.monolithic_sparse(str(tmp_path), "disk", FULL)
    disk = open_disk(image.path, writable=True)
    disk.pread(disk.size, 0)
    disk.pwrite(b"a" * SECTOR, 0)

    def failing(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", failing)
        with pytest.raises(StorageError):
            disk.flush()
    with pytest.raises(VmdkError, match="sync"):
        disk.pwrite(b"b" * SECTOR, 0)
    same(disk.pread(SECTOR, 0), b"a" * SECTOR)
    with pytest.raises(VmdkError):
        disk.close()


def test_writes_across_the_edge_of_two_extents(tmp_path: Path) -> None:
    """An extent's last grain need not be whole: its rest is not the place of what the next one has."""
    image = desc.split_sparse(str(tmp_path), "disk", EMPTY, 3001)
    edge = 3001 * SECTOR
    with open_disk(image.path, writable=True) as disk:
        disk.pwrite(b"a", edge - GRAIN)
        for data in (b"b" * 2 * SECTOR, b"c" * 2 * SECTOR):  # new grains, then what is there
            disk.pwrite(data, edge - SECTOR)
            same(disk.pread(4 * SECTOR, edge - 2 * SECTOR), bytes(SECTOR) + data + bytes(SECTOR))
