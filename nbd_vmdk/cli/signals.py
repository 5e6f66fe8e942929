"""Being asked to end: what Ctrl-C does, for the signals that other programs send.

By default SIGTERM and SIGHUP end a process on the spot, and half-made files, locks and attached devices stay.
Here they unwind it as an interrupt does, so whatever is to be taken back is, and the exit code is the one
that a shell shows for a process that the signal killed.

A signal that comes while a finalizer runs is raised a moment later: Python prints what is raised in one, and
goes on as if it had not been.

What serves has signal handlers of its own, which come after these and replace them.  A signal that the caller
ignores (nohup) stays ignored.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
#: Seconds until a finalizer is over.
_MOMENT: Final = 0.01


class AskedToEnd(KeyboardInterrupt):
    """A signal asked for it; ``exit_code`` is what to end with."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.exit_code = 128 + number


@contextmanager
def orderly_end() -> Iterator[None]:
    """Let the first of the signals raise AskedToEnd in the main thread; more of them change nothing.

    A second one must not stop what the first one began: removing what was half made.  Ctrl-C still does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what signals do
        return
    asked = False
    alarm = signal.getsignal(signal.SIGALRM)

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            return
        if _in_finalizer(frame):
            # No thread: its making takes locks, which the code below the finalizer may hold.
            signal.signal(signal.SIGALRM, lambda _alarm, then: end(number, then))
            signal.setitimer(signal.ITIMER_REAL, _MOMENT)
            return
        asked = True
        raise AskedToEnd(number)

    replaced = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in replaced:
            signal.signal(number, end)
        yield
    finally:
        if signal.getsignal(signal.SIGALRM) is not alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
        for number in replaced:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)


def _in_finalizer(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
