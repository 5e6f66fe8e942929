"""How far a long run has come: a bar on a terminal, a line every ten seconds elsewhere, all on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from nbd_vmdk.cli import output
from nbd_vmdk.units import format_size

_LINE_EVERY: Final = 10.0
#: What takes no longer than this needs no bar; rich alone takes a twentieth of a second to come.
_BAR_AFTER: Final = 0.7
_BAR_EVERY: Final = 0.1

#: Told bytes done, and of how many.
Progress = Callable[[int, int], None]


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """Show the progress of ``what``; nothing at all for what ends at once."""
    if not sys.stderr.isatty():
        yield _Lines(what)
        return
    bar = _Bar(what)
    try:
        yield bar
    finally:
        bar.close()


class _Lines:
    """A line now and then."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._next = time.monotonic() + _LINE_EVERY

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next and total:
            self._next = now + _LINE_EVERY
            percent = f"{100 * done // total}%"
            output.message("note", f"{self._what}: {percent}, {format_size(done)} of {format_size(total)}")


class _Bar:
    """A bar, once it is clear that there is something to wait for."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._next = time.monotonic() + _BAR_AFTER
        self._move: Progress | None = None
        self._stop: Callable[[], None] | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _BAR_EVERY
            if self._move is None:
                self._move = self._start()
            self._move(done, total)

    def _start(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task(self._what, total=None)
        self._stop = bar.stop
        bar.start()
        return lambda done, total: bar.update(task, completed=done, total=total)

    def close(self) -> None:
        """Take the bar away."""
        if self._stop is not None:
            self._stop()
