"""A disk below us that fails, files that go away while they are served, and files that we may not write."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from nbd_vmdk import VmdkError, open_disk
from nbd_vmdk.errors import Latched
from nbd_vmdk.storage import local
from tests.engine import same
from tests.failing import content
from tests.failing.kinds import KINDS
from tests.images import desc
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.plugin import ROOT, Nbdkit, errno_of

Serve = Callable[..., Nbdkit]

GRAIN = 64 * KIB


def code_of(call: Callable[[], object]) -> int:
    """The errno that a call fails with, 0 if it succeeds."""
    try:
        call()
    except VmdkError as error:
        return error.errno
    return 0


@pytest.mark.parametrize("kind", KINDS)
def test_failed_sync_latches(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    case = KINDS[kind](str(tmp_path))
    real = os.fdatasync
    broken = False

    def fdatasync(fd: int) -> None:
        if broken:
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(local, "_IN_MEMORY", frozenset())  # of those that fail in a sync /tmp may be none
    disk = open_disk(case.path, writable=True)
    disk.pwrite(b"a" * GRAIN, MIB)
    disk.flush()
    disk.pwrite(b"b" * GRAIN, 2 * MIB)
    broken = True
    assert code_of(disk.flush) == errno.EIO
    # The disk is well again, and still nothing is promised.
    broken = False
    for call in (
        disk.flush,
        lambda: disk.pwrite(b"x", 0),
        lambda: disk.zero(GRAIN, 0),
        lambda: disk.trim(GRAIN, 0),
    ):
        with pytest.raises(Latched):
            call()
    assert disk.pread(GRAIN, MIB) == b"a" * GRAIN
    assert code_of(disk.close) == errno.EIO
    with open_disk(case.path, writable=True) as again:
        assert again.pread(GRAIN, MIB) == b"a" * GRAIN
        again.pwrite(b"c", 0, fua=True)


@pytest.mark.parametrize("kind", ["monolithic", "child", "flat"])
def test_short_reads_and_writes_are_gone_on_with(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    case = KINDS[kind](str(tmp_path))
    preadv, pwrite = os.preadv, os.pwrite

    def some(length: int) -> int:
        return max(1, length // 3)

    monkeypatch.setattr(
        os, "preadv", lambda fd, bufs, at: preadv(fd, [memoryview(bufs[0])[: some(len(bufs[0]))]], at)
    )
    monkeypatch.setattr(os, "pwrite", lambda fd, buf, at: pwrite(fd, memoryview(buf)[: some(len(buf))], at))
    data = os.urandom(3 * GRAIN)
    with open_disk(case.path, writable=True) as disk:
        model = bytearray(disk.pread(disk.size, 0))
        disk.pwrite(data, MIB + 100)
        model[MIB + 100 : MIB + 100 + len(data)] = data
        same(disk.pread(disk.size, 0), bytes(model))
    monkeypatch.undo()
    with open_disk(case.path) as disk:
        same(disk.pread(disk.size, 0), bytes(model))
    case.sound(clean=True)


@pytest.mark.parametrize("kind", ["monolithic", "flat"])
def test_failing_reads_and_writes_are_told_and_no_more(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    case = KINDS[kind](str(tmp_path))
    real = {name: getattr(os, name) for name in ("preadv", "pwrite")}
    broken = ""

    def wrapped(name: str) -> Callable[..., int]:
        def call(fd: int, what: Any, at: int) -> int:
            if name == broken:
                raise OSError(errno.EIO, "Input/output error")
            return int(real[name](fd, what, at))

        return call

    for name in real:
        monkeypatch.setattr(os, name, wrapped(name))
    with open_disk(case.path, writable=True) as disk:
        before = disk.pread(disk.size, 0)
        broken = "pwrite"
        assert code_of(lambda: disk.pwrite(b"x" * GRAIN, MIB)) == errno.EIO
        same(disk.pread(disk.size, 0), before)
        broken = "preadv"
        at = next(run.offset for run in disk.runs() if run.at is not None)
        assert code_of(lambda: disk.pread(512, at)) == errno.EIO
        broken = ""
        same(disk.pread(disk.size, 0), before)
        disk.pwrite(b"y" * GRAIN, MIB, fua=True)
    case.sound(clean=True)


def test_an_extent_shrinks_and_another_vanishes(serve: Serve, tmp_path: Any) -> None:
    """EIO for what is gone, and nothing else: no signal ends the server, and the rest goes on."""
    data = os.urandom(6 * MIB)
    image = desc.split_flat(str(tmp_path), "top", Content.of(data), 2 * MIB // SECTOR)
    server = serve(image.path)
    connection = server.connect()
    same(bytes(connection.pread(6 * MIB, 0)), data)
    _, first, second, _third = image.files
    os.truncate(first, MIB)
    os.unlink(second)
    assert errno_of(lambda: connection.pread(GRAIN, MIB + GRAIN)) == "EIO"
    assert errno_of(lambda: connection.pread(2 * GRAIN, MIB - GRAIN)) == "EIO"
    same(bytes(connection.pread(MIB, 0)), data[:MIB])
    # A name that is gone takes nothing from who has the file open.
    same(bytes(connection.pread(4 * MIB, 2 * MIB)), data[2 * MIB :])
    connection.pwrite(b"z" * GRAIN, 5 * MIB)
    connection.flush()
    same(bytes(connection.pread(GRAIN, 5 * MIB)), b"z" * GRAIN)


def test_a_sparse_extent_shrinks(serve: Serve, tmp_path: Any) -> None:
    data = os.urandom(4 * MIB)
    image = desc.monolithic_sparse(str(tmp_path), "top", Content.of(data))
    server = serve(image.path)
    connection = server.connect()
    same(bytes(connection.pread(GRAIN, 0)), data[:GRAIN])
    os.truncate(image.path, os.path.getsize(image.path) - 2 * MIB)
    assert errno_of(lambda: connection.pread(GRAIN, 3 * MIB)) == "EIO"
    same(bytes(connection.pread(MIB, 0)), data[:MIB])
    connection.pwrite(b"z" * GRAIN, 0)
    connection.flush()


def as_nobody(*line: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as somebody who has no rights of root's."""
    command = [sys.executable, "-m", "nbd_vmdk", *line]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may do everything, and setpriv is not here")
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


@pytest.mark.parametrize("kind", ["monolithic", "split", "flat"])
def test_files_that_may_not_be_written(tmp_path: Any, kind: str) -> None:
    """The error names -r, and -r works."""
    case = KINDS[kind](str(tmp_path))
    last = case.image.files[-1]
    before = {path: content(path) for path in case.image.files}
    os.chmod(last, 0o444)
    done = as_nobody("serve", "--run", "true", case.path)
    assert done.returncode == 1, done
    assert f"error: {last}: open for writing: Permission denied" in done.stderr
    assert "-r" in done.stderr
    done = as_nobody("serve", "-r", "--run", 'nbdinfo --is readonly "$uri"', case.path)
    assert done.returncode == 0, done
    os.chmod(last, 0)
    done = as_nobody("serve", "-r", "--run", "true", case.path)
    assert done.returncode in (1, 2)
    assert "Permission denied" in done.stderr or "is not readable" in done.stderr
    os.chmod(last, 0o644)  # so that it can be compared by whoever runs the tests
    assert {path: content(path) for path in case.image.files} == before
