"""What every verb says, and how: results on stdout, messages on stderr, JSON.

Names in messages and in tables come from images, which are untrusted: control characters in them are shown
as escapes, so that none reaches a terminal.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import TextIO

import click

from nbd_vmdk.errors import FileMissing, VmdkError, printable

#: The version of the layout of all JSON that the command line prints.
SCHEMA = 1

#: Where warnings go, the engine's own and the verbs': the handler below shows them.
log = logging.getLogger("nbd_vmdk")

#: Those of syslog(3): error, warning, and information for all else.
_PRIORITIES = {"error": 3, "warning": 4, "hint": 5}
_COLOURS = {"error": "red", "warning": "yellow", "hint": "cyan", "note": "blue"}


def prepare() -> None:
    """Let file names that are no valid text pass through as the bytes they are.

    A stream that was closed before we came (``>&-``) takes what is written to nowhere.  Its descriptor is
    taken, too: an image that got it would get what a library prints, and a program that we start has none.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  it lives as long as we
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="surrogateescape")


def abandon() -> None:
    """Give up stdout, whose reader is gone: what is left in its buffer goes nowhere, silently."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def clean(text: str) -> str:
    """``text`` on one line and without anything that a terminal would obey."""
    return printable(text)


def colourful(stream: TextIO) -> bool:
    """Whether colour is wanted there: a terminal, and the user has not said no (NO_COLOR)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def line(text: str) -> None:
    """One line of results, on stdout.  What comes from an image has been through clean()."""
    sys.stdout.write(f"{text}\n")


def priority(word: str) -> str:
    """What says to journald how important a line is, if it is journald that reads (sd-daemon(3))."""
    stream = os.environ.get("JOURNAL_STREAM")
    if not stream:
        return ""
    try:
        there = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return ""
    if stream != f"{there.st_dev}:{there.st_ino}":
        return ""  # our stderr goes somewhere else
    return f"<{_PRIORITIES.get(word, 6)}>"


def message(word: str, text: str) -> None:
    """One line on stderr: ``word: text``."""
    head = f"{word}:"
    if colourful(sys.stderr):
        head = click.style(head, fg=_COLOURS.get(word), bold=True)
    sys.stderr.write(f"{priority(word)}{head} {clean(text)}\n")
    sys.stderr.flush()


def advised(error: VmdkError) -> VmdkError:
    """An error with what is known only now: the disk's name where its hint has room for that.

    Reading may have met it, or nobody thought of what is there instead of a file.
    """
    if isinstance(error, FileMissing):
        from nbd_vmdk.refusal import suggest  # seldom needed

        suggest(error)
    if error.hint is not None and "IMAGE" in error.hint:
        from nbd_vmdk.refusal import advise_late  # seldom needed

        advise_late(error)
    return error


def error(what: VmdkError) -> None:
    """An error and what to do about it, on stderr."""
    message("error", str(what))
    if what.hint:
        message("hint", what.hint)


class Messages(logging.Handler):
    """Shows what is logged as messages on stderr, while it is entered.

    A warning of the engine's or of a verb's says what a file is like: many verbs open one more than once, as
    a parent of two images or to plan first, and it is told only once.  What a server logs are events, each
    of which is told.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def __enter__(self) -> None:
        log.addHandler(self)
        log.setLevel(logging.INFO)
        log.propagate = False

    def __exit__(self, *_: object) -> None:
        log.removeHandler(self)
        log.setLevel(logging.NOTSET)
        log.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        text = record.getMessage()
        if record.name == log.name and record.levelno == logging.WARNING:
            if text in self._told:
                return
            self._told.add(text)
        message(getattr(record, "word", record.levelname.lower()), text)


def json_object(content: Mapping[str, object]) -> None:
    """One JSON object on stdout, with the version of its layout."""
    line(json.dumps({"schema": SCHEMA, **content}, indent=4))
    sys.stdout.flush()
