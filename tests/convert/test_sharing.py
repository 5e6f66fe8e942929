"""On a file system whose files may share blocks: flat and raw disks are made again without copying."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.cli import main
from tests.images.content import KIB, MIB
from tests.mounted import mounted

#: No whole block at the end.
SIZE = 40 * MIB + 1536
DATA = 24 * MIB


@pytest.fixture(params=["btrfs", "xfs"])
def folder(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with mounted(tmp_path, request.param, 512 * MIB) as where:
        monkeypatch.chdir(where)
        yield Path(where)
        monkeypatch.undo()


@pytest.fixture
def raw(folder: Path) -> Path:
    path = folder / "disk.raw"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        file.seek(MIB)
        file.write(os.urandom(DATA - 4 * KIB))
        file.seek(SIZE - 1536)
        file.write(os.urandom(1536))
    return path


def taken(folder: Path) -> int:
    """Bytes that the file system has given out."""
    subprocess.run(["sync", "-f", str(folder)], check=True)
    return shutil.disk_usage(folder).used


def is_same(one: Path, other: str) -> bool:
    command = ["qemu-img", "compare", "-q", "-f", "raw", "-F", other.rpartition(".")[2], str(one), other]
    return subprocess.run(command, check=False).returncode == 0


def test_flat_and_raw_disks_share_their_blocks(folder: Path, raw: Path) -> None:
    before = taken(folder)
    flat = ["--reflink", "--type", "monolithicFlat"]
    assert main(["convert", "disk.raw", "flat.vmdk", *flat]) == 0
    split = ["--reflink", "--type", "twoGbMaxExtentFlat", "--extent-size", "16M"]
    assert main(["convert", "flat.vmdk", "split.vmdk", *split]) == 0
    assert main(["convert", "split.vmdk", "again.raw", "--reflink", "--verify"]) == 0
    assert main(["clone", "split.vmdk", "clone.vmdk"]) == 0
    assert taken(folder) - before < DATA // 4
    for made in ("flat.vmdk", "split.vmdk", "again.raw", "clone.vmdk"):
        assert is_same(raw, made)


def test_grains_are_shared_where_they_lie_on_blocks(folder: Path, raw: Path) -> None:
    assert main(["convert", "disk.raw", "sparse.vmdk"]) == 0
    before = taken(folder)
    assert main(["convert", "sparse.vmdk", "again.raw", "--reflink"]) == 0
    assert taken(folder) - before < DATA // 4
    assert is_same(raw, "again.raw")


def test_writing_to_the_copy_leaves_the_original(folder: Path, raw: Path) -> None:
    assert main(["convert", "disk.raw", "flat.vmdk", "--reflink", "--type", "monolithicFlat"]) == 0
    assert main(["convert", "disk.raw", "other.raw", "--reflink"]) == 0
    with open_disk(folder / "flat.vmdk", writable=True) as disk:
        disk.pwrite(os.urandom(MIB), 2 * MIB)
    assert not is_same(raw, "flat.vmdk")
    assert is_same(raw, "other.raw")


def test_a_copy_without_being_asked_has_its_own_blocks_and_no_zeros(folder: Path, raw: Path) -> None:
    with open(raw, "r+b") as file:
        file.seek(4 * MIB)
        file.write(bytes(8 * MIB))
    before = taken(folder)
    assert main(["convert", "disk.raw", "again.raw"]) == 0
    assert DATA - 9 * MIB < taken(folder) - before < DATA - 7 * MIB
    assert is_same(raw, "again.raw")


def test_it_tells_how_much_is_shared(folder: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert raw.parent == folder
    assert main(["convert", "disk.raw", "again.raw", "--reflink", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["shared"] > DATA - MIB
    assert main(["convert", "disk.raw", "sparse.vmdk", "--reflink", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["shared"] == 0
    assert "no blocks could be shared" in said.err


def test_what_was_shared_counts_as_written(folder: Path, raw: Path) -> None:
    """A content ID that says "never written" would let a child of another base be taken for one of this."""
    assert raw.exists()
    assert main(["convert", "disk.raw", "flat.vmdk", "--reflink", "--type", "monolithicFlat"]) == 0
    assert "CID=fffffffe" not in (folder / "flat.vmdk").read_text()
