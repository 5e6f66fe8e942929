"""What becomes of clients, of writes and of ``serve`` when its nbdkit dies, by the real command line."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nbd_vmdk
from nbd_vmdk import open_disk
from nbd_vmdk.errors import ServerError
from nbd_vmdk.serving.events import Restarted
from nbd_vmdk.serving.listener import listen_private
from nbd_vmdk.serving.restarts import Restart
from nbd_vmdk.serving.supervisor import Server
from tests.plugin import ROOT, nbd
from tests.serving import command, served, vmdk
from tests.serving.conftest import MIB

LOST = (
    "error: nbdkit ended unasked: it was killed by SIGKILL; "
    "what clients had written and not flushed may be lost"
)
AGAIN = "warning: nbdkit was started again; clients have to connect anew"


def nbdkit_of(process: subprocess.Popen[str]) -> int:
    """The only child of a server that answers."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def killed(process: subprocess.Popen[str]) -> int:
    """The nbdkit of a server, which is killed."""
    found = nbdkit_of(process)
    os.kill(found, signal.SIGKILL)
    return found


def back(pidfile: Path, first: int) -> None:
    """Wait until the server, by its pidfile, has another nbdkit than ``first``, and knows that it answers."""
    end = time.monotonic() + 20
    while not pidfile.exists() or int(pidfile.read_text()) == first:
        assert time.monotonic() < end
        time.sleep(0.02)


def connect(uri: str) -> nbd.NBD:
    client = nbd.NBD()
    client.connect_uri(uri)
    return client


@pytest.mark.parametrize("words", [[], ["--scratch"], ["--port", "0"]])
def test_clients_find_what_they_flushed_where_it_was(disk: Path, tmp_path: Path, words: list[str]) -> None:
    before = disk.read_bytes()
    with served(disk, *words, "--pidfile", tmp_path / "pid") as (uri, process):
        client = connect(uri)
        client.pwrite(b"flushed " * 512, 3 * MIB)
        client.flush()
        first = killed(process)
        # Who comes now waits until somebody is there.
        again = connect(uri)
        assert bytes(again.pread(4096, 3 * MIB)) == b"flushed " * 512
        assert bytes(again.pread(4, 65536)) == b"old "
        with pytest.raises(nbd.Error):
            client.pread(512, 0)
        again.pwrite(b"later", 0)
        again.flush()
        back(tmp_path / "pid", first)
        assert int((tmp_path / "pid").read_text()) == nbdkit_of(process)
        again.shutdown()
    said: list[str] = process.said.splitlines()  # type: ignore[attr-defined]
    assert (said[0], said[-1]) == (LOST, AGAIN)
    # Fast checks at opening tell of the end that was none.
    assert [line for line in said[1:-1] if "not closed cleanly" not in line] == []
    assert len(said) == 3
    if "--scratch" in words:
        assert disk.read_bytes() == before
    else:
        with open_disk(disk) as opened:
            assert opened.pread(4096, 3 * MIB) == b"flushed " * 512
            assert opened.pread(5, 0) == b"later"


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io")
def test_qemu_goes_on(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with served(disk, "--socket", path, "--pidfile", tmp_path / "pid") as (_uri, process):
        image = f"driver=nbd,server.type=unix,server.path={path},reconnect-delay=30"
        with subprocess.Popen(
            ["qemu-io", "--image-opts", image],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as qemu:
            assert qemu.stdin is not None
            assert qemu.stdout is not None
            qemu.stdin.write("write -P 5 0 64k\nflush\n")
            qemu.stdin.flush()
            assert "wrote 65536" in qemu.stdout.readline()
            first = killed(process)
            told, _ = qemu.communicate("write -P 6 1M 64k\nread -P 5 0 64k\nread -P 6 1M 64k\nflush\n", 30)
        back(tmp_path / "pid", first)
        assert re.findall("wrote|read|fail|error", told) == ["wrote", "read", "read"], told
    with open_disk(disk) as opened:
        assert opened.pread(MIB + 65536, 0)[MIB:] == b"\6" * 65536


def test_a_disk_that_does_not_open_again_is_given_up(disk: Path, tmp_path: Path) -> None:
    """By the command line, with less patience than it has."""
    impatient = (
        "import sys; from nbd_vmdk.serving import server; from nbd_vmdk.serving.restarts import Restart; "
        "server.Restart = lambda: Restart(limit=2, delay=0.01); "
        "from nbd_vmdk.cli import main; sys.exit(main())"
    )
    path = tmp_path / "s"
    process = subprocess.Popen(
        [sys.executable, "-c", impatient, "serve", str(disk), "--socket", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    disk.rename(tmp_path / "elsewhere.vmdk")
    killed(process)
    _out, errors = process.communicate(timeout=20)
    said = errors.splitlines()
    assert process.returncode == 1
    assert said[0] == LOST
    assert [line for line in said if "could not be started again" in line][:2] == said[1:3]
    why = f"was killed by SIGKILL, and could not be started again: {disk}: no such file"
    assert said[3] == f"error: nbdkit ended unasked: it {why}"
    assert not path.exists()


def test_who_wants_the_end_has_it(disk: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("serve", disk, "--no-restart", "--socket", tmp_path / "s"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    killed(process)
    _out, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (1, "error: nbdkit ended unasked: it was killed by SIGKILL\n")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("words", [[], ["-r"]])
def test_a_command_goes_on_and_its_success_is_doubted_if_it_could_write(
    disk: Path, tmp_path: Path, words: list[str]
) -> None:
    words = [*words, "--pidfile", str(tmp_path / "pid")]
    # What comes last gives the server the time to see that it answers again.
    kill = f'set -e; nbdinfo --size "$uri"; kill -9 $(cat {tmp_path}/pid); nbdinfo --size "$uri"; sleep 1'
    done = vmdk("serve", disk, *words, "--run", kill, code=0 if "-r" in words else 1)
    assert done.stdout == f"{4 * MIB}\n" * 2
    assert AGAIN in done.stderr.splitlines()
    doubt = "error: nbdkit died while the command ran: what it wrote may not be there"
    assert (doubt in done.stderr.splitlines()) is ("-r" not in words)
    assert ("not flushed may be lost" in done.stderr) is ("-r" not in words)
    # Its own failure is passed on as ever.
    vmdk("serve", disk, *words, "--run", f"{kill}; exit 7", code=7)


def test_a_socket_that_was_handed_over_and_what_the_manager_is_told(disk: Path, tmp_path: Path) -> None:
    shell = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, socket.socket(socket.AF_UNIX) as made:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        made.bind(str(tmp_path / "s"))
        made.listen()
        process = subprocess.Popen(
            ["/bin/sh", "-c", shell, "sh", *command("serve", disk)],
            stdin=made,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")},
        )
        try:
            first = manager.recv(4096).decode()
            assert first.startswith("READY=1\nSTATUS=Serving 1 disk")
            killed(process)
            news = [manager.recv(4096).decode() for _ in range(3)]
            assert news == [
                "STATUS=nbdkit was killed by SIGKILL",
                "STATUS=nbdkit died; it is started again in 0.5 s, attempt 1",
                first.removeprefix("READY=1\n"),
            ]
            client = connect(f"nbd+unix:///?socket={tmp_path}/s")
            assert bytes(client.pread(4, 65536)) == b"old "
            client.shutdown()
        finally:
            process.terminate()
            _out, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors


def test_by_the_api_only_who_asks(disk: Path) -> None:
    async def comes_back(restart: bool | None) -> bool:
        async with nbd_vmdk.serve(disk, read_only=True, restart=restart) as server:
            os.kill(server.pid, signal.SIGKILL)
            async for event in server.events:
                if isinstance(event, Restarted):
                    return True
            with pytest.raises(ServerError, match="ended unasked"):
                await server.wait()
            return False

    assert [asyncio.run(comes_back(restart)) for restart in (None, False, True)] == [False, False, True]


def test_who_was_told_to_end_and_could_not_close_does_not_come_back(disk: Path, tmp_path: Path) -> None:
    """By nbdkit's own process ID, as --pidfile tells it; the error is one of closing."""
    broken = tmp_path / "plugin.py"
    broken.write_text(
        f"import os, sys\nsys.path[:0] = [{ROOT!r}, os.environ.get('NBD_VMDK_SITE', '')]\n"
        "from nbd_vmdk.plugin.callbacks import *\n"
        "from nbd_vmdk.errors import StorageError\n"
        "from nbd_vmdk.plugin.exports import Exports\n"
        "Exports.close = lambda self: [StorageError.of(OSError(28, 'No space left'), 'x.vmdk', 'write')]\n"
    )

    async def main() -> None:
        server = Server(listen_private(), broken, [("file", str(disk))], restart=Restart(delay=0.01))
        await server.start()
        os.kill(server.pid, signal.SIGTERM)
        with pytest.raises(ServerError, match="ended unasked: it exited with code 74"):
            await server.wait()
        assert server.restarted == 0
        await server.stop()

    asyncio.run(asyncio.wait_for(main(), 30))
