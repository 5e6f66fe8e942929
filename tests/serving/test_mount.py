"""Images as files, through the real nbdfuse."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.attaching import jobs, mounts
from nbd_vmdk.cli import main
from nbd_vmdk.errors import DeviceError, StorageError
from tests.serving import served, vmdk
from tests.serving.conftest import MIB, Tls


def why_not() -> str:
    """Why nothing can be mounted here; empty if it can."""
    if shutil.which("nbdfuse") is None:
        return "nbdfuse is not installed"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse that we may use"
    if shutil.which("fusermount3") is None and shutil.which("fusermount") is None:
        return "fusermount3 is not installed"
    return ""


real = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "a mount"
    made.mkdir()
    yield made
    if os.path.ismount(made):
        subprocess.run([shutil.which("fusermount3") or "fusermount", "-uz", str(made)], check=True)


@real
def test_a_disk_is_a_file(disk: Path, folder: Path) -> None:
    done = vmdk("mount", disk, folder)
    assert done.stdout == f"{folder}/nbd\n"
    assert f"losetup -f -P --show '{folder}/nbd'" in done.stderr
    assert f"guestfish --format=raw -a '{folder}/nbd'" in done.stderr
    file = folder / "nbd"
    assert file.stat().st_size == 4 * MIB
    with open(file, "r+b") as opened:
        opened.seek(65536)
        assert opened.read(4) == b"old "
        opened.seek(MIB)
        opened.write(b"new ")
        # As long as somebody has it open, it stays.
        opened.flush()
        told = vmdk("umount", folder, code=5).stderr
        assert "the file is open" in told
        assert f" fuser '{file}' " in told
        assert f" losetup -j '{file}' " in told
    assert vmdk("umount", folder).stderr == ""
    assert os.listdir(folder) == []
    with open_disk(disk, writable=True, locks=True) as opened_disk:
        assert opened_disk.pread(4, MIB) == b"new "
    assert "nothing is mounted" in vmdk("umount", folder, code=1).stderr


@real
def test_read_only_and_from_a_uri(disk: Path, folder: Path) -> None:
    with served(disk, "-r") as (uri, _):
        told = json.loads(vmdk("mount", uri, folder, "-r", "--json").stdout)
        assert told["file"] == f"{folder}/nbd"
        assert any("--ro" in command for command in told["commands"])
        with open(folder / "nbd", "rb") as opened:
            opened.seek(65536)
            assert opened.read(4) == b"old "
        assert vmdk("mount", disk, folder, code=5).stderr.startswith(f"error: {folder}: in use")
        assert json.loads(vmdk("umount", folder, "--json").stdout)["warnings"] == []
    assert "server's" in vmdk("mount", "nbd://localhost", folder, "--salvage", code=2).stderr


def dead(folder: Path) -> list[tuple[str, str, str]]:
    """URIs of servers that are not there, what is said of each, and what to do."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    nowhere = f"nbd+unix:///?socket={folder}/nowhere"
    return [
        (
            f"nbd://127.0.0.1:{port}",
            "Connection refused",
            f"nbdinfo nbd://127.0.0.1:{port} tries to reach it",
        ),
        (nowhere, "No such file or directory", f"nbdinfo {shlex.quote(nowhere)} tries to reach it"),
        ("nbd://nowhere.invalid", "Name or service not known", "is the host's name right?"),
    ]


@real
def test_a_uri_with_no_server_is_told_as_convert_tells_it(folder: Path, tmp_path: Path) -> None:
    for uri, why, what_to_do in dead(tmp_path):
        mounted = vmdk("mount", uri, folder, code=1).stderr
        assert mounted.startswith(f"error: {uri}: can't connect: ")
        assert f"{why}\nhint: " in mounted
        assert mounted.endswith(f"{what_to_do}\n")
        assert mounted == vmdk("convert", uri, tmp_path / "new.vmdk", code=1).stderr


@real
def test_a_uri_with_no_such_export(disk: Path, folder: Path) -> None:
    with served(disk, "-r") as (uri, _):
        wrong = uri.replace("///?", "///elsewhere?")
        assert wrong != uri
        told = vmdk("mount", wrong, folder, code=1).stderr
        assert told.startswith(f"error: {wrong}: can't connect: ")
        assert f"hint: nbdinfo --list {shlex.quote(wrong)} tells what it offers" in told


@real
def test_an_encrypted_uri_is_verified_or_refused(disk: Path, folder: Path, tls: Tls) -> None:
    with served(disk, "-r", "--port", 0, "--tls-certificates", tls.server) as (uri, _):
        assert "verifies no certificate" in vmdk("mount", "-r", uri, folder, code=1).stderr
        stranger = f"{uri}/?tls-certificates={tls.stranger}"
        vmdk("mount", "-r", stranger, folder, code=1)
        # nbdfuse 1.14 takes none at all.
        told = vmdk("mount", "-r", f"{uri}/?tls-certificates={tls.trusting}", folder, code=None)
        if told.returncode == 0:
            vmdk("umount", folder)
        else:
            assert "from a URI\nhint: QEMU can, and nbd-vmdk convert copies the disk\n" in told.stderr


@real
def test_unmounted_by_somebody_else(disk: Path, folder: Path) -> None:
    vmdk("mount", disk, folder)
    subprocess.run([shutil.which("fusermount3") or "fusermount", "-u", str(folder)], check=True)
    vmdk("umount", folder)  # waits until the image is closed
    with open_disk(disk, writable=True, locks=True):
        pass


@real
def test_what_can_not_be_mounted(disk: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.vmdk").write_bytes(b"KDMV" + bytes(100))
    done = vmdk("mount", tmp_path / "bad.vmdk", folder, code=1)
    assert done.stderr.startswith("error: ")
    assert "bad.vmdk" in done.stderr
    assert not os.path.ismount(folder)
    assert "no folder" in vmdk("mount", disk, tmp_path / "nowhere", code=2).stderr
    assert "not empty" in vmdk("mount", disk, tmp_path, code=2).stderr


def test_what_is_missing(
    disk: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mounts.shutil, "which", lambda *_: None)
    assert main(["mount", str(disk), str(folder)]) == 1
    assert "apt-get install libnbd-bin" in capsys.readouterr().err


def test_a_run_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "ROOT_FOLDER", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    for name in ("run", "nbd-vmdk-jobs"):
        (tmp_path / name).symlink_to("elsewhere")
    with pytest.raises(DeviceError, match="somebody else"):
        jobs.run_folder()


@real
def test_a_uri_that_never_answers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "START_TIMEOUT", 0.5)
    uri = f"nbd+unix:///?socket={tmp_path}/mute"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(f"{tmp_path}/mute")
        mute.listen()
        assert main(["mount", uri, str(folder)]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {uri}: no answer in 0.5 s\nhint: ")
    assert not os.path.ismount(folder)


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(jobs, "ROOT_FOLDER", str(tmp_path / "nbd-vmdk-jobs"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return Path(jobs.run_folder())


@pytest.mark.parametrize(
    "notes", [b"", b"{", b"[]", b"7", b'{"pid": 1}', b'{"pid": "x", "birth": 1}', b"\xff\xfe", b"[" * 100_000]
)
def test_notes_of_a_job_that_make_no_sense(run_folder: Path, folder: Path, notes: bytes) -> None:
    job = run_folder / mounts._name(str(folder))
    job.mkdir()
    (job / "job.json").write_bytes(notes)
    with pytest.raises(DeviceError, match="nothing is mounted"):
        mounts.umount(str(folder))


def test_files_of_a_job_that_can_not_be_had(run_folder: Path, folder: Path) -> None:
    (run_folder / mounts._name(str(folder)) / "job.json").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"job\.json: read: Is a directory"):
        mounts.umount(str(folder))
    (run_folder / "lock").unlink()
    (run_folder / "lock").mkdir()
    with pytest.raises(StorageError, match="lock: lock: Is a directory"):
        mounts.umount(str(folder))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_job_of_which_nothing_can_be_noted(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended, and not left to run without anybody who could end it."""
    started = []

    def spawn(*args: Any, **kwargs: Any) -> int:
        (run_folder / "job" / "job.json").symlink_to("/dev/full")
        started.append(os_spawn(*args, **kwargs))
        return started[0]

    os_spawn = os.posix_spawn
    monkeypatch.setattr(jobs.os, "posix_spawn", spawn)
    with pytest.raises(StorageError, match=r"job/job\.json: write: No space left") as caught:
        jobs.start_job("job", ["sleep", "100"], lambda: True, {"image": "x"})
    assert "make room" in str(caught.value.hint)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)
    assert not (run_folder / "job").exists()
