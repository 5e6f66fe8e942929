"""A file system that is really full: the client is told, the rest goes on, and nothing flushed is lost."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbd_vmdk import open_disk
from tests.engine import same
from tests.failing.history import BLOCK
from tests.failing.kinds import KINDS
from tests.failing.load import Load, Mix
from tests.images import desc
from tests.images.content import KIB, MIB, Content
from tests.mounted import mounted
from tests.plugin import Nbdkit, errno_of
from tests.sound import check_sound

Serve = Callable[..., Nbdkit]

ROOM = 8 * MIB
GRAIN = 64 * KIB


@pytest.fixture(params=["tmpfs", "ext4"])
def small(tmp_path: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """A mounted file system of 8 MiB: one that is full at the write, and one on a disk."""
    kind = request.param
    with mounted(tmp_path, kind, ROOM + MIB if kind == "ext4" else ROOM) as where:
        yield where


def noise(length: int) -> bytes:
    return os.urandom(length)


def fill(folder: str, leave: int = 0) -> str:
    """Take all the space there is, but for `leave` bytes; the file that does."""
    path = os.path.join(folder, "filler")
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        os.fsync(file.fileno())
        file.truncate(max(0, file.seek(0, os.SEEK_END) - leave))
    return path


def test_writes_stop_and_resume(serve: Serve, small: str) -> None:
    image = desc.monolithic_sparse(small, "top", Content(64 * MIB).put(0, b"\1" * 4 * GRAIN))
    server = serve(image.path)
    connection, other = server.connect(), server.connect()
    model = bytearray(image.visible.read())
    safe = noise(GRAIN)
    connection.pwrite(safe, MIB)
    connection.flush()
    model[MIB : MIB + GRAIN] = safe
    filler = fill(small, 5 * GRAIN)
    refused = 0
    data = noise(GRAIN)
    for turn in range(40):
        at = 2 * MIB + turn * GRAIN
        found = errno_of(lambda at=at: connection.pwrite(data, at))
        assert found in (None, "ENOSPC")
        if found is None:
            model[at : at + GRAIN] = data
        refused += found is not None
    assert refused > 20
    # What has space goes on, on this connection and on others: reads, overwrites, trims.
    same(bytes(other.pread(GRAIN, MIB)), safe)
    connection.pwrite(b"over" * 1024, 0)
    model[:4096] = b"over" * 1024
    other.trim(GRAIN, GRAIN)
    model[GRAIN : 2 * GRAIN] = bytes(GRAIN)
    connection.flush()
    # A grain was given back, so one may be written; then there is space for all.
    os.unlink(filler)
    for turn in range(40):
        at = 2 * MIB + turn * GRAIN
        other.pwrite(data, at)
        model[at : at + GRAIN] = data
    other.flush()
    same(bytes(connection.pread(8 * MIB, 0)), bytes(model[: 8 * MIB]))
    assert server.stop() == 0
    check_sound(image.path)
    with open_disk(image.path) as disk:
        assert not disk.warnings
        same(disk.pread(8 * MIB, 0), bytes(model[: 8 * MIB]))


def test_tables_that_do_not_fit(serve: Serve, small: str) -> None:
    """Grains of a sector, so that space runs out for tables: the flush fails, and a later one does not."""
    image = desc.monolithic_sparse(small, "top", Content(64 * MIB), grain_sectors=1, preallocate_tables=True)
    server = serve(image.path)
    connection = server.connect()
    # The tables lie in holes of the file, so writing them takes blocks.
    with open(image.path, "rb") as file:
        whole = file.read()
    with open(image.path, "wb") as file:
        file.truncate(len(whole))
        for at in range(0, len(whole), 4096):
            if any(whole[at : at + 4096]):
                file.seek(at)
                file.write(whole[at : at + 4096])
    filler = fill(small, 64 * KIB)
    outcomes = []
    written = []
    for turn in range(120):
        at = turn * 512 * KIB
        if errno_of(lambda at=at: connection.pwrite(b"\7" * 512, at)) is None:
            written.append(at)
        outcomes.append(errno_of(connection.flush))
        assert outcomes[-1] in (None, "ENOSPC")
    assert "ENOSPC" in outcomes
    same(bytes(connection.pread(512, written[0])), b"\7" * 512)
    os.unlink(filler)
    assert errno_of(connection.flush) is None
    connection.pwrite(b"\1" * 512, 63 * MIB, 1)
    for at in written:
        same(bytes(connection.pread(1024, at)), b"\7" * 512 + bytes(512))
    assert server.stop() == 0
    with open_disk(image.path) as disk:
        assert not disk.warnings
        for at in written:
            same(disk.pread(512, at), b"\7" * 512)
    check_sound(image.path)


@pytest.mark.parametrize("kind", ["small-grains", "split", "child", "cowd-child"])
def test_load_while_space_comes_and_goes(serve: Serve, small: str, kind: str) -> None:
    case = KINDS[kind](small)
    server = serve(case.path)
    # Nobody reads what the server says until it ends, and each failure is a line.
    fcntl.fcntl(server.process.stderr.fileno(), fcntl.F_SETPIPE_SZ, MIB)
    connections = [server.connect(context=False) for _ in range(4)]
    load = Load(connections, case.history, kind, mix=Mix(trim=0.12))
    for client in load.clients:
        client.bears_errors = True
    for turn in range(4):
        filler = fill(small, turn * 20 * KIB)
        assert load.run(0.15)
        os.unlink(filler)
        assert load.run(0.05)
    assert load.drain()
    assert set(load.errors) == {"ENOSPC"}
    connections[0].flush()
    case.history.flushed(case.history.tick())
    size = case.image.size // BLOCK * BLOCK
    case.history.check_read(connections[1].pread(size, 0), 0, case.history.tick())
    assert server.stop() == 0
    case.survived()
    case.sound(clean=True)
