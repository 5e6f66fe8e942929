"""Several processes that share one address, by the real command line and by the API."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nbd_vmdk
from nbd_vmdk.errors import OptionError, ServerError
from nbd_vmdk.ops.create import create_image
from nbd_vmdk.serving import asking
from nbd_vmdk.serving.events import Event, Exited, GaveUp, Restarted
from nbd_vmdk.serving.listener import listen_private, listen_tcp
from nbd_vmdk.serving.restarts import Restart
from nbd_vmdk.serving.supervisor import Server
from tests.plugin import nbd
from tests.serving import command, served, vmdk
from tests.serving.conftest import MIB, Tls

#: Fails to start as soon as there is a file, `bad`.
PLUGIN = """
import os, sys
sys.path.insert(0, os.environ["NBD_VMDK_SOURCE"])
import nbdkit
from nbd_vmdk.plugin import ending
from nbd_vmdk.plugin.sharing import Turns
API_VERSION = 2
told = {"bad": ""}
def config(key, value):
    told[key] = value
def get_ready():
    if os.path.exists(told["bad"]):
        print("error: it is bad", file=sys.stderr)
        os._exit(1)
def after_fork():
    global turns
    ending.watch(nbdkit.shutdown)
    turns = Turns(told["share"])
def preconnect(readonly):
    turns.seat()
def open(readonly): return 1
def get_size(h): return 65536
def pread(h, buf, offset, flags): buf[:] = bytes(len(buf))
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NBD_VMDK_SOURCE", os.path.dirname(os.path.dirname(nbd_vmdk.__file__)))
    file = tmp_path / "plugin.py"
    file.write_text(PLUGIN)
    return file


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def totals(told: dict[str, Any]) -> list[int]:
    return [each["connections"]["total"] for each in told["workers"]]


def test_four_connections_spread_and_read_the_same(tmp_path: Path) -> None:
    image, content = tmp_path / "disk.vmdk", random.Random(4).randbytes(8 * MIB)
    create_image(image, 64 * MIB)
    with nbd_vmdk.open_disk(image, writable=True) as disk:
        disk.pwrite(content, 3 * MIB)
    whole = hashlib.sha256(bytes(3 * MIB) + content + bytes(53 * MIB)).hexdigest()
    path, copy = tmp_path / "s", tmp_path / "copy"
    spread = []
    with served(image, "-r", "--workers", 2, "--stats", "--socket", path) as (uri, _process):
        info = json.loads(
            subprocess.run(["nbdinfo", "--json", uri], capture_output=True, check=True, text=True).stdout
        )
        assert info["exports"][0]["can_multi_conn"]
        for _ in range(6):
            before = totals(asking.ask(str(path)))
            subprocess.run(["nbdcopy", "-C", "4", "-T", "4", uri, copy], check=True)
            now = totals(asking.ask(str(path)))
            got = [later - earlier for later, earlier in zip(now, before, strict=True)]
            assert sum(got) == 4
            spread.append(got)
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == whole
        told = json.loads(vmdk("stats", path, "--json").stdout)
        parts = [asking.ask(f"{path}.stats-1"), asking.ask(str(told["workers"][0]["pid"]))]
    assert sum(got == [2, 2] for got in spread) > 2
    assert sum(0 in got for got in spread) < 2
    read = told["exports"]["disk.vmdk"]["requests"]["read"]
    assert read["bytes"] >= 6 * 8 * MIB
    assert read["count"] == sum(read["histogram"])
    assert read["bytes"] == sum(
        part["exports"]["disk.vmdk"]["requests"].get("read", {"bytes": 0})["bytes"] for part in parts
    )
    # What is asked for is the total; each has its share.
    assert told["cache"]["budget"] == 64 * MIB
    assert sorted(os.listdir(tmp_path)) == ["copy", "disk.vmdk"]


def test_a_worker_that_is_killed_comes_back_and_the_others_go_on(disk: Path) -> None:
    with served(disk, "-r", "--workers", 2, "--json", "--port", 0) as (_first, process):
        assert process.stdout is not None
        text = "{"
        while not text.endswith("\n}\n"):
            text += process.stdout.readline()
        told = json.loads(text)
        assert sorted(children(process.pid)) == sorted(told["workers"])
        assert told["pid"] == told["workers"][0]
        uri = told["exports"][0]["uri"]
        clients = [nbd.NBD() for _ in range(8)]
        for each in clients:
            each.connect_uri(uri)
        os.kill(told["workers"][1], signal.SIGKILL)

        def answers(client: Any) -> bool:
            try:
                return bytes(client.pread(4, 65536)) == b"old "
            except nbd.Error:
                return False

        assert any(answers(each) for each in clients)
        assert process.stderr is not None
        said = [process.stderr.readline() for _ in range(2)]
        assert said == [
            "error: nbdkit, worker 2 of 2, ended unasked: it was killed by SIGKILL\n",
            "warning: nbdkit, worker 2 of 2, was started again; clients have to connect anew\n",
        ]
        now = children(process.pid)
        assert len(now) == 2
        assert told["workers"][0] in now
        assert told["workers"][1] not in now
        again = nbd.NBD()
        again.connect_uri(uri)
        assert answers(again)


@pytest.mark.parametrize("tcp", [False, True])
def test_all_end_with_clients_and_without(plugin: Path, tcp: bool) -> None:
    async def main() -> None:
        listener = listen_tcp("127.0.0.1", 0) if tcp else listen_private()
        # Whoever made it: one that does not wait would ask again and again.
        listener.socket.setblocking(False)
        server = Server(listener, plugin, [], read_only=True, workers=4)
        await server.start()
        assert server.listener.path is None or Path(server.listener.path).is_socket()
        clients = [nbd.NBD() for _ in range(9)]
        for each in clients:
            each.connect_uri(server.uri)
            assert bytes(each.pread(512, 0)) == bytes(512)
        pids = server.pids
        assert len(set(pids)) == 4
        begin = time.monotonic()
        await server.stop(timeout=5)
        assert time.monotonic() - begin < 4
        assert not any(map(alive, pids))
        lasts = [event async for event in server.events if isinstance(event, Exited)]
        assert [(each.code, each.asked) for each in lasts] == [(0, True)] * 4

    asyncio.run(asyncio.wait_for(main(), 60))


def test_all_die_with_their_parent(disk: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("serve", disk, "-r", "--workers", 3, "--socket", tmp_path / "s"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    uri = process.stdout.readline().strip()
    pids = children(process.pid)
    handle = nbd.NBD()
    handle.connect_uri(uri)
    process.kill()
    process.communicate(timeout=20)
    wait_for(lambda: not any(map(alive, pids)))


def test_the_end_of_one_is_the_end_of_all(plugin: Path) -> None:
    async def asked() -> None:
        server = Server(listen_private(), plugin, [], read_only=True, workers=2, restart=Restart())
        await server.start()
        os.kill(server.pids[1], signal.SIGTERM)
        await server.wait()
        await server.stop()
        assert not any(map(alive, server.pids))

    async def failed() -> list[Event]:
        config = [("bad", str(plugin.parent / "bad"))]
        policy = Restart(limit=1, delay=0.01)
        server = Server(listen_private(), plugin, config, read_only=True, workers=2, restart=policy)
        await server.start()
        first, second = server.pids
        os.kill(second, signal.SIGKILL)
        async for event in server.events:
            if isinstance(event, Restarted):
                break
        assert server.pids[0] == first
        assert server.pids[1] != second
        (plugin.parent / "bad").touch()
        os.kill(server.pids[1], signal.SIGKILL)
        with pytest.raises(ServerError, match=r"worker 2 of 2, ended unasked: it was killed by SIGKILL"):
            await server.wait()
        assert server.listener.path is not None
        assert not os.path.exists(server.listener.path)
        await server.stop()
        assert not alive(first)
        return [event async for event in server.events]

    async def not_begun() -> None:
        (plugin.parent / "bad").touch()
        server = Server(
            listen_private(), plugin, [("bad", str(plugin.parent / "bad"))], read_only=True, workers=3
        )
        with pytest.raises(ServerError, match="it is bad"):
            await server.start()
        assert not any(map(alive, server.pids))

    for main in (asked, failed, not_begun):
        done = asyncio.run(asyncio.wait_for(main(), 60))
        if main is failed:
            assert any(isinstance(event, GaveUp) for event in done or [])


@pytest.mark.parametrize(
    ("words", "why", "hint"),
    [
        ([], "2 workers can only read", "add -r"),
        (["-r", "--max-connections", 3], "connections are counted by each worker", "leave out"),
        (["--scratch"], "2 workers can only read", "add -r"),
    ],
)
def test_what_several_workers_can_not_do(disk: Path, words: list[object], why: str, hint: str) -> None:
    done = vmdk("serve", disk, "--workers", 2, *words, "--run", "true", code=2)
    assert why in done.stderr
    assert f"hint: {hint}" in done.stderr


def test_at_least_one(disk: Path) -> None:
    async def main() -> None:
        with pytest.raises(OptionError, match="at least one worker"):
            async with nbd_vmdk.serve(disk, read_only=True, workers=0):
                pass

    asyncio.run(main())
    vmdk("serve", disk, "-r", "--workers", 0, code=2)


def test_ready_when_all_are_with_tls_and_a_socket_that_was_handed_over(
    disk: Path, tmp_path: Path, tls: Tls
) -> None:
    shell = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'
    words = command("serve", disk, "-r", "--workers", 2, "--tls-psk", tls.psk)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, socket.socket(socket.AF_UNIX) as made:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        made.bind(str(tmp_path / "s"))
        made.listen()
        process = subprocess.Popen(
            ["/bin/sh", "-c", shell, "sh", *words],
            stdin=made,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")},
        )
        try:
            news = manager.recv(4096).decode()
            assert "READY=1" in news
            assert "2 workers" in news
            assert len(children(process.pid)) == 2
            for _ in range(3):
                handle = nbd.NBD()
                handle.set_tls(nbd.TLS_REQUIRE)
                handle.set_tls_psk_file(str(tls.psk))
                handle.set_tls_username("alice")
                handle.connect_unix(str(tmp_path / "s"))
                assert bytes(handle.pread(4, 65536)) == b"old "
                handle.shutdown()
        finally:
            process.terminate()
            _out, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")


def test_numbers_of_one_and_of_none() -> None:
    assert asking.merged([]) is None
    assert asking.merged([{"pid": 1}]) == {"pid": 1}


def test_numbers_of_workers_that_serve_other_disks() -> None:
    """One that was started again with --skip-broken leaves out what broke meanwhile."""

    def worker(*names: str) -> dict[str, Any]:
        exports = {name: {"size": len(name), "commits": 2, "requests": {}} for name in names}
        common: dict[str, Any] = {"pid": 1, "started": 1, "uptime": 1, "connections": {}, "cache": {}}
        return common | {"exports": exports}

    told = asking.merged([worker("a", "bb"), worker("bb", "ccc")])
    assert told is not None
    found = {name: (export["size"], export["commits"]) for name, export in told["exports"].items()}
    assert found == {"a": (1, 2), "bb": (2, 4), "ccc": (3, 2)}


def test_what_a_killed_server_left_is_removed_by_the_next_one(disk: Path, tmp_path: Path) -> None:
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    with served(disk, "-r", env=environment) as (_uri, living):
        words = command("serve", disk, "-r")
        with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as killed:
            assert killed.stdout is not None
            killed.stdout.readline()
            assert len(list(tmp_path.glob("nbd-vmdk-run-*"))) == 2
            nbdkit = children(killed.pid)[0]
            killed.kill()
        wait_for(lambda: not alive(nbdkit))
        assert len(list(tmp_path.glob("nbd-vmdk-run-*"))) == 2
        with served(disk, "-r", env=environment) as (uri, _process):
            found = [each for each in tmp_path.glob("nbd-vmdk-run-*") if (each / "socket").is_socket()]
            assert len(found) == 2
            assert str(found[0]) in uri or str(found[1]) in uri
        assert living.poll() is None
    assert not list(tmp_path.glob("nbd-vmdk-run-*"))
