"""Starting nbdkit, knowing when it answers, and ending it cleanly: asyncio supervision of one server.

::

    server = Server(listen_private(), plugin, [("file", "/disks/disk.vmdk")])
    await server.start()
    print(server.uri)
    await server.wait()         # until somebody else ends it
    await server.stop()

nbdkit inherits a socket that already listens (see listener.py), so readiness is an event, not a poll: the
server is ready when it has greeted us on that socket and told what it exports.

nbdkit is started with ``--exit-with-parent``, so that it never outlives us, whatever becomes of us.  The
kernel ties that to the *thread* that started it; asyncio starts processes on the thread that runs the
event loop, which is where its owner lives too.  It runs in a session of its own: Ctrl-C on a terminal
reaches us alone, and we end it in order.

A server that died is started again only if the caller asks for that (see restarts.py): its clients have lost
writes that were not flushed.  They notice, because their connections are gone; the address stays, because
the listening socket is kept for the next process, and who connects meanwhile waits.
"""

import asyncio
import json
import logging
import os
import re
import signal
import tempfile
from collections.abc import Sequence
from typing import Any

from nbd_vmdk.errors import ServerError, StorageError, VmdkError
from nbd_vmdk.serving.events import EventLog, Exited, Failed, GaveUp, Line, Ready, Restarted, Restarting
from nbd_vmdk.serving.handshake import Export, read_exports
from nbd_vmdk.serving.launch import find_nbdkit, nbdkit_command, nbdkit_environment
from nbd_vmdk.serving.listener import Listener
from nbd_vmdk.serving.restarts import Restart
from nbd_vmdk.serving.tls import ServerTls

#: Where the server's own words go: errors, warnings and all else it says, one record a line.
log = logging.getLogger("nbd_vmdk.serving.server")

#: Seconds until a server that says nothing is given up.  Opening takes milliseconds on a disk of one's own.
START_TIMEOUT = 60.0

#: Seconds between the request to end and the kill.  A clean close writes all that a client has not flushed:
#: at most a cache full of tables, which even a slow network disk takes in this time.
STOP_TIMEOUT = 120.0

#: A line longer than this is logged in pieces.
_MAX_LINE = 1 << 16

#: What the line with the last numbers of a plugin that counts begins with.
_STATS = "stats: "

#: Seconds between two looks for a sign of life.
_POLL = 0.02

#: What a line may begin with, to say what it is.
_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "hint": logging.INFO}

#: Lines held back at most.
_HELD_LINES = 200

# "nbdkit: python[1]: error: ", then "/path/plugin.py: pread: error: ", then what matters
_PREFIX = re.compile(r"nbdkit: (?:[\w.-]+(?:\[\d+\])?: )?(?:GnuTLS )?(error|debug): ")
_CALLBACK = re.compile(r": \w+: (?:error: )*")


class Server:
    """One nbdkit process that serves one or more images on one listener.

    ``plugin`` is the file that nbdkit loads, ``config`` its parameters, in order.  The server owns
    the listener from here on and removes it at the end, as it does ``pidfile``, which is written when the
    server answers and holds nbdkit's process ID.

    ``warnings`` are what is known already to be odd about the images; if it is given, what nbdkit warns of
    while it starts is not logged again.  ``opening`` is how many seconds opening them is known to take.

    With ``tls`` it talks only to clients that encrypt; ``max_connections`` is how many may be there at once.
    ``known`` is what it is known to serve, where it can't be asked itself: with TLS, or on vsock.

    ``exports`` tells what is served, once it is: name, size in bytes, kind; and ``uris`` where.  ``events``
    tells what happens, and with ``restart`` a server that fails is started again.  ``stats`` are its last
    numbers, once it has ended, if its plugin was told to count, ``stats_path`` is where it is asked before.
    """

    def __init__(
        self,
        listener: Listener,
        plugin: str | os.PathLike[str],
        config: Sequence[tuple[str, str]],
        *,
        read_only: bool = False,
        threads: int | None = None,
        pidfile: str | os.PathLike[str] | None = None,
        warnings: Sequence[str] | None = None,
        opening: float = 0.0,
        restart: Restart | None = None,
        tls: ServerTls | None = None,
        max_connections: int | None = None,
        known: Sequence[Export] = (),
    ) -> None:
        self.listener = listener
        listener.tls = tls
        self.exports: list[Export] = []
        self.stats: dict[str, Any] | None = None
        self.stats_path: str | None = None
        self._known = known
        self._max_connections = max_connections
        self.warnings = tuple(warnings or ())
        self._warned = warnings is not None
        self._config = config
        # Compressed images are read from end to end; the second time should not take much longer.
        self._slack = 3 * opening
        self._read_only = read_only
        self._threads = threads
        self._pidfile = None if pidfile is None else os.path.abspath(pidfile)
        self._pidfile_written = False
        self._plugin = os.path.abspath(plugin)
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None
        # What nbdkit says while it starts or ends is held back: it may be the reason of a failure.
        self._held: list[str] = []
        self.events = EventLog()
        self._restart = restart
        self._restarts: list[float] = []
        self._life: asyncio.Task[None] | None = None
        self._code = 0
        self._running = False
        self._stopping = False
        self._told = False

    @property
    def uri(self) -> str:
        """The NBD URI of the first export, which is the default and the only one of a single image."""
        return self.uris[0]

    @property
    def uris(self) -> list[str]:
        """The NBD URI of each export, in the order of ``exports``; a single one needs no name."""
        if len(self.exports) < 2:
            return [self.listener.uri()]
        return [self.listener.uri(export.name) for export in self.exports]

    @property
    def local_uris(self) -> list[str]:
        """As ``uris``, for clients on this machine: with TLS, they say where its files are."""
        if len(self.exports) < 2:
            return [self.listener.uri(local=True)]
        return [self.listener.uri(export.name, local=True) for export in self.exports]

    @property
    def pid(self) -> int:
        """The process ID of nbdkit."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start nbdkit; return when it answers.

        Raises ServerError with nbdkit's own words if it does not, and then leaves nothing behind.
        """
        try:
            await self._begin()
        except BaseException:
            self._stopping = True
            self._remove()
            self.events.close()
            raise
        self.events.emit(Ready(self.pid, self.uris))
        self._life = asyncio.create_task(self._live())

    async def wait(self) -> None:
        """Return when the server has been told to end by somebody else; ServerError if it died.

        One that is started again when it fails died when it failed too often.
        """
        assert self._life is not None
        await asyncio.wait((self._life,))
        if self._code != 0 and not self._stopping:
            self._told = True
            raise ServerError(None, why=f"nbdkit ended unasked: it {_how_ended(self._code)}")

    async def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """End the server cleanly: requests in flight are answered, tables written, flags cleared.

        Raises ServerError if that failed, or if it took more than ``timeout`` seconds and nbdkit was killed:
        the image may then not be cleanly closed.  An end that wait() has told of is not told again.
        """
        self._stopping = True
        if self._life is not None and not self._running:
            # It is being started again, or was given up.
            self._life.cancel()
            await asyncio.wait((self._life,))
        self._running = False
        process = self._process
        already = process is None or process.returncode is not None
        self._running = False
        try:
            if process is None:
                return
            in_time = await self._end(process, timeout)
            if not in_time:
                self._say_held()
                why = f"nbdkit did not end within {timeout:g} s and was killed: the image may need a check"
                raise ServerError(None, why=why)
            if process.returncode != 0 and not self._told:
                when = "unasked" if already else "while it closed the image"
                raise self._failure(f"nbdkit ended {when}: it {_how_ended(process.returncode or 0)}")
            self._say_held()
        finally:
            self._remove()
            if self._life is not None:
                await asyncio.wait((self._life,))
            self.events.close()

    async def _live(self) -> None:
        """Watch the process until it ends for good, and start it again if that is wanted."""
        while True:
            assert self._process is not None
            code = await self._process.wait()
            self._code = code
            await self._drain()
            self._running = False
            asked = self._stopping or code == 0
            self.events.emit(Exited(self.pid, code, _how_ended(code), asked))
            if asked or self._restart is None or not await self._again(self._restart, code):
                break
        if not self._stopping:
            self.events.close()

    async def _again(self, policy: Restart, code: int) -> bool:
        """Start nbdkit again, until it answers; False if that is tried in vain too often."""
        loop = asyncio.get_running_loop()
        log.error("nbdkit ended unasked: it %s", _how_ended(code))
        while (delay := policy.after(self._restarts, loop.time())) is not None:
            self._restarts.append(loop.time())
            self.events.emit(Restarting(len(self._restarts), delay))
            await asyncio.sleep(delay)
            try:
                await self._begin()
            except VmdkError as error:
                log.warning("nbdkit could not be started again: %s", error)
                self.events.emit(Failed(str(error)))
            else:
                log.warning("nbdkit was started again; clients have to connect anew")
                self.events.emit(Restarted(self.pid))
                return True
        self.events.emit(GaveUp())
        # From here on clients are refused, and need not wait for nobody.
        self._remove()
        return False

    async def _begin(self) -> None:
        """Start nbdkit and wait until it answers; if it does not, no process is left."""
        self._process = None
        try:
            await self._launch()
            exports = await self._until_ready()
            if self._pidfile is not None:
                _write_pidfile(self._pidfile, self.pid)
                self._pidfile_written = True
        except BaseException:
            if self._process is not None:
                await self._end(self._process, 10)
            raise
        # What is known of them besides is not lost by starting again.
        self.exports = self.exports or exports
        self._running = True
        if self._warned:
            self._held = [line for line in self._held if not line.startswith("warning: ")]
        self._say_held()

    async def _launch(self) -> None:
        nbdkit = find_nbdkit()
        options = ["-r"] if self._read_only else []
        if self._threads is not None:
            options += ["-t", str(self._threads)]
        parameters = [f"{key}={value}" for key, value in self._config]
        if self.listener.tls is not None:
            options += self.listener.tls.options()
        if self._max_connections is not None:
            options.append("--filter=limit")
            parameters.append(f"limit={self._max_connections}")
        if self.listener.vsock is not None:
            sign = self._sign_of_life()
            if os.path.exists(sign):
                os.unlink(sign)  # of an earlier life
            options += ["-P", sign]
        command = nbdkit_command(nbdkit, options, self._plugin, parameters)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=self.listener.socket.fileno(),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env=nbdkit_environment(nbdkit) | {"LISTEN_FDS": "1"},
            )
        except OSError as error:
            raise ServerError(None, why=f"can't start nbdkit: {error.strerror}") from error
        finally:
            if self._restart is None:
                self.listener.release()
        self._output = asyncio.create_task(self._read_output())

    async def _until_ready(self) -> list[Export]:
        assert self._process is not None
        asking = asyncio.create_task(self._ask())
        ending = asyncio.create_task(self._process.wait())
        try:
            patience = START_TIMEOUT + self._slack
            await asyncio.wait((asking, ending), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done() and not ending.done():
                raise ServerError(None, why=f"nbdkit did not answer within {patience:g} s")
            if not ending.done() and isinstance(asking.exception(), (OSError, EOFError)):
                # A server that ends while it is talked to is better explained by what it says.
                await asyncio.wait((ending,), timeout=2)
            if ending.done():
                await self._drain()
                raise self._failure(f"nbdkit did not start: it {_how_ended(ending.result())}")
            try:
                return asking.result()
            except (OSError, EOFError) as error:
                raise self._failure(f"nbdkit hung up: {error}") from error
            except ServerError as error:
                raise self._failure(error.message) from error
        finally:
            asking.cancel()
            ending.cancel()
            await asyncio.gather(asking, ending, return_exceptions=True)

    def _sign_of_life(self) -> str:
        """The file that nbdkit writes when it is ready, where it can't be asked."""
        return self.listener.beside(".pid")

    async def _ask(self) -> list[Export]:
        if self.listener.vsock is not None:
            # A machine can call its guests and be called by them, but seldom itself.
            while not os.path.exists(self._sign_of_life()):
                await asyncio.sleep(_POLL)
            return list(self._known)
        if self.listener.path is not None:
            reader, writer = await asyncio.open_unix_connection(self.listener.path)
        else:
            reader, writer = await asyncio.open_connection(self.listener.host, self.listener.port)
        try:
            exports = await read_exports(reader, writer)
            return list(self._known) if exports is None else exports
        finally:
            writer.close()

    async def _read_output(self) -> None:
        """Take what nbdkit says for as long as it lives, so that its pipe never fills."""
        assert self._process is not None
        assert self._process.stdout is not None
        pending = b""
        while chunk := await self._process.stdout.read(_MAX_LINE):
            *lines, pending = (pending + chunk).split(b"\n")
            if len(pending) >= _MAX_LINE:
                lines.append(pending)
                pending = b""
            for line in lines:
                self._hear(line)
        if pending:
            self._hear(pending)

    def _hear(self, raw: bytes) -> None:
        line = _clean(raw.decode(errors="surrogateescape"), self._plugin)
        if not line:
            return
        if line.startswith(_STATS):
            self.stats = json.loads(line.removeprefix(_STATS))
            return
        if self._running:
            self._tell(line)
        else:
            self._held = [*self._held[1 - _HELD_LINES :], line]

    def _say_held(self) -> None:
        held, self._held = self._held, []
        for line in held:
            self._tell(line)

    def _tell(self, line: str) -> None:
        """Log a line; its own first word, if it has one, is kept for who shows it."""
        word, _, text = line.partition(": ")
        level = _LEVELS.get(word, logging.INFO)
        if word not in _LEVELS:
            word, text = "nbdkit", line
        log.log(level, "%s", text, extra={"word": word})
        self.events.emit(Line(level, word, text))

    def _failure(self, what: str) -> ServerError:
        """The error that nbdkit's last ``error:`` line explains, or else ``what``, with its last line."""
        error = next((line for line in reversed(self._held) if line.startswith("error: ")), None)
        hint = next((line for line in reversed(self._held) if line.startswith("hint: ")), None)
        last = self._held[-1] if self._held else None
        self._held = [line for line in self._held if line not in (error, hint)]
        self._say_held()
        if error is not None:
            if hint is None and "cannot open plugin" in error:
                hint = "hint: apt-get install nbdkit-plugin-python"
            return ServerError(
                None, why=error.removeprefix("error: "), hint=hint and hint.removeprefix("hint: ")
            )
        return ServerError(None, why=f"{what} ({last})" if last else what)

    async def _drain(self) -> None:
        """Wait for the last words of a process that has ended."""
        if self._output is not None:
            # A grandchild could hold the pipe open: what nbdkit itself said is there at once.
            await asyncio.wait((self._output,), timeout=2)

    async def _end(self, process: asyncio.subprocess.Process, timeout: float) -> bool:
        """Ask the process to end and wait for that; False if it had to be killed.

        Being cancelled does not cut this short (it is bounded by ``timeout``): asyncio kills a process that
        is left behind, and this one may be writing the last tables of a disk.
        """
        if process.returncode is None:
            process.terminate()
        ending = asyncio.create_task(process.wait())
        deadline = asyncio.get_running_loop().time() + timeout
        cancelled: asyncio.CancelledError | None = None
        in_time = True
        while not ending.done():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0 and in_time:
                in_time = False
                process.kill()
            try:
                await asyncio.wait((ending,), timeout=left if in_time else None)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        await self._drain()
        return in_time

    def _remove(self) -> None:
        self.listener.remove()
        if self._pidfile_written and self._pidfile is not None:
            self._pidfile_written = False
            try:
                os.unlink(self._pidfile)
            except FileNotFoundError:
                pass


def _write_pidfile(path: str, pid: int) -> None:
    """Write the process ID; a reader never sees half of it."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=".pid-", dir=os.path.dirname(path))
        with os.fdopen(handle, "w") as file:
            file.write(f"{pid}\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError.of(error, path, "write the pidfile") from error


def _clean(line: str, plugin: str) -> str:
    """A line of nbdkit's output as the plugin meant it: without the prefixes that nbdkit puts before it."""
    line = line.rstrip()
    found = _PREFIX.match(line)
    if found is None:
        return line
    rest = line[found.end() :]
    if rest.startswith(plugin):
        callback = _CALLBACK.match(rest, len(plugin))
        rest = rest[callback.end() :] if callback else rest
    # The first line of a traceback tells nothing; what does is its last.
    return rest if found[1] == "debug" or rest.startswith("Traceback ") else f"error: {rest}"


def _how_ended(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
