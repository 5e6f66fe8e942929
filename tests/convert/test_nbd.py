"""NBD exports as sources and targets, on real servers."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbd_vmdk import Work, convert, open_disk
from nbd_vmdk.client import binding
from nbd_vmdk.errors import NbdError, StorageError
from tests.convert import raw_file
from tests.images.content import KIB, MIB, SECTOR, Content

pytestmark = pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")


@contextmanager
def nbdkit(folder: Path, *words: str) -> Iterator[str]:
    """A server on a unix socket, for as long as it is needed; its URI."""
    path, pid = folder / "sock", folder / "pid"
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(path), "-P", str(pid), *words])
    try:
        deadline = time.monotonic() + 10
        while not pid.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.terminate()
        process.wait()
        path.unlink(missing_ok=True)
        pid.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "filters",
    [
        [],
        ["--filter=noparallel", "--filter=noextents"],
        ["--filter=nozero"],
        ["--filter=blocksize-policy"],
    ],
    ids=["plain", "no-extents", "no-zero", "blocks-of-4k"],
)
def test_there_and_back(tmp_path: Path, filters: list[str]) -> None:
    content = Content.random(8 * MIB, 4)
    source = raw_file(tmp_path / "a.raw", content)
    there = tmp_path / "served"
    there.write_bytes(b"\xaa" * 8 * MIB)  # nothing of it may be left
    words = [*filters, "file", str(there)]
    if "--filter=blocksize-policy" in filters:
        words += ["blocksize-minimum=4k", "blocksize-preferred=64k", "blocksize-maximum=1M"]
        words += ["blocksize-error-policy=error"]
    with nbdkit(tmp_path, *words) as uri:
        done = convert(source, uri, work=Work(verify=True))
        assert (done.kind, done.size, done.occupied) == ("nbd", 8 * MIB, None)
        convert(uri, tmp_path / "b.vmdk", work=Work(verify=True, threads=4))
    assert there.read_bytes() == content.read()
    with open_disk(tmp_path / "b.vmdk") as disk:
        assert disk.pread(disk.size, 0) == content.read()


def test_zeros_are_not_sent_to_an_export_of_zeros(tmp_path: Path) -> None:
    content = Content(64 * MIB).put(5 * MIB, b"x" * SECTOR)
    source = raw_file(tmp_path / "a.raw", content)
    log = tmp_path / "log"
    with nbdkit(tmp_path, "--filter=log", "memory", "64M", f"logfile={log}") as uri:
        convert(source, uri)
    requests = log.read_text()
    assert requests.count(" Write ") == 1
    assert " Zero " not in requests
    assert " Flush " in requests


def test_an_export_too_small(tmp_path: Path) -> None:
    source = raw_file(tmp_path / "a.raw", Content.random(MIB, 1))
    with nbdkit(tmp_path, "memory", "512k") as uri, pytest.raises(StorageError, match="are needed"):
        convert(source, uri)


def test_an_export_that_may_not_be_written(tmp_path: Path) -> None:
    source = raw_file(tmp_path / "a.raw", Content.random(MIB, 1))
    with nbdkit(tmp_path, "-r", "memory", "1M") as uri, pytest.raises(NbdError, match="nobody write"):
        convert(source, uri)


def test_a_server_that_fails(tmp_path: Path) -> None:
    source = raw_file(tmp_path / "a.raw", Content.random(4 * MIB, 1, density=1))
    failing = ["--filter=error", "memory", "4M", "error-pwrite-rate=100%", "error=ENOSPC"]
    with nbdkit(tmp_path, *failing) as uri, pytest.raises(NbdError, match=r"[Nn]o space"):
        convert(source, uri)
    failing = ["--filter=error", "memory", "4M", "error-pread-rate=100%", "--filter=noextents"]
    with nbdkit(tmp_path, *failing) as uri, pytest.raises(NbdError):
        convert(uri, tmp_path / "b.vmdk")
    assert not (tmp_path / "b.vmdk").exists()


def test_no_server(tmp_path: Path) -> None:
    uri = f"nbd+unix:///?socket={tmp_path}/none"
    with pytest.raises(NbdError, match="can't connect: No such file") as caught:
        convert(uri, tmp_path / "b.vmdk")
    assert f"is the server running? nbdinfo '{uri}'" in str(caught.value.hint)


@pytest.mark.parametrize("to_it", [True, False])
def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, to_it: bool) -> None:
    monkeypatch.setattr(binding, "PATIENCE", 0.3)
    uri = f"nbd+unix:///?socket={tmp_path}/mute"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(f"{tmp_path}/mute")
        mute.listen()
        source = raw_file(tmp_path / "a.raw", Content.random(MIB, 1))
        with pytest.raises(NbdError, match=r"no answer in 0\.3 s") as caught:
            convert(*((source, uri) if to_it else (uri, tmp_path / "b.vmdk")))
    assert caught.value.file == uri
    assert "is that an NBD server?" in str(caught.value.hint)
    assert not (tmp_path / "b.vmdk").exists()


def test_a_server_that_never_answers_is_left_when_asked_to(tmp_path: Path) -> None:
    """Waiting in libnbd, no signal would be heard."""
    words = [sys.executable, "-m", "nbd_vmdk", "convert", f"nbd+unix:///?socket={tmp_path}/mute"]
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(f"{tmp_path}/mute")
        mute.listen()
        process = subprocess.Popen([*words, str(tmp_path / "b.vmdk")])
        with mute.accept()[0]:
            process.terminate()
            assert process.wait(timeout=10) == 128 + signal.SIGTERM


def test_a_server_that_hangs_up_at_once(tmp_path: Path) -> None:
    uri = f"nbd+unix:///?socket={tmp_path}/curt"
    with socket.socket(socket.AF_UNIX) as curt, ThreadPoolExecutor(1) as pool:
        curt.bind(f"{tmp_path}/curt")
        curt.listen()
        pool.submit(lambda: curt.accept()[0].close())
        with pytest.raises(NbdError, match=r"can't connect: .*disconnected"):
            convert(uri, tmp_path / "b.vmdk")


def test_size_that_is_no_number_of_blocks(tmp_path: Path) -> None:
    content = Content.random(MIB + 3 * SECTOR, 4, grain=4 * KIB).read()
    (tmp_path / "served").write_bytes(content)
    with nbdkit(tmp_path, "file", str(tmp_path / "served")) as uri:
        convert(uri, tmp_path / "b.raw", work=Work(verify=True))
    assert (tmp_path / "b.raw").read_bytes() == content
