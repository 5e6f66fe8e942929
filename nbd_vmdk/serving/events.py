"""What happens to a server, as typed events: for programs, what the log is for people.

::

    async for event in server.events:
        match event:
            case Line(text=text, word="error"): ...
            case Exited(asked=False): ...

A log keeps the latest events, so that who begins to read late misses nothing of the start, and who reads
slowly never slows the server down: he finds a :class:`Missed` where events were dropped.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field

#: Events kept for those who read later.
_KEPT = 1000


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened.  ``at`` is when, in seconds since 1970."""

    at: float = field(default_factory=time.time)

    def as_dict(self) -> dict[str, object]:
        """The event for JSON; ``event`` is its name."""
        return {"event": type(self).__name__.lower(), **asdict(self)}


@dataclass(frozen=True)
class Ready(Event):
    """The server answers, with the process ID ``pid``, at ``uris``, one for each export."""

    pid: int
    uris: list[str]


@dataclass(frozen=True)
class Line(Event):
    """The server said something.  ``level`` is that of logging; ``word`` what kind of line it is.

    Words are ``error``, ``warning``, ``hint``, and ``nbdkit`` for all else.
    """

    level: int
    word: str
    text: str


@dataclass(frozen=True)
class Exited(Event):
    """The process ended.  ``code`` is as in subprocess, ``how`` says it in words.

    ``asked``: it was told to end, by us or by somebody else, and ended cleanly or while we ended it.
    """

    pid: int
    code: int
    how: str
    asked: bool


@dataclass(frozen=True)
class Restarting(Event):
    """The server is started again in ``delay`` seconds; ``attempt`` counts those that are remembered."""

    attempt: int
    delay: float


@dataclass(frozen=True)
class Restarted(Event):
    """It answers again, at the same address.  Clients have to connect anew."""

    pid: int


@dataclass(frozen=True)
class Failed(Event):
    """Starting again failed; another try follows, or :class:`GaveUp`."""

    why: str


@dataclass(frozen=True)
class GaveUp(Event):
    """It failed too often, and is not started any more: the address is gone."""


@dataclass(frozen=True)
class Missed(Event):
    """The reader was too slow: ``count`` events before the next one were dropped."""

    count: int


class EventLog:
    """The events of one server.  Any number of tasks may iterate over it, each sees all that is kept."""

    def __init__(self, keep: int = _KEPT) -> None:
        self._kept: deque[Event] = deque(maxlen=keep)
        self._total = 0
        self._closed = False
        self._news = asyncio.Event()

    def emit(self, event: Event) -> None:
        """Add an event; only on the thread of the event loop."""
        self._kept.append(event)
        self._total += 1
        self._stir()

    def close(self) -> None:
        """No more events: iterations end once they have told what there is."""
        self._closed = True
        self._stir()

    def _stir(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[Event]:
        next_one = 0
        while True:
            oldest = self._total - len(self._kept)
            if next_one < oldest:
                yield Missed(oldest - next_one)
                next_one = oldest
            elif next_one < self._total:
                event = self._kept[next_one - oldest]
                next_one += 1
                yield event
            elif self._closed:
                return
            else:
                await self._news.wait()
