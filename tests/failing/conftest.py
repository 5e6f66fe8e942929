"""Servers of a test: nbdkit with the plugin, and `nbd-vmdk serve`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.failing import Served
from tests.plugin import ROOT
from tests.plugin.conftest import serve

__all__ = ["command", "serve"]


@pytest.fixture
def command(tmp_path: Any) -> Iterator[Callable[..., Served]]:
    """Start `nbd-vmdk serve`: command(path, options...); it answers when this returns."""
    started: list[Served] = []

    def made(path: str, *options: str) -> Served:
        socket = os.path.join(tmp_path, f"c{len(started)}")
        pidfile = f"{socket}.pid"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "nbd_vmdk",
                "serve",
                "--socket",
                socket,
                "--pidfile",
                pidfile,
                *options,
                path,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("nbd+unix:"), process.communicate()[1]
        server = Served(process, socket, pidfile)
        started.append(server)
        return server

    yield made
    for server in started:
        if server.process.returncode is None:
            server.stop(signal.SIGTERM)
