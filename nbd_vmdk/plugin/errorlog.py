"""What nbdkit prints for an exception: one or two clean lines where it is an error of ours.

A client that reads a damaged disk to its end meets one damage in thousands of requests, and each gets its
errno.  In the log the first one says all that a person needs; errors that differ from it in their numbers
alone are counted, and the count is told at the end.  So that a disk that is full today, and again next month,
is told of twice, what has been quiet for a while counts as new.
"""

import re
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from nbd_vmdk.errors import NotFast, VmdkError

#: nbdkit prints something for each failed request: behind an error's slug, this says that it is nothing new.
REPEATED: Final = "(nothing new)"

#: New sorts of errors that are told in each period of so many seconds; clients can make some, such as names.
_TOLD, _PERIOD = 10, 10.0
#: Seconds without an error of a sort after which it is told again.
_QUIET: Final = 600.0
#: Sorts of errors that are remembered.
_MAX_SORTS: Final = 1000

_NUMBER: Final = re.compile(r"0x[0-9a-f]+|[0-9]+")


@dataclass(slots=True)
class _Sort:
    """Errors that are told once: the first one's text, when the last one came, and how many after the first.

    Of an exception no more is kept: its traceback holds on to the request's buffer.
    """

    first: str
    last: float
    repeats: int = 0


class ErrorLog:
    """Gives the text that nbdkit prints for an exception: one or two clean lines for errors of ours.

    nbdkit's Python plugin prints a traceback for every exception.  For a VmdkError there is nothing in it
    that a user needs; for a bug there is, and it is kept.  The word ``error:`` is nbdkit's own.  ``advise``
    is to put the disk's name into an error's hint.
    """

    def __init__(self, advise: Callable[[VmdkError], None]) -> None:
        self._original = traceback.format_exception
        self._advise = advise
        self._period_ends = 0.0
        self._count = 0
        self._sorts: dict[tuple[str | None, str], _Sort] = {}
        self._lock = threading.Lock()

    def install(self) -> None:
        """Take the place of the function that nbdkit calls, by its name."""
        traceback.format_exception = self._format

    def counted(self) -> list[str]:
        """A line for each sort of errors of which not all were told."""
        with self._lock:
            found = [sort for sort in self._sorts.values() if sort.repeats > 1]
        return [f"{sort.first} (and {sort.repeats - 1} more errors like it)" for sort in found]

    def _format(self, *args: Any, **kwargs: Any) -> list[str]:
        error = args[1] if len(args) > 1 else args[0]
        if not isinstance(error, VmdkError):
            return self._original(*args, **kwargs)
        with self._lock:
            return [self._text(error, time.monotonic())]

    def _text(self, error: VmdkError, now: float) -> str:
        if isinstance(error, NotFast):
            return f"{error.slug} {REPEATED}"  # nothing is wrong: the client asked whether it would be
        key = error.file, _NUMBER.sub("0", error.message)
        sort = self._sorts.get(key)
        if sort is not None and now - sort.last < _QUIET:
            sort.last = now
            sort.repeats += 1
            if sort.repeats > 1:
                return f"{error.slug} {REPEATED}"
            return f"{error}; more errors like this one are only counted"
        if now > self._period_ends:
            self._period_ends, self._count = now + _PERIOD, 0
        self._count += 1
        if self._count > _TOLD:
            return f"{error.slug} (more of these are not shown in full)"
        if sort is None:
            if len(self._sorts) == _MAX_SORTS:
                del self._sorts[next(iter(self._sorts))]
            self._sorts[key] = _Sort(str(error), now)
        else:
            sort.last = now
        self._advise(error)
        return str(error) + (f"\nhint: {error.hint}" if error.hint else "")
