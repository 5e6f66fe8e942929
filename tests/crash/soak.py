"""
Power cuts by the million: sessions with seeds from the clock, until enough states are judged.

    python -m tests.crash.soak [--states N] [--jobs N]         stops at the first violation, prints its seed
    python -m tests.crash.soak --kind KIND --seed SEED         one session again
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice

from tests.crash.judge import Violation, judge
from tests.crash.workloads import KINDS, continued, session, small


def one(kind: str, seed: str) -> tuple[int, str | None]:
    """Judge a session, and one that goes on after one of its cuts: how many states, and what was wrong."""
    logging.getLogger("nbd_vmdk").setLevel(logging.ERROR)
    rng = random.Random(f"soak {kind} {seed}")
    with small(rng):
        try:
            found = judge(session(kind, seed, rng.choice((20, 40, 80))), rng, samples=rng.choice((4, 20)))
            more = judge(continued(rng.choice(found).files, rng), rng, samples=3, others=5)
        except Violation as violation:
            return 0, str(violation)
        except AssertionError as error:
            return 0, f"without a power cut: {error}"
    return len(found) + len(more), None


def work() -> Iterator[tuple[str, str]]:
    """Kinds in turn, with seeds that no run has had."""
    start = time.time_ns()
    number = 0
    while True:
        for kind in KINDS:
            yield kind, f"{start}-{number}"
        number += 1


def main() -> int:
    parser = argparse.ArgumentParser(description="judge states after simulated power cuts")
    parser.add_argument("--states", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--seed")
    args = parser.parse_args()
    if args.kind and args.seed:
        judged, wrong = one(args.kind, args.seed)
        print(wrong or f"{judged} states, no violation")
        return int(wrong is not None)
    total, told, begin = 0, 0, time.monotonic()
    jobs = work()
    with ProcessPoolExecutor(args.jobs) as pool:
        while total < args.states:
            running = {pool.submit(one, *job): job for job in islice(jobs, args.jobs * len(KINDS))}
            for future in as_completed(running):
                judged, wrong = future.result()
                total += judged
                if wrong is not None:
                    kind, seed = running[future]
                    pool.shutdown(cancel_futures=True)
                    print(f'VIOLATION: --kind "{kind}" --seed {seed}\n{wrong}')
                    return 1
            if total - told >= 10_000 or total >= args.states:
                told = total
                print(f"{total} states, {time.monotonic() - begin:.0f} s, no violation", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
