"""What may come of any input: a value, or an error that keeps its promises."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

from nbd_vmdk.errors import StorageError, VmdkError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def checked(error: VmdkError) -> None:
    """The promises of every error: one line, no trace of a file used after it was closed, fit for JSON."""
    for text in (str(error), error.message, error.hint or ""):
        assert not _CONTROL.search(text), f"control characters in {text!r}"
    assert not (isinstance(error, StorageError) and "Bad file descriptor" in str(error)), error
    json.dumps(error.as_dict())


@contextlib.contextmanager
def our_errors() -> Iterator[None]:
    """Take a VmdkError for an answer."""
    try:
        yield
    except VmdkError as error:
        checked(error)
