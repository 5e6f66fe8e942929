"""Disks of more files than may be open: what is read of them, and how, does not depend on the limit.

Every program is started with a hard limit far below the number of files, as a container may have it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.images import desc, ova
from tests.images.content import MIB, Content
from tests.plugin import ROOT, errno_of
from tests.plugin.conftest import Serve

FILES = 160
STEP = 64  # sectors
SIZE = FILES * STEP * 512
LIMIT = 64


def limited(limit: int = LIMIT) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def run(*words: object, limit: int | None = LIMIT, code: int = 0) -> str:
    """What nbd-vmdk prints, with so many files that may be open."""
    done = subprocess.run(
        [sys.executable, "-m", "nbd_vmdk", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": ROOT},
        preexec_fn=None if limit is None else limited(limit),
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> desc.Image:
    folder = tmp_path_factory.mktemp("flat")
    return desc.split_flat(str(folder), "base", Content.random(SIZE, seed=1, grain=4096), STEP)


@pytest.fixture(scope="module")
def child(base: desc.Image) -> desc.Image:
    """Its extents and its parent's are each far too many."""
    content = Content.random(SIZE, seed=2, density=0.3)
    return desc.split_sparse(os.path.dirname(base.path), "child", content, STEP, parent=base)


@pytest.mark.parametrize("words", ["info --json", "checksum", "check", "map --json", "snapshot list"])
def test_what_is_told(child: desc.Image, words: str) -> None:
    assert run(*words.split(), child.path) == run(*words.split(), child.path, limit=None)


def test_what_is_read(base: desc.Image, child: desc.Image, tmp_path: Path) -> None:
    run("convert", child.path, tmp_path / "raw.img", "--type", "raw")
    assert (tmp_path / "raw.img").read_bytes() == child.visible.read(0, SIZE)
    run("compare", child.path, tmp_path / "raw.img")
    run("convert", base.path, tmp_path / "one.vmdk")
    run("compare", base.path, tmp_path / "one.vmdk", limit=32)
    found = run("compare", base.path, child.path, code=1)
    assert found == run("compare", base.path, child.path, limit=None, code=1)
    run("clone", child.path, tmp_path / "clone.vmdk")
    run("compare", tmp_path / "clone.vmdk", child.path)


def test_served(serve: Serve, child: desc.Image, tmp_path: Path) -> None:
    server = serve(child.path, options=("-r",), preexec_fn=limited(100))
    copy = tmp_path / "copy"
    for _ in range(2):
        subprocess.run(["nbdcopy", "--no-extents", server.uri, copy], check=True, timeout=60)
        assert copy.read_bytes() == child.visible.read(0, SIZE)
    assert server.stop() == 0
    assert "Too many" not in server.errors


def test_nobody_writes_what_is_read(serve: Serve, base: desc.Image, child: desc.Image) -> None:
    """The links are locked by the files that they are named by, whichever of their extents are open."""
    server = serve(child.path, options=("-r",), preexec_fn=limited(100))
    for link in base, child:
        words = ("write", link.path, "--write-parent", "--zero", "--length", 512)
        assert f"{link.path}: in use by another process" in run(*words, limit=None, code=5)
    qemu = ["qemu-io", "-f", "vmdk", "-c", "write 0 512", base.path]
    done = subprocess.run(qemu, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "lock" in done.stderr
    assert server.connect().pread(SIZE, 0) == child.visible.read(0, SIZE)


def test_a_writable_child(serve: Serve, base: desc.Image, tmp_path: Path) -> None:
    """Its own files are few and stay open; those of its parent come and go."""
    top = desc.monolithic_sparse(os.path.dirname(base.path), "top", Content(SIZE), parent=base)
    server = serve(top.path, preexec_fn=limited(100))
    disk = server.connect()
    disk.pwrite(b"new" * 512, 5000)
    disk.flush()
    expected = bytearray(base.content.read(0, SIZE))
    expected[5000 : 5000 + 3 * 512] = b"new" * 512
    assert disk.pread(SIZE, 0) == expected
    assert server.stop() == 0
    assert run("check", top.path) == f"{top.path}: no errors were found\n"
    os.unlink(top.path)


def test_many_exports(serve: Serve, tmp_path: Path) -> None:
    """Each disk has its file, and all have the one folder."""
    one = desc.monolithic_sparse(str(tmp_path), "disk", Content.random(MIB, seed=3))
    for number in range(1, 150):
        shutil.copy(one.path, tmp_path / f"d{number}.vmdk")
    paths = [f"file={tmp_path}/d{number}.vmdk" for number in range(1, 150)]
    server = serve(one.path, *paths, options=("-r",), preexec_fn=limited(100))
    for name in ("", "d1.vmdk", "d77.vmdk", "d149.vmdk", "d2.vmdk"):
        disk = server.connect(name)
        assert disk.pread(MIB, 0) == one.content.read(0, MIB)
        disk.shutdown()


def test_an_archive_in_chunks(base: desc.Image, tmp_path: Path) -> None:
    image = desc.stream_optimized(str(tmp_path), "disk", Content.random(2 * MIB, seed=4, density=1))
    assert os.path.getsize(image.path) > 100 * 6000
    ova.write_ova(str(tmp_path / "vm.ova"), [ova.Disk(image.path, image.size, chunk_size=6000)])
    run("convert", tmp_path / "vm.ova", tmp_path / "raw.img", "--type", "raw")
    assert (tmp_path / "raw.img").read_bytes() == image.content.read(0, 2 * MIB)


def test_a_file_that_goes_away(serve: Serve, base: desc.Image, tmp_path: Path) -> None:
    """An error where it was, and nowhere else; and no error any more when it is back."""
    folder = tmp_path / "vm"
    shutil.copytree(os.path.dirname(base.path), folder)
    server = serve(f"{folder}/base.vmdk", options=("-r",), preexec_fn=limited(100))
    disk = server.connect()
    step, last = STEP * 512, FILES - 1
    gone = folder / f"base-f{FILES:03}.vmdk"
    expected = base.content.read(last * step, step)
    assert disk.pread(step, last * step) == expected

    def others() -> None:
        for number in range(last):
            assert disk.pread(step, number * step) == base.content.read(number * step, step)

    gone.rename(tmp_path / "away")
    others()
    assert errno_of(lambda: disk.pread(step, last * step)) == "EIO"
    gone.write_bytes(bytes(step))
    assert errno_of(lambda: disk.pread(step, last * step)) == "EIO"
    (tmp_path / "away").rename(gone)
    others()
    assert disk.pread(step, last * step) == expected
    os.truncate(gone, step - 512)
    others()
    assert errno_of(lambda: disk.pread(512, last * step)) == "EIO"
    server.stop()
    said = server.errors
    assert f"{gone}: no such file" in said
    assert f"{gone}: since it was opened it has changed: another file has taken its place" in said
    assert f"{gone}: since it was opened it has changed: it has {step - 512} bytes now" in said
    assert "hint: put it back" in said


def test_writing_needs_them_all(base: desc.Image) -> None:
    said = run("write", base.path, "--zero", "--length", 512, code=1)
    assert "open for writing: Too many open files" in said
    assert "ulimit -n" in said
    facts: dict[str, Any] = json.loads(run("info", "--json", base.path))
    assert facts["virtual-size"] == SIZE
