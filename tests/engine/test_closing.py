"""
What a disk is after it was closed: nothing that answers.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import Closed, VmdkError
from tests.images import desc, ova
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


# The folder


def pins(folder: Path) -> list[str]:
    """What this process has open in a folder, the folder itself among it."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            pass  # that of the listing
    return [name for name in found if name == str(folder) or name.startswith(f"{folder}/")]


@pytest.fixture(name="uncollected")
def _uncollected() -> Iterator[None]:
    """Without the collector of cycles, which may come late: nothing may be waiting for it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _linked(folder: Path) -> tuple[str, dict[str, Any]]:
    real = folder / "real"
    real.mkdir()
    (folder / "a.vmdk").symlink_to(desc.monolithic_flat(str(real), "b", CONTENT).path)
    return str(folder / "a.vmdk"), {}


def _chain(folder: Path) -> tuple[str, dict[str, Any]]:
    above, below = folder / "above", folder / "below"
    above.mkdir()
    below.mkdir()
    parent = desc.monolithic_flat(str(below), "b", CONTENT)
    return desc.monolithic_sparse(str(above), "a", CONTENT, parent=parent).path, {"allow_dirs": [str(below)]}


def _named(folder: Path) -> tuple[str, dict[str, Any]]:
    path, _ = _chain(folder)
    return path, {"parent": str(folder / "below" / "b.vmdk")}


def _guessed(folder: Path) -> tuple[str, dict[str, Any]]:
    """The hint leads where nothing may be had."""
    parent = desc.monolithic_flat(str(folder), "b", CONTENT)
    text = {"parent_cid": parent.cid, "hint": "/elsewhere/b.vmdk"}
    return desc.monolithic_sparse(str(folder), "a", CONTENT, text=text).path, {}


def _archive(folder: Path) -> tuple[str, dict[str, Any]]:
    image = desc.stream_optimized(str(folder), "b", CONTENT)
    path = str(folder / "a.ova")
    ova.write_ova(path, [ova.Disk(image.path, CONTENT.size, gzip=True)])
    return path, {}


def _chunked(folder: Path) -> tuple[str, dict[str, Any]]:
    image = desc.stream_optimized(str(folder), "b", CONTENT)
    path = str(folder / "a.ova")
    ova.write_ova(path, [ova.Disk(image.path, CONTENT.size, chunk_size=64 * KIB)])
    return path, {}


def _moved(folder: Path) -> tuple[str, dict[str, Any]]:
    """The machine and the descriptor have names that lead elsewhere; each finds its file beside."""
    image = desc.monolithic_flat(str(folder), "a", CONTENT)
    text = Path(image.path).read_text().replace("a-flat.vmdk", "/elsewhere/a-flat.vmdk")
    Path(image.path).write_text(text)
    path, options = _machine(folder)
    Path(path).write_text(Path(path).read_text().replace("a.vmdk", "/elsewhere/a.vmdk"))
    return path, options


def _machine(folder: Path) -> tuple[str, dict[str, Any]]:
    if not (folder / "a.vmdk").exists():
        desc.monolithic_sparse(str(folder), "a", CONTENT)
    path = folder / "a.vmx"
    path.write_text('scsi0.present = "TRUE"\nscsi0:0.present = "TRUE"\nscsi0:0.fileName = "a.vmdk"\n')
    return str(path), {}


def _folder(folder: Path) -> tuple[str, dict[str, Any]]:
    desc.monolithic_sparse(str(folder), "a", CONTENT)
    return str(folder), {}


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    "make", [_linked, _chain, _named, _guessed, _archive, _chunked, _machine, _moved, _folder]
)
def test_its_folders_are_let_go_of(
    tmp_path: Path, make: Callable[[Path], tuple[str, dict[str, Any]]]
) -> None:
    """Whoever unmounts a file system once its disk is closed must not find it busy."""
    path, options = make(tmp_path)
    with open_disk(path, **options) as disk:
        assert disk.pread(disk.size, 0) == CONTENT.read(0, CONTENT.size)
        assert pins(tmp_path)
    assert not pins(tmp_path)
    assert disk.links[0].folder.label("x").endswith("/x")
    with pytest.raises(Closed):
        disk.links[0].folder.open("a.vmdk")
    with pytest.raises(Closed):
        disk.links[0].folder.names()


@pytest.mark.usefixtures("uncollected")
def test_an_error_keeps_no_folder(tmp_path: Path) -> None:
    """Once nobody has it any more."""
    image = desc.monolithic_flat(str(tmp_path), "a", CONTENT)
    os.truncate(image.files[1], 0)
    with pytest.raises(VmdkError):
        open_disk(image.path)
    assert not pins(tmp_path)
