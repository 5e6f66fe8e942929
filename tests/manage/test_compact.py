"""
Images made to occupy less: what they show stays, what they occupy does not, whatever stops it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbd_vmdk import open_disk
from nbd_vmdk.cli import main
from nbd_vmdk.converting.conversion import convert
from nbd_vmdk.errors import InUse, VmdkError, WriteRefused
from nbd_vmdk.look import read_descriptor
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.compact import compact
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.units import KIB, MIB
from tests.images import content, desc, ova
from tests.manage import KINDS, faults, make
from tests.snapshot import by_qemu, killed_at, make_chain, make_child, names_in, needs_qemu, scribble, shows


def occupied(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def cid(path: Path) -> int | None:
    found = read_descriptor(*LocalFolder.for_image(path))
    assert found is not None
    return found.cid


def waste(path: Path) -> bytes:
    """Zeros that were written, and space that was in use once."""
    with open_disk(path, writable=True) as disk:
        size = disk.size
        disk.pwrite(b"\x01" * size, 0)
        disk.flush()
        disk.pwrite(bytes(size // 2), size // 4)
        disk.pwrite(b"here", size // 2)
    return shows(path)


@needs_qemu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rewrite", [False, True])
def test_zeros_are_given_back(tmp_path: Path, kind: str, rewrite: bool) -> None:
    path = make(tmp_path, kind, 4 * MIB)
    before, content_id = waste(path), cid(path)
    data = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    told = compact(path, dry_run=True, rewrite=rewrite)
    assert data == {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    assert told.freed > 1.9 * MIB
    done = compact(path, rewrite=rewrite)
    assert done.before == told.before
    assert done.after == occupied(tmp_path) < 2.2 * MIB
    if not rewrite:
        assert abs(done.before - done.after - done.freed - done.unused) <= 128 * KIB
    assert shows(path) == by_qemu(path) == before
    assert cid(path) == content_id
    assert faults(path) == []
    again = compact(path)
    assert (again.freed, again.unused) == (0, 0)
    scribble(path, 3, 30)
    assert shows(path) == by_qemu(path)


def test_what_check_finds_unused_is_given_back(tmp_path: Path) -> None:
    image = desc.monolithic_sparse(str(tmp_path), "disk", content.Content.of(b"1" * MIB), gap_sectors=128)
    packed = ova.write_ova(str(tmp_path / "a.ova"), [ova.Disk(image.path, image.size)])

    def repair(path: str) -> str:
        (finding,) = check_image(path).findings
        assert finding.slug == "unused-space"
        return str(finding.repair)

    assert "nbd-vmdk compact" in repair(image.path)
    assert "converting" in repair(packed.path)  # an appliance stays as it is
    compact(image.path)
    assert check_image(image.path).findings == []


@pytest.mark.parametrize("base", ["monolithicSparse", "monolithicFlat", "vmfs", "twoGbMaxExtentSparse"])
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("rewrite", [False, True])
def test_any_link_of_a_chain(tmp_path: Path, base: str, number: int, rewrite: bool) -> None:
    links = make_chain(tmp_path, base)
    with open_disk(links[number], writable=True, ignore_cid=True, write_parent=True) as disk:
        disk.links[0].keep_cid()
        disk.pwrite(bytes(300_000), 100_000)
    before = [shows(path) for path in links]
    compact(links[number], rewrite=rewrite)
    assert [shows(path) for path in links] == before
    assert faults(links[-1]) == []


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 1000), rewrite=st.booleans())
def test_whatever_is_in_it(tmp_path: Path, kind: str, seed: int, rewrite: bool) -> None:
    for name in names_in(tmp_path):
        (tmp_path / name).unlink()
    path = make(tmp_path, kind, 2 * MIB + 512 * seed)
    scribble(path, seed, 20)
    child = make_child(path)
    scribble(child, seed + 1, 20)
    for each in (path, child):
        expected = shows(path), shows(child)
        before = occupied(tmp_path)
        compact(each, rewrite=rewrite)
        assert (shows(path), shows(child)) == expected
        assert occupied(tmp_path) <= before + (64 * KIB if rewrite else 0)
        assert faults(child) == []


def test_in_the_order_of_the_disk(tmp_path: Path) -> None:
    path = make(tmp_path, "monolithicSparse", 4 * MIB)
    with open_disk(path, writable=True) as disk:
        for at in range(0, 4 * MIB, 8 * KIB):
            disk.pwrite(b"x" * 4096, 4 * MIB - 8 * KIB - at)
    compact(path, rewrite=True)
    with open_disk(path) as disk:
        places = [run.at for run in disk.runs() if run.at is not None]
    assert len(places) == 512
    assert places == sorted(places)


@needs_qemu
@pytest.mark.parametrize("over", [False, True])
def test_holes_inside_grains_stay_holes(tmp_path: Path, over: bool) -> None:
    """QEMU writes of a grain only the blocks with data in them; those of zeros must hide a parent's."""
    path = make(tmp_path, "monolithicSparse", 8 * MIB)
    if over:
        with open_disk(path, writable=True) as disk:
            disk.pwrite(b"p" * 8 * MIB, 0)
        path = make_child(path)
        with open_disk(path, writable=True) as disk:
            for at in range(0, 8 * MIB, 64 * KIB):
                disk.pwrite(bytes(32 * KIB) + b"c" * 4 * KIB + bytes(28 * KIB), at)
    else:
        raw, path = tmp_path / "a.raw", tmp_path / "a.vmdk"
        with raw.open("wb") as file:
            for at in range(32 * KIB, 8 * MIB, 64 * KIB):
                file.seek(at)
                file.write(b"c" * 4 * KIB)
            file.truncate(8 * MIB)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vmdk", raw, path], check=True)
    before = shows(path)
    done = compact(path, rewrite=True)
    assert shows(path) == by_qemu(path) == before
    assert done.after is not None
    assert done.after <= min(done.before, 1.5 * MIB)
    assert faults(path) == []


def test_compressed_anew(tmp_path: Path) -> None:
    made = make(tmp_path, "monolithicSparse", 4 * MIB)
    before = waste(made)
    path = tmp_path / "packed.vmdk"
    convert(made, path, kind="streamOptimized")
    with pytest.raises(WriteRefused) as refused:
        compact(path)
    assert "--rewrite" in (refused.value.hint or "")
    content_id = cid(path)
    compact(path, rewrite=True, level=9)
    assert shows(path) == before
    assert cid(path) == content_id
    assert faults(path) == []


@pytest.mark.parametrize(
    ("kind", "rewrite"),
    [
        ("monolithicSparse", False),
        ("vmfsSparse", False),
        ("monolithicSparse", True),
        ("twoGbMaxExtentSparse", True),
    ],
)
def test_killed_anywhere(tmp_path: Path, kind: str, rewrite: bool) -> None:
    made = tmp_path / "made"
    made.mkdir()
    expected = waste(make(made, kind, 2 * MIB))
    step = 0
    while True:
        folder = tmp_path / "work"
        shutil.copytree(made, folder)
        path = folder / "disk.vmdk"
        ended = not killed_at(step, lambda path=path: compact(path, rewrite=rewrite, threads=1))  # type: ignore[misc]
        assert shows(path) == expected
        compact(path, rewrite=rewrite)
        assert shows(path) == expected
        assert faults(path, "unclean", "tables-differ") == []  # as any crash of a writer
        assert not [name for name in names_in(folder) if name.startswith(".") and ".tmp-" not in name]
        shutil.rmtree(folder)
        if ended:
            break
        step += 1 if step < 8 else 5
    assert step > 1


def test_what_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path, "monolithicSparse", 2 * MIB)
    scribble(path, 1)
    with open_disk(path, writable=True), pytest.raises(InUse):
        compact(path)
    with open_disk(path, writable=True), pytest.raises(InUse):
        compact(path, rewrite=True)
    with open(path, "r+b") as file:
        file.seek(21 * 512)
        file.write(b"\xff" * 8)
    with pytest.raises(VmdkError, match=r"damaged|redundant directory"):
        compact(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, "monolithicSparse", 4 * MIB)
    before = waste(path)
    assert main(["compact", str(path), "--dry-run"]) == 0
    assert "could be given back" in capsys.readouterr().out
    assert main(["compact", str(path), "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert answer["occupied-before"] > answer["occupied-after"]
    assert main(["compact", str(path), "--rewrite"]) == 0
    assert shows(path) == before
