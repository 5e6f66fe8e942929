"""What the engine's reading tests share: an open disk compared with the model of its content."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from nbd_vmdk import Disk, VmdkError, open_disk
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.runs import Run
from tests.images import peek
from tests.images.content import KIB, MIB, SECTOR, Content, Part
from tests.images.desc import Image

NOTHING = (Kind.HOLE, Kind.ZERO)


def same(found: bytes, wanted: bytes, offset: int = 0) -> None:
    """Compare without printing megabytes: name the first sector that differs."""
    assert len(found) == len(wanted)
    if found != wanted:
        sectors = range(0, len(wanted), SECTOR)
        bad = [at // SECTOR for at in sectors if found[at : at + SECTOR] != wanted[at : at + SECTOR]]
        pytest.fail(f"{len(bad)} sectors differ from {offset}, the first is {offset // SECTOR + bad[0]}")


def places(content: Content, seed: int = 0, grain: int = 64 * KIB) -> Iterator[tuple[int, int]]:
    """(offset, length) of reads that cross what can go wrong: edges of segments and grains, any bytes."""
    rng = random.Random(f"places {seed} {content.size}")
    edges = [edge for segment in content.segments() for edge in (segment.start, segment.end)]
    for edge in rng.sample(edges, min(len(edges), 12)):
        start = max(0, edge - rng.choice((1, 100, SECTOR, 5 * SECTOR, grain)))
        end = min(content.size, edge + rng.choice((1, 100, SECTOR, 5 * SECTOR, grain)))
        yield start, end - start
    for _ in range(8):
        start = rng.randrange(content.size)
        yield start, rng.randrange(min(content.size - start, 3 * grain) + 1)
    yield content.size - 1, 1
    yield content.size, 0


def reads(disk: Disk, content: Content, seed: int = 0) -> None:
    """The disk shows the content: data whole, long holes in samples, and reads across edges."""
    assert disk.size == content.size
    for segment in content.segments():
        length = segment.end - segment.start
        if segment.data or length <= 4 * MIB:
            same(disk.pread(length, segment.start), content.read(segment.start, length), segment.start)
        else:
            for at in (segment.start, segment.start + length // 2, segment.end - MIB):
                assert not any(disk.pread(MIB, at)), f"not zeros at {at}"
    for offset, length in places(content, seed):
        same(disk.pread(length, offset), content.read(offset, length), offset)


def runs(disk: Disk, content: Content, offset: int = 0, length: int | None = None) -> list[Run]:
    """All runs of the disk, checked: in order, gapless, maximal, and each true to the content."""
    found = list(disk.runs(offset, length))
    end = disk.size if length is None else offset + length
    at = offset
    for run in found:
        assert run.offset == at
        assert run.length > 0
        at += run.length
        check_run(disk, content, run)
    assert at == end
    for run, following in pairwise(found):
        assert not joinable(run, following), f"{run} and {following} are one"
    return found


def joinable(one: Run, two: Run) -> bool:
    """Whether two neighbours tell nothing that one longer run could not tell."""
    if (one.kind, one.depth, one.file) != (two.kind, two.depth, two.file):
        return False
    return one.kind is not Kind.DATA or (one.at is not None and one.at + one.length == two.at)


def check_run(disk: Disk, content: Content, run: Run) -> None:
    end = run.offset + run.length
    if run.kind is Kind.HOLE:
        assert (run.depth, run.file, run.at) == (None, None, None)
    elif run.kind is Kind.ZERO:
        assert run.depth is not None
        assert (run.file, run.at) == (None, None)
    elif run.kind is Kind.LOST and run.depth is None:
        assert disk.links[-1].incomplete  # it is in a parent that nobody knows
    else:
        assert run.depth is not None
        assert run.file in {storage.name for storage in disk.links[run.depth].storages}
        assert (run.at is None) is (run.kind is not Kind.DATA)
    for segment in content.segments(run.offset, end):
        if segment.part is not Part.DATA:
            wanted = bytes(min(segment.end - segment.start, MIB))
        else:
            wanted = segment.data
            assert run.kind not in NOTHING or not any(wanted), f"{run} hides data at {segment.start}"
        if run.kind is Kind.DATA:
            assert run.file is not None
            assert run.at is not None
            place = run.at + segment.start - run.offset
            same(peek(run.file, place, len(wanted)), wanted, segment.start)


def shows(image: Image | str, content: Content | None = None, **options: Any) -> tuple[str, ...]:
    """Open an image, compare it and its runs with what it must show; the warnings it gave."""
    if content is None:
        assert isinstance(image, Image)
        content = image.visible
    with open_disk(image if isinstance(image, str) else image.path, **options) as disk:
        reads(disk, content)
        runs(disk, content)
        return disk.warnings


def refused(path: str, error: type[VmdkError] = VmdkError, **options: Any) -> VmdkError:
    """Open what must be refused; the error, which is one line for the user."""
    with pytest.raises(error) as caught:
        open_disk(path, **options).close()
    assert "\n" not in str(caught.value)
    return caught.value


def unreadable(disk: Disk, offset: int, length: int) -> VmdkError:
    """Read what can't be had: it must be an error that a client sees as EIO."""
    with pytest.raises(VmdkError) as caught:
        disk.pread(length, offset)
    assert caught.value.errno == 5
    return caught.value


def long_way(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note what is not read at once, as (offset, length), of disks that are opened from now on."""
    asked: list[tuple[int, int]] = []
    original = Disk._read_mapped

    def noting(self: Disk, buf: memoryview, offset: int) -> None:
        asked.append((offset, len(buf)))
        original(self, buf, offset)

    monkeypatch.setattr(Disk, "_read_mapped", noting)
    return asked


def outside(size: int, grain: int) -> tuple[int, ...]:
    """Offsets at which a disk has not even a sector."""
    return -1, -SECTOR, -size, size - 1, size, size + grain, 1 << 62, 1 << 70
