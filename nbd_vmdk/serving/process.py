"""One nbdkit process: starting it, knowing when it answers, what it says, and ending it.

It is started with ``--exit-with-parent``, so that it never outlives us, whatever becomes of us.  The kernel
ties that to the *thread* that started it; asyncio starts processes on the thread that runs the event loop,
which is where its owner lives too.  It runs in a session of its own: Ctrl-C on a terminal reaches us alone,
and we end it in order.

What it says while it starts or ends is held back, because it may be the reason of a failure; all else is told
line by line, as it comes, but for errors that are nothing new.
"""

import asyncio
import json
import re
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from nbd_vmdk.errors import ServerError
from nbd_vmdk.plugin.errorlog import REPEATED
from nbd_vmdk.serving.handshake import Export
from nbd_vmdk.serving.launch import find_nbdkit, nbdkit_command, nbdkit_environment

#: A line longer than this is told in pieces, but for one of numbers.
_MAX_LINE = 1 << 16

#: What the line with the last numbers of a plugin that counts begins with; it is as long as it has exports.
_STATS = "stats: "

#: Lines held back at most.
_HELD_LINES = 200

# "nbdkit: python[1]: error: ", then "/path/plugin.py: pread: error: ", then what matters
_PREFIX = re.compile(r"nbdkit: (?:[\w.-]+(?:\[\d+\])?: )?(?:GnuTLS )?(error|debug): ")
_CALLBACK = re.compile(r": \w+: (?:error: )*")
# An error that says no more than that it is nothing new.
_REPEAT = re.compile(rf"error: [a-z-]+ {re.escape(REPEATED)}")


class Nbdkit:
    """A process of nbdkit; it is started once.

    ``plugin`` is the file that it loads; ``tell`` is given its lines.  ``stats`` are its last numbers, once
    it has ended, if it counts.
    """

    def __init__(self, plugin: str, tell: Callable[[str], None]) -> None:
        self.stats: dict[str, Any] | None = None
        self._plugin = plugin
        self._tell = tell
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None
        self._asked = False
        self._held: list[str] | None = []

    @property
    def pid(self) -> int:
        """The process ID."""
        assert self._process is not None
        return self._process.pid

    @property
    def launched(self) -> bool:
        """Whether there is, or was, a process."""
        return self._process is not None

    @property
    def code(self) -> int | None:
        """How it ended, as in subprocess; None if it has not."""
        return None if self._process is None else self._process.returncode

    async def launch(self, listening: socket.socket, options: Sequence[str], config: Sequence[str]) -> None:
        """Start it on that socket, with options of nbdkit and parameters of the plugin; ServerError."""
        nbdkit = find_nbdkit()
        command = nbdkit_command(nbdkit, options, self._plugin, config)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=listening.fileno(),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env=nbdkit_environment(nbdkit) | {"LISTEN_FDS": "1"},
            )
        except OSError as error:
            raise ServerError(None, why=f"can't start nbdkit: {error.strerror}") from error
        self._output = asyncio.create_task(self._read_output())

    async def until_ready(self, answer: Coroutine[Any, Any, list[Export]], patience: float) -> list[Export]:
        """Wait for ``answer``, that tells what it serves; ServerError with its own words if it fails."""
        assert self._process is not None
        asking = asyncio.create_task(answer)
        ending = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait((asking, ending), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done() and not ending.done():
                raise ServerError(None, why=f"nbdkit did not answer within {patience:g} s")
            if not ending.done() and isinstance(asking.exception(), (OSError, EOFError)):
                # A server that ends while it is talked to is better explained by what it says.
                await asyncio.wait((ending,), timeout=2)
            if ending.done():
                await self._drain()
                raise self.failure(f"nbdkit did not start: it {how_ended(ending.result())}")
            try:
                return asking.result()
            except (OSError, EOFError) as error:
                raise self.failure(f"nbdkit hung up: {error}") from error
            except ServerError as error:
                raise self.failure(error.message) from error
        finally:
            asking.cancel()
            ending.cancel()
            await asyncio.gather(asking, ending, return_exceptions=True)

    def speak(self) -> None:
        """Tell what was held back, and from now on all as it comes."""
        held, self._held = self._held or [], None
        for line in held:
            self._tell(line)

    def started(self, known: set[str], *, quietly: bool) -> None:
        """As speak(), at the end of a start that went well, but for warnings that are ``known`` already.

        To these the warnings of this start are added; ``quietly``, none of them is told.
        """
        held = self._held or []
        warnings = {line for line in held if line.startswith("warning: ")}
        passed_over = warnings if quietly else known
        self._held = [line for line in held if line not in passed_over]
        known |= warnings
        self.speak()

    def hold(self) -> None:
        """Hold back what it says from now on."""
        if self._held is None:
            self._held = []

    async def wait(self) -> int:
        """Wait until it ends, and for its last words; how it ended, as in subprocess."""
        assert self._process is not None
        code = await self._process.wait()
        await self._drain()
        return code

    def ask_to_end(self) -> None:
        """Ask it to end, once, and wait for nothing.

        To send a signal, subprocess looks whether the process is still there; if it has just ended, nobody
        else gets to know how.  Who was asked before may end at any moment.
        """
        if self._process is not None and self._process.returncode is None and not self._asked:
            self._asked = True
            self._process.terminate()

    async def end(self, timeout: float) -> bool:
        """Ask it to end and wait for that; False if it had to be killed.

        Being cancelled does not cut this short (it is bounded by ``timeout``): asyncio kills a process that
        is left behind, and this one may be writing the last tables of a disk.
        """
        assert self._process is not None
        process = self._process
        self.ask_to_end()
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

    def failure(self, what: str) -> ServerError:
        """The error that its last ``error:`` line explains, or else ``what``, with its last line.

        Tells what else was held back.
        """
        held = self._held or []
        error = next((line for line in reversed(held) if line.startswith("error: ")), None)
        hint = next((line for line in reversed(held) if line.startswith("hint: ")), None)
        last = held[-1] if held else None
        self._held = [line for line in held if line not in (error, hint)]
        self.speak()
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

    async def _read_output(self) -> None:
        """Take what it says for as long as it lives, so that its pipe never fills."""
        assert self._process is not None
        assert self._process.stdout is not None
        pending = b""
        while chunk := await self._process.stdout.read(_MAX_LINE):
            *lines, pending = (pending + chunk).split(b"\n")
            if len(pending) >= _MAX_LINE and not pending.startswith(_STATS.encode()):
                lines.append(pending)
                pending = b""
            for line in lines:
                self._hear(line)
        if pending:
            self._hear(pending)

    def _hear(self, raw: bytes) -> None:
        line = clean(raw.decode(errors="surrogateescape"), self._plugin)
        if not line or _REPEAT.fullmatch(line):
            return
        if line.startswith(_STATS):
            try:
                self.stats = json.loads(line.removeprefix(_STATS))
            except ValueError:
                pass  # it was killed while it told them
        elif self._held is None:
            self._tell(line)
        else:
            self._held = [*self._held[1 - _HELD_LINES :], line]


def clean(line: str, plugin: str) -> str:
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


def how_ended(code: int) -> str:
    """How a process ended that had this code, in words that follow its name."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
