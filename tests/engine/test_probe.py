"""
What a caller may hand over: each file opens, or says what it is and which file to open instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.errors import (
    BadDescriptor,
    FileMissing,
    NotVmdk,
    OptionError,
    Truncated,
    TrustError,
    Unsupported,
)
from nbd_vmdk.extents.base import Kind
from tests.engine import refused, same, shows, unreadable
from tests.images import desc, ova, poke
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.cowd import write_cowd
from tests.images.desc import Image, Row
from tests.images.hosted import write_hosted

ODD = Content.random(3 * MIB + 7 * SECTOR, seed=1)
PARENT = Content.random(3 * MIB + 7 * SECTOR, seed=3, density=1.0)


@pytest.mark.parametrize(
    ("data", "what", "hint"),
    [
        (b"", "empty file", "make it again"),
        (b"\x1f\x8b\x08\x00" + bytes(600), "gzip", "gunzip -k"),
        (b"PK\x03\x04" + bytes(600), "zip", "unpack"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(600), "7-zip", "unpack"),
        (b"BZh91AY" + bytes(600), "bzip2", "bunzip2"),
        (b"\xfd7zXZ\x00" + bytes(600), "xz", "unxz"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd", "unzstd"),
        (b"QFI\xfb" + bytes(600), "qcow2", "qemu-nbd"),
        (b"vhdxfile" + bytes(600), "VHDX", "qemu-nbd"),
        (b"conectix" + bytes(600), "VHD", "qemu-nbd"),
        (b"<<< QEMU VM Virtual Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe", "VDI", "qemu-nbd"),
        (b"\x7fELF" + bytes(600), "program", "right file"),
        (b"\n\n<!DOCTYPE html>\n<html>version=1\ncreateType=x</html>", "web page", "again"),
        (b"<html><body>RW 100 FLAT &quot;x&quot;</body></html>", "web page", "again"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Envelope/>", "XML", ".vmdk beside"),
        (b"\xca\xfe\xba\xbe\x00\x00\x00\x34" + bytes(600), "not a VMDK", "right file"),  # a Java class
        (bytes(4096), "zeros", "get it again"),
        (b"kdmv" + bytes(600), "never finished", "again"),
        (b"\xa2\x72\x19\xf6" + bytes(600), "change-tracking", "disk.vmdk"),
        (b"Just a text.\n", "not a VMDK", "right file"),
        (b"version=12 of my notes\nis here\n", "not a VMDK", "right file"),
        (b'.encoding = "UTF-8"\nscsi0:0.fileName = "disk.vmdk"\n', "not a VMDK", "right file"),
    ],
)
def test_what_is_no_disk(tmp_path: Path, data: bytes, what: str, hint: str) -> None:
    path = tmp_path / "disk-ctk.vmdk"
    path.write_bytes(data)
    error = refused(str(path))
    assert what in str(error)
    assert hint in str(error.hint)
    assert str(path) in str(error)


@pytest.mark.parametrize("length", [1, 4, 100, 511])
@pytest.mark.parametrize("magic", [b"KDMV", b"COWD", b"\xbe\xba\xfe\xca\0\0\0\0"])
def test_the_beginning_of_a_header(tmp_path: Path, magic: bytes, length: int) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes((magic + bytes(600))[:length])
    refused(str(path), Truncated if length >= len(magic) else NotVmdk)


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(str(tmp_path / "gone.vmdk"), FileMissing)
    refused(str(tmp_path / "gone" / "gone.vmdk"), FileMissing)
    assert "folder without a disk" in str(refused(str(tmp_path), NotVmdk))
    refused("", OptionError)
    os.mkfifo(tmp_path / "pipe.vmdk")
    assert "pipe" in str(refused(str(tmp_path / "pipe.vmdk"), TrustError))
    assert "device" in str(refused("/dev/null", TrustError))


def test_what_is_no_option(tmp_path: Path) -> None:
    for name, hint in (
        ("foo", "there are writable, parent, "),
        ("writeable", "is it writable or "),
        ("drop_ctx", "is it drop_ctk?"),
    ):
        caught = refused(str(tmp_path), OptionError, **{name: True})
        assert str(caught) == f"no option '{name}'"
        assert str(caught.hint).startswith(hint)


def test_packed_as_gzip(tmp_path: Path) -> None:
    image = desc.stream_optimized(str(tmp_path), "disk", ODD)
    packed = desc.gzip_image(image.path)
    assert f"gunzip -k {packed}" in str(refused(packed, NotVmdk).hint)


def test_a_ctk_file(tmp_path: Path) -> None:
    desc.ctk_file(str(tmp_path / "vm_1-000001-ctk.vmdk"))
    error = refused(str(tmp_path / "vm_1-000001-ctk.vmdk"), NotVmdk)
    assert "change-tracking" in str(error)
    assert str(error.hint).endswith("vm_1-000001.vmdk")


@pytest.mark.parametrize("style", ["esx", "workstation"])
def test_encrypted_disks(tmp_path: Path, style: str) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes(desc.encrypted_descriptor(style))
    error = refused(str(path), Unsupported)
    assert "encrypted" in str(error)
    assert "decrypt" in str(error.hint)


def test_an_encrypted_disk_in_one_file(tmp_path: Path) -> None:
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD)
    poke(image.path, SECTOR, desc.encrypted_descriptor("workstation").ljust(20 * SECTOR, b"\0"))
    assert "encrypted" in str(refused(image.path, Unsupported))


def test_raw_disks_are_refused(tmp_path: Path) -> None:
    """Devices are, by default; and a snapshot that only the storage array can resolve."""
    for kind in ("fullDevice", "partitionedDevice"):
        path = tmp_path / f"{kind}.vmdk"
        path.write_bytes(desc.device_descriptor(kind))
        (tmp_path / "raw-pt.vmdk").write_bytes(bytes(63 * SECTOR))
        error = refused(str(path), TrustError)
        assert "/dev/sdz" in str(error)
    native = desc.monolithic_flat(str(tmp_path), "native", ODD)
    child = desc.monolithic_sparse(
        str(tmp_path), "child", ODD, parent=native, text={"extra": ['isNativeSnapshot="yes"']}
    )
    assert "storage array" in str(refused(child.path, Unsupported))
    shows(desc.monolithic_sparse(str(tmp_path), "base", ODD, text={"extra": ['isNativeSnapshot="no"']}))


# Extents handed over without their descriptor


def owned(path: str, owner: str) -> None:
    error = refused(path, NotVmdk)
    assert os.path.basename(owner) in str(error)
    assert f"open {owner} instead" in str(error.hint)


EXTENTS: dict[str, Callable[[str], Image]] = {
    "hosted": lambda folder: desc.split_sparse(folder, "vm disk", ODD, 2048),
    "flat": lambda folder: desc.monolithic_flat(folder, "vm disk", ODD),
    "split flat": lambda folder: desc.split_flat(folder, "vm disk", ODD, 2048),
    "vmfs": lambda folder: desc.vmfs(folder, "vm disk", ODD),
    "cowd": lambda folder: desc.vmfs_sparse(folder, "vm disk", ODD),
    "sesparse": lambda folder: desc.se_sparse(folder, "vm disk", ODD),
}


@pytest.mark.parametrize("kind", EXTENTS)
def test_an_extent_beside_its_descriptor(tmp_path: Path, kind: str) -> None:
    image = EXTENTS[kind](str(tmp_path))
    owned(image.files[-1], image.path)
    # Whatever the descriptor is called, and whatever else lies around.
    renamed = str(tmp_path / "another name.vmdk")
    os.rename(image.path, renamed)
    desc.monolithic_sparse(str(tmp_path), "unrelated", ODD)
    owned(image.files[-1], renamed)


def test_a_copy_does_not_own_what_it_was_made_of(tmp_path: Path) -> None:
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD)
    shutil.copy(image.path, tmp_path / "backup.vmdk")
    Path(image.path).write_bytes(bytes(64 * KIB))
    assert "zeros where a header should be" in str(refused(image.path))
    # Where the text in it describes other files, it does.
    flat = desc.monolithic_flat(str(tmp_path), "disk", ODD)
    desc.wrapped_descriptor(str(tmp_path / "backup.vmdk"), flat.text)
    os.remove(flat.path)
    owned(str(tmp_path / "disk-flat.vmdk"), str(tmp_path / "backup.vmdk"))


def test_a_flat_file_that_looks_like_something(tmp_path: Path) -> None:
    """A raw disk may begin with any bytes: its descriptor decides."""
    for start in (b"\x1f\x8b", b"kdmv", b"COWD", b"KDMV", b'RW 5 ZERO\nCID=5\nversion=1\ncreateType="x"\n'):
        content = ODD.resized(ODD.size).put(0, start.ljust(5000, b"\0"))
        image = desc.monolithic_flat(str(tmp_path), "disk", content)
        shows(image)


def test_flat_data_without_its_descriptor(tmp_path: Path) -> None:
    for name in ("vm-flat.vmdk", "vm-f001.vmdk"):
        path = str(tmp_path / name)
        desc.write_flat(path, ODD)
        error = refused(path, NotVmdk)
        assert "without a descriptor" in str(error)
        assert "vm.vmdk" in str(error.hint)


def test_a_split_extent_without_its_descriptor(tmp_path: Path) -> None:
    image = desc.split_sparse(str(tmp_path), "vm", ODD, 2048, descriptor=b"")
    os.remove(image.path)
    at = 0
    for extent in image.extents:
        path = extent if isinstance(extent, str) else extent.path
        size = min(MIB, ODD.size - at)
        warnings = shows(path, ODD.sliced(at, size))
        assert len(warnings) == 1
        assert "without its descriptor" in warnings[0]
        at += size
        with open_disk(path, writable=True) as disk:
            assert not disk.writable


def test_a_split_extent_of_a_delta_alone(tmp_path: Path) -> None:
    """Its name says that it has a parent, so its holes are not zeros."""
    content = Content(4 * MIB).put(MIB, b"x" * MIB)
    write_hosted(str(tmp_path / "vm-000001-s001.vmdk"), content)
    with open_disk(tmp_path / "vm-000001-s001.vmdk") as disk:
        same(disk.pread(MIB, MIB), content.read(MIB, MIB))
        unreadable(disk, 0, 1)


def test_a_compressed_extent_alone(tmp_path: Path) -> None:
    image = desc.custom(str(tmp_path), "vm", [Row("RW", "SPARSE", ODD, builder="stream")])
    os.remove(image.path)
    shows(image.files[1], image.content)


@pytest.mark.parametrize("kind", ["cowd", "sesparse"])
def test_a_delta_alone(tmp_path: Path, kind: str) -> None:
    """What it has is read; what is in a parent nobody knows gives EIO, unless a parent is named."""
    content = Content(4 * MIB).put(MIB, b"child" * 100000)
    make = desc.vmfs_sparse if kind == "cowd" else desc.se_sparse
    image = make(str(tmp_path), "vm-000001", content)
    os.remove(image.path)
    delta = image.files[1]
    with open_disk(delta) as disk:
        assert any("--parent" in warning for warning in disk.warnings)
        assert not disk.writable
        same(disk.pread(400 * KIB, MIB), content.read(MIB, 400 * KIB))
        for offset, length in ((0, 1), (MIB - 1, 2), (4 * MIB - 1, 1), (MIB, 3 * MIB)):
            assert "parent that is not known" in str(unreadable(disk, offset, length))
        found = list(disk.runs())
    assert [run.kind for run in found] == [Kind.LOST, Kind.DATA, Kind.LOST]
    assert sum(run.length for run in found) == disk.size

    base = desc.monolithic_flat(str(tmp_path), "base", PARENT)
    shows(delta, image.content.over(base.content), parent=base.path)


def test_a_delta_alone_whose_parent_is_one_too(tmp_path: Path) -> None:
    top = write_cowd(str(tmp_path / "top.vmdk"), Content(MIB).put(0, b"t" * SECTOR))
    low = write_cowd(str(tmp_path / "low.vmdk"), Content(MIB).put(SECTOR, b"l" * SECTOR))
    with open_disk(top.path, parent=low.path) as disk:
        assert disk.pread(2 * SECTOR, 0) == b"t" * SECTOR + b"l" * SECTOR
        unreadable(disk, 2 * SECTOR, 1)
        assert [run.kind for run in disk.runs()] == [Kind.DATA, Kind.DATA, Kind.LOST]


# One file that is a whole disk


def test_a_monolithic_file_is_its_own_extent(tmp_path: Path) -> None:
    """Whatever name its line states: files are renamed, and exporters write names that mean nothing."""
    for name in ("gone.vmdk", "../elsewhere/gone.vmdk", "/vmfs/volumes/1/gone.vmdk", "C:\\\\x\\\\gone.vmdk"):
        shows(desc.monolithic_sparse(str(tmp_path), "disk", ODD, extent_name=name))
        shows(desc.stream_optimized(str(tmp_path), "stream", ODD, extent_name=name))
    other = desc.monolithic_sparse(str(tmp_path), "other", PARENT)
    shows(desc.monolithic_sparse(str(tmp_path), "disk", ODD, extent_name=os.path.basename(other.path)))
    shutil.move(other.path, tmp_path / "moved.img")
    shows(str(tmp_path / "moved.img"), PARENT)


@pytest.mark.parametrize("access", ["RW", "RDONLY", "rw", "rdonly"])
def test_the_access_of_an_export(tmp_path: Path, access: str) -> None:
    shows(desc.stream_optimized(str(tmp_path), "disk", ODD, access=access))


def test_an_embedded_descriptor_with_other_extents(tmp_path: Path) -> None:
    """The first file of a custom disk may carry the description of all."""
    flat = str(tmp_path / "data-flat.vmdk")
    desc.write_flat(flat, PARENT)
    lines: list[desc.ExtentLine] = [
        ("RW", 8, "ZERO"),
        ("RW", ODD.sectors, "SPARSE", "whatever.vmdk"),
        ("RW", PARENT.sectors, "FLAT", "data-flat.vmdk", 0),
    ]
    path = str(tmp_path / "disk.vmdk")
    write_hosted(path, ODD, descriptor=desc.descriptor("custom", lines))
    shows(path, Content.joined([Content(4096).zero(0, 4096), ODD, PARENT]))


def test_a_wrapped_descriptor(tmp_path: Path) -> None:
    """A sparse header of capacity 0 round a text that describes other files."""
    image = desc.monolithic_flat(str(tmp_path), "disk", ODD)
    desc.wrapped_descriptor(image.path, image.text)
    shows(image)


def test_texts_of_all_sorts(tmp_path: Path) -> None:
    flat = str(tmp_path / "disk-flat.vmdk")
    desc.write_flat(flat, ODD)
    line: desc.ExtentLine = ("RW", ODD.sectors, "FLAT", "disk-flat.vmdk", 0)
    whole = desc.descriptor("monolithicFlat", [line])
    texts: list[bytes] = [
        desc.descriptor("monolithicFlat", [line], newline="\r\n"),
        desc.descriptor("monolithicFlat", [line], newline="\r"),
        desc.descriptor("monolithicFlat", [line], bom=True),
        desc.descriptor("monolithicFlat", [line], first_line="# Description file of my own"),
        desc.descriptor("monolithicFlat", [line], first_line=""),
        desc.descriptor("whatever", [line]),
        desc.descriptor("streamOptimized", [line]),
        whole + b"\0" * 1000 + b"RW 5 ZERO\n",
        whole.upper().replace(b"DISK-FLAT.VMDK", b"disk-flat.vmdk"),
        whole.lower(),
        whole.replace(b"version=1", b'version=3\nchangeTrackPath="gone-ctk.vmdk"'),
        whole.rstrip(b"\n"),
        b'RW %d FLAT "disk-flat.vmdk"' % ODD.sectors,
        b'CID=5\nparentCID=FFFFFFFF\nrw\t%d   flat  "disk-flat.vmdk"  0  \n' % ODD.sectors,
    ]
    for text in texts:
        (tmp_path / "disk.vmdk").write_bytes(text)
        shows(str(tmp_path / "disk.vmdk"), ODD)


@pytest.mark.parametrize("encoding", ["GBK", "Big5", "Shift_JIS", "windows-1252", "UTF-8"])
@pytest.mark.parametrize("stated", [True, False])
def test_names_in_any_encoding(tmp_path: Path, encoding: str, stated: bool) -> None:
    if not stated and encoding not in {"UTF-8", "windows-1252"}:
        pytest.skip("nobody can tell")
    name = {"windows-1252": "Dän-flat.vmdk", "UTF-8": "Dän磁-flat.vmdk"}.get(encoding, "中文-flat.vmdk")
    desc.write_flat(str(tmp_path / name), ODD)
    text = desc.descriptor(
        "vmfs", [("RW", ODD.sectors, "VMFS", name)], encoding=encoding, state_encoding=stated
    )
    (tmp_path / "disk.vmdk").write_bytes(text)
    shows(str(tmp_path / "disk.vmdk"), ODD)


@pytest.mark.parametrize(
    "lines",
    [
        [b'RW 10 FLOT "x-flat.vmdk"'],
        [b'XX 10 FLAT "x-flat.vmdk"'],
        [b'RW ten FLAT "x-flat.vmdk"'],
        [b'RW -5 FLAT "x-flat.vmdk"'],
        [b"RW 10 FLAT"],
        [b'RW 10 FLAT ""'],
        [b'RW 10 FLAT "x-flat.vmdk" -1'],
        [b"RW 36893488147419103232 ZERO"],
        [b"RW 18014398509481984 ZERO"] * 3,
        [],
    ],
    ids=str,
)
def test_lines_that_can_not_be(tmp_path: Path, lines: list[bytes]) -> None:
    """A line that is skipped would shift all data behind it."""
    desc.write_flat(str(tmp_path / "x-flat.vmdk"), Content.of(b"x" * 10 * SECTOR))
    (tmp_path / "x.vmdk").write_bytes(
        b"# Disk DescriptorFile\nversion=1\nCID=5\n" + b"\n".join(lines) + b"\n"
    )
    refused(str(tmp_path / "x.vmdk"), BadDescriptor)


# Missing and foreign files


def test_a_descriptor_without_its_files(tmp_path: Path) -> None:
    for make in (desc.monolithic_flat, desc.split_sparse, desc.vmfs_sparse):
        image = make(str(tmp_path), "disk", ODD)
        os.remove(image.files[1])
        error = refused(image.path, FileMissing)
        assert os.path.basename(image.files[1]) in str(error)
        assert "copy" in str(error.hint) or "needs" in str(error.hint)


def test_names_of_another_machine(tmp_path: Path) -> None:
    """What lies beside the descriptor is taken, and told."""
    for name in (
        "/vmfs/volumes/4f-33/vm/disk-flat.vmdk",
        "C:\\VMs\\vm\\disk-flat.vmdk",
        "\\\\server\\share\\disk-flat.vmdk",
    ):
        desc.write_flat(str(tmp_path / "disk-flat.vmdk"), ODD)
        path = tmp_path / "disk.vmdk"
        path.write_bytes(desc.descriptor("vmfs", [("RW", ODD.sectors, "VMFS", name)]))
        warnings = shows(str(path), ODD)
        assert any("disk-flat.vmdk beside it is taken" in warning for warning in warnings)


def test_names_with_the_other_slash(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    desc.write_flat(str(tmp_path / "sub" / "disk-flat.vmdk"), ODD)
    path = tmp_path / "disk.vmdk"
    path.write_bytes(desc.descriptor("vmfs", [("RW", ODD.sectors, "VMFS", "sub\\disk-flat.vmdk")]))
    shows(str(path), ODD)
    desc.write_flat(str(tmp_path / "sub\\disk-flat.vmdk"), PARENT)  # a name that Linux allows
    shows(str(path), PARENT)


@pytest.mark.parametrize("how", ["absolute", "above", "above on Windows", "link", "folder link"])
def test_an_extent_outside(tmp_path: Path, how: str) -> None:
    """An image may name only what lies in its folder, or in one that the user allows."""
    (tmp_path / "vm").mkdir()
    (tmp_path / "secret").mkdir()
    secret = tmp_path / "secret" / "data-flat.vmdk"
    desc.write_flat(str(secret), ODD)
    above = "../secret/data-flat.vmdk"
    named = {"absolute": str(secret), "above": above, "above on Windows": above.replace("/", "\\")}
    name = named.get(how, "data-flat.vmdk")
    if how == "link":
        (tmp_path / "vm" / "data-flat.vmdk").symlink_to(secret)
    elif how == "folder link":
        (tmp_path / "vm" / "sub").symlink_to(tmp_path / "secret")
        name = "sub/data-flat.vmdk"
    path = tmp_path / "vm" / "disk.vmdk"
    path.write_bytes(desc.descriptor("vmfs", [("RW", ODD.sectors, "VMFS", name)]))
    error = refused(str(path), TrustError)
    assert error.errno == 1
    assert "--allow-dir" in str(error.hint)
    shows(str(path), ODD, allow_dirs=[str(tmp_path / "secret")])


@pytest.mark.parametrize("name", ["/dev/null", "pipe-flat.vmdk", "sub", "/etc/passwd", "../../../etc/passwd"])
def test_extents_that_are_no_files(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe-flat.vmdk")
    (tmp_path / "sub").mkdir()
    path = tmp_path / "disk.vmdk"
    path.write_bytes(desc.descriptor("monolithicFlat", [("RW", 1, "FLAT", name, 0)]))
    refused(str(path), TrustError)


def test_a_sparse_extent_that_names_its_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes(desc.descriptor("custom", [("RW", 8, "SPARSE", "disk.vmdk")]))
    assert "magic" in str(refused(str(path)))


# OVA


SIZES: tuple[ova.Sizes, ...] = ("octal", "base256", "pax")


@pytest.mark.parametrize("sizes", SIZES)
def test_the_only_disk_of_an_ova(tmp_path: Path, sizes: ova.Sizes) -> None:
    image = desc.stream_optimized(str(tmp_path), "disk", ODD)
    made = ova.write_ova(
        str(tmp_path / "vm.ova"), [ova.Disk(image.path, ODD.size)], sizes=sizes, manifest_last=True
    )
    start, size = made.members["disk.vmdk"]
    with open_disk(made.path) as disk:
        assert not disk.writable
    shows_packed(made.path, ODD)
    # Behind the member lies more: a footer must be found at the member's end.
    assert start + size < os.path.getsize(made.path) - 3 * SECTOR


def shows_packed(path: str, content: Content, **options: Any) -> None:
    with open_disk(path, **options) as disk:
        same(disk.pread(disk.size, 0), content.read())
        assert sum(run.length for run in disk.runs()) == content.size


@pytest.mark.parametrize("layout", ["A", "B", "C", "mixed"])
def test_every_stream_inside_an_ova(tmp_path: Path, layout: str) -> None:
    image = desc.stream_optimized(str(tmp_path), "disk", ODD, layout=layout)
    made = ova.write_ova(str(tmp_path / "vm.ova"), [ova.Disk(image.path, ODD.size)])
    shows_packed(made.path, ODD)
    shows_packed(made.path, ODD, salvage=True)


def test_a_plain_sparse_disk_inside_an_ova(tmp_path: Path) -> None:
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD)
    made = ova.write_ova(str(tmp_path / "vm.ova"), [ova.Disk(image.path, ODD.size)])
    with open_disk(made.path) as disk:
        same(disk.pread(disk.size, 0), ODD.read())
        data = next(run for run in disk.runs() if run.kind is Kind.DATA)
        assert data.file == made.path + "/disk.vmdk"


def test_a_disk_in_two_files_inside_an_ova(tmp_path: Path) -> None:
    """Its descriptor is one member, its data another."""
    image = desc.vmfs(str(tmp_path), "disk", ODD)
    os.rename(image.files[1], tmp_path / "disk-flat.bin")
    Path(image.path).write_bytes(image.text.replace(b"disk-flat.vmdk", b"disk-flat.bin"))
    extra = [("disk-flat.bin", (tmp_path / "disk-flat.bin").read_bytes())]
    made = ova.write_ova(str(tmp_path / "vm.ova"), [ova.Disk(image.path, ODD.size)], extra=extra)
    shows_packed(made.path, ODD)


def test_an_ova_that_is_called_like_its_disk(tmp_path: Path) -> None:
    image = desc.stream_optimized(str(tmp_path), "disk", ODD)
    (tmp_path / "there").mkdir()
    made = ova.write_ova(str(tmp_path / "there" / "disk.vmdk"), [ova.Disk(image.path, ODD.size)])
    shows_packed(made.path, ODD)


def test_archives_in_archives(tmp_path: Path) -> None:
    path = str(tmp_path / "0.vmdk")
    ova.write_tar(path, [])
    for number in range(3):
        data = Path(path).read_bytes()
        path = str(tmp_path / f"{number + 1}.vmdk")
        ova.write_tar(path, [("disk.vmdk", data)])
    assert "archive" in str(refused(path, NotVmdk))


def test_an_ova_with_more_or_fewer_disks(tmp_path: Path) -> None:
    one = desc.stream_optimized(str(tmp_path), "one", ODD)
    two = desc.stream_optimized(str(tmp_path), "two", PARENT)
    made = ova.write_ova(
        str(tmp_path / "vm.ova"), [ova.Disk(one.path, ODD.size), ova.Disk(two.path, PARENT.size)]
    )
    error = refused(made.path, NotVmdk)
    assert "2 disks" in str(error)
    assert f"{made.path}:one.vmdk, {made.path}:two.vmdk" in str(error.hint)
    shows_packed(f"{made.path}:one.vmdk", ODD)
    shows_packed(f"{made.path}:two.vmdk", PARENT)
    assert "without a .vmdk" in str(refused(ova.write_ova(str(tmp_path / "no.ova"), []).path, NotVmdk))
    packed = ova.write_ova(str(tmp_path / "gz.ova"), [ova.Disk(one.path, ODD.size, gzip=True)])
    shows_packed(packed.path, ODD)
    parts = ova.write_ova(str(tmp_path / "parts.ova"), [ova.Disk(one.path, ODD.size, chunk_size=KIB)])
    shows_packed(parts.path, ODD)


def test_an_ova_that_is_cut_off(tmp_path: Path) -> None:
    image = desc.stream_optimized(str(tmp_path), "disk", ODD)
    made = ova.write_ova(str(tmp_path / "vm.ova"), [ova.Disk(image.path, ODD.size)], digest=None)
    start, size = made.members["disk.vmdk"]
    os.truncate(made.path, start + size // 2)
    refused(made.path, Truncated)
