"""What several processes on one address give: ``python -m benchmarks.workers``.

``nbd-vmdk serve -r`` with 1, 2 ... workers, by turns, on a hosted sparse image in the page cache: 4 KiB
random reads over several connections (fio), and the copy of the whole disk (nbdcopy).  Each row is the median
of the rounds, and of the ratios to one worker in the same round.  CPU time is that of all of the server's
processes, or of the client.

Then how the connections of nbdcopy spread over the workers, counted by the workers themselves.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from statistics import median

from benchmarks.clients import run_fio
from benchmarks.images import Image, Images
from benchmarks.machine import FOLDER, alone
from benchmarks.servers import Server, serve
from benchmarks.workloads import Fio
from nbd_vmdk.serving.asking import ask
from nbd_vmdk.units import KIB

#: Rate, µs of the server's CPU time for a request, and of the client's.
Measured = tuple[float, float, float]

_CONNECTIONS = 4
#: nbdcopy's default request.
_COPY_REQUEST = 256 * KIB


def _copy(uri: str) -> list[str]:
    return ["nbdcopy", "-C", str(_CONNECTIONS), "-T", str(_CONNECTIONS), uri, "null:"]


def _client_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _measure(image: Image, workers: int, depth: int | None, seconds: float) -> Measured:
    """Load by fio with requests of that depth on each connection; without a depth, by nbdcopy."""
    with Server(serve(image.path, workers=workers)) as server:
        server.wait_for_all()
        before, client = sum(server.cpu()), _client_cpu()
        if depth is None:
            begin = time.monotonic()
            subprocess.run(_copy(server.uri), check=True)
            requests: float = image.size / _COPY_REQUEST
            rate = requests / (time.monotonic() - begin)
        else:
            load = Fio("randread", 4 * KIB, depth, connections=_CONNECTIONS)
            sample = run_fio(load, server, image, seconds)
            requests, rate = sample["requests"], sample["iops"]
        client = _client_cpu() - client
        return rate, (sum(server.cpu()) - before) / requests * 1e6, client / requests * 1e6


def compare(image: Image, counts: Sequence[int], rounds: int, seconds: float) -> list[list[str]]:
    """The first table."""
    loads = {f"4 KiB random, {_CONNECTIONS} connections of depth {depth}": depth for depth in (1, 4, 16)}
    found: dict[tuple[str, int], list[Measured]] = {}
    for number in range(rounds):
        turn = number % len(counts)
        for title, depth in [*loads.items(), ("nbdcopy of the disk", None)]:
            for workers in [*counts[turn:], *counts[:turn]]:
                measured = _measure(image, workers, depth, seconds)
                found.setdefault((title, workers), []).append(measured)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    table = [["load", "workers", "requests/s", "ratio", "from", "to", "server's CPU µs", "client's CPU µs"]]
    for (title, workers), values in found.items():
        rate, cpu, client = (median(column) for column in zip(*values, strict=True))
        alone_ = found[title, counts[0]]
        ratios = [now[0] / then[0] for now, then in zip(values, alone_, strict=True)]
        shown = [f"{ratio:.2f}" for ratio in (median(ratios), min(ratios), max(ratios))]
        table.append([title, str(workers), f"{rate:,.0f}", *shown, f"{cpu:.1f}", f"{client:.1f}"])
    return table


def spread(image: Image, workers: int, runs: int) -> Counter[tuple[int, ...]]:
    """How many connections the workers got, most first, in how many runs of nbdcopy."""
    found: Counter[tuple[int, ...]] = Counter()
    with Server(serve(image.path, "--stats", workers=workers)) as server:
        server.wait_for_all()
        before = _totals(server)
        for _ in range(runs):
            subprocess.run(_copy(server.uri), check=True)
            now = _totals(server)
            got = (after - then for after, then in zip(now, before, strict=True))
            found[tuple(sorted(got, reverse=True))] += 1
            before = now
    return found


def _totals(server: Server) -> list[int]:
    return [worker["connections"]["total"] for worker in ask(str(server.pid))["workers"]]


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="the first is the measure")
    parser.add_argument("--spread", type=int, default=20, metavar="RUNS")
    wanted = parser.parse_args()
    with alone():
        image = Images(os.path.join(FOLDER, "images")).get("sparse")
        load = os.getloadavg()[0]
        for row in compare(image, wanted.workers, wanted.rounds, wanted.seconds):
            print("| " + " | ".join(row) + " |")
        for workers in wanted.workers:
            if workers > 1:
                found = spread(image, workers, wanted.spread).most_common()
                shown = ", ".join(f"{'+'.join(map(str, got))}: {count}" for got, count in found)
                print(f"connections on {workers} workers, in how many runs: {shown}")
        print(f"load before {load:.1f}, after {os.getloadavg()[0]:.1f}; {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
