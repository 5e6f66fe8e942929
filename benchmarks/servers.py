"""The servers that are compared: how each is started, what it costs, how it is stopped.

Every server inherits a unix socket that already listens (systemd's socket activation, which nbdkit and
qemu-nbd both speak).  So a client can connect at once and nothing polls, and the time from start to first
byte is the server's alone.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from benchmarks.machine import as_installed
from nbd_vmdk.serving.launch import find_nbdkit, nbdkit_environment
from nbd_vmdk.serving.server import DEFAULT_THREADS, plugin_path
from nbd_vmdk.units import MIB

#: Seconds until a server that does not answer, or does not end, is given up and killed.
START_TIMEOUT = 20.0
STOP_TIMEOUT = 60.0

HERE = os.path.dirname(os.path.abspath(__file__))
_TICKS = os.sysconf("SC_CLK_TCK")

# The socket must be descriptor 3 and the process's own ID in its environment: a shell that becomes the
# server can do both.
_LAUNCH = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 </dev/null'


class ServerFailedError(Exception):
    """A server did not start, did not answer or did not end; the text has its last words."""


@dataclass(frozen=True)
class Tuning:
    """Settings of our own server; the defaults are those of ``nbd-vmdk serve``."""

    threads: int = DEFAULT_THREADS
    parameters: tuple[str, ...] = ()  # key=value of the plugin
    workers: int = 1  # processes; several are for reading only


Command = Callable[[str, bool, Tuning], list[str]]


@dataclass(frozen=True)
class Kind:
    """A way to serve: ``command`` builds its argument list from a path, whether to write, and our tuning."""

    name: str
    label: str
    command: Command
    raw: bool = False  # serves the raw twin of the image


def _nbdkit(writable: bool, *options: str) -> list[str]:
    return [find_nbdkit(), "-f", "--exit-with-parent", *([] if writable else ["-r"]), *options]


def _ours(path: str, writable: bool, tuning: Tuning) -> list[str]:
    if tuning.workers > 1:
        return serve(path, "--threads", str(tuning.threads), workers=tuning.workers)
    threads = ("-t", str(tuning.threads))
    return [*_nbdkit(writable, *threads), "python", plugin_path(), f"file={path}", *tuning.parameters]


def serve(path: str, *options: str, workers: int) -> list[str]:
    """``nbd-vmdk serve``, which starts several nbdkits on one address, for reading."""
    return [sys.executable, "-m", "nbd_vmdk", "serve", "-r", "--workers", str(workers), *options, path]


def _qemu(aio: str) -> Command:
    def command(path: str, writable: bool, _tuning: Tuning) -> list[str]:
        options = ["--persistent", "--shared=16", f"--aio={aio}", "--format=vmdk"]
        return ["qemu-nbd", *options, *([] if writable else ["--read-only"]), path]

    return command


def _file(path: str, writable: bool, _tuning: Tuning) -> list[str]:
    return [*_nbdkit(writable), "file", path]


def _least(path: str, writable: bool, tuning: Tuning) -> list[str]:
    options = _nbdkit(writable, "-t", str(tuning.threads))
    return [*options, "python", f"{HERE}/plugins/least.py", f"file={path}"]


def _empty(_path: str, _writable: bool, tuning: Tuning) -> list[str]:
    return [*_nbdkit(False, "-t", str(tuning.threads)), "python", f"{HERE}/plugins/empty.py"]


OURS, THREADS, URING = "ours", "qemu-threads", "qemu-uring"
RAW, LEAST, EMPTY = "raw", "least", "empty"

KINDS = {
    kind.name: kind
    for kind in (
        Kind(OURS, "nbd-vmdk", _ours),
        Kind(THREADS, "qemu-nbd, threads", _qemu("threads")),
        Kind(URING, "qemu-nbd, io_uring", _qemu("io_uring")),
        Kind(RAW, "nbdkit file on raw", _file, raw=True),
        Kind(LEAST, "least Python on raw", _least, raw=True),
        Kind(EMPTY, "empty Python plugin", _empty),
    )
}
QEMU = (THREADS, URING)


class Server:
    """One server process on a socket of its own, for the length of a ``with`` block.

    The socket takes connections from the beginning; they wait for the server.  Leaving the block stops it;
    ServerFailedError if it had ended before, or does not end cleanly.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._folder = tempfile.mkdtemp(prefix="bench-")
        self.socket = os.path.join(self._folder, "socket")
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self._log = os.path.join(self._folder, "log")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.socket)
        self._listener.listen(64)
        self._process: subprocess.Popen[bytes] | None = None
        self.started = 0.0

    def __enter__(self) -> Self:
        # What any nbdkit needs to find its Python does no harm to the others.
        environment = nbdkit_environment(find_nbdkit())
        if "NBD_VMDK_SITE" in os.environ:
            environment["NBD_VMDK_SITE"] = os.environ["NBD_VMDK_SITE"]
        with self._listener, open(self._log, "wb") as log:
            self.started = time.monotonic()
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _LAUNCH, "sh", *self._command],
                stdin=self._listener.fileno(),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=as_installed(environment),
            )
        return self

    @property
    def pid(self) -> int:
        """The server's process ID."""
        assert self._process is not None
        return self._process.pid

    def wait_ready(self) -> None:
        """Return when the server answers."""
        try:
            subprocess.run(
                ["nbdinfo", "--size", self.uri], check=True, capture_output=True, timeout=START_TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise ServerFailedError(f"no answer in {START_TIMEOUT:g} s {self.last_words()}".strip()) from None
        except subprocess.CalledProcessError as error:
            what = self.last_words() or error.stderr.decode(errors="replace").strip()
            raise ServerFailedError(f"does not serve this: {what}") from None

    def wait_for_all(self) -> None:
        """Return when ``nbd-vmdk serve`` has printed its URI: all its processes answer, not only one."""
        end = time.monotonic() + START_TIMEOUT
        while not self.last_words().startswith("nbd+unix:"):
            if time.monotonic() > end:
                raise ServerFailedError(f"no URI in {START_TIMEOUT:g} s {self.last_words()}".strip())
            time.sleep(0.02)

    def last_words(self) -> str:
        """The last line that the server printed."""
        with open(self._log, encoding="utf-8", errors="replace") as log:
            lines = [line.strip() for line in log if line.strip()]
        return lines[-1][:300] if lines else ""

    def cpu(self) -> tuple[float, float]:
        """Seconds of (user, system) CPU time that the server and its children have used."""
        user = system = 0
        for pid in _family(self.pid):
            fields = _read_proc(pid, "stat").rpartition(")")[2].split()
            user += int(fields[11]) + int(fields[13])  # utime, cutime
            system += int(fields[12]) + int(fields[14])  # stime, cstime
        return user / _TICKS, system / _TICKS

    def memory(self, field: str = "VmHWM") -> float:
        """MiB that the server and its children have resident (VmRSS), or had at most (VmHWM)."""
        total = 0
        for pid in _family(self.pid):
            lines = _read_proc(pid, "status").splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
        return total * 1024 / MIB

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        assert self._process is not None
        process = self._process
        already = process.poll()
        process.terminate()
        try:
            code = process.wait(STOP_TIMEOUT if failed is None else 5)
            ended = f"ended with code {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code, ended = -9, f"did not end in {STOP_TIMEOUT:g} s"
        words = self.last_words()
        shutil.rmtree(self._folder)
        if failed is None and (already is not None or code not in (0, -15)):
            raise ServerFailedError(f"{'died: ' if already is not None else ''}{ended} {words}".strip())


def _read_proc(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        raise ServerFailedError("it died") from None


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        try:
            tasks = os.listdir(f"/proc/{parent}/task")
        except FileNotFoundError:
            continue
        for task in tasks:
            try:
                with open(f"/proc/{parent}/task/{task}/children", encoding="ascii") as file:
                    found += map(int, file.read().split())
            except FileNotFoundError:
                pass  # the thread has just ended
    return found
