"""What nbdkit prints for an exception: one or two clean lines where it is an error of ours."""

import time
import traceback
from typing import Any

from nbd_vmdk.errors import VmdkError

#: Errors of requests that are logged in full in each period of so many seconds.
_LOGGED, _PERIOD = 10, 10.0


class ErrorLog:
    """Gives the text that nbdkit prints for an exception: one or two clean lines for errors of ours.

    nbdkit's Python plugin prints a traceback for every exception.  For a VmdkError there is nothing in it
    that a user needs; for a bug there is, and it is kept.  nbdkit prints something for each failed request,
    so many in a short time are cut down to their slug.  The word ``error:`` is nbdkit's own.
    """

    def __init__(self) -> None:
        self._original = traceback.format_exception
        self._period_ends = 0.0
        self._count = 0

    def install(self) -> None:
        """Take the place of the function that nbdkit calls, by its name."""
        traceback.format_exception = self._format

    def _format(self, *args: Any, **kwargs: Any) -> list[str]:
        error = args[1] if len(args) > 1 else args[0]
        if not isinstance(error, VmdkError):
            return self._original(*args, **kwargs)
        now = time.monotonic()
        if now > self._period_ends:
            self._period_ends, self._count = now + _PERIOD, 0
        self._count += 1
        if self._count > _LOGGED:
            return [f"{error.slug} (more of these are not shown in full)"]
        return [str(error) + (f"\nhint: {error.hint}" if error.hint else "")]
