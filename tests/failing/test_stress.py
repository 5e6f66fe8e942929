"""
Many connections that write, zero, trim, flush and read overlapping ranges, each read checked.

A few seconds of it are among the tests; `make soak` gives it minutes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.failing import kill
from tests.failing.kinds import KINDS
from tests.failing.load import Load, Mix
from tests.plugin import Nbdkit

Serve = Callable[..., Nbdkit]

_TESTS = 2 * len(KINDS)
SECONDS = float(os.environ.get("SOAK_SECONDS", str(1.2 * _TESTS))) / _TESTS
CONNECTIONS = 8
_UNCLEAN = "it was not closed cleanly the last time it was written"
#: How long the clients go on until all is looked at from end to end.
PERIOD = 3.0

MIXES = {
    # All do everything; what is written comes and goes.
    "everything": Mix(write=0.35, zero=0.1, trim=0.15, flush=0.1),
    # Few blocks for many, so that grains change hands between allocation, trim and reuse.
    "crowded": Mix(write=0.3, zero=0.1, trim=0.2, flush=0.1, crowd=0.03, most=40),
}


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_clients_meet(serve: Serve, tmp_path: Any, kind: str, mix: str) -> None:
    case = KINDS[kind](str(tmp_path))
    stop = time.monotonic() + SECONDS
    turn = completed = 0
    while time.monotonic() < stop:
        server = serve(case.path)
        connections = [server.connect(context=False) for _ in range(CONNECTIONS)]
        load = Load(connections, case.history, (kind, mix, turn), mix=MIXES[mix], depth=8)
        assert load.run(min(PERIOD, max(0.1, stop - time.monotonic())))
        assert load.drain()
        completed += load.completed
        # All connections see the same disk, and so does everybody after them.
        size = case.image.size
        seen = {bytes(each.pread(size, 0)) for each in connections[:3]}
        assert len(seen) == 1, "two connections see different bytes though nobody writes"
        case.history.check_read(seen.pop(), 0, case.history.tick())
        case.history.flushed(case.history.tick())
        crashed = turn % 3 == 1
        if crashed:
            connections[0].flush()
            kill(server)
        else:
            assert server.stop() == 0
        # What a crash has left stays marked until it is repaired, and that is warned of.
        said = [line for line in server.errors.splitlines() if not (turn > 1 and _UNCLEAN in line)]
        assert not said
        case.survived()
        case.sound(clean=turn == 0)
        turn += 1
    assert completed > 100
