"""Appliances: disks in archives and beside envelopes, in chunks, compressed; and hostile ones."""

from __future__ import annotations

import gc
import gzip
import os
import random
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.errors import (
    FileMissing,
    FormatError,
    NotVmdk,
    TrustError,
    Unsupported,
    VmdkError,
    WriteRefused,
)
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.info import image_info
from nbd_vmdk.ops.repair import apply_repair
from nbd_vmdk.vm import find_disks
from tests.disks import content, faults, names, shown, sparse, stream
from tests.engine import same
from tests.images import desc, ova
from tests.images.content import MIB, Content


def noisy(seed: int, size: int = 2 * MIB) -> Content:
    return Content(size).put(0, b"noisy").put(size // 4, random.Random(seed).randbytes(size // 3))


@pytest.mark.parametrize(
    "how", [{}, {"gzip": True}, {"chunk_size": 100_000}, {"gzip": True, "chunk_size": 9999}]
)
@pytest.mark.parametrize("kind", ["stream_optimized", "monolithic_sparse"])
def test_every_way_to_store_a_disk(tmp_path: Path, how: dict[str, int], kind: str) -> None:
    image = getattr(desc, kind)(str(tmp_path), "disk", noisy(1))
    made = ova.write_ova(str(tmp_path / "vm.ova"), [ova.Disk(image.path, image.size, **how)])
    with open_disk(made.path, writable=True) as disk:
        assert not disk.writable
        same(disk.pread(disk.size, 0), noisy(1).read())
        assert "read-only" in disk.warnings[0]
    assert not check_image(made.path, data=True).findings
    with pytest.raises(WriteRefused, match="manifest"):
        apply_repair(made.path)
    assert image_info(f"{made.path}:disk.vmdk")["virtual-size"] == image.size
    # The same, unpacked.
    os.mkdir(tmp_path / "out")
    os.system(f"tar -C {tmp_path}/out -xf {made.path}")
    with open_disk(tmp_path / "out" / "vm.ovf") as disk:
        same(disk.pread(disk.size, 0), noisy(1).read())


def test_order_is_the_hardwares_and_each_has_a_name(tmp_path: Path) -> None:
    disks = [ova.Disk(stream(tmp_path, name).path, MIB) for name in ("zulu", "alpha", "mike")]
    made = ova.write_ova(str(tmp_path / "vm.ova"), disks, ovf_last=True)
    found = find_disks(made.path)
    assert [(disk.name, disk.place) for disk in found] == [
        ("zulu.vmdk", "vmdisk0"),
        ("alpha.vmdk", "vmdisk1"),
        ("mike.vmdk", "vmdisk2"),
    ]
    assert shown(f"{made.path}:mike.vmdk") == "mike"
    assert shown(f"{made.path}:vmdisk1") == "alpha"


def test_an_archive_without_an_envelope(tmp_path: Path) -> None:
    base = sparse(tmp_path, "base")
    top = desc.monolithic_sparse(str(tmp_path), "top", content("top"), parent=base)
    flat = desc.monolithic_flat(str(tmp_path), "flat", content("flat"))
    packed = gzip.compress(Path(stream(tmp_path, "gz").path).read_bytes())
    split = Path(stream(tmp_path, "split").path).read_bytes()
    files = [top.path, base.path, *flat.files]
    members = [(f"vm/{os.path.basename(path)}", Path(path).read_bytes()) for path in files]
    members += [
        ("gz.vmdk.gz", packed),
        ("split.vmdk.000000000", split[:999]),
        ("split.vmdk.000000001", split[999:]),
    ]
    path = str(tmp_path / "all.tar")
    ova.write_tar(path, members)
    assert names(path) == ["top.vmdk", "flat.vmdk", "gz.vmdk.gz", "split.vmdk"]
    for name, words in (("top", "top"), ("flat", "flat"), ("split", "split")):
        assert shown(f"{path}:{name}.vmdk") == words
    assert shown(f"{path}:gz.vmdk.gz") == "gz"


def test_names_that_clash_inside(tmp_path: Path) -> None:
    a, b = stream(tmp_path / "a", "disk", "one"), stream(tmp_path / "b", "disk", "two")
    path = str(tmp_path / "x.tar")
    ova.write_tar(
        path, [(f"{name}/disk.vmdk", Path(i.path).read_bytes()) for name, i in (("a", a), ("b", b))]
    )
    assert names(path) == ["a/disk.vmdk", "b/disk.vmdk"]
    assert shown(f"{path}:b/disk.vmdk") == "two"


def test_an_envelope_in_a_folder(tmp_path: Path) -> None:
    image = stream(tmp_path, "disk")
    envelope = ova.envelope([(ova.Disk(image.path, MIB, "disks/one.vmdk"), 1)])
    data = Path(image.path).read_bytes()
    path = str(tmp_path / "x.tar")
    ova.write_tar(path, [("a/vm.ovf", envelope), ("a/disks/one.vmdk", data), ("one.vmdk", b"another")])
    (found,) = find_disks(path)
    assert (found.name, found.path) == ("one.vmdk", f"{path}/a/disks/one.vmdk")
    assert shown(path) == "disk"


def test_names_that_are_written_as_uris(tmp_path: Path) -> None:
    image = stream(tmp_path, "my disk 50%20")
    for href in ("my disk 50%20.vmdk", "my%20disk%2050%2520.vmdk"):
        made = ova.write_ova(str(tmp_path / "vm.ova"), [ova.Disk(image.path, MIB, href)])
        data = Path(image.path).read_bytes()
        ova.write_tar(made.path, [("vm.ovf", made.ovf), ("my disk 50%20.vmdk", data)])
        assert shown(made.path) == "my disk 50%20"


def test_a_delta_in_a_package(tmp_path: Path) -> None:
    base = stream(tmp_path, "base")
    top = desc.monolithic_sparse(str(tmp_path), "top", Content(MIB).put(9999, b"top"), parent=base)
    made = ova.write_ova(str(tmp_path / "vm.ova"), [ova.Disk(top.path, MIB), ova.Disk(base.path, MIB)])
    with open_disk(f"{made.path}:top.vmdk") as disk:
        assert len(disk.links) == 2
        assert disk.pread(4, MIB // 2) == b"base"


# What goes wrong


def test_chunks_that_are_missing(tmp_path: Path) -> None:
    image = desc.stream_optimized(str(tmp_path), "disk", noisy(2))
    data = Path(image.path).read_bytes()
    envelope = ova.envelope([(ova.Disk(image.path, image.size, chunk_size=1000), len(data))])
    pieces = [(f"disk.vmdk.{at // 1000:09}", data[at : at + 1000]) for at in range(0, len(data), 1000)]
    path = str(tmp_path / "vm.ova")
    for gone in (0, 3, len(pieces) - 2):
        ova.write_tar(path, [("vm.ovf", envelope), *pieces[:gone], *pieces[gone + 1 :]])
        with pytest.raises(FileMissing, match=f"{gone:09}: no such file"):
            shown(path)
    ova.write_tar(path, [("vm.ovf", envelope), *pieces[:-2]])
    with pytest.raises(VmdkError):
        shown(path)
    ova.write_tar(path, [("vm.ovf", envelope), ("disk.vmdk.000000000", b"x"), ("disk.vmdk.999999999", b"x")])
    with pytest.raises(FileMissing, match="000000001"):
        shown(path)


@pytest.mark.parametrize(
    ("href", "error"),
    [
        ("../secret.vmdk", TrustError),
        ("/etc/passwd", TrustError),
        ("link.vmdk", TrustError),
        ("gone.vmdk", FileMissing),
        ("file:///etc/passwd", Unsupported),
        ("http://example.com/x.vmdk", Unsupported),
        ("%2e%2e/secret.vmdk", TrustError),
    ],
)
def test_references_that_lead_out(tmp_path: Path, href: str, error: type[VmdkError]) -> None:
    image = stream(tmp_path, "secret")
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "link.vmdk").symlink_to("../secret.vmdk")
    envelope = ova.envelope([(ova.Disk(image.path, MIB, href), 1)])
    (tmp_path / "vm" / "vm.ovf").write_bytes(envelope)
    with pytest.raises(error) as caught:
        shown(tmp_path / "vm" / "vm.ovf")
    if error is Unsupported:
        assert str(caught.value).startswith(f"{href}: ")
    # In an archive there is no outside: such a member is no member.
    ova.write_tar(str(tmp_path / "vm.ova"), [("vm.ovf", envelope), (href, b"x")])
    if href not in ("gone.vmdk", "link.vmdk", "%2e%2e/secret.vmdk"):
        found = find_disks(tmp_path / "vm.ova")
        assert len(faults(found)) == 1
        if error is not Unsupported:
            assert f"vm.ova/{href}: no such file" in str(found[0].fault)


def test_bombs(tmp_path: Path) -> None:
    (tmp_path / "disk.vmdk").write_bytes(gzip.compress(bytes(70 * MIB), 1))
    (tmp_path / "vm.ovf").write_bytes(ova.envelope([(ova.Disk(str(tmp_path / "disk.vmdk"), MIB), 1)]))
    with pytest.raises(FormatError, match="that its disk can need"):
        shown(tmp_path / "vm.ovf")


def test_envelopes_that_are_refused(tmp_path: Path) -> None:
    image = stream(tmp_path, "disk")
    data = Path(image.path).read_bytes()
    bomb = b'<!DOCTYPE x [<!ENTITY a "a">]><Envelope/>'
    path = str(tmp_path / "vm.ova")
    ova.write_tar(path, [("vm.ovf", bomb), ("disk.vmdk", data)])
    with pytest.raises(FormatError, match="document type"):
        shown(path)
    ova.write_tar(path, [("vm.ovf", b"<Envelope/>"), ("disk.vmdk", data)])
    with pytest.raises(NotVmdk, match="an archive without"):
        shown(path)


def test_an_archive_that_is_replaced(tmp_path: Path) -> None:
    image = stream(tmp_path, "disk")
    made = ova.write_ova(str(tmp_path / "vm.ova"), [ova.Disk(image.path, MIB)])
    (found,) = find_disks(made.path)
    os.rename(ova.write_ova(str(tmp_path / "b.ova"), [ova.Disk(image.path, MIB)]).path, made.path)
    with pytest.raises(NotVmdk, match="replaced"):
        found.folder.open(found.file)


def test_nothing_is_left_open(tmp_path: Path) -> None:
    disks = [ova.Disk(stream(tmp_path, name).path, MIB, gzip=name == "b") for name in ("a", "b")]
    made = ova.write_ova(str(tmp_path / "vm.ova"), disks)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    find_disks(made.path)
    with open_disk(f"{made.path}:b.vmdk"), open_disk(f"{made.path}:a.vmdk"):
        pass
    with pytest.raises(NotVmdk):
        open_disk(made.path)
    gc.collect()  # an error's traceback keeps frames, and those a folder
    assert len(os.listdir("/proc/self/fd")) == before
