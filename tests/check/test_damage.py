"""
Damage of tables, directories and the fields that name them: a repair never makes wrong bytes of an error.

Two spots of an image are damaged.  Before the repair a grain reads as it should, reads wrong, or raises.
After a repair for which nothing was asked it reads as it should if it did before, and where it raised it
never reads wrong.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk.errors import VmdkError
from nbd_vmdk.opening import open_disk
from nbd_vmdk.ops.check.findings import Finding, Repair
from nbd_vmdk.ops.check.runner import Report
from nbd_vmdk.ops.check.verdicts import CASES, State, Verdict
from nbd_vmdk.ops.repair import apply_repair, undo_repair
from tests.breaking import CONTENT, GRAIN, child_of_sparse, delta, set_gte, sparse, streamed
from tests.images import cut, desc, peek, poke
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image
from tests.images.hosted import HostedExtent

SIZE = GRAIN * SECTOR


def child_with_zeros(folder: str) -> Image:
    base = desc.monolithic_sparse(folder, "base", Content.random(CONTENT.size, seed=4, density=1.0))
    top = Content.random(CONTENT.size, seed=9, grain=4 * KIB, touched=150)
    return desc.monolithic_sparse(folder, "disk", top, grain_sectors=GRAIN, parent=base, zero_gte=True)


IMAGES: dict[str, Callable[[str], Image]] = {
    "base": sparse,
    "child": child_of_sparse,
    "zeros": child_with_zeros,
    "shuffled": lambda folder: sparse(folder, shuffle_grains=5),
    "gaps": lambda folder: sparse(folder, gap_sectors=GRAIN),
    "late-tables": lambda folder: sparse(folder, tables_last=True),
    "few-tables": lambda folder: sparse(folder, preallocate_tables=False),
    "misaligned": lambda folder: sparse(folder, misalign=3),
}


class Built(dict[str, tuple[Path, Image]]):
    """The images by name, each in a folder of its own, to be copied."""

    def __repr__(self) -> str:
        return "the images"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """All images."""
    images = Built()
    for name, build in IMAGES.items():
        folder = tmp_path_factory.mktemp(name)
        images[name] = folder, build(str(folder))
    return images


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


# Damage


PLACES = st.sampled_from(
    ["hole", "zeros", "past", "past-askew", "far", "inside", "table", "other", "half", "askew", "cut"]
)
RUNS = st.one_of(
    st.builds(
        lambda byte, length: byte * length, st.sampled_from([b"\0", b"\xff", b"\xa5"]), st.integers(1, 2048)
    ),
    st.integers(0, 1 << 30).flatmap(
        lambda seed: st.builds(random.Random(seed).randbytes, st.integers(1, 2048))
    ),
)
COPIES = st.sampled_from(["gt", "rgt"])
SPOTS = st.one_of(
    st.tuples(st.just("gte"), COPIES, st.integers(0, 400), st.booleans(), PLACES),
    st.tuples(st.just("gde"), st.sampled_from(["gd", "rgd"]), st.integers(0, 2), PLACES, st.integers(0, 99)),
    st.tuples(st.just("run"), st.sampled_from(["gt", "rgt", "gd", "rgd"]), st.integers(0, 31), RUNS),
    st.tuples(st.just("field"), st.sampled_from([48, 56, 64]), PLACES, st.integers(0, 99)),
)


def value_of(path: str, extent: HostedExtent, name: str, number: int, own: int) -> int:
    """A value of that sort for an entry whose own is ``own``; ``number`` chooses among several."""
    end = os.path.getsize(path) // SECTOR
    others = sorted(extent.grains.values())
    other = others[number % len(others)]
    return {
        "hole": 0,
        "zeros": 1,
        "past": (end // GRAIN + 5 + number) * GRAIN,
        "past-askew": (end // GRAIN + 5 + number) * GRAIN + 3,
        "far": 0xFEDCBA98,
        "inside": 5,
        "table": extent.gd[number % 2] or 5,
        "other": other,
        "half": other + GRAIN // 2,
        "askew": own + 3 if own else other + 1,
        "cut": end - 3,
    }[name]


def damage(path: str, extent: HostedExtent, spot: tuple[Any, ...]) -> None:
    match spot:
        case "gte", copy, number, used, name:
            known = sorted(extent.grains) if used else range(900)
            grain = known[number % len(known)]
            if (extent.rgd if copy == "rgt" else extent.gd)[grain // 512]:
                value = value_of(path, extent, name, number, extent.grains.get(grain, 0))
                poke(path, extent.gte_at(grain, redundant=copy == "rgt"), value.to_bytes(4, "little"))
        case "gde", copy, table, name, number:
            value = value_of(path, extent, name, number, extent.gd[table])
            poke(path, extent.gde_at(table, redundant=copy == "rgd"), value.to_bytes(4, "little"))
        case "run", copy, place, data:
            directory = extent.rgd if copy.startswith("r") else extent.gd
            begin = (extent.rgd_sector if copy.startswith("r") else extent.gd_sector) * SECTOR
            length = 4 * len(directory)
            if copy.endswith("gt"):
                begin, length = directory[place % len(directory)] * SECTOR, 2048
            at = place * 64 % length
            if begin:
                poke(path, begin + at, data[: length - at])
        case "field", at, name, number:
            own = int.from_bytes(peek(path, at, 8), "little")
            poke(path, at, value_of(path, extent, name, number, own).to_bytes(8, "little"))


def case(built: Built, name: str, spots: list[tuple[Any, ...]], folder: str) -> str:
    """A copy of one of the images, damaged."""
    source, image = built[name]
    for file in source.iterdir():
        shutil.copy(file, folder)
    path = os.path.join(folder, "disk.vmdk")
    for spot in spots:
        damage(path, image.hosted(), spot)
    return path


def agrees_with_qemu(path: str, wanted: bytes) -> None:
    done = subprocess.run(["qemu-img", "check", "-q", "-f", "vmdk", path], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    target = f"{path}.raw"
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, target], check=True)
    assert Path(target).read_bytes() == wanted


def told(report: Report, index: int) -> bool:
    """Whether an error in a report names a grain, or the table that it belongs to."""
    at = index * SIZE
    return any(
        finding.severity == "error"
        and (
            finding.guest == at
            or f"guest offset {at}" in finding.what
            or (finding.slug == "directory-entry" and finding.table == index // 512)
        )
        for finding in report.findings
    )


@settings(max_examples=int(os.environ.get("DAMAGES", "120")), deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(IMAGES)), spots=st.lists(SPOTS, min_size=1, max_size=2))
def test_no_error_becomes_wrong_data(built: Built, name: str, spots: list[tuple[Any, ...]]) -> None:
    """What is wrong after a repair and was not before is told; if all was asked for, it was told before."""
    whole = built[name][1].visible.read()
    wanted = [whole[at : at + SIZE] for at in range(0, len(whole), SIZE)]
    with tempfile.TemporaryDirectory() as folder:
        path = case(built, name, spots, folder)
        spoilt = Path(path).read_bytes()
        before = grains(path)
        plan, report = apply_repair(path)
        after = grains(path)
        for index, (was, found, right) in enumerate(zip(before, after, wanted, strict=True)):
            if found not in (right, None) and was in (right, None):
                # The mending of one spot may show what another one did.
                assert told(report, index), f"grain {index} is wrong now"
        lost = {index for index, found in enumerate(after) if found is None}
        assert not lost or report.count_errors
        if shutil.which("qemu-img") and not report.count_errors:
            agrees_with_qemu(path, b"".join(found for found in after if found is not None))
        if plan.chosen:
            undo_repair(path)
        assert Path(path).read_bytes() == spoilt

        asked = {finding.slug for finding in plan.report.findings if asks(finding)}
        if asked and not any(finding.more for finding in plan.report.findings):
            plan, report = apply_repair(path, also=asked)
            for index, (was, found, right) in enumerate(zip(before, grains(path), wanted, strict=True)):
                if found not in (right, None) and was in (right, None):
                    assert told(plan.report, index) or told(report, index), f"grain {index} is lost unasked"


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
    elif verdict is Verdict.WIPED:  # there is more that nobody names
        verdict = Verdict.LEAVE
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


def test_a_wiped_entry_that_hid_the_parent(tmp_path: Path) -> None:
    """The table says "hole" and its twin "zeros": an error, and neither is made what the other says."""
    image = child_with_zeros(str(tmp_path))
    (grain, *_) = [grain for grain, value in enumerate(zeros_of(image)) if value]
    wanted = image.visible.read()
    set_gte(image, grain, 0, "gt")
    plan, after = apply_repair(image.path)
    assert not plan.chosen
    assert [(finding.slug, finding.guest) for finding in after.findings] == [("tables-differ", grain * SIZE)]
    assert after.count_errors == 1
    _plan, after = apply_repair(image.path, also=["tables-differ"])
    assert not after.findings
    assert b"".join(found or b"" for found in grains(image.path)) == wanted


def test_wiped_entries(tmp_path: Path) -> None:
    """In a file with room that nobody names a wiped sector is mended, but one entry alone is asked about."""
    image = sparse(str(tmp_path), gap_sectors=GRAIN)
    extent = image.hosted()
    wanted = image.visible.read()
    poke(image.path, extent.gd[0] * SECTOR, bytes(SECTOR))
    apply_repair(image.path)
    assert b"".join(found or b"" for found in grains(image.path)) == wanted
    undo_repair(image.path)
    poke(image.path, extent.gd[0] * SECTOR, peek(image.path, extent.rgd[0] * SECTOR, SECTOR))

    # The twin's entry of a hole names a gap, and the table's of a grain is lost: both look alike.
    hole = next(index for index in range(900) if index not in extent.grains)
    set_gte(image, hole, min(extent.grains.values()) + GRAIN, "rgt")
    known = sorted(extent.grains)[5]
    set_gte(image, known, 0, "gt")
    plan, after = apply_repair(image.path)
    assert not plan.chosen
    told = {finding.guest: finding for finding in after.findings if finding.severity == "error"}
    assert sorted(told) == sorted((hole * SIZE, known * SIZE))
    assert all(asks(finding) for finding in told.values())


def zeros_of(image: Image) -> list[bool]:
    """Which of the first grains are declared to be zeros."""
    return [value == 1 for value in image.hosted().read_gtes(range(900))]


# What is no table


def test_a_field_that_leads_into_a_grain_costs_nothing(tmp_path: Path) -> None:
    """A directory's place, or a table's, that damage moved onto a grain: the grain stays as it is."""
    for number, spot in enumerate(
        (
            ("field", 48, "other", 3),
            ("field", 56, "other", 3),
            ("gde", "gd", 1, "other", 40),
            ("gde", "rgd", 1, "other", 40),
            ("gde", "gd", 1, "half", 40),
            ("gde", "rgd", 2, "half", 40),
        )
    ):
        (tmp_path / str(number)).mkdir()
        image = sparse(str(tmp_path / str(number)))
        damage(image.path, image.hosted(), spot)
        _plan, after = apply_repair(image.path)
        assert not after.findings, spot
        assert b"".join(found or b"" for found in grains(image.path)) == image.visible.read(), spot


def test_a_lost_table_and_a_wiped_twin(tmp_path: Path) -> None:
    """A directory entry leads into a grain, and the twin has lost grains: its holes are not just believed."""
    image = sparse(str(tmp_path))
    extent = image.hosted()
    damage(image.path, extent, ("gde", "gd", 1, "half", 5))
    poke(image.path, extent.rgd[1] * SECTOR, bytes(2048))
    before = grains(image.path)
    plan, after = apply_repair(image.path)
    finding = next(finding for finding in plan.report.findings if finding.slug == "directory-entry")
    assert asks(finding)
    assert after.count_errors
    for was, found in zip(before, grains(image.path), strict=True):
        assert was == found or was is not None


def test_a_directory_with_one_table_left_makes_no_layout(tmp_path: Path) -> None:
    """Of a directory all but one entry are lost, and that one leads into a grain: it is where none was."""
    image = sparse(str(tmp_path))
    extent = image.hosted()
    for table in (1, 2):
        poke(image.path, extent.gde_at(table, redundant=True), b"\xff\xff\xff\xfe")
    damage(image.path, extent, ("gde", "rgd", 0, "half", 30))
    apply_repair(image.path)
    assert b"".join(found or b"" for found in grains(image.path)) == image.visible.read()


# Other kinds


def read_or_none(path: str, unit: int) -> list[bytes | None]:
    """What each unit reads as, None where that raises."""
    found: list[bytes | None] = []
    try:
        with open_disk(path, locks=False) as disk:
            for at in range(0, disk.size, unit):
                try:
                    found.append(disk.pread(min(unit, disk.size - at), at))
                except VmdkError:
                    found.append(None)
    except VmdkError:
        return [None]
    return found


@pytest.mark.parametrize("where", ["grain", "middle"])
def test_cowd_table_that_is_a_grain(tmp_path: Path, where: str) -> None:
    """A directory entry leads into grains: they stay as they are, and what the table mapped is lost."""
    image = delta()(str(tmp_path))
    extent = image.cowd()
    wanted = image.visible.read()
    named = [table for table, entry in enumerate(extent.gd) if entry]
    sectors = sorted(extent.grains.values())
    place = sectors[3] if where == "grain" else sectors[len(sectors) // 2]
    poke(extent.path, extent.gde_at(named[-1]), place.to_bytes(4, "little"))
    before = Path(extent.path).read_bytes()
    _plan, after = apply_repair(image.path)
    assert [finding.slug for finding in after.findings] == ["directory-entry"]
    assert "what lies there is no table" in after.findings[0].what
    assert Path(extent.path).read_bytes() == before
    found = read_or_none(image.path, SECTOR)
    first = named[-1] * 4096
    assert found[:first] == [wanted[at * SECTOR : (at + 1) * SECTOR] for at in range(first)]


@pytest.mark.parametrize("length", [4, 8, 1500], ids=["one-entry", "two-entries", "all"])
def test_stream_that_ends_in_zeros(tmp_path: Path, length: int) -> None:
    """The footer is gone, and of the directory a part or all: no table is taken to be missing for that."""
    image = streamed()(str(tmp_path))
    extent = image.stream()
    end = extent.gd_sector * SECTOR + 4 * len(extent.gd)
    poke(image.path, end - min(length, 4 * len(extent.gd)), bytes(os.path.getsize(image.path) - end + length))
    cut(image.path, extent.end)
    _plan, after = apply_repair(image.path)
    assert not after.count_errors
    assert b"".join(found or b"" for found in read_or_none(image.path, MIB)) == image.visible.read()


def test_stream_whose_header_passes_over_records(tmp_path: Path) -> None:
    """overHead names a record in the middle: tables made anew have all grains, or none are made."""
    image = streamed()(str(tmp_path))
    extent = image.stream()
    third = sorted(record.sector for record in extent.records.values())[2]
    poke(image.path, 64, third.to_bytes(8, "little"))
    poke(image.path, extent.gd_sector * SECTOR, b"\xa5" * (4 * len(extent.gd)))
    apply_repair(image.path)
    wanted = image.visible.read()
    for at, found in enumerate(read_or_none(image.path, MIB)):
        assert found in (None, wanted[at * MIB : (at + 1) * MIB])


def test_salvage_of_a_stream_whose_header_passes_over_records(tmp_path: Path) -> None:
    """The same in a file that broke off as well, where only the records tell of the grains."""
    image = streamed()(str(tmp_path))
    extent = image.stream()
    later = sorted(record.sector for record in extent.records.values())[20]
    poke(image.path, 64, later.to_bytes(8, "little"))
    cut(image.path, (extent.gd_sector - 1) * SECTOR)
    with open_disk(image.path, salvage=True) as disk:
        assert disk.pread(disk.size, 0) == image.visible.read()


def test_entries_of_a_table_are_no_directory(tmp_path: Path) -> None:
    """gdOffset names the first table, whose entries are as regular as a directory: no record is touched."""
    image = streamed(layout="B")(str(tmp_path))
    extent = image.stream()
    first = min(record.sector for record in extent.records.values())
    at = extent.gd[0] * SECTOR
    wiped = bytes(4) + peek(image.path, at + 4, 4)  # what is left looks like a directory with a hole
    for start in (wiped, peek(image.path, at, 8)):
        poke(image.path, at, start)
        poke(image.path, 56, extent.gd[0].to_bytes(8, "little"))
        records = Path(image.path).read_bytes()[first * SECTOR :]
        apply_repair(image.path)
        assert Path(image.path).read_bytes()[first * SECTOR :].startswith(records)
