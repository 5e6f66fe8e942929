"""Where the time of a 4 KiB read or write goes: ``python -m benchmarks.profile_read``.

Views of random reads on a hosted sparse image in the page cache, each a small table:

1. The read path built up step by step (plugins/ladder.py), so that each step's cost is a difference.  The
   floor is a plugin in C that does nothing; the last step is what a hop to an asyncio loop would cost, which
   is why the data path has none.
2. The engine called in this process, without nbdkit: what of it is Python and what is the kernel's preadv.
3. perf's samples of our server, sorted by the system call or the library that the time was spent in.

And perf's samples of random writes to new space, on tmpfs.  What perf shows is left out where there is none
(Debian: linux-perf).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import timeit
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.clients import run_fio
from benchmarks.images import Image, Images
from benchmarks.machine import FOLDER, alone
from benchmarks.servers import HERE, KINDS, OURS, RAW, Server, Tuning
from benchmarks.workloads import Fio
from nbd_vmdk import open_disk
from nbd_vmdk.serving.launch import find_nbdkit
from nbd_vmdk.units import KIB, MIB

_DEPTHS = (1, 16)
_BLOCK = 4 * KIB
#: perf's samples a second; a number that no timer of the kernel is a multiple of.
_FREQUENCY = 1999
_CALLS = 20000


@dataclass(frozen=True)
class Step:
    """A rung of the ladder: its name in the table, and the server it runs."""

    title: str
    command: list[str]


def _steps(image: Image, tuning: Tuning) -> list[Step]:
    nbdkit = [find_nbdkit(), "-f", "-r", "--exit-with-parent", "-t", str(tuning.threads)]
    assert image.raw is not None
    rungs = [
        ("noop", "Python plugin that does nothing"),
        ("kept", "with the thread's state kept"),
        ("map", "with the grain looked up"),
        ("read", "with the bytes read (preadv)"),
    ]
    ladder = [*nbdkit, "python", f"{HERE}/plugins/ladder.py", f"file={image.path}"]
    return [
        Step("nbdkit null (C, no data)", [*nbdkit, "null", str(image.size)]),
        *(Step(title, [*ladder, f"step={name}"]) for name, title in rungs),
        Step("**nbd-vmdk as served**", KINDS[OURS].command(image.path, False, tuning)),
        Step("reading by an asyncio loop in another thread", [*ladder, "step=asyncio"]),
        Step("nbdkit file on raw (C), for comparison", KINDS[RAW].command(image.raw, False, tuning)),
    ]


def climb(image: Image, tuning: Tuning, rounds: int, seconds: float) -> list[list[str]]:
    """The first table: each step at each depth, medians of interleaved rounds."""
    steps = _steps(image, tuning)
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for number in range(rounds):
        turn = number % len(steps)
        for step in steps[turn:] + steps[:turn]:
            for depth in _DEPTHS:
                found.setdefault((step.title, depth), []).append(_load(step.command, image, depth, seconds))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    table = [["step"]]
    for depth in _DEPTHS:
        table[0] += [f"requests/s, depth {depth}", "µs a request", "CPU µs: user", "kernel"]
    for step in steps:
        row = [step.title]
        for depth in _DEPTHS:
            rate, user, system = (median(values) for values in zip(*found[step.title, depth], strict=True))
            row += [f"{rate:,.0f}", f"{1e6 / rate:.1f}", f"{user:.1f}", f"{system:.1f}"]
        table.append(row)
    return table


def _load(command: list[str], image: Image, depth: int, seconds: float) -> tuple[float, float, float]:
    """Requests a second, and the server's user and system CPU time of one in µs."""
    with Server(command) as server:
        server.wait_ready()
        before = server.cpu()
        sample = run_fio(Fio("randread", _BLOCK, depth), server, image, seconds)
        user, system = (
            (now - then) / sample["requests"] * 1e6 for now, then in zip(server.cpu(), before, strict=True)
        )
        return sample["iops"], user, system


def call_engine(image: Image) -> list[list[str]]:
    """The second table: the engine's own time, called in this process by one thread."""
    buffer = memoryview(bytearray(_BLOCK))
    with open_disk(image.path) as disk:
        map_grain = disk.links[0].map
        offsets = [i * 7919 % (image.size // _BLOCK) * _BLOCK for i in range(_CALLS)]
        handle = os.open(image.path, os.O_RDONLY)
        try:
            timed = {
                "looking the grain up": lambda: [map_grain(at, _BLOCK) for at in offsets],
                "os.preadv alone": lambda: [os.preadv(handle, (buffer,), at) for at in offsets],
                "Disk.read_into: all of it": lambda: [disk.read_into(buffer, at) for at in offsets],
            }
            table = [["in one process, one thread", "µs"]]
            for title, work in timed.items():
                best = min(timeit.repeat(work, number=1, repeat=5))
                table.append([title, f"{best / _CALLS * 1e6:.2f}"])
        finally:
            os.close(handle)
    return table


# perf.


_READS = Fio("randread", _BLOCK, 16)
_WRITES = Fio("randwrite", _BLOCK, 16, amount=128 * MIB)


def sample_writes(image: Image, tuning: Tuning, seconds: float) -> tuple[str, float]:
    """As :func:`sample_with_perf`, of writes to a copy of an empty image on tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        copy = shutil.copy(image.path, folder)
        command = KINDS[OURS].command(copy, True, tuning)
        return sample_with_perf(command, _WRITES, image, seconds)


def sample_with_perf(command: list[str], fio: Fio, image: Image, seconds: float) -> tuple[str, float]:
    """What ``perf script`` prints of our server, and its CPU time of a request in µs.

    The text is empty where perf may not sample.
    """
    with tempfile.TemporaryDirectory() as folder, Server(command) as server:
        server.wait_ready()
        data = os.path.join(folder, "perf.data")
        watching = subprocess.Popen(
            [
                "perf",
                "record",
                "-e",
                "cpu-clock",
                "-F",
                str(_FREQUENCY),
                "-g",
                "-o",
                data,
                "-p",
                str(server.pid),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = sum(server.cpu())
        sample = run_fio(fio, server, image, seconds)
        spent = (sum(server.cpu()) - before) / sample["requests"] * 1e6
        watching.terminate()
        watching.wait(30)
        script = ["perf", "script", "-i", data, "-F", "comm,ip,sym,dso"]
        return subprocess.run(script, capture_output=True, text=True, check=False, timeout=120).stdout, spent


Frame = tuple[str, str]  # function, library

_FRAME = re.compile(r"^\s+[0-9a-f]+ (.*) \((.*)\)$")
_KERNEL = "kernel"
#: What libc's functions are called for here.
_PLACES = {
    "kernel: preadv, the image's bytes": "pread",
    "kernel: pwrite, the image's bytes and tables": "pwrite",
    "kernel: ftruncate, growing the file": "truncate",
    "kernel: send, the reply": "send|write",
    "kernel: recv, the request": "recv|read",
    "kernel: futex, locks and the GIL": "futex|lll|cond|mutex|sem",
}


def read_stacks(text: str) -> Iterable[list[Frame]]:
    """The stacks of ``perf script``, innermost frame first."""
    for block in text.split("\n\n"):
        stack = []
        for line in block.splitlines():
            match = _FRAME.match(line)
            if match:
                name, library = match.groups()
                inside = library.startswith("[") and library != "[vdso]"
                stack.append((name.split("+")[0], _KERNEL if inside else os.path.basename(library)))
        if stack:
            yield stack


def place_of(stack: Sequence[Frame]) -> str:
    """Where a sample belongs: the system call it is in, or the library."""
    if stack[0][1] != _KERNEL:
        return stack[0][1]
    # The innermost frame outside the kernel is the function of libc that made the call.
    caller = next((name for name, library in stack if library != _KERNEL), None)
    if caller is None:
        return "kernel: other"
    name = caller.strip("_").removeprefix("GI_").strip("_")
    return next((place for place, names in _PLACES.items() if re.search(names, name)), f"kernel: {name}")


def shares(head: str, counts: Counter[str], spent: float, most: int = 20) -> list[list[str]]:
    """A table of how ``spent`` µs divide over what was counted; what is below half a percent is left out."""
    total = counts.total() or 1
    table = [[head, "share", "µs a request"]]
    for name, count in counts.most_common(most):
        if count / total >= 0.005:
            table.append([name, f"{count / total:.1%}", f"{spent * count / total:.2f}"])
    table.append(["all", "100.0%", f"{spent:.2f}"])
    return table


def _show(title: str, table: list[list[str]]) -> None:
    lines = [title, "", "| " + " | ".join(table[0]) + " |", "|---|" + "--:|" * (len(table[0]) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in table[1:]]
    print("\n".join(lines), end="\n\n")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_read", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of each run")
    parser.add_argument("--threads", type=int, default=Tuning().threads, metavar="N", help="of nbdkit")
    arguments = parser.parse_args()
    tuning = Tuning(arguments.threads)
    images = Images(os.path.join(FOLDER, "images"))
    image = images.get("sparse")
    with alone():
        table = climb(image, tuning, arguments.rounds, arguments.seconds)
        _show(f"Step by step, nbdkit with {tuning.threads} threads, 4 KiB random reads:", table)
        _show("The engine by itself:", call_engine(image))
        if shutil.which("perf") is None:
            print("There is no perf here (Debian: linux-perf), so there are no samples.")
            return
        command = KINDS[OURS].command(image.path, False, tuning)
        reads = sample_with_perf(command, _READS, image, 3 * arguments.seconds)
        writes = sample_writes(images.get("empty-16g"), tuning, 3 * arguments.seconds)
    for what, (text, spent) in (("Reads", reads), ("Writes to new space", writes)):
        stacks = list(read_stacks(text))
        if not stacks:
            print("perf may not sample here, see /proc/sys/kernel/perf_event_paranoid.")
            return
        _show(f"{what} by perf, at depth 16:", shares("where", Counter(map(place_of, stacks)), spent))
        functions = Counter(f"`{stack[0][0]}` ({stack[0][1]})" for stack in stacks)
        _show("The functions that most samples fell into:", shares("function", functions, spent, 12))


if __name__ == "__main__":
    main()
