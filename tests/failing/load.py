"""Clients that load a server from one thread, and keep the history of what they were told."""

from __future__ import annotations

import random
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import nbd

from tests.failing.history import BLOCK, History, Write, filled


@dataclass(frozen=True)
class Mix:
    """How often a request is what; the rest are reads."""

    write: float = 0.6
    zero: float = 0.08
    trim: float = 0.06
    flush: float = 0.1
    fua: float = 0.1  # of those that write
    most: int = 24  # blocks of a request
    #: Requests of one client begin in this share of the disk, so that clients meet.
    crowd: float = 0.25


@dataclass(slots=True, eq=False)
class _Request:
    op: str
    sent: int
    first: int = 0
    write: Write | None = None
    fua: bool = False
    buffer: nbd.Buffer | None = None


class Client:
    """A connection with some requests under way."""

    def __init__(
        self, connection: nbd.NBD, history: History, rng: random.Random, depth: int, mix: Mix
    ) -> None:
        self.connection = connection
        self.errors: list[str | None] = []
        self.completed = 0
        self.flushes = 0
        #: Its requests go on although some fail.
        self.bears_errors = False
        self.dead = False
        self.resting = False
        self._history = history
        self._rng = rng
        self._depth = depth
        self._mix = mix
        self._pending: dict[int, _Request] = {}

    @property
    def idle(self) -> bool:
        return not self._pending

    @property
    def gone(self) -> bool:
        """There is no connection any more."""
        self.dead = self.dead or self.connection.aio_is_dead() or self.connection.aio_is_closed()
        return self.dead

    def fill(self) -> None:
        """Send requests until as many as wanted are under way."""
        while not (self.resting or self.gone) and len(self._pending) < self._depth:
            self._send()

    def _send(self) -> None:
        rng, mix, history, connection = self._rng, self._mix, self._history, self.connection
        count = rng.randint(1, mix.most)
        room = max(1, int(history.blocks * mix.crowd)) if rng.random() < 0.5 else history.blocks
        first = rng.randrange(room)
        count = min(count, history.blocks - first)
        where, length = first * BLOCK, count * BLOCK
        fua = rng.random() < mix.fua
        flags = nbd.CMD_FLAG_FUA if fua else 0
        draw = rng.random()
        if draw < mix.write:
            write = history.send(first, count)
            request = _Request("write", write.sent, first, write, fua)
            request.buffer = nbd.Buffer.from_bytearray(bytearray(filled(first, count, write.version)))
            cookie = connection.aio_pwrite(request.buffer, where, flags=flags)
        elif draw < (edge := mix.write + mix.zero):
            write = history.send(first, count, zeros=True)
            request = _Request("zero", write.sent, first, write, fua)
            flags |= nbd.CMD_FLAG_NO_HOLE if rng.random() < 0.3 else 0
            cookie = connection.aio_zero(length, where, flags=flags)
        elif draw < (edge := edge + mix.trim):
            write = history.send(first, count, zeros=True, weak=True)
            request = _Request("trim", write.sent, first, write, fua)
            cookie = connection.aio_trim(length, where, flags=flags)
        elif draw < edge + mix.flush:
            request = _Request("flush", history.tick())
            cookie = connection.aio_flush()
        else:
            request = _Request("read", history.tick(), first)
            request.buffer = nbd.Buffer(length)
            cookie = connection.aio_pread(request.buffer, where)
        self._pending[cookie] = request

    def turn(self, event: int) -> None:
        """Go on after an event on the socket; ConnectionError if there is no server any more."""
        connection = self.connection
        direction = connection.aio_get_direction()
        try:
            if direction & nbd.AIO_DIRECTION_READ and event & (
                select.POLLIN | select.POLLHUP | select.POLLERR
            ):
                connection.aio_notify_read()
            elif direction & nbd.AIO_DIRECTION_WRITE and event & select.POLLOUT:
                connection.aio_notify_write()
        except nbd.Error:
            self.dead = True
        self.reap()
        if self.gone:
            raise ConnectionError

    def reap(self) -> bool:
        """Take the replies that are there; libnbd may have met some while it sent requests."""
        connection = self.connection
        before = len(self._pending)
        for cookie in list(self._pending):
            try:
                if not connection.aio_command_completed(cookie):
                    continue
            except nbd.Error as error:
                request = self._pending.pop(cookie)
                if error.errno == "ESHUTDOWN":
                    self.resting = True  # the server is about to end, and takes nothing more
                elif not self.gone:
                    self._failed(request, error.errno)
                continue
            self._succeeded(self._pending.pop(cookie))
        return len(self._pending) < before

    def _succeeded(self, request: _Request) -> None:
        self.completed += 1
        if request.op == "read":
            assert request.buffer is not None
            self._history.check_read(request.buffer.to_bytearray(), request.first, request.sent)
        elif request.op == "flush":
            self._history.flushed(request.sent)
            self.flushes += 1
        else:
            assert request.write is not None
            self._history.replied(request.write, durable=request.fua)

    def _failed(self, request: _Request, number: str | None) -> None:
        if not self.bears_errors:
            raise AssertionError(f"a {request.op} failed: {number}")
        self.errors.append(number)
        if request.write is not None:
            self._history.failed(request.write)


class Load:
    """Clients on several connections, all with one history."""

    def __init__(
        self,
        connections: Sequence[nbd.NBD],
        history: History,
        seed: object = 0,
        *,
        depth: int = 6,
        mix: Mix | None = None,
    ) -> None:
        self.history = history
        rng = random.Random(f"load {seed}")
        self.clients = [
            Client(each, history, random.Random(rng.random()), depth, mix or Mix()) for each in connections
        ]
        for client in self.clients:
            assert client.connection.can_multi_conn(), "a flush covers other connections only then"

    @property
    def completed(self) -> int:
        return sum(client.completed for client in self.clients)

    @property
    def flushes(self) -> int:
        return sum(client.flushes for client in self.clients)

    @property
    def errors(self) -> list[str | None]:
        return [error for client in self.clients for error in client.errors]

    def run(self, seconds: float, *, at_end: Callable[[], object] | None = None) -> bool:
        """Load the server for a time; False if it went away, or is about to.

        `at_end` is called while requests are under way.
        """
        stop = time.monotonic() + seconds
        try:
            while (left := stop - time.monotonic()) > 0:
                for client in self.clients:
                    client.fill()
                if all(client.resting or client.gone for client in self.clients):
                    return False
                self._turn(left)
        except (ConnectionError, nbd.Error):
            return False
        if at_end is not None:
            at_end()
        return True

    def drain(self, seconds: float = 30) -> bool:
        """Take the replies to all that is under way, sending no more; False if the server went away first.

        Replies that a server gave before it went are taken.
        """
        stop = time.monotonic() + seconds
        while any(not client.idle for client in self.clients if not client.gone):
            left = stop - time.monotonic()
            assert left > 0, "requests are never answered"
            try:
                self._turn(left)
            except ConnectionError:
                continue
        return not any(client.dead for client in self.clients)

    def _turn(self, seconds: float) -> None:
        if sum(client.reap() for client in self.clients):
            return
        poll = select.poll()
        by_fd = {}
        for client in self.clients:
            if client.gone:
                continue
            direction = client.connection.aio_get_direction()
            wanted = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
            wanted |= select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
            fd = client.connection.aio_get_fd()
            by_fd[fd] = client
            poll.register(fd, wanted)
        lost = False
        for fd, event in poll.poll(max(1, int(seconds * 1000))):
            try:
                by_fd[fd].turn(event)
            except ConnectionError:
                lost = True
        if lost:
            raise ConnectionError
