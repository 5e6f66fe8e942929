"""``nbd-vmdk convert`` and ``qemu-img convert`` side by side: ``python -m benchmarks.convert --help``.

The disk holds this machine's own programs and libraries, with holes between them, for about 40 % of its
size; it deflates to a third.  Both programs read images that qemu-img made, from the page cache, and write to
the same folder.  qemu-img runs with what is fastest for it: 16 coroutines, writing out of order where it can
(-W), its own cache mode "unsafe", which syncs nothing.  Ours syncs what it made before it gives it its name,
and that is in the measured time.  So qemu-img runs twice: as it is, and followed by ``sync`` of its result,
after which both have done the same.  With ``--folder`` on a tmpfs nobody has anything to sync.

Each round runs all once, the order changing from round to round; a number is the median over the rounds.
The last result is removed before each run, and the file system synced, as discarding blocks takes its time.
Before the first round, every result is compared with the source by ``qemu-img compare``.
"""

import argparse
import json
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.machine import FOLDER, alone, as_installed, machine, versions
from nbd_vmdk.units import GIB, MIB

_QEMU = ("qemu-img", "convert", "-m", "16", "-T", "none")
_SYNCED = "qemu-img, sync"
_OURS = (sys.executable, "-m", "nbd_vmdk", "convert", "--force")


@dataclass(frozen=True)
class Job:
    """A conversion: its source (an image by name), the command lines without files, what is aimed at."""

    name: str
    source: str
    target: str
    ours: tuple[str, ...]
    peer: tuple[str, ...]
    aim: float


JOBS = (
    Job("sparse to raw", "sparse.vmdk", "out.raw", (), ("-W", "-O", "raw"), 1.5),
    Job("raw to sparse", "disk.raw", "out.vmdk", (), ("-W", "-f", "raw", "-O", "vmdk"), 1.5),
    Job("sparse to sparse", "sparse.vmdk", "out.vmdk", (), ("-W", "-O", "vmdk"), 1.5),
    Job(
        "raw to flat",
        "disk.raw",
        "out.vmdk",
        ("--type", "monolithicFlat"),
        ("-W", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat"),
        1.5,
    ),
    Job(
        "sparse to streamOptimized",
        "sparse.vmdk",
        "out.vmdk",
        ("--type", "streamOptimized"),
        ("-O", "vmdk", "-o", "subformat=streamOptimized"),
        3,
    ),
    Job(
        "sparse to streamOptimized, level 1",
        "sparse.vmdk",
        "out.vmdk",
        ("--type", "streamOptimized", "--compress-level", "1"),
        ("-O", "vmdk", "-o", "subformat=streamOptimized"),
        3,
    ),
    Job("streamOptimized to raw", "stream.vmdk", "out.raw", (), ("-W", "-O", "raw"), 1.5),
)


@dataclass(frozen=True)
class Run:
    """What one conversion took: seconds on the clock, seconds of processors, bytes that it made."""

    wall: float
    cpu: float
    size: int


def make_sources(folder: str, size: int) -> None:
    """The raw disk and its images, unless they are there."""
    raw = os.path.join(folder, "disk.raw")
    if not os.path.exists(raw) or os.path.getsize(raw) != size:
        _make_raw(raw, size)
        for name, options in (("sparse", "monolithicSparse"), ("stream", "streamOptimized")):
            made = os.path.join(folder, f"{name}.vmdk")
            words = (
                "qemu-img",
                "convert",
                "-f",
                "raw",
                "-O",
                "vmdk",
                "-o",
                f"subformat={options}",
                raw,
                made,
            )
            subprocess.run(words, check=True)


def _make_raw(path: str, size: int) -> None:
    left = size * 2 // 5
    with open(path, "wb") as file:
        for folder, folders, names in os.walk("/usr/lib"):
            folders.sort()
            for name in sorted(names):
                source = os.path.join(folder, name)
                if os.path.islink(source) or not os.path.isfile(source):
                    continue
                with open(source, "rb") as content:
                    data = content.read(min(4 * MIB, left))
                file.write(data)
                left -= len(data)
                file.seek(file.tell() + 4096 + len(data) // 2 // 4096 * 4096)
                if not left or file.tell() > size - 8 * MIB:
                    file.truncate(size)
                    return
        file.truncate(size)


def run(words: tuple[str, ...], target: str) -> Run:
    """Run one conversion to a target that is not there."""
    for left in files(target):
        os.unlink(left)
    subprocess.run(["sync", "-f", os.path.dirname(target)], check=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=as_installed(os.environ))
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall, cpu, sum(os.stat(made).st_blocks for made in files(target)) * 512)


def files(target: str) -> list[str]:
    """The files of an image that are there."""
    names = (target, target.removesuffix(".vmdk") + "-flat.vmdk")
    return [name for name in names if os.path.exists(name)]


def commands(job: Job, folder: str) -> dict[str, tuple[str, ...]]:
    """The command lines of a job."""
    source, target = os.path.join(folder, job.source), os.path.join(folder, job.target)
    peer = (*_QEMU, *job.peer, source, target)
    script = f'"$@" && sync {shlex.quote(os.path.join(folder, "out"))}*'
    return {
        "ours": (*_OURS, *job.ours, source, target),
        "qemu-img": peer,
        _SYNCED: ("sh", "-c", script, "sh", *peer),
    }


def compare(job: Job, folder: str) -> None:
    """Raise CalledProcessError unless a job's last result has the source's bytes."""
    target = os.path.join(folder, job.target)
    kind = "raw" if target.endswith(".raw") else "vmdk"
    words = ("qemu-img", "compare", "-q", "-f", "raw", "-F", kind, os.path.join(folder, "disk.raw"), target)
    subprocess.run(words, check=True)


def measure(folder: str, rounds: int, jobs: Sequence[Job]) -> dict[str, dict[str, list[Run]]]:
    """All jobs, by everybody, in rounds."""
    found: dict[str, dict[str, list[Run]]] = {
        job.name: {"ours": [], "qemu-img": [], _SYNCED: []} for job in jobs
    }
    for number in range(-1, rounds):  # the first one is for comparing, and warms the page cache
        for job in jobs:
            every = list(commands(job, folder).items())
            for who, words in every if number % 2 else every[::-1]:
                result = run(words, os.path.join(folder, job.target))
                if number < 0:
                    compare(job, folder)
                else:
                    found[job.name][who].append(result)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    return found


def table(found: dict[str, dict[str, list[Run]]]) -> str:
    """The medians as a table of Markdown."""
    lines = [
        "| conversion | ours, s | qemu-img, s | and synced, s | times faster | aim | CPU s | size |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for job in (job for job in JOBS if job.name in found):
        ours, peer, synced = (_median(found[job.name][who]) for who in ("ours", "qemu-img", _SYNCED))
        lines.append(
            f"| {job.name} | {ours.wall:.2f} | {peer.wall:.2f} | {synced.wall:.2f} "
            f"| {peer.wall / ours.wall:.1f}, {synced.wall / ours.wall:.1f} | {job.aim:g} "
            f"| {ours.cpu:.2f} / {peer.cpu:.2f} | {ours.size / peer.size:.3f} |"
        )
    return "\n".join(lines)


def _median(runs: list[Run]) -> Run:
    return Run(*(statistics.median(getattr(one, field) for one in runs) for field in ("wall", "cpu", "size")))


def main() -> None:
    """Measure, and print the table; with --json, every run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=2 * GIB, help="bytes of the disk")
    parser.add_argument("--folder", default=os.path.join(FOLDER, "convert"))
    parser.add_argument("--filter", type=re.compile, default=re.compile(""), metavar="RE", help="only those")
    parser.add_argument("--json", metavar="FILE", help="write every run there")
    chosen = parser.parse_args()
    os.makedirs(chosen.folder, exist_ok=True)
    with alone():
        make_sources(chosen.folder, chosen.size)
        facts = {"machine": machine(chosen.folder), "versions": versions()}
        jobs = [job for job in JOBS if chosen.filter.search(job.name)]
        found = measure(chosen.folder, chosen.rounds, jobs)
    if chosen.json:
        runs = {
            job: {who: [vars(one) for one in every] for who, every in both.items()}
            for job, both in found.items()
        }
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump(facts | {"runs": runs}, file, indent=1)
    print(f"{facts['machine']}\n{facts['versions']}\n")
    print(table(found))


if __name__ == "__main__":
    main()
