#!/usr/bin/env python3
"""
Fuzzes everything that parses bytes, all targets within the seconds that are given; see README.md.

Each target runs in a process of its own, two at once. Exit code: 0 nothing found, 1 something was found,
2 fuzzing is not possible here.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import gc
import hashlib
import importlib.util
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# As a script this sees its own folder's names; what it imports are the tests' and the package's.
sys.path[:] = [
    str(ROOT),
    *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "tests/fuzz"),
]

#: Runs shorter than this start from the seeds alone, so that two of them with one --seed do the same.
LONG = 300
#: What a process needs until its first input runs, seconds.
START = 2.0
#: A wait without end is ended by libFuzzer after so many seconds; what computes has 5, see limits.py.
HANG = 25
LIMIT_MB = 2048

_PREFIX = "nbd-vmdk-fuzz-"
#: See prctl(2).
_PR_SET_PDEATHSIG = 1
#: Seconds after which a folder that nobody holds is one that a killed run has left.
_OLD = 600

_DONE = re.compile(r"^#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)


@dataclass
class Outcome:
    """How the fuzzing of one target ended."""

    name: str
    code: int
    log: Path
    findings: list[Path] = field(default_factory=list)

    def row(self) -> str:
        """A line of the summary."""
        done = _DONE.findall(self.log.read_text(errors="replace"))
        executions, edges, features, corpus = done[-1] if done else ("?",) * 4
        state = "ok" if self.code == 0 else f"FOUND {len(self.findings)}" if self.findings else "FAILED"
        return f"{self.name:<12}{executions:>12}{edges:>8}{features:>10}{corpus:>8}  {state}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz, or replay findings."""
    options = _options(arguments)
    # What the engine logs of odd images would drown what is found.
    logging.getLogger("nbd_vmdk").addHandler(logging.NullHandler())
    logging.getLogger("nbd_vmdk").propagate = False
    if options.replay:
        return _replay(options.replay)
    if importlib.util.find_spec("atheris") is None:
        print("error: atheris, which does the fuzzing, is not installed for this Python", file=sys.stderr)
        print("hint: it comes with the development tools: pip install --group dev", file=sys.stderr)
        return 2
    if options.worker:
        return _work(options.worker, options.rest)
    from tests.fuzz.targets import TARGETS

    unknown = [name for name in options.target if name not in TARGETS]
    if unknown:
        print(f"error: no target {unknown[0]}; there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    names = options.target or list(TARGETS)
    weights = {name: TARGETS[name].weight for name in names}
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1, 1 << 31)
    print(f"fuzzing {len(names)} targets for {options.seconds:g} s, --seed {seed}")
    with _workspace(options.corpus, options.seconds) as (corpus, scratch):
        return _report(_fuzz_all(weights, options.seconds, seed, corpus, scratch, options.jobs))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fuzz everything that parses bytes.")
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together (default 60)")
    parser.add_argument(
        "--target", action="append", default=[], metavar="NAME", help="only this one; repeatable"
    )
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="keep what reaches new code in DIR/TARGET")
    parser.add_argument("--seed", type=int, metavar="N", help="repeat the run that printed it")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at once (default 2)")
    parser.add_argument(
        "--replay", nargs="+", type=Path, metavar="FILE", help="run findings again, nothing else"
    )
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _workspace(corpus: Path | None, seconds: float) -> Iterator[tuple[Path, Path]]:
    """A folder for the corpora, and one for the files of the images; what is temporary is removed."""
    here = ROOT / ".fuzz"
    here.mkdir(exist_ok=True)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    _sweep(Path(memory or tempfile.gettempdir()))
    scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=memory))
    held = os.open(scratch, os.O_RDONLY | os.O_CLOEXEC)
    kept = corpus or (here / "corpus" if seconds >= LONG else None)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield (kept.resolve() if kept else scratch / "corpus"), scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(held)


def _sweep(place: Path) -> None:
    """Remove what runs that were killed have left: memory is used up by it until somebody does."""
    for folder in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(held).st_mtime > _OLD:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(held)


def _fuzz_all(
    weights: dict[str, int], seconds: float, seed: int, corpus: Path, scratch: Path, jobs: int
) -> list[Outcome]:
    share = max(seconds * min(jobs, len(weights)) - START * len(weights), 1) / sum(weights.values())
    with ThreadPoolExecutor(jobs) as pool:
        # The longest first, so that the last ones fill the gap at the end.
        order = sorted(weights, key=weights.__getitem__, reverse=True)
        jobs_ = [pool.submit(_fuzz_one, name, share * weights[name], seed, corpus, scratch) for name in order]
        return [job.result() for job in jobs_]


def _fuzz_one(name: str, seconds: float, seed: int, corpus: Path, scratch: Path) -> Outcome:
    """Fuzz one target in a process of its own."""
    from tests.fuzz.seeds import SEEDS
    from tests.fuzz.targets import TARGETS

    here = ROOT / ".fuzz"
    seeds, work, found = scratch / "seeds" / name, corpus / name, here / "findings"
    for folder in (seeds, work, found):
        folder.mkdir(parents=True, exist_ok=True)
    for label, data in SEEDS[name]().items():
        (seeds / label).write_bytes(data)
    words = scratch / f"{name}.dict"
    words.write_text("".join(_quoted(word) for word in TARGETS[name].words))
    before = set(found.iterdir())
    log = here / f"{name}.log"
    command = [
        *(sys.executable, str(Path(__file__).resolve()), "--worker", name, "--"),
        *(str(work), str(seeds)),
        f"-max_total_time={max(1, round(seconds))}",
        f"-seed={seed}",
        f"-max_len={TARGETS[name].max_len}",
        *([f"-dict={words}"] if TARGETS[name].words else []),  # an empty one is an error
        f"-artifact_prefix={found}/{name}-",
        f"-timeout={HANG}",
        f"-rss_limit_mb={LIMIT_MB}",
        # Inputs are structures, which do not grow from small to large; and slow is what limits.py says.
        *("-len_control=0", f"-report_slow_units={HANG}", "-print_final_stats=0"),
    ]
    environment = os.environ | {
        "NBD_VMDK_FUZZ_DIR": str(scratch),
        "NBD_VMDK_FUZZ_PARENT": str(os.getpid()),
        "PYTHONHASHSEED": "0",
        # An arena for each thread is address space, which is what is limited.
        "MALLOC_ARENA_MAX": "1",
    }
    with log.open("wb") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
    return Outcome(name, done.returncode, log, sorted(set(found.iterdir()) - before))


def _quoted(word: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' if word else ""


def _report(outcomes: list[Outcome]) -> int:
    print(f"{'target':<12}{'executions':>12}{'edges':>8}{'features':>10}{'corpus':>8}")
    for outcome in outcomes:
        print(outcome.row())
    failed = [outcome for outcome in outcomes if outcome.code != 0]
    for outcome in failed:
        print(f"\n{outcome.name}: the end of {outcome.log}")
        print(*outcome.log.read_text(errors="replace").splitlines()[-30:], sep="\n")
        for finding in outcome.findings:
            print(f"\nfound: {finding}")
            print(f"again: {sys.executable} {Path(__file__)} --replay {finding}")
    return 1 if failed else 0


def _end_with_parent() -> None:
    """Let the kernel end this process when the one that started it was killed: nobody else would."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(os.environ.get("NBD_VMDK_FUZZ_PARENT", os.getppid())):
        os._exit(1)  # it was killed before


def _work(name: str, arguments: list[str]) -> int:
    """Be the process that fuzzes one target; libFuzzer ends it."""
    import atheris

    _end_with_parent()
    with atheris.instrument_imports(include=["nbd_vmdk"]):
        from tests.fuzz.targets import TARGETS
    gc.freeze()  # so that looking for what inputs left behind is quick
    target = TARGETS[name]
    more = {}
    if mutate := target.mutate:
        more["custom_mutator"] = lambda data, size, seed: mutate(data, size, seed, atheris.Mutate)
    atheris.Setup([sys.argv[0], *arguments], target, **more)
    atheris.Fuzz()
    return 0


def _replay(files: Sequence[Path]) -> int:
    """Run inputs again; a file is named for its target: TARGET-whatever."""
    from tests.fuzz.targets import TARGETS

    failed = 0
    for file in files:
        target = TARGETS.get(file.name.split("-")[0])
        if target is None:
            print(f"error: {file.name} does not begin with a target's name and -", file=sys.stderr)
            return 2
        data = file.read_bytes()
        started = time.process_time()
        try:
            target(data)
        except BaseException:  # noqa: BLE001  TooSlow among them
            traceback.print_exc()
            failed = 1
        digest = hashlib.sha1(data).hexdigest()[:8]
        print(f"{file.name} ({len(data)} bytes, {digest}): {time.process_time() - started:.2f} s")
    return failed


if __name__ == "__main__":
    sys.exit(main())
