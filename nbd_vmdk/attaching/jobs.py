"""Servers that stay when the command that started them has returned: behind a block device, or a mount.

Such a job has a folder in the user's run folder, named after what it is for.  In it are what was started
(``job.json``), all that it says (``log``), and, when it has ended, its exit code (``exit``).  So a later
command can end the job, wait for that, and tell what went wrong while a disk was closed.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbd_vmdk.attaching.unreached import unreached
from nbd_vmdk.errors import DeviceError, InUse, ServerError, StorageError

#: Where root's jobs have their folders.
ROOT_FOLDER = "/run/nbd-vmdk-jobs"

#: Seconds until a job that neither does what it is for nor ends is given up.
START_TIMEOUT = 90.0
#: Seconds that closing a disk may take.
STOP_TIMEOUT = 150.0
_STEP = 0.05

# The shell that waits for the job leaves its exit code.  It takes note of a signal to the whole group, and
# goes on waiting; what it starts takes that signal as ever.
_WAIT = 'trap : TERM; folder=$1; shift; "$@"; echo $? >"$folder/exit"'

#: A line with an error, ours or that of nbd-client.
_ERROR = re.compile(r"(?:error: |.*\bError: )(.+)")


def run_folder() -> str:
    """Where jobs have their folders: one for root, one for each user, which nobody else can enter."""
    if os.geteuid() == 0:
        path = ROOT_FOLDER
    elif os.path.isabs(runtime := os.environ.get("XDG_RUNTIME_DIR", "")):
        path = os.path.join(runtime, "nbd-vmdk-jobs")
    else:
        path = f"/tmp/nbd-vmdk-jobs-{os.geteuid()}"  # noqa: S108  its owner is looked at
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        there = os.lstat(path)
    except OSError as error:
        raise StorageError.of(error, path, "make a folder") from error
    if there.st_uid != os.geteuid() or not os.path.isdir(path) or os.path.islink(path):
        raise DeviceError(path, why="belongs to somebody else")
    return path


@contextlib.contextmanager
def _told(path: str, doing: str) -> Iterator[None]:
    """Say of an error of the system which file it was met in."""
    try:
        yield
    except OSError as error:
        raise StorageError.of(error, path, doing) from error


@contextlib.contextmanager
def alone(folder: str) -> Iterator[None]:
    """Let nobody else start or end a job meanwhile; StorageError if its lock can't be had."""
    path = os.path.join(folder, "lock")
    with _told(path, "lock"):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with _told(path, "lock"):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class Job:
    """A job that was started, now or by an earlier command; ``facts`` is what was noted of it then."""

    folder: str
    facts: Mapping[str, Any]

    @property
    def pid(self) -> int:
        """The process that waits for it."""
        return int(self.facts["pid"])

    @property
    def alive(self) -> bool:
        """Whether it runs; a process that only has the same number is another one."""
        return _birth(self.pid) == str(self.facts["birth"])

    @property
    def code(self) -> int | None:
        """Its exit code, None if it left none."""
        try:
            with open(os.path.join(self.folder, "exit")) as file:
                return int(file.read())
        except (OSError, ValueError):
            return None

    def said(self) -> list[str]:
        """The lines that it has said."""
        try:
            with open(os.path.join(self.folder, "log"), errors="replace") as file:
                return file.read().splitlines()
        except OSError:
            return []

    def stop(self) -> None:
        """Ask it to end; its disk is closed cleanly."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.killpg(self.pid, signal.SIGTERM)

    def finish(self, timeout: float = STOP_TIMEOUT) -> list[str]:
        """Wait until it has ended, and forget it; what it warned of meanwhile.

        Raises ServerError with its own words if it failed, or DeviceError if it does not end.
        """
        wait_for(lambda: not self.alive, timeout)
        if self.alive:
            log = os.path.join(self.folder, "log")
            raise DeviceError(
                None, why=f"the server does not end: it is process {self.pid}, its log is {log}"
            )
        lines, code = self.said(), self.code
        shutil.rmtree(self.folder, ignore_errors=True)
        if code != 0:
            why = f"the server ended with code {code}" if code else "the server was killed"
            raise _failure(self, lines, why)
        return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]


def find_job(name: str) -> Job | None:
    """The job of this name, running or not; StorageError if what was noted of it can't be read.

    Notes that make no sense were cut off by a full disk or a power cut: then nothing is known of it.
    """
    folder = os.path.join(run_folder(), name)
    path = os.path.join(folder, "job.json")
    try:
        with _told(path, "read"), open(path, "rb") as file:
            facts = json.loads(file.read())
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    except (ValueError, RecursionError):
        return None
    known = isinstance(facts, dict) and isinstance(facts.get("pid"), int) and "birth" in facts
    return Job(folder, facts) if known else None


def start_job(
    name: str,
    command: Sequence[str],
    ready: Callable[[], bool],
    facts: Mapping[str, object],
    uri: str | None = None,
) -> Job:
    """Start ``command`` as the job ``name``; return once it is ``ready``.

    ``uri`` is what the command is to reach, where that is somebody else's.  Raises NbdError if it says that
    it did not, or says nothing, ServerError with its own words if it ends otherwise, and StorageError; and
    then leaves nothing behind.
    """
    folder = os.path.join(run_folder(), name)
    earlier = find_job(name)
    if earlier is not None and earlier.alive:
        raise InUse(None, how=f"process {earlier.pid} serves {earlier.facts.get('image')}")
    shutil.rmtree(folder, ignore_errors=True)
    with _told(folder, "make a folder"):
        os.mkdir(folder, mode=0o700)
    log = os.path.join(folder, "log")
    opened = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    words = ["/bin/sh", "-c", _WAIT, "sh", folder, *command]
    try:
        with _told(log, "start a process that writes"):
            pid = os.posix_spawn("/bin/sh", words, os.environ, file_actions=opened, setsid=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    job = Job(folder, {**facts, "pid": pid, "birth": _birth(pid)})
    ended = False

    def over() -> bool:
        nonlocal ended
        ended = ended or os.waitpid(pid, os.WNOHANG)[0] == pid
        return ended or ready()

    try:
        note = os.path.join(folder, "job.json")
        with _told(note, "write"), open(note, "w") as file:
            json.dump(dict(job.facts), file)
        in_time = wait_for(over, START_TIMEOUT)
    except BaseException:
        _give_up(job, ended=ended)
        raise
    if ended or not in_time:
        lines = job.said()
        _give_up(job, ended=ended)
        if uri and (error := unreached(uri, lines)):
            raise error
        if uri and not ended and not any(map(_ERROR.match, lines)):
            from nbd_vmdk.client.binding import silent  # seldom needed, and slow to import

            raise silent(uri, START_TIMEOUT)
        otherwise = "it ended at once" if ended else f"nothing happened in {START_TIMEOUT:g} s"
        raise _failure(job, lines, otherwise)
    return job


def serve_command(image: str, options: Sequence[str], run: Sequence[str]) -> list[str]:
    """The words that serve ``image`` for as long as the command ``run`` lasts.

    In ``run``, ``$unixsocket`` and ``$uri`` stand for where it is served.  The kernel and nbdfuse do not
    connect anew, so a server that dies is not started again: what is left of it is told when the job ends.
    """
    shown = " ".join(f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in run)
    # -P: what is in the current folder is no part of us.
    serve = [sys.executable, "-P", "-m", "nbd_vmdk", "serve", "--no-restart", *options]
    return [*serve, "--run", f"exec {shown}", "--", image]


def _give_up(job: Job, *, ended: bool) -> None:
    if not ended:
        job.stop()
        if not wait_for(lambda: os.waitpid(job.pid, os.WNOHANG)[0] == job.pid, STOP_TIMEOUT):
            return
    shutil.rmtree(job.folder, ignore_errors=True)


def _failure(job: Job, lines: Sequence[str], otherwise: str) -> ServerError:
    """What the last line with an error says, or else of what is served that, and the last line at all."""
    errors = [found[1] for line in lines if (found := _ERROR.match(line))]
    hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
    if errors:
        return ServerError(None, why=errors[-1], hint=hints[-1] if hints else None)
    image = job.facts.get("image")
    why = f"{otherwise} ({lines[-1]})" if lines else otherwise
    return ServerError(image if isinstance(image, str) else None, why=why)


def _birth(pid: int) -> str | None:
    """When that process was started, in the kernel's ticks; None if there is none, or it is only a zombie."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            words = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] == "Z" else words[19]


def wait_for(done: Callable[[], bool], timeout: float) -> bool:
    """Look again and again, until it is done or the time is over; whether it is done."""
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(_STEP)
    return True
