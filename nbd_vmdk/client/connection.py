"""One NBD connection that the event loop drives: libnbd's state machine, its socket, the callers' futures.

The socket and the direction that libnbd wants to go in are registered with the loop; whenever libnbd was
called, the registration is brought up to date.  A request is sent by the call that makes it, as far as
the socket takes it, and its completion callback resolves the future that the caller awaits.

A cancelled caller leaves its request behind: libnbd keeps the buffer, the server's answer is taken and
dropped, and only then is the request's place in the window free again.  So what is in flight is bounded
whatever callers do, and a later request is never mixed up with an earlier one.

When the connection is lost, every request that waits for an answer fails with ENOTCONN, and every later
one at once.  Nothing here connects again: whether unflushed writes reached the disk is not known, and only
the caller can tell what to do about that.
"""

import asyncio
import errno
import os
import select
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nbd_vmdk.client import binding
from nbd_vmdk.client.binding import (
    READ,
    WRITE,
    Export,
    Tls,
    describe,
    error_class,
    in_words,
    new_handle,
    refuse_unverified,
    unreachable,
)
from nbd_vmdk.errors import NbdError

if TYPE_CHECKING:
    from ctypes import c_int

    import nbd

#: Answers taken in one turn of the loop, if they are there: cheaper than a turn each, and fair to others.
_BURST = 16


class Connection:
    """One connection to the export that ``uri`` names, with at most ``window`` requests in flight.

    ``load`` counts the requests that are in flight or wait for a place in the window.
    """

    def __init__(self, uri: str, tls: Tls | None, window: int = 64) -> None:
        refuse_unverified(uri, tls)
        self.uri = uri
        self.load = 0
        self._loop = asyncio.get_running_loop()
        self._handle: nbd.NBD = new_handle(tls)
        self._error = error_class()
        self._window = asyncio.Semaphore(window)
        self._open: set[asyncio.Future[None]] = set()
        self._watches: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        # A copy of libnbd's descriptor: libnbd closes its own when it likes, and the loop must not be left
        # with a number that is closed, or that means something else.
        self._fd = -1
        self._poll = select.poll()
        self._armed = 0
        # While libnbd connects it may try one address after another, each with a socket of its own.
        self._settled = False
        self._reason = "the server hung up"
        self._number = errno.ENOTCONN
        self._lost = False

    # Connecting

    async def connect(self, *, listing: bool = False) -> None:
        """Connect and negotiate; with ``listing`` only as far as a server can be asked what it offers.

        Raises NbdError, also for a server that does not answer in time.  A host's name is looked up in a
        thread.
        """
        handle = self._handle
        if listing:
            handle.set_opt_mode(True)
            handle.set_full_info(True)
        try:
            if "+unix" in urlsplit(self.uri).scheme:
                handle.aio_connect_uri(self.uri)
            else:
                await asyncio.to_thread(handle.aio_connect_uri, self.uri)
        except self._error as error:
            raise unreachable(self.uri, in_words(error), error.errnum or errno.EIO) from error
        self._arm()
        try:
            async with asyncio.timeout(binding.PATIENCE):
                await self._until(handle.aio_is_negotiating if listing else handle.aio_is_ready)
        except TimeoutError:
            raise binding.silent(self.uri, binding.PATIENCE) from None
        except NbdError as error:
            raise unreachable(self.uri, self._reason, self._number) from error
        self._settled = not listing

    def describe(self, name: str, description: str = "", uri: str | None = None) -> Export:
        """The export that this connection is connected to, or has asked about."""
        try:
            return describe(self._handle, uri or self.uri, name, description)
        except self._error as error:
            raise self._refusal(error) from error

    @property
    def export_name(self) -> str:
        """The name that was asked for."""
        return self._handle.get_export_name()

    async def exports(self) -> list[tuple[str, str]]:
        """Name and description of each export; only after ``connect(listing=True)``."""
        found: list[tuple[str, str]] = []

        def heard(name: str, description: str) -> int:
            found.append((name, description))
            return 0

        await self._ask("list the exports", self._handle.aio_opt_list, heard)
        return found

    async def ask_about(self, name: str) -> None:
        """Have the server tell of an export, for :meth:`describe`; only after ``connect(listing=True)``."""
        self._handle.set_export_name(name)
        await self._ask(f"ask about {name!r}", self._handle.aio_opt_info)

    async def _ask(self, what: str, command: Callable[..., Any], *arguments: Any) -> None:
        answer: list[int] = []

        def answered(error: "c_int") -> int:
            answer.append(error.value)
            return 1

        try:
            command(*arguments, answered)
        except self._error as error:
            raise self._refusal(error) from error
        self._arm()
        await self._until(lambda: bool(answer) and self._handle.aio_is_negotiating())
        if answer[0]:
            raise NbdError.of(self.uri, f"can't {what}: {os.strerror(answer[0])}", answer[0])

    # Requests

    async def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill the buffer."""
        await self._run("read", len(buffer), offset, "aio_pread", buffer, offset)

    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int, flags: int = 0) -> None:
        """Write the buffer."""
        await self._run("write", len(data), offset, "aio_pwrite", data, offset, flags=flags)

    async def flush(self) -> None:
        """Have what was written made durable."""
        await self._run("flush", 0, 0, "aio_flush")

    async def zero(self, length: int, offset: int, flags: int = 0) -> None:
        """Make it read as zeros."""
        await self._run("zero", length, offset, "aio_zero", length, offset, flags=flags)

    async def trim(self, length: int, offset: int, flags: int = 0) -> None:
        """Tell that the content is not needed any more."""
        await self._run("trim", length, offset, "aio_trim", length, offset, flags=flags)

    async def cache(self, length: int, offset: int) -> None:
        """Tell that the content will soon be read."""
        await self._run("cache", length, offset, "aio_cache", length, offset)

    async def block_status(self, length: int, offset: int) -> list[int]:
        """One answer: lengths and states by turns, from ``offset`` on, perhaps not as far as asked."""
        entries: list[int] = []

        # The only context that was asked for is the allocation.
        def heard(_context: str, _offset: int, heard: list[int], _error: "c_int") -> int:
            entries.extend(heard)
            return 0

        await self._run("ask for the status of", length, offset, "aio_block_status", length, offset, heard)
        return entries

    async def _run(
        self, verb: str, length: int, offset: int, command: str, *arguments: Any, flags: int = 0
    ) -> None:
        """Wait for a place in the window, give the command to libnbd, wait for the answer."""
        self.load += 1
        try:
            await self._window.acquire()
        except asyncio.CancelledError:
            self.load -= 1
            raise
        future = self._loop.create_future()

        def answered(error: "c_int") -> int:
            number = error.value
            if number == 0:
                self._retire(future, None)
            elif number != errno.ENOTCONN:
                where = f" {length} bytes at {offset}" if length else ""
                why = f"the server failed to {verb}{where}: {os.strerror(number)}"
                self._retire(future, NbdError.of(self.uri, why, number))
            # No server says ENOTCONN: the connection is lost, and _fail() tells why when libnbd has told us.
            return 1

        self._open.add(future)
        if self._lost:
            self._retire(future, self._loss())
        else:
            try:
                getattr(self._handle, command)(*arguments, answered, flags)
            except self._error as error:
                self._retire(future, self._refusal(error))
            except BaseException:
                self._retire(future, None)
                raise
            self._arm()
        await future

    def _retire(self, future: asyncio.Future[None], error: NbdError | None) -> None:
        """A request has ended: its caller, if there still is one, hears of it, and its place is free."""
        if future not in self._open:
            return
        self._open.remove(future)
        self.load -= 1
        self._window.release()
        if not future.done():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
                # A caller who is cancelled before he sees it left on purpose: no warning that nobody did.
                future.exception()

    # Driving libnbd

    def _readable(self) -> None:
        handle = self._handle
        try:
            handle.aio_notify_read()
            # libnbd must not be told so of a socket that has nothing to read: it would wait for an answer
            # then, and neither finish a request that it was sending nor begin another.
            for _ in range(_BURST):
                if handle.aio_get_direction() != READ or not self._poll.poll(0):
                    break
                handle.aio_notify_read()
        except self._error as error:
            self._note(error)
        self._arm()

    def _writable(self) -> None:
        try:
            # What is to be read is read first, or two peers could wait for each other to read.
            if self._handle.aio_get_direction() & WRITE:
                self._handle.aio_notify_write()
        except self._error as error:
            self._note(error)
        self._arm()

    def _arm(self) -> None:
        """Watch the socket for what libnbd wants to do next, and wake up who waits for a state."""
        direction = self._handle.aio_get_direction()
        if direction != self._armed or not self._settled:
            if not self._settled:
                self._forget()
            if direction:
                self._watch(direction)
            elif self._handle.aio_is_dead() or self._handle.aio_is_closed():
                self._fail()
            else:
                self._forget()
        if self._watches:
            self._wake()

    def _watch(self, direction: int) -> None:
        if self._fd < 0:
            try:
                self._fd = os.dup(self._handle.aio_get_fd())
            except OSError as error:
                self._reason = f"no descriptor for it: {error.strerror}"
                self._number = error.errno or errno.EIO
                self._fail()
                return
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLIN)
        changed = direction ^ self._armed
        if changed & READ:
            if direction & READ:
                self._loop.add_reader(self._fd, self._readable)
            else:
                self._loop.remove_reader(self._fd)
        if changed & WRITE:
            if direction & WRITE:
                self._loop.add_writer(self._fd, self._writable)
            else:
                self._loop.remove_writer(self._fd)
        self._armed = direction

    def _forget(self) -> None:
        if self._fd >= 0:
            self._watch(0)
            os.close(self._fd)
            self._fd = -1

    def _note(self, error: "nbd.Error") -> None:
        self._reason = in_words(error)
        self._number = error.errnum or errno.ENOTCONN

    def _wake(self) -> None:
        for watch in list(self._watches):
            reached, future = watch
            if future.done() or reached() or self._lost:
                self._watches.remove(watch)
                if not future.done():
                    future.set_result(None)

    async def _until(self, reached: Callable[[], bool]) -> None:
        """Wait for a state.  NbdError if the connection is lost and the state can't come any more."""
        if not reached() and not self._lost:
            future = self._loop.create_future()
            self._watches.append((reached, future))
            await future
        if not reached():
            raise self._loss()

    def _fail(self) -> None:
        """The end of the connection, wanted or not: nothing waits for it any longer."""
        self._lost = True
        self._forget()
        for future in list(self._open):
            self._retire(future, self._loss())

    def _loss(self) -> NbdError:
        return NbdError.of(self.uri, f"the connection is lost: {self._reason}", errno.ENOTCONN)

    def _refusal(self, error: "nbd.Error") -> NbdError:
        return NbdError.of(self.uri, in_words(error), error.errnum or errno.EIO)

    # Ending

    async def settled(self) -> None:
        """Wait until every request has been answered, those that nobody awaits any more among them."""
        await self._until(lambda: not self._open)

    async def close(self, timeout: float) -> None:
        """Take leave of the server once it has answered all; after ``timeout`` seconds, hang up."""
        try:
            async with asyncio.timeout(timeout):
                await self.settled()
                if self._handle.aio_is_ready():
                    self._handle.aio_disconnect()
                elif self._handle.aio_is_negotiating():
                    self._handle.aio_opt_abort()
                else:
                    return
                self._arm()
                await self._until(lambda: self._lost)
        except (NbdError, TimeoutError):
            pass
        finally:
            self.hang_up()

    def hang_up(self) -> None:
        """Close the socket.  What still waits fails."""
        self._reason = "it was closed"
        self._fail()
        self._wake()
        # libnbd closes the socket, and lets go of the buffers, when nobody holds its handle any more.
        del self._handle
