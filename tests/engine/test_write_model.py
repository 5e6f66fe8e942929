"""Random writing against a bytearray: every kind that can be written, every edge there is.

When a run ends, qemu-img reads the image equal and finds nothing to check, and both copies of directories and
tables agree.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from nbd_vmdk import Disk, open_disk
from nbd_vmdk.errors import NotFast
from tests.engine import NOTHING, same
from tests.images import desc
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.cowd import GTES, CowdExtent
from tests.images.desc import Image, Row
from tests.images.hosted import HostedExtent
from tests.sound import check_sound

#: Makes an image in a folder, by name, with a content that a seed decides.
Recipe = Callable[[str, str, int], Image]


def content(size: int, seed: int, grain: int = 64 * KIB, density: float = 0.4) -> Content:
    return Content.random(size, seed, density, grain)


# The kinds.  Sizes are no multiple of the grain, and tables cover little, so that their edges are crossed.


def flat(folder: str, name: str, seed: int) -> Image:
    return desc.monolithic_flat(folder, name, content(300 * KIB + SECTOR, seed, 16 * KIB))


def vmfs(folder: str, name: str, seed: int) -> Image:
    return desc.vmfs(folder, name, content(200 * KIB + 7 * SECTOR, seed, 16 * KIB))


def split_flat(folder: str, name: str, seed: int) -> Image:
    return desc.split_flat(folder, name, content(310 * KIB + 3 * SECTOR, seed, 16 * KIB), 201)


def usual(folder: str, name: str, seed: int) -> Image:
    return desc.monolithic_sparse(folder, name, content(600 * KIB + 5 * SECTOR, seed))


def zeroed(folder: str, name: str, seed: int) -> Image:
    made = content(150 * KIB + SECTOR, seed, 4 * KIB)
    return desc.monolithic_sparse(folder, name, made, grain_sectors=8, gtes=16, zero_gte=True)


def sector_grains(folder: str, name: str, seed: int) -> Image:
    made = content(60 * KIB + SECTOR, seed, 4 * KIB)
    return desc.monolithic_sparse(folder, name, made, grain_sectors=1, gtes=32)


def one_directory(folder: str, name: str, seed: int) -> Image:
    made = content(300 * KIB + SECTOR, seed, 8 * KIB)
    return desc.monolithic_sparse(folder, name, made, grain_sectors=16, gtes=4, rgd=False)


def missing_tables(folder: str, name: str, seed: int) -> Image:
    made = content(400 * KIB + SECTOR, seed, 4 * KIB, 0.1)
    options: dict[str, Any] = {"grain_sectors": 8, "gtes": 16, "preallocate_tables": False}
    return desc.monolithic_sparse(folder, name, made, **options)


def missing_tables_once(folder: str, name: str, seed: int) -> Image:
    made = content(MIB + SECTOR, seed, 4 * KIB, 0.02)
    options: dict[str, Any] = {"grain_sectors": 8, "gtes": 64, "preallocate_tables": False, "rgd": False}
    return desc.monolithic_sparse(folder, name, made, **options)


def disorderly(folder: str, name: str, seed: int) -> Image:
    made = content(300 * KIB + SECTOR, seed, 8 * KIB)
    options: dict[str, Any] = {"shuffle_grains": seed, "misalign": 3, "gap_sectors": 5, "tables_last": True}
    return desc.monolithic_sparse(folder, name, made, grain_sectors=16, gtes=8, **options)


def split(folder: str, name: str, seed: int) -> Image:
    made = content(500 * KIB + SECTOR, seed, 8 * KIB)
    return desc.split_sparse(folder, name, made, 304, grain_sectors=16, gtes=8, descriptor=b"")


def oddly_split(folder: str, name: str, seed: int) -> Image:
    made = content(500 * KIB + SECTOR, seed, 8 * KIB)
    return desc.split_sparse(folder, name, made, 307, grain_sectors=16, gtes=8)


def split_missing_tables(folder: str, name: str, seed: int) -> Image:
    made = content(500 * KIB + SECTOR, seed, 8 * KIB, 0.1)
    options: dict[str, Any] = {"grain_sectors": 16, "gtes": 8, "preallocate_tables": False}
    return desc.split_sparse(folder, name, made, 304, **options)


def mixed(folder: str, name: str, seed: int) -> Image:
    rows = [
        Row("RW", "FLAT", content(64 * KIB, seed + 1, 4 * KIB), "shared.img", 8),
        Row("RW", "SPARSE", content(100 * KIB + SECTOR, seed, 4 * KIB), options={"grain_sectors": 8}),
        Row("RW", "FLAT", content(33 * SECTOR, seed + 2, 4 * KIB), "shared.img", 200),
        Row("RW", "SPARSE", content(90 * KIB, seed + 3), options={"zero_gte": True}),
    ]
    return desc.custom(folder, name, rows)


def stream(folder: str, name: str, seed: int) -> Image:
    return desc.stream_optimized(folder, name, content(500 * KIB + SECTOR, seed))


def cowd(folder: str, name: str, seed: int) -> Image:
    return desc.vmfs_sparse(folder, name, content(200 * KIB + SECTOR, seed, 4 * KIB))


def cowd_tables(folder: str, name: str, seed: int) -> Image:
    """Two tables of grains of a sector, of which one may have to be made; the file is longer than is used."""
    made = content(2 * MIB + 50 * KIB + SECTOR, seed, 4 * KIB, 0.02)
    return desc.vmfs_sparse(folder, name, made, grow_to=64 * KIB)


def disorderly_cowd(folder: str, name: str, seed: int) -> Image:
    made = content(400 * KIB + SECTOR, seed, 8 * KIB)
    options: dict[str, Any] = {"shuffle_grains": seed, "first_sector": 9, "preallocate_tables": seed % 2}
    return desc.vmfs_sparse(folder, name, made, grain_sectors=16, **options)


def cowd_child(parent: Recipe, size: int, grain: int = SECTOR, **options: Any) -> Recipe:
    """A COWD child over a parent of any kind; both have their own content."""

    def made(folder: str, name: str, seed: int) -> Image:
        below = parent(folder, f"{name}-base", seed + 100)
        own = content(size, seed, max(grain, 4 * KIB), 0.2)
        return desc.vmfs_sparse(folder, name, own, parent=below, grain_sectors=grain // SECTOR, **options)

    return made


def se_sparse(folder: str, name: str, seed: int) -> Image:
    return desc.se_sparse(folder, name, content(400 * KIB, seed, 4 * KIB))


def child(parent: Recipe, size: int, grain: int = 64 * KIB, **options: Any) -> Recipe:
    """A hosted child over a parent of any kind; both have their own content."""

    def made(folder: str, name: str, seed: int) -> Image:
        below = parent(folder, f"{name}-base", seed + 100)
        options["grain_sectors"] = grain // SECTOR
        return desc.monolithic_sparse(folder, name, content(size, seed, grain, 0.2), parent=below, **options)

    return made


def split_child(folder: str, name: str, seed: int) -> Image:
    below = usual(folder, f"{name}-base", seed + 100)
    made = content(500 * KIB + SECTOR, seed, 8 * KIB, 0.2)
    options: dict[str, Any] = {"grain_sectors": 16, "gtes": 8, "zero_gte": True, "preallocate_tables": False}
    return desc.split_sparse(folder, name, made, 304, parent=below, **options)


RECIPES: dict[str, Recipe] = {
    "flat": flat,
    "vmfs": vmfs,
    "split flat": split_flat,
    "usual": usual,
    "zeroed grains": zeroed,
    "grains of a sector": sector_grains,
    "one directory": one_directory,
    "missing tables": missing_tables,
    "missing tables, one directory": missing_tables_once,
    "disorderly": disorderly,
    "split": split,
    "oddly split": oddly_split,
    "split, missing tables": split_missing_tables,
    "mixed": mixed,
    "child of flat": child(flat, 300 * KIB + SECTOR, 16 * KIB),
    "larger child": child(usual, 800 * KIB + SECTOR, 8 * KIB, gtes=32),
    "smaller child": child(usual, 300 * KIB, 8 * KIB, zero_gte=True),
    "child with zeroed grains": child(zeroed, 150 * KIB + SECTOR, 4 * KIB, gtes=16, zero_gte=True),
    "child without tables": child(split_flat, 310 * KIB, 4 * KIB, gtes=16, preallocate_tables=False),
    "child of stream": child(stream, 500 * KIB + SECTOR, zero_gte=True),
    "child of COWD": child(cowd, 200 * KIB + SECTOR, 4 * KIB, gtes=8),
    "child of seSparse": child(se_sparse, 400 * KIB, 4 * KIB, zero_gte=True),
    "grandchild": child(child(split, 500 * KIB + SECTOR, 8 * KIB, gtes=8), 500 * KIB, 16 * KIB, gtes=4),
    "split child": split_child,
    "COWD, missing tables": cowd_tables,
    "disorderly COWD": disorderly_cowd,
    "COWD child of hosted": cowd_child(usual, 600 * KIB + 5 * SECTOR, 8 * KIB, shuffle_grains=1),
    "COWD grandchild": cowd_child(cowd_child(split_flat, 310 * KIB), 300 * KIB + SECTOR, 4 * KIB),
}
#: qemu-img refuses createType custom, and reads the last grain of an extent past the extent's end.
NOT_QEMU = {"mixed", "oddly split"}

offsets = st.tuples(st.integers(0, 4095), st.sampled_from((-SECTOR - 1, -SECTOR, -1, 0, 0, 0, 1, 7, SECTOR)))
seeds = st.integers(0, 2**16)


class Writing(RuleBasedStateMachine):
    """One image, written at random; ``model`` is what it must show."""

    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.recipe = recipe
        self.folder = tempfile.mkdtemp(prefix="write-model-")
        self.disk: Disk | None = None

    @initialize(seed=st.integers(0, 3))
    def make(self, seed: int) -> None:
        self.image = RECIPES[self.recipe](self.folder, "top", seed)
        self.model = bytearray(self.image.visible.read())
        self.edges = sorted(self._edges())
        self.open()

    def _edges(self) -> set[int]:
        """Both ends, and the edges of extents, of tables and of some grains."""
        size = self.image.size
        found = {0, size}
        start = 0
        for extent in self.image.extents:
            if isinstance(extent, HostedExtent):
                grain = extent.header.grain_size * SECTOR
                length = extent.content.size
                steps = [grain * extent.header.gtes_per_gt] * 4 + [grain]
                for step in steps:
                    found.update(start + at for at in range(0, length, step))
                start += length
            elif isinstance(extent, CowdExtent):
                grain = extent.grain_sectors * SECTOR
                found.update(range(0, extent.content.size, grain * GTES))
                found.update(range(0, extent.content.size, grain))
        found.update(range(0, size, 64 * KIB))
        with open_disk(self.image.path) as disk:
            found.update(entry.start for entry in disk.links[0].extents)
        return {edge for edge in found if edge <= size}

    def open(self) -> None:
        self.disk = open_disk(self.image.path, writable=True)
        assert self.disk.writable

    def range(self, one: tuple[int, int], two: tuple[int, int]) -> tuple[int, int]:
        """(offset, length) between two edges or beside them."""
        first, last = (
            min(max(self.edges[number % len(self.edges)] + delta, 0), len(self.model))
            for number, delta in (one, two)
        )
        # Most ranges are short: a few neighbouring edges.
        if one[0] % 4 and abs(last - first) > 200 * KIB:
            last = min(first + 1 + two[0] * 50, len(self.model))
        return min(first, last), abs(last - first)

    @rule(one=offsets, two=offsets, seed=seeds, fua=st.booleans())
    def write(self, one: tuple[int, int], two: tuple[int, int], seed: int, fua: bool) -> None:
        assert self.disk
        offset, length = self.range(one, two)
        data = random.Random(seed).randbytes(length) if seed % 8 else bytes(length)
        self.disk.pwrite(data, offset, fua=fua)
        self.model[offset : offset + length] = data
        self.near(offset, length)

    @rule(one=offsets, two=offsets, may_trim=st.booleans(), fast=st.booleans(), fua=st.booleans())
    def zero(self, one: tuple[int, int], two: tuple[int, int], may_trim: bool, fast: bool, fua: bool) -> None:
        assert self.disk
        offset, length = self.range(one, two)
        try:
            self.disk.zero(length, offset, may_trim=may_trim, fast=fast, fua=fua)
        except NotFast:
            assert fast
            assert self.image.parent is not None
        else:
            self.model[offset : offset + length] = bytes(length)
        self.near(offset, length)

    @rule(one=offsets, two=offsets)
    def trim(self, one: tuple[int, int], two: tuple[int, int]) -> None:
        assert self.disk
        offset, length = self.range(one, two)
        self.disk.trim(length, offset)
        # Each byte is what it was, or zero; and stays what it is from now on.
        found, before = self.disk.pread(length, offset), bytes(self.model[offset : offset + length])
        if any(found) and found != before:
            assert all(now in (was, 0) for now, was in zip(found, before, strict=True))
        self.model[offset : offset + length] = found
        self.near(offset, length)

    @rule(one=offsets, two=offsets)
    def read(self, one: tuple[int, int], two: tuple[int, int]) -> None:
        assert self.disk
        offset, length = self.range(one, two)
        same(self.disk.pread(length, offset), bytes(self.model[offset : offset + length]), offset)

    def near(self, offset: int, length: int) -> None:
        """Look at what was changed and at what lies beside it."""
        first, last = max(0, offset - SECTOR), min(len(self.model), offset + length + SECTOR)
        self.read_exactly(first, last - first)

    def read_exactly(self, offset: int, length: int) -> None:
        assert self.disk
        same(self.disk.pread(length, offset), bytes(self.model[offset : offset + length]), offset)

    @rule()
    def flush(self) -> None:
        assert self.disk
        self.disk.flush()

    @rule()
    def everything(self) -> None:
        self.read_exactly(0, len(self.model))
        assert self.disk
        at = 0
        for run in self.disk.runs():
            assert run.offset == at
            if run.kind in NOTHING:
                assert not any(self.model[at : at + run.length]), f"{run} hides data"
            at += run.length
        assert at == len(self.model)

    @rule()
    def reopen(self) -> None:
        self.finish()
        with open_disk(self.image.path) as disk:
            same(disk.pread(disk.size, 0), bytes(self.model))
        self.open()

    def finish(self) -> None:
        """Close the disk, and look at the files."""
        disk, self.disk = self.disk, None
        if disk is not None:
            disk.close()
            for extent in self.image.extents:
                if isinstance(extent, HostedExtent | CowdExtent):
                    check_sound(extent.path)

    def teardown(self) -> None:
        try:
            if self.disk is not None:
                self.read_exactly(0, len(self.model))
                self.finish()
                if self.recipe not in NOT_QEMU:
                    self.ask_qemu()
        finally:
            if self.disk is not None:
                self.disk.close()
            shutil.rmtree(self.folder)

    def ask_qemu(self) -> None:
        raw = os.path.join(self.folder, "qemu.raw")
        for command in (
            ["qemu-img", "check", "-q", "-f", "vmdk", self.image.path],
            ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", self.image.path, raw],
        ):
            # Flat disks have nothing to check, which qemu-img calls 63.
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode in ((0, 63) if command[1] == "check" else (0,)), done.stderr
        with open(raw, "rb") as file:
            same(file.read(), bytes(self.model))


@pytest.mark.parametrize("recipe", RECIPES)
def test_random_writing(recipe: str) -> None:
    run_state_machine_as_test(
        partial(Writing, recipe),
        settings=settings(
            max_examples=int(os.environ.get("NBD_VMDK_EXAMPLES", "8")),
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
