"""A mount whose nbdfuse was killed answers nothing, and is taken away all the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from tests.failing import wait_for
from tests.images import desc
from tests.images.content import MIB, Content
from tests.serving import vmdk

_HERE = shutil.which("nbdfuse") and shutil.which("fusermount3") and os.access("/dev/fuse", os.R_OK | os.W_OK)


def fuse_of(folder: Path) -> int:
    """The nbdfuse behind a mount."""
    begin = f"nbdfuse\0{folder}\0".encode()
    (found,) = [
        each.parent for each in Path("/proc").glob("[0-9]*/cmdline") if words_of(each).startswith(begin)
    ]
    return int(found.name)


def words_of(command_line: Path) -> bytes:
    try:
        return command_line.read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # It ended after it was listed.
        return b""


def answers(folder: Path) -> bool:
    try:
        os.listdir(folder)
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _HERE, reason="nothing can be mounted here")
def test_a_dead_mount_is_taken_away(tmp_path: Path) -> None:
    image = desc.monolithic_sparse(str(tmp_path), "disk", Content(4 * MIB).put(0, b"old " * 1000))
    folder = tmp_path / "there"
    folder.mkdir()
    vmdk("mount", image.path, folder)
    try:
        os.kill(fuse_of(folder), signal.SIGKILL)
        wait_for(lambda: not answers(folder))
        assert "something is mounted there" in vmdk("mount", image.path, folder, code=5).stderr
        # What was written to the file may be lost, so it is no success; but it ends, and all is as before.
        assert "code 137" in vmdk("umount", folder, code=1).stderr
        assert os.listdir(folder) == []
        vmdk("mount", image.path, folder)
        assert (folder / "nbd").read_bytes()[:4] == b"old "
        vmdk("umount", folder)
    finally:
        if not answers(folder) or os.path.ismount(folder):
            subprocess.run(["fusermount3", "-uz", str(folder)], check=True)
    with open_disk(image.path, writable=True) as disk:
        assert disk.pread(4, 0) == b"old "
