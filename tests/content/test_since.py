"""What changed since a snapshot: whoever copies just that has the disk; and nothing more where asked for."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk import Disk, VmdkError, open_disk
from nbd_vmdk.ops.since import changed_since, disk_at, find_link
from tests.content import GRAIN, MIB, SECTOR, Content, answer, command, differing
from tests.images import desc, peek, poke
from tests.images.desc import Image


@st.composite
def layers(draw: st.DrawFn) -> list[Content]:
    """The links of a chain, base first; some are smaller than their parent, some larger."""
    rows = []
    for number in range(draw(st.integers(2, 4))):
        sectors = draw(st.sampled_from([2000, 2000, 1200, 2600, 129]))
        content = Content.random(sectors * SECTOR, draw(st.integers(0, 99)), density=0.3)
        rows.append(content if number else content.without_zeros())
    return rows


def chain(folder: str, rows: list[Content]) -> list[Image]:
    """Images, the top one first."""
    images: list[Image] = []
    for number, content in enumerate(rows):
        kind = desc.monolithic_sparse if number % 2 == 0 else desc.split_sparse
        images.insert(0, kind(folder, f"link{number}", content, parent=images[0] if images else None))
    return images


def whole(disk: Disk) -> bytes:
    return disk.pread(disk.size, 0)


@settings(max_examples=30, deadline=None)
@given(layers(), st.data())
def test_copying_what_changed_gives_the_disk(rows: list[Content], data: st.DataObject) -> None:
    depth = data.draw(st.integers(0, len(rows) - 1))
    with tempfile.TemporaryDirectory() as folder, open_disk(chain(folder, rows)[0].path) as disk:
        now = whole(disk)
        then = whole(disk_at(disk, depth))
        assert then == opened_alone(folder, rows, depth)
        backup = bytearray(then.ljust(disk.size, b"\0")[: disk.size])
        end = -1
        for offset, length in changed_since(disk, depth):
            assert offset > end  # maximal, in order
            end = offset + length
            backup[offset:end] = disk.pread(length, offset)
        assert backup == now
        if depth == 0:
            assert end == -1
        wanted = differing(now, then[: disk.size])
        assert [tuple(each) for each in changed_since(disk, depth, compare=True)] == wanted


def opened_alone(folder: str, rows: list[Content], depth: int) -> bytes:
    """The disk of a link, opened by its own name."""
    with open_disk(f"{folder}/link{len(rows) - 1 - depth}.vmdk") as disk:
        return whole(disk)


def test_a_smaller_link_between_hides_what_the_snapshot_had(tmp_path: Path) -> None:
    base = Content(2 * MIB).put(0, b"b" * 2 * MIB)
    rows = [base, Content(MIB).put(0, b"m" * GRAIN), Content(2 * MIB)]
    with open_disk(chain(str(tmp_path), rows)[0].path) as disk:
        assert not any(disk.pread(MIB, MIB))
        for compare in (False, True):
            found = [tuple(each) for each in changed_since(disk, 2, compare=compare)]
            assert found == [(0, GRAIN), (MIB, MIB)]
            found = [tuple(each) for each in changed_since(disk, 1, compare=compare)]
            assert found == ([] if compare else [(MIB, MIB)])  # zeros beyond the end are no difference


@pytest.fixture
def three(tmp_path: Path) -> tuple[str, str]:
    """A chain of three links, the middle one in a folder of its own with a twin's name; top, base."""
    (tmp_path / "a").mkdir()
    base = desc.monolithic_sparse(str(tmp_path / "a"), "disk", Content(MIB).put(8 * GRAIN, b"b"))
    middle = desc.monolithic_sparse(
        str(tmp_path), "disk", Content(MIB).put(GRAIN, b"m" * GRAIN), parent=base, cid="00000002"
    )
    top = desc.monolithic_sparse(
        str(tmp_path), "top", Content(2 * MIB).put(0, b"t"), parent=middle, cid="00000003"
    )
    return top.path, base.path


def test_finding_a_link(three: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    top, base = three
    with open_disk(top, allow_dirs=()) as disk:
        assert [find_link(disk, text) for text in ("0", 1, "2")] == [0, 1, 2]
        assert find_link(disk, "top.vmdk") == 0
        assert find_link(disk, base) == 2
        assert find_link(disk, top) == 0
        for text in ("disk.vmdk", "3", "nobody.vmdk", "-1", "9" * 50):
            with pytest.raises(VmdkError) as caught:
                find_link(disk, text)
            assert caught.value.exit_code == 2
            assert "0 (" in str(caught.value.hint)
    monkeypatch.chdir(os.path.dirname(top))
    with open_disk("top.vmdk") as disk:  # whose links are named as the user named it
        assert [find_link(disk, text) for text in (top, base, "./top.vmdk", "a/disk.vmdk")] == [0, 2, 0, 2]


def test_rows(three: tuple[str, str]) -> None:
    top, _base = three
    rows = answer(command("map", "--since", "2", "--json", top))
    assert [(row["start"], row["length"], row["depth"], row["kind"]) for row in rows] == [
        (0, GRAIN, 0, "data"),
        (GRAIN, GRAIN, 1, "data"),
        (MIB, MIB, 2, "hole"),
    ]
    shown = command("map", "--since", "1", top).stdout.decode().splitlines()
    assert [line.split()[:3] for line in shown] == [
        ["start", "length", "kind"],
        ["0", str(GRAIN), "data"],
        [str(MIB), str(MIB), "hole"],
    ]
    compared = answer(command("map", "--since", "1", "--compare", "--json", top))
    assert [(row["start"], row["length"]) for row in compared] == [(0, SECTOR)]
    assert answer(command("map", "--since", "0", "--json", top)) == []


def test_a_parent_that_changed_is_no_base(three: tuple[str, str]) -> None:
    top, base = three
    text = peek(base, 0, 4096)
    at = text.index(b"\nCID=") + 5
    poke(base, at, b"0badc1d0")
    done = command("map", "--since", "2", top)
    assert done.returncode == 1
    assert b"content ID" in done.stderr


def test_options_that_make_no_sense(three: tuple[str, str]) -> None:
    top, _base = three
    assert command("map", "--compare", top).returncode == 2
    assert command("map", "--since", "1", "--html", "x.html", top).returncode == 2
    assert command("map", "--since", "nobody", top).returncode == 2


def test_the_disk_as_it_was(three: tuple[str, str]) -> None:
    top, _base = three
    with open_disk(top) as disk:
        then = disk_at(disk, 1)
        assert not then.writable
        assert then.pread(1, GRAIN) == b"m"
