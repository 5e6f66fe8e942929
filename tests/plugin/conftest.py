"""The server of a test."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.plugin import PLUGIN, Nbdkit, environment

Serve = Callable[..., Nbdkit]


@pytest.fixture
def serve(tmp_path: Any) -> Iterator[Serve]:
    """Start nbdkit: serve(path, "key=value"..., options=("-r",), plugin=...); it must end cleanly."""
    started: list[Nbdkit] = []

    def made(
        path: str, *config: str, options: tuple[str, ...] = (), plugin: str = PLUGIN, **more: Any
    ) -> Nbdkit:
        socket = os.path.join(tmp_path, f"s{len(started)}")
        # The file for its process ID is written when clients may come, the socket is there a little earlier.
        ready = f"{socket}.pid"
        command = ["nbdkit", "-f", "-U", socket, *options, "-P", ready]
        command += ["python", plugin, f"file={path}", *config]
        env = environment() | more.pop("env", {})
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, **more)
        server = Nbdkit(process, socket)
        started.append(server)
        end = time.monotonic() + 20
        while not os.path.exists(ready):
            if process.poll() is not None:
                raise AssertionError(f"nbdkit ended: {process.communicate()[1]}")
            assert time.monotonic() < end, "nbdkit does not begin"
            time.sleep(0.005)
        return server

    yield made
    for server in started:
        server.finish()
