"""
Renaming, moving, cloning and deleting: names inside and outside, children, refusals, being stopped anywhere.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.cli import main
from nbd_vmdk.errors import (
    FileExists,
    FileMissing,
    InUse,
    OptionError,
    StorageError,
    VmdkError,
    WriteRefused,
)
from nbd_vmdk.look import read_descriptor
from nbd_vmdk.ondisk.descriptor import Descriptor
from nbd_vmdk.ops.create import create_image
from nbd_vmdk.ops.linkset.clone import clone
from nbd_vmdk.ops.linkset.delete import delete
from nbd_vmdk.ops.linkset.rename import rename
from nbd_vmdk.ops.resize import resize
from nbd_vmdk.ops.snapshot import secondname
from nbd_vmdk.storage.local import LocalFile
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.units import MIB
from tests.manage import KINDS, faults, make
from tests.snapshot import (
    BASE,
    MIDDLE,
    TOP,
    by_qemu,
    killed_at,
    make_chain,
    make_child,
    names_in,
    needs_qemu,
    scribble,
    shows,
    shows_or_refused,
    steps_told,
)

SIZE = 2 * MIB


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder in another file system, if there is one."""
    with tempfile.TemporaryDirectory(prefix="nbd-vmdk-", dir="/var/tmp") as folder:
        if os.stat(folder).st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is no other file system here")
        yield Path(folder)


def described(path: Path) -> Descriptor:
    found = read_descriptor(*LocalFolder.for_image(path))
    assert found is not None
    return found


def extent_names(path: Path) -> list[str | None]:
    return [line.name for line in described(path).extents]


# Renaming


@needs_qemu
@pytest.mark.parametrize("kind", KINDS)
def test_renaming(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path, kind, SIZE)
    scribble(path, 1)
    before, names = shows(path), names_in(tmp_path)
    new = tmp_path / "better-000003.vmdk"
    told = rename(path, new, dry_run=True)
    assert names_in(tmp_path) == names
    assert rename(path, new).files == told.files
    assert names_in(tmp_path) == {name.replace("disk", "better-000003", 1) for name in names}
    assert {*extent_names(new), new.name} == names_in(tmp_path)
    assert shows(new) == by_qemu(new) == before
    assert faults(new) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_moving_a_link_of_a_chain(tmp_path: Path, kind: str, number: int) -> None:
    if kind == "vmfsSparse" and number == 0:
        kind = "vmfs"
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    links = make_chain(here, kind)
    before = [shows(path) for path in links]
    done = rename(links[number], there)
    links[number] = there / links[number].name
    assert len(done.children) == (number < 2)
    assert len(done.hints) == (number > 0) + (number < 2)
    allowed = {"allow_dirs": (here, there)}
    assert [shows(path, **allowed) for path in links] == before
    assert not any(str(here) in (described(path).parent_hint or "") for path in links)
    # And back, under another name.
    rename(links[number], here / "other.vmdk", **allowed)
    links[number] = here / "other.vmdk"
    assert [shows(path) for path in links] == before
    assert names_in(there) == set()
    assert faults(links[2]) == []


def test_a_child_in_a_folder_that_is_allowed(tmp_path: Path) -> None:
    """It stands on the image, in whose folder nothing else needs to be allowed."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    path, child = make(here, "monolithicSparse", SIZE), there / "child.vmdk"
    create_image(child, parent=str(path), allow_dirs=(here,))
    with pytest.raises(WriteRefused, match="stand on it"):
        delete(path, allow_dirs=(there,))
    with pytest.raises(WriteRefused, match="stands on it"):
        resize(path, 2 * SIZE, allow_dirs=(there,))
    assert len(rename(path, here / "new.vmdk", allow_dirs=(there,)).children) == 1
    assert shows(child, allow_dirs=(here,)) == bytes(SIZE)


def test_to_another_file_system(tmp_path: Path, elsewhere: Path) -> None:
    links = make_chain(tmp_path, "twoGbMaxExtentSparse")
    before = [shows(path) for path in links]
    names = {name for name in names_in(tmp_path) if name.startswith(("disk.", "disk-s"))}
    done = rename(links[0], elsewhere)
    assert done.copied > 0
    assert names_in(elsewhere) == names
    assert not names & names_in(tmp_path)
    links[0] = elsewhere / BASE
    assert [shows(path, allow_dirs=(elsewhere,)) for path in links] == before


@pytest.mark.parametrize(
    ("kind", "number", "far"),
    [
        ("monolithicSparse", 1, False),
        ("twoGbMaxExtentSparse", 0, False),
        ("twoGbMaxExtentSparse", 1, False),
        ("monolithicSparse", 0, True),
        ("vmfs", 0, True),
    ],
)
def test_killed_while_renaming(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, number: int, far: bool
) -> None:
    made, work = tmp_path / "made", tmp_path / "work"
    made.mkdir()
    before = [shows(path) for path in make_chain(made, kind)]
    there = request.getfixturevalue("elsewhere") if far else tmp_path / "there"
    step = 0
    while True:
        shutil.copytree(made, work)
        shutil.rmtree(there, ignore_errors=True)
        there.mkdir()
        allowed = {"allow_dirs": (work, there)}
        links = [work / BASE, work / MIDDLE, work / TOP]
        old, new = links[number], there / "new.vmdk"
        ended = not killed_at(step, lambda old=old, new=new, allowed=allowed: rename(old, new, **allowed))  # type: ignore[misc]
        found = [shows_or_refused(path, **allowed) for path in (old, new) if path.exists()]
        assert before[number] in found
        assert set(found) <= {None, before[number]}
        assert shows(links[2], **allowed) == before[2]
        try:
            rename(old, new, **allowed)
        except FileMissing:
            assert not old.exists()
        links[number] = new
        assert [shows(path, **allowed) for path in links] == before
        for folder in (work, there):
            visible = {name for name in names_in(folder) if not name.startswith(".")}
            named = {str(name) for path in links if path.parent == folder for name in extent_names(path)}
            assert visible == named | {path.name for path in links if path.parent == folder}
        shutil.rmtree(work)
        if ended:
            break
        step += 1
    assert step > 3


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(95, os.strerror(95))

    for kind in ("monolithicSparse", "twoGbMaxExtentSparse"):
        path = make(tmp_path, kind, SIZE)
        scribble(path, 1)
        before = shows(path)
        with monkeypatch.context() as patch:
            patch.setattr(secondname.os, "link", refused)
            rename(path, tmp_path / "new.vmdk")
        assert shows(tmp_path / "new.vmdk") == before
        assert not any(name.startswith("disk") for name in names_in(tmp_path))
        delete(tmp_path / "new.vmdk")


def test_what_is_not_renamed(tmp_path: Path) -> None:
    path = make(tmp_path, "twoGbMaxExtentSparse", SIZE)
    (tmp_path / "new-s002.vmdk").write_bytes(b"important")
    before = names_in(tmp_path)
    for wanted, error in (
        ("new.vmdk", FileExists),
        ("new.img", OptionError),
        ("disk.vmdk", OptionError),
        ("no/new.vmdk", FileMissing),
        ('n"w.vmdk', WriteRefused),
    ):
        with pytest.raises(error):
            rename(path, tmp_path / wanted)
    with open_disk(path, writable=True), pytest.raises(InUse):
        rename(path, tmp_path / "other.vmdk")
    child = make_child(path)
    with open_disk(child, writable=True), pytest.raises(InUse):
        rename(path, tmp_path / "other.vmdk")
    with pytest.raises(FileMissing):
        rename(tmp_path / "none.vmdk", tmp_path / "disk.vmdk")
    delete(child)
    assert names_in(tmp_path) == before
    assert shows(path) == bytes(SIZE)


def test_files_outside_are_not_touched(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    path = make(inside, "monolithicFlat", SIZE)
    (inside / "disk-flat.vmdk").rename(outside / "disk-flat.vmdk")
    path.write_text(path.read_text().replace('"disk-flat', '"../out/disk-flat'))
    for action in (delete, lambda path, **options: rename(path, tmp_path / "x.vmdk", **options)):
        for allowed in ((), (outside,)):
            with pytest.raises(VmdkError):
                action(path, allow_dirs=allowed)
    assert names_in(outside) == {"disk-flat.vmdk"}
    assert names_in(inside) == {"disk.vmdk"}


@pytest.mark.parametrize("kind", ["monolithicSparse", "streamOptimized"])
def test_a_copy_beside_is_an_image_of_its_own(tmp_path: Path, kind: str) -> None:
    """The descriptor in it goes on naming the file that it was copied from, and means its own."""
    path, new, copy = (tmp_path / name for name in ("a.vmdk", "b.vmdk", "copy.vmdk"))
    create_image(path, SIZE, kind=kind)
    shutil.copy(path, copy)
    rename(path, new)
    shutil.copy(copy, path)
    shutil.copy(copy, tmp_path / "again.vmdk")
    child = make_child(path)
    for each in (child, path, copy):
        delete(each)
    assert names_in(tmp_path) == {"again.vmdk", "b.vmdk"}
    assert shows(new) == bytes(SIZE)


def test_a_copied_description_names_the_same_files(tmp_path: Path) -> None:
    path = make(tmp_path, "twoGbMaxExtentSparse", SIZE)
    shutil.copy(path, tmp_path / "copy.vmdk")
    for action in (delete, lambda path: rename(path, tmp_path / "x.vmdk")):
        with pytest.raises(WriteRefused, match=r"belongs to .*copy.vmdk") as refused:
            action(path)
        assert refused.value.hint is not None


# Cloning


@needs_qemu
@pytest.mark.parametrize("kind", [*KINDS, "streamOptimized"])
def test_cloning_a_chain(tmp_path: Path, kind: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    kind = "vmfs" if kind == "vmfsSparse" else kind
    if kind == "streamOptimized":
        from nbd_vmdk.converting.conversion import convert

        convert(make_chain(tmp_path)[2], here / BASE, kind=kind)
        links = [here / BASE, make_child(here / BASE)]
    else:
        links = make_chain(here, kind)
    before = [shows(path) for path in links]
    for target, top in ((there, there / links[-1].name), (here / "copy.vmdk", here / "copy.vmdk")):
        assert clone(links[-1], target, dry_run=True).image == str(top)
        assert not top.exists()
        clone(links[-1], target)
        assert shows(top) == before[-1]
        assert faults(top) == []
        if kind != "vmfs":
            assert by_qemu(top) == before[-1]
    assert names_in(there) <= names_in(here)
    with open_disk(here / "copy.vmdk") as disk:
        copies = [Path(link.name) for link in disk.links]
    assert not {path.name for path in copies} & {path.name for path in links}
    uuid = described(links[0]).get("ddb.uuid")
    assert uuid != described(copies[-1]).get("ddb.uuid") or uuid is None
    scribble(copies[0], 9)
    assert [shows(path) for path in links] == before


@pytest.mark.parametrize("verb", [("clone",), ("clone", "--linked"), ("rename",), ("snapshot", "create")])
@pytest.mark.parametrize(
    ("target", "said", "hint"),
    [
        ("newdir/", "newdir", "make that folder first"),
        ("newdir/new.vmdk", "newdir", "make that folder first"),
        ("newdir", "newdir is no name of an image", "it should end in .vmdk, or be a folder that is there"),
    ],
)
def test_a_folder_that_is_not_there(
    tmp_path: Path,
    verb: tuple[str, ...],
    target: str,
    said: str,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path, "monolithicSparse", SIZE)
    monkeypatch.chdir(tmp_path)
    assert main([*verb, "disk.vmdk", target]) in (1, 2)
    told = capsys.readouterr().err
    assert said in told
    assert f"hint: {hint}\n" in told
    assert os.listdir() == ["disk.vmdk"]


@pytest.mark.parametrize("verb", ["clone", "rename"])
def test_files_that_fail_are_called_as_they_would_have_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    make(tmp_path, "vmfs", MIB)
    monkeypatch.chdir(tmp_path)
    write = LocalFile.write

    def full(self: LocalFile, data: Any, at: int) -> None:
        if "copy" in self.name:
            raise StorageError.of(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), self.name, "write")
        write(self, data, at)

    monkeypatch.setattr(LocalFile, "write", full)
    assert main([verb, "disk.vmdk", "copy.vmdk"]) == 1
    said = capsys.readouterr().err
    assert "copy.vmdk: write: No space left on device\nhint: make room" in said
    assert ".new-" not in said


def test_clones_are_whole_or_not_there(tmp_path: Path) -> None:
    make_chain(tmp_path, "twoGbMaxExtentFlat")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExists):
        clone(tmp_path / TOP, tmp_path)
    with open_disk(tmp_path / TOP, writable=True), pytest.raises(InUse):
        clone(tmp_path / TOP, tmp_path / "copy.vmdk")
    for limit in range(0, 30, 5):
        left = limit

        def full(name: str) -> None:
            nonlocal left
            left -= name in ("pwrite", "ftruncate", "fsync")
            if left < 0 and name != "unlink":
                raise OSError(28, os.strerror(28))

        with steps_told(full), pytest.raises((StorageError, OSError)):
            clone(tmp_path / TOP, tmp_path / "copy.vmdk")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Deleting


@pytest.mark.parametrize("kind", KINDS)
def test_deleting(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path, kind, SIZE)
    (tmp_path / "disk-other.vmdk").write_bytes(b"important")
    told = delete(path, dry_run=True)
    assert len(names_in(tmp_path)) == len(told.removes) + 1
    assert delete(path).removes == told.removes
    assert names_in(tmp_path) == {"disk-other.vmdk"}


@pytest.mark.parametrize("machine", [False, True])
def test_a_symbolic_link_is_not_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], machine: bool
) -> None:
    """Neither what it leads to, which rm would leave, nor the link alone, which is not the image."""
    (tmp_path / "real").mkdir()
    real = make(tmp_path / "real", "monolithicFlat", SIZE)
    link = tmp_path / "a link.vmdk"
    link.symlink_to("real/disk.vmdk")
    named = str(link)
    if machine:
        named = str(tmp_path / "vm.vmx")
        Path(named).write_text(f'scsi0:0.present = "TRUE"\nscsi0:0.fileName = "{link.name}"\n')
    before = names_in(real.parent)
    for words in ([], ["--dry-run"], ["--with-children"]):
        assert main(
            ["delete", f"{named}:scsi0:0" if machine else named, "--allow-dir", str(real.parent), *words]
        )
        told = capsys.readouterr().err
        assert told.startswith(f"error: {link}: it is a symbolic link to an image, and ")
        assert f"nbd-vmdk delete {real}; the link alone: rm '{link}'" in told
    assert names_in(real.parent) == before
    assert link.is_symlink()
    # The way to it may go through links.
    (tmp_path / "alias").symlink_to("real")
    delete(tmp_path / "alias" / "disk.vmdk")
    assert names_in(real.parent) == set()


def test_deleting_what_others_stand_on(tmp_path: Path) -> None:
    make_chain(tmp_path)
    for link in (BASE, MIDDLE):
        with pytest.raises(WriteRefused, match="stand on it"):
            delete(tmp_path / link)
    with open_disk(tmp_path / TOP, writable=True), pytest.raises(InUse):
        delete(tmp_path / TOP)
    before = shows(tmp_path / MIDDLE)
    delete(tmp_path / TOP)
    assert shows(tmp_path / MIDDLE) == before
    make_child(tmp_path / MIDDLE)
    make_child(tmp_path / BASE, tmp_path / "another.vmdk")
    found = delete(tmp_path / BASE, with_children=True)
    assert found.links[-1] == str(tmp_path / BASE)
    assert names_in(tmp_path) == set()


def test_a_tracking_file_that_another_disk_names_stays(tmp_path: Path) -> None:
    """Of what a deletion that was stopped has left, that is not its own."""
    path, other = (make(tmp_path, "monolithicFlat", SIZE, name=name) for name in ("a.vmdk", "b.vmdk"))
    (tmp_path / "a-ctk.vmdk").write_bytes(b"\xa2r\x4d\x31" + bytes(508))
    for each in (path, other):
        each.write_text(each.read_text().replace("# Extent", 'changeTrackPath="a-ctk.vmdk"\n# Extent'))
    path.rename(tmp_path / "a.vmdk.deleting")
    assert [Path(name).name for name in delete(path).removes] == ["a-flat.vmdk", "a.vmdk.deleting"]
    assert (tmp_path / "a-ctk.vmdk").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_deleting(tmp_path: Path, kind: str) -> None:
    step = 0
    while True:
        path = make(tmp_path, kind, SIZE)
        scribble(path, 1)
        expected = shows(path)
        ended = not killed_at(step, lambda path=path: delete(path))  # type: ignore[misc]
        if path.exists():
            assert shows(path) == expected  # a descriptor names nothing that is gone
        if names_in(tmp_path):
            delete(path)
        assert names_in(tmp_path) == set()
        if ended:
            break
        step += 1
    assert step > 0


# Commands


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chain(tmp_path)
    (tmp_path / "vm.vmx").write_text(f'scsi0:0.present = "TRUE"\nscsi0:0.fileName = "{TOP}"\n')
    expected = shows(tmp_path / TOP)
    assert main(["rename", str(tmp_path / TOP), str(tmp_path / "new.vmdk"), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert 'vm.vmx would have to say scsi0:0.fileName = "new.vmdk"; --edit-vm does that\n' in said.err
    assert main(["rename", str(tmp_path / TOP), str(tmp_path / "new.vmdk")]) == 0
    said = capsys.readouterr()
    assert 'vm.vmx must now say scsi0:0.fileName = "new.vmdk"\n' in said.err
    assert main(["clone", str(tmp_path / "new.vmdk"), str(tmp_path / "copy.vmdk"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["files"]) == 3
    assert shows(tmp_path / "copy.vmdk") == shows(tmp_path / "new.vmdk") == expected
    assert main(["clone", str(tmp_path / "copy.vmdk"), str(tmp_path / "linked.vmdk"), "--linked"]) == 0
    assert shows(tmp_path / "linked.vmdk") == expected
    assert main(["delete", str(tmp_path / "copy.vmdk")]) == 1
    assert main(["delete", str(tmp_path / "copy.vmdk"), "--with-children", "--json"]) == 0
    assert not (tmp_path / "linked.vmdk").exists()
    assert shows(tmp_path / "new.vmdk") == expected


def test_files_are_called_as_the_user_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "alias").symlink_to("out")
    create_image(tmp_path / "in" / BASE, SIZE, kind="twoGbMaxExtentSparse")
    make_child(tmp_path / "in" / BASE)
    (tmp_path / "in" / "vm.vmx").write_text(f'scsi0:0.present = "TRUE"\nscsi0:0.fileName = "../out/{BASE}"\n')
    child, base = ["disk-000001-s001.vmdk", MIDDLE], ["disk-s001.vmdk", BASE]

    def run(*words: str) -> list[str]:
        assert main([*words]) == 0
        told = capsys.readouterr()
        assert str(tmp_path) not in told.out
        return told.out.splitlines()

    def all_in(folder: str, names: list[str]) -> list[str]:
        return [f"to be removed: {folder}{name}" for name in names]

    monkeypatch.chdir(tmp_path)
    assert run("snapshot", "delete", f"in/{MIDDLE}") == all_in("in/", child)
    assert main(["snapshot", "commit", f"in/{MIDDLE}", "--dry-run"]) == 0
    assert f"to be removed: in/{child[0]}, in/{child[1]}" in capsys.readouterr().err
    assert run("clone", f"in/{MIDDLE}", "out", "--dry-run") == [
        f"in/{name} -> out/{name}" for name in (*child, *base)
    ]
    delete(f"in/{MIDDLE}")
    Path("out", BASE).touch()
    assert main(["rename", f"in/{BASE}", "out"]) == 1
    assert capsys.readouterr().err.startswith(f"error: out/{BASE}: it is there already")
    Path("out", BASE).unlink()
    assert run("rename", f"in/{BASE}", "out") == [f"in/{name} -> out/{name}" for name in base]
    assert run("delete", f"alias/{BASE}", "--dry-run") == all_in("alias/", base)
    words = ("delete", "in/vm.vmx:scsi0:0", "--allow-dir", "out", "--dry-run")
    assert run(*words) == all_in("out/", base)
    monkeypatch.chdir("in")
    assert run("delete", f"../out/{BASE}", "--dry-run") == all_in("../out/", base)
    assert run("rename", f"../out/{BASE}", "./x.vmdk") == [
        "../out/disk-s001.vmdk -> x-s001.vmdk",
        f"../out/{BASE} -> x.vmdk",
    ]
    assert run("delete", "x.vmdk") == ["removed: x-s001.vmdk", "removed: x.vmdk"]
    # Where the user did not name the folder, only the whole path says where the file is.
    create_image(tmp_path / "out" / BASE, SIZE)
    (tmp_path / "in" / "x.vmdk").symlink_to(f"../out/{BASE}")
    assert main(["rename", "x.vmdk", "y.vmdk", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out/{BASE} -> y.vmdk\n"


def test_change_tracking_that_can_not_be_read(tmp_path: Path, elsewhere: Path) -> None:
    """Where it has to be copied; the error names it, and nothing has been moved."""
    text = make(tmp_path, "monolithicFlat", SIZE, name="a.vmdk")
    (tmp_path / "a-ctk.vmdk").mkdir()
    text.write_text(text.read_text().replace("# Extent", 'changeTrackPath="a-ctk.vmdk"\n# Extent'))
    before = names_in(tmp_path)
    with pytest.raises(StorageError, match=r"a-ctk\.vmdk: read: Is a directory"):
        rename(text, elsewhere)
    assert names_in(tmp_path) == before
    assert names_in(elsewhere) == set()
