"""
What a disk is after it was closed: nothing that answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import Closed
from tests.images import desc
from tests.images.content import KIB, SECTOR, Content

CONTENT = Content.random(1024 * KIB, seed=1, density=0.5).settled(64 * KIB)

#: All that a disk can be asked to do, on places with and without data.
CALLS: dict[str, Callable[[Disk, int], Any]] = {
    "pread": lambda disk, at: disk.pread(1, at),
    "pread of nothing": lambda disk, _at: disk.pread(0, 0),
    "pread outside": lambda disk, at: disk.pread(disk.size, at),
    "pread_into": lambda disk, at: disk.pread_into(bytearray(SECTOR), at),
    "read_into": lambda disk, at: disk.read_into(memoryview(bytearray(SECTOR)), at),
    "read_into of two grains": lambda disk, at: disk.read_into(memoryview(bytearray(128 * KIB)), at),
    "pwrite": lambda disk, at: disk.pwrite(b"x", at),
    "pwrite of nothing": lambda disk, _at: disk.pwrite(b"", 0),
    "write_from": lambda disk, at: disk.write_from(memoryview(bytes(SECTOR)), at, fua=True),
    "zero": lambda disk, at: disk.zero(SECTOR, at),
    "trim": lambda disk, at: disk.trim(SECTOR, at),
    "flush": lambda disk, _at: disk.flush(),
    "cache": lambda disk, at: disk.cache(SECTOR, at),
    "place": lambda disk, at: disk.place(at, SECTOR),
    "runs": lambda disk, _at: list(disk.runs()),
    "edges": lambda disk, at: disk.edges(at, SECTOR, 1),
}


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "flat", "child"])
def test_every_call_says_so(tmp_path: Path, kind: str, writable: bool) -> None:
    """Also those that its caches could answer."""
    folder = str(tmp_path)
    if kind == "flat":
        image = desc.monolithic_flat(folder, "a", CONTENT)
    elif kind == "sparse":
        image = desc.monolithic_sparse(folder, "a", CONTENT)
    else:
        image = desc.monolithic_sparse(
            folder, "a", CONTENT, parent=desc.monolithic_flat(folder, "b", CONTENT)
        )
    disk = open_disk(image.path, writable=writable)
    disk.pread(disk.size, 0)
    places = {run.kind: run.offset for run in disk.runs()}.values()
    if writable:
        disk.pwrite(b"x", 0)
    size = disk.size
    disk.close()
    for name, call in CALLS.items():
        for at in places:
            with pytest.raises(Closed) as refused:
                call(disk, at)
            assert str(refused.value) == f"{image.path}: it is closed", name
    disk.close()
    assert disk.size == size  # what it was can still be told
    assert os.path.exists(disk.links[0].name)
    with open_disk(image.path) as again:
        assert again.pread(1, 0) == (b"x" if writable else CONTENT.read(0, 1))
