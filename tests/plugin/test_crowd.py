"""How threads are scheduled: as always, but where there are many of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import nbd

from tests.images import desc
from tests.images.content import KIB, MIB, Content
from tests.plugin import Nbdkit

Serve = Callable[..., Nbdkit]


def read_much(connection: nbd.NBD) -> None:
    """Have so many requests in flight that many threads serve them."""
    buffers = [nbd.Buffer(4 * KIB) for _ in range(96)]
    cookies = [connection.aio_pread(buffer, 4 * KIB * turn) for turn, buffer in enumerate(buffers)]
    while cookies:
        connection.poll(-1)
        cookies = [cookie for cookie in cookies if not connection.aio_command_completed(cookie)]


def policies(server: Nbdkit) -> list[int]:
    """That of each thread."""
    found = []
    for task in os.listdir(f"/proc/{server.pid}/task"):
        try:
            found.append(os.sched_getscheduler(int(task)))
        except ProcessLookupError:
            pass
    return found


def read_until(connections: Iterable[nbd.NBD], reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < end, "it never came"
        for connection in connections:
            read_much(connection)


def test_threads_of_many_connections_do_not_preempt(serve: Serve, tmp_path: Any) -> None:
    """With 8 threads each, the third connection makes a crowd, and its end dissolves it.

    Each thread is changed when it serves its next request.
    """
    image = desc.monolithic_sparse(str(tmp_path), "top", Content(4 * MIB).put(0, bytes(range(256)) * 2048))
    server = serve(image.path, options=("-t", "8"))
    first, second = server.connect(context=False), server.connect(context=False)
    for _ in range(20):
        read_much(first)
        read_much(second)
    assert os.SCHED_BATCH not in policies(server)
    third = server.connect(context=False)
    read_until([first, second, third], lambda: policies(server).count(os.SCHED_BATCH) > 16)
    third.shutdown()
    read_until([first, second], lambda: os.SCHED_BATCH not in policies(server))
    first.shutdown()
    second.shutdown()
