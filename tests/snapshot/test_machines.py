"""
A machine instead of an image, and the lines of its files that name a link: told, and changed on request.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import convert
from nbd_vmdk.cli import main
from nbd_vmdk.errors import FormatError, InUse, NotVmdk, OptionError, Unsupported, WriteRefused
from nbd_vmdk.ops.compact import compact
from nbd_vmdk.ops.linkset.clone import clone
from nbd_vmdk.ops.linkset.delete import delete
from nbd_vmdk.ops.linkset.rename import rename
from nbd_vmdk.ops.resize import resize
from nbd_vmdk.ops.snapshot.commit import commit
from nbd_vmdk.ops.snapshot.create import create_child
from nbd_vmdk.ops.snapshot.delete import delete_link
from nbd_vmdk.ops.snapshot.listing import list_links
from nbd_vmdk.ops.snapshot.machines import MachineFiles
from nbd_vmdk.vm import locate
from tests.snapshot import (
    BASE,
    MIDDLE,
    SIZE,
    TOP,
    killed_at,
    make_base,
    make_chain,
    names_in,
    scribble,
    shows,
    shows_or_refused,
)


def machine(folder: Path, *names: str, frozen: str | None = None) -> Path:
    """A machine with these disks, as odd as its file may be; and a snapshot that froze a link."""
    lines = ["#!/usr/bin/vmware", '.encoding = "UTF-8"', 'displayName = "a | b"', 'guestOS="other"']
    for number, name in enumerate(names):
        lines += [f'SCSI0:{number}.Present = "TRUE"', f'scsi0:{number}.FILENAME =  "{name}" # the disk']
    (folder / "vm.vmx").write_text("\r\n".join([*lines, 'ide1:0.fileName = "x.iso"', ""]), newline="")
    if frozen is not None:
        (folder / "vm.vmsd").write_text(
            f'snapshot0.uid = "1"\nsnapshot0.disk0.fileName = "{frozen}"\nsnapshot0.disk0.node = "scsi0:0"\n'
        )
    return folder / "vm.vmx"


def lock(vmx: Path) -> None:
    Path(f"{vmx}.lck").mkdir()
    Path(f"{vmx}.lck", "M1").touch()


def test_a_machine_stands_for_its_disk(tmp_path: Path) -> None:
    make_base(tmp_path)
    vmx = machine(tmp_path, BASE)
    assert resize(vmx, 2 * SIZE).new_size == 2 * SIZE
    assert compact(tmp_path).image == str(tmp_path / BASE)
    child = create_child(vmx)
    assert (child.path, child.base) == (str(tmp_path / MIDDLE), str(tmp_path / BASE))
    assert clone(vmx, tmp_path / "copy.vmdk").files == [(str(tmp_path / BASE), str(tmp_path / "copy.vmdk"))]
    with pytest.raises(OptionError, match="is no image") as caught:
        delete(vmx)
    assert str(tmp_path / BASE) in str(caught.value.hint)
    assert delete(f"{vmx}:scsi0:0", with_children=True, dry_run=True).links[-1] == str(tmp_path / BASE)


def test_what_is_odd_about_the_way_to_the_disk_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_base(tmp_path)
    vmx = machine(tmp_path, "C:\\vms\\" + BASE)
    vmx.write_text(vmx.read_text() + 'scsi0:0.redo = "disk.vmdk.REDO_a1"\n')
    for words in (["info"], ["map"], ["clone"], ["clone", "--linked"], ["snapshot", "create"]):
        target = [str(tmp_path / f"{len(words)}.vmdk")] if words[0] == "clone" else []
        assert main([*words, str(vmx), *target]) == 0
        told = capsys.readouterr().err
        assert told.count(f"warning: {vmx}: {BASE} beside it is taken for C:\\vms\\{BASE}\n") == 1, words
        assert "changes that are still in disk.vmdk.REDO_a1 are left out" in told


def test_a_machine_with_several_disks(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    make_base(tmp_path)
    make_base(tmp_path / "far", name="second.vmdk")
    vmx = machine(tmp_path, BASE, "far/second.vmdk", "gone.vmdk")
    with pytest.raises(NotVmdk, match="3 disks") as caught:
        create_child(vmx)
    assert f"{vmx}:scsi0:0 ({BASE})" in str(caught.value.hint)
    rows, warnings = list_links(vmx)
    assert [(row.link.name, row.current) for row in rows] == [
        (BASE, ("vm.vmx scsi0:0",)),
        ("second.vmdk", ("vm.vmx scsi0:1",)),
    ]
    assert "gone.vmdk" in warnings[0]
    made = create_child(f"{vmx}:scsi0:1", edit_vm=True)
    assert locate(f"{vmx}:scsi0:1").path == made.path == str(tmp_path / "far" / "second-000001.vmdk")


def test_a_machine_by_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    make_base(tmp_path)
    vmx = machine(tmp_path, BASE)
    (tmp_path / "links" / "vm.vmx").symlink_to("../vm.vmx")
    (tmp_path / "links" / "all").symlink_to("..")
    for number, name in enumerate(("vm.vmx", "vm.vmx:scsi0:0", "all"), 1):
        made = create_child(tmp_path / "links" / name, edit_vm=True)
        assert made.path == str(tmp_path / f"disk-{number:06}.vmdk")
        assert locate(vmx).path == made.path
    assert (tmp_path / "links" / "vm.vmx").is_symlink()


def test_the_machine_is_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "vm").mkdir()
    base = make_base(tmp_path / "store")
    vmx = machine(tmp_path / "vm", str(base))
    allowed: dict[str, Any] = {"allow_dirs": (tmp_path / "store",)}
    made = create_child(vmx, edit_vm=True, **allowed)
    assert [(each.file, each.new) for each in made.machines] == [(str(vmx), str(tmp_path / "store" / MIDDLE))]
    assert locate(vmx, **allowed).path == made.path == str(tmp_path / "store" / MIDDLE)
    commit(vmx, edit_vm=True, **allowed)
    assert locate(vmx, **allowed).path == str(base)


def test_what_is_in_an_appliance_stays(tmp_path: Path) -> None:
    make_base(tmp_path)
    convert(tmp_path / BASE, tmp_path / "app.ova")
    with pytest.raises(Unsupported, match="appliance"):
        resize(tmp_path / "app.ova", SIZE * 2)
    with pytest.raises(Unsupported) as caught:
        rename(tmp_path / "app.ova", tmp_path / "a b.ova")
    assert str(caught.value.hint).endswith(f": mv {tmp_path}/app.ova '{tmp_path}/a b.ova'")
    with pytest.raises(Unsupported) as caught:
        delete(tmp_path / "app.ova")
    assert str(caught.value.hint).endswith(f": rm {tmp_path}/app.ova")
    with pytest.raises(Unsupported, match="appliance") as caught:
        delete(f"{tmp_path}/app.ova:app-disk1.vmdk")
    assert "convert" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["", "./", "C:\\vms\\a\\"])
def test_the_machine_goes_on_with_the_child(tmp_path: Path, name: str) -> None:
    make_base(tmp_path)
    vmx = machine(tmp_path, name + BASE, frozen=BASE)
    vmx.chmod(0o640)
    before, frozen = vmx.read_bytes(), (tmp_path / "vm.vmsd").read_bytes()
    lines = create_child(vmx).machines
    assert vmx.read_bytes() == before
    assert [(line.key, line.old, line.new) for line in lines] == [
        ("scsi0:0.fileName", name + BASE, name + MIDDLE)
    ]
    create_child(vmx, tmp_path / "mine.vmdk", edit_vm=True)
    assert vmx.read_bytes() == before.replace(BASE.encode(), b"mine.vmdk")
    assert vmx.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "vm.vmsd").read_bytes() == frozen
    assert names_in(tmp_path) == {BASE, MIDDLE, "mine.vmdk", "vm.vmx", "vm.vmsd"}


def test_a_machine_that_is_open_is_not_changed(tmp_path: Path) -> None:
    make_chain(tmp_path)
    vmx = machine(tmp_path, TOP)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    lock(vmx)
    for action in (create_child, commit):
        with pytest.raises(InUse, match=r"vm\.vmx.*VMware's lock"):
            action(vmx, edit_vm=True)
    with pytest.raises(InUse, match=r"vm\.vmx"):
        rename(vmx, tmp_path / "x.vmdk", edit_vm=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_name_that_the_machine_can_not_say(tmp_path: Path) -> None:
    make_base(tmp_path)
    vmx = machine(tmp_path, BASE)
    vmx.write_bytes(vmx.read_bytes().replace(b"UTF-8", b"windows-1252").replace(b"other", b"\xe4"))
    before = vmx.read_bytes()
    with pytest.raises(FormatError, match="encoding"):
        create_child(vmx, tmp_path / "磁盘.vmdk", edit_vm=True)
    assert names_in(tmp_path) == {BASE, "vm.vmx"}
    create_child(vmx, tmp_path / "ü.vmdk", edit_vm=True)
    assert vmx.read_bytes() == before.replace(BASE.encode(), b"\xfc.vmdk")


def test_merged_and_renamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chain(tmp_path)
    vmx = machine(tmp_path, TOP, frozen=MIDDLE)
    expected = shows(tmp_path / TOP)

    def run(*words: str) -> dict[str, Any]:
        assert main([*words, "--edit-vm", "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    told = run("snapshot", "commit", str(tmp_path / MIDDLE))["machines"]
    assert told == [
        {
            "file": str(tmp_path / "vm.vmsd"),
            "key": "snapshot0.disk0.fileName",
            "old": MIDDLE,
            "new": BASE,
        }
    ]
    run("snapshot", "commit", str(vmx))
    assert names_in(tmp_path) == {BASE, "vm.vmx", "vm.vmsd"}
    (tmp_path / "in").mkdir()
    for new in ("new.vmdk", "in/deep.vmdk"):
        assert len(run("rename", f"{vmx}:scsi0:0", str(tmp_path / new))["machines"]) == 2
        assert f'"{new}"' in (tmp_path / "vm.vmsd").read_text()
        assert locate(vmx).path == str(tmp_path / new)
    assert shows(Path(locate(vmx).path)) == expected
    assert main(["rename", str(tmp_path / "in" / "deep.vmdk"), str(tmp_path / "x.vmdk"), "--edit-vm"]) == 0
    assert "no machine's file beside it" in capsys.readouterr().err


def test_killed_the_machine_has_a_whole_disk(quick_path: Path) -> None:
    """What the .vmx names can be read at every moment of a merge, and shows the same."""
    for step in range(0, 200, 3):
        folder = quick_path / f"{step}"
        folder.mkdir()
        make_base(folder, size=64 * 1024)
        vmx = machine(folder, BASE)
        child = create_child(vmx, edit_vm=True).path
        scribble(Path(child), 2, pieces=2)
        expected = shows(Path(child))
        killed = killed_at(step, lambda vmx=vmx: commit(vmx, edit_vm=True, threads=1))
        # Refused for a moment, while the parent has a new content ID that the child does not know yet.
        assert shows_or_refused(Path(locate(vmx).path)) in (expected, None), step
        if not killed:
            assert (locate(vmx).file, os.path.exists(child)) == (BASE, False)
            return
        if os.path.exists(child):
            commit(child, edit_vm=True, threads=1)
        assert locate(vmx).file == BASE
        assert shows(folder / BASE) == expected
    pytest.fail("it never ended")


def test_the_machine_goes_back_to_the_parent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path)
    scribble(base, 1)
    expected = shows(base)
    vmx = machine(tmp_path, "C:\\vms\\" + BASE)
    before = vmx.read_bytes()
    scribble(Path(create_child(vmx, edit_vm=True, protect=True).path), 2)
    with pytest.raises(WriteRefused, match=r"the disk of vm\.vmx scsi0:0") as caught:
        delete_link(vmx, apply=True)
    assert "--edit-vm" in str(caught.value.hint)
    now = vmx.read_bytes()
    assert main(["snapshot", "delete", str(tmp_path / MIDDLE), "--edit-vm"]) == 0
    said = capsys.readouterr().err
    assert f'vm.vmx would say scsi0:0.fileName = "C:\\vms\\{BASE}"\n' in said
    assert f"note: {base}: nobody may write to it until you allow that again: chmod u+w" in said
    assert (vmx.read_bytes(), names_in(tmp_path)) == (now, {BASE, MIDDLE, "vm.vmx"})
    assert main(["snapshot", "delete", str(vmx), "--edit-vm", "--apply", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["machines"]
    assert [(line["key"], line["new"]) for line in told] == [("scsi0:0.fileName", "C:\\vms\\" + BASE)]
    assert (vmx.read_bytes(), names_in(tmp_path)) == (before, {BASE, "vm.vmx"})
    assert shows(Path(locate(vmx).path)) == expected


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ("none", "no parent to go back to"),
        ("child", r"other\.vmdk stands on it, too"),
        ("grandchild", r"other\.vmdk stands on it, too"),
        ("frozen", 'the snapshot "" froze it'),
        ("machine", r"the disk of second\.vmx scsi0:0"),
        ("far", "in another folder"),
        ("open", "VMware's lock"),
    ],
)
def test_the_machine_can_not_go_back(tmp_path: Path, other: str, why: str) -> None:
    """Its parent is nobody's to write to, or there is none."""
    base = make_base(tmp_path)
    vmx = machine(tmp_path, BASE, frozen=BASE if other == "frozen" else None)
    if other == "machine":
        (tmp_path / "second.vmx").write_bytes(vmx.read_bytes())
    if other == "far":
        (tmp_path / "far").mkdir()
        child = Path(create_child(base, tmp_path / "far" / "x.vmdk").path)
        vmx = machine(tmp_path / "far", "x.vmdk")
    elif other != "none":
        child = Path(create_child(base).path)
        machine(tmp_path, child.name, frozen=BASE if other == "frozen" else None)
    if other in ("child", "grandchild"):
        create_child(base if other == "child" else child, tmp_path / "other.vmdk")
    if other == "open":
        lock(vmx)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    allowed = {"allow_dirs": (tmp_path,)} if other == "far" else {}
    with pytest.raises((WriteRefused, InUse), match=why):
        delete_link(vmx, apply=True, edit_vm=True, **allowed)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_killed_while_the_machine_goes_back(quick_path: Path) -> None:
    """What the .vmx names is always there: the link or its parent."""
    for step in range(100):
        folder = quick_path / f"{step}"
        folder.mkdir()
        make_base(folder, "twoGbMaxExtentSparse", size=64 * 1024)
        vmx = machine(folder, BASE)
        child = create_child(vmx, edit_vm=True).path
        killed = killed_at(step, lambda vmx=vmx: delete_link(vmx, apply=True, edit_vm=True))
        found = locate(vmx)
        assert shows(Path(found.path)) == bytes(64 * 1024)
        if not killed:
            assert (found.file, names_in(folder)) == (BASE, {BASE, "disk-s001.vmdk", "vm.vmx"})
            return
        if os.path.exists(child):
            delete_link(child, apply=True, edit_vm=True)
        assert locate(vmx).file == BASE
    pytest.fail("it never ended")


@pytest.mark.parametrize("kind", ["monolithicSparse", "vmfsSparse"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_child_that_no_machine_got_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, when: str
) -> None:
    make_base(tmp_path)
    vmx = machine(tmp_path, BASE)
    before, there = vmx.read_bytes(), set(tmp_path.iterdir())
    publish = MachineFiles.publish

    def stopped(self: MachineFiles) -> None:
        if when == "after":
            publish(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(MachineFiles, "publish", stopped)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        create_child("vm.vmx", "new.vmdk", kind=kind, edit_vm=True)
    if when == "before":
        assert (vmx.read_bytes(), set(tmp_path.iterdir())) == (before, there)
    else:  # the machine has it
        assert shows(tmp_path / "new.vmdk") == shows(tmp_path / BASE)
        assert b'"new.vmdk"' in vmx.read_bytes()
