"""Being asked to end: what Ctrl-C does, for the signals that other programs send.

By default SIGTERM and SIGHUP end a process on the spot, and half-made files, locks and attached devices stay.
Here they unwind it as an interrupt does, so whatever is to be taken back is, and the exit code is the one
that a shell shows for a process that the signal killed.

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

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise AskedToEnd(number)

    replaced = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in replaced:
            signal.signal(number, end)
        yield
    finally:
        for number in replaced:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)
