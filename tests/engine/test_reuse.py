"""Freed grains are given out again, and never while somebody may still be on the way to them."""

import errno
import os
import random
import threading
import time
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.alloc import Allocator
from nbd_vmdk.errors import StorageError
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.units import KIB, MIB, SECTOR
from tests.images import cut
from tests.images.content import Content
from tests.images.desc import monolithic_sparse
from tests.memory import MemoryStorage

GRAIN = 64 * KIB


def test_trimming_and_writing_for_ever_does_not_grow_the_file(tmp_path: Path) -> None:
    image = monolithic_sparse(tmp_path, "disk", Content(16 * MIB))
    with open_disk(image.path, writable=True) as disk:
        disk.pwrite(os.urandom(4 * MIB), 0)
        disk.flush()
        size = os.path.getsize(image.path)
        for _ in range(20):
            disk.trim(4 * MIB, 0)
            disk.flush()
            data = os.urandom(4 * MIB)
            for offset in range(0, len(data), GRAIN):
                disk.pwrite(data[offset : offset + GRAIN], offset)
            disk.flush()
            assert disk.pread(4 * MIB, 0) == data
        assert os.path.getsize(image.path) == size


def test_a_freed_grain_waits_for_its_entry_to_be_durable(tmp_path: Path) -> None:
    image = monolithic_sparse(tmp_path, "disk", Content(16 * MIB))
    with open_disk(image.path, writable=True) as disk:
        disk.pwrite(b"a" * GRAIN, 0)
        disk.flush()
        [first] = [run.at for run in disk.runs(0, GRAIN)]
        disk.trim(GRAIN, 0)
        disk.pwrite(b"b" * GRAIN, GRAIN)
        assert [run.at for run in disk.runs(GRAIN, GRAIN)] != [first]
        disk.flush()
        disk.pwrite(b"c", 2 * GRAIN)
        assert [run.at for run in disk.runs(2 * GRAIN, GRAIN)] == [first]
        # What was in the grain before does not show behind the one byte that was written.
        assert disk.pread(GRAIN, 2 * GRAIN) == b"c" + bytes(GRAIN - 1)


def test_a_freed_grain_waits_for_the_overwrites_under_way() -> None:
    allocator = Allocator(MemoryStorage(bytes(GRAIN)), GRAIN, 1 << 40)
    at = allocator.take_grains(2)
    ticket = allocator.ticket()
    allocator.give_back(at, 2 * GRAIN)
    late = allocator.ticket()
    assert allocator.take_grains(1) == at + 2 * GRAIN
    allocator.writing.discard(ticket)
    # Whoever began after the grain was freed can't have found it.
    assert late in allocator.writing
    assert [allocator.take_grains(1) for _ in range(3)] == [at, at + GRAIN, at + 3 * GRAIN]


def test_grains_that_nobody_got() -> None:
    """Those at the end are as if they had never been taken; others are given out again as freed ones are."""
    storage = MemoryStorage(bytes(GRAIN))
    allocator = Allocator(storage, GRAIN, 1 << 40)
    for _ in range(3):
        for count in (1, 3, 2):
            at = allocator.take_grains(count)
            allocator.untake(at, count * GRAIN)
            assert (at, allocator.end, allocator.used) == (GRAIN, GRAIN, GRAIN)
    first, second = allocator.take_grains(2), allocator.take_grains(1)
    ticket = allocator.ticket()
    allocator.untake(first, 2 * GRAIN)
    assert allocator.take_grains(2) == second + GRAIN
    allocator.writing.discard(ticket)
    assert allocator.take_grains(2) == first
    allocator.trim_tail()
    assert storage.size == allocator.end == second + 3 * GRAIN


def test_the_place_of_a_grain_that_is_cut_off_is_its_own(tmp_path: Path) -> None:
    """The last grain of the disk, without what the guest does not see, not at a multiple of its size."""
    content = Content(MIB + 3 * SECTOR).put(MIB, b"last" * 384)
    image = monolithic_sparse(str(tmp_path), "disk", content, grain_sectors=8, misalign=3)
    cut(image.path, -5 * SECTOR)
    for at in (0, 4096):
        # A second time, too: two grains in one place would be refused.
        with open_disk(image.path, writable=True) as disk:
            disk.pwrite(b"new", at)
            assert disk.pread(3 * SECTOR, MIB) == b"last" * 384
    assert not [finding for finding in check_image(image.path).findings if finding.slug == "grains-overlap"]


def test_no_two_are_given_the_same_space_and_the_file_has_it() -> None:
    """Grains in rows and tables, over the edges of the steps by which the file grows, up to the last one."""
    storage = MemoryStorage(bytes(10 * SECTOR + 7))
    last = 3000 * SECTOR
    allocator = Allocator(storage, SECTOR, last)
    rng = random.Random(1)
    end = storage.size
    while end < last - 300 * SECTOR:
        if rng.randrange(10):
            count = rng.randrange(1, 300) if rng.randrange(2) else 1
            at, length = allocator.take_grains(count), count * SECTOR
        else:
            length = rng.randrange(1, 3 * SECTOR)
            at = allocator.take_table(length)
        assert at % SECTOR == 0
        assert at >= end
        end = at + length
        assert end <= storage.size
        assert end <= allocator.end == allocator.used
        if not rng.randrange(10):
            allocator.trim_tail()
            assert storage.size == allocator.used
    with pytest.raises(StorageError) as caught:
        allocator.take_grains(400)
    assert caught.value.errno == errno.ENOSPC
    while end <= last:
        at = allocator.take_grains(1)
        assert at >= end
        end = at + SECTOR
    with pytest.raises(StorageError):
        allocator.take_grains(1)
    assert end == last + SECTOR <= storage.size


def test_nobody_ever_sees_or_hits_the_next_owner_of_a_grain(tmp_path: Path) -> None:
    """Threads write, trim and flush grains of their own while others read all of them.

    A page of a grain holds its owner's number or zeros; a reader that sees another number has read a grain
    that was given away under it.
    """
    threads, grains = 6, 64
    image = monolithic_sparse(tmp_path, "disk", Content(grains * threads * GRAIN))
    stop = time.monotonic() + 4
    wrong: list[str] = []

    with open_disk(image.path, writable=True) as disk:

        def own(number: int) -> None:
            tag = bytes([number + 1])
            round_ = 0
            while time.monotonic() < stop and not wrong:
                offset = ((round_ * 7) % grains * threads + number) * GRAIN
                disk.pwrite(tag * GRAIN, offset)
                if disk.pread(GRAIN, offset) != tag * GRAIN:
                    wrong.append(f"{number} did not read back what it wrote")
                disk.pwrite(tag * 4 * KIB, offset + 4 * KIB)
                disk.trim(GRAIN, offset)
                round_ += 1
                if round_ % 5 == 0:
                    disk.flush()

        def read() -> None:
            buf = memoryview(bytearray(GRAIN))
            while time.monotonic() < stop and not wrong:
                for index in range(grains * threads):
                    disk.read_into(buf, index * GRAIN)
                    seen = set(buf.tobytes())
                    if not seen <= {0, index % threads + 1}:
                        wrong.append(f"grain {index} of {index % threads} held {seen}")

        workers = [threading.Thread(target=own, args=(number,)) for number in range(threads)]
        workers += [threading.Thread(target=read) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong
