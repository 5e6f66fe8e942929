"""NBD servers to talk to: nbdkit with whatever plugin and filters, on a socket in a folder of its own."""

import asyncio
import gc
import os
import subprocess
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Kit:
    """A running nbdkit."""

    process: subprocess.Popen[bytes]
    socket: str

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def nbdkit(*words: object) -> Iterator[Kit]:
    """nbdkit with these words on its command line."""
    with tempfile.TemporaryDirectory(prefix="kit-", dir="/tmp") as folder:
        socket, pidfile = os.path.join(folder, "s"), os.path.join(folder, "p")
        said = list(map(str, words))
        where = [] if "-p" in said else ["-U", socket]
        command = ["nbdkit", "-f", "--exit-with-parent", "-P", pidfile, *where, *said]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                end = time.monotonic() + 10
                while not os.path.exists(pidfile):
                    assert process.poll() is None, command
                    assert time.monotonic() < end, command
                    time.sleep(0.005)
                yield Kit(process, socket)
            finally:
                process.kill()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run it, never for long, and with nothing going wrong in callbacks and tasks that nobody looks at."""
    problems: list[dict[str, Any]] = []

    async def watched() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
        return await asyncio.wait_for(main, 60)

    result = asyncio.run(watched())
    gc.collect()
    assert problems == []
    return result
