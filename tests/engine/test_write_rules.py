"""What may be written, what may not, and what zeroing, trimming and copy-on-write do to the files."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import subprocess
import threading
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from nbd_vmdk import Disk, VmdkError, create_image, open_disk
from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import InUse, NotFast, OutOfRange, StorageError, WriteRefused
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.opening import open_found
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.storage import local
from nbd_vmdk.vm import locate
from tests.engine import refused, same, unreadable
from tests.images import desc
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image, Row
from tests.sound import check_sound, read_tables

GRAIN = 64 * KIB


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def hosted(folder: Any, name: str = "top", grains: int = 4, **options: Any) -> Image:
    """The first grains hold data, the rest of 2 MiB nothing."""
    content = Content(2 * MIB).put(0, noise(grains * GRAIN)) if grains else Content(2 * MIB)
    return desc.monolithic_sparse(str(folder), name, content, **options)


def over_base(folder: Any, **options: Any) -> Image:
    """A child whose first grain holds data, over a parent full of data."""
    base = desc.monolithic_flat(str(folder), "base", Content.of(noise(2 * MIB, 9)))
    return hosted(folder, grains=1, parent=base, **options)


def writable(image: Image | str, **options: Any) -> Disk:
    disk = open_disk(image if isinstance(image, str) else image.path, writable=True, **options)
    assert disk.writable
    return disk


def forbidden(call: Callable[[], None]) -> WriteRefused:
    with pytest.raises(WriteRefused) as caught:
        call()
    assert caught.value.errno == errno.EPERM
    return caught.value


def test_what_to_do_where_nothing_can_be_written(tmp_path: Any) -> None:
    plain = hosted(tmp_path).path
    stream = desc.stream_optimized(str(tmp_path), "stream", Content.of(noise(MIB))).path
    of_a_snapshot = replace(locate(plain), frozen=True)
    ask = "to write to it, open it with writable=True"
    copy = "its warnings tell why; 'nbd-vmdk convert' makes a copy that can be written"
    for disk, hint in (
        (open_disk(plain), ask),
        (open_disk(stream), ask),
        (open_disk(stream, writable=True), copy),
        (open_found(of_a_snapshot, OpenOptions()), ask),
        (open_found(of_a_snapshot, OpenOptions(writable=True)), copy),
    ):
        with disk:
            assert bool(disk.warnings) is (hint == copy)
            assert forbidden(partial(disk.pwrite, b"new", 0)).hint == hint
            assert forbidden(partial(disk.zero, SECTOR, 0)).hint == hint
            assert forbidden(partial(disk.trim, SECTOR, 0)).hint == hint


def blocks(path: str) -> int:
    return os.stat(path).st_blocks * 512


def everything(folder: Any) -> dict[str, bytes]:
    found = {}
    for entry in sorted(os.listdir(folder)):
        with open(os.path.join(folder, entry), "rb") as file:
            found[entry] = file.read()
    return found


# Who may be written.


def patchwork(folder: Any) -> Image:
    """RW, RDONLY, ZERO, NOACCESS, RW; each of 64 KiB."""
    piece = Content.of(noise(GRAIN))
    rows = [
        Row("RW", "FLAT", piece, offset=0),
        Row("RDONLY", "FLAT", piece, offset=0),
        Row("RW", "ZERO", Content(GRAIN)),
        Row("NOACCESS", "FLAT", piece, offset=0),
        Row("RW", "SPARSE", piece),
    ]
    return desc.custom(str(folder), "top", rows)


@pytest.mark.parametrize("foreign", ["RW", "RDONLY"])
def test_two_names_of_one_file(tmp_path: Any, foreign: str) -> None:
    """One as it was on another machine: the file is opened once, for writing, before an extent has it."""
    old = noise(2 * GRAIN)
    (tmp_path / "disk-flat.vmdk").write_bytes(old)
    names = dict.fromkeys(("RDONLY", "RW"), "disk-flat.vmdk")
    names[foreign] = "C:\\vm\\disk-flat.vmdk"
    count = GRAIN // SECTOR
    extents = [(access, count, "FLAT", name, at * count) for at, (access, name) in enumerate(names.items())]
    (tmp_path / "disk.vmdk").write_bytes(desc.descriptor("custom", extents))
    with open_disk(tmp_path / "disk.vmdk", writable=True) as disk:
        disk.pwrite(b"new", GRAIN)
        same(disk.pread(2 * GRAIN, 0), old[:GRAIN] + b"new" + old[GRAIN + 3 :])


def test_ranges_that_cannot_be_written(tmp_path: Any) -> None:
    image = patchwork(tmp_path)
    rdonly, zero, noaccess, last = GRAIN, 2 * GRAIN, 3 * GRAIN, 4 * GRAIN
    with writable(image) as disk:
        for at in (rdonly, zero, noaccess, rdonly - 1, last - 1):
            forbidden(lambda at=at: disk.pwrite(b"xx", at))
        for at in (rdonly, noaccess, rdonly - 1, last - 1):
            forbidden(lambda at=at: disk.zero(2, at))
            forbidden(lambda at=at: disk.zero(2, at, fast=True))
            forbidden(lambda at=at: disk.trim(2, at))
        error = forbidden(lambda: disk.pwrite(b"xx", rdonly - 1))
        assert "RDONLY" in str(error)
        assert str(error.hint).endswith(f": nbd-vmdk snapshot create {image.path}")
        assert "ZERO" in str(forbidden(lambda: disk.pwrite(b"xx", zero)))
        disk.zero(GRAIN, zero)
        disk.zero(GRAIN, zero, may_trim=True, fast=True, fua=True)
        disk.trim(100, zero + 7)
        same(disk.pread(3 * GRAIN, 0), noise(GRAIN) * 2 + bytes(GRAIN))
        unreadable(disk, noaccess, 1)
        disk.flush()
    # Nothing of a refused request was done, not even its part in a range that may be written.
    with open_disk(image.path) as disk:
        same(disk.pread(2 * GRAIN, 0), noise(GRAIN) * 2)
        same(disk.pread(GRAIN, last), noise(GRAIN))
    with writable(image) as disk:
        disk.pwrite(b"a" * 5, rdonly - 5)
        disk.pwrite(b"b", last)
    with open_disk(image.path) as disk:
        same(disk.pread(5, rdonly - 5), b"aaaaa")
        same(disk.pread(1, last), b"b")


def test_noaccess_zero_range(tmp_path: Any) -> None:
    rows = [Row("RW", "FLAT", Content(GRAIN), offset=0), Row("NOACCESS", "ZERO", Content(GRAIN))]
    with writable(desc.custom(str(tmp_path), "top", rows)) as disk:
        assert not any(disk.pread(2 * GRAIN, 0))
        forbidden(lambda: disk.pwrite(b"x", GRAIN))
        disk.zero(2 * GRAIN, 0)
        disk.trim(GRAIN, GRAIN)


def test_a_buffer_is_written_by_its_bytes(tmp_path: Any) -> None:
    with writable(hosted(tmp_path, grains=0)) as disk:
        disk.pwrite(b"b" * GRAIN, GRAIN)
        disk.pwrite(b"c" * GRAIN, 3 * GRAIN)  # behind it in the file
        words = array("I", [7] * 256)
        for data in (words, memoryview(words)):
            disk.pwrite(data, 2 * GRAIN - 512)
            same(disk.pread(1024, 2 * GRAIN - 512), words.tobytes())
            same(disk.pread(GRAIN, 3 * GRAIN), b"c" * GRAIN)
            with pytest.raises(OutOfRange):
                disk.pwrite(data, disk.size - 512)
        disk.pwrite(b"", disk.size)


def test_requests_outside_the_disk(tmp_path: Any) -> None:
    with writable(hosted(tmp_path)) as disk:
        for call in (disk.zero, disk.trim):
            with pytest.raises(OutOfRange):
                call(-GRAIN, MIB)
        for offset, length in ((2 * MIB, 1), (2 * MIB - 1, 2), (-1, 1), (0, 2 * MIB + 1), (1 << 62, 1)):
            for call in (disk.zero, disk.trim):
                with pytest.raises(OutOfRange) as caught:
                    call(length, offset)
                assert caught.value.errno == errno.EINVAL
            with pytest.raises(OutOfRange):
                disk.pwrite(bytes(length), offset)
        disk.pwrite(b"", 2 * MIB)
        disk.zero(0, 2 * MIB)
        disk.trim(0, 2 * MIB)


def test_disk_opened_for_reading(tmp_path: Any) -> None:
    image = hosted(tmp_path)
    before = everything(tmp_path)
    with open_disk(image.path) as disk:
        assert not disk.writable
        assert not disk.can_fast_zero
        for call in (
            lambda: disk.pwrite(b"x", 0),
            lambda: disk.zero(1, 0),
            lambda: disk.trim(1, 0),
        ):
            forbidden(call)
        disk.flush()
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("maker", "word"),
    [
        (desc.stream_optimized, "streamOptimized"),
        (desc.se_sparse, "seSparse"),
    ],
)
def test_kinds_that_cannot_be_written(tmp_path: Any, maker: Callable[..., Image], word: str) -> None:
    image = maker(str(tmp_path), "top", Content(MIB).put(0, noise(GRAIN)))
    before = everything(tmp_path)
    with open_disk(image.path, writable=True) as disk:
        assert not disk.writable
        assert any(word in warning and "read-only" in warning for warning in disk.warnings)
        forbidden(lambda: disk.pwrite(b"x", 0))
        disk.flush()
    assert everything(tmp_path) == before


def test_other_downgrades(tmp_path: Any) -> None:
    cases = [
        hosted(tmp_path, "three", version=3),
        hosted(tmp_path, "rdonly", access="RDONLY"),
        desc.custom(str(tmp_path), "zero", [Row("RW", "ZERO", Content(MIB))]),
    ]
    for image, words in zip(cases, ("version 3", "allows no writing", "can be written"), strict=True):
        with open_disk(image.path, writable=True) as disk:
            assert not disk.writable
            assert any(words in warning and "read-only" in warning for warning in disk.warnings)


def test_one_writable_extent_makes_a_writable_disk(tmp_path: Any) -> None:
    rows = [
        Row("RW", "SPARSE", Content(GRAIN), builder="stream"),
        Row("RW", "SPARSE", Content(GRAIN)),
    ]
    with writable(desc.custom(str(tmp_path), "top", rows)) as disk:
        forbidden(lambda: disk.pwrite(b"x", 0))
        disk.pwrite(b"x", GRAIN)


def test_no_permission(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may open everything, so the kernel's answer to others is made up."""
    image = hosted(tmp_path)
    real = os.open

    def deny(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_ACCMODE == os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", deny)
    error = refused(image.path, StorageError, writable=True)
    assert error.errno == errno.EPERM
    assert "Permission denied" in str(error)
    assert error.hint is not None
    assert "-r" in error.hint
    open_disk(image.path).close()


# Zeroing and trimming.


def test_a_file_of_the_parent_is_not_written(tmp_path: Any) -> None:
    """Through a child that names it as its own, a guest would change what other links stand on."""
    content = Content.of(noise(2 * MIB))
    base = desc.monolithic_flat(str(tmp_path), "base", content)
    rows = [Row("RW", "FLAT", content, "base-flat.vmdk", 0)]
    child = desc.custom(str(tmp_path), "child", rows, parent=base)
    error = refused(child.path, WriteRefused, writable=True)
    assert "base-flat.vmdk is a file of its parent" in str(error)
    assert "-r" in str(error.hint)
    with open_disk(child.path) as disk:
        same(disk.pread(2 * MIB, 0), noise(2 * MIB))


@pytest.mark.parametrize("how", ["trim", "zero"])
def test_without_a_parent_the_grain_is_freed(tmp_path: Any, how: str) -> None:
    image = hosted(tmp_path)
    at = image.hosted().grain_at(1)
    before = blocks(image.path)
    with writable(image) as disk:
        disk.trim(GRAIN, GRAIN) if how == "trim" else disk.zero(GRAIN, GRAIN, may_trim=True)
        same(disk.pread(3 * GRAIN, 0), noise(GRAIN) + bytes(GRAIN) + noise(4 * GRAIN)[2 * GRAIN : 3 * GRAIN])
        assert blocks(image.path) == before, "space is given back before a crash could bring the entry back"
        disk.flush()
        assert blocks(image.path) == before - GRAIN
        assert [run.kind for run in disk.runs(GRAIN, GRAIN)] == [Kind.HOLE]
        # Durably free, so the next grain that is needed goes there.
        disk.pwrite(b"new", 1 * GRAIN)
        disk.flush()
    tables = check_sound(image.path)
    assert tables.entry(1) == (tables.entry(1)[1], tables.entry(1)[1])
    assert tables.grains[1] == at


def test_trim_of_all_gives_all_space_back(tmp_path: Any) -> None:
    image = hosted(tmp_path, grains=32)
    with writable(image) as disk:
        disk.trim(disk.size, 0)
        disk.flush()
        assert blocks(image.path) <= 128 * KIB
        assert not any(disk.pread(disk.size, 0))
    assert not check_sound(image.path).grains


@pytest.mark.parametrize("size", [GRAIN, 2 * MIB])
def test_zero_that_may_not_trim_keeps_its_space(tmp_path: Any, size: int) -> None:
    image = hosted(tmp_path, grains=32)
    before, places = blocks(image.path), read_tables(image.path).grains
    with writable(image) as disk:
        disk.zero(size, 0)
        disk.flush()
        assert not any(disk.pread(size, 0))
    assert check_sound(image.path).grains == places
    assert blocks(image.path) >= before


def test_part_of_a_grain_is_zeroed_in_its_place(tmp_path: Any) -> None:
    image = hosted(tmp_path)
    before, places = blocks(image.path), read_tables(image.path).grains
    with writable(image) as disk:
        disk.zero(16 * KIB, 4 * KIB, may_trim=True)
        disk.trim(16 * KIB, GRAIN + 4 * KIB)
        disk.zero(16 * KIB, 2 * GRAIN + 4 * KIB)
        disk.flush()
        for grain in range(3):
            wanted = bytearray(noise(4 * GRAIN)[grain * GRAIN : (grain + 1) * GRAIN])
            wanted[4 * KIB : 20 * KIB] = bytes(16 * KIB)
            same(disk.pread(GRAIN, grain * GRAIN), bytes(wanted))
    assert check_sound(image.path).grains == places
    # The file system may need a block more to note where the holes are.
    assert before - 2 * 16 * KIB <= blocks(image.path) <= before - 2 * 16 * KIB + 8 * KIB


@pytest.mark.parametrize("trim", [False, True])
def test_flag_bit_2_hides_the_parent(tmp_path: Any, trim: bool) -> None:
    """Over a parent, entry 1 in both copies; a grain that was there is freed."""
    image = over_base(tmp_path, zero_gte=True)
    before = blocks(image.path)
    with writable(image) as disk:
        for grain in (0, 5):
            if trim:
                disk.trim(GRAIN, grain * GRAIN)
            else:
                disk.zero(GRAIN, grain * GRAIN, may_trim=True, fast=True)
            assert not any(disk.pread(GRAIN, grain * GRAIN))
        same(disk.pread(GRAIN, GRAIN), noise(2 * MIB, 9)[GRAIN : 2 * GRAIN])
        disk.flush()
        assert blocks(image.path) == before - GRAIN
        assert [run.kind for run in disk.runs(5 * GRAIN, GRAIN)] == [Kind.ZERO]
    tables = check_sound(image.path)
    assert tables.entry(0) == tables.entry(5) == (1, 1)
    assert not tables.grains


def test_flag_bit_2_and_a_grain_that_keeps_its_space(tmp_path: Any) -> None:
    image = over_base(tmp_path, zero_gte=True)
    places = read_tables(image.path).grains
    with writable(image) as disk:
        disk.zero(2 * GRAIN, 0)
        assert not any(disk.pread(2 * GRAIN, 0))
    tables = check_sound(image.path)
    assert tables.grains == places
    assert tables.entry(1) == (1, 1)


def test_without_bit_2_zeros_are_written_over_the_parent(tmp_path: Any) -> None:
    image = over_base(tmp_path)
    with writable(image) as disk:
        disk.zero(GRAIN, 5 * GRAIN, may_trim=True)
        disk.zero(2 * GRAIN, 7 * GRAIN + 100)
        same(disk.pread(100, 7 * GRAIN), noise(2 * MIB, 9)[7 * GRAIN :][:100])
        assert not any(disk.pread(GRAIN, 5 * GRAIN))
        assert not any(disk.pread(2 * GRAIN, 7 * GRAIN + 100))
    tables = check_sound(image.path)
    assert set(tables.grains) == {0, 5, 7, 8, 9}
    assert tables.header.version == 1, "versions and flags never change in place"


def test_zeros_that_the_chain_shows_already_cost_nothing(tmp_path: Any) -> None:
    """A hole of the top is looked at through the parents, whose grains may be smaller than ours."""
    content = Content(2 * MIB).put(3 * GRAIN + 8 * KIB, noise(4 * KIB, 5)).put(20 * GRAIN, noise(GRAIN, 6))
    base = desc.monolithic_sparse(str(tmp_path), "base", content, grain_sectors=8)
    image = hosted(tmp_path, grains=0, parent=base)
    size = os.path.getsize(image.path)
    with writable(image) as disk:
        assert disk.can_fast_zero
        disk.zero(3 * GRAIN, 0, fast=True)
        disk.zero(16 * GRAIN, 4 * GRAIN, may_trim=True, fast=True)
        assert os.path.getsize(image.path) == size
        with pytest.raises(NotFast):
            disk.zero(GRAIN, 3 * GRAIN, may_trim=True, fast=True)
        disk.zero(2 * MIB, 0, may_trim=True)
        assert not any(disk.pread(2 * MIB, 0))
    assert set(check_sound(image.path).grains) == {3, 20}


def test_without_bit_2_trim_over_the_parent_has_no_effect(tmp_path: Any) -> None:
    image = over_base(tmp_path)
    before = blocks(image.path)
    with writable(image) as disk:
        disk.trim(GRAIN, 5 * GRAIN)
        same(disk.pread(GRAIN, 5 * GRAIN), noise(2 * MIB, 9)[5 * GRAIN : 6 * GRAIN])
        # A grain that is there can't say "zeros" either, but its blocks can go.
        disk.trim(GRAIN, 0)
        assert not any(disk.pread(GRAIN, 0))
        disk.flush()
        assert blocks(image.path) == before - GRAIN
    assert set(check_sound(image.path).grains) == {0}


FAST = [
    # What the image is, what is asked for (offset, length), and is it fast?
    ("base", 0, 2 * MIB, True),
    ("base", 100, 50, True),
    ("bit 2", 0, 2 * MIB, True),
    ("bit 2", GRAIN, GRAIN, True),
    ("bit 2", 100, 50, True),  # in a grain that is there
    ("bit 2", GRAIN + 100, 50, False),  # in one that is not: the rest must be copied
    ("bit 2", 0, GRAIN + 1, False),
    ("plain", 0, GRAIN, True),
    ("plain", 0, GRAIN + 1, False),
    ("plain", GRAIN, GRAIN, False),
    ("plain", 0, 2 * MIB, False),
]


@pytest.mark.parametrize(("kind", "offset", "length", "fast"), FAST)
@pytest.mark.parametrize("may_trim", [False, True])
def test_fast_zero(tmp_path: Any, kind: str, offset: int, length: int, fast: bool, may_trim: bool) -> None:
    """NotFast exactly where data would have to be written, and then nothing has changed."""
    makers: dict[str, Callable[[], Image]] = {
        "base": lambda: hosted(tmp_path),
        "bit 2": lambda: over_base(tmp_path, zero_gte=True),
        "plain": lambda: over_base(tmp_path),
    }
    image = makers[kind]()
    before = everything(tmp_path)
    model = bytearray(image.visible.read())
    with writable(image) as disk:
        assert disk.can_fast_zero
        if fast:
            disk.zero(length, offset, may_trim=may_trim, fast=True)
            model[offset : offset + length] = bytes(length)
        else:
            with pytest.raises(NotFast) as caught:
                disk.zero(length, offset, may_trim=may_trim, fast=True)
            assert caught.value.errno == errno.ENOTSUP
        same(disk.pread(2 * MIB, 0), bytes(model))
    if not fast:
        assert everything(tmp_path) == before
    check_sound(image.path)


@pytest.mark.parametrize("kind", ["flat", "sparse", "split"])
@pytest.mark.parametrize("may_trim", [False, True])
def test_fast_zero_where_the_file_system_can_not(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, kind: str, may_trim: bool
) -> None:
    """That it can't is tried out elsewhere: zeroing in place is never called fast, and nothing is changed."""
    content = Content.of(noise(2 * MIB))
    makers: dict[str, Callable[[], Image]] = {
        "flat": lambda: desc.monolithic_flat(str(tmp_path), "top", content),
        "sparse": lambda: desc.monolithic_sparse(str(tmp_path), "top", content),
        "split": lambda: desc.split_sparse(str(tmp_path), "top", content, MIB // SECTOR),
    }
    image = makers[kind]()
    model = bytearray(content.read())
    asked = []

    def fallocate(*arguments: int) -> int:
        asked.append(arguments)
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    with writable(image) as disk:
        monkeypatch.setattr(local, "_libc_fallocate", lambda: fallocate)
        for offset, length in ((7, 100), (0, 512), (100, 2 * GRAIN)):
            with pytest.raises(NotFast):
                disk.zero(length, offset, may_trim=may_trim, fast=True)
        assert len(asked) == 2  # to punch, and to zero a range
        same(disk.pread(2 * MIB, 0), bytes(model))
        if may_trim and kind != "flat":  # an entry says it: nothing is written
            disk.zero(2 * GRAIN, 2 * GRAIN, may_trim=True, fast=True)
            model[2 * GRAIN : 4 * GRAIN] = bytes(2 * GRAIN)
        disk.zero(GRAIN + 1, GRAIN // 2, may_trim=may_trim)
        model[GRAIN // 2 : GRAIN // 2 + GRAIN + 1] = bytes(GRAIN + 1)
        same(disk.pread(2 * MIB, 0), bytes(model))
    with open_disk(image.path) as disk:
        same(disk.pread(2 * MIB, 0), bytes(model))


def test_fast_zero_over_several_extents_changes_nothing_if_one_is_slow(tmp_path: Any) -> None:
    base = desc.monolithic_flat(str(tmp_path), "base", Content.of(noise(MIB, 9)))
    rows = [
        Row("RW", "SPARSE", Content.of(noise(512 * KIB, 2))),
        Row("RW", "SPARSE", Content(512 * KIB)),
    ]
    image = desc.custom(str(tmp_path), "top", rows, parent=base)
    before = everything(tmp_path)
    with writable(image) as disk, pytest.raises(NotFast):
        disk.zero(MIB, 0, may_trim=True, fast=True)
    assert everything(tmp_path) == before


def test_flat_zero_and_trim(tmp_path: Any) -> None:
    image = desc.monolithic_flat(str(tmp_path), "top", Content.of(noise(MIB)))
    path = image.files[1]
    before = blocks(path)
    with writable(image) as disk:
        disk.zero(256 * KIB, 0, fast=True)
        assert blocks(path) == before
        disk.zero(256 * KIB, 256 * KIB, may_trim=True)
        disk.trim(256 * KIB, 512 * KIB)
        assert blocks(path) == before - 512 * KIB
        same(disk.pread(MIB, 0), bytes(768 * KIB) + noise(MIB)[768 * KIB :])
        kinds = [run.kind for run in disk.runs()]
        assert kinds[-2:] == [Kind.ZERO, Kind.DATA]
    assert os.path.getsize(path) == MIB


# Copy-on-write.


@pytest.mark.parametrize("grain", [4 * KIB, GRAIN, MIB, 4 * MIB, 16 * MIB])
@pytest.mark.parametrize("parent_size", ["smaller", "larger"])
def test_copy_on_write(tmp_path: Any, grain: int, parent_size: str) -> None:
    """A write to a part of a grain takes the rest from the parent; past the parent's end, zeros."""
    size = 2 * grain + grain // 2 + SECTOR
    below = bytearray(size + grain if parent_size == "larger" else size - grain // 4 - SECTOR)
    for at in range(0, len(below) - SECTOR, max(grain // 5 // SECTOR * SECTOR, SECTOR)):
        below[at : at + SECTOR] = noise(SECTOR, at)
    base = desc.monolithic_flat(str(tmp_path), "base", Content.of(bytes(below)))
    image = desc.monolithic_sparse(
        str(tmp_path), "top", Content(size), parent=base, grain_sectors=grain // SECTOR
    )
    model = bytearray(below[:size].ljust(size, b"\0"))
    with writable(image) as disk:
        # In the middle; over an edge of grains; at the very end; a single byte.
        for offset, length in ((grain // 3, 1000), (2 * grain - 7, 14), (size - 3, 3), (1, 1)):
            data = noise(length, offset)
            disk.pwrite(data, offset)
            model[offset : offset + length] = data
            same(disk.pread(size, 0), bytes(model))
    tables = check_sound(image.path)
    assert set(tables.grains) == {0, 1, 2}
    assert os.path.getsize(image.path) == tables.header.overhead * SECTOR + 3 * grain
    with open_disk(image.path) as disk:
        same(disk.pread(size, 0), bytes(model))


def test_large_grains_stay_sparse_where_the_parent_is(tmp_path: Any) -> None:
    grain = 16 * MIB
    base = desc.monolithic_flat(str(tmp_path), "base", Content(2 * grain).put(grain - MIB, noise(MIB)))
    image = desc.monolithic_sparse(
        str(tmp_path), "top", Content(2 * grain), parent=base, grain_sectors=grain // SECTOR
    )
    with writable(image) as disk:
        disk.pwrite(b"x", 5)
        disk.flush()
        assert blocks(image.path) < 3 * MIB


def test_zeroed_grain_hides_the_parent_from_copy_on_write(tmp_path: Any) -> None:
    image = over_base(tmp_path, zero_gte=True)
    with writable(image) as disk:
        disk.zero(GRAIN, 3 * GRAIN)
        disk.pwrite(b"x", 3 * GRAIN + 9)
        same(disk.pread(GRAIN, 3 * GRAIN), bytes(9) + b"x" + bytes(GRAIN - 10))


def test_parent_that_cannot_be_read(tmp_path: Any) -> None:
    """Then the rest of a grain can't be had, and the write fails as a read would; nothing has changed."""
    base = desc.custom(str(tmp_path), "base", [Row("NOACCESS", "FLAT", Content(2 * MIB), offset=0)])
    image = hosted(tmp_path, grains=0, parent=base)
    with writable(image) as disk:
        with pytest.raises(VmdkError) as caught:
            disk.pwrite(b"x", 5)
        assert caught.value.errno == errno.EIO
        unreadable(disk, 0, 1)
        disk.pwrite(noise(GRAIN), 0)
        same(disk.pread(GRAIN, 0), noise(GRAIN))
    assert set(check_sound(image.path).grains) == {0}


def test_tables_shorter_than_a_sector(tmp_path: Any) -> None:
    """Two missing tables that are made one after the other do not share a sector."""
    options: dict[str, Any] = {"grain_sectors": 8, "gtes": 16, "preallocate_tables": False}
    image = hosted(tmp_path, grains=0, **options)
    with writable(image) as disk:
        for number in range(8):
            disk.pwrite(noise(100, number), number * 16 * 8 * SECTOR)
    assert len(check_sound(image.path).grains) == 8
    with open_disk(image.path) as disk:
        for number in range(8):
            same(disk.pread(100, number * 16 * 8 * SECTOR), noise(100, number))


# Protection of what others rely on.


def test_parent_of_a_child_is_protected(tmp_path: Any) -> None:
    base = hosted(tmp_path, "base")
    hosted(tmp_path, "child", grains=0, parent=base)
    before = everything(tmp_path)
    error = refused(base.path, WriteRefused, writable=True)
    assert "child.vmdk" in str(error)
    assert error.hint is not None
    assert "-r" in error.hint
    assert "--write-parent" in error.hint
    assert everything(tmp_path) == before
    with open_disk(base.path) as disk:
        assert not disk.writable
    with writable(base, write_parent=True) as disk:
        disk.pwrite(b"x", 0)
    # The child does not fit any more, so nobody needs the protection.
    refused(str(tmp_path / "child.vmdk"))
    writable(base).close()


def test_parent_is_protected_in_a_full_folder(tmp_path: Any) -> None:
    base = hosted(tmp_path, "base")
    hosted(tmp_path, "the-child", grains=0, parent=base)
    for number in range(1100):  # extents of another disk of 2 TiB, and as many other files
        (tmp_path / f"other-s{number:03}.vmdk").touch()
        (tmp_path / f"another {number}.vmdk").touch()
    assert "the-child.vmdk" in str(refused(base.path, WriteRefused, writable=True))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_parent_is_protected_by_whatever_name(tmp_path: Any, link: Any) -> None:
    base = hosted(tmp_path, "base")
    link(base.path, tmp_path / "alias.vmdk")
    create_image(tmp_path / "child.vmdk", parent=tmp_path / "alias.vmdk")
    for name in ("base.vmdk", "alias.vmdk"):
        assert "child.vmdk" in str(refused(str(tmp_path / name), WriteRefused, writable=True))


def test_child_of_another_disk_protects_nothing(tmp_path: Any) -> None:
    other = hosted(tmp_path, "other")
    hosted(tmp_path, "child", grains=0, parent=other)
    # The same content ID, but the child names another file as its parent.
    writable(hosted(tmp_path, "copy", cid=other.cid)).close()


def test_middle_link_is_protected_too(tmp_path: Any) -> None:
    base = hosted(tmp_path, "base")
    middle = hosted(tmp_path, "middle", grains=0, parent=base)
    hosted(tmp_path, "leaf", grains=0, parent=middle)
    refused(middle.path, WriteRefused, writable=True)
    writable(str(tmp_path / "leaf.vmdk")).close()


def tracked(folder: Any, **options: Any) -> Image:
    text = {"version": 3, "extra": ["# Change Tracking File", 'changeTrackPath="top-ctk.vmdk"']}
    desc.ctk_file(os.path.join(folder, "top-ctk.vmdk"))
    return desc.monolithic_flat(str(folder), "top", Content.of(noise(MIB)), text=text, **options)


def test_change_tracking_is_protected(tmp_path: Any) -> None:
    image = tracked(tmp_path)
    before = everything(tmp_path)
    error = refused(image.path, WriteRefused, writable=True)
    assert error.hint is not None
    assert "--drop-ctk" in error.hint
    assert "-r" in error.hint
    open_disk(image.path).close()
    assert everything(tmp_path) == before
    with writable(image, drop_ctk=True) as disk:
        disk.pwrite(b"x", 0)
    text = everything(tmp_path)["top.vmdk"]
    assert b"hange" not in text
    assert b"version=1\n" in text
    assert b"\0" not in text
    writable(image).close()


def test_change_tracking_inside_a_sparse_file(tmp_path: Any) -> None:
    text = {"version": 3, "extra": ["# Change Tracking File", 'changeTrackPath="top-ctk.vmdk"']}
    image = hosted(tmp_path, text=text)
    refused(image.path, WriteRefused, writable=True)
    with writable(image, drop_ctk=True) as disk:
        disk.pwrite(b"x", 0)
    with open_disk(image.path) as disk:
        assert disk.links[0].descriptor is not None
        assert disk.links[0].descriptor.change_track_path is None
    check_sound(image.path)


@pytest.mark.parametrize("reason", ["child", "no parent"])
def test_tracking_is_not_dropped_where_the_image_is_refused(tmp_path: Any, reason: str) -> None:
    if reason == "child":
        image = tracked(tmp_path)
        hosted(tmp_path, "child", grains=0, parent=image)
    else:
        base = hosted(tmp_path, "base")
        text = {"version": 3, "extra": ['changeTrackPath="top-ctk.vmdk"']}
        image = hosted(tmp_path, grains=0, parent=base, text=text)
        os.remove(base.path)
    before = everything(tmp_path)
    refused(image.path, writable=True, drop_ctk=True)
    assert everything(tmp_path) == before


# Locks.


def test_second_writer_is_refused(tmp_path: Any) -> None:
    image = desc.split_sparse(str(tmp_path), "top", Content(MIB), 1024)
    with writable(image) as disk:
        error = refused(image.path, InUse, writable=True)
        assert error.exit_code == 5
        assert error.hint is not None
        assert "-r" in error.hint
        with open_disk(image.path) as other:
            assert any("another process" in warning for warning in other.warnings)
        disk.pwrite(b"x", 0)
    writable(image).close()


def test_reader_keeps_writers_out(tmp_path: Any) -> None:
    image = hosted(tmp_path)
    with open_disk(image.path):
        refused(image.path, InUse, writable=True)
        open_disk(image.path).close()
    writable(image).close()


def test_parent_is_kept_from_changing(tmp_path: Any) -> None:
    image = over_base(tmp_path)
    with writable(image):
        refused(str(tmp_path / "base.vmdk"), InUse, writable=True, write_parent=True)


def qemu(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)


def test_qemu_is_kept_out(tmp_path: Any) -> None:
    image = hosted(tmp_path)
    with writable(image):
        done = qemu("info", image.path)
        assert done.returncode
        assert "lock" in done.stderr
        assert qemu("convert", "-O", "raw", image.path, str(tmp_path / "out")).returncode
    assert qemu("convert", "-O", "raw", image.path, str(tmp_path / "out")).returncode == 0
    with open_disk(image.path):
        assert qemu("info", image.path).returncode == 0
        assert qemu("bench", "-w", "-c", "1", "-f", "vmdk", image.path).returncode


def test_vmware_lock(tmp_path: Any) -> None:
    image = hosted(tmp_path)
    lock = tmp_path / "top.vmdk.lck"
    lock.mkdir()
    writable(image).close()  # an empty folder is a leftover
    (lock / "M1.lck").write_bytes(b"x")
    error = refused(image.path, InUse, writable=True)
    assert "top.vmdk.lck" in str(error)
    assert error.hint is not None
    assert error.hint.endswith("top.vmdk.lck can be removed")
    open_disk(image.path).close()


def test_failed_opening_leaves_no_lock(tmp_path: Any) -> None:
    image = over_base(tmp_path)
    os.rename(tmp_path / "base.vmdk", tmp_path / "away.vmdk")
    refused(image.path, writable=True)
    os.rename(tmp_path / "away.vmdk", tmp_path / "base.vmdk")
    writable(image).close()


# Many threads.


@pytest.mark.parametrize("kind", ["sparse", "child", "no tables"])
def test_threads_on_grains_of_their_own(tmp_path: Any, kind: str) -> None:
    """Each thread knows what it wrote, in sectors that lie between those of the others in the same grains."""
    threads, size = 8, MIB
    options: dict[str, Any] = {"grain_sectors": 16, "gtes": 32}
    parent = None
    if kind == "child":
        parent = desc.monolithic_flat(str(tmp_path), "base", Content.of(noise(size, 9)))
        options["zero_gte"] = True
    elif kind == "no tables":
        options["preallocate_tables"] = False
    image = desc.monolithic_sparse(str(tmp_path), "top", Content(size), parent=parent, **options)
    errors: list[BaseException] = []
    disk = writable(image)
    models = [dict[int, bytes]() for _ in range(threads)]
    start = image.visible.read()

    def work(own: int) -> None:
        rng = random.Random(own)
        model = models[own]
        try:
            for turn in range(250):
                sector = rng.randrange(size // SECTOR // threads) * threads + own
                match rng.randrange(6):
                    case 0:
                        disk.zero(SECTOR, sector * SECTOR, may_trim=turn % 2 == 0)
                        model[sector] = bytes(SECTOR)
                    case 1:
                        if turn % 5 == 0:
                            disk.flush()
                    case 2:
                        wanted = model.get(sector, start[sector * SECTOR : (sector + 1) * SECTOR])
                        same(disk.pread(SECTOR, sector * SECTOR), wanted, sector * SECTOR)
                    case _:
                        data = noise(SECTOR, own * 1000 + turn)
                        disk.pwrite(data, sector * SECTOR, fua=turn % 50 == 0)
                        model[sector] = data
        except BaseException as error:
            errors.append(error)
            raise

    workers = [threading.Thread(target=work, args=(own,)) for own in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    wanted = bytearray(start)
    for model in models:
        for sector, data in model.items():
            wanted[sector * SECTOR : (sector + 1) * SECTOR] = data
    same(disk.pread(size, 0), bytes(wanted))
    disk.close()
    check_sound(image.path)
    with open_disk(image.path) as again:
        same(again.pread(size, 0), bytes(wanted))


def test_threads_on_the_same_grains(tmp_path: Any) -> None:
    """Whole grains written, trimmed and read by all: what is read is what somebody wrote, or zeros."""
    image = desc.monolithic_sparse(str(tmp_path), "top", Content(256 * KIB), grain_sectors=8, gtes=8)
    grain = 4 * KIB
    errors: list[BaseException] = []
    with writable(image, cache_size=4 * KIB) as disk:

        def work(own: int) -> None:
            rng = random.Random(own)
            try:
                for _ in range(300):
                    at = rng.randrange(64) * grain
                    match rng.randrange(5):
                        case 0:
                            disk.trim(grain, at)
                        case 1:
                            disk.flush()
                        case 2:
                            data = disk.pread(SECTOR, at + rng.randrange(8) * SECTOR)
                            assert len(set(data)) == 1, "two writes are mixed in one sector"
                            assert data[0] <= 8
                        case _:
                            disk.pwrite(bytes([own + 1]) * grain, at)
            except BaseException as error:
                errors.append(error)
                raise

        workers = [threading.Thread(target=work, args=(own,)) for own in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not errors
        shown = disk.pread(disk.size, 0)
    check_sound(image.path)
    with open_disk(image.path) as disk:
        same(disk.pread(disk.size, 0), shown)


@pytest.mark.parametrize("zero_gte", [False, True])
def test_threads_that_free_and_take_grains(tmp_path: Any, zero_gte: bool) -> None:
    """Space goes from one thread's grains to another's; nobody ever sees what is not his."""
    threads, grain, size = 6, 4 * KIB, 512 * KIB
    parent = None
    if zero_gte:
        parent = desc.monolithic_flat(str(tmp_path), "base", Content.of(bytes(size)))
    image = desc.monolithic_sparse(
        str(tmp_path), "top", Content(size), parent=parent, grain_sectors=8, gtes=32, zero_gte=zero_gte
    )
    errors: list[BaseException] = []
    disk = writable(image)
    models = [dict[int, bytearray]() for _ in range(threads)]

    def work(own: int) -> None:
        rng = random.Random(own)
        model = models[own]
        try:
            for _ in range(400):
                at = (rng.randrange(size // grain // threads) * threads + own) * grain
                known = model.setdefault(at, bytearray(grain))
                match rng.randrange(6):
                    case 0 | 1:
                        disk.trim(grain, at)
                        known[:] = bytes(grain)
                    case 2:
                        disk.flush()
                    case 3:
                        same(disk.pread(grain, at), bytes(known), at)
                    case _:
                        first = rng.randrange(grain)
                        length = rng.randrange(1, grain - first + 1)
                        data = bytes([own + 1]) * length
                        disk.pwrite(data, at + first)
                        known[first : first + length] = data
        except BaseException as error:
            errors.append(error)
            raise

    workers = [threading.Thread(target=work, args=(own,)) for own in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    for model in models:
        for at, known in model.items():
            same(disk.pread(grain, at), bytes(known), at)
    disk.close()
    tables = check_sound(image.path)
    assert tables.size <= tables.header.overhead * SECTOR + size, "space was not used again"


def test_table_that_was_dropped_does_not_come_back(tmp_path: Any) -> None:
    """A reader finds a table in the cache's old generation; before he moves it up, a writer replaces it."""
    part = Cache(1000).part()

    class Old(dict[int, Any]):
        def get(self, key: int, default: Any = None) -> Any:
            found = super().get(key, default)
            if not seen:
                seen.append(key)
                part.drop(key)
                part.put(key, b"new")
            return found

    seen: list[int] = []
    part.old = Old({7: b"old"})
    assert part.get(7) == b"old"  # he began before
    assert part.get(7) == b"new"


def test_two_writers_of_one_new_grain(tmp_path: Any) -> None:
    """Both write a part of it at once; it is made once, and holds both parts and the parent's rest."""
    base = desc.monolithic_flat(str(tmp_path), "base", Content.of(noise(4 * MIB, 9)))
    image = desc.monolithic_sparse(str(tmp_path), "top", Content(4 * MIB), parent=base)
    model = bytearray(noise(4 * MIB, 9))
    with writable(image) as disk:
        barrier = threading.Barrier(4)

        def work(own: int) -> None:
            for grain in range(64):
                barrier.wait()
                disk.pwrite(bytes([own + 1]) * 1000, grain * GRAIN + own * 16000)

        workers = [threading.Thread(target=work, args=(own,)) for own in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for grain in range(64):
            for own in range(4):
                at = grain * GRAIN + own * 16000
                model[at : at + 1000] = bytes([own + 1]) * 1000
        same(disk.pread(4 * MIB, 0), bytes(model))
    tables = check_sound(image.path)
    assert os.path.getsize(image.path) == tables.header.overhead * SECTOR + 64 * GRAIN, (
        "a grain was made twice"
    )
