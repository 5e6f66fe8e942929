"""
What goes wrong outside of us: processes that die, clients that vanish, disks that fill up or fail, others
who hold the image. The real server runs, and real clients load it; what they may find afterwards is worked
out by history.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

from tests.plugin import Nbdkit


class Served(Nbdkit):
    """An `nbd-vmdk serve`; `pid` is its own process, `nbdkit` the one that it looks after."""

    def __init__(self, process: subprocess.Popen[str], socket: str, pidfile: str) -> None:
        super().__init__(process, socket)
        self.pidfile = pidfile
        with open(pidfile) as file:
            self.nbdkit = int(file.read())


def kill(server: Nbdkit) -> None:
    """End a server as a crash does; the test goes on as if it had ended well."""
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL, server.errors
    server.process.returncode = 0


def wait_for(what: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """A process is there, and is no corpse that nobody has buried."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def listing(folder: str) -> list[str]:
    return sorted(os.listdir(folder))
