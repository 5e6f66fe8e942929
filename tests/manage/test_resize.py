"""
Other sizes for disks in place: what they show before and after, refusals, and being stopped anywhere.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbd_vmdk import open_disk
from nbd_vmdk.cli import main
from nbd_vmdk.errors import InUse, OptionError, StorageError, VmdkError, WriteRefused
from nbd_vmdk.look import read_descriptor
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.create import create_image
from nbd_vmdk.ops.resize import resize
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.units import GIB, KIB, MIB, SECTOR, TIB
from tests.images import cut, desc
from tests.images.content import Content
from tests.manage import KINDS, faults, make
from tests.snapshot import (
    by_qemu,
    killed_at,
    make_chain,
    make_child,
    names_in,
    needs_qemu,
    scribble,
    shows,
    steps_told,
)

ODD = 3 * SECTOR


def descriptor(path: Path) -> Any:
    found = read_descriptor(*LocalFolder.for_image(path))
    assert found is not None
    return found


@needs_qemu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [3 * MIB, 20 * MIB])
def test_growing(tmp_path: Path, kind: str, size: int) -> None:
    path = make(tmp_path, kind, 2 * MIB + ODD)
    scribble(path, 1)
    before, cid = shows(path), descriptor(path).cid
    done = resize(path, size)
    assert (done.old_size, done.new_size) == (len(before), size)
    assert shows(path) == by_qemu(path) == before.ljust(size, b"\0")
    assert faults(path) == []
    found = descriptor(path)
    assert found.cid != cid
    assert int(found.long_content_id[24:], 16) == found.cid
    assert int(found.get("ddb.geometry.cylinders")) == size // SECTOR // (64 * 32)
    # And it can be written, the new part too.
    scribble(path, 2, 30)
    assert shows(path) == by_qemu(path)
    assert faults(path) == []


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(sorted(KINDS)),
    sectors=st.lists(st.integers(1, 12000), min_size=2, max_size=5),
    seed=st.integers(0, 1000),
)
def test_sizes_of_all_sorts(tmp_path: Path, kind: str, sectors: list[int], seed: int) -> None:
    for name in names_in(tmp_path):
        (tmp_path / name).unlink()
    path = make(tmp_path, kind, max(sectors[0], 100) * SECTOR)
    expected = b""
    for count in sectors[1:]:
        scribble_some(path, seed)
        expected = shows(path)
        size = max(count, 100) * SECTOR
        resize(path, size, shrink=True)
        expected = expected[:size].ljust(size, b"\0")
        assert shows(path) == expected
        assert faults(path) == []


def scribble_some(path: Path, seed: int) -> None:
    scribble(path, seed, 4)
    with open_disk(path, writable=True) as disk:
        disk.pwrite(b"the end", disk.size - 7)


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentSparse", "vmfsSparse"])
def test_growing_far_beyond_the_directory(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path, kind, MIB, extent_size=None)
    scribble(path, 1)
    before = shows(path)
    resize(path, 5 * GIB)
    with open_disk(path, writable=True) as disk:
        disk.pwrite(b"far", 5 * GIB - 3)
        assert disk.pread(MIB, 0) == before
    with open_disk(path) as disk:
        assert disk.pread(3, 5 * GIB - 3) == b"far"
        assert sum(run.length for run in disk.runs(MIB) if run.kind) <= 64 * KIB
    assert faults(path) == []


def test_growing_by_the_tail_that_a_grain_has_too_much(tmp_path: Path) -> None:
    """Other writers may leave what they like behind the end of the disk; it must not show."""
    path = make(tmp_path, "monolithicSparse", 2 * MIB + ODD)
    with open_disk(path, writable=True) as disk:
        disk.pwrite(b"\xff" * ODD, 2 * MIB)
        run = next(disk.runs(2 * MIB))
    assert run.at is not None
    with open(path, "r+b") as file:
        file.seek(run.at)
        file.write(b"\xff" * 4096)
    resize(path, 3 * MIB)
    assert shows(path)[2 * MIB :] == (b"\xff" * ODD).ljust(MIB, b"\0")


def test_growing_behind_a_last_grain_that_is_cut_off(tmp_path: Path) -> None:
    """What the guest did not see of it is not in the file, and new tables may not be put there."""
    content = Content(2 * MIB + ODD).put(2 * MIB, b"\xff" * ODD)
    image = desc.monolithic_sparse(str(tmp_path), "disk", content, grain_sectors=8, misalign=3)
    cut(image.path, -5 * SECTOR)
    path = Path(image.path)
    resize(path, 20 * MIB)
    with open_disk(path, writable=True) as disk:
        disk.pwrite(b"\xee" * 5 * SECTOR, 2 * MIB + ODD)
    assert shows(path)[2 * MIB :] == (b"\xff" * ODD + b"\xee" * 5 * SECTOR).ljust(18 * MIB, b"\0")
    assert faults(path, "grain-misaligned") == []


@pytest.mark.parametrize("kind", KINDS)
def test_shrinking_only_where_there_is_nothing(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path, kind, 3 * MIB + ODD)
    with open_disk(path, writable=True) as disk:
        disk.pwrite(b"data", MIB + 5000)
        disk.pwrite(bytes(70_000), 2 * MIB)
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    with pytest.raises(WriteRefused, match=f"from byte {MIB + 5000} on"):
        resize(path, MIB)
    assert resize(path, MIB, dry_run=True).lost == MIB + 5000
    assert before == {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    resize(path, MIB + 8 * KIB)
    assert shows(path) == (bytes(MIB + 5000) + b"data").ljust(MIB + 8 * KIB, b"\0")
    assert len(names_in(tmp_path)) == len([name for name in before if name[-8:-5] != "004"]) - (
        1 if "GbMax" in kind else 0
    )
    resize(path, MIB, shrink=True)
    resize(path, by=2 * MIB)
    assert shows(path) == bytes(3 * MIB)
    assert faults(path) == []


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"monolithicFlat", "twoGbMaxExtentFlat"}))
@pytest.mark.parametrize("larger", [True, False])
def test_killed_anywhere(tmp_path: Path, kind: str, larger: bool) -> None:
    many = "GbMax" in kind
    old, new = 2 * MIB, 600 * MIB if kind in ("monolithicSparse", "vmfsSparse") else 5 * MIB
    if not larger:
        old, new = new, old
    made = tmp_path / "made"
    made.mkdir()
    scribble(make(made, kind, min(old, new)), 1)
    expected = shows(made / "disk.vmdk")
    if old > new:
        resize(made / "disk.vmdk", old)
    step = 0
    sizes = []
    while True:
        folder = tmp_path / "work"
        shutil.copytree(made, folder)
        path = folder / "disk.vmdk"
        ended = not killed_at(step, lambda path=path: resize(path, new))  # type: ignore[misc]
        with open_disk(path) as disk:
            sizes.append(disk.size)
            assert disk.pread(len(expected), 0) == expected
            behind = [run for run in disk.runs(len(expected)) if run.kind and run.file is not None]
            assert not any(disk.pread(run.length, run.offset).strip(b"\0") for run in behind)
        assert faults(path, "unclean", "unclean-shutdown", "cowd-free") == [] or not ended
        resize(path, new)
        with open_disk(path) as disk:
            assert disk.size == new
            assert disk.pread(len(expected), 0) == expected
        assert not [name for name in names_in(folder) if name.startswith(".") and ".tmp-" not in name]
        left = len(names_in(folder))
        shutil.rmtree(folder)
        if ended:
            break
        step += 1
    assert sizes == sorted(sizes, reverse=old > new)
    assert step > 3
    assert set(sizes) == {old, new}
    assert left == (new // MIB + 1 if many else 1 + (kind != "monolithicSparse"))


def test_children(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, middle, top = make_chain(tmp_path)
    for link in (base, middle):
        with pytest.raises(WriteRefused, match="stands on it") as caught:
            resize(link, 3 * MIB)
        assert caught.value.hint == f"resize the top of the chain instead: nbd-vmdk resize {top}"
    before = shows(top)
    assert not caplog.records
    resize(top, 3 * MIB)
    merged = f"nbd-vmdk snapshot commit {top} makes the parent as large"
    assert merged in caplog.text
    (found,) = check_image(top).findings
    assert merged in str(found.repair)
    assert shows(top) == before.ljust(3 * MIB, b"\0")
    for size in (2 * MIB, MIB):
        with pytest.raises(WriteRefused, match="can't be smaller"):
            resize(top, size, shrink=True)
    scribble(top, 7)
    child = make_child(top)
    assert shows(child) == shows(top)
    assert faults(child) == ["chain-size"]  # which is what was asked for


@needs_qemu
def test_a_child_beyond_its_parent_as_qemu_sees_it(tmp_path: Path) -> None:
    top = make_chain(tmp_path)[-1]
    resize(top, 3 * MIB)
    scribble(top, 7, 40)
    assert by_qemu(top) == shows(top)


def test_what_can_not_be(tmp_path: Path) -> None:
    packed = tmp_path / "packed.vmdk"
    create_image(packed, MIB, kind="streamOptimized")
    with pytest.raises(WriteRefused) as refused:
        resize(packed, 2 * MIB)
    assert "convert" in (refused.value.hint or "")
    sparse = make(tmp_path, "monolithicSparse", MIB)
    for wanted in ({"size": 0}, {"by": -MIB}, {"by": -2 * MIB}, {"size": 4 * TIB}):
        with pytest.raises(OptionError):
            resize(sparse, **wanted)
    with open_disk(sparse, writable=True), pytest.raises(InUse):
        resize(sparse, 2 * MIB)
    flat = make(tmp_path, "monolithicFlat", MIB, name="flat.vmdk")
    with (tmp_path / "flat-flat.vmdk").open("ab") as file:
        file.write(b"something else")
    with pytest.raises(WriteRefused, match="something else"):
        resize(flat, 2 * MIB)
    assert shows(sparse) == shows(flat) == bytes(MIB)


def test_a_new_extent_takes_nobodys_place(tmp_path: Path) -> None:
    path = make(tmp_path, "twoGbMaxExtentFlat", 2 * MIB)
    (tmp_path / "disk-f003.vmdk").write_bytes(b"important")
    with pytest.raises(VmdkError, match="there already"):
        resize(path, 3 * MIB)
    assert (tmp_path / "disk-f003.vmdk").read_bytes() == b"important"


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentSparse", "vmfsSparse"])
def test_a_full_disk(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path, kind, 2 * MIB)
    size = 20 * MIB if "GbMax" in kind else 600 * MIB
    scribble(path, 1)
    before = shows(path)
    for limit in range(0, 100, 4):
        left = limit

        def full(name: str) -> None:
            nonlocal left
            left -= name in ("pwrite", "ftruncate")
            if left < 0:
                raise OSError(28, os.strerror(28))

        with steps_told(full):
            try:
                resize(path, size)
                break
            except (StorageError, OSError):
                pass
        assert shows(path) == before
    with open_disk(path) as disk:
        assert disk.size == size
        assert disk.pread(2 * MIB, 0) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [3 * MIB, 5 * MIB, MIB])
def test_a_folder_that_can_not_be_written(tmp_path: Path, kind: str, size: int) -> None:
    path = make(tmp_path, kind, 2 * MIB + ODD)
    before = contents(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", making_nothing)
        with pytest.raises(
            StorageError, match=f"^{path}: write its descriptor: Permission denied$"
        ) as caught:
            resize(path, size)
    assert caught.value.hint == "that takes making a file beside it: its folder can't be written"
    assert contents(tmp_path) == before
    resize(path, size)
    assert shows(path) == bytes(size)
    assert faults(path) == []


def making_nothing(path: str, flags: int, *args: Any, _open: Any = os.open, **options: Any) -> int:
    if flags & os.O_CREAT:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    number: int = _open(path, flags, *args, **options)
    return number


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names_in(folder)}


def test_check_knows_a_resize_that_was_stopped(tmp_path: Path) -> None:
    path = make(tmp_path, "monolithicSparse", 2 * MIB)
    step = 0
    told = []
    while killed_at(step, lambda: resize(path, 20 * MIB)):
        told += [found.repair for found in check_image(path).findings if found.slug == "size-differs"]
        step += 1
    assert told
    assert all("the same one goes on" in why for why in told)
    assert shows(path) == bytes(20 * MIB)
    assert faults(path) == []


@pytest.mark.parametrize("kind", ["vmfs", "twoGbMaxExtentFlat"])
def test_space_is_reserved(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path, kind, MIB + ODD, preallocation="falloc")
    resize(path, 4 * MIB, reserve=True)
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir()) >= 4 * MIB
    if kind == "vmfs":
        room = os.statvfs(tmp_path)
        with pytest.raises(StorageError):
            resize(path, room.f_bavail * room.f_frsize * 2, reserve=True)
    assert shows(path) == bytes(4 * MIB)
    assert faults(path) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, "monolithicSparse", MIB)
    assert main(["resize", str(path), "+1M", "--dry-run"]) == 0
    assert shows(path) == bytes(MIB)
    assert main(["resize", str(path), "+1M"]) == 0
    assert main(["resize", str(path), "-512K", "--json"]) == 0
    out = capsys.readouterr().out
    answer = json.loads(out[out.index("{") :])
    assert (answer["old-size"], answer["new-size"], answer["done"]) == (2 * MIB, 2 * MIB - 512 * KIB, True)
    assert shows(path) == bytes(2 * MIB - 512 * KIB)
    assert main(["resize", str(path), "1X"]) == 2
    assert main(["resize", str(path), "--", "-1"]) == 0  # rounded up to whole sectors
    assert main(["resize", str(tmp_path / "none.vmdk"), "1M"]) == 1
