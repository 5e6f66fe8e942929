"""
Whole images: the input becomes files, which are opened in every way, read, mapped and written.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

from nbd_vmdk.disk import Disk
from nbd_vmdk.extents.base import Extent, Kind
from nbd_vmdk.extents.flat import FlatExtent
from nbd_vmdk.extents.hosted import HostedExtent
from nbd_vmdk.extents.stream import StreamExtent
from nbd_vmdk.opening import open_disk
from nbd_vmdk.ops.info import image_info
from nbd_vmdk.ops.mapping import map_rows
from nbd_vmdk.runs import Run
from tests.fuzz import case
from tests.fuzz.answers import our_errors

SECTOR = 512
KIB = 1 << 10
#: Not more than this is read or written in one request, nor looked at of a disk's runs.
MOST = 256 * KIB
MAX_RUNS = 400


def fuzz_image(data: bytes) -> None:
    """One file, whose bytes are the input."""
    with folder_for_images() as folder:
        path = os.path.join(folder, "fuzz.vmdk")
        with open(path, "wb") as file:
            file.write(data)
        _open_every_way(path, data)


def fuzz_files(data: bytes) -> None:
    """Several files (case.py), the first of which is opened."""
    files = case.decode(data)
    with folder_for_images() as folder:
        paths = [file.write(folder) for file in files]
        if paths and paths[0] is not None:
            _open_every_way(paths[0], data)


@contextlib.contextmanager
def folder_for_images() -> Iterator[str]:
    """A folder for one input, removed at the end."""
    # In memory where that is possible: what is fuzzed are the bytes, not the disk below.
    base = os.environ.get("NBD_VMDK_FUZZ_DIR") or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    folder = tempfile.mkdtemp(prefix="nbd-vmdk-fuzz-", dir=base)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _open_every_way(path: str, data: bytes) -> None:
    rng = random.Random(data)
    json.dumps(image_info(path))
    plain = _visit(path, rng)
    # A way is only taken where it can lead elsewhere than the plain one.
    if not plain:
        _visit(path, rng, salvage=True, ignore_cid=True)
    elif StreamExtent in plain:
        _visit(path, rng, salvage=True)
    if plain & {FlatExtent, HostedExtent}:
        careful = rng.random() < 0.2
        _visit(
            path, rng, writable=True, ignore_cid=not careful, drop_ctk=not careful, write_parent=not careful
        )
        with our_errors():  # what was written there may have damaged it, if two places were one
            open_disk(path, ignore_cid=True).close()


def _visit(path: str, rng: random.Random, **options: Any) -> set[type[Extent]]:
    """Open an image, use it, close it; the kinds of extent that it has, none if it was refused."""
    with our_errors():
        disk = open_disk(path, **options)
        try:
            assert disk.size > 0
            assert all(isinstance(warning, str) for warning in disk.warnings)
            _read(disk, rng)
            if disk.writable:
                _write(disk, rng)
        finally:
            with our_errors():
                disk.close()
        return {type(entry.extent) for link in disk.links for entry in link.extents}
    return set()


def _read(disk: Disk, rng: random.Random) -> None:
    runs = _runs(disk)
    for run in [*runs[:20], *rng.sample(runs, min(len(runs), 10))]:
        _check_run(disk, run)
    for offset, length in _places(disk, runs, rng):
        with our_errors():
            found = disk.pread(length, offset)
            assert len(found) == length
            assert disk.pread(length, offset) == found, "the same place reads differently"
            half = length // 2
            assert disk.pread(half, offset) + disk.pread(length - half, offset + half) == found
    with our_errors():
        disk.cache(min(disk.size, MOST), 0)
    with our_errors():
        json.dumps(list(islice(map_rows(disk), 20)))


def _runs(disk: Disk) -> list[Run]:
    """The first runs, which must follow each other; fewer if one of them can't be told."""
    runs: list[Run] = []
    with our_errors():
        runs.extend(islice(disk.runs(), MAX_RUNS))
        assert runs[0].offset == 0
        if len(runs) < MAX_RUNS:
            assert runs[-1].offset + runs[-1].length == disk.size, "the runs end before the disk"
    for one, two in pairwise(runs):
        assert one.length > 0
        assert one.offset + one.length == two.offset, f"{one} is not followed by {two}"
    return runs


def _check_run(disk: Disk, run: Run) -> None:
    """What a run says is what a read gives."""
    length = min(run.length, 4 * KIB)
    for offset in {run.offset, run.offset + run.length - length}:
        with our_errors():
            found = disk.pread(length, offset)
            if run.kind in (Kind.HOLE, Kind.ZERO):
                assert not any(found), f"{run} reads as data"
            assert run.kind is not Kind.LOST, f"{run} can be read"
            if run.kind is Kind.DATA and run.at is not None and run.file is not None:
                _check_data(run, offset, found)


def _check_data(run: Run, offset: int, found: bytes) -> None:
    with contextlib.suppress(OSError), open(run.file or "", "rb") as file:  # no file: it is in an archive
        assert run.at is not None
        file.seek(run.at + offset - run.offset)
        assert file.read(len(found)) == found, f"{run} reads as something else"


def _places(disk: Disk, runs: list[Run], rng: random.Random) -> list[tuple[int, int]]:
    """(offset, length) where reading may go wrong: both ends, and around edges of runs, grains and tables."""
    edges = [0, disk.size, rng.randrange(disk.size)]
    edges += [run.offset for run in [*runs[:6], *rng.sample(runs, min(len(runs), 4))]]
    entries = disk.links[0].extents
    edges += [entry.start for entry in entries[:4]]
    for entry in entries[:3]:
        edges += [entry.start + entry.extent.grain * count for count in (1, 128, 512, 4096)]
    places = []
    for edge in edges:
        start = max(0, edge - rng.choice((0, 1, SECTOR, 4 * KIB)))
        length = min(rng.choice((1, SECTOR, 4 * KIB, 70 * KIB)), disk.size - start)
        if length > 0:
            places.append((start, length))
    return places


def _write(disk: Disk, rng: random.Random) -> None:
    for offset, length in _places(disk, _runs(disk), rng)[:12]:
        match rng.randrange(8):
            case 0:
                with our_errors():
                    disk.trim(length, offset)
            case 1:
                with our_errors():
                    disk.zero(length, offset, may_trim=rng.random() < 0.5, fast=rng.random() < 0.3)
                    if length <= SECTOR:
                        assert not any(disk.pread(length, offset)), "zeroes read as data"
            case 2:
                with our_errors():
                    disk.pwrite(rng.randbytes(length), offset, fua=rng.random() < 0.3)
            case 3:
                with our_errors():
                    disk.flush()
            case _:
                _write_sector(disk, offset // SECTOR * SECTOR, rng)
    with our_errors():
        disk.flush()


def _write_sector(disk: Disk, offset: int, rng: random.Random) -> None:
    """One sector lies in one place, so it reads as written even where a damaged image has places twice."""
    new = rng.randbytes(min(SECTOR, disk.size - offset))
    with our_errors():
        disk.pwrite(new, offset)
        assert disk.pread(len(new), offset) == new, f"what was written at {offset} is not there"
