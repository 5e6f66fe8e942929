"""
Damage of tables and of their twins: a repair never makes wrong bytes of an error.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbd_vmdk.disk import open_disk
from nbd_vmdk.errors import VmdkError
from nbd_vmdk.ops.check.findings import Finding, Repair
from nbd_vmdk.ops.check.verdicts import CASES, State, Verdict
from nbd_vmdk.ops.repair import apply_repair, undo_repair
from tests.breaking import CONTENT, GRAIN, set_gte, sparse
from tests.images import cut, desc
from tests.images.content import KIB, SECTOR, Content
from tests.images.desc import Image

SIZE = GRAIN * SECTOR


def child_with_zeros(folder: str) -> Image:
    base = desc.monolithic_sparse(folder, "base", Content.random(CONTENT.size, seed=4, density=1.0))
    top = Content.random(CONTENT.size, seed=9, grain=4 * KIB, touched=150)
    return desc.monolithic_sparse(folder, "disk", top, grain_sectors=GRAIN, parent=base, zero_gte=True)


def grains(path: str) -> list[bytes | None]:
    """What each grain reads as, None where that raises."""
    try:
        disk = open_disk(path, locks=False)
    except VmdkError:
        return [None] * -(-CONTENT.size // SIZE)
    found: list[bytes | None] = []
    with disk:
        for at in range(0, disk.size, SIZE):
            try:
                found.append(disk.pread(min(SIZE, disk.size - at), at))
            except VmdkError:
                found.append(None)
    return found


# The table of cases


def asks(finding: Finding) -> bool:
    return isinstance(finding.repair, Repair) and finding.repair.asks is not None


def entries(image: Image, grain: int) -> tuple[int, int]:
    extent = image.hosted()
    one, two = (extent.read_gtes([grain], redundant=redundant)[0] for redundant in (False, True))
    return one, two


def entry_of(image: Image, state: State, grain: int) -> int:
    """An entry of that state for a grain that has data."""
    extent = image.hosted()
    own, other = extent.grains[grain], extent.grains[max(extent.grains)]
    end = os.path.getsize(image.path) // SECTOR
    return {
        State.HOLE: 0,
        State.ZEROS: 1,
        State.STRAY: 1,
        State.GRAIN: own,
        State.SKEWED: own + 3,
        State.SHARED: other,
        State.CUT: end - 3,
        State.PAST: (end // GRAIN + 4) * GRAIN,
        State.NOWHERE: 5,
    }[state]


STATES = [state for state in State if state is not State.NONE]
#: But for entries that are the same in both, and those that differ by what the header declares.
PAIRS = [
    (state, twin)
    for state in STATES
    for twin in STATES
    if {state, twin} != {State.ZEROS, State.STRAY} and (state is not twin or state in (State.PAST, State.CUT))
]


@pytest.mark.parametrize("child", [False, True], ids=["base", "child"])
@pytest.mark.parametrize(
    ("state", "twin"), PAIRS, ids=[f"{state.name}-{twin.name}".lower() for state, twin in PAIRS]
)
def test_cases(tmp_path: Path, state: State, twin: State, child: bool) -> None:
    """A grain that is lost if neither of the entries names it: what is done is what the table says."""
    declared = State.ZEROS in (state, twin)
    parent = desc.monolithic_sparse(str(tmp_path), "base", Content(CONTENT.size)) if child else None
    image = sparse(str(tmp_path), gap_sectors=GRAIN, zero_gte=declared, parent=parent)
    grain = sorted(image.hosted().grains)[7]
    values = entry_of(image, state, grain), entry_of(image, twin, grain)
    for copy, value in zip(("gt", "rgt"), values, strict=True):
        set_gte(image, grain, value, copy)
    verdict = list(Verdict)[CASES[state, twin]]
    if verdict is Verdict.DOUBT:
        verdict = Verdict.LEAVE if child else Verdict.KEEP
    elif verdict is Verdict.BASE:
        verdict = Verdict.KEEP if child else Verdict.TWIN
    elif verdict is Verdict.SURE:  # the grain's own place is named by nobody
        verdict = Verdict.LEAVE if state is State.SHARED else Verdict.ASK
    plan, _after = apply_repair(image.path)
    found = entries(image, grain)
    if verdict is Verdict.KEEP:
        assert found == (values[0], values[0])
    elif verdict in (Verdict.TWIN, Verdict.CLEAN):
        assert found == (values[1], values[1])
    else:
        assert found == values
        named = [finding for finding in plan.report.findings if finding.guest == grain * SIZE]
        assert named
        if verdict is not Verdict.LEAVE:
            (finding,) = [finding for finding in named if finding.severity == "error"]
            assert asks(finding)
            if plan.chosen:
                undo_repair(image.path)
            apply_repair(image.path, also=[finding.slug])
            if verdict is Verdict.ASK:
                assert entries(image, grain)[0] == values[1]
            elif verdict is Verdict.LOST:
                assert entries(image, grain) == (0, 0)
            else:
                assert entries(image, grain)[0] == values[state is not State.CUT]
                assert os.path.getsize(image.path) // SECTOR == entries(image, grain)[0] + GRAIN


@pytest.mark.parametrize("state", [State.SHARED, State.NOWHERE], ids=lambda state: state.name)
@pytest.mark.parametrize("unexplained", [False, True], ids=["compact", "unexplained"])
def test_twin_without_grain_is_believed_if_nothing_contradicts(
    tmp_path: Path, state: State, unexplained: bool
) -> None:
    """An entry with a place that it can't have becomes a hole again, but not if a grain is unnamed."""
    image = sparse(str(tmp_path))
    known = sorted(image.hosted().grains)
    hole = next(index for index in range(900) if index not in known)
    wanted = image.visible.read()
    if unexplained:
        set_gte(image, known[4], 0)
        wanted = wanted[: known[4] * SIZE] + bytes(SIZE) + wanted[(known[4] + 1) * SIZE :]
    value = image.hosted().grains[known[7]] if state is State.SHARED else 5
    set_gte(image, hole, value, "gt")
    _plan, after = apply_repair(image.path)
    if unexplained:
        assert entries(image, hole) == (value, 0)
        assert after.count_errors
    else:
        assert entries(image, hole) == (0, 0)
        assert not after.findings
        assert b"".join(filter(None, grains(image.path))) == wanted


def test_grain_that_was_cut_off_is_asked_for(tmp_path: Path) -> None:
    """The file ends too early and the twin was wiped: that there was no grain is for the user to say."""
    image = sparse(str(tmp_path))
    extent = image.hosted()
    last = max(extent.grains, key=extent.grains.__getitem__)
    cut(image.path, -2 * GRAIN * SECTOR)
    set_gte(image, last, 0, "rgt")
    plan, _after = apply_repair(image.path)
    finding = next(finding for finding in plan.report.findings if finding.guest == last * SIZE)
    assert asks(finding)
    assert "twin says that there is no grain" in finding.what
    assert entries(image, last) == (extent.grains[last], 0)


def test_two_grains_offered_one_place(tmp_path: Path) -> None:
    """Twins that name the same place for two grains: neither is believed."""
    image = sparse(str(tmp_path))
    one, other = sorted(image.hosted().grains)[3:5]
    place = image.hosted().grains[one]
    for grain in (one, other):
        set_gte(image, grain, 5, "gt")
        set_gte(image, grain, place, "rgt")
    plan, after = apply_repair(image.path)
    assert not plan.chosen
    assert after.count_errors == 2


def test_hole_and_zeros_over_a_parent(tmp_path: Path) -> None:
    """Where both are in use, a twin's hole may be a wiped entry that hid the parent."""
    image = child_with_zeros(str(tmp_path))
    hole = next(index for index in range(900) if index not in image.hosted().grains)
    set_gte(image, hole, 0, "rgt")
    set_gte(image, hole, 5, "gt")
    plan, after = apply_repair(image.path)
    assert not plan.chosen
    assert after.count_errors == 1
    plan, after = apply_repair(image.path, also=["grain-entry"])
    assert "the parent's data" in (plan.chosen[0][0].asks or "")
    assert not after.count_errors
