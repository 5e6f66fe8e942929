"""
Children by VMware's names and in fitting kinds, the tree of a folder, and removing links from it.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.cli import main
from nbd_vmdk.errors import FileExists, InUse, OptionError, TrustError, Unsupported, VmdkError, WriteRefused
from nbd_vmdk.ops.create import create_image
from nbd_vmdk.ops.create.child import is_elsewhere, parent_hint
from nbd_vmdk.ops.snapshot.commit import commit
from nbd_vmdk.ops.snapshot.create import create_child
from nbd_vmdk.ops.snapshot.delete import delete_link
from nbd_vmdk.ops.snapshot.listing import list_links
from nbd_vmdk.ops.snapshot.names import next_child, next_clone
from tests.images import desc
from tests.images.content import Content
from tests.snapshot import (
    BASE,
    MIDDLE,
    SIZE,
    TOP,
    by_qemu,
    make_base,
    make_chain,
    make_child,
    names_in,
    needs_qemu,
    scribble,
    shows,
    steps_told,
)

# Making children


@pytest.mark.parametrize(
    ("parent", "product", "child"),
    [
        ("monolithicSparse", None, "monolithicSparse"),
        ("monolithicFlat", None, "monolithicSparse"),
        ("twoGbMaxExtentSparse", None, "twoGbMaxExtentSparse"),
        ("twoGbMaxExtentFlat", None, "twoGbMaxExtentSparse"),
        ("vmfs", None, "vmfsSparse"),
        ("vmfs", "esxi", "vmfsSparse"),
        ("vmfs", "workstation", "monolithicSparse"),
        ("twoGbMaxExtentFlat", "workstation", "twoGbMaxExtentSparse"),
        ("twoGbMaxExtentFlat", "qemu", "monolithicSparse"),
        ("twoGbMaxExtentFlat", "esxi", "vmfsSparse"),
    ],
)
def test_the_kind_that_fits(tmp_path: Path, parent: str, product: str | None, child: str) -> None:
    base = make_base(tmp_path, parent)
    scribble(base, 1)
    made = create_child(base, product=product)
    assert made.create_type == child
    assert Path(made.path) == tmp_path / MIDDLE
    assert made.parent == BASE
    assert shows(Path(made.path)) == shows(base)
    assert create_image(tmp_path / "other.vmdk", parent=base, product=product).create_type == child


@needs_qemu
def test_as_qemu_sees_it(tmp_path: Path) -> None:
    base, middle, top = make_chain(tmp_path, "twoGbMaxExtentFlat")
    assert [by_qemu(path) for path in (base, middle, top)] == [shows(path) for path in (base, middle, top)]


@pytest.mark.parametrize(
    ("parent", "taken", "child"),
    [
        ("disk.vmdk", [], "disk-000001.vmdk"),
        ("disk.vmdk", ["disk-000001.vmdk", "disk-000003.vmdk"], "disk-000002.vmdk"),
        ("disk-000007.vmdk", [], "disk-000001.vmdk"),
        ("disk.vmdk", ["disk-000001-s001.vmdk", "DISK-000002.VMDK"], "disk-000003.vmdk"),
        ("disk-000001.vmdk", ["disk-000001-delta.vmdk"], "disk-000002.vmdk"),
        ("a-000001-b.VMDK", [], "a-000001-b-000001.vmdk"),
    ],
)
def test_the_next_name(parent: str, taken: list[str], child: str) -> None:
    assert next_child(parent, taken) == child


def test_the_next_clone() -> None:
    assert next_clone("disk-000002.vmdk", []) == "disk-cl1.vmdk"
    assert next_clone("disk-cl1.vmdk", ["disk-cl1.vmdk"]) == "disk-cl2.vmdk"


def test_how_a_parent_is_named(tmp_path: Path) -> None:
    for name in ("a/b", "c/d"):
        (tmp_path / name).mkdir(parents=True)
    parent = str(tmp_path / "a" / "disk.vmdk")
    for folder, hint, elsewhere in (
        ("a", "disk.vmdk", False),
        ("c", "../a/disk.vmdk", True),
        ("a/b", "../disk.vmdk", True),
        ("", "a/disk.vmdk", False),
        ("c/d", parent, True),
        ("/proc", parent, True),
    ):
        assert parent_hint(parent, str(tmp_path / folder)) == hint
        assert is_elsewhere(hint) is elsewhere
    with pytest.raises(OptionError, match="path of Windows"):
        parent_hint(str(tmp_path / "a" / "\\disk.vmdk"), str(tmp_path / "a"))


def test_protecting_the_parent(tmp_path: Path) -> None:
    base = make_base(tmp_path, "twoGbMaxExtentFlat")
    create_child(base, protect=True)
    for path in (base, tmp_path / "disk-f001.vmdk"):
        assert not path.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    assert (tmp_path / MIDDLE).stat().st_mode & stat.S_IWUSR


def test_what_is_no_parent(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    with open_disk(base, writable=True), pytest.raises(InUse):
        create_child(base)
    make_child(base, tmp_path / "x.vmdk")
    with pytest.raises(FileExists):
        create_child(base, tmp_path / "x.vmdk")
    with pytest.raises(OptionError):
        create_child(base, tmp_path / "x.txt")
    (tmp_path / "y.vmdk").write_bytes(b"hello")
    with pytest.raises(VmdkError):
        create_child(tmp_path / "y.vmdk")
    bare = desc.split_sparse(str(tmp_path), "split", Content.random(SIZE, seed=1))
    Path(bare.path).unlink()
    with pytest.raises((Unsupported, VmdkError)):
        create_child(tmp_path / "split-s001.vmdk")
    assert names_in(tmp_path) == {BASE, "x.vmdk", "y.vmdk", "split-s001.vmdk"}


def stopped_merge(folder: Path) -> str:
    """A merge of the middle of a chain that went wrong half-way; the name its parent has."""
    writes = 0

    def stop(name: str) -> None:
        nonlocal writes
        writes += name == "pwrite"
        if writes == 8:
            raise OSError(5, os.strerror(5))

    with steps_told(stop), pytest.raises(VmdkError):
        commit(folder / MIDDLE, threads=1)
    (name,) = (name for name in names_in(folder) if "merging" in name)
    return name


def test_nothing_is_begun_on_what_is_being_merged_into(tmp_path: Path) -> None:
    make_chain(tmp_path)
    name = stopped_merge(tmp_path)
    for action in (create_child, delete_link):
        with pytest.raises(WriteRefused, match="merged into it"):
            action(tmp_path / name)
    with pytest.raises(WriteRefused, match="no whole disk without it"):
        delete_link(tmp_path / MIDDLE, apply=True)
    rows = {row.link.name: row.merging for row in list_links(tmp_path)[0]}
    assert rows == {name: BASE, MIDDLE: None, TOP: None}


# The tree


def tree(path: Path, **options: Any) -> list[tuple[int, str, str]]:
    return [(row.level, row.link.name, row.state) for row in list_links(path, **options)[0]]


def test_a_tree(tmp_path: Path) -> None:
    make_chain(tmp_path, "twoGbMaxExtentSparse")
    make_child(tmp_path / BASE, tmp_path / "other.vmdk")
    make_base(tmp_path, "monolithicFlat", name="second.vmdk")
    expected = [
        (0, BASE, "base"),
        (1, MIDDLE, "good"),
        (2, TOP, "good"),
        (1, "other.vmdk", "good"),
        (0, "second.vmdk", "base"),
    ]
    assert tree(tmp_path) == expected
    assert tree(tmp_path / TOP) == expected
    rows, warnings = list_links(tmp_path)
    assert not warnings
    assert sum(row.occupied for row in rows) == sum(
        path.stat().st_blocks * 512 for path in tmp_path.iterdir()
    )


def test_old_and_lost_children(tmp_path: Path) -> None:
    make_chain(tmp_path)
    make_child(tmp_path / TOP, tmp_path / "fourth.vmdk")
    scribble(tmp_path / BASE, 5, write_parent=True)
    (tmp_path / TOP).unlink()
    assert tree(tmp_path) == [(0, BASE, "base"), (1, MIDDLE, "old"), (0, "fourth.vmdk", "lost")]


def test_clones_in_another_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    base = make_base(tmp_path / "a")
    clone = make_child(base, tmp_path / "b")
    assert tree(tmp_path / "b") == [(0, clone.name, "lost")]
    allowed: dict[str, Any] = {"allow_dirs": (tmp_path / "a",)}
    both = [(0, BASE, "base"), (1, clone.name, "good")]
    assert tree(tmp_path / "b", **allowed) == both
    assert tree(clone, **allowed) == both


def test_links_that_go_round_in_a_circle(tmp_path: Path) -> None:
    content = Content.random(SIZE, seed=2)
    for name, cid, parent, hint in (
        ("a", "1", "2", "b.vmdk"),
        ("b", "2", "1", "a.vmdk"),
        ("c", "3", "1", "a.vmdk"),
    ):
        text = {"parent_cid": f"0000000{parent}", "hint": hint}
        desc.monolithic_sparse(str(tmp_path), name, content, cid=f"0000000{cid}", text=text)
    assert sorted(tree(tmp_path)) == [(0, "a.vmdk", "good"), (0, "b.vmdk", "good"), (1, "c.vmdk", "good")]


def machine(folder: Path, current: str) -> None:
    (folder / "vm.vmx").write_text(
        f'.encoding = "UTF-8"\nscsi0:0.present = "TRUE"\nscsi0:0.fileName = "{current}"\n'
    )
    micros = 1_600_000_000_000_000
    low = micros & 0xFFFFFFFF
    (folder / "vm.vmsd").write_text(
        '.encoding = "UTF-8"\nsnapshot0.uid = "1"\nsnapshot0.displayName = "before\x1b[31m"\n'
        f'snapshot0.createTimeHigh = "{micros >> 32}"\n'
        f'snapshot0.createTimeLow = "{low - (1 << 32) if low >> 31 else low}"\n'
        f'snapshot0.disk0.fileName = "{BASE}"\nsnapshot0.disk0.node = "scsi0:0"\n'
    )


def test_advice_where_nothing_failed_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chain(tmp_path)
    assert main(["snapshot", "create", str(tmp_path / TOP)]) == 0
    assert capsys.readouterr().err.startswith("note: write to ")
    assert main(["snapshot", "delete", str(tmp_path / TOP)]) == 0
    assert "note: --apply does it" in capsys.readouterr().err


def test_what_the_machine_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chain(tmp_path)
    machine(tmp_path, TOP)
    assert main(["snapshot", "list", str(tmp_path)]) == 0
    base, middle, top = capsys.readouterr().out.splitlines()[1:]
    assert base.startswith(f"{tmp_path}/{BASE} ")
    assert middle.startswith(f"  {tmp_path}/{MIDDLE} ")
    assert base.endswith('frozen by "before\\x1b[31m" of 2020-09-13 12:26 UTC')
    assert top.endswith("current: vm.vmx scsi0:0")
    (tmp_path / "vm.vmsd").write_text("nonsense")
    assert main(["snapshot", "list", str(tmp_path), "--json"]) == 0
    told = capsys.readouterr()
    assert "vm.vmsd: line 1" in told.err
    found = json.loads(told.out)
    assert found["schema"] == 1
    assert [(link["level"], link["current"]) for link in found["links"]] == [
        (0, []),
        (1, []),
        (2, ["vm.vmx scsi0:0"]),
    ]


# Removing links


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentFlat", "vmfs"])
def test_removing_the_middle_keeps_what_stands_on_it(tmp_path: Path, kind: str) -> None:
    base, middle, top = make_chain(tmp_path, kind)
    other = make_child(middle, tmp_path / "other.vmdk")
    scribble(other, 8)
    kept = {path: shows(path) for path in (base, top, other)}
    plan = delete_link(middle)
    assert shows(middle)
    assert {Path(name).name for name in plan.children} == {TOP, "other.vmdk"}
    done = delete_link(middle, apply=True)
    assert done.children == plan.children
    assert {path: shows(path) for path in kept} == kept
    assert not [name for name in names_in(tmp_path) if name.startswith("disk-000001")]


def test_removing_what_nothing_stands_on(tmp_path: Path) -> None:
    base, middle, top = make_chain(tmp_path, "twoGbMaxExtentSparse")
    expected = shows(middle)
    delete_link(top, apply=True)
    assert names_in(tmp_path) == {BASE, MIDDLE, "disk-s001.vmdk", "disk-000001-s001.vmdk"}
    assert shows(middle) == expected
    delete_link(middle, apply=True)
    delete_link(base, apply=True)
    assert names_in(tmp_path) == set()


def test_a_child_is_found_in_a_full_folder(quick_path: Path) -> None:
    base = make_base(quick_path)
    child = make_child(base, quick_path / "the-child.vmdk")
    for number in range(10_100):
        (quick_path / f"other {number}.vmdk").touch()
    with pytest.raises(WriteRefused, match="it is the base of"):
        delete_link(base, apply=True)
    assert base.exists()
    assert commit(child).result == str(base)
    assert not child.exists()


def test_what_is_not_removed(tmp_path: Path) -> None:
    base, middle, top = make_chain(tmp_path)
    names = names_in(tmp_path)
    texts = [path.read_bytes() for path in (base, middle, top)]
    with pytest.raises(WriteRefused, match="it is the base of") as caught:
        delete_link(base, apply=True)
    assert caught.value.hint is not None
    assert "snapshot commit" in caught.value.hint
    for user in (middle, top):
        with open_disk(user), pytest.raises(InUse):
            delete_link(middle, apply=True)
    assert [path.read_bytes() for path in (base, middle, top)] == texts
    machine(tmp_path, TOP)
    with pytest.raises(WriteRefused, match=r"vm\.vmx scsi0:0"):
        delete_link(top, apply=True)
    assert names_in(tmp_path) == names | {"vm.vmx", "vm.vmsd"}


@pytest.mark.parametrize("name", ["victim-f001.vmdk", "../out/data.bin", "vm.nvram"])
def test_files_that_a_descriptor_only_claims(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    (tmp_path / "out").mkdir()
    folder.mkdir()
    make_base(folder, "twoGbMaxExtentFlat", name="victim.vmdk")
    data = folder / name
    if not data.exists():
        data.write_bytes(bytes(SIZE))
    hostile = folder / "hostile.vmdk"
    hostile.write_text(
        f'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        f'RW {SIZE // 512} FLAT "{name}" 0\n'
    )
    with pytest.raises((WriteRefused, TrustError)):
        delete_link(hostile, apply=True)
    assert data.exists()


# The command line


def test_what_makes_no_sense_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["snapshot", "list", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr() == ("", f"note: {tmp_path}/empty: no link of a disk is in there\n")
    base, *_ = make_chain(tmp_path)
    assert main(["snapshot", "commit", str(base)]) == 1
    assert f"nbd-vmdk snapshot list {base} shows who stands on whom" in capsys.readouterr().err
    assert main(["snapshot", "rebase", str(base), "--parent", str(base)]) == 1
    assert "it can't stand on itself" in capsys.readouterr().err
    assert main(["snapshot", "create", str(base), "--type", "vmfs"]) == 2
    assert "a child can't be vmfs" in capsys.readouterr().err


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path)
    scribble(base, 1)

    def run(*words: str, code: int = 0) -> dict[str, Any]:
        assert main(["snapshot", *words, "--json"]) == code
        told = capsys.readouterr()
        return dict(json.loads(told.out))

    made = run("create", str(base))
    child = tmp_path / MIDDLE
    assert made["filename"] == str(child)
    scribble(child, 2)
    expected = shows(child)
    clone = run("create", str(child), str(tmp_path / "clone.vmdk"))["filename"]
    plan = run("commit", str(child), "--dry-run")
    assert (plan["done"], plan["stage"], plan["grandchildren"]) == (False, "new", [clone])
    assert run("commit", str(child))["done"]
    assert not child.exists()
    assert run("rebase", clone, "--flatten")["parent"] is None
    assert shows(Path(clone)) == expected
    assert run("rebase", clone, "--parent", str(base), "--relink")["copied"] == 0
    assert run("rebase", clone, code=2)["error"]["error"] == "usage"
    assert run("commit", str(base), code=1)["error"]["error"] == "write-refused"
    with open_disk(base):
        assert run("commit", clone, code=5)["error"]["error"] == "in-use"
    assert not run("delete", clone)["applied"]
    assert Path(clone).exists()
    assert run("delete", clone, "--apply")["applied"]
    assert names_in(tmp_path) == {BASE}
    assert shows(base) == expected


def test_a_clone_is_told_what_opening_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "clone"):
        (tmp_path / name).mkdir()
    base = make_base(tmp_path / "base")
    for child, taken in (("base/a.vmdk", False), ("above.vmdk", False), ("clone/b.vmdk", True)):
        assert main(["snapshot", "create", str(base), str(tmp_path / child)]) == 0
        assert ("--allow-dir" in capsys.readouterr().err) is taken
        if not taken:
            shows(tmp_path / child)
        else:
            with pytest.raises(TrustError):
                shows(tmp_path / child)
