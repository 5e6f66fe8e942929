"""No power cut loses what was flushed, and the judge who says so would see it if one did."""

from __future__ import annotations

import logging
import random
from itertools import count
from unittest.mock import patch

import pytest

from tests.crash.judge import Judge, Violation, judge
from tests.crash.mutants import COWD_ONLY, FREE, HOSTED_ONLY, MUTANTS, mutated, rebuilt
from tests.crash.workloads import KINDS, continued, session, small

#: Distinct states judged of each of 17 kinds: 11,900 in all.
ENOUGH = 700
#: Kinds where what an order of steps prevents is easily seen: a parent's bytes show what zeros would hide.
HARD = ("child v2", "child v2 without tables, split", "sparse v2")
HARD_COWD = ("COWD child", "COWD")
#: States within which every mutant must be found out.
BOUND = 8000


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """That a twin is used is said by every other state."""
    caplog.set_level(logging.ERROR, "nbd_vmdk")


@pytest.mark.parametrize("kind", KINDS)
def test_power_cuts(kind: str) -> None:
    judged = 0
    for seed in count():
        rng = random.Random(f"judge {kind} {seed}")
        try:
            with small(rng):
                judged += len(judge(session(kind, seed), rng, most=ENOUGH - judged))
        except AssertionError as error:
            error.add_note(f"kind {kind}, seed {seed}")
            raise
        if judged >= ENOUGH:
            return


@pytest.mark.parametrize("kind", KINDS)
def test_power_cuts_after_power_cuts(kind: str) -> None:
    """What a cut has left is written to, unrepaired, until the next cut."""
    rng = random.Random(f"again {kind}")
    with small(rng):
        first = session(kind, "again", requests=25)
        left = judge(first, rng, samples=1, others=2, most=40)
        for state in rng.sample(left, 2):
            judge(continued(state.files, rng), rng, samples=2, others=3, most=60)


@pytest.mark.parametrize(
    ("mutant", "kinds"),
    [
        *((mutant, HARD) for mutant in MUTANTS if mutant not in COWD_ONLY),
        *((mutant, HARD_COWD) for mutant in MUTANTS if mutant not in HOSTED_ONLY),
    ],
    ids=lambda each: each if isinstance(each, str) else "COWD" if each is HARD_COWD else "hosted",
)
def test_judge_finds_out(mutant: str, kinds: tuple[str, ...]) -> None:
    """And says what is wrong, though with some mutants other things are, too."""
    judged = 0
    wanted = MUTANTS[mutant][-1]
    for number in range(100):
        kind = kinds[number % len(kinds)]
        rng = random.Random(f"{mutant} {number}")
        with small(rng), mutated(mutant), patch.object(Judge, "free_sector", wanted == FREE):
            try:
                judged += len(judge(session(kind, f"{mutant} {number}"), rng, samples=3, others=5))
            except Violation as violation:
                if any(sign in str(violation) for sign in wanted):
                    return
        assert judged <= BOUND, f"not found out in {judged} states"
    pytest.fail("not found out")


def test_mutants_differ_from_the_engine_in_the_order_alone() -> None:
    """The same commit, its steps in the right order, is without fault."""
    for kind in (*HARD, *HARD_COWD):
        rng = random.Random(f"rebuilt {kind}")
        with small(rng), rebuilt():
            judge(session(kind, "rebuilt"), rng, most=150)
