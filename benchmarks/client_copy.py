"""nbd_vmdk.client.copy against nbdcopy: the same two servers, by turns, so that both meet the same machine.

::

    .venv/bin/python benchmarks/client_copy.py [MiB] [rounds]

The source is nbdkit's memory plugin full of random bytes, the destination an empty one, so what is measured
is the copying alone: two passes of every byte through a unix socket.  CPU time is that of the client.
"""

import asyncio
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nbd_vmdk import client

WAYS: dict[str, Callable[[str, str], None]] = {
    "client.copy()": lambda a, b: _ours(a, b),
    "client.copy(connections=2)": lambda a, b: _ours(a, b, connections=2),
    "client.copy(connections=1)": lambda a, b: _ours(a, b, connections=1),
    "nbdcopy --flush": lambda a, b: _nbdcopy(a, b),
    "nbdcopy --flush -C 2 -T 2 --request-size=1048576": lambda a, b: _nbdcopy(
        a, b, "-C", "2", "-T", "2", "--request-size=1048576"
    ),
}


def _ours(source: str, target: str, **options: int) -> None:
    asyncio.run(client.copy(source, target, **options))  # type: ignore[arg-type]  # all of them are numbers


def _nbdcopy(source: str, target: str, *options: str) -> None:
    subprocess.run(["nbdcopy", "--flush", *options, source, target], check=True)


@contextmanager
def _memory(size: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        socket, pidfile = os.path.join(folder, "s"), os.path.join(folder, "p")
        command = ["nbdkit", "-f", "--exit-with-parent", "-U", socket, "-P", pidfile, "memory", size]
        with subprocess.Popen(command) as server:
            try:
                while not os.path.exists(pidfile):
                    time.sleep(0.01)
                yield f"nbd+unix:///?socket={socket}"
            finally:
                server.kill()


async def _fill(uri: str, mib: int) -> None:
    async with client.connect(uri) as disk:
        for at in range(mib):
            await disk.pwrite(os.urandom(1 << 20), at << 20)


def _cpu() -> float:
    spent = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        spent += usage.ru_utime + usage.ru_stime
    return spent


def main() -> None:
    """Measure and print a table."""
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    with _memory(f"{mib}M") as source:
        asyncio.run(_fill(source, mib))
        for _ in range(rounds):
            for name, way in WAYS.items():
                with _memory(f"{mib}M") as target:
                    begin, before = time.perf_counter(), _cpu()
                    way(source, target)
                    times[name].append((time.perf_counter() - begin, _cpu() - before))
    print("| | best, MiB/s | median, MiB/s | CPU time of the client, s/GiB |")
    print("|---|---|---|---|")
    for name, runs in times.items():
        wall = [each for each, _ in runs]
        cpu = min(each for _, each in runs) * 1024 / mib
        print(f"| `{name}` | {mib / min(wall):.0f} | {mib / statistics.median(wall):.0f} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
