"""Serving as a system does it: far clients, overlays, systemd, devices, mounts, by the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "nbd_vmdk", *map(str, words)]


def vmdk(
    *words: object, code: int | None = 0, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end, which is to be with ``code``; None takes any."""
    done = subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | dict(environment or {}),
    )
    assert code is None or done.returncode == code, done
    assert "Traceback" not in done.stderr
    return done


@contextmanager
def served(*words: object, code: int = 0, **how: Any) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server that is ready: its URI and its process, which is told to end in the end."""
    process = subprocess.Popen(
        command("serve", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
    )
    try:
        assert process.stdout is not None
        uri = process.stdout.readline().strip()
        if not uri:
            raise AssertionError(process.communicate(timeout=20))
        yield uri, process
    finally:
        process.terminate()
        _out, errors = process.communicate(timeout=30)
        process.said = errors  # type: ignore[attr-defined]
    assert process.returncode == code, errors
    assert "Traceback" not in errors


def size_of(uri: str) -> tuple[int, str]:
    """What nbdinfo makes of it: its exit code, and the size in bytes or else what it said."""
    done = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, check=False, timeout=20)
    return done.returncode, (done.stdout or done.stderr).strip()


def qemu_size(*words: str) -> int:
    """The exit code of qemu-img as a client."""
    done = subprocess.run(
        ["qemu-img", "info", *words], capture_output=True, text=True, check=False, timeout=20
    )
    return done.returncode
