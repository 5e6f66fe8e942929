"""Ends under load that are no crash: signals, clients that vanish, a disk that is closed under its users."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import nbd
import pytest

from nbd_vmdk import VmdkError, open_disk
from tests.failing import Served, alive
from tests.failing.history import BLOCK, filled
from tests.failing.kinds import BLOCKS, KINDS, Case
from tests.failing.load import Load
from tests.images.content import MIB
from tests.plugin import ROOT, Nbdkit

Serve = Callable[..., Nbdkit]
Command = Callable[..., Served]

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def load_on(server: Nbdkit, case: Case, seed: object, connections: int = 6) -> Load:
    """One request at a time on each connection.

    With more, nbdkit before 1.34 may abort when a connection ends, "raw_send_socket: Assertion `sock >= 0'
    failed", which is a crash like others: test_death.py has those.
    """
    clients = [server.connect(context=False) for _ in range(connections)]
    return Load(clients, case.history, seed, depth=1)


def closed_cleanly(case: Case) -> None:
    """All that was answered is there, flushed or not, and nothing is left to mend."""
    case.history.flushed(case.history.tick())
    case.survived()
    case.sound(clean=True)


def words(server: Nbdkit) -> list[str]:
    """What the server said, but for what nbdkit says of connections that end while it writes to them."""
    lines = server.errors.splitlines()
    usual = ("Broken pipe", "Connection reset by peer", "Bad message")
    return [line for line in lines if not line.endswith(usual)]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("kind", ["monolithic", "small-grains", "split", "child", "flat"])
def test_signal_during_load(serve: Serve, tmp_path: Any, kind: str, number: int) -> None:
    case = KINDS[kind](str(tmp_path))
    server = serve(case.path)
    load = load_on(server, case, (kind, number))
    assert load.run(0.15, at_end=lambda: server.process.send_signal(number))
    # Clients do not know, and go on asking.
    load.run(5)
    load.drain()
    code = server.wait()
    assert code == 0, server.errors
    assert not words(server)
    closed_cleanly(case)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)])
def test_signal_to_the_command_during_load(command: Command, tmp_path: Any, number: int, code: int) -> None:
    case = KINDS["split"](str(tmp_path))
    server = command(case.path)
    load = load_on(server, case, number)
    assert load.run(0.15, at_end=lambda: server.process.send_signal(number))
    load.run(5)
    load.drain()
    assert server.wait() == code
    assert not words(server)
    assert not os.path.exists(server.socket)
    assert not os.path.exists(server.pidfile)
    assert not alive(server.nbdkit)
    closed_cleanly(case)


def test_impatience_changes_nothing(command: Command, tmp_path: Any) -> None:
    case = KINDS["child"](str(tmp_path))
    server = command(case.path)
    load = load_on(server, case, "impatient")
    assert load.run(0.15)
    for _ in range(3):
        server.process.send_signal(signal.SIGTERM)
        os.kill(server.nbdkit, signal.SIGTERM)
    load.drain()
    assert server.wait() == 0
    closed_cleanly(case)


def test_signal_to_the_command_s_nbdkit(command: Command, tmp_path: Any) -> None:
    """Somebody else ends it, cleanly: that is no failure."""
    case = KINDS["monolithic"](str(tmp_path))
    server = command(case.path)
    load = load_on(server, case, "nbdkit")
    assert load.run(0.1, at_end=lambda: os.kill(server.nbdkit, signal.SIGTERM))
    load.drain()
    assert server.wait() == 0
    closed_cleanly(case)


def half_a_write(server: Nbdkit, offset: int, length: int) -> None:
    """A client that vanishes while it sends the data of a write."""
    ours = socket.socket(socket.AF_UNIX)
    ours.connect(server.socket)
    connection = nbd.NBD()
    connection.connect_socket(os.dup(ours.fileno()))
    ours.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, offset, length) + b"x" * (length // 2))
    ours.shutdown(socket.SHUT_RDWR)
    ours.close()


def test_clients_vanish(serve: Serve, tmp_path: Any) -> None:
    """In the middle of requests, and of one request; the others notice nothing."""
    case = KINDS["child"](str(tmp_path))
    server = serve(case.path)
    stayers = load_on(server, case, "stayers", 2)
    rng = random.Random(1)
    for turn in range(15):
        connection = nbd.NBD()
        connection.connect_unix(server.socket)
        # What it has asked for when it goes may be carried out or not: the history leaves that open.
        Load([connection], case.history, ("leaver", turn), depth=1).run(0.02)
        del connection
        half_a_write(server, rng.randrange(BLOCKS - 64) * BLOCK, 64 * BLOCK)
        assert stayers.run(0.03)
    assert stayers.drain()
    assert server.stop() == 0
    assert "Traceback" not in server.errors
    closed_cleanly(case)


def test_server_ends_beside_a_request_that_takes_long(serve: Serve, tmp_path: Any) -> None:
    """It waits for the request, whose reply still comes, and then closes."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(SLOW)
    case = KINDS["monolithic"](str(tmp_path))
    server = serve(case.path, plugin=str(plugin))
    connection = server.connect(context=False)
    write = case.history.send(0, 1)
    buffer = nbd.Buffer.from_bytearray(bytearray(filled(0, 1, write.version)))
    cookie = connection.aio_pwrite(buffer, 0)
    connection.poll(100)
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    connection_lost = False
    try:
        while not connection.aio_command_completed(cookie):
            connection.poll(-1)
        case.history.replied(write)
    except nbd.Error:
        connection_lost = True
    assert not connection_lost
    assert server.wait() == 0
    closed_cleanly(case)


SLOW = f"""
import os, sys, time
sys.path[:0] = [{ROOT!r}, os.environ.get("NBD_VMDK_SITE", "")]
from nbd_vmdk.plugin.callbacks import *
from nbd_vmdk.storage.local import LocalFile
real = LocalFile.write
def write(self, buf, at):
    time.sleep(SECONDS)
    real(self, buf, at)
LocalFile.write = write
""".replace("SECONDS", "1.5")


@pytest.mark.parametrize("kind", ["monolithic", "flat", "child"])
def test_close_while_requests_are_under_way(tmp_path: Any, kind: str) -> None:
    """Each request is carried out or refused; what was flushed before is there, and the image is sound."""
    for turn in range(6):
        folder = tmp_path / str(turn)
        folder.mkdir()
        case = KINDS[kind](str(folder))
        disk = open_disk(case.path, writable=True)
        lock = threading.Lock()
        bugs: list[BaseException] = []

        def use(seed: int, disk: Any = disk, case: Case = case, lock: Any = lock, bugs: Any = bugs) -> None:
            rng = random.Random(seed)
            try:
                while True:
                    count = rng.randint(1, 20)
                    first = rng.randrange(BLOCKS - count)
                    with lock:
                        write = case.history.send(first, count)
                    disk.pwrite(filled(first, count, write.version), first * BLOCK)
                    with lock:
                        case.history.replied(write)
                    if rng.random() < 0.2:
                        with lock:
                            sent = case.history.tick()
                        disk.flush()
                        with lock:
                            case.history.flushed(sent)
                    disk.pread(MIB, 0)
            except VmdkError:
                pass
            except BaseException as error:  # noqa: BLE001  anything else is a bug, told by the main thread
                bugs.append(error)

        threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.02 * turn)
        disk.close()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert not bugs, bugs
        case.survived()
        case.sound(clean=False)
