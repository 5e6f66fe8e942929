"""What may be asked for: products and their reasons, contradictions, names, custom disks, parents."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

import nbd_vmdk
from nbd_vmdk import create_image, open_disk
from nbd_vmdk.errors import (
    BadField,
    ChainTooDeep,
    FileExists,
    FileMissing,
    FormatError,
    InUse,
    NotVmdk,
    OptionError,
    StorageError,
    Truncated,
    TrustError,
    Unsupported,
)
from nbd_vmdk.ondisk.descriptor import Descriptor
from nbd_vmdk.ops.create.options import KINDS
from nbd_vmdk.ops.create.products import PRODUCTS
from nbd_vmdk.units import GIB, KIB, MIB, SECTOR, TIB
from tests.create.tools import CHILDREN, names, needs_qemu, qemu_bytes, qemu_info, sound


def descriptor(path: Path) -> Descriptor:
    data = path.read_bytes()
    return Descriptor.parse(data[SECTOR : 21 * SECTOR] if data.startswith(b"KDMV") else data, str(path))


# Products.


@pytest.mark.parametrize(
    ("product", "kind"),
    [
        ("workstation", "monolithicSparse"),
        ("ESXi", "vmfs"),
        ("ova", "streamOptimized"),
        ("qemu", "monolithicSparse"),
        ("virtualbox", "monolithicSparse"),
    ],
)
def test_a_product_gets_its_kind_and_a_reason(tmp_path: Path, product: str, kind: str) -> None:
    made = create_image(tmp_path / "disk.vmdk", 4 * MIB, product=product)
    assert made.create_type == kind
    assert any(note.startswith(f"made as {kind}: ") for note in made.notes)
    assert not made.warnings
    sound(tmp_path / "disk.vmdk")


@pytest.mark.parametrize(
    ("parent", "options", "told"),
    [
        (None, {"kind": "monolithicSparse"}, None),
        (None, {"kind": "twoGbMaxExtentSparse", "extent_size": MIB}, None),
        (None, {"kind": "vmfsSparse"}, "destroys a delta"),
        ("monolithicSparse", {}, None),
        ("vmfs", {}, "destroys a delta"),
        ("twoGbMaxExtentFlat", {}, None),  # all of it is in one extent
        ("twoGbMaxExtentFlat", {"extent_size": MIB}, "in several extents"),
        ("monolithicFlat", {"kind": "twoGbMaxExtentSparse", "extent_size": MIB}, "in several extents"),
    ],
)
def test_what_qemu_spoils(
    tmp_path: Path, parent: str | None, options: dict[str, Any], told: str | None
) -> None:
    """A note; a warning where QEMU is the product; nothing where another one is."""
    if parent is not None:
        create_image(tmp_path / "base.vmdk", 3 * MIB, kind=parent)
        options = {**options, "parent": tmp_path / "base.vmdk"}
    size = 3 * MIB if parent is None else None
    made = create_image(tmp_path / "plain.vmdk", size, **options)
    assert told is None or told in " ".join(made.notes)
    assert any("QEMU" in note for note in made.notes) is (told is not None)
    wanted = {"kind": made.create_type, **options, "product": "qemu"}
    made = create_image(tmp_path / "qemu.vmdk", size, **wanted)
    assert any("QEMU (7.2" in warning for warning in made.warnings) is (told is not None)
    wanted["product"] = "esxi" if made.create_type == "vmfsSparse" else "workstation"
    made = create_image(tmp_path / "other.vmdk", size, **wanted)
    assert not any("QEMU" in text for text in (*made.notes, *made.warnings))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "custom"])
def test_a_kind_that_a_product_does_not_take(tmp_path: Path, product: str, kind: str) -> None:
    known = PRODUCTS[product]
    assert not set(known.refused) & set(known.disliked)
    assert known.kind not in known.refused
    if kind in known.refused:
        with pytest.raises(OptionError) as refused:
            create_image(tmp_path / "disk.vmdk", MIB, product=product, kind=kind)
        assert known.refused[kind] in str(refused.value)
        assert names(tmp_path) == []
    else:
        made = create_image(tmp_path / "disk.vmdk", MIB, product=product, kind=kind)
        assert made.warnings == ((known.disliked[kind],) if kind in known.disliked else ())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"product": "virtualbox", "zeroed_grain": True}, "header version 2"),
        ({"product": "virtualbox", "extents": ('RW 8 VMFSSPARSE "x"',)}, "VMFSSPARSE extents"),
        ({"product": "qemu", "extents": ("RW 8 ZERO",)}, "createType custom"),
        ({"product": "parallels"}, "no product that is known"),
        (
            {"product": "virtualbox", "kind": "twoGbMaxExtentFlat", "extent_size": MIB, "size": 1001 * MIB},
            "more than VirtualBox reads",
        ),
    ],
)
def test_what_a_product_refuses_besides(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    if "extents" not in options:
        options = {"size": MIB} | options
    with pytest.raises(OptionError, match=why):
        create_image(tmp_path / "disk.vmdk", **options)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("size", "options", "what"),
    [
        (9 * TIB, {"product": "workstation", "kind": "monolithicFlat"}, "largest disk of Workstation"),
        (MIB, {"product": "workstation", "grain_size": 128 * KIB}, "grains of up to 64 KiB"),
    ],
)
def test_what_a_product_dislikes_besides(
    tmp_path: Path, size: int, options: dict[str, Any], what: str
) -> None:
    made = create_image(tmp_path / "disk.vmdk", size, **options)
    assert any(what in warning for warning in made.warnings)


# Contradictions.


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "a size is needed"),
        ({"size": 0}, "at least one sector"),
        ({"size": -5}, "at least one sector"),
        ({"size": MIB, "kind": "seSparse"}, "not published"),
        ({"size": MIB, "kind": "fullDevice"}, "device"),
        ({"size": MIB, "kind": "qcow2"}, "no kind of disk"),
        ({"size": MIB, "grain_size": 3 * KIB}, "power of two"),
        ({"size": MIB, "grain_size": 2 * KIB}, "power of two"),
        ({"size": MIB, "grain_size": 2 * GIB}, "power of two"),
        ({"size": MIB, "kind": "vmfsSparse", "grain_size": 2 * MIB}, "power of two"),
        ({"size": MIB, "kind": "vmfs", "grain_size": 64 * KIB}, "no grains"),
        ({"size": MIB, "extent_size": MIB}, "in one piece"),
        ({"size": MIB, "kind": "twoGbMaxExtentSparse", "extent_size": MIB + SECTOR}, "steps of 64 KiB"),
        ({"size": MIB, "kind": "twoGbMaxExtentFlat", "extent_size": SECTOR}, "at least 1 MiB"),
        ({"size": 5 * GIB, "kind": "twoGbMaxExtentFlat", "extent_size": MIB}, "4096 are the most"),
        ({"size": MIB, "kind": "streamOptimized", "zeroed_grain": True}, "know no zeros"),
        ({"size": MIB, "kind": "vmfsSparse", "zeroed_grain": True}, "know no zeros"),
        ({"size": MIB, "preallocation": "full"}, "grow with their content"),
        ({"size": MIB, "kind": "vmfs", "preallocation": "fast"}, "no way to preallocate"),
        ({"size": MIB, "adapter": "floppy"}, "no known adapter"),
        ({"size": MIB, "hwversion": 0}, "no virtual hardware version"),
        ({"size": MIB, "kind": "custom"}, "put together from extents"),
        ({"size": MIB, "kind": "vmfs", "extents": ("RW 8 ZERO",)}, "put together from extents"),
        ({"size": MIB, "extents": ("RW 8 ZERO",)}, "as large as its extents: 4096 bytes"),
        ({"size": MIB, "speed": 3}, "speed: no such option"),
        ({"size": MIB, "ddb": {"ddb.comment": 'a "quoted" word'}}, "can't be in a descriptor"),
        ({"size": MIB, "ddb": {"comment": "x"}}, "no key of the disk database"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(OptionError, match=why):
        create_image(tmp_path / "disk.vmdk", **options)
    assert names(tmp_path) == []


def test_hardware(tmp_path: Path) -> None:
    made = create_image(tmp_path / "a.vmdk", MIB, adapter="PVSCSI", hwversion=21)
    assert any("lsilogic" in note for note in made.notes)
    text = descriptor(tmp_path / "a.vmdk")
    assert (text.get("ddb.adapterType"), text.get("ddb.virtualHWVersion")) == ("lsilogic", "21")
    create_image(
        tmp_path / "b.vmdk", MIB, adapter="LEGACYesx", ddb={"ddb.longContentID": "0" * 24 + "12345678"}
    )
    text = descriptor(tmp_path / "b.vmdk")
    assert text.get("ddb.adapterType") == "legacyESX"
    assert text.get("ddb.longContentID") == "0" * 24 + "fffffffe"


# Names and folders.


@needs_qemu
@pytest.mark.parametrize(
    "name", ["my disk.vmdk", "-x.vmdk", "größe 磁盘.vmdk", "no-suffix", "a.b.vmdk", "%s{}.vmdk"]
)
@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentSparse", "vmfs"])
def test_odd_names(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    create_image(path, 2 * MIB, kind=kind)
    with open_disk(path, writable=True) as disk:
        disk.pwrite(b"here", MIB)
    assert qemu_bytes(path)[MIB : MIB + 4] == b"here"
    sound(path)


@pytest.mark.parametrize("name", ['a"b.vmdk', "a\nb.vmdk", "\udcff.vmdk", "n" * 300 + ".vmdk"])
def test_names_that_no_descriptor_holds(tmp_path: Path, name: str) -> None:
    with pytest.raises((OptionError, StorageError)):
        create_image(tmp_path / name, MIB, kind="vmfs")
    assert names(tmp_path) == []


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = create_image("disk.vmdk", MIB, kind="vmfs")
    assert [file.path for file in made.files] == ["disk-flat.vmdk", "disk.vmdk"]
    sound("disk.vmdk")
    for name in ("", ".", "..", "./"):
        with pytest.raises((OptionError, StorageError)):
            create_image(name, MIB)


@pytest.mark.parametrize("there", ["disk.vmdk", "disk-s002.vmdk"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(FileExists, match=there):
        create_image(tmp_path / "disk.vmdk", 4 * MIB, kind="twoGbMaxExtentSparse", extent_size=MIB)
    assert names(tmp_path) == [there]
    assert (tmp_path / there).read_text() == "mine"


def test_folders_that_can_not_be_had(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        create_image(tmp_path / "absent" / "disk.vmdk", MIB)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        create_image(tmp_path / "file" / "disk.vmdk", MIB)
    with pytest.raises(StorageError):
        create_image("/proc/disk.vmdk", MIB)


# Custom disks.


def test_a_custom_disk_of_old_and_new_files(tmp_path: Path) -> None:
    rng = random.Random(1)
    content = rng.randbytes(3 * MIB)
    (tmp_path / "a.img").write_bytes(content)
    create_image(tmp_path / "b.vmdk", 2 * MIB)
    with open_disk(tmp_path / "b.vmdk", writable=True) as disk:
        disk.pwrite(b"sparse", 70_000)
    lines = (
        'RW 4096 FLAT "a.img" 2048',
        'rw 2048 flat "a.img" 0',
        "RW 100 ZERO",
        'RW 8192 SPARSE "new-s.vmdk"',
        'RDONLY 64 FLAT "new.bin" 8',
        'RW 4096 VMFSSPARSE "new-c.vmdk"',
        'RW 4000 SPARSE "b.vmdk"',
    )
    made = create_image(tmp_path / "disk.vmdk", extents=lines)
    assert made.create_type == "custom"
    assert made.adopted == ("a.img", "b.vmdk")
    assert [os.path.basename(file.path) for file in made.files] == [
        "new-s.vmdk",
        "new.bin",
        "new-c.vmdk",
        "disk.vmdk",
    ]
    assert (tmp_path / "new.bin").stat().st_size == 72 * SECTOR
    assert made.cid != 0xFFFFFFFE
    model = bytearray(content[MIB:] + content[:MIB] + bytes((100 + 8192 + 64 + 4096 + 4000) * SECTOR))
    at = len(model) - 4000 * SECTOR + 70_000
    model[at : at + 6] = b"sparse"
    with open_disk(tmp_path / "disk.vmdk", writable=True) as disk:
        assert disk.pread(disk.size, 0) == model
        disk.pwrite(b"x" * 1000, (6144 + 100) * SECTOR + 5)
    model[(6144 + 100) * SECTOR + 5 :][:1000] = b"x" * 1000
    with open_disk(tmp_path / "disk.vmdk") as disk:
        assert disk.pread(SECTOR * 4, (6144 + 100) * SECTOR)[5:1005] == b"x" * 1000
    sound(tmp_path / "disk.vmdk")


@pytest.mark.parametrize(
    ("line", "error", "why"),
    [
        ("RW 8", OptionError, "extent 2: "),
        ('READ 8 FLAT "x" 0', OptionError, "no known access"),
        ('RW 0 FLAT "x" 0', OptionError, "no sectors"),
        ('RW 8 SESPARSE "x"', OptionError, "not public"),
        ('RW 8 VMFSRDM "x"', OptionError, "LUN"),
        ('RW 8 FLAT "sub/x" 0', OptionError, "in the folder of the disk alone"),
        ('RW 8 SPARSE "x" 8', OptionError, "begins at sector 0"),
        ('RW 8 FLAT "disk.vmdk" 0', OptionError, "name of the disk's descriptor"),
        ('RW 9 FLAT "short" 0', Truncated, "4608 bytes needed"),
        ('RW 8 FLAT "short" 1', Truncated, "4608 bytes needed"),
        ('RW 8 SPARSE "short"', FormatError, "no extent with tables"),
        ('RW 2049 SPARSE "hosted.vmdk"', BadField, "capacity is 2048"),
        ('RW 8 FLAT "/etc/hostname" 0', TrustError, "outside"),
        ('RW 8 FLAT "/dev/null" 0', TrustError, "outside"),
    ],
)
def test_extents_that_can_not_be(tmp_path: Path, line: str, error: type[Exception], why: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "short").write_bytes(b"x" * 8 * SECTOR)
    create_image(tmp_path / "hosted.vmdk", MIB)
    before = names(tmp_path)
    with pytest.raises(error, match=why):
        create_image(tmp_path / "disk.vmdk", extents=("RW 8 ZERO", line))
    assert names(tmp_path) == before


def test_one_file_with_tables_is_one_extent(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="2 extents name x"):
        create_image(tmp_path / "disk.vmdk", extents=('RW 8 SPARSE "x"', 'RW 8 FLAT "x" 8'))


def test_an_extent_of_two_disks_is_warned_of(tmp_path: Path) -> None:
    create_image(tmp_path / "a.vmdk", MIB, kind="vmfs")
    made = create_image(tmp_path / "b.vmdk", extents=('RW 8 FLAT "a-flat.vmdk" 0',))
    assert "an extent of a.vmdk, too" in made.warnings[0]


# Parents.


def test_the_family_of_a_child(tmp_path: Path) -> None:
    for base, child in (
        ("monolithicSparse", "monolithicSparse"),
        ("monolithicFlat", "monolithicSparse"),
        ("twoGbMaxExtentFlat", "twoGbMaxExtentSparse"),
        ("vmfs", "vmfsSparse"),
        ("vmfsSparse", "vmfsSparse"),
    ):
        create_image(tmp_path / f"{base}.vmdk", MIB, kind=base)
        made = create_image(tmp_path / f"{base}-1.vmdk", parent=tmp_path / f"{base}.vmdk")
        assert made.create_type == child
    text = descriptor(tmp_path / "vmfs-1.vmdk")
    assert list(text.ddb) == ["ddb.longContentID"]  # all else a child takes from its parent
    made = create_image(tmp_path / "e.vmdk", parent=tmp_path / "monolithicSparse.vmdk", product="esxi")
    assert made.create_type == "vmfsSparse"
    assert "its parent is monolithicSparse" in made.warnings[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CHILDREN])
def test_kinds_that_are_never_children(tmp_path: Path, kind: str) -> None:
    create_image(tmp_path / "base.vmdk", MIB)
    with pytest.raises(OptionError, match=f"a child can't be {kind}: "):
        create_image(tmp_path / "child.vmdk", parent=tmp_path / "base.vmdk", kind=kind)
    with pytest.raises(OptionError, match="takes no child link"):
        create_image(tmp_path / "child.vmdk", parent=tmp_path / "base.vmdk", product="ova")


def test_a_child_is_as_large_as_its_parent(tmp_path: Path) -> None:
    create_image(tmp_path / "base.vmdk", MIB)
    with pytest.raises(OptionError, match="as large as its parent"):
        create_image(tmp_path / "child.vmdk", 2 * MIB, parent=tmp_path / "base.vmdk")
    assert create_image(tmp_path / "child.vmdk", MIB, parent=tmp_path / "base.vmdk").size == MIB


@needs_qemu
def test_a_parent_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "child" / "deep").mkdir(parents=True)
    (tmp_path / "short").symlink_to("child")
    create_image(tmp_path / "base" / "a b.vmdk", MIB)
    (tmp_path / "base" / "link.vmdk").symlink_to("a b.vmdk")
    monkeypatch.chdir(tmp_path / "base")
    made = create_image("../short/child.vmdk", parent="link.vmdk")
    assert made.parent == "../base/a b.vmdk"
    assert "--allow-dir" in made.warnings[0]
    with open_disk("../short/child.vmdk", allow_dirs=(tmp_path / "base",)) as disk:
        assert len(disk.links) == 2
    assert qemu_info("../short/child.vmdk")["backing-filename"] == "../base/a b.vmdk"
    made = create_image("../child/deep/far.vmdk", parent="link.vmdk")  # which may be moved alone
    assert made.parent == str(tmp_path / "base" / "a b.vmdk")
    assert "--allow-dir" in made.warnings[0]
    with open_disk("../child/deep/far.vmdk", allow_dirs=(tmp_path / "base",)) as disk:
        assert len(disk.links) == 2
    made = create_image("here.vmdk", parent="a b.vmdk", parent_hint="a b.vmdk")
    assert made.warnings == ()
    made = create_image("../above.vmdk", parent="a b.vmdk")  # it may name what its own folder holds
    assert (made.parent, made.warnings) == ("base/a b.vmdk", ())
    with open_disk("../above.vmdk") as disk:
        assert len(disk.links) == 2


def test_what_can_not_be_a_parent(tmp_path: Path) -> None:
    base, child = tmp_path / "base.vmdk", tmp_path / "child.vmdk"
    with pytest.raises(FileMissing):
        create_image(child, parent=base)
    create_image(base, MIB, kind="vmfs")
    with pytest.raises(NotVmdk):
        create_image(child, parent=tmp_path / "base-flat.vmdk")
    whole = base.read_bytes()
    base.write_bytes(whole.replace(b"CID=fffffffe", b"CID=ffffffff", 1))
    with pytest.raises(Unsupported, match="no valid content ID"):
        create_image(child, parent=base)
    base.write_bytes(whole)
    (tmp_path / "base.vmdk.lck").write_text("")
    with pytest.raises(InUse):
        create_image(child, parent=base)
    (tmp_path / "base.vmdk.lck").unlink()
    with open_disk(base, writable=True), pytest.raises(InUse, match="writing it"):
        create_image(child, parent=base)
    create_image(tmp_path / "split.vmdk", 2 * MIB, kind="twoGbMaxExtentSparse", extent_size=MIB)
    (tmp_path / "split.vmdk").unlink()
    with pytest.raises(Unsupported, match="no descriptor"):
        create_image(child, parent=tmp_path / "split-s001.vmdk")
    create_image(child, parent=base)
    base.write_bytes(whole.replace(b"CID=fffffffe", b"CID=12345678", 1))
    with pytest.raises(Exception, match="expects parent content ID"):
        create_image(tmp_path / "grandchild.vmdk", parent=child)


def test_a_chain_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbd_vmdk.ops.create.parent.MAX_LINKS", 3)
    monkeypatch.setattr("nbd_vmdk.ops.create.products._VMWARE_SNAPSHOTS", 2)
    create_image(tmp_path / "0.vmdk", MIB)
    create_image(tmp_path / "1.vmdk", parent=tmp_path / "0.vmdk")
    made = create_image(tmp_path / "2.vmdk", parent=tmp_path / "1.vmdk", product="workstation")
    assert "2 links stand below it" in made.warnings[0]
    with pytest.raises(ChainTooDeep):
        create_image(tmp_path / "3.vmdk", parent=tmp_path / "2.vmdk")


def test_all_that_is_exported_is_there() -> None:
    assert set(nbd_vmdk.__all__) >= {"create_image", *nbd_vmdk._HOMES}
    for name in nbd_vmdk.__all__:
        assert getattr(nbd_vmdk, name) is not None
