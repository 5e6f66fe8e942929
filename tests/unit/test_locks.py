"""Locks, against the real QEMU in both directions, and where there are none."""

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk.errors import InUse, StorageError
from nbd_vmdk.storage import gate, locks
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.local import LocalFile
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.storage.window import Window
from tests.memory import MemoryStorage

needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-img and qemu-io are not here"
)

WRITER = {100, 101, 103, 201, 203}
READER = {100, 201}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file with room for all that QEMU wants in a VMDK, where QEMU is here; else any file."""
    path = tmp_path / "disk.vmdk"
    if shutil.which("qemu-img"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", path, "1M"], check=True)
    else:
        path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def opened(image: Path) -> Iterator[Callable[..., LocalFile]]:
    """Opens the image once more each time: an open file description of its own, as in another process."""
    files = []

    def again(writable: bool = True) -> LocalFile:
        fd = os.open(image, os.O_RDWR if writable else os.O_RDONLY)
        files.append(LocalFile(fd, "disk.vmdk", writable=writable))
        return files[-1]

    yield again
    for file in files:
        file.close()


def held(image: Path) -> set[int]:
    """The bytes that anybody holds a lock on."""
    fd = os.open(image, os.O_RDWR)
    try:
        return {
            byte
            for byte in range(90, 220)
            if struct.unpack(
                "hhqqi0q",
                fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack("hhqqi0q", fcntl.F_WRLCK, 0, byte, 1, 0)),
            )[0]
            != fcntl.F_UNLCK
        }
    finally:
        os.close(fd)


@contextmanager
def qemu(image: Path, *options: str) -> Iterator[None]:
    """QEMU's own block layer, with the image open until the end of the block; writable but for "-r"."""
    wanted = READER if "-r" in options else WRITER
    command = ["qemu-io", *options, "-f", "vmdk", "-c", "sleep 60000", str(image)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 20
        while not held(image) >= wanted:
            assert process.poll() is None, "qemu-io could not open the image"
            assert time.monotonic() < limit
            time.sleep(0.01)
        yield
    finally:
        process.kill()
        process.wait()


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


# Among ourselves


def test_the_bytes_that_are_held(image: Path, opened: Callable[..., LocalFile]) -> None:
    writer = opened()
    assert writer.lock(True) is None
    assert held(image) == WRITER
    writer.close()
    assert held(image) == set()
    assert opened(writable=False).lock(False) is None
    assert held(image) == READER


def test_readers_share(opened: Callable[..., LocalFile]) -> None:
    assert [opened(writable=False).lock(False) for _ in range(3)] == [None] * 3


def test_a_second_writer_is_refused_and_leaves_nothing(image: Path, opened: Callable[..., LocalFile]) -> None:
    first = opened()
    first.lock(True)
    second = opened()
    with pytest.raises(InUse) as caught:
        second.lock(True)
    assert str(caught.value) == "disk.vmdk: in use by another process (writing it)"
    assert caught.value.exit_code == 5
    first.close()
    assert held(image) == set()
    assert second.lock(True) is None


def test_a_writer_beside_a_reader_is_refused(opened: Callable[..., LocalFile]) -> None:
    opened(writable=False).lock(False)
    with pytest.raises(InUse, match=r"\(reading it and relying on it not to change\)"):
        opened().lock(True)


def test_a_reader_beside_a_writer_is_warned_and_out_of_the_way(
    image: Path, opened: Callable[..., LocalFile]
) -> None:
    writer = opened()
    writer.lock(True)
    warning = opened(writable=False).lock(False)
    assert warning == "another process is writing it; what is read may be inconsistent"
    writer.close()
    assert held(image) == set()


def test_locking_again_changes_nothing(image: Path, opened: Callable[..., LocalFile]) -> None:
    file = opened()
    assert file.lock(False) is None
    assert file.lock(True) is None
    assert file.lock(True) is None
    assert held(image) == WRITER


def test_asking_who_writes_takes_nothing(image: Path, opened: Callable[..., LocalFile]) -> None:
    asking = opened(writable=False)
    assert asking.writer() is None
    opened(writable=False).lock(False)
    assert asking.writer() is None
    writer = opened()
    with pytest.raises(InUse):
        writer.lock(True)
    assert held(image) == READER


def test_asking_finds_the_writer(opened: Callable[..., LocalFile]) -> None:
    opened().lock(True)
    assert opened(writable=False).writer() == "writing it"


def test_a_lock_outlives_other_descriptors_of_the_file(image: Path, opened: Callable[..., LocalFile]) -> None:
    opened().lock(True)
    os.close(os.open(image, os.O_RDONLY))  # would drop a classic POSIX lock
    assert held(image) == WRITER


def test_a_lock_goes_with_an_inherited_descriptor(image: Path, opened: Callable[..., LocalFile]) -> None:
    file = opened()
    file.lock(True)
    # As the server that goes on in the background after its parent has ended.
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[file.fd])
    file.close()
    assert held(image) == WRITER
    child.communicate()
    assert held(image) == set()


@pytest.mark.parametrize("kind", ["F_RDLCK", "F_WRLCK"])
def test_another_kind_of_lock_has_a_process(image: Path, opened: Callable[..., LocalFile], kind: str) -> None:
    code = f"""
import fcntl, struct, sys
file = open({str(image)!r}, "r+b")
fcntl.fcntl(file, fcntl.F_SETLK, struct.pack("hhqqi0q", fcntl.{kind}, 0, 0, 0, 0))
print("ready", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdout.readline()
        with pytest.raises(InUse) as caught:
            opened().lock(True)
        doing = "locking it" if kind == "F_WRLCK" else "writing it"
        assert str(caught.value).endswith(f"({doing}, pid {process.pid})")
        warning = opened(writable=False).lock(False)
        assert warning == f"another process is {doing}, pid {process.pid}; what is read may be inconsistent"
        process.stdin.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("writable", [False, True])
def test_a_file_system_without_locks(
    opened: Callable[..., LocalFile], monkeypatch: pytest.MonkeyPatch, writable: bool, number: int
) -> None:
    def no_locks(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    file = opened(writable)
    assert "no locks" in (file.lock(writable) or "")
    assert file.writer() is None


def test_a_lock_that_fails_otherwise(
    opened: Callable[..., LocalFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "fcntl", broken)
    with pytest.raises(StorageError, match="lock: Input/output error"):
        opened().lock(True)


def test_other_storages(image: Path, opened: Callable[..., LocalFile]) -> None:
    memory: Storage = MemoryStorage(b"x")
    assert memory.lock(True) is None
    assert memory.writer() is None
    member = Window(opened(writable=False), 0, 10, "member")
    assert member.lock(False) is None
    assert held(image) == READER
    assert member.writer() is None


# QEMU holds it


@needs_qemu
def test_qemu_writes(image: Path, opened: Callable[..., LocalFile]) -> None:
    with qemu(image):
        assert held(image) >= WRITER
        with pytest.raises(InUse, match=r"\(writing it\)"):
            opened().lock(True)
        assert opened(writable=False).writer() == "writing it"
        warning = opened(writable=False).lock(False)
        assert warning == "another process is writing it; what is read may be inconsistent"
    assert opened().lock(True) is None


@needs_qemu
def test_qemu_reads(image: Path, opened: Callable[..., LocalFile]) -> None:
    with qemu(image, "-r"):
        with pytest.raises(InUse, match="reading it and relying on it not to change"):
            opened().lock(True)
        assert opened(writable=False).lock(False) is None
        assert opened(writable=False).writer() is None


# We hold it


@needs_qemu
def test_qemu_respects_our_writing(image: Path, opened: Callable[..., LocalFile]) -> None:
    opened().lock(True)
    for command in (
        ["qemu-img", "info", image],
        ["qemu-io", "-f", "vmdk", "-c", "write 0 512", image],
        ["qemu-io", "-r", "-f", "vmdk", "-c", "read 0 512", image],
    ):
        done = run(*command)
        assert done.returncode != 0
        assert "lock" in done.stderr
    assert run("qemu-img", "info", "-U", image).returncode == 0


@needs_qemu
def test_qemu_reads_beside_our_reading(image: Path, opened: Callable[..., LocalFile]) -> None:
    opened(writable=False).lock(False)
    assert run("qemu-img", "info", image).returncode == 0
    assert run("qemu-io", "-r", "-f", "vmdk", "-c", "read 0 512", image).returncode == 0
    refused = run("qemu-io", "-f", "vmdk", "-c", "write 0 512", image)
    assert refused.returncode != 0
    assert 'Failed to get "write" lock' in refused.stderr


# VMware's own locks


def test_vmware_locks(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("disk.vmdk", "sub/disk.vmdk"):
        (tmp_path / name).touch()
    folder, _ = LocalFolder.for_image(tmp_path / "disk.vmdk")
    assert locks.vmware_lock(folder, "disk.vmdk") is None
    (tmp_path / "disk.vmdk.lck").mkdir()
    assert locks.vmware_lock(folder, "disk.vmdk") is None, "an empty folder is a leftover"
    (tmp_path / "disk.vmdk.lck/M42611.lck").touch()
    assert locks.vmware_lock(folder, "disk.vmdk") == "VMware's lock disk.vmdk.lck is there"
    assert locks.vmware_lock(folder, "sub/disk.vmdk") is None
    (tmp_path / "sub/disk.vmdk.lck").touch()
    assert locks.vmware_lock(folder, "sub/disk.vmdk") == "VMware's lock sub/disk.vmdk.lck is there"
    assert locks.vmware_lock(folder, "x" * 255) is None
    (tmp_path / "evil.vmdk.lck").symlink_to("/etc")
    assert locks.vmware_lock(folder, "evil.vmdk") == "VMware's lock evil.vmdk.lck is there"


@pytest.mark.parametrize("at", ["folder", "lock"])
def test_a_lock_that_may_not_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """In a folder that we may not search there may be anything, also no disk: that is for opening to tell."""
    folder, _ = LocalFolder.for_image(tmp_path / "disk.vmdk")
    (tmp_path / "disk.vmdk.lck").mkdir()
    refused = "disk.vmdk.lck" if at == "folder" else os.curdir
    os_open = os.open

    def fail(path: str, *args: Any, **kwargs: Any) -> int:
        if path == refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return os_open(path, *args, **kwargs)

    monkeypatch.setattr(gate.os, "open", fail)
    assert bool(locks.vmware_lock(folder, "disk.vmdk")) is (at == "lock")
