"""Who may have an image that is served, and whom we leave alone: against the real QEMU, both ways."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nbd_vmdk import open_disk
from tests.engine import same
from tests.failing import Served, content, wait_for
from tests.images import desc
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image
from tests.plugin import ROOT

Command = Callable[..., Served]

GRAIN = 64 * KIB
TOOLS = ("qemu-img", "qemu-io", "qemu-nbd")
pytestmark = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="QEMU's tools are not here")


def make(folder: str, kind: str) -> Image:
    data = Content.of(os.urandom(4 * MIB))
    if kind == "split":
        return desc.split_sparse(folder, "top", data, 2 * MIB // SECTOR, descriptor=b"")
    if kind == "flat":
        return desc.monolithic_flat(folder, "top", data)
    return desc.monolithic_sparse(folder, "top", data)


KINDS = ["sparse", "split", "flat"]


def run(*line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def ours(*line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nbd_vmdk", *line],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )


@contextmanager
def qemu_nbd(image: str, folder: str, *options: str) -> Iterator[None]:
    socket = os.path.join(folder, "qemu")
    process = subprocess.Popen(["qemu-nbd", "-f", "vmdk", "-k", socket, "-t", *options, image])
    try:
        wait_for(lambda: os.path.exists(socket) or process.poll() is not None)
        assert process.poll() is None
        yield
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("kind", KINDS)
def test_qemu_refuses_what_we_write(command: Command, tmp_path: Any, kind: str) -> None:
    image = make(str(tmp_path), kind)
    raw = str(tmp_path / "raw")
    with_lock = [
        ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", image.path, raw],
        ["qemu-img", "info", image.path],
        ["qemu-io", "-f", "vmdk", "-c", "write 0 512", image.path],
        ["qemu-io", "-r", "-f", "vmdk", "-c", "read 0 512", image.path],
        ["qemu-nbd", "-f", "vmdk", "-k", str(tmp_path / "no"), image.path],
    ]
    if kind != "flat":
        with_lock.append(["qemu-img", "check", "-f", "vmdk", image.path])
    server = command(image.path)
    for line in with_lock:
        done = run(*line)
        assert done.returncode != 0, line
        assert "lock" in done.stderr, done
    assert run("qemu-img", "info", "-U", image.path).returncode == 0
    assert server.stop() == 0
    for line in with_lock:
        if line[0] != "qemu-nbd":  # which would stay
            assert run(*line).returncode == 0, line


@pytest.mark.parametrize("kind", KINDS)
def test_we_refuse_what_qemu_writes(tmp_path: Any, kind: str) -> None:
    image = make(str(tmp_path), kind)
    with qemu_nbd(image.path, str(tmp_path)):
        done = ours("serve", "--run", "true", image.path)
        assert done.returncode == 5, done
        assert "in use by another process" in done.stderr
        assert "-r" in done.stderr
        # Reading beside it is possible, with a warning.
        done = ours("serve", "-r", "--run", "true", image.path)
        assert done.returncode == 0, done
        assert "warning: " in done.stderr
        assert "may be inconsistent" in done.stderr
    assert ours("serve", "--run", "true", image.path).returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_readers_go_together(command: Command, tmp_path: Any, kind: str) -> None:
    image = make(str(tmp_path), kind)
    with qemu_nbd(image.path, str(tmp_path), "-r"):
        assert ours("serve", "--run", "true", image.path).returncode == 5
        server = command(image.path, "-r")
        same(bytes(server.connect().pread(4 * MIB, 0)), image.content.read())
        assert (
            run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", image.path, f"{image.path}.raw").returncode
            == 0
        )
        assert server.stop() == 0
        assert not server.errors


def test_a_reader_beside_our_writer_is_warned(command: Command, tmp_path: Any) -> None:
    image = make(str(tmp_path), "split")
    command(image.path)
    done = ours("serve", "--run", "true", image.path)
    assert done.returncode == 5
    done = ours("serve", "-r", "--run", "true", image.path)
    assert done.returncode == 0
    assert "may be inconsistent" in done.stderr


def test_two_children_of_one_parent(command: Command, tmp_path: Any) -> None:
    """Both are written at once; the parent is shared, may be read by others, and stays what it is."""
    folder = str(tmp_path)
    parent = desc.split_sparse(folder, "base", Content.of(os.urandom(4 * MIB)), 2 * MIB // SECTOR)
    children = [
        desc.monolithic_sparse(folder, name, Content(4 * MIB), parent=parent) for name in ("one", "two")
    ]
    before = {path: (content(path), os.stat(path).st_mtime_ns) for path in parent.files}
    servers = [command(child.path) for child in children]
    connections = [server.connect() for server in servers]
    for turn in range(20):
        for number, connection in enumerate(connections):
            connection.pwrite(bytes([number + 1]) * 5000, turn * 200_000)
    for connection in connections:
        connection.flush()
    # The parent is in use: to read it is fine, to write it is not.
    assert run("qemu-img", "info", parent.path).returncode == 0
    assert ours("serve", "-r", "--run", "true", parent.path).returncode == 0
    done = ours("serve", "--write-parent", "--run", "true", parent.path)
    assert done.returncode == 5, done
    for server in servers:
        assert server.stop() == 0
    for number, child in enumerate(children):
        model = bytearray(parent.visible.read())
        for turn in range(20):
            model[turn * 200_000 : turn * 200_000 + 5000] = bytes([number + 1]) * 5000
        with open_disk(child.path) as disk:
            same(disk.pread(4 * MIB, 0), bytes(model))
    assert {path: (content(path), os.stat(path).st_mtime_ns) for path in parent.files} == before
