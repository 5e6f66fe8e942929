"""Options that hints name are ones that the verb has, or one is told which verb has them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.cli import _OPTION, main
from nbd_vmdk.cli.serve import serve
from nbd_vmdk.ops.create import create_image
from nbd_vmdk.ops.snapshot.create import create_child
from tests.images.content import MIB


def hint(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(list(map(str, words))) in (1, 5)
    (found,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hint: ")]
    return found.removeprefix("hint: ")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    create_image(tmp_path / "base.vmdk", MIB)
    return str(tmp_path / "base.vmdk"), create_child(tmp_path / "base.vmdk").path


def test_what_another_verb_has(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, child = pair
    told = hint(capsys, "write", base, "--zero", "--length", 1)
    assert told.endswith("give up the child with --write-parent (-r: an option of serve, not of write)")
    if shutil.which("nbdfuse") and os.path.exists("/dev/fuse"):
        (tmp_path / "empty").mkdir()
        told = hint(capsys, "mount", base, tmp_path / "empty")
        assert told.endswith(" (--write-parent: an option of serve, not of mount)")
    with open_disk(child, writable=True, locks=True):
        told = hint(capsys, "write", child, "--zero", "--length", 1)
        assert told.endswith("as it is with -r (-r: an option of serve, not of write)")
    os.unlink(base)
    plain = "put the parent beside it, or name it with --parent FILE"
    for words in (("checksum", child), ("convert", child, tmp_path / "new.vmdk")):
        assert hint(capsys, *words) == plain
    for words in (("resize", child, "2M"), ("clone", child, tmp_path / "new.vmdk")):
        assert hint(capsys, *words) == f"{plain} (--parent: an option of serve, not of {words[0]})"
    told = hint(capsys, "snapshot", "create", child)
    assert told == f"{plain} (--parent: an option of serve, not of snapshot create)"


def test_serve_has_them_all() -> None:
    known = {option for parameter in serve.params for option in parameter.opts}
    names = ("-r", "--parent", "--ignore-cid", "--salvage", "--write-parent", "--drop-ctk")
    for option in (*names, "--allow-dir", "--allow-devices"):
        assert option in known
        assert _OPTION.findall(f"to go on, add {option}; and more") == [option]


@pytest.mark.parametrize(
    "text",
    [
        "modprobe -r nbd; modprobe nbd nbds_max=64 max_part=16",
        "nbd-vmdk snapshot rebase --relink child.vmdk --parent base.vmdk",
        "--with-children deletes them too; nbd-vmdk snapshot rebase --flatten makes one independent",
        "name one with --parentage",
    ],
)
def test_options_of_other_commands_are_left_alone(text: str) -> None:
    assert _OPTION.findall(text) == []
