"""Images as block devices: a kernel of files and an nbd-client that changes them stand for the real ones.

The server behind is real, and the stand-in reads from it.  The words that start nbd-client are run by a real
kernel in tests/guest.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import cli, open_disk
from nbd_vmdk.attaching import devices, jobs
from nbd_vmdk.attaching.places import place_of
from nbd_vmdk.attaching.unreached import unreached
from nbd_vmdk.errors import DeviceError, FileMissing, InUse, OptionError, ServerError
from tests.serving import served
from tests.serving.conftest import MIB, Tls

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can attach devices")

#: The real one.
NBD_CLIENT = shutil.which("nbd-client", path=os.environ["PATH"] + ":/usr/sbin")

CLIENT = f"""#!{sys.executable}
import os, subprocess, sys, time
words = sys.argv[1:]
home = os.environ["FAKE_HOME"]
with open(home + "/called", "a") as file:
    print(*words, file=file)
if words[0] == "-d":
    block = home + "/sys/block/" + os.path.basename(words[1])
    if os.path.exists(home + "/stuck"):
        sys.exit(0)
    if os.path.exists(home + "/refused"):
        print("nbd-client says no", file=sys.stderr)
        sys.exit(1)
    open(block + "/size", "w").write("0")
    os.unlink(block + "/pid")
    sys.exit(0)
if words[0] == "-unix":
    where, device = "nbd+unix:///?socket=" + words[1], words[2]
else:
    where, device = "nbd://%s:%s/" % tuple(words[:2]), words[2]
if "-cacertfile" in words:
    folder = os.path.dirname(words[words.index("-cacertfile") + 1])
    where = where.replace("nbd:", "nbds:") + "?tls-certificates=" + folder
size = int(subprocess.run(["nbdinfo", "--size", where], stdout=subprocess.PIPE, check=True).stdout)
block = home + "/sys/block/" + os.path.basename(device)
name = os.path.basename(device) + "p1"
os.makedirs(block + "/" + name, exist_ok=True)
open(home + "/dev/" + name, "w")
open(block + "/size", "w").write(str(size // 512))
open(block + "/pid", "w").write(str(os.getpid()))
while os.path.exists(block + "/pid"):
    time.sleep(0.02)
"""


class Fake:
    """The folders of a kernel, in which nbd0 and nbd1 are free."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name in ("nbd0", "nbd1"):
            (home / "sys/block" / name).mkdir(parents=True)
            (home / "sys/block" / name / "size").write_text("0\n")
            (home / "sys/class/block" / name / "holders").mkdir(parents=True)
            (home / "sys/class/block" / name / "dev").write_text(f"43:{int(name[3:]) * 16}\n")
            (home / "dev").mkdir(exist_ok=True)
            (home / "dev" / name).touch()
        (home / "proc/self").mkdir(parents=True)
        (home / "proc/self/mountinfo").write_text("")
        (home / "proc/swaps").write_text("Filename Type Size Used Priority\n")
        self.ioctls: list[int] = []

    @property
    def called(self) -> list[str]:
        return (self.home / "called").read_text().splitlines()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(tmp_path / "kernel")
    (tmp_path / "bin").mkdir()
    client = tmp_path / "bin" / "nbd-client"
    client.write_text(CLIENT)
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_HOME", str(made.home))
    monkeypatch.setattr(jobs, "ROOT_FOLDER", str(tmp_path / "run"))
    places = {name: str(made.home / name) for name in ("sys", "dev", "proc")}
    monkeypatch.setattr(devices, "Kernel", functools.partial(devices.Kernel, **places))
    monkeypatch.setattr(devices.fcntl, "ioctl", lambda _fd, what, *_: made.ioctls.append(what))
    return made


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    assert cli.main(list(map(str, words))) == code
    told = capsys.readouterr()
    return told.out, told.err


def test_attach_and_detach(
    fake: Fake, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = fake.home / "dev/nbd0"
    out, errors = run(capsys, "attach", disk)
    assert out == f"{device}\n{device}p1\n"
    assert f"nbd-vmdk detach {device}" in errors
    (words,) = fake.called
    assert words.endswith(f"{device} -L -n -C 4 -N ")
    # It is really served, and locked; the next device is free.
    with pytest.raises(InUse):
        open_disk(disk, writable=True, locks=True)
    job = devices.find_job("nbd0")
    assert job is not None
    assert job.alive
    assert job.facts["image"] == str(disk)
    out, _ = run(capsys, "attach", disk, device, code=5)
    with served(disk.parent / other(disk.parent)) as (uri, _):
        out, _ = run(capsys, "attach", "-r", "--connections", 2, "--json", uri)
        facts: dict[str, Any] = json.loads(out)
        assert facts["device"] == f"{fake.home}/dev/nbd1"
        assert facts["size"] == MIB
        assert fake.called[-1].endswith("-C 2 -N  -R")
        assert "all 2 NBD devices" in run(capsys, "attach", uri, code=1)[1]
        run(capsys, "detach", "nbd1")
    run(capsys, "detach", device)
    assert fake.called[-1] == f"-d {device}"
    assert 0x1261 in fake.ioctls  # flushed
    assert not job.alive
    assert not os.path.exists(job.folder)
    with open_disk(disk, writable=True, locks=True):
        pass
    assert "nothing is attached" in run(capsys, "detach", device, code=1)[1]


def other(folder: Path) -> str:
    from nbd_vmdk.ops.create import create_image

    create_image(folder / "other.vmdk", MIB)
    return "other.vmdk"


def test_what_uses_it_keeps_it(fake: Fake, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = fake.home / "dev/nbd0"
    run(capsys, "attach", disk)
    part = fake.home / "sys/class/block/nbd0p1"
    (part / "holders").mkdir(parents=True)
    (part / "dev").write_text("43:1\n")
    mounts = fake.home / "proc/self/mountinfo"
    mounts.write_text(r"99 1 43:1 / /mnt/my\040disk rw - ext4 /dev/nbd0p1 rw" + "\n")
    assert "nbd0p1 is mounted at /mnt/my disk" in run(capsys, "detach", device, code=5)[1]
    mounts.write_text("")
    (part / "holders" / "dm-0").mkdir()
    assert "nbd0p1 is part of dm-0" in run(capsys, "detach", device, code=5)[1]
    (part / "holders" / "dm-0").rmdir()
    (fake.home / "proc/swaps").write_text("Filename\n/dev/nbd0 partition 1 0 -2\n")
    assert "swapped to" in run(capsys, "detach", device, code=5)[1]
    (fake.home / "proc/swaps").write_text("Filename\n")
    assert len(fake.called) == 1
    run(capsys, "detach", device)


def test_a_kernel_that_does_not_let_go(
    fake: Fake, disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, "attach", disk)
    monkeypatch.setattr(devices, "_PATIENCE", 0.2)
    (fake.home / "stuck").touch()
    assert "has not let go" in run(capsys, "detach", "nbd0", code=1)[1]
    (fake.home / "stuck").unlink()
    (fake.home / "refused").touch()
    assert "nbd-client says no" in run(capsys, "detach", "nbd0", code=1)[1]
    (fake.home / "refused").unlink()
    run(capsys, "detach", "nbd0")


def test_somebody_else_detached_it(fake: Fake, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server ends with the device, whoever took that away; and its image is closed."""
    run(capsys, "attach", disk)
    job = devices.find_job("nbd0")
    assert job is not None
    subprocess.run(["nbd-client", "-d", f"{fake.home}/dev/nbd0"], check=True)
    end = time.monotonic() + 20
    while job.alive:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert job.code == 0
    run(capsys, "detach", "nbd0")
    assert devices.find_job("nbd0") is None


def test_a_server_that_was_killed(fake: Fake, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "attach", disk)
    job = devices.find_job("nbd0")
    assert job is not None
    os.killpg(job.pid, signal.SIGKILL)
    assert "was killed" in run(capsys, "detach", "nbd0", code=1)[1]


def test_an_image_that_can_not_be_served(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.vmdk").write_bytes(b"KDMV" + bytes(100))
    _, errors = run(capsys, "attach", tmp_path / "bad.vmdk", code=1)
    assert errors.startswith("error: ")
    assert "bad.vmdk" in errors
    assert os.listdir(tmp_path / "run") == ["lock"]
    # A client that fails after the server has started.
    (tmp_path / "bin/nbd-client").write_text("#!/bin/sh\necho 'it will not' >&2; exit 3\n")
    with pytest.raises(ServerError, match="it will not"):
        devices.attach(str(tmp_path / other(tmp_path)), kernel=devices.Kernel())
    assert os.listdir(tmp_path / "run") == ["lock"]


@pytest.mark.skipif(NBD_CLIENT is None, reason="needs nbd-client")
def test_a_uri_with_no_server(
    fake: Fake, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real nbd-client's words, which are few, become those of all else that connects."""
    (tmp_path / "bin/nbd-client").unlink()
    (tmp_path / "bin/nbd-client").symlink_to(str(NBD_CLIENT))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        nobody = f"nbd://127.0.0.1:{listening.getsockname()[1]}"
    nowhere = f"nbd+unix:///?socket={tmp_path}/no%20where"
    for uri, why, what_to_do in (
        (nobody, "Connection refused", f"is the server running? nbdinfo {nobody} tries to reach it"),
        (
            nowhere,
            "No such file or directory",
            f"is the server running? nbdinfo '{nowhere}' tries to reach it",
        ),
        ("nbd://nowhere.invalid", "Name or service not known", "is the host's name right?"),
    ):
        _, errors = run(capsys, "attach", uri, code=1)
        assert errors == f"error: {uri}: can't connect: {why}\nhint: {what_to_do}\n"
    assert os.listdir(tmp_path / "run") == ["lock"]


def test_the_few_words_of_nbd_client(tmp_path: Path) -> None:
    said = ["Negotiation: ..Error: Unknown error returned by server.", "Exiting."]
    told = unreached("nbd://host/a", said)
    assert told is not None
    assert told.errno == errno.ENOENT
    assert told.hint == "nbdinfo --list nbd://host/a tells what it offers"
    # A server that is there by now.
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/socket")
        listening.listen()
        told = unreached(f"nbd+unix:///?socket={tmp_path}/socket", ["Error: CONNECT failed"])
    assert told is not None
    assert told.message == "can't connect: CONNECT failed"
    assert unreached("nbd://host", ["Error: Ioctl NBD_SET_SOCK failed: nothing to be done"]) is None


def test_one_disk_at_a_time(fake: Fake, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other(disk.parent)
    _, errors = run(capsys, "attach", disk.parent, code=1)
    assert "2 disks" in errors
    assert "other.vmdk" in errors


def test_what_is_missing(
    fake: Fake, disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: 1000)
        for verb in ("attach", "detach"):
            assert "only root" in run(capsys, verb, "nbd0" if verb == "detach" else disk, code=1)[1]
    with monkeypatch.context() as patched:
        patched.setattr(devices.shutil, "which", lambda *_, **__: None)
        assert "apt-get install nbd-client" in run(capsys, "attach", disk, code=1)[1]
    for name, code, why in (("/dev/sda", 2, "no NBD device"), ("nbd7", 1, "no such device")):
        assert why in run(capsys, "attach", disk, name, code=code)[1]
    with pytest.raises(DeviceError, match="no NBD devices") as told:
        devices.attach(str(disk), kernel=devices.Kernel(sys="/nowhere"))
    assert "modprobe nbd" in str(told.value.hint)
    (fake.home / "sys/module/nbd/parameters").mkdir(parents=True)
    (fake.home / "sys/module/nbd/parameters/max_part").write_text("0\n")
    assert devices.Kernel().without_partitions
    assert stat.S_IMODE(os.stat(jobs.run_folder()).st_mode) == 0o700


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("nbd://host/", "host 10809"),
        ("nbd://host:1/a%20b", "host 1"),
        ("nbd://[::1]:7/x", "::1 7"),
        ("nbd+unix:///x?socket=/run/my%20s", "-unix /run/my s"),
    ],
)
def test_uris(uri: str, words: str) -> None:
    place = place_of(uri)
    assert " ".join(place.where) == words
    assert place.tls == ()


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("http://host/", "is no NBD URI"),
        ("nbd+unix:///x", "is no NBD URI"),
        ("nbd://host:x/", "is no NBD URI"),
        ("nbds://host/", "nothing says whom to trust"),
        ("nbds://host/?tls-certificates=", "nothing says whom to trust"),
        ("nbds://me@host/?tls-psk-file=/k", "no pre-shared keys"),
        ("nbds://host/?tls-certificates=/c&tls-verify-peer=false", "only if its server's certificate"),
        ("nbds://host/?tls-certificates=/c&tls-priority=low", "tls-priority is not known"),
        ("nbds+unix:///?socket=/s&tls-certificates=/c", "only over TCP"),
        ("nbds+vsock://2:1/", "only over TCP"),
    ],
)
def test_uris_that_can_not_be_attached(uri: str, why: str) -> None:
    with pytest.raises(OptionError, match=why):
        place_of(uri)


def test_who_is_trusted_and_what_is_shown(tls: Tls, tmp_path: Path) -> None:
    uri = f"nbds://far.example/a?tls-certificates={tls.client}"
    shown = ["-certfile", f"{tls.client}/client-cert.pem", "-keyfile", f"{tls.client}/client-key.pem"]
    trusted = ["-cacertfile", f"{tls.client}/ca-cert.pem", "-tlshostname"]
    place = place_of(uri)
    assert (place.where, place.export) == (("far.example", "10809"), "a")
    assert list(place.tls) == [*trusted, "far.example", *shown]
    assert list(place_of(f"{uri}&tls-hostname=near").tls) == [*trusted, "near", *shown]
    assert "-certfile" not in place_of(f"nbds://h/?tls-certificates={tls.trusting}").tls
    (tmp_path / "client-cert.pem").touch()
    for missing in ("ca-cert.pem", "client-key.pem"):
        with pytest.raises(FileMissing) as told:
            place_of(f"nbds://h/?tls-certificates={tmp_path}")
        assert told.value.file == f"{tmp_path}/{missing}"
        (tmp_path / missing).touch()


def test_an_encrypted_server(fake: Fake, disk: Path, tls: Tls, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--port", 0, "--tls-certificates", tls.server, "--tls-verify-peer")
    with served(disk, *words) as (uri, process):
        uri = uri.replace("127.0.0.1", "localhost") + f"/?tls-certificates={tls.client}"
        out, _ = run(capsys, "attach", "-r", "--json", uri)
        assert json.loads(out)["size"] == 4 * MIB
        assert "-tlshostname localhost" in fake.called[-1]
        assert fake.called[-1].endswith("client-key.pem -R")
        job = devices.find_job("nbd0")
        assert job is not None
        assert job.facts["image"] == uri
        run(capsys, "detach", "nbd0")
        assert not job.alive
    assert process.said == ""  # type: ignore[attr-defined]


@pytest.mark.skipif(NBD_CLIENT is None, reason="needs nbd-client")
def test_the_real_client_encrypts_and_looks_at_certificates(
    fake: Fake, disk: Path, tls: Tls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gets as far as the device, which is none here; with the wrong ones no further than the greeting."""
    (tmp_path / "bin/nbd-client").unlink()
    (tmp_path / "bin/nbd-client").symlink_to(str(NBD_CLIENT))
    words = ("--port", 0, "--tls-certificates", tls.server, "--tls-verify-peer")
    with served(disk, "-r", *words) as (uri, _process):
        uri = uri.replace("127.0.0.1", "localhost") + "/?tls-certificates="
        _, errors = run(capsys, "attach", f"{uri}{tls.client}", code=1)
        assert "ioctl" in errors.lower()
        for wrong in (tls.trusting, tls.stranger, f"{tls.client}&tls-hostname=elsewhere"):
            _, errors = run(capsys, "attach", f"{uri}{wrong}", code=1)
            assert "ioctl" not in errors.lower()
            assert "hint: is the server's certificate for that host" in errors
    assert os.listdir(tmp_path / "run") == ["lock"]
