"""
Merging a child into its parent: what every link shows before and after, refusals, and being stopped anywhere.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.errors import (
    ChainError,
    ChainTooDeep,
    ContentIdMismatch,
    FileMissing,
    InUse,
    NotVmdk,
    StorageError,
    TrustError,
    VmdkError,
    WriteRefused,
)
from nbd_vmdk.ondisk.descriptor import Descriptor
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.snapshot.commit import commit, plan_commit
from nbd_vmdk.ops.snapshot.delete import delete_link
from nbd_vmdk.ops.snapshot.names import merging_name
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
    steps_told,
)

KINDS = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "vmfs"]


def sound(path: Path) -> None:
    report = check_image(path)
    # What was freed and not used again is no damage.
    assert [finding.slug for finding in report.findings if finding.slug != "unused-space"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_middle_of_a_chain(tmp_path: Path, kind: str) -> None:
    base, middle, top = make_chain(tmp_path, kind)
    before = {path.name: shows(path) for path in (base, middle, top)}
    plan = commit(middle)
    assert Path(plan.result) == base
    assert not any(name.startswith(middle.stem) for name in names_in(tmp_path))
    assert shows(base) == before[MIDDLE]
    assert shows(top) == before[TOP]
    sound(top)


@pytest.mark.parametrize("kind", KINDS)
def test_the_top(tmp_path: Path, kind: str) -> None:
    base, middle, top = make_chain(tmp_path, kind)
    before = shows(top)
    commit(top)
    assert shows(middle) == before
    assert shows_or_refused(base) is not None
    commit(middle)
    assert shows(base) == before
    assert not any("-0000" in name for name in names_in(tmp_path))
    sound(base)


@needs_qemu
@pytest.mark.parametrize("kind", KINDS[:4])
def test_as_qemu_sees_it(tmp_path: Path, kind: str) -> None:
    base, middle, top = make_chain(tmp_path, kind)
    before = {path: by_qemu(path) for path in (base, middle, top)}
    commit(middle)
    assert by_qemu(base) == before[middle]
    assert by_qemu(top) == before[top]


@pytest.mark.parametrize("kind", ["se_sparse", "stream_optimized", "vmfs_sparse"])
def test_children_that_others_made(tmp_path: Path, kind: str) -> None:
    """What is only read of a child can be merged, whether or not its kind can be written here."""
    base = make_base(tmp_path, "vmfs")
    scribble(base, 1)
    with open_disk(base) as disk:
        text = {"parent_cid": f"{disk.links[0].cid:08x}", "hint": BASE}
    content = Content.random(SIZE, seed=3, density=0.4, grain=64 * KIB)
    child = Path(getattr(desc, kind)(str(tmp_path), "child", content, text=text).path)
    expected = shows(child)
    assert expected != shows(base)
    commit(child)
    assert shows(base) == expected
    assert names_in(tmp_path) == {BASE, "disk-flat.vmdk"}


def test_keeping_the_child_keeps_it_valid(tmp_path: Path) -> None:
    base, middle, top = make_chain(tmp_path)
    before = {path: shows(path) for path in (middle, top)}
    commit(middle, keep=True)
    assert shows(base) == before[middle]
    assert {path: shows(path) for path in (middle, top)} == before
    assert names_in(tmp_path) == {BASE, MIDDLE, TOP}


def test_a_plan_changes_nothing(tmp_path: Path) -> None:
    make_chain(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    plan = plan_commit(tmp_path / MIDDLE)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert plan.amount.data >= plan.amount.new > 0
    assert [link.name for link in plan.grandchildren] == [TOP]
    assert [os.path.basename(path) for path in plan.removes] == [MIDDLE]


def test_other_children_are_not_broken_unasked(tmp_path: Path) -> None:
    base, middle, top = make_chain(tmp_path)
    other = make_child(base, tmp_path / "other.vmdk")
    kept = {path: shows(path) for path in (base, middle, top, other)}
    with pytest.raises(WriteRefused, match=r"other\.vmdk"):
        commit(middle)
    assert {path: shows(path) for path in kept} == kept
    commit(middle, break_children=True)
    assert shows(top) == kept[top]
    with pytest.raises(ContentIdMismatch):
        shows(other)


def test_a_child_whose_parent_changed_is_refused(tmp_path: Path) -> None:
    base, middle, _top = make_chain(tmp_path)
    scribble(base, 9, write_parent=True)
    with pytest.raises(ContentIdMismatch, match="expects parent content ID"):
        commit(middle)


def test_a_base_has_nothing_to_be_merged_into(tmp_path: Path) -> None:
    with pytest.raises(WriteRefused, match="no parent"):
        commit(make_base(tmp_path))
    with pytest.raises(FileMissing):
        commit(tmp_path / "nothing.vmdk")


def test_sizes_must_agree(tmp_path: Path) -> None:
    base, middle, _top = make_chain(tmp_path)
    text = (tmp_path / MIDDLE).read_bytes()
    assert b"RW 4096 SPARSE" in text
    middle.write_bytes(text.replace(b"RW 4096 SPARSE", b"RW 4088 SPARSE"))
    with pytest.raises(ChainError, match="2093056 bytes and its parent 2097152"):
        commit(middle)
    assert base.exists()


def test_a_parent_that_can_not_be_written(tmp_path: Path) -> None:
    base, middle, _top = make_chain(tmp_path)
    data = base.read_bytes()
    base.write_bytes(data.replace(b"RW 4096 SPARSE", b"RDONLY 4096 SPARSE", 1))
    with pytest.raises(WriteRefused, match="allows no writing"):
        commit(middle)
    assert names_in(tmp_path) == {BASE, MIDDLE, TOP}


@pytest.mark.parametrize("user", [BASE, MIDDLE, TOP])
def test_nothing_happens_to_what_is_in_use(tmp_path: Path, user: str) -> None:
    make_chain(tmp_path)
    with open_disk(tmp_path / user), pytest.raises(InUse):
        commit(tmp_path / MIDDLE)
    assert names_in(tmp_path) == {BASE, MIDDLE, TOP}


def test_zeros_stay_no_data(tmp_path: Path) -> None:
    base = make_base(tmp_path, size=8 * MIB)
    with open_disk(base, writable=True) as disk:
        disk.pwrite(b"\1" * MIB, MIB)
    child = make_child(base)
    with open_disk(child, writable=True) as disk:
        disk.pwrite(bytes(4 * MIB), MIB)  # zeros as data, over data and over nothing
    commit(child)
    assert not any(shows(base))
    with open_disk(base) as disk:
        assert all(run.file is None for run in disk.runs())


def test_a_thick_flat_parent_keeps_its_space(tmp_path: Path) -> None:
    base = make_base(tmp_path, "monolithicFlat")
    flat = tmp_path / "disk-flat.vmdk"
    flat.write_bytes(b"\1" * SIZE)
    child = make_child(base)
    with open_disk(child, writable=True) as disk:
        disk.pwrite(bytes(MIB), 0)
    commit(child)
    assert flat.read_bytes() == bytes(MIB) + b"\1" * (SIZE - MIB)
    assert flat.stat().st_blocks * 512 >= SIZE


@pytest.mark.parametrize("name", ["x:disk.vmdk", "x\\disk.vmdk"])
def test_a_parent_whose_name_looks_like_a_windows_path(tmp_path: Path, name: str) -> None:
    base = make_base(tmp_path, "monolithicSparse").rename(tmp_path / name)
    child = make_child(base)
    scribble(child, 1)
    expected = shows(child)
    commit(child)
    assert shows(base) == expected
    assert names_in(tmp_path) == {name}


def test_a_parent_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "master").mkdir()
    (tmp_path / "clone").mkdir()
    base = make_base(tmp_path / "master", "monolithicFlat")
    scribble(base, 1)
    child = make_child(base, tmp_path / "clone")
    assert child.name == "disk-cl1.vmdk"
    allowed: dict[str, Any] = {"allow_dirs": (base.parent,)}
    scribble(child, 2, **allowed)
    top = make_child(child, **allowed)
    scribble(top, 3, **allowed)
    expected = shows(top, **allowed)
    with pytest.raises(TrustError, match="outside the image's folder"):
        commit(child)
    commit(child, **allowed)
    assert shows(top, **allowed) == expected
    assert names_in(child.parent) == {top.name}


# Being stopped


class Stopped:
    """The ways of stopping a commit of the middle of a chain at every step, and what must hold then."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.master = folder / "master"
        self.master.mkdir()
        base, middle, top = make_chain(self.master, kind, size=256 * KIB)
        self.old = shows(base)
        self.new = shows(middle)
        self.top = shows(top)
        self.folder = folder / "copy"

    def fresh(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.master, self.folder)
        return self.folder

    def nobody_reads_wrong(self) -> None:
        """Each link shows what it should, or is refused."""
        assert shows_or_refused(self.folder / BASE) in (None, self.old, self.new)
        assert shows_or_refused(self.folder / MIDDLE) in (None, self.new)
        assert shows_or_refused(self.folder / TOP) in (None, self.top)

    def finished(self) -> None:
        """The same command, once more, brings it to its end."""
        try:
            commit(self.folder / MIDDLE)
        except FileMissing:
            pass  # it had been at its end
        assert shows(self.folder / BASE) == self.new
        assert shows(self.folder / TOP) == self.top
        names = names_in(self.folder)
        assert not any(MIDDLE.removesuffix(".vmdk") in name or "merging" in name for name in names), names


def no_links(*_args: object, **_kwargs: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("hint", [rb"C:\VMs\disk.vmdk", b"/vmfs/volumes/5f3a/vm/disk.vmdk"])
def test_killed_where_the_hint_is_of_another_machine(quick_path: Path, hint: bytes) -> None:
    """Moved since it was made: the child's parent is found beside it, and so is a merge that was begun."""
    case = Stopped(quick_path, "monolithicFlat")
    edit(case.master / MIDDLE, b'Hint="disk.vmdk"', b'Hint="' + hint + b'"')
    for step in range(2, 14):
        assert killed_at(step, partial(commit, case.fresh() / MIDDLE, threads=1))
        case.nobody_reads_wrong()
        case.finished()


@pytest.mark.parametrize(
    ("kind", "links"), [("monolithicSparse", True), ("twoGbMaxExtentFlat", True), ("monolithicFlat", False)]
)
def test_killed_at_any_step(
    quick_path: Path, kind: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    case = Stopped(quick_path, kind)
    step = 0
    while killed_at(step, partial(commit, case.fresh() / MIDDLE, threads=1)):
        case.nobody_reads_wrong()
        case.finished()
        # Names are changed in the first steps and in the last; in between one is as good as its neighbour.
        step += 1 if links or step < 12 else 2
    assert step > 30
    case.finished()


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentFlat", "vmfs"])
@pytest.mark.parametrize("top", [None, "twoGbMaxExtentSparse"])
def test_the_power_lost_at_any_step(quick_path: Path, kind: str, top: str | None) -> None:
    case = Stopped(quick_path, kind)
    folder = case.fresh()
    if top is not None:
        (folder / TOP).unlink()
        for path in folder.glob("disk-000002*"):
            path.unlink()
        scribble(make_child(folder / MIDDLE, folder / TOP, kind=top), 6)
        case.top = shows(folder / TOP)
    cuts = PowerCuts(folder)
    with cuts.watching():
        commit(folder / MIDDLE, threads=1)
    assert len(cuts.states) > 10
    for _ in cuts:
        case.nobody_reads_wrong()
        case.finished()


def is_marked(path: Path) -> bool:
    return any(finding.slug == "unclean" for finding in check_image(path).findings)


def test_what_goes_on_takes_the_mark_of_the_kill_away(quick_path: Path) -> None:
    """Unless there is more to mend, such as a table that its twin does not agree with."""
    case = Stopped(quick_path, "monolithicSparse")
    taken = 0
    for step in range(36, 60, 3):
        killed = killed_at(step, partial(commit, case.fresh() / MIDDLE, threads=1))
        if killed and (case.folder / MIDDLE).exists():
            was_marked = is_marked(case.folder / MIDDLE)  # it, or its parent
            plan = commit(case.folder / MIDDLE)
            assert is_marked(case.folder / BASE) is plan.marked
            taken += was_marked and not plan.marked
    assert taken > 0


def test_killed_while_going_on(quick_path: Path) -> None:
    case = Stopped(quick_path, "monolithicSparse")
    case.fresh()
    for step in (3, 9, 14, 20, 8, 30, 25, 5):
        if (case.folder / MIDDLE).exists():
            killed_at(step, lambda: commit(case.folder / MIDDLE, threads=1))
            case.nobody_reads_wrong()
    case.finished()


def test_the_disk_full_in_the_middle(quick_path: Path) -> None:
    case = Stopped(quick_path, "monolithicSparse")
    folder = case.fresh()
    with pytest.MonkeyPatch.context() as patch:
        write = os.pwrite
        left = 3

        def filling(fd: int, data: Any, at: int) -> int:
            nonlocal left
            if threading.current_thread() is not threading.main_thread():
                left -= 1
                if left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(fd, data, at)

        patch.setattr(os, "pwrite", filling)
        with pytest.raises(StorageError, match="No space left") as caught:
            commit(folder / MIDDLE)
    assert caught.value.hint is not None
    assert "no data is lost" in caught.value.hint
    assert shows(folder / TOP) == case.top  # not refused: a machine can go on with it
    case.nobody_reads_wrong()
    case.finished()


def test_interrupted(quick_path: Path) -> None:
    case = Stopped(quick_path, "monolithicSparse")
    folder = case.fresh()

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit(folder / MIDDLE, progress=interrupt)
    assert shows(folder / TOP) == case.top
    case.finished()


def test_written_to_after_it_was_stopped(quick_path: Path) -> None:
    """A machine goes on with the child; then the merge takes what it wrote, too."""
    base, child = make_chain(quick_path, size=256 * KIB)[:2]
    (quick_path / TOP).unlink()
    stopped = 0

    def stop(name: str) -> None:
        nonlocal stopped
        stopped += name == "pwrite"
        if stopped == 8:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with steps_told(stop), pytest.raises(StorageError):
        commit(child, threads=1)
    assert not base.exists()
    scribble(child, 77)
    expected = shows(child)
    commit(child)
    assert shows(base) == expected
    assert names_in(quick_path) == {BASE}


def test_a_stranger_has_the_other_name(quick_path: Path) -> None:
    _base, middle, top = make_chain(quick_path)
    cid = Descriptor.parse(_text(middle), "middle").cid
    assert cid is not None
    stranger = quick_path / merging_name(BASE, cid)
    stranger.write_bytes(b"something else")
    expected = shows(top)
    with pytest.raises(VmdkError, match="merging-"):
        commit(middle)
    assert shows(top) == expected
    assert stranger.read_bytes() == b"something else"


def _text(path: Path) -> bytes:
    return path.read_bytes()[512 : 11 * KIB]


# Names in images are not trusted


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Change a descriptor, embedded or not, without changing where anything lies."""
    data = path.read_bytes()
    assert data.count(old) == 1
    at = data.index(old)
    end = data.index(b"\n\0", at) if data.startswith(b"KDMV") else len(data)
    text = data[at:end].replace(old, new)
    rest = data[end:]
    grown = len(text) - (end - at)
    if data.startswith(b"KDMV"):
        rest = rest[:1] + rest[1 + grown :] if grown >= 0 else rest[:1] + bytes(-grown) + rest[1:]
    path.write_bytes(data[:at] + text + rest)


@pytest.mark.parametrize("hint", [b"/etc/passwd", b"../outside/disk.vmdk"])
def test_a_parent_outside_is_refused(tmp_path: Path, hint: bytes) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "in").mkdir()
    base = make_base(tmp_path / "outside")
    kept = base.read_bytes()
    child = make_child(make_base(tmp_path / "in"))
    (tmp_path / "in" / BASE).unlink()
    edit(child, b'Hint="disk.vmdk"', b'Hint="' + hint + b'"')
    with pytest.raises(TrustError):
        commit(child)
    assert base.read_bytes() == kept


def test_files_of_others_are_not_removed(tmp_path: Path) -> None:
    base = make_base(tmp_path, "twoGbMaxExtentSparse")
    child = make_child(base)
    victim = make_base(tmp_path, "twoGbMaxExtentSparse", name="victim.vmdk")
    (tmp_path / "disk-000001-s001.vmdk").unlink()
    edit(child, b"disk-000001-s001.vmdk", b"victim-s001.vmdk")
    for action in (plan_commit, commit):
        with pytest.raises(WriteRefused, match="belongs to"):
            action(child)
    assert shows(victim) == bytes(SIZE)
    assert base.exists()


def test_a_parent_that_was_renamed_by_hand_is_not_taken_for_merged(quick_path: Path) -> None:
    """Its base gone, a user finds it under another name and gives it the old one: nothing may be lost."""
    base = make_base(quick_path)
    refused = step = 0
    killed = True
    while killed:
        child = make_child(base)
        scribble(child, step)
        expected = shows(child)
        killed = killed_at(step, partial(commit, child))
        begun = [name for name in names_in(quick_path) if ".merging-" in name]
        if begun and not base.exists():
            (quick_path / begun[0]).rename(base)
            try:
                commit(child)
            except WriteRefused as error:
                hint, refused = str(error.hint), refused + 1
                base.rename(quick_path / begun[0])
                assert begun[0] in hint
                assert shows(child) == expected
        if child.exists():
            commit(child)
        assert shows(base) == expected
        step += 3
    assert refused


def test_parents_that_go_round(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    child = make_child(base)
    with open_disk(child) as disk:
        cid = disk.links[0].cid
    edit(base, b"parentCID=ffffffff", b'parentCID=%08x\nparentFileNameHint="%s"' % (cid, child.name.encode()))
    before = child.read_bytes(), base.read_bytes()
    for action in (plan_commit, commit):
        with pytest.raises(ChainTooDeep, match="leads back"):
            action(child)
    assert (child.read_bytes(), base.read_bytes()) == before


def test_the_tracking_of_others_is_not_removed(tmp_path: Path) -> None:
    victim = make_base(tmp_path, "monolithicFlat", name="victim.vmdk")
    tracked = tmp_path / "victim-ctk.vmdk"
    tracked.write_bytes(b"blocks")
    line = b'changeTrackPath="victim-ctk.vmdk"\n'
    victim.write_bytes(victim.read_bytes() + line)
    child = make_child(make_base(tmp_path))
    data = child.read_bytes()
    at = data.index(b"\0", 512)
    child.write_bytes(data[:at] + line + data[at + len(line) :])
    for action in (plan_commit, partial(delete_link, apply=True)):
        with pytest.raises(WriteRefused, match="belongs to"):
            action(child)
    assert tracked.exists()


def test_a_symbolic_link_is_followed_by_us_alone(tmp_path: Path) -> None:
    """A child that is named by a link is merged where it is; a parent that is one is refused."""
    (tmp_path / "real").mkdir()
    base, child = make_chain(tmp_path / "real")[:2]
    (tmp_path / "real" / TOP).unlink()
    expected = shows(child)
    link = tmp_path / "link.vmdk"
    link.symlink_to(child)
    commit(link)
    assert shows(base) == expected

    child = make_child(base)
    (tmp_path / "real" / "moved").mkdir()
    base.rename(tmp_path / "real" / "moved" / "base.vmdk")
    base.symlink_to("moved/base.vmdk")
    with pytest.raises(WriteRefused, match="symbolic link"):
        commit(child)
    assert base.is_symlink()


def test_what_else_may_be_handed_over(tmp_path: Path) -> None:
    for name, content in (("text.vmdk", b"hello"), ("empty.vmdk", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NotVmdk):
            commit(tmp_path / name)
