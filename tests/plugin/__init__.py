"""What the tests of the plugin share: nbdkit with the real plugin, spoken to through libnbd."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PLUGIN = os.path.join(ROOT, "plugin.py")

try:
    import nbd
except ImportError:  # this is not the project's .venv: take the distribution's
    sys.path.append("/usr/lib/python3/dist-packages")
    import nbd


def environment() -> dict[str, str]:
    """What nbdkit gets: the Python it embeds finds our dependencies where this one has them."""
    found = dict(os.environ)
    if not sys.prefix.startswith(ROOT):
        found["NBD_VMDK_SITE"] = sysconfig.get_path("purelib")
    return found


class Nbdkit:
    """An nbdkit that serves on a unix socket."""

    def __init__(self, process: subprocess.Popen[str], socket: str) -> None:
        self.process = process
        self.socket = socket
        self.uri = f"nbd+unix:///?socket={socket}"
        self.errors = ""
        #: A test that makes nbdkit print a traceback says so.
        self.traceback_expected = False
        self._connections: list[nbd.NBD] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    def connect(self, export: str = "", *, context: bool = True) -> nbd.NBD:
        """A connection that is closed when the test ends."""
        made = nbd.NBD()
        self._connections.append(made)
        made.set_export_name(export)
        if context:
            made.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        made.connect_unix(self.socket)
        return made

    def info(self, *words: str) -> Any:
        """What nbdinfo tells of the export."""
        done = subprocess.run(
            ["nbdinfo", "--json", *words, self.uri], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; its exit code. What it said is then in `errors`."""
        if self.process.returncode is None:
            self.process.send_signal(number)
            return self.wait()
        return self.process.returncode

    def wait(self) -> int:
        self.errors += self.process.communicate(timeout=20)[1]
        return self.process.returncode

    def finish(self) -> None:
        # A connection that is forgotten closes itself; nbdkit needs no farewell.
        self._connections.clear()
        if self.process.returncode is None:
            self.stop()
            assert self.process.returncode == 0, self.errors
        assert ("Traceback" in self.errors) is self.traceback_expected, self.errors


def refusal(*words: str, within: float = 5.0) -> str:
    """Start nbdkit with what must stop it: quickly, exit code 1, no traceback.  Gives what it said."""
    begin = time.monotonic()
    done = subprocess.run(
        ["nbdkit", "-f", "-U", "-", *words],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=environment(),
    )
    assert time.monotonic() - begin < within
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert not done.stdout
    # One line says what is wrong, a second one may say what to do.
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 2, done.stderr
    assert re.match(r"nbdkit: error: ", lines[0])
    assert lines[1:] == [line for line in lines[1:] if line.startswith("hint: ")]
    return done.stderr


def errno_of(call: Callable[[], object]) -> str | None:
    """The name of the errno that a libnbd call fails with, None if it succeeds."""
    try:
        call()
    except nbd.Error as error:
        return error.errno
    return None
