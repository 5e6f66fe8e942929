"""Which disks are behind a path: folders, machines, snapshots; their names; and hostile ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_vmdk.errors import FileMissing, FormatError, NotVmdk, OptionError, TrustError, VmdkError
from nbd_vmdk.ops.info import image_info
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.vm import find_all, find_disks, leads_to_disks, locate
from nbd_vmdk.vm.found import FoundDisk, name_uniquely
from tests.disks import content, dictionary, faults, names, plugged, shown, sparse, stream
from tests.images import desc
from tests.images.content import MIB

HERE = LocalFolder.for_folder("/")


# Names


def named(*paths: str) -> list[str]:
    disks = [FoundDisk(HERE, os.path.basename(path), path) for path in paths]
    name_uniquely(disks)
    return [disk.name for disk in disks]


def test_names_grow_only_where_they_clash() -> None:
    assert named("/a/x.vmdk", "/a/y.vmdk") == ["x.vmdk", "y.vmdk"]
    assert named("/a/x.vmdk", "/b/x.vmdk", "/b/y.vmdk") == ["a/x.vmdk", "b/x.vmdk", "y.vmdk"]
    assert named("/a/b/x", "/c/b/x", "/c/d/x") == ["a/b/x", "c/b/x", "d/x"]
    assert named("/x", "/b/x", "/c/b/x") == ["x", "b/x", "c/b/x"]
    assert named("/a/one.ova/disk1.vmdk", "/a/two.ova/disk1.vmdk") == [
        "one.ova/disk1.vmdk",
        "two.ova/disk1.vmdk",
    ]


def test_names_are_text_that_is_fit_to_be_shown() -> None:
    assert named("/a/" + os.fsdecode(b"gr\xfc.vmdk")) == ["gr\\xfc.vmdk"]
    assert named("/a/x\x1b[31m\n.vmdk") == ["x\\x1b[31m\\x0a.vmdk"]
    two = named("/x\n", "/x\\x0a")
    assert len(set(two)) == 2
    long = named(*(f"/{letter}" + "ü" * 5000 for letter in "abc"), "/x")
    assert len(set(long)) == 4
    assert max(len(name.encode()) for name in long) < 1100


PART = st.sampled_from(["a", "b", "x.vmdk", "\n", "\\x0a", "\\x0a (1)", "\udcfc"])


@given(st.lists(st.lists(PART, min_size=1, max_size=4).map("/".join), unique=True, max_size=8))
def test_names_always_differ(paths: list[str]) -> None:
    found = named(*(f"/{path}" for path in paths))
    assert len(set(found)) == len(paths)
    for name in found:
        name.encode()


# Folders


def test_a_folder_has_the_tops(tmp_path: Path) -> None:
    base = sparse(tmp_path, "base")
    low = desc.split_sparse(str(tmp_path), "low", content("low"), 600, parent=base)
    desc.monolithic_sparse(str(tmp_path), "top", content("top"), parent=low)
    desc.monolithic_flat(str(tmp_path), "disk10", content("disk10"))
    sparse(tmp_path, "disk2")
    desc.ctk_file(str(tmp_path / "disk2-ctk.vmdk"))
    (tmp_path / "notes.txt").write_text("no disk")
    assert names(tmp_path) == ["disk2.vmdk", "disk10.vmdk", "top.vmdk"]
    assert find_disks(f"{tmp_path}/")[0].path == str(tmp_path / "disk2.vmdk")


def test_a_copy_does_not_hide_its_original(tmp_path: Path) -> None:
    original = Path(sparse(tmp_path, "disk").path)
    shutil.copy(original, tmp_path / "copy.vmdk")  # whose descriptor goes on to name disk.vmdk
    assert names(tmp_path) == ["copy.vmdk", "disk.vmdk"]
    (tmp_path / "link.vmdk").symlink_to("disk.vmdk")
    assert names(tmp_path) == ["copy.vmdk", "disk.vmdk"]


def test_a_parent_elsewhere_of_the_same_name_is_no_parent(tmp_path: Path) -> None:
    base = sparse(tmp_path / "master", "disk")
    sparse(tmp_path / "vm", "disk", "another", cid="0000beef")
    desc.monolithic_sparse(
        str(tmp_path / "vm"), "clone", content("clone"), parent=base, text={"hint": "../master/disk.vmdk"}
    )
    assert names(tmp_path / "vm") == ["clone.vmdk", "disk.vmdk"]


def test_what_is_broken_is_not_passed_over(tmp_path: Path) -> None:
    sparse(tmp_path, "good")
    (tmp_path / "bad.vmdk").write_bytes(b"KDMV" + bytes(100))
    flat = desc.monolithic_flat(str(tmp_path), "alone", content("alone"))
    os.unlink(flat.path)
    assert names(tmp_path) == ["alone-flat.vmdk", "bad.vmdk", "good.vmdk"]


def test_a_folder_without_disks_says_what_else_is_there(tmp_path: Path) -> None:
    with pytest.raises(NotVmdk, match="folder without a disk"):
        find_disks(tmp_path)
    (tmp_path / "vm.vmx").write_text("")
    with pytest.raises(NotVmdk) as caught:
        find_disks(tmp_path)
    assert "vm.vmx" in str(caught.value.hint)


def test_links_in_a_folder_do_not_lead_out(tmp_path: Path) -> None:
    sparse(tmp_path / "secret", "other")
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "disk.vmdk").symlink_to(tmp_path / "secret" / "other.vmdk")
    (found,) = find_disks(tmp_path / "vm")
    with pytest.raises(TrustError):
        found.folder.open(found.file)
    with pytest.raises(TrustError):
        shown(tmp_path / "vm")
    assert shown(tmp_path / "vm", allow_dirs=[tmp_path / "secret"]) == "other"


# One of several


def test_the_only_disk_of_a_folder(tmp_path: Path) -> None:
    sparse(tmp_path, "one")
    assert shown(tmp_path) == "one"
    sparse(tmp_path, "two words")
    with pytest.raises(NotVmdk, match="a folder with 2 disks") as caught:
        shown(tmp_path)
    assert str(caught.value.hint) == f"name one of them: {tmp_path}/one.vmdk, '{tmp_path}/two words.vmdk'"


def test_a_real_file_comes_first(tmp_path: Path) -> None:
    sparse(tmp_path, "a")
    vmx = dictionary(tmp_path / "vm.vmx", plugged(scsi0_0="a.vmdk"))
    assert shown(f"{vmx}:a.vmdk") == "a"
    image = sparse(tmp_path, "real")
    os.rename(image.path, f"{vmx}:a.vmdk")
    assert shown(f"{vmx}:a.vmdk") == "real"


def test_colons_in_other_names(tmp_path: Path) -> None:
    image = sparse(tmp_path / "we:ird", "a")
    assert shown(image.path) == "a"
    with pytest.raises(FileMissing, match=r"a\.vmdk:x: no such file"):
        shown(f"{image.path}:x")
    with pytest.raises(FileMissing):
        shown(f"{tmp_path}:x")
    with pytest.raises(OptionError):
        shown("")


# Machines


def machine(folder: Path, **disks: str) -> str:
    return dictionary(folder / "vm.vmx", plugged(**disks))


def test_a_machines_disks_in_bus_order(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        sparse(tmp_path, name)
    vmx = machine(tmp_path, ide0_0="c.vmdk", scsi0_1="b.vmdk", scsi0_0="a.vmdk")
    found = find_disks(vmx)
    assert [(disk.name, disk.place) for disk in found] == [
        ("a.vmdk", "scsi0:0"),
        ("b.vmdk", "scsi0:1"),
        ("c.vmdk", "ide0:0"),
    ]
    assert shown(f"{vmx}:b.vmdk") == "b"
    assert shown(f"{vmx}:ide0:0") == "c"
    for wrong in ("d.vmdk", "scsi0:2", "", "../a.vmdk", "a"):
        with pytest.raises(NotVmdk, match="no disk") as caught:
            shown(f"{vmx}:{wrong}")
        assert caught.value.hint == "there is scsi0:0 (a.vmdk), scsi0:1 (b.vmdk), ide0:0 (c.vmdk)"
    with pytest.raises(NotVmdk, match="a machine with 3 disks") as caught:
        shown(vmx)
    assert str(caught.value.hint).startswith(f"name one of them: {vmx}:scsi0:0 (a.vmdk), {vmx}:scsi0:1 (b.v")


def test_what_is_known_of_several(tmp_path: Path) -> None:
    for name in ("a", "b"):
        sparse(tmp_path, name)
    vmx = machine(tmp_path, ide0_0="gone.vmdk", scsi0_0="a.vmdk")
    facts = image_info(vmx)
    assert facts["error"]["message"] == "a machine with 2 disks"
    there = {"name": "scsi0:0", "virtual-size": MIB, "filename": f"{tmp_path}/a.vmdk", "state": "there"}
    gone = {"name": "ide0:0", "virtual-size": None, "filename": f"{tmp_path}/gone.vmdk"}
    assert facts["disks"] == [there, gone | {"state": "no such file"}]
    assert "disks" not in image_info(f"{vmx}:scsi0:0")
    assert [disk["name"] for disk in image_info(tmp_path)["disks"]] == ["a.vmdk", "b.vmdk"]


def test_a_machine_takes_the_current_link(tmp_path: Path) -> None:
    base = sparse(tmp_path, "a")
    desc.monolithic_sparse(str(tmp_path), "a-000001", content("child"), parent=base)
    assert shown(machine(tmp_path, scsi0_0="a-000001.vmdk")) == "child"


def test_names_from_another_host(tmp_path: Path) -> None:
    sparse(tmp_path, "a")
    sparse(tmp_path / "sub", "b")
    vmx = machine(
        tmp_path,
        scsi0_0="/vmfs/volumes/5f1/vm/a.vmdk",
        scsi0_1="sub\\b.vmdk",
        ide0_0="C:\\VMs\\vm\\a.vmdk",
        ide0_1="gone.vmdk",
    )
    found = find_disks(vmx)
    assert [disk.path for disk in found[:3]] == [
        f"{tmp_path}/{name}" for name in ("a.vmdk", "sub/b.vmdk", "a.vmdk")
    ]
    assert "a.vmdk beside it is taken for /vmfs/volumes/5f1/vm/a.vmdk" in found[0].warnings[0]
    assert faults(found) == [f"{tmp_path}/gone.vmdk: no such file"]
    assert shown(f"{vmx}:b.vmdk") == "b"


@pytest.mark.parametrize("name", ["../secret/s.vmdk", "ABSOLUTE", "link.vmdk", "sub/../../secret/s.vmdk"])
def test_a_machine_that_names_files_outside(tmp_path: Path, name: str) -> None:
    sparse(tmp_path / "secret", "s")
    (tmp_path / "vm" / "sub").mkdir(parents=True)
    (tmp_path / "vm" / "link.vmdk").symlink_to("../secret/s.vmdk")
    wanted = str(tmp_path / "secret" / "s.vmdk") if name == "ABSOLUTE" else name
    vmx = machine(tmp_path / "vm", scsi0_0=wanted)
    (found,) = find_disks(vmx)
    assert isinstance(found.fault, TrustError)
    assert str(found.fault).startswith(f"{vmx}: ")
    assert "--allow-dir" in str(found.fault.hint)
    with pytest.raises(TrustError):
        shown(vmx)
    assert shown(vmx, allow_dirs=[tmp_path / "secret"]) == "s"


def test_a_machine_that_names_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.vmdk")
    vmx = machine(
        tmp_path, scsi0_0="pipe.vmdk", scsi0_1="/dev/sda", scsi0_2=".", scsi0_3="x\x1b[31m", scsi0_4="/"
    )
    found = find_disks(vmx)
    assert len(faults(found)) == 5
    for disk in found:
        assert "\x1b" not in str(disk.fault)


def test_texts_that_are_no_machines(tmp_path: Path) -> None:
    (tmp_path / "vm.vmx").write_bytes(b"\0" * 100)
    with pytest.raises(FormatError):
        find_disks(tmp_path / "vm.vmx")
    with (tmp_path / "vm.vmx").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match="too many"):
        find_disks(tmp_path / "vm.vmx")
    (tmp_path / "vm.vmx").write_text("")
    with pytest.raises(NotVmdk, match="without disks"):
        find_disks(tmp_path / "vm.vmx")
    with pytest.raises(FileMissing):
        find_disks(tmp_path / "gone.vmx")
    machine(tmp_path, **{f"scsi{number}_0": f"{number}.vmdk" for number in range(999)})
    assert len(find_disks(tmp_path / "vm.vmx")) == 999
    machine(tmp_path, **{f"scsi0_{number}": f"{number}.vmdk" for number in range(1001)})
    with pytest.raises(FormatError, match="1001 disks"):
        find_disks(tmp_path / "vm.vmx")


def test_changes_in_a_redo_log_are_told(tmp_path: Path) -> None:
    sparse(tmp_path, "a")
    values = plugged(scsi0_0="a.vmdk") | {"scsi0:0.redo": "a.vmdk.REDO_x1"}
    (found,) = find_disks(dictionary(tmp_path / "vm.vmx", values))
    assert "REDO_x1 are left out" in found.warnings[0]


# Snapshots


@pytest.fixture
def snapshots(tmp_path: Path) -> Path:
    """Two disks, two snapshots."""
    boot, data = sparse(tmp_path, "boot"), sparse(tmp_path, "data")
    boot1 = desc.monolithic_sparse(str(tmp_path), "boot-000001", content("boot1"), parent=boot)
    desc.monolithic_sparse(str(tmp_path), "boot-000002", content("boot2"), parent=boot1)
    desc.monolithic_sparse(str(tmp_path), "data-000001", content("data1"), parent=data)
    machine(tmp_path, scsi0_0="boot-000002.vmdk", scsi0_1="data-000001.vmdk")
    values = {
        "snapshot0.uid": "1",
        "snapshot0.displayName": "first",
        "snapshot0.disk0.fileName": "boot.vmdk",
        "snapshot0.disk0.node": "scsi0:0",
        "snapshot0.disk1.fileName": "data.vmdk",
        "snapshot0.disk1.node": "scsi0:1",
        "snapshot1.uid": "4",
        "snapshot1.displayName": "second",
        "snapshot1.disk0.fileName": "boot-000001.vmdk",
        "snapshot1.disk0.node": "scsi0:0",
        "snapshot2.uid": "5",
        "snapshot2.displayName": "second",
    }
    dictionary(tmp_path / "vm.vmsd", values)
    return tmp_path


def test_a_snapshot_by_name_and_number(snapshots: Path) -> None:
    for path in ("vm.vmx", "vm.vmsd"):
        assert names(snapshots / path, snapshot="first") == ["boot.vmdk", "data.vmdk"]
        assert names(snapshots / path, snapshot="1") == ["boot.vmdk", "data.vmdk"]
        assert names(snapshots / path, snapshot="4") == ["boot-000001.vmdk"]
    assert names(snapshots / "vm.vmx") == ["boot-000002.vmdk", "data-000001.vmdk"]
    assert all(disk.frozen for disk in find_disks(snapshots / "vm.vmx", snapshot="first"))


def test_a_snapshot_that_is_not_there(snapshots: Path) -> None:
    for wanted, why in (("third", "no snapshot 'third'"), ("second", "2 snapshots"), ("5", "has no disks")):
        with pytest.raises(VmdkError, match=why):
            find_disks(snapshots / "vm.vmx", snapshot=wanted)
    with pytest.raises(OptionError) as caught:
        find_disks(snapshots / "vm.vmsd")
    assert "1 'first', 4 'second'" in str(caught.value.hint)
    with pytest.raises(OptionError, match="only of a machine"):
        find_disks(snapshots / "boot.vmdk", snapshot="first")
    os.rename(snapshots / "vm.vmsd", snapshots / "one.vmsd")
    assert names(snapshots / "vm.vmx", snapshot="first") == ["boot.vmdk", "data.vmdk"]
    dictionary(snapshots / "two.vmsd", {})
    with pytest.raises(OptionError, match="2 snapshot lists beside it") as caught:
        find_disks(snapshots / "vm.vmx", snapshot="first")
    assert f"{snapshots}/one.vmsd, {snapshots}/two.vmsd" in str(caught.value.hint)
    os.unlink(snapshots / "one.vmsd")
    os.unlink(snapshots / "two.vmsd")
    with pytest.raises(OptionError, match="it has no snapshots") as caught:
        find_disks(snapshots / "vm.vmx", snapshot="first")
    assert caught.value.hint


# Several paths


def test_each_disk_once(tmp_path: Path) -> None:
    a, b = sparse(tmp_path, "a"), sparse(tmp_path / "sub", "a", "b")
    (tmp_path / "link.vmdk").symlink_to("a.vmdk")
    found = find_all([tmp_path / "link.vmdk", a.path, tmp_path / "sub", b.path])
    assert [disk.name for disk in found] == ["link.vmdk", "a.vmdk"]
    assert [disk.path for disk in found] == [str(tmp_path / "link.vmdk"), b.path]
    with pytest.raises(OptionError):
        find_all([])


def test_what_leads_to_disks(tmp_path: Path) -> None:
    image = sparse(tmp_path, "a").path
    vmx = machine(tmp_path, scsi0_0="a.vmdk")
    for path in (tmp_path, vmx, f"{vmx}:a.vmdk", f"{vmx}:scsi0:0", "gone.OVA", "gone.ovf"):
        assert leads_to_disks(path)
    for path in (image, "gone.vmdk", "gone:a.vmdk", "raw.img", f"{tmp_path}:a"):
        assert not leads_to_disks(path)


def test_locate_gives_the_fault(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        locate(machine(tmp_path, scsi0_0="gone.vmdk"))
    image = stream(tmp_path, "s")
    assert locate(image.path).path == image.path
