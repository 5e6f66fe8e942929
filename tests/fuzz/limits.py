"""
What any input may cost: so much processor time, so much memory, and nothing that stays behind.

The memory limit is one on address space, set anew for each input: what asks for too much gets a MemoryError
where it asks, so that a finding's traceback names the culprit. Time is the processor's, because the machine
may be busy; a wait without end is left to libFuzzer's own clock.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import threading
from collections.abc import Iterator
from types import FrameType

MIB = 1 << 20
SECONDS = 5.0
MEMORY = 256 * MIB


class TooSlow(BaseException):
    """The input took too long; raised where the time ran out, past whatever handles ordinary errors."""


class LeftBehind(Exception):
    """Files or threads outlived the input."""


@contextlib.contextmanager
def limited(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Run one input within bounds, on the main thread."""
    files, threads = _open_files(), threading.active_count()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, _time_is_up)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)
    if _open_files() - files:
        gc.collect()  # an error's traceback may have kept a frame, and that a folder
        if left := _open_files() - files:
            raise LeftBehind(f"still open: {sorted(left)}")
    if threading.active_count() > threads:
        raise LeftBehind(f"still running: {threading.enumerate()}")


def _time_is_up(_number: int, _frame: FrameType | None) -> None:
    raise TooSlow


def _address_space() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _open_files() -> set[tuple[str, str]]:
    """Number and name of each file that is open."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists is gone by now
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found
