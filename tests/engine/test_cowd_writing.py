"""COWD extents written in place: tables on demand, freeSector, the unclean flag, other readers afterwards."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import Disk, VmdkError, commit, open_disk
from nbd_vmdk.errors import BadField, NotFast
from nbd_vmdk.extents import cowd as cowd_extents
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.opening import open_in
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.repair import apply_repair
from nbd_vmdk.options import OpenOptions
from tests.engine import refused, same
from tests.images import desc, peek, poke
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.cowd import FREE_SECTOR_AT, GTES, UNCLEAN_AT
from tests.images.desc import Image
from tests.order import check_order
from tests.recording import RecordingFolder
from tests.sound import check_sound, read_tables

#: Guest bytes of a table with grains of a sector.
TABLE = GTES * SECTOR


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def delta(folder: Path, size: int = 5 * MIB, **options: Any) -> Image:
    """Some grains of the first table hold data, the others of 5 MiB nothing."""
    return desc.vmfs_sparse(str(folder), "top", Content(size).put(4 * KIB, noise(8 * KIB)), **options)


def over_flat(folder: Path, size: int = 5 * MIB, **options: Any) -> Image:
    """The same over a parent full of data."""
    return delta(folder, size, parent=desc.vmfs(str(folder), "base", Content.of(noise(size, 9))), **options)


def writable(image: Image, **options: Any) -> Disk:
    disk = open_disk(image.path, writable=True, **options)
    assert disk.writable
    return disk


def free_sector(image: Image) -> int:
    return image.cowd().stored_free_sector()


def flag(image: Image) -> bytes:
    return peek(image.cowd().path, UNCLEAN_AT, 4)


def slugs(image: Image) -> set[str]:
    return {finding.slug for finding in check_image(image.path).findings}


def qemu_reads(image: Image) -> bytes:
    raw = f"{image.path}.raw"
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", image.path, raw], check=True)
    with open(raw, "rb") as file:
        return file.read()


def test_tables_come_with_their_first_grain(tmp_path: Path) -> None:
    image = delta(tmp_path)
    before = os.path.getsize(image.cowd().path)
    model = bytearray(image.visible.read())
    with writable(image) as disk:
        disk.zero(MIB, 2 * TABLE)  # nothing is there, nothing is made
        disk.trim(MIB, 2 * TABLE)
        disk.pwrite(b"x" * 100, TABLE + 7)
        model[TABLE + 7 : TABLE + 107] = b"x" * 100
        disk.flush()
        assert flag(image) == b"\1\0\0\0"
        # A table and a grain, and freeSector behind both before the file is closed.
        assert free_sector(image) * SECTOR == before + 16 * KIB + SECTOR
    tables = check_sound(image.cowd().path)
    assert [bool(entry) for entry in tables.gd] == [True, True, False]
    assert flag(image) == bytes(4)
    assert os.path.getsize(image.cowd().path) == free_sector(image) * SECTOR
    same(qemu_reads(image), bytes(model))
    assert not slugs(image)


def test_nothing_written_nothing_changed(tmp_path: Path) -> None:
    image = delta(tmp_path, grow_to=MIB, free_sector=5)
    before = {path: peek(path, 0, os.path.getsize(path)) for path in image.files}
    with writable(image) as disk:
        disk.flush()
        disk.trim(TABLE, TABLE)
    assert {path: peek(path, 0, os.path.getsize(path)) for path in image.files} == before


@pytest.mark.parametrize("stale", [0, 5, 60, 1 << 31])
def test_free_sector_is_never_believed(tmp_path: Path, stale: int) -> None:
    """Too low it leads into grains, too high behind the end; once something is written it is right."""
    image = delta(tmp_path, free_sector=stale)
    model = bytearray(image.visible.read())
    with writable(image) as disk:
        disk.pwrite(noise(64 * KIB, 2), 3 * MIB)
        model[3 * MIB : 3 * MIB + 64 * KIB] = noise(64 * KIB, 2)
        same(disk.pread(disk.size, 0), bytes(model))
    check_sound(image.cowd().path)
    assert not slugs(image)
    same(qemu_reads(image), bytes(model))


def test_a_host_s_tail_is_left(tmp_path: Path) -> None:
    """What lies behind freeSector in a file that a host has lengthened may be anything."""
    image = delta(tmp_path, grow_to=MIB)
    path, used = image.cowd().path, image.cowd().free_sector * SECTOR
    poke(path, used, b"\xee" * (MIB - used))
    with writable(image) as disk:
        disk.pwrite(b"x", 4 * MIB)
        assert not any(disk.pread(SECTOR - 1, 4 * MIB + 1))
    assert min(at for at in check_sound(path).grains.values() if at >= used) > MIB
    assert peek(path, used, MIB - used) == b"\xee" * (MIB - used)


def test_qemu_writes_then_we_do(tmp_path: Path) -> None:
    """QEMU appends and leaves freeSector as it was.  (Where there is no table it writes over the header.)"""
    image = delta(tmp_path)
    model = bytearray(image.visible.read())
    stale = free_sector(image)
    line = f"write -P 0x5a {MIB} 128k"
    subprocess.run(["qemu-io", "-f", "vmdk", "-c", line, image.path], check=True, capture_output=True)
    model[MIB : MIB + 128 * KIB] = b"\x5a" * 128 * KIB
    assert free_sector(image) == stale
    with writable(image) as disk:
        same(disk.pread(disk.size, 0), bytes(model))
        for at, length in ((0, 100), (MIB + 5, 3000), (4 * MIB + 1, 70_000)):
            data = noise(length, at)
            disk.pwrite(data, at)
            model[at : at + length] = data
    check_sound(image.cowd().path)
    same(qemu_reads(image), bytes(model))
    line = f"write -P 0xa5 {MIB + 512} 64k"
    subprocess.run(["qemu-io", "-f", "vmdk", "-c", line, image.path], check=True, capture_output=True)
    model[MIB + 512 : MIB + 512 + 64 * KIB] = b"\xa5" * 64 * KIB
    with writable(image) as disk:
        same(disk.pread(disk.size, 0), bytes(model))


def test_zeroing_over_a_parent_writes_zeros(tmp_path: Path) -> None:
    """No entry says zeros: it can't be fast, except where grains of its own are there to be zeroed."""
    image = over_flat(tmp_path)
    model = bytearray(image.visible.read())
    with writable(image) as disk:
        for offset, length in ((MIB, SECTOR), (4 * KIB, 64 * KIB), (3, 1)):
            with pytest.raises(NotFast) as caught:
                disk.zero(length, offset, may_trim=True, fast=True)
            assert caught.value.errno == errno.ENOTSUP
        same(disk.pread(disk.size, 0), bytes(model))
        disk.zero(8 * KIB, 4 * KIB, may_trim=True, fast=True)
        disk.zero(70 * KIB, TABLE - KIB, may_trim=True)
        for offset, length in ((4 * KIB, 8 * KIB), (TABLE - KIB, 70 * KIB)):
            model[offset : offset + length] = bytes(length)
        disk.trim(MIB, 3 * MIB)  # the parent shows through
        same(disk.pread(disk.size, 0), bytes(model))
        assert {run.kind for run in disk.runs(TABLE - KIB, 70 * KIB)} == {Kind.DATA}
    check_sound(image.cowd().path)
    same(qemu_reads(image), bytes(model))


def test_without_a_parent_zeros_free_grains(tmp_path: Path) -> None:
    """A freed grain is given out again once the entry that freed it is durable, and not before."""
    image = delta(tmp_path)
    path = image.cowd().path
    before = read_tables(path).grains
    with writable(image) as disk:
        disk.zero(4 * KIB, 4 * KIB, may_trim=True, fast=True)
        disk.trim(4 * KIB, 8 * KIB)
        assert not any(disk.pread(disk.size, 0))
        disk.pwrite(noise(4 * KIB, 3), 20 * KIB)
        grown = os.path.getsize(path)
        disk.flush()
        disk.pwrite(noise(8 * KIB, 4), 40 * KIB)
        disk.flush()
        assert os.path.getsize(path) == grown
    after = check_sound(path).grains
    assert set(range(8, 24)).isdisjoint(after)
    assert sorted(after[index] for index in range(80, 96)) == sorted(before.values())
    assert not slugs(image)


@pytest.mark.parametrize("grain", [1, 8, 2048])
def test_order_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grain: int) -> None:
    """Data, flag, freeSector and content ID are durable before tables and directory are written."""
    monkeypatch.setattr(commit, "_MAX_AGE", 3600.0)
    over_flat(tmp_path, 5 * MIB, grain_sectors=grain)
    folder = RecordingFolder.load(str(tmp_path))
    with open_in(folder, "top.vmdk", OpenOptions(writable=True)) as disk:
        model = bytearray(disk.pread(disk.size, 0))
        rng = random.Random(grain)
        for turn in range(30):
            offset = rng.randrange(disk.size - 20_000)
            data = rng.randbytes(rng.randrange(1, 20_000))
            disk.pwrite(data, offset)
            model[offset : offset + len(data)] = data
            if turn % 4 == 0:
                disk.flush()
                folder.log.mark("flushed")
        same(disk.pread(disk.size, 0), bytes(model))
    assert check_order(folder, "top.vmdk") >= 4
    assert not [event for event in folder.log.events if event.file == "base-flat.vmdk"]
    with open_in(folder, "top.vmdk", OpenOptions(locks=False)) as disk:
        same(disk.pread(disk.size, 0), bytes(model))


def test_a_flag_that_a_crash_left_stays(tmp_path: Path) -> None:
    """It is not ours to clear; a repair, which looks at everything, clears it."""
    image = delta(tmp_path, unclean=True)
    with writable(image) as disk:
        assert any("not closed cleanly" in warning for warning in disk.warnings)
        disk.pwrite(b"x" * 1000, MIB)
    assert flag(image) == b"\1\0\0\0"
    assert slugs(image) == {"unclean"}
    apply_repair(image.path)
    assert flag(image) == bytes(4)
    assert not slugs(image)


def test_the_last_sector_that_free_sector_can_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file ends where 32 bits do: ENOSPC, and what has a place goes on."""
    image = delta(tmp_path)
    end = os.path.getsize(image.cowd().path) + 16 * KIB + 4 * SECTOR
    monkeypatch.setattr(cowd_extents, "MAX_END", end)
    with writable(image) as disk:
        disk.pwrite(b"a" * 4 * SECTOR, TABLE)
        for data, at in ((b"b", TABLE + 4 * SECTOR), (b"c" * 3 * SECTOR, MIB), (b"d", 2 * TABLE)):
            with pytest.raises(VmdkError) as caught:
                disk.pwrite(data, at)
            assert caught.value.errno == errno.ENOSPC
        disk.pwrite(b"e" * 4 * SECTOR, TABLE)
        disk.trim(SECTOR, TABLE)
        disk.flush()
        disk.pwrite(b"f", MIB)
    assert os.path.getsize(image.cowd().path) == end
    check_sound(image.cowd().path)
    with open_disk(image.path) as disk:
        same(disk.pread(4 * SECTOR, TABLE), bytes(SECTOR) + b"e" * 3 * SECTOR)
        assert disk.pread(1, MIB) == b"f"


def test_versions_before_1_are_only_read(tmp_path: Path) -> None:
    image = delta(tmp_path, version=0)
    with open_disk(image.path, writable=True) as disk:
        assert not disk.writable
        assert any("COWD" in warning and "read-only" in warning for warning in disk.warnings)


@pytest.mark.parametrize("mark", [{"unclean": True}, {"flags": 7}])
@pytest.mark.parametrize("sector", [1, 36, 1 << 30])
def test_a_large_one_that_was_left_open_is_vetted(tmp_path: Path, mark: dict[str, Any], sector: int) -> None:
    """An entry that leads into a table, or nowhere: who writes there destroys something else."""
    image = delta(tmp_path, 300 * MIB, **mark)
    extent = image.cowd()
    poke(extent.path, extent.gte_at(8), sector.to_bytes(4, "little"))
    error = refused(image.path, BadField, writable=True)
    assert "repair" in str(error.hint)
    with open_disk(image.path) as disk:
        same(disk.pread(KIB, 5 * KIB), noise(8 * KIB)[KIB : 2 * KIB])


def test_the_header_of_a_writer(tmp_path: Path) -> None:
    """Of the header freeSector and the flag change, and nothing else."""
    image = over_flat(tmp_path, flags=3, generation=7, saved_generation=7)
    before = bytearray(peek(image.cowd().path, 0, 2048))
    with writable(image) as disk:
        disk.pwrite(noise(MIB, 5), MIB + 3, fua=True)
    after = bytearray(peek(image.cowd().path, 0, 2048))
    assert after != before
    after[FREE_SECTOR_AT : FREE_SECTOR_AT + 4] = before[FREE_SECTOR_AT : FREE_SECTOR_AT + 4]
    assert after == before


def test_long_requests_are_committed_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each freed grain is remembered until a commit: of grains of a sector a few MiB are too many at once."""
    monkeypatch.setattr(commit, "MAX_PINNED", 64 * KIB)
    monkeypatch.setattr("nbd_vmdk.link._STEP_GRAINS", 512)
    image = desc.vmfs_sparse(str(tmp_path), "top", Content.of(noise(5 * MIB)))
    most = 0
    with writable(image) as disk:
        extent = disk._members[0]
        take_freed = extent.take_freed

        def watched() -> list[int]:
            nonlocal most
            most = max(most, extent.held)
            return take_freed()

        monkeypatch.setattr(extent, "take_freed", watched)
        disk.trim(disk.size, 0)
        assert 0 < most < 512 * KIB
        assert not any(disk.pread(disk.size, 0))
    assert not check_sound(image.cowd().path).grains
