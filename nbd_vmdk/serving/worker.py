"""A place for an nbdkit process: who holds it may die, and be followed by another one.

A server has one such place, or several on one listening socket (see supervisor.py).
"""

import asyncio
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from nbd_vmdk.errors import ServerError, StorageError, VmdkError
from nbd_vmdk.plugin.ending import CLOSE_FAILED
from nbd_vmdk.serving.events import EventLog, Exited, Failed, GaveUp, Line, Restarted, Restarting
from nbd_vmdk.serving.handshake import Export, read_exports
from nbd_vmdk.serving.listener import Listener
from nbd_vmdk.serving.process import Nbdkit, how_ended
from nbd_vmdk.serving.restarts import Restart

#: Where the server's own words go: errors, warnings and all else it says, one record a line.
log = logging.getLogger("nbd_vmdk.serving.server")

#: Seconds between two looks for a sign of life.
_POLL = 0.02

#: What a line may begin with, to say what it is.
_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "hint": logging.INFO}


@dataclass(frozen=True)
class Work:
    """What the ``count`` workers of a server have in common.

    ``options`` are those of nbdkit, ``config`` the parameters of ``plugin``.  ``patience`` is how many
    seconds a worker may take to answer, ``known`` what it serves, where it can't be asked itself; ``warned``
    says that what it warns of when it is first started has been told already.
    """

    listener: Listener
    plugin: str
    options: Sequence[str]
    config: Sequence[str]
    count: int
    patience: float
    known: Sequence[Export]
    read_only: bool
    warned: bool
    restart: Restart | None
    events: EventLog


class Worker:
    """One of the places of a server, by number from 0.

    ``stats`` is the socket where the plugin is to tell its numbers; ``pidfile`` holds nbdkit's process ID
    while it answers.  ``exports`` is what it serves, ``restarted`` how often it came back after it had ended
    unasked, ``gave_up`` says that it failed too often.
    """

    def __init__(
        self, work: Work, number: int, *, stats: str | None = None, pidfile: str | None = None
    ) -> None:
        self.exports: list[Export] = []
        self.restarted = 0
        self.gave_up = False
        self.nbdkit: Nbdkit | None = None
        self._work = work
        self._config = list(work.config) if stats is None else [*work.config, f"stats={stats}"]
        if work.count > 1:
            self._config.append(f"share={work.listener.private(f'.turn-{number}')}")
        self._name = "nbdkit" if work.count == 1 else f"nbdkit, worker {number + 1} of {work.count},"
        # One that can't be asked, or in whose place another one might answer, writes a file.
        asked = work.count == 1 and work.listener.vsock is None
        self._sign = None if asked else work.listener.private(f".pid-{number}")
        self._pidfile = pidfile
        self._pidfile_written = False
        self._restarts: list[float] = []
        self._known: set[str] = set()
        self._last_failure: VmdkError | None = None
        self._life: asyncio.Task[None] | None = None
        self._code = 0
        self._running = False
        self._stopping = False
        self._told = False

    async def begin(self) -> None:
        """Start nbdkit and wait until it answers; if it does not, no process is left.  ServerError."""
        work = self._work
        nbdkit = self.nbdkit = Nbdkit(work.plugin, self._tell)
        options = list(work.options)
        if self._sign is not None:
            if os.path.exists(self._sign):
                os.unlink(self._sign)  # of an earlier life
            options += ["-P", self._sign]
        try:
            await nbdkit.launch(work.listener.socket, options, self._config)
            self.exports = await nbdkit.until_ready(self._answer(), work.patience)
            if self._pidfile is not None:
                _write_pidfile(self._pidfile, nbdkit.pid)
                self._pidfile_written = True
        except BaseException:
            if nbdkit.launched:
                await nbdkit.end(10)
            raise
        self._running = True
        nbdkit.started(self._known, quietly=work.warned and not self._restarts)

    def live(self) -> asyncio.Task[None]:
        """Begin to watch the process until it ends for good, starting it again if that is wanted."""
        self._life = asyncio.create_task(self._live())
        return self._life

    def death(self) -> ServerError | None:
        """The error that this worker died of, if it did and is not alive again; told once."""
        if self._code == 0 or self._life is None or not self._life.done() or self._told:
            return None
        self._told = True
        why = f"{self._name} ended unasked: it {how_ended(self._code)}"
        if not self.gave_up:
            return ServerError(None, why=why)
        if self._last_failure is None:
            return ServerError(None, why=f"{why}; that was too often, and it is not started again")
        why = f"{why}, and could not be started again: {self._last_failure.message}"
        return ServerError(None, why=why, hint=self._last_failure.hint)

    def let_go(self) -> None:
        """Ask the process to end; if there is none just now, let none follow."""
        if self._running and self.nbdkit is not None:
            self.nbdkit.ask_to_end()
        elif self._life is not None:
            self._life.cancel()

    async def stop(self, timeout: float) -> None:
        """End the process cleanly; ServerError if that failed, or it was killed after ``timeout`` seconds.

        An end that death() has told of is not told again.
        """
        self._stopping = True
        died = 0
        if self._life is not None and not self._running:
            # It is being started again, or was given up.
            died = self._code
            self._life.cancel()
            await asyncio.wait((self._life,))
        self._running = False
        nbdkit = self.nbdkit
        if nbdkit is None or not nbdkit.launched:
            return
        already = nbdkit.code is not None
        nbdkit.hold()
        if not await nbdkit.end(timeout):
            nbdkit.speak()
            why = f"{self._name} did not end within {timeout:g} s and was killed: the image may need a check"
            raise ServerError(None, why=why)
        if (code := died or nbdkit.code) and not self._told:
            when = "unasked" if already else "while it closed the image"
            raise nbdkit.failure(f"{self._name} ended {when}: it {how_ended(code)}")
        nbdkit.speak()

    def remove(self) -> None:
        """Remove the pidfile, if it was written."""
        if self._pidfile_written and self._pidfile is not None:
            self._pidfile_written = False
            try:
                os.unlink(self._pidfile)
            except FileNotFoundError:
                pass

    async def _live(self) -> None:
        events, restart = self._work.events, self._work.restart
        while True:
            assert self.nbdkit is not None
            self._code = await self.nbdkit.wait()
            self._running = False
            self.nbdkit.hold()
            asked = self._stopping or self._code == 0
            events.emit(Exited(self.nbdkit.pid, self._code, how_ended(self._code), asked))
            told_to_end = asked or self._code == CLOSE_FAILED
            if told_to_end or restart is None or not await self._again(restart):
                break

    async def _again(self, policy: Restart) -> bool:
        """Start nbdkit again, until it answers; False if that is tried in vain too often."""
        loop = asyncio.get_running_loop()
        events = self._work.events
        lost = "" if self._work.read_only else "; what clients had written and not flushed may be lost"
        log.error("%s ended unasked: it %s%s", self._name, how_ended(self._code), lost)
        self._last_failure = None
        while (delay := policy.after(self._restarts, loop.time())) is not None:
            self._restarts.append(loop.time())
            events.emit(Restarting(len(self._restarts), delay))
            await asyncio.sleep(delay)
            try:
                await self.begin()
            except VmdkError as error:
                self._last_failure = error
                log.warning("%s could not be started again: %s", self._name, error)
                events.emit(Failed(str(error)))
            else:
                assert self.nbdkit is not None
                self._code = 0
                self.restarted += 1
                log.warning("%s was started again; clients have to connect anew", self._name)
                events.emit(Restarted(self.nbdkit.pid))
                return True
        events.emit(GaveUp())
        self.gave_up = True
        return False

    async def _answer(self) -> list[Export]:
        """What is served, once it is."""
        listener, known = self._work.listener, self._work.known
        while self._sign is not None and not os.path.exists(self._sign):
            await asyncio.sleep(_POLL)
        if listener.vsock is not None:
            # A machine can call its guests and be called by them, but seldom itself.
            return list(known)
        if listener.path is not None:
            reader, writer = await asyncio.open_unix_connection(listener.path)
        else:
            reader, writer = await asyncio.open_connection(listener.host, listener.port)
        try:
            exports = await read_exports(reader, writer)
            return list(known) if exports is None else exports
        finally:
            writer.close()

    def _tell(self, line: str) -> None:
        """Log a line; its own first word, if it has one, is kept for who shows it."""
        word, _, text = line.partition(": ")
        level = _LEVELS.get(word, logging.INFO)
        if word not in _LEVELS:
            word, text = "nbdkit", line
        log.log(level, "%s", text, extra={"word": word})
        self._work.events.emit(Line(level, word, text))


def _write_pidfile(path: str, pid: int) -> None:
    """Write the process ID; a reader never sees half of it."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=".pid-", dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, "w") as file:
                file.write(f"{pid}\n")
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise StorageError.of(error, path, "write the pidfile") from error
