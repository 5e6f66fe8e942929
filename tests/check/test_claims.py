"""Who uses what of a file, compared with looking at every sector."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nbd_vmdk.ops.check.claims import Claims
from nbd_vmdk.ops.check.scan import merged

SECTORS = 400


@given(
    unit=st.sampled_from([1, 2, 8, 16]),
    starts=st.lists(st.integers(0, SECTORS - 1), max_size=30),
    others=st.lists(st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 40)), max_size=4),
    room=st.sampled_from([3, 7, 50, 1000]),
    piece=st.sampled_from([1, 4, 64]),
)
def test_conflicts_and_gaps_are_exact(
    unit: int, starts: list[int], others: list[tuple[int, int]], room: int, piece: int
) -> None:
    begins, ends = merged([(begin, begin + length) for begin, length in others])
    conflicts: list[int] = []
    gaps: list[tuple[int, int]] = []
    reached = 0
    with (
        patch("nbd_vmdk.ops.check.claims._MAX_BYTES", room),
        patch("nbd_vmdk.ops.check.claims._PIECE", piece),
    ):
        for claims in Claims.passes(unit, SECTORS):
            claims.add(np.array(starts[:10], dtype=np.int64))
            claims.add(np.array(starts[10:], dtype=np.int64))
            conflicts += claims.conflicts()
            found, reached = claims.gaps(begins, ends, reached)
            gaps += found
    if SECTORS - reached >= unit:
        gaps.append((reached, SECTORS))

    overlapping = {
        max(one, two) // unit
        for at, one in enumerate(starts)
        for two in starts[at + 1 :]
        if abs(one - two) < unit
    }
    if not overlapping:
        assert conflicts == []
    else:
        # Of three in a heap one is told at least, and nothing that overlaps with nobody.
        touched = {value // unit for value in starts}
        assert conflicts
        assert set(conflicts) <= touched
        if len(set(starts)) == len(starts) and len({start // unit for start in starts}) == len(starts):
            assert set(conflicts) == overlapping

    used = np.zeros(SECTORS + max(unit, 40), dtype=bool)
    for start in starts:
        used[start : start + unit] = True
    for begin, length in others:
        used[begin : begin + length] = True
    free = []
    at = 0
    while at < SECTORS:
        if used[at]:
            at += 1
            continue
        end = at
        while end < SECTORS and not used[end]:
            end += 1
        if end - at >= unit:
            free.append((at, end))
        at = end
    if not overlapping:  # else a bin remembers one of two starts, and nobody asks for gaps
        assert gaps == free


def test_a_hole_of_terabytes_costs_nothing() -> None:
    sectors = 1 << 37
    passes = 0
    for claims in Claims.passes(8, sectors):
        passes += 1
        claims.add(np.array([5, 1 << 30, (1 << 37) - 8], dtype=np.int64))
        assert claims.conflicts() == []
    assert passes == 3
