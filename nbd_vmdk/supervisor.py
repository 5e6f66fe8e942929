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

Nothing here restarts a server that died: its clients have lost writes that were not flushed, and hiding that
from them would be worse than the error.
"""

import asyncio
import logging
import os
import re
import signal
import tempfile
from collections.abc import Sequence

from nbd_vmdk.errors import ServerError, StorageError
from nbd_vmdk.handshake import Export, read_exports
from nbd_vmdk.launch import find_nbdkit, nbdkit_command, nbdkit_environment
from nbd_vmdk.listener import Listener

#: Where the server's own words go: errors, warnings and all else it says, one record a line.
log = logging.getLogger("nbd_vmdk.server")

#: Seconds until a server that says nothing is given up.  Opening takes milliseconds on a disk of one's own.
START_TIMEOUT = 60.0

#: Seconds between the request to end and the kill.  A clean close writes all that a client has not flushed:
#: at most a cache full of tables, which even a slow network disk takes in this time.
STOP_TIMEOUT = 120.0

#: A line longer than this is logged in pieces.
_MAX_LINE = 1 << 16

#: Lines held back at most.
_HELD_LINES = 200

# "nbdkit: python[1]: error: ", then "/path/plugin.py: pread: error: ", then what matters
_PREFIX = re.compile(r"nbdkit: (?:[\w.-]+(?:\[\d+\])?: )?(error|debug): ")
_CALLBACK = re.compile(r": \w+: (?:error: )*")


class Server:
    """One nbdkit process that serves one image on one listener.

    ``plugin`` is the file that nbdkit loads, ``config`` its parameters, in order.  The server owns
    the listener from here on and removes it at the end, as it does ``pidfile``, which is written when the
    server answers and holds nbdkit's process ID.

    ``warnings`` are what is known already to be odd about the image; if it is given, what nbdkit warns of
    while it starts is not logged again.
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
    ) -> None:
        self.listener = listener
        self.exports: list[Export] = []
        self.warnings = tuple(warnings or ())
        self._warned = warnings is not None
        self._config = config
        self._read_only = read_only
        self._threads = threads
        self._pidfile = None if pidfile is None else os.path.abspath(pidfile)
        self._pidfile_written = False
        self._plugin = os.path.abspath(plugin)
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None
        # What nbdkit says while it starts or ends is held back: it may be the reason of a failure.
        self._held: list[str] = []
        self._running = False
        self._stopping = False
        self._told = False

    @property
    def uri(self) -> str:
        """The NBD URI of the first export, which is the only one of a single image."""
        return self.uris[0]

    @property
    def uris(self) -> list[str]:
        """The NBD URI of each export, in the order of ``exports``; a single one needs no name."""
        if len(self.exports) < 2:
            return [self.listener.uri()]
        return [self.listener.uri(export.name) for export in self.exports]

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
            await self._launch()
            await self._until_ready()
            if self._pidfile is not None:
                _write_pidfile(self._pidfile, self.pid)
                self._pidfile_written = True
        except BaseException:
            self._stopping = True
            if self._process is not None:
                await self._end(self._process, 10)
            self._remove()
            raise
        self._running = True
        if self._warned:
            self._held = [line for line in self._held if not line.startswith("warning: ")]
        self._say_held()

    async def wait(self) -> None:
        """Return when the server has been told to end by somebody else; ServerError if it died."""
        assert self._process is not None
        code = await self._process.wait()
        await self._drain()
        if code != 0 and not self._stopping:
            self._told = True
            raise ServerError(None, why=f"nbdkit ended unasked: it {_how_ended(code)}")

    async def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """End the server cleanly: requests in flight are answered, tables written, flags cleared.

        Raises ServerError if that failed, or if it took more than ``timeout`` seconds and nbdkit was killed:
        the image may then not be cleanly closed.  An end that wait() has told of is not told again.
        """
        process = self._process
        already = process is None or process.returncode is not None
        self._stopping = True
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

    async def _launch(self) -> None:
        nbdkit = find_nbdkit()
        options = ["-r"] if self._read_only else []
        if self._threads is not None:
            options += ["-t", str(self._threads)]
        parameters = [f"{key}={value}" for key, value in self._config]
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
            self.listener.release()
        self._output = asyncio.create_task(self._read_output())

    async def _until_ready(self) -> None:
        assert self._process is not None
        asking = asyncio.create_task(self._ask())
        ending = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait((asking, ending), timeout=START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done() and not ending.done():
                raise ServerError(None, why=f"nbdkit did not answer within {START_TIMEOUT:g} s")
            if not ending.done() and isinstance(asking.exception(), (OSError, EOFError)):
                # A server that ends while it is talked to is better explained by what it says.
                await asyncio.wait((ending,), timeout=2)
            if ending.done():
                await self._drain()
                raise self._failure(f"nbdkit did not start: it {_how_ended(ending.result())}")
            try:
                self.exports = asking.result()
            except (OSError, EOFError) as error:
                raise self._failure(f"nbdkit hung up: {error}") from error
            except ServerError as error:
                raise self._failure(error.message) from error
        finally:
            asking.cancel()
            ending.cancel()
            await asyncio.gather(asking, ending, return_exceptions=True)

    async def _ask(self) -> list[Export]:
        if self.listener.path is not None:
            reader, writer = await asyncio.open_unix_connection(self.listener.path)
        else:
            reader, writer = await asyncio.open_connection(self.listener.host, self.listener.port)
        try:
            return await read_exports(reader, writer)
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
        if self._running:
            _say(line)
        else:
            self._held = [*self._held[1 - _HELD_LINES :], line]

    def _say_held(self) -> None:
        held, self._held = self._held, []
        for line in held:
            _say(line)

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


def _say(line: str) -> None:
    """Log a line; its own first word, if it has one, is kept for who shows it."""
    for level, word in ((logging.ERROR, "error"), (logging.WARNING, "warning"), (logging.INFO, "hint")):
        if line.startswith(f"{word}: "):
            log.log(level, "%s", line.removeprefix(f"{word}: "), extra={"word": word})
            return
    log.info("%s", line, extra={"word": "nbdkit"})


def _how_ended(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
