"""
Giving a child another parent: what it shows stays, the pointer alone is changed only where that is proved.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.errors import (
    ChainError,
    ContentIdMismatch,
    FileMissing,
    InUse,
    ParentNotFound,
    TrustError,
    WriteRefused,
)
from nbd_vmdk.ops.snapshot.rebase import rebase
from nbd_vmdk.units import KIB, MIB
from tests.images import desc
from tests.images.content import Content
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
)


def held_by(path: Path) -> int:
    """Bytes that a link holds itself."""
    with open_disk(path, ignore_cid=True) as disk:
        return sum(run.length for run in disk.runs() if run.depth == 0)


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentFlat", "vmfs"])
def test_to_the_grandparent(tmp_path: Path, kind: str) -> None:
    base, middle, top = make_chain(tmp_path, kind)
    expected = shows(top)
    done = rebase(top, base)
    assert done.copied > 0
    assert done.hint == BASE
    for path in tmp_path.glob("disk-000001*"):
        path.unlink()
    assert shows(top) == expected
    assert not middle.exists()


def test_to_another_disk_altogether(tmp_path: Path) -> None:
    *_, top = make_chain(tmp_path)
    other = make_base(tmp_path, "monolithicFlat", name="other.vmdk")
    scribble(other, 50, pieces=40)
    expected = shows(top)
    rebase(top, other)
    assert shows(top) == expected
    with open_disk(top) as disk:
        assert [Path(link.name).name for link in disk.links] == [TOP, "other.vmdk"]


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentSparse", "vmfs"])
def test_to_no_parent(tmp_path: Path, kind: str) -> None:
    *_, top = make_chain(tmp_path, kind)
    expected = shows(top)
    rebase(top, None)
    for path in (*tmp_path.glob("disk.vmdk"), *tmp_path.glob("disk-000001*")):
        path.unlink()
    assert shows(top) == expected
    with open_disk(top) as disk:
        assert disk.links[0].descriptor is not None
        assert disk.links[0].descriptor.parent_hint is None
        assert disk.links[0].descriptor.get("ddb.adapterType") == "lsilogic"


@needs_qemu
def test_as_qemu_sees_it(tmp_path: Path) -> None:
    base, _middle, top = make_chain(tmp_path)
    expected = by_qemu(top)
    rebase(top, base)
    assert by_qemu(top) == expected
    rebase(top, None)
    assert by_qemu(top) == expected


def test_its_own_children_stay_valid(tmp_path: Path) -> None:
    _base, middle, top = make_chain(tmp_path)
    before = {path: shows(path) for path in (middle, top)}
    rebase(middle, None)
    assert {path: shows(path) for path in (middle, top)} == before


def test_what_is_the_same_is_not_copied(tmp_path: Path) -> None:
    """To a copy of the parent nothing need be copied; to the grandparent only what the parent holds."""
    base, middle, top = make_chain(tmp_path)
    shutil.copy(middle, tmp_path / "copy.vmdk")
    before = held_by(top)
    assert rebase(top, tmp_path / "copy.vmdk").copied == 0
    assert held_by(top) == before
    limit = held_by(middle)
    assert rebase(top, base).copied <= limit


def test_zeros_over_data_are_kept(tmp_path: Path) -> None:
    base = make_base(tmp_path, "monolithicFlat")
    child = make_child(base)
    other = make_base(tmp_path, name="other.vmdk")
    with open_disk(other, writable=True) as disk:
        disk.pwrite(b"\1" * MIB, 512 * KIB)
    rebase(child, other)
    assert shows(child) == bytes(SIZE)


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    base, _middle, top = make_chain(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    plan = rebase(top, base, dry_run=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert rebase(top, base).copied == plan.copied > 0


# The pointer alone


def test_a_parent_that_was_moved(tmp_path: Path) -> None:
    base, middle, top = make_chain(tmp_path)
    expected = shows(top)
    shutil.copy(middle, tmp_path / "moved.vmdk")
    kept = top.read_bytes()[64 * KIB :]
    assert rebase(top, tmp_path / "moved.vmdk", relink=True).copied == 0
    middle.unlink()
    assert shows(top) == expected
    assert top.read_bytes()[64 * KIB :] == kept
    assert base.exists()


def test_a_pointer_is_not_changed_to_something_else(tmp_path: Path) -> None:
    base, _middle, top = make_chain(tmp_path)
    before = top.read_bytes()
    with pytest.raises(WriteRefused, match="from byte"):
        rebase(top, base, relink=True)
    assert top.read_bytes() == before


def test_an_old_child_is_pointed_only_unchecked(tmp_path: Path) -> None:
    """A parent that was touched and put back: nobody can prove it, but its owner may know it."""
    base, middle, _top = make_chain(tmp_path)
    expected = shows(middle)
    with open_disk(base, writable=True, write_parent=True) as disk:
        was = disk.pread(512, 0)
        disk.pwrite(b"x" * 512, 0)
        disk.flush()
        disk.pwrite(was, 0)
    for relink in (False, True):
        with pytest.raises(ContentIdMismatch) as caught:
            rebase(middle, base, relink=relink)
        assert caught.value.hint is not None
        assert "--unchecked" in caught.value.hint
    rebase(middle, base, relink=True, unchecked=True)
    assert shows(middle) == expected


def test_a_lost_parent(tmp_path: Path) -> None:
    base, _middle, top = make_chain(tmp_path)
    expected = shows(top)
    (tmp_path / MIDDLE).rename(tmp_path / "elsewhere.vmdk")
    with pytest.raises(ParentNotFound):
        rebase(top, tmp_path / "elsewhere.vmdk", relink=True)
    rebase(top, tmp_path / "elsewhere.vmdk", relink=True, unchecked=True)
    assert shows(top) == expected
    assert base.exists()


def test_a_kind_that_can_not_be_written(tmp_path: Path) -> None:
    """A seSparse child: its pointer can be changed, nothing can be copied into it."""
    content = Content.random(SIZE, seed=3, density=0.5, grain=4 * KIB)
    base = make_base(tmp_path)
    scribble(base, 4)
    with open_disk(base) as disk:
        cid = f"{disk.links[0].cid:08x}"
    text = {"parent_cid": cid, "hint": BASE}
    child = Path(desc.se_sparse(str(tmp_path), "child", content, text=text).path)
    expected = shows(child)
    other = make_base(tmp_path, name="other.vmdk")
    with pytest.raises(WriteRefused, match="can't be copied into it"):
        rebase(child, other)
    assert shows(child) == expected
    shutil.copy(base, tmp_path / "moved.vmdk")
    rebase(child, tmp_path / "moved.vmdk")
    base.unlink()
    assert shows(child) == expected


# Refusals, and being stopped


def test_no_link_can_stand_on_itself(tmp_path: Path) -> None:
    base, middle, top = make_chain(tmp_path)
    for child, parent in ((base, top), (middle, top), (middle, middle)):
        with pytest.raises(ChainError, match="stand on itself" if child is parent else "stands on it"):
            rebase(child, parent, relink=True, unchecked=True)
    with pytest.raises(FileMissing):
        rebase(top, tmp_path / "nothing.vmdk")


def test_sizes_must_agree(tmp_path: Path) -> None:
    *_, top = make_chain(tmp_path)
    other = make_base(tmp_path, name="other.vmdk", size=SIZE + 512)
    with pytest.raises(ChainError, match=r"other\.vmdk 2097664"):
        rebase(top, other)


@pytest.mark.parametrize("user", [MIDDLE, "other.vmdk", TOP])
def test_nothing_happens_to_what_is_in_use(tmp_path: Path, user: str) -> None:
    *_, top = make_chain(tmp_path)
    other = make_base(tmp_path, name="other.vmdk")
    before = top.read_bytes()
    with open_disk(tmp_path / user, writable=user != MIDDLE), pytest.raises(InUse):
        rebase(top if user != MIDDLE else tmp_path / MIDDLE, other)
    assert top.read_bytes() == before


def test_into_another_folder_needs_leave_for_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    base, middle = make_chain(tmp_path / "a")[:2]
    clone = make_child(middle, tmp_path / "b" / "clone.vmdk")
    expected = shows(middle)
    with pytest.raises(TrustError):
        rebase(clone, base)
    allowed: dict[str, Any] = {"allow_dirs": (tmp_path / "a",)}
    done = rebase(clone, base, **allowed)
    assert done.hint == "../a/disk.vmdk"
    assert shows(clone, **allowed) == expected


def test_stopped_at_any_step(quick_path: Path) -> None:
    master = quick_path / "master"
    master.mkdir()
    make_chain(master, "twoGbMaxExtentSparse")
    expected = shows(master / TOP)
    copy = quick_path / "copy"
    step = 0
    while True:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(master, copy)
        if not killed_at(step, partial(rebase, copy / TOP, copy / BASE, threads=1)):
            break
        assert shows(copy / TOP) == expected  # never even refused
        rebase(copy / TOP, copy / BASE)
        assert shows(copy / TOP) == expected
        step += 1
    assert step > 15

    shutil.rmtree(copy)
    shutil.copytree(master, copy)
    cuts = PowerCuts(copy)
    with cuts.watching():
        rebase(copy / TOP, copy / BASE, threads=1)
    for _ in cuts:
        assert shows(copy / TOP) == expected
        rebase(copy / TOP, copy / BASE)
        assert shows(copy / TOP) == expected
    assert shows_or_refused(copy / TOP) == expected
    assert not any(name.startswith(".") for name in names_in(copy))
