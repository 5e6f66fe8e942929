"""The server is killed under load, at any moment: what was flushed is there, and the image is sound."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.failing import Served, alive, kill, wait_for
from tests.failing.history import History
from tests.failing.kinds import KINDS, Case
from tests.failing.load import Load
from tests.plugin import ROOT, Nbdkit

Serve = Callable[..., Nbdkit]
Command = Callable[..., Served]

ROUNDS = 8  # of each kind
CONNECTIONS = 3


def load_on(server: Nbdkit, case: Case, seed: object, **options: Any) -> Load:
    connections = [server.connect(context=False) for _ in range(CONNECTIONS)]
    return Load(connections, case.history, seed, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(serve: Serve, tmp_path: Any, kind: str) -> None:
    """The same image again and again, so that each death meets what the ones before have left."""
    case = KINDS[kind](str(tmp_path))
    rng = random.Random(kind)
    flushes = 0
    for turn in range(ROUNDS):
        server = serve(case.path)
        load = load_on(server, case, (kind, turn))
        # Half of them soon, when the first tables are made and the flag is set.
        moment = rng.uniform(0.002, 0.04) if turn % 2 else rng.uniform(0.04, 0.2)
        assert load.run(moment, at_end=lambda server=server: kill(server))
        load.drain()
        flushes += load.flushes
        case.survived()
        case.sound(clean=False)
    assert flushes > ROUNDS / 2, "too little was flushed to say anything"
    # And it goes on as a server does.
    server = serve(case.path)
    load = load_on(server, case, "last")
    assert load.run(0.1)
    assert load.drain()
    assert server.stop() == 0
    case.history.flushed(case.history.tick())
    case.survived()
    case.sound(clean=False)


def test_a_server_that_loses_something_is_found_out(serve: Serve, tmp_path: Any) -> None:
    """The same test on a server whose flushes do nothing must fail."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        f"import os, sys\n"
        f"sys.path[:0] = [{ROOT!r}, os.environ.get('NBD_VMDK_SITE', '')]\n"
        f"from nbd_vmdk.plugin.callbacks import *\n"
        f"from nbd_vmdk.commit import Committer\n"
        f"Committer.flush = lambda self: None\n"
    )
    case = KINDS["monolithic"](str(tmp_path))
    server = serve(case.path, plugin=str(plugin))
    load = load_on(server, case, "bad")
    load.run(0.2, at_end=lambda: kill(server))
    load.drain()
    assert load.flushes
    with pytest.raises(AssertionError, match=r"block \d+ holds version"):
        case.survived()


@pytest.mark.parametrize("kind", ["split", "child"])
def test_the_command_s_server_is_killed(command: Command, tmp_path: Any, kind: str) -> None:
    """With --no-restart `serve` says so, leaves nothing behind and fails; data is as safe as in any death."""
    case = KINDS[kind](str(tmp_path))
    for turn in range(3):
        server = command(case.path, "--no-restart")
        load = load_on(server, case, (kind, turn))
        assert load.run(
            0.02 + 0.05 * turn, at_end=lambda server=server: os.kill(server.nbdkit, signal.SIGKILL)
        )
        load.drain()
        assert server.wait() == 1
        lines = server.errors.splitlines()
        assert lines[-1] == "error: nbdkit ended unasked: it was killed by SIGKILL", lines
        assert not os.path.exists(server.socket)
        assert not os.path.exists(server.pidfile)
        case.survived()
        case.sound(clean=False)


@pytest.mark.parametrize("kind", ["monolithic"])
def test_the_command_itself_is_killed(command: Command, tmp_path: Any, kind: str) -> None:
    """Its nbdkit notices, closes the image cleanly and ends; nobody is left who could hold the image."""
    case = KINDS[kind](str(tmp_path))
    for turn in range(2):
        server = command(case.path)
        load = load_on(server, case, turn)
        assert load.run(0.1, at_end=lambda server=server: kill(server))
        load.drain()
        wait_for(lambda server=server: not alive(server.nbdkit))
        # A clean close: all that was answered is there, flushed or not.
        case.history.flushed(case.history.tick())
        case.survived()
        case.sound(clean=True)


def test_a_dead_server_s_socket_is_no_obstacle(command: Command, tmp_path: Any) -> None:
    case = KINDS["flat"](str(tmp_path))
    server = command(case.path)
    kill(server)
    wait_for(lambda: not alive(server.nbdkit))
    assert os.path.exists(server.socket)
    again = command(case.path, "--socket", server.socket)
    assert again.process.poll() is None
    assert os.path.exists(server.socket)
    again.socket = server.socket
    assert again.connect().get_size() == case.image.size
    assert again.stop() == 0
    assert not os.path.exists(server.socket)


def test_the_history_knows_what_may_be_found() -> None:
    """The rules of history.py themselves."""
    history = History([0, 5])

    def may_hold(block: int, *versions: int) -> None:
        for version in range(20):
            row = history._writes[block]
            sure = max((write.sent for write in row if write.durable and not write.weak), default=0)
            allowed = version in {write.version for write in row if write.done >= sure}
            assert allowed is (version in versions), version

    may_hold(0, 0)
    one = history.send(0, 2)
    assert one.version == 6
    may_hold(1, 5, 6)
    history.replied(one)
    may_hold(1, 5, 6)  # nothing was flushed
    early = history.tick()
    two = history.send(0, 1)
    history.replied(two)
    history.flushed(early)
    may_hold(1, 6)
    may_hold(0, 6, 7)  # the flush was sent before the second write had its reply
    trim = history.send(0, 1, zeros=True, weak=True)
    history.replied(trim)
    history.flushed(history.tick())
    may_hold(0, 0, 7)
    three, four = history.send(0, 1), history.send(0, 1)
    history.replied(four, durable=True)
    may_hold(0, 8, 9)  # the first may come after the second
    history.failed(three)
    may_hold(0, 8, 9)
