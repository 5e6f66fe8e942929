"""What is said when links can't be merged or moved leads on: the commands in the hints are run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.cli import main
from nbd_vmdk.ops.create import create_image
from nbd_vmdk.ops.snapshot.create import create_child
from tests.images import desc
from tests.images.content import MIB, Content


def run(*words: str) -> None:
    assert main([*words]) == 0


def hint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main([*words]) == 1
    (found,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hint: ")]
    return found


def command(told: str) -> list[str]:
    """The command in a hint, up to where a sentence goes on."""
    words = shlex.split(told[told.index("nbd-vmdk ") :])[1:]
    return words[: words.index("makes")] if "makes" in words else words


def test_a_child_that_is_smaller_than_its_parent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = desc.monolithic_sparse(str(tmp_path), "base", Content.random(2 * MIB, 1))
    content = Content(MIB).put(0, b"new")
    image = desc.monolithic_sparse(str(tmp_path), "the child", content, parent=base).path
    told = hint(capsys, "snapshot", "commit", image)
    with open_disk(image) as disk:
        before = disk.pread(MIB, 0)
    run(*command(told))
    with open_disk(image) as disk:
        assert len(disk.links) == 1
        assert disk.pread(MIB, 0) == before


def test_a_child_that_can_not_make_its_parent_larger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_image(tmp_path / "base.vmdk", 2 * MIB, kind="twoGbMaxExtentSparse", extent_size=MIB)
    child = create_child(tmp_path / "base.vmdk", tmp_path / "the child.vmdk").path
    run("resize", child, "3M")
    (tmp_path / "base-s003.vmdk").write_bytes(b"important")
    told = hint(capsys, "snapshot", "commit", child)
    run(*command(told[told.index("; ") :]))
    with open_disk(child) as disk:
        assert (len(disk.links), disk.size) == (1, 3 * MIB)


def test_another_parent_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_image(tmp_path / "base.vmdk", 2 * MIB)
    child = create_child(tmp_path / "base.vmdk").path
    for name, size in (("large one.vmdk", 4 * MIB), ("small one.vmdk", MIB)):
        other = str(tmp_path / name)
        create_image(other, size)
        run(*command(hint(capsys, "snapshot", "rebase", child, "--parent", other)))
        run("snapshot", "rebase", child, "--parent", other)


def test_a_parent_that_can_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = desc.stream_optimized(str(tmp_path), "base", Content.random(MIB, 1))
    child = desc.monolithic_sparse(str(tmp_path), "child", Content(MIB).put(0, b"new"), parent=base).path
    told = hint(capsys, "snapshot", "commit", child)
    assert told == hint(capsys, "snapshot", "commit", "--dry-run", child)
    assert command(told) == ["convert", child, "new.vmdk"]


def test_a_parent_without_a_content_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_image(tmp_path / "disk.vmdk", MIB, kind="monolithicFlat")
    text = (tmp_path / "disk.vmdk").read_text().splitlines()
    at = next(at for at, line in enumerate(text) if line.startswith("CID="))
    for line in ("CID=ffffffff", ""):
        image = str(tmp_path / f"disk {line}.vmdk")
        Path(image).write_text("\n".join([*text[:at], line, *text[at + 1 :]]) + "\n")
        told = hint(capsys, "snapshot", "create", image)
        if line:
            words = shlex.split(told.removeprefix("hint: nbd-vmdk ").removesuffix(" gives it one"))
            run(*words)
            run("snapshot", "create", image)
        else:
            assert told == "hint: nbd-vmdk convert makes a copy that has one"
            run("convert", image, str(tmp_path / "copy.vmdk"))
            run("snapshot", "create", str(tmp_path / "copy.vmdk"))
