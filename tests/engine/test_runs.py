"""
Runs: the whole range in order, each as long as it can be, and true to what is read.
"""

from __future__ import annotations

import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbd_vmdk import Disk, Run, open_disk
from nbd_vmdk.extents.base import Kind
from tests.engine import NOTHING, joinable, runs, same
from tests.images import desc, peek, poke
from tests.images.content import GIB, KIB, MIB, SECTOR, Content, Part
from tests.images.desc import Image, Row
from tests.images.hosted import write_hosted

ODD = Content.random(3 * MIB + 7 * SECTOR, seed=1)
PARENT = Content.random(3 * MIB, seed=3, density=1.0)
GRAIN = 64 * KIB


def brief(found: list[Run]) -> list[tuple[int, int, Kind, int | None]]:
    return [(run.offset, run.length, run.kind, run.depth) for run in found]


def everything(folder: str) -> Image:
    """A child of mixed kinds over a chain of mixed kinds, smaller than it."""
    base = desc.vmfs(folder, "base", PARENT)
    middle = desc.se_sparse(folder, "middle", ODD, parent=base, zero_style="mixed", shuffle_grains=1)
    rows = [
        Row("RW", "SPARSE", ODD.sliced(0, MIB), options={"zero_gte": True, "shuffle_grains": 5}),
        Row("RW", "ZERO", Content(3 * SECTOR)),
        Row("RW", "VMFSSPARSE", ODD.sliced(MIB, MIB)),
        Row("RW", "FLAT", ODD.sliced(0, 300 * SECTOR), "flat.vmdk", 5),
        Row("RW", "SPARSE", ODD.sliced(MIB, MIB), builder="stream"),
        Row("NOACCESS", "FLAT", Content(9 * SECTOR)),
        Row("RW", "SPARSE", ODD.sliced(0, MIB), options={"grain_sectors": 1, "gtes": 2}),
    ]
    return desc.custom(folder, "top", rows, parent=middle)


def readable(image: Image) -> Content:
    """What it shows, what can't be read taken as zeros."""
    content = image.visible
    for offset, length in image.unreadable:
        content.zero(offset, length)
    return content


def test_any_range_is_a_piece_of_the_whole(tmp_path: Path) -> None:
    image = everything(str(tmp_path))
    content = readable(image)
    rng = random.Random(1)
    with open_disk(image.path) as disk:
        whole = runs(disk, content)
        for _ in range(150):
            start = rng.randrange(disk.size)
            length = rng.choice((1, 511, SECTOR, GRAIN, 3 * GRAIN + 5, MIB, disk.size))
            length = min(length, disk.size - start)
            assert list(disk.runs(start, length)) == cut_out(whole, start, length)
        assert list(disk.runs(disk.size)) == []
        assert list(disk.runs(5, 0)) == []


def cut_out(whole: list[Run], start: int, length: int) -> list[Run]:
    pieces = []
    for run in whole:
        first, last = max(start, run.offset), min(start + length, run.offset + run.length)
        if first < last:
            at = None if run.at is None else run.at + first - run.offset
            pieces.append(run._replace(offset=first, length=last - first, at=at))
    return pieces


def edges_by_runs(disk: Disk, offset: int, length: int) -> list[tuple[int, int, bool]]:
    """(begin, end, is it data) of the pieces that runs tell, neighbours of one sort as one."""
    found: list[tuple[int, int, bool]] = []
    for run in disk.runs(offset, length):
        begin, end, is_data = run.offset, run.offset + run.length, run.kind not in NOTHING
        if found and found[-1][2] is is_data:
            begin = found.pop()[0]
        found.append((begin, end, is_data))
    return found


def edges(disk: Disk, offset: int, length: int, most: int = 1 << 20) -> list[tuple[int, int, bool]]:
    places, first = disk.edges(offset, length, most)
    return [(*pair, first is (i % 2 == 0)) for i, pair in enumerate(pairwise(places))]


@pytest.mark.parametrize("base", [False, True], ids=["chain", "base"])
def test_edges_are_runs_in_short(tmp_path: Path, base: bool) -> None:
    image = everything(str(tmp_path))
    path = os.path.join(tmp_path, "base.vmdk") if base else image.path
    rng = random.Random(2)
    with open_disk(path) as disk:
        assert edges(disk, 0, disk.size) == edges_by_runs(disk, 0, disk.size)
        for _ in range(150):
            start = rng.randrange(disk.size)
            length = rng.choice((1, 511, SECTOR, GRAIN, 3 * GRAIN + 5, MIB, disk.size))
            length = min(length, disk.size - start)
            wanted = edges_by_runs(disk, start, length)
            assert edges(disk, start, length) == wanted
            most = rng.randrange(1, 5)
            assert edges(disk, start, length, most) == wanted[:most]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(st.sampled_from(["hole", "zero", "data", "damaged"]), min_size=160, max_size=160),
    odd=st.integers(0, GRAIN - 1),
    zero_gte=st.booleans(),
)
def test_edges_of_tables_of_any_sort(tmp_path: Path, entries: list[str], odd: int, zero_gte: bool) -> None:
    """Small tables, one of them holding nothing, with every sort of entry next to every other."""
    content = Content(len(entries) * GRAIN)

    for index, entry in enumerate(entries):
        if entry == "data" and index // 16 != 3:
            content.put(index * GRAIN, b"d" * SECTOR)
        elif entry == "zero" and zero_gte:
            content.zero(index * GRAIN, GRAIN)

    def spoil(_directory: list[int], tables: dict[int, list[int]]) -> None:
        for number, table in tables.items():
            for slot in range(len(table)):
                if entries[number * 16 + slot] == "damaged":
                    table[slot] = 3  # inside the header

    image = desc.monolithic_sparse(
        str(tmp_path), "any", content, gtes=16, zero_gte=zero_gte, edit_tables=spoil, edit_redundant=spoil
    )
    with open_disk(image.path) as disk:
        size = disk.size
        for start, length in ((0, size), (odd, size - odd), (odd, size - 2 * odd), (17 * GRAIN + odd, GRAIN)):
            assert edges(disk, start, length) == edges_by_runs(disk, start, length)


def test_edges_show_what_was_just_written(tmp_path: Path) -> None:
    image = desc.monolithic_sparse(str(tmp_path), "base", Content(100 * MIB), zero_gte=True)
    rng = random.Random(3)
    with open_disk(image.path, writable=True) as disk:
        for turn in range(60):
            at = rng.randrange(disk.size // GRAIN) * GRAIN
            if turn % 3 == 2:
                disk.zero(4 * GRAIN if at + 4 * GRAIN <= disk.size else GRAIN, at, may_trim=True)
            else:
                disk.pwrite(b"x" * 512, at)
            if turn % 20 == 19:
                disk.flush()
            assert edges(disk, 0, disk.size) == edges_by_runs(disk, 0, disk.size)


def test_runs_and_reads_agree(tmp_path: Path) -> None:
    """A file read at (file, at) is what the disk reads; nothing else reads as anything but zeros."""
    image = everything(str(tmp_path))
    with open_disk(image.path) as disk:
        kinds = set()
        for run in disk.runs():
            kinds.add(run.kind)
            if run.kind is Kind.LOST:
                with pytest.raises(Exception, match="no access"):
                    disk.pread(1, run.offset)
                continue
            data = disk.pread(run.length, run.offset)
            if run.kind in NOTHING:
                assert not any(data)
            elif run.kind is Kind.DATA:
                assert run.file is not None
                assert run.at is not None
                same(peek(run.file, run.at, run.length), data, run.offset)
    assert kinds == set(Kind)


def test_what_is_told_of_the_kinds(tmp_path: Path) -> None:
    low = desc.monolithic_flat(str(tmp_path), "base", Content(4 * MIB).put(0, b"b" * 3 * MIB))
    top = Content(4 * MIB).put(MIB, b"t" * GRAIN).zero(2 * MIB, GRAIN)
    image = desc.monolithic_sparse(str(tmp_path), "top", top, parent=low, zero_gte=True)
    with open_disk(image.path) as disk:
        found = runs(disk, image.visible)
    assert brief(found) == [
        (0, MIB, Kind.DATA, 1),
        (MIB, GRAIN, Kind.DATA, 0),
        (MIB + GRAIN, MIB - GRAIN, Kind.DATA, 1),
        (2 * MIB, GRAIN, Kind.ZERO, 0),
        (2 * MIB + GRAIN, MIB - GRAIN, Kind.DATA, 1),
        (3 * MIB, MIB, Kind.ZERO, 1),
    ]
    assert found[0].file == found[2].file == low.files[1]
    assert found[1].file == image.path
    assert found[1].at == image.hosted().grain_at(16)


def test_neighbours_in_a_file_are_one_run(tmp_path: Path) -> None:
    """Whatever lies between them on the guest's side: grains, tables, extents of one file."""
    solid = Content(80 * MIB)
    for at in range(0, 80 * MIB, 16 * MIB):
        solid.put(at, os.urandom(4 * KIB) * 4 * KIB)
    path = write_hosted(str(tmp_path / "disk.vmdk"), solid).path
    with open_disk(path) as disk:
        assert brief(runs(disk, solid)) == [(0, 80 * MIB, Kind.DATA, 0)]

    shuffled = write_hosted(str(tmp_path / "shuffled.vmdk"), solid.resized(2 * MIB), shuffle_grains=1)
    with open_disk(shuffled.path) as disk:
        found = runs(disk, shuffled.content)
        assert len(found) > 20
        assert len({run.at for run in found}) == len(found)

    pieces = [
        Row("RW", "FLAT", solid.sliced(at, 5 * SECTOR), "one.vmdk", at // SECTOR) for at in (0, 5 * SECTOR)
    ]
    image = desc.custom(str(tmp_path), "two", pieces)
    with open_disk(image.path) as disk:
        assert brief(runs(disk, image.content)) == [(0, 10 * SECTOR, Kind.DATA, 0)]


def test_holes_of_all_links_are_one_run(tmp_path: Path) -> None:
    low = desc.monolithic_sparse(str(tmp_path), "base", Content(200 * MIB), preallocate_tables=False)
    middle = desc.vmfs_sparse(str(tmp_path), "middle", Content(90 * MIB), parent=low)
    top = desc.split_sparse(str(tmp_path), "top", Content(300 * MIB), 65000, parent=middle)
    with open_disk(top.path) as disk:
        assert brief(runs(disk, top.visible)) == [(0, 300 * MIB, Kind.HOLE, None)]


def test_a_hole_of_a_flat_file_is_zeros(tmp_path: Path) -> None:
    content = Content(3 * GIB).put(GIB, b"x" * MIB)
    image = desc.monolithic_flat(str(tmp_path), "disk", content)
    with open_disk(image.path) as disk:
        assert brief(runs(disk, content)) == [
            (0, GIB, Kind.ZERO, 0),
            (GIB, MIB, Kind.DATA, 0),
            (GIB + MIB, 2 * GIB - MIB, Kind.ZERO, 0),
        ]


def test_empty_tables_are_passed_over_but_not_what_follows(tmp_path: Path) -> None:
    """Tables that are missing, zeros on disk, or holes of the file, with one grain in their midst."""
    for options in ({}, {"preallocate_tables": False}, {"rgd": False}, {"gtes": 64}, {"tables_last": True}):
        for place in (0, 17 * 32 * MIB, 3 * GIB - 5 * SECTOR):
            content = Content(3 * GIB).put(place, b"x" * SECTOR)
            image = desc.monolithic_sparse(str(tmp_path), "disk", content, **options)
            if not options:
                extent = image.hosted()
                poke(image.path, extent.gd[1] * SECTOR, bytes(60 * 2048 if place > GIB else 10 * 2048))
            with open_disk(image.path) as disk:
                found = runs(disk, image.content)
                data = [run for run in found if run.kind is Kind.DATA]
                assert [run.offset for run in data] == [place // GRAIN * GRAIN]


@st.composite
def disks(draw: st.DrawFn) -> tuple[list[Content], list[int]]:
    """Contents of a chain, base first, of any sizes; and the grain size of each link."""
    contents, grains = [], []
    for _ in range(draw(st.integers(1, 4))):
        grain = draw(st.sampled_from([1, 2, 8, 16]))
        content = Content(draw(st.integers(1, 120)) * SECTOR)
        for _ in range(draw(st.integers(0, 6))):
            start = draw(st.integers(0, content.sectors - 1))
            length = draw(st.integers(1, content.sectors - start)) * SECTOR
            part = draw(st.sampled_from(Part))
            if part is Part.DATA:
                content.put(start * SECTOR, random.Random(start).randbytes(length))
            elif part is Part.ZERO:
                content.zero(start * SECTOR, length)
        contents.append(content)
        grains.append(grain)
    return contents, grains


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chain=disks(), start=st.floats(0, 1), length=st.floats(0, 1))
def test_any_chain(
    tmp_path: Path, chain: tuple[list[Content], list[int]], start: float, length: float
) -> None:
    image: Image | None = None
    for number, (content, grain) in enumerate(zip(*chain, strict=True)):
        options = {"grain_sectors": grain, "gtes": 4, "zero_gte": number % 2 == 0, "shuffle_grains": number}
        if grain == 8 and number % 2:
            image = desc.se_sparse(str(tmp_path), f"link{number}", content, parent=image)
        else:
            image = desc.monolithic_sparse(str(tmp_path), f"link{number}", content, parent=image, **options)
    assert image is not None
    visible = image.visible
    with open_disk(image.path) as disk:
        same(disk.pread(disk.size, 0), visible.read())
        runs(disk, visible)
        first = int(start * visible.size)
        size = int(length * (visible.size - first))
        same(disk.pread(size, first), visible.read(first, size))
        runs(disk, visible, first, size)


def test_runs_outside_the_disk(tmp_path: Path) -> None:
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD)
    with open_disk(image.path) as disk:
        for offset, length in ((-1, 1), (0, ODD.size + 1), (ODD.size + 1, None)):
            with pytest.raises(Exception, match="outside the disk"):
                list(disk.runs(offset, length))


def test_the_cache_verb(tmp_path: Path) -> None:
    """Prefetching any range of any kind changes nothing, and reads what can be read."""
    image = everything(str(tmp_path))
    content = readable(image)
    lost = [(offset, offset + length) for offset, length in image.unreadable]

    def check(disk: Disk) -> None:
        for first, last in ((0, lost[0][0]), (lost[0][1], disk.size)):
            same(disk.pread(last - first, first), content.read(first, last - first), first)

    with open_disk(image.path) as disk:
        disk.cache(0, 0)
        disk.cache(disk.size, 0)
        check(disk)
        with pytest.raises(Exception, match="outside the disk"):
            disk.cache(1, disk.size)


def test_joinable_is_what_it_says() -> None:
    """The judge of maximal runs, judged."""
    one = Run(0, 10, Kind.DATA, 0, "a", 100)
    assert joinable(one, Run(10, 5, Kind.DATA, 0, "a", 110))
    assert not joinable(one, Run(10, 5, Kind.DATA, 0, "a", 111))
    assert not joinable(one, Run(10, 5, Kind.DATA, 0, "b", 110))
    assert not joinable(one, Run(10, 5, Kind.ZERO, 0, None, None))
    assert joinable(Run(0, 5, Kind.HOLE, None, None, None), Run(5, 5, Kind.HOLE, None, None, None))
