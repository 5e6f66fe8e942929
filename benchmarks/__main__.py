"""``python -m benchmarks``: measure, and write the report.  The package's docstring tells how.

A full run writes docs/BENCHMARKS.md, docs/benchmarks.json and docs/benchmarks.png; a quick or a filtered one
writes the same into build/bench, and prints its tables.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from datetime import UTC, datetime
from typing import Any

from benchmarks import chart, report
from benchmarks.machine import FOLDER, ROOT, alone, machine, versions
from benchmarks.runner import TMPFS_NEEDS, Runner, Settings
from benchmarks.servers import OURS, Tuning
from benchmarks.workloads import WORKLOADS, Workload
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.units import parse_size

_SHM = "/dev/shm"
#: A quick run ends within three minutes; this leaves time to stop what runs and to write the report.
_QUICK_LIMIT = 150.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="nbd-vmdk and its peers, measured side by side."
    )
    parser.add_argument(
        "--quick", action="store_true", help="a subset, few short rounds, three minutes at most"
    )
    parser.add_argument("--filter", metavar="REGEX", help="only workloads whose name it matches")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 7, with --quick 3")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="of a timed run; default: 1, with --quick 0.5"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="nbdkit threads of our server")
    parser.add_argument("--cache-size", metavar="SIZE", help="our server's cache")
    parser.add_argument("--list", action="store_true", help="name the workloads, measure nothing")
    parser.add_argument("--out", metavar="DIR", help="where the report goes")
    parser.add_argument("--report", metavar="JSON", help="measure nothing, report an earlier result")
    return parser.parse_args()


def main() -> int:
    """Measure or report, as the command line asks; 1 if our own server failed anywhere."""
    arguments = _arguments()
    workloads = [
        workload
        for workload in WORKLOADS
        if (not arguments.quick or workload.quick)
        and (not arguments.filter or re.search(arguments.filter, workload.name))
    ]
    if not workloads:
        sys.exit(f"error: no workload matches {arguments.filter}\nhint: --list names them")
    if arguments.list:
        for workload in workloads:
            print(f"{workload.name:26} {workload.title}")
        return 0
    whole = not arguments.quick and not arguments.filter
    out = arguments.out or (os.path.join(ROOT, "docs") if whole else FOLDER)
    os.makedirs(out, exist_ok=True)
    if arguments.report:
        with open(arguments.report, encoding="utf-8") as file:
            result = json.load(file)
    else:
        # Ending in order also when told to by others: mounts and servers are to go.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        with alone():
            result = _measure(workloads, arguments, out)
    print(_write(result, out))
    return 1 if any(OURS in servers for servers in result["failures"].values()) else 0


def _measure(workloads: list[Workload], arguments: argparse.Namespace, out: str) -> dict[str, Any]:
    """Run all rounds; the result so far is saved after each."""
    started = time.monotonic()
    os.makedirs(FOLDER, exist_ok=True)
    tuning = Tuning()
    cache_size = OpenOptions().cache_size
    if arguments.cache_size:
        cache_size = parse_size(arguments.cache_size)
        tuning = Tuning(tuning.threads, (f"cache-size={arguments.cache_size}",))
    if arguments.threads:
        tuning = Tuning(arguments.threads, tuning.parameters)
    settings = Settings(
        rounds=arguments.rounds or (3 if arguments.quick else 7),
        seconds=arguments.seconds or (0.5 if arguments.quick else 1.0),
        quick=arguments.quick,
        tuning=tuning,
        folder=FOLDER,
        tmpfs=_tmpfs(),
        deadline=started + _QUICK_LIMIT if arguments.quick else None,
    )
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": _command(arguments),
        "quick": arguments.quick,
        "rounds": 0,
        "seconds": settings.seconds,
        "threads": tuning.threads,
        "cache_size": cache_size,
        "machine": machine(FOLDER),
        "versions": versions(),
    }
    with Runner(workloads, settings) as runner:
        result |= {"samples": runner.results.samples, "failures": runner.results.failures}
        result["machine"]["writes to disk go to"] = runner.disk
        runner.prepare()
        for number in runner.rounds():
            result["rounds"] = number
            report.save(result, os.path.join(out, "benchmarks.json"))
    print(f"measured in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return result


def _command(arguments: argparse.Namespace) -> str:
    """How to run the same again."""
    if sys.argv[1:] in ([], ["--quick"]):
        return "make bench QUICK=1" if arguments.quick else "make bench"
    return f".venv/bin/python -m benchmarks {shlex.join(sys.argv[1:])}"


def _tmpfs() -> str | None:
    """A folder on tmpfs for this run; None, with a word, if there is no room for one."""
    try:
        free = shutil.disk_usage(_SHM).free
    except OSError:
        free = 0
    if free < TMPFS_NEEDS:
        print(f"note: {_SHM} has too little room, rows on tmpfs are left out", file=sys.stderr)
        return None
    return os.path.join(_SHM, f"nbd-vmdk-bench-{os.getpid()}")


def _write(result: dict[str, Any], out: str) -> str:
    """Write the report's three files; its text."""
    rows = report.rows_of(report.cells_of(result["samples"]))
    note = f"{result['date']}, {result['machine']['processor']}, medians of {result['rounds']} rounds"
    drawn = chart.draw(rows, os.path.join(out, "benchmarks.png"), note, every=result["quick"])
    result["chart"] = "benchmarks.png" if drawn else None
    report.save(result, os.path.join(out, "benchmarks.json"))
    text = report.markdown(result)
    with open(os.path.join(out, "BENCHMARKS.md"), "w", encoding="utf-8") as file:
        file.write(text)
    return text


if __name__ == "__main__":
    sys.exit(main())
