"""
Merging a child that was made larger: its parent becomes as large first, and whoever reads sees no difference.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.cli import main
from nbd_vmdk.errors import (
    ChainError,
    ContentIdMismatch,
    FileExists,
    FileMissing,
    OptionError,
    StorageError,
    WriteRefused,
)
from nbd_vmdk.ops.resize import resize
from nbd_vmdk.ops.snapshot.commit import commit, plan_commit
from nbd_vmdk.ops.snapshot.delete import delete_link
from nbd_vmdk.ops.snapshot.rebase import rebase
from nbd_vmdk.units import KIB, MIB, SECTOR, TIB
from tests.images import desc
from tests.images.content import Content
from tests.manage import KINDS, faults, make
from tests.snapshot import (
    BASE,
    MIDDLE,
    SIZE,
    TOP,
    PowerCuts,
    by_qemu,
    killed_at,
    make_base,
    make_chain,
    make_child,
    names_in,
    needs_qemu,
    scribble,
    shows,
    shows_or_refused,
    steps_told,
)

OLD, NEW = 2 * MIB + 3 * SECTOR, 5 * MIB


def grow(child: Path, size: int = NEW, seed: int = 9) -> bytes:
    """Make the child larger and write behind its old end; what it shows."""
    resize(child, size)
    with open_disk(child, writable=True) as disk:
        disk.pwrite(b"behind" * 1000, disk.size - MIB)
        disk.zero(64 * KIB, disk.size - 128 * KIB, may_trim=False)
    scribble(child, seed)
    return shows(child)


@needs_qemu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [NEW, 40 * MIB])
def test_into_every_kind(tmp_path: Path, kind: str, size: int) -> None:
    base = make(tmp_path, kind, OLD)
    scribble(base, 1)
    child = make_child(base)
    before = names_in(tmp_path)
    expected = grow(child, size)
    assert by_qemu(child) == expected
    commit(child)
    assert shows(base) == by_qemu(base) == expected
    assert faults(base) == []
    assert {name for name in names_in(tmp_path) if "-00000" in name} == set()
    assert {name for name in before if "-00000" not in name} <= names_in(tmp_path)


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentSparse", "vmfs"])
def test_into_a_parent_that_is_a_child_itself(tmp_path: Path, kind: str) -> None:
    base, middle, top = make_chain(tmp_path, kind)
    before = shows(base)
    expected = grow(top, 40 * MIB)
    commit(top)
    assert shows(middle) == expected
    assert shows(base) == before
    assert faults(middle) == ["chain-size"]
    commit(middle)
    assert shows(base) == expected
    assert faults(base) == []


def test_what_stands_on_it_shows_the_same(tmp_path: Path) -> None:
    base, middle = make_chain(tmp_path)[:2]
    (tmp_path / "disk-000002.vmdk").unlink()
    grow(middle)
    above = make_child(middle)
    scribble(above, 4)
    expected, merged = shows(above), shows(middle)
    commit(middle)
    assert shows(above) == expected
    assert shows(base) == merged
    assert faults(above) == []


def test_keeping_the_child(tmp_path: Path) -> None:
    base, _middle, top = make_chain(tmp_path)
    expected = grow(top)
    commit(top, keep=True)
    assert shows(top) == shows(tmp_path / MIDDLE) == expected
    assert faults(base) == []


def test_a_sibling_is_not_given_up_unasked(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    scribble(base, 1)
    one, other = make_child(base), make_child(base)
    scribble(other, 2)
    kept = shows(other)
    expected = grow(one)
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(WriteRefused, match="it has other children"):
        commit(one)
    plan_commit(one)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == content
    assert shows(other) == kept
    commit(one, break_children=True)
    assert shows(base) == expected
    with pytest.raises(ContentIdMismatch):
        shows(other)


def test_a_thick_flat_parent_stays_thick(tmp_path: Path) -> None:
    base = make_base(tmp_path, "monolithicFlat")
    flat = tmp_path / "disk-flat.vmdk"
    flat.write_bytes(b"\1" * SIZE)
    child = make_child(base)
    expected = grow(child)
    assert plan_commit(child).amount.new == NEW - SIZE
    commit(child)
    assert flat.read_bytes() == expected
    assert flat.stat().st_blocks * 512 >= NEW


def refused(child: Path, error: type[Exception], match: str) -> str:
    """The hint with which merging is refused, by both the plan and the deed; nothing has changed."""
    content = {path: path.read_bytes() for path in child.parent.iterdir() if path.stat().st_size < TIB}
    for work in (plan_commit, commit):
        with pytest.raises(error, match=match) as caught:
            work(child)
    for path, was in content.items():
        assert path.read_bytes() == was
    assert names_in(child.parent) >= {path.name for path in content}
    return str(caught.value.hint)  # type: ignore[attr-defined]


def test_what_would_show_through(tmp_path: Path) -> None:
    base, middle, top = make_chain(tmp_path)
    top.unlink()
    middle.write_bytes(middle.read_bytes().replace(b"RW 4096 SPARSE", b"RW 4088 SPARSE"))
    top = make_child(middle)
    resize(top, NEW)
    told = refused(top, WriteRefused, "its parent is larger, and would show through")
    assert "rebase --flatten" in told
    assert base.exists()


def test_parents_that_can_not_grow(tmp_path: Path) -> None:
    for number, made in enumerate((desc.stream_optimized, desc.se_sparse)):
        folder = tmp_path / str(number)
        folder.mkdir()
        base = made(str(folder), "base", Content.random(MIB, 1))
        child = Path(
            desc.monolithic_sparse(str(folder), "child", Content(MIB).put(0, b"n"), parent=base).path
        )
        resize(child, 2 * MIB)
        assert "convert" in refused(child, WriteRefused, "base")


def test_the_name_of_a_new_extent_is_taken(tmp_path: Path) -> None:
    base = make(tmp_path, "twoGbMaxExtentSparse", 2 * MIB)
    child = make_child(base, tmp_path / "child.vmdk")
    resize(child, NEW)
    (tmp_path / "disk-s004.vmdk").write_bytes(b"important")
    assert "rebase --flatten" in refused(child, FileExists, "there already")
    assert (tmp_path / "disk-s004.vmdk").read_bytes() == b"important"


def test_too_much_for_the_parent(tmp_path: Path) -> None:
    base = make_base(tmp_path, "monolithicSparse")
    child = make_child(base, tmp_path / "child.vmdk", kind="twoGbMaxExtentSparse")
    resize(child, 3 * TIB)
    assert "rebase --flatten" in refused(child, OptionError, "less than 2 TiB")


# Others than merging


@needs_qemu
@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentSparse", "vmfs"])
@pytest.mark.parametrize("which", ["top", "middle"])
def test_a_link_under_it_is_removed(tmp_path: Path, kind: str, which: str) -> None:
    """The child then stands on a parent that is smaller, as it did; that can have other children."""
    base, middle, top = make_chain(tmp_path, kind)
    other = make_child(base, tmp_path / "other.vmdk")
    scribble(other, 4)
    kept = shows(base), shows(other)
    if which == "middle":
        top.unlink()
        for path in tmp_path.glob("disk-000002*"):
            path.unlink()
        grow(middle)
        top = make_child(middle)
        scribble(top, 8)
    expected = grow(top, NEW + (which == "top") * MIB)
    told = delete_link(middle)
    assert shows(top) == expected
    assert delete_link(middle, apply=True).children == told.children
    assert shows(top) == expected
    assert (shows(base), shows(other)) == kept
    if kind != "vmfs":
        assert by_qemu(top) == expected
    assert faults(top) == ["chain-size"]
    assert not any("disk-000001" in name for name in names_in(tmp_path))
    commit(top, break_children=True)
    assert shows(base) == expected


def test_killed_while_a_link_under_it_is_removed(quick_path: Path) -> None:
    master, folder = quick_path / "master", quick_path / "copy"
    master.mkdir()
    base, middle = make_chain(master)[:2]
    (master / TOP).unlink()
    grow(middle)
    top = make_child(middle)
    scribble(top, 8)
    kept = shows(base), shows(middle), shows(top)
    step = 0
    while True:
        shutil.copytree(master, folder)
        killed = killed_at(step, partial(delete_link, folder / MIDDLE, apply=True))
        assert shows(folder / BASE) == kept[0]
        assert shows_or_refused(folder / MIDDLE) in (None, kept[1])
        assert shows(folder / TOP) == kept[2]
        if not killed:
            break
        if (folder / MIDDLE).exists():
            delete_link(folder / MIDDLE, apply=True)
        assert shows(folder / TOP) == kept[2]
        shutil.rmtree(folder)
        step += 7
    assert step > 30


def test_another_parent_that_is_smaller(tmp_path: Path) -> None:
    """Only a child that is larger than what it stands on may be larger than what it will stand on."""
    base, _middle, top = make_chain(tmp_path)
    small = make_base(tmp_path, name="small.vmdk", size=MIB + SECTOR)
    scribble(small, 7)
    with pytest.raises(ChainError, match=r"2097152 bytes and .*small\.vmdk 1049088"):
        rebase(top, small)
    expected = grow(top)
    told = rebase(top, small, dry_run=True).copied
    with pytest.raises(WriteRefused, match="does not have what it shows"):
        rebase(top, small, relink=True)
    assert rebase(top, small).copied == told > 0
    assert shows(top) == expected
    assert rebase(top, small).copied == 0
    large = make_base(tmp_path, name="large.vmdk", size=NEW + SECTOR)
    with pytest.raises(ChainError, match="5242880 bytes and"):
        rebase(top, large)
    rebase(top, base)
    assert shows(top) == expected


# Being stopped


class Stopped:
    """Merging a child that was grown, while the parent's other child is given up; stopped at every step."""

    def __init__(self, folder: Path, kind: str, size: int = NEW, *, deep: bool = False) -> None:
        self.master = folder / "master"
        self.master.mkdir()
        base = make(self.master, kind, OLD)
        scribble(base, 1)
        if deep:
            base = make_child(base)
            scribble(base, 5)
        self.base, self.old = base.name, shows(base)
        child = make_child(base)
        other = make_child(base)
        scribble(other, 2)
        self.other, self.kept = other.name, shows(other)
        self.child, self.new = child.name, grow(child, size)
        self.folder = folder / "copy"

    def fresh(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.master, self.folder)
        return self.folder

    def merge(self) -> None:
        commit(self.folder / self.child, break_children=True, threads=1)

    def nobody_reads_wrong(self) -> None:
        grown = self.old.ljust(len(self.new), b"\0")
        assert shows_or_refused(self.folder / self.base) in (None, self.old, grown, self.new)
        assert shows_or_refused(self.folder / self.child) in (None, self.new)
        assert shows_or_refused(self.folder / self.other) in (None, self.kept)

    def finished(self) -> None:
        try:
            self.merge()
        except FileMissing:
            pass  # it had been at its end
        assert shows(self.folder / self.base) == self.new
        assert shows_or_refused(self.folder / self.other) is None
        names = names_in(self.folder)
        stem = self.child.removesuffix(".vmdk")
        assert not any(name.startswith(stem) or "merging" in name or "saved-by" in name for name in names)


def no_links(*_args: object, **_kwargs: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize(
    ("kind", "deep", "links"),
    [
        ("monolithicSparse", False, True),
        ("twoGbMaxExtentSparse", False, True),
        ("twoGbMaxExtentFlat", False, True),
        ("monolithicFlat", False, False),
        ("vmfs", True, True),
    ],
)
def test_killed_at_any_step(
    quick_path: Path, kind: str, deep: bool, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any sort of parent, in COWD that is a child itself, where there are no hard links."""
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    case = Stopped(quick_path, kind, deep=deep)
    step = 0
    while killed_at(step, partial(commit, case.fresh() / case.child, break_children=True, threads=1)):
        case.nobody_reads_wrong()
        case.finished()
        # What grows and what gets another name is done in the first steps.
        step += 1 if step < 24 else 6
    assert step > 30
    case.finished()
    assert faults(case.folder / case.base, "chain-size") == []


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentSparse", "vmfs"])
def test_the_power_lost_at_any_step(quick_path: Path, kind: str) -> None:
    case = Stopped(quick_path, kind)
    cuts = PowerCuts(case.fresh())
    with cuts.watching():
        case.merge()
    assert len(cuts.states) > 10
    for number, _ in enumerate(cuts):
        if number < 30 or number % 4 == 0:
            case.nobody_reads_wrong()
            case.finished()


@pytest.mark.parametrize("kind", ["monolithicSparse", "vmfs"])
def test_made_larger_after_a_merge_was_stopped(quick_path: Path, kind: str) -> None:
    """Wherever that was: the child that can be read can be made larger, and merged."""
    base = make(quick_path, kind, OLD)
    scribble(base, 1)
    scribble(make_child(base), 2)
    shutil.copytree(quick_path, quick_path / "master")
    step = done = 0
    while True:
        folder = quick_path / str(step)
        shutil.copytree(quick_path / "master", folder)
        child = folder / MIDDLE
        if not killed_at(step, partial(commit, child, threads=1)):
            break
        if shows_or_refused(child) is not None:
            expected = grow(child)
            assert shows_or_refused(folder / BASE) != expected
            commit(child)
            assert shows(folder / BASE) == expected
            assert not any("merging" in name or "-00000" in name for name in names_in(folder))
            assert faults(folder / BASE) == []
            done += 1
        shutil.rmtree(folder)
        step += 1 if step < 20 else 4
    assert done > 10


def test_the_disk_full_while_it_grows(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    scribble(base, 1)
    child = make_child(base)
    before, expected = shows(base), grow(child, 300 * MIB)
    for limit in range(0, 6, 2):
        left = limit

        def full(name: str) -> None:
            nonlocal left
            left -= name in ("pwrite", "ftruncate")
            if left < 0:
                raise OSError(28, os.strerror(28))

        with steps_told(full), pytest.raises(StorageError) as caught:
            commit(child)
        assert "the same command goes on" in str(caught.value.hint)
        assert shows(child) == expected
        assert shows(base)[:SIZE] == before
    commit(child)
    assert shows(base) == expected


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path)
    child = make_child(base)

    def run(*words: str) -> tuple[Any, str]:
        assert main(["snapshot", "commit", str(child), "--json", *words]) == 0
        told = capsys.readouterr()
        return json.loads(told.out)["grows"], told.err

    assert run("--dry-run")[0] is None
    resize(child, NEW)
    capsys.readouterr()
    for words in (["--dry-run"], []):
        grows, told = run(*words)
        assert (grows["old-size"], grows["new-size"]) == (SIZE, NEW)
        assert grows["steps"][-1].endswith("its descriptor says the new size")
        assert f"{base} becomes as large as the child first: 2 MiB -> 5 MiB" in told
    assert shows(base) == bytes(NEW)
