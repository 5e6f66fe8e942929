"""
Bytes of a file that two places of a disk share: such a disk can be read, and is not opened for writing.
"""

from __future__ import annotations

from array import array
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_vmdk.errors import BadField, Unreadable, VmdkError, WriteRefused
from nbd_vmdk.extents import shared
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.extents.shared import Slots
from nbd_vmdk.opening import open_disk
from nbd_vmdk.ops.check.findings import Severity
from nbd_vmdk.ops.check.runner import check_image
from tests.images import desc, peek, poke
from tests.images.content import GIB, KIB, MIB, SECTOR, Content
from tests.images.desc import Image, Row

SOME = Content.random(2 * MIB, seed=11)


def overlaps(starts: list[int], grain: int) -> bool:
    starts = sorted(starts)
    return any(after - before < grain for before, after in pairwise(starts))


@given(
    shift=st.sampled_from((0, 1, 3, 7, 8, 9)),
    codes=st.sampled_from((1, 2)),
    tables=st.lists(
        st.lists(st.tuples(st.integers(0, 12), st.sampled_from((0, 0, 0, 1, 5, 200))), max_size=4), max_size=4
    ),
)
def test_slots_find_what_overlaps(shift: int, codes: int, tables: list[list[tuple[int, int]]]) -> None:
    """Against comparing all with all: aligned grains and others, in the first slot and behind it."""
    grain = 1 << shift
    slots, slower = Slots(20 * grain, grain, 4, codes), Slots(20 * grain, grain, 4, codes)
    starts: list[int] = []
    met = None
    for entries in tables:
        table = array("I", [slot * grain + within % grain for slot, within in entries])
        starts += [entry for entry in table if entry >= codes]
        slots.add(table, min(filter(None, table), default=0))
        if met is None:
            met = slower.enter_until_shared(table)
    assert slots.shared() == (met is not None) == overlaps(starts, grain)


def test_no_slots_for_very_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MOST_SLOTS", 100)
    slots = Slots(100 * 8, 8, 2, 2)
    slots.add(array("I", [8, 8]), 8)
    assert not slots.shared()
    assert slots.enter_until_shared(array("I", [8, 8])) is None


@pytest.mark.parametrize("size", [SOME.size, 200 * GIB])
@pytest.mark.parametrize("redundant", [True, False])
def test_grains_in_one_place(tmp_path: Path, size: int, *, redundant: bool) -> None:
    """A file that was closed cleanly, too; the error names a grain and what to do."""
    content = SOME.resized(size)
    image = desc.monolithic_sparse(str(tmp_path), "disk", content, rgd=redundant)
    extent = image.hosted()
    one, two = sorted(extent.grains)[2:4]
    for copy in {False, redundant}:
        entry = peek(image.path, extent.gte_at(one, redundant=copy), 4)
        poke(image.path, extent.gte_at(two, redundant=copy), entry)
    with pytest.raises(BadField, match=f"the table entry of grain {two} is .*another grain") as caught:
        open_disk(image.path, writable=True)
    assert "nbd-vmdk check" in (caught.value.hint or "")
    with open_disk(image.path) as disk:
        assert disk.pread(64 * KIB, two * 64 * KIB) == disk.pread(64 * KIB, one * 64 * KIB)


def test_grains_in_one_place_of_a_delta(tmp_path: Path) -> None:
    content = Content.random(2 * MIB, seed=4, grain=4 * KIB, touched=20)
    image = desc.vmfs_sparse(str(tmp_path), "disk", content)
    extent = image.cowd()
    one, two = sorted(extent.grains)[5:7]
    poke(extent.path, extent.gte_at(two), peek(extent.path, extent.gte_at(one), 4))
    with pytest.raises(BadField, match="another grain"):
        open_disk(image.path, writable=True)


def pieces(folder: Path, *lines: str) -> str:
    """A disk of the given extent lines over disk-flat.vmdk."""
    (folder / "disk-flat.vmdk").write_bytes(SOME.read())
    path = folder / "disk.vmdk"
    path.write_bytes(desc.descriptor("custom", lines, ddb={}).ljust(4 * SECTOR, b"\n"))
    return str(path)


@pytest.mark.parametrize(
    "lines",
    [
        ('RW 100 FLAT "disk-flat.vmdk" 0', 'RW 100 FLAT "disk-flat.vmdk" 99'),
        ('RW 100 FLAT "disk-flat.vmdk" 0', 'RW 100 FLAT "./disk-flat.vmdk" 0'),
        ('RDONLY 100 FLAT "disk-flat.vmdk" 0', 'RW 10 FLAT "disk-flat.vmdk" 50'),
        ('RW 10 FLAT "disk-flat.vmdk" 50', 'RDONLY 100 FLAT "disk-flat.vmdk" 0'),
        ('RW 9 FLAT "disk-flat.vmdk" 0', 'RDONLY 9 FLAT "disk-flat.vmdk" 5', 'RW 9 FLAT "disk-flat.vmdk" 9'),
        ('RW 100 FLAT "disk-flat.vmdk" 0', 'RW 2 FLAT "disk.vmdk" 2'),
    ],
)
def test_lines_that_share_bytes(tmp_path: Path, lines: tuple[str, ...]) -> None:
    path = pieces(tmp_path, *lines)
    with open_disk(path) as disk:
        disk.pread(disk.size, 0)
    before = (tmp_path / "disk.vmdk").read_bytes()
    with pytest.raises(WriteRefused) as caught:
        open_disk(path, writable=True)
    assert "-r" in (caught.value.hint or "")
    assert (tmp_path / "disk.vmdk").read_bytes() == before
    assert "extents-overlap" in {finding.slug for finding in check_image(path).findings}


@pytest.mark.parametrize(
    "lines",
    [
        ('RW 100 FLAT "disk-flat.vmdk" 0', 'RW 100 FLAT "disk-flat.vmdk" 100'),
        ('RW 100 FLAT "disk-flat.vmdk" 100', "RW 9 ZERO", 'RW 100 FLAT "disk-flat.vmdk" 0'),
        (
            'RDONLY 100 FLAT "disk-flat.vmdk" 0',
            'RDONLY 100 FLAT "disk-flat.vmdk" 50',
            'RW 9 FLAT "disk-flat.vmdk" 200',
        ),
        ('RW 100 FLAT "disk-flat.vmdk" 0', 'RDONLY 2 FLAT "disk.vmdk" 2'),
    ],
)
def test_lines_that_share_a_file(tmp_path: Path, lines: tuple[str, ...]) -> None:
    with open_disk(pieces(tmp_path, *lines), writable=True) as disk:
        assert disk.writable


@pytest.mark.parametrize("other", ["./disk-flat.vmdk", "linked.vmdk", "second.vmdk"])
@pytest.mark.parametrize("access", ["RW", "RDONLY"])
def test_one_file_by_two_names(tmp_path: Path, other: str, access: str) -> None:
    """Both lines write and read one open file, which is no user of itself; it opens again when closed."""
    path = pieces(tmp_path, f'{access} 8 FLAT "{other}" 8', 'RW 8 FLAT "disk-flat.vmdk" 0')
    flat = tmp_path / "disk-flat.vmdk"
    (tmp_path / "linked.vmdk").symlink_to(flat.name)
    (tmp_path / "second.vmdk").hardlink_to(flat)
    for byte in (b"1", b"2"):
        with open_disk(path, writable=True) as disk:
            disk.pwrite(byte * SECTOR, 8 * SECTOR)
            if access == "RW":
                disk.pwrite(byte * SECTOR, 0)
            assert disk.pread(8 * SECTOR, 0) == flat.read_bytes()[8 * SECTOR : 16 * SECTOR]
        assert flat.read_bytes()[:SECTOR] == byte * SECTOR


@pytest.mark.parametrize("other", ["./disk-flat.vmdk", "linked.vmdk", "second.vmdk"])
def test_one_part_by_two_names(tmp_path: Path, other: str) -> None:
    """That is told, and not that somebody else uses the file."""
    path = pieces(tmp_path, 'RW 8 FLAT "disk-flat.vmdk" 0', f'RW 8 FLAT "{other}" 7')
    (tmp_path / "linked.vmdk").symlink_to("disk-flat.vmdk")
    (tmp_path / "second.vmdk").hardlink_to(tmp_path / "disk-flat.vmdk")
    with pytest.raises(WriteRefused, match="more than one line of the descriptor names a part of it"):
        open_disk(path, writable=True)


def with_tables(folder: Path) -> Image:
    rows = [Row("RW", "SPARSE", SOME, "disk-s001.vmdk"), Row("RW", "FLAT", SOME, "disk-f002.vmdk", 0)]
    return desc.custom(str(folder), "disk", rows)


def test_raw_line_over_tables(tmp_path: Path) -> None:
    image = with_tables(tmp_path)
    text = Path(image.path).read_bytes()
    Path(image.path).write_bytes(text.replace(b"4096 FLAT", b"128 FLAT").replace(b"f002", b"s001"))
    with open_disk(image.path) as disk:
        assert disk.size == SOME.size + 128 * SECTOR
    with pytest.raises(WriteRefused):
        open_disk(image.path, writable=True)
    findings = check_image(image.path).findings
    assert [(each.slug, each.severity) for each in findings] == [("extents-overlap", Severity.ERROR)]


def test_no_access_to_the_file_itself(tmp_path: Path) -> None:
    """What a line forbids is not to be had, in whatever file it stands."""
    image = desc.monolithic_sparse(str(tmp_path), "disk", SOME, access="NOACCESS")
    with open_disk(image.path, writable=True) as disk:
        assert not disk.writable
        assert [run.kind for run in disk.runs()] == [Kind.LOST]
        with pytest.raises(Unreadable, match="no access"):
            disk.pread(SECTOR, 0)


@pytest.mark.parametrize(("end", "found"), [("fffffffe", []), ("00000000", ["long-content-id"])])
def test_long_content_id_that_was_never_set(tmp_path: Path, end: str, found: list[str]) -> None:
    """VMware's own libraries write a content ID and leave the end of the long one as in a fresh disk."""
    ddb = {"ddb.longContentID": "0123456789abcdef01234567" + end}
    image = desc.monolithic_sparse(str(tmp_path), "disk", SOME, text={"ddb": ddb})
    assert [finding.slug for finding in check_image(image.path).findings] == found


def test_lost_text_of_a_child_is_not_made_up(tmp_path: Path) -> None:
    """Nothing tells of a parent any more, so whether there was one is for the user to say."""
    base = desc.monolithic_sparse(str(tmp_path), "base", SOME)
    child = desc.monolithic_sparse(str(tmp_path), "disk", Content(SOME.size), parent=base)
    poke(child.path, SECTOR, bytes(20 * SECTOR))
    (finding,) = check_image(child.path).findings
    assert finding.slug == "descriptor-lost"
    assert "snapshot" in (getattr(finding.repair, "asks", None) or "")


def test_error_is_one_of_ours(tmp_path: Path) -> None:
    """A directory behind the end of a delta's file, opened for writing: said of the directory."""
    image = desc.vmfs_sparse(str(tmp_path), "disk", Content.random(MIB, seed=1, grain=4 * KIB, touched=3))
    poke(image.cowd().path, 20, (0xFFFFFF).to_bytes(4, "little"))
    with pytest.raises(VmdkError, match="its grain directory"):
        open_disk(image.path, writable=True)
