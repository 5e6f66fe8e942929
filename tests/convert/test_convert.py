"""Conversion as a user runs it: every kind there and back, what a source may be, all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbd_vmdk
from nbd_vmdk import VmdkError, Work, convert, create_image, open_disk
from nbd_vmdk.cli import main
from nbd_vmdk.cli.convert import convert as command
from nbd_vmdk.converting import conversion
from nbd_vmdk.errors import Difference, FileExists, NotVmdk, OptionError, StorageError, WriteRefused
from nbd_vmdk.extents.streamwriter import StreamWriter
from nbd_vmdk.ops import convert as converting
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.storage.local import LocalFile
from tests.convert import leftovers, qemu_raw, raw_file
from tests.corpus import Entry, entries
from tests.engine import reads
from tests.images import desc
from tests.images.content import KIB, MIB, SECTOR, Content

KINDS = [
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
    "vmfs",
    "vmfsSparse",
]


def errors_of(path: str) -> list[Any]:
    return [f for f in check_image(path, data=True).findings if f.severity.name == "ERROR"]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tmp_path: Path, kind: str) -> None:
    content = Content.random(7 * MIB + 3 * SECTOR, KINDS.index(kind))
    raw = raw_file(tmp_path / "a.raw", content)
    made = str(tmp_path / "a.vmdk")
    create = {"extent_size": 3 * MIB} if kind.startswith("twoGb") else {}
    done = convert(raw, made, kind=kind, create=create, work=Work(verify=True))
    assert (done.kind, done.size, done.verified) == (kind, content.size, True)
    assert qemu_raw(made, tmp_path / "q.raw") == content.read()
    assert errors_of(made) == []
    back = tmp_path / "b.raw"
    convert(made, str(back), work=Work(verify=True))
    assert back.read_bytes() == content.read()
    assert leftovers(tmp_path) == []


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 3 * MIB),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(
        ["monolithicSparse", "streamOptimized", "vmfsSparse", "twoGbMaxExtentSparse", "vmfs"]
    ),
    grain=st.sampled_from([None, 4 * KIB, 128 * KIB]),
    threads=st.integers(1, 3),
)
def test_any_size(tmp_path: Path, size: int, seed: int, kind: str, grain: int | None, threads: int) -> None:
    """A raw file of any number of bytes is filled up with zeros to whole sectors."""
    sectors = -(-size // SECTOR)
    content = Content.random(sectors * SECTOR, seed).read()[:size]
    raw = tmp_path / "a.raw"
    raw.write_bytes(content)
    create = {"grain_size": grain} if grain and kind != "vmfs" else {}
    work = Work(replace=True, threads=threads, verify=True)
    try:
        convert(raw, tmp_path / "a.vmdk", kind=kind, create=create, work=work)
    except OptionError:
        assert kind == "vmfsSparse"  # its grains are small
        assert grain is not None
        return
    with open_disk(tmp_path / "a.vmdk") as disk:
        assert disk.pread(disk.size, 0) == content.ljust(sectors * SECTOR, b"\0")


def test_a_chain_becomes_one(tmp_path: Path) -> None:
    base, child = Content.random(2 * MIB, 1), Content.random(2 * MIB, 2)
    parent = desc.monolithic_sparse(str(tmp_path), "a", base)
    top = desc.monolithic_sparse(str(tmp_path), "b", child, parent=parent)
    convert(top.path, tmp_path / "c.vmdk")
    with open_disk(tmp_path / "c.vmdk") as disk:
        assert len(disk.links) == 1
        reads(disk, child.settled(64 * KIB).over(base))


def test_zeros_are_not_allocated(tmp_path: Path) -> None:
    """Holes stay holes, and written zeros become some; one sector of data keeps one grain."""
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(8 * MIB) + b"x" * SECTOR + bytes(8 * MIB - SECTOR))
    sparse = convert(raw, tmp_path / "a.vmdk")
    assert sparse.data == 64 * KIB
    back = convert(tmp_path / "a.vmdk", tmp_path / "b.raw")
    assert back.data == 4 * KIB
    assert back.occupied is not None
    assert back.occupied <= 64 * KIB


def test_what_belongs_to_the_disk_is_kept(tmp_path: Path) -> None:
    made = desc.monolithic_sparse(
        str(tmp_path),
        "a",
        Content.random(MIB, 1),
        text={
            "ddb": {
                "ddb.adapterType": "ide",
                "ddb.geometry.cylinders": "17",
                "ddb.geometry.heads": "4",
                "ddb.geometry.sectors": "30",
                "ddb.toolsVersion": "12345",
                "ddb.uuid": "60 00 C2 93 00 00 00 00-00 00 00 00 00 00 00 01",
            }
        },
    )
    convert(made.path, tmp_path / "b.vmdk")
    convert(made.path, tmp_path / "c.vmdk", create={"adapter": "lsilogic"})
    with open_disk(tmp_path / "b.vmdk") as disk:
        assert disk.links[0].descriptor is not None
        found = disk.links[0].descriptor.ddb
    assert found["ddb.adapterType"] == "ide"
    assert (found["ddb.geometry.cylinders"], found["ddb.toolsVersion"]) == ("17", "12345")
    assert not found.get("ddb.uuid", "").endswith("01")
    with open_disk(tmp_path / "c.vmdk") as disk:
        assert disk.links[0].descriptor is not None
        assert disk.links[0].descriptor.ddb["ddb.adapterType"] == "lsilogic"


@pytest.mark.parametrize("kind", ["monolithicSparse", "streamOptimized", "ova", "vmfs"])
def test_content_ids_differ(tmp_path: Path, kind: str) -> None:
    """A converted disk is not one that was never written."""
    raw = raw_file(tmp_path / "a.raw", Content.random(MIB, 1))
    found = set()
    for name in ("b.vmdk", "c.vmdk"):
        convert(raw, tmp_path / name, kind=kind)
        with open_disk(tmp_path / name) as disk:
            descriptor = disk.links[0].descriptor
            assert descriptor is not None
            assert descriptor.long_content_id is None or descriptor.long_content_id.endswith(
                f"{descriptor.cid:08x}"
            )
            found.add(descriptor.cid)
    assert len(found) == 2
    assert 0xFFFFFFFE not in found


# What a source is.


def hostile(tmp_path: Path) -> bytes:
    """What a guest could write to the beginning of its raw disk: a descriptor that names a neighbour's."""
    (tmp_path / "secret.img").write_bytes(b"secret" * 1024)
    text = (
        b'# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
    )
    text += b'RW 12 FLAT "secret.img" 0\n'
    return text.ljust(64 * KIB, b"\0")


def test_what_others_stand_on_is_not_replaced(tmp_path: Path) -> None:
    source = raw_file(tmp_path / "a.raw", Content.random(MIB, 1))
    base, child = str(tmp_path / "base.vmdk"), str(tmp_path / "child.vmdk")
    convert(source, base)
    create_image(child, parent=base)
    before = Path(base).read_bytes()
    with pytest.raises(WriteRefused, match=r"it is the parent of child\.vmdk"):
        convert(source, base, work=Work(replace=True))
    assert Path(base).read_bytes() == before
    os.unlink(child)
    convert(source, base, work=Work(replace=True))


@pytest.mark.parametrize("option", [{"parent": "x.vmdk"}, {"ignore_cid": True}, {"allow_dirs": ("/",)}])
def test_raw_bytes_have_no_parent(tmp_path: Path, option: dict[str, Any]) -> None:
    source = raw_file(tmp_path / "a.raw", Content.random(MIB, 1))
    with pytest.raises(OptionError, match="is for a VMDK"):
        convert(source, str(tmp_path / "b.vmdk"), **option)
    assert not leftovers(tmp_path)


def test_shared_space_is_not_reserved(tmp_path: Path) -> None:
    source = raw_file(tmp_path / "a.raw", Content.random(MIB, 1))
    create = {"kind": "monolithicFlat", "create": {"preallocation": "falloc"}}
    with pytest.raises(OptionError, match="space for this image alone"):
        convert(source, str(tmp_path / "b.vmdk"), work=Work(share=True), **create)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("name", ["guest.raw", "guest.img", "guest", "guest-flat.vmdk", "guest-f001.vmdk"])
def test_a_guest_can_not_make_its_disk_a_descriptor(tmp_path: Path, name: str) -> None:
    guest = tmp_path / name
    guest.write_bytes(hostile(tmp_path))
    with pytest.raises(NotVmdk) as caught:
        convert(guest, tmp_path / "out.vmdk")
    assert "--from raw" in (caught.value.hint or "")
    assert not (tmp_path / "out.vmdk").exists()
    convert(guest, tmp_path / "out.raw", source_format="raw")
    assert (tmp_path / "out.raw").read_bytes() == guest.read_bytes()


def test_the_user_may_say_that_it_is_one(tmp_path: Path) -> None:
    guest = tmp_path / "disk.img"
    guest.write_bytes(hostile(tmp_path))
    convert(guest, tmp_path / "out.raw", source_format="vmdk")
    assert (tmp_path / "out.raw").read_bytes() == b"secret" * 1024


@pytest.mark.parametrize(
    "head", [b"QFI\xfb", b"KDMV", b"COWD", b"\x1f\x8b\x08", b"PK\x03\x04", b"\0" * 257 + b"ustar"]
)
def test_raw_that_looks_like_something(tmp_path: Path, head: bytes) -> None:
    file = tmp_path / "a.img"
    file.write_bytes(head.ljust(64 * KIB, b"\0"))
    with pytest.raises(NotVmdk, match="something else"):
        convert(file, tmp_path / "a.vmdk")
    convert(file, tmp_path / "a.vmdk", source_format="raw", work=Work(verify=True))


@pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd")
@pytest.mark.parametrize("kind", ["qcow2", "vdi", "vpc", "vhdx"])
def test_an_image_of_another_kind(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint makes a VMDK of it, as it stands there."""
    monkeypatch.chdir(tmp_path)
    content = Content.random(4 * MIB, 1)
    raw_file("a.raw", content)
    other = "my disk"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, "a.raw", other], check=True)
    with pytest.raises(NotVmdk) as caught:
        convert(other, "new.vmdk")
    assert caught.value.hint is not None
    way, word = caught.value.hint.removeprefix("make a VMDK of it: ").split("; ")
    assert word.startswith("--from raw is only for")
    command = way.replace("nbd-vmdk convert", f"{sys.executable} -m nbd_vmdk convert")
    monkeypatch.setenv("PYTHONPATH", str(Path(nbd_vmdk.__file__).parents[1]))
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL, timeout=60)
    with open_disk("new.vmdk") as disk:
        assert disk.pread(4 * MIB, 0) == content.read()


def test_plain_raw_needs_no_word(tmp_path: Path) -> None:
    for number, head in enumerate((b"\xeb\x63\x90", b"\0", b"LABELONE")):
        file = tmp_path / f"{number}.img"
        file.write_bytes(head.ljust(64 * KIB, b"\0"))
        convert(file, tmp_path / f"{number}.vmdk")
    (tmp_path / "empty.img").write_bytes(b"")
    with pytest.raises(NotVmdk, match="empty"):
        convert(tmp_path / "empty.img", tmp_path / "e.vmdk")


def test_all_that_leads_to_a_disk(tmp_path: Path) -> None:
    """A folder, a machine, an appliance with one disk; the words for one of several."""
    vm = tmp_path / "vm"
    vm.mkdir()
    contents = [Content.random(MIB, 1), Content.random(MIB, 2)]
    for name, content in zip("ab", contents, strict=True):
        desc.monolithic_sparse(str(vm), name, content)
    lines = ['scsi0.present = "TRUE"']
    for number, name in enumerate("ab"):
        lines += [f'scsi0:{number}.present = "TRUE"', f'scsi0:{number}.fileName = "{name}.vmdk"']
    (vm / "vm.vmx").write_text("\n".join(lines))
    alone = tmp_path / "alone"
    alone.mkdir()
    desc.monolithic_sparse(str(alone), "a", contents[0])
    convert(vm / "b.vmdk", tmp_path / "app.ova")
    found = [
        (f"{vm}/vm.vmx:scsi0:0", 0),
        (f"{vm}/vm.vmx:b.vmdk", 1),
        (str(alone), 0),
        (f"{tmp_path}/app.ova", 1),
        (f"{tmp_path}/app.ova:app-disk1.vmdk", 1),
    ]
    for source, number in found:
        convert(source, tmp_path / "out.raw", work=Work(replace=True))
        assert (tmp_path / "out.raw").read_bytes() == contents[number].read(), source
    for source in (f"{vm}/vm.vmx", f"{vm}/vm.vmx:scsi0:7", str(vm)):
        with pytest.raises(NotVmdk):
            convert(source, tmp_path / "other.raw")


def test_a_vmdk_by_name_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.vmdk").write_bytes(b"\xeb\x63\x90".ljust(64 * KIB, b"\0"))
    with pytest.raises(NotVmdk):
        convert(tmp_path / "a.vmdk", tmp_path / "b.raw")
    convert(tmp_path / "a.vmdk", tmp_path / "b.raw", source_format="raw")


@pytest.mark.parametrize("kind", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicFlat"])
def test_no_extents_are_left_of_what_is_replaced(tmp_path: Path, kind: str) -> None:
    content = Content.random(4 * MIB, 1)
    raw = raw_file(tmp_path / "a.raw", content)
    target = tmp_path / "b.vmdk"
    create = {"extent_size": MIB} if kind.startswith("two") else {}
    for name in ("b.vmdk", "other.vmdk"):
        convert(raw, tmp_path / name, kind=kind, create=create)
    (tmp_path / "b-mine.vmdk").write_bytes(b"mine")
    others = {name for name in os.listdir(tmp_path) if not name.startswith("b")} | {"b-mine.vmdk"}
    again = convert(raw, target, kind=kind, create=create, work=Work(replace=True))
    assert not [note for note in again.notes if "replaced" in note]
    made = convert(raw, target, work=Work(replace=True, verify=True))
    assert set(os.listdir(tmp_path)) == others | {"b.vmdk"}
    assert "removed with the image that was replaced: b-" in made.notes[-1]
    assert not made.warnings
    with open_disk(target) as disk:
        assert disk.pread(content.size, 0) == content.read()


def test_what_is_replaced_may_have_what_is_not_its_own(tmp_path: Path) -> None:
    """Extents of another image, in another folder, or that are read: they stay, and that is told."""
    raw = raw_file(tmp_path / "a.raw", Content.random(2 * MIB, 1))
    target, other = tmp_path / "b.vmdk", tmp_path / "b-other.vmdk"
    for sharing in ("other", "source", "name"):
        convert(raw, other, kind="monolithicFlat", work=Work(replace=True))
        target.write_text(other.read_text())
        if sharing == "name":
            (tmp_path / "b-other-flat.vmdk").rename(tmp_path / "c.vmdk")
            target.write_text(other.read_text().replace("b-other-flat", "c"))
            other.unlink()
        before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
        made = convert(other if sharing == "source" else raw, target, work=Work(replace=True))
        del before["b.vmdk"]
        assert before == {
            name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path) if name in before
        }
        assert len(before) == len(os.listdir(tmp_path)) - 1
        assert "of the replaced image" in " ".join(made.warnings)


def test_what_a_guest_wrote_names_nothing_to_remove(tmp_path: Path) -> None:
    """A raw disk that begins as a descriptor does is replaced, and takes nothing with it."""
    source = raw_file(tmp_path / "a.raw", Content.random(MIB, 1))
    for name in ("b.img", "b-flat.vmdk"):
        mine = f"{Path(name).stem}-mine.vmdk"
        (tmp_path / mine).write_bytes(bytes(64 * KIB))
        (tmp_path / name).write_bytes(hostile(tmp_path).replace(b"secret.img", mine.encode()))
        there = {*os.listdir(tmp_path)}
        convert(source, tmp_path / name, kind="raw", work=Work(replace=True))
        assert {*os.listdir(tmp_path)} == there


# All or nothing.


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    raw = raw_file(tmp_path / "a.raw", Content.random(MIB, 1))
    for name in ("b.raw", "b.vmdk", "b.ova"):
        target = tmp_path / name
        target.write_bytes(b"mine")
        with pytest.raises(FileExists) as caught:
            convert(raw, target)
        assert "--force" in (caught.value.hint or "")
        assert target.read_bytes() == b"mine"
        convert(raw, target, work=Work(replace=True))
        assert target.read_bytes() != b"mine"
    with pytest.raises(WriteRefused, match="part of the source"):
        convert(raw, raw, work=Work(replace=True))


def test_a_parent_is_no_target(tmp_path: Path) -> None:
    parent = desc.monolithic_sparse(str(tmp_path), "a", Content.random(MIB, 1))
    top = desc.monolithic_sparse(str(tmp_path), "b", Content.random(MIB, 2), parent=parent)
    with pytest.raises(WriteRefused, match="part of the source"):
        convert(top.path, parent.path, work=Work(replace=True))


@pytest.mark.parametrize("name", ["b.raw", "b.vmdk", "b.ova"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_file(tmp_path / "a.raw", Content.random(4 * MIB, 1, density=1))
    write = LocalFile.write

    def full(self: LocalFile, buf: bytes | memoryview, at: int) -> None:
        if at > MIB:
            raise StorageError.of(OSError(28, "No space left on device"), self.name, "write")
        write(self, buf, at)

    monkeypatch.setattr(LocalFile, "write", full)
    with pytest.raises(StorageError, match="No space") as caught:
        convert(raw, tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/b.")
    assert sorted(os.listdir(tmp_path)) == ["a.raw"]


@pytest.mark.parametrize("kind", ["monolithicSparse", "streamOptimized", "raw", "ova"])
def test_verify_finds_what_went_wrong(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that was spoiled on its way is not given its name."""
    raw = raw_file(tmp_path / "a.raw", Content(4 * MIB).put(MIB, random.Random(1).randbytes(2 * MIB)))
    offset = 2 * MIB + 700

    def spoiled(source: Any, sink: Any, **options: Any) -> Any:
        class Spoiling:
            size = source.size
            runs = source.runs

            def read_into(self, buf: memoryview, at: int) -> None:
                source.read_into(buf, at)
                if at <= offset < at + len(buf):
                    buf[offset - at] ^= 1

        comparing = isinstance(sink, converting.Comparer)
        return copy(source if comparing else Spoiling(), sink, **options)

    copy = converting.copy
    monkeypatch.setattr(converting, "copy", spoiled)
    with pytest.raises(Difference, match=str(offset)):
        convert(raw, tmp_path / "b.out", kind=kind, work=Work(verify=True))
    assert sorted(os.listdir(tmp_path)) == ["a.raw"]
    convert(raw, tmp_path / "b.out", kind=kind)


def test_killed_at_any_point(tmp_path: Path) -> None:
    """No target, or a whole one."""
    content = Content.random(24 * MIB, 3, density=0.9)
    raw = raw_file(tmp_path / "a.raw", content)
    rng = random.Random(7)
    for number, kind in enumerate(("streamOptimized", "monolithicSparse", "twoGbMaxExtentFlat", "ova")):
        target = tmp_path / f"t-{kind}-{number}.vmdk"
        words = [sys.executable, "-m", "nbd_vmdk", "convert", "--type", kind, raw, str(target)]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while process.poll() is None and not leftovers(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():
            with open_disk(target) as disk:
                assert disk.pread(content.size, 0) == content.read()
        for name in leftovers(tmp_path):
            subprocess.run(["rm", "-r", str(tmp_path / name)], check=True)
        others = {name for name in os.listdir(tmp_path) if not target.exists()} - {"a.raw"}
        assert not [name for name in others if name.startswith(target.stem)]


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_file(tmp_path / "a.raw", Content.random(4 * MIB, 1, density=1))
    append = StreamWriter.append

    def slowly(self: StreamWriter, records: Any) -> None:
        time.sleep(0.05)
        append(self, records)

    monkeypatch.setattr(StreamWriter, "append", slowly)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(raw, tmp_path / "b.vmdk", kind="streamOptimized", work=Work(progress=stop))
    assert sorted(os.listdir(tmp_path)) == ["a.raw"]


# The command line.


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = Content.random(MIB, 1)
    raw = raw_file(tmp_path / "a.raw", content)
    target = str(tmp_path / "b.vmdk")
    assert main(["convert", raw, target, "--for", "esxi", "--verify", "--json"]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert (facts["schema"], facts["kind"], facts["size"], facts["verified"]) == (1, "vmfs", MIB, True)
    assert "note: made as vmfs" in printed.err
    assert main(["convert", raw, target]) == 1
    assert "--force" in capsys.readouterr().err
    assert (
        main(["convert", raw, target, "--force", "--type", "streamOptimized", "--compress-level", "1"]) == 0
    )
    assert "streamOptimized, 1 MiB" in capsys.readouterr().out
    with open_disk(target) as disk:
        assert disk.pread(MIB, 0) == content.read()


@pytest.mark.parametrize(("name", "size"), [("b.vmdk", 512), ("b.ova", 512), ("b.raw", 6)])
def test_a_source_that_ends_within_a_sector(
    tmp_path: Path, name: str, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_bytes(b"hello\n")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / name), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["size"] == size
    assert ("note: the size is rounded up to whole sectors: 512 bytes" in printed.err) == (size == 512)


@pytest.mark.parametrize(
    "words",
    [
        ["a.raw", "out"],
        ["a.raw", "b.raw", "--adapter", "ide"],
        ["a.raw", "b.vmdk", "--type", "nonsense"],
        ["a.raw", "b.vmdk", "--ova", "--type", "raw"],
        ["a.raw", "b.vmdk", "--compress-level", "0"],
        ["a.raw", "b.vmdk", "--from", "qcow2"],
        ["nbd://localhost/x", "b.vmdk", "--from", "vmdk"],
    ],
)
def test_what_makes_no_sense(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw_file("a.raw", Content.random(MIB, 1))
    assert main(["convert", *words]) == 2
    assert os.listdir(tmp_path) == ["a.raw"]


def test_help_says_the_rule() -> None:
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    assert "only if it is called .vmdk" in text


@pytest.mark.parametrize("entry", entries("open"))
def test_corpus(corpus: Any, entry: Entry, tmp_path: Path) -> None:
    """A real image, made another kind, keeps its bytes."""
    if entry["virtual_size"] > 64 * MIB:
        pytest.skip("large")
    kind = random.Random(entry["name"]).choice(["streamOptimized", "monolithicSparse", "vmfs", "ova"])
    target = tmp_path / ("a.ova" if kind == "ova" else "a.vmdk")
    try:
        convert(corpus(entry), target, kind=kind, source_format="vmdk")
    except VmdkError:
        if not entry.get("optional"):
            raise
        pytest.skip("refused, as it may be")
    with open_disk(target) as disk:
        assert hashlib.sha256(disk.pread(disk.size, 0)).hexdigest() == entry["sha256"]


@pytest.mark.parametrize(
    "wrong", [{"level": 0}, {"level": 13}, {"level": -1}, {"threads": 0}, {"threads": -4}]
)
def test_numbers_that_can_not_be(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=r"level of deflating|threads must"):
        Work(**wrong)  # type: ignore[arg-type]  # the other fields are no numbers


def test_a_result_that_somebody_takes_away_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was made; how much space it takes is nobody's to say any more."""
    source = raw_file(tmp_path / "a.raw", Content.random(MIB, 1))

    def taken(*args: Any) -> Any:
        made = write_raw(*args)
        (tmp_path / "b.raw").rename(tmp_path / "c.raw")
        return made

    write_raw = conversion.write_raw
    monkeypatch.setattr(conversion, "write_raw", taken)
    done = convert(source, tmp_path / "b.raw")
    assert done.occupied is None
    assert (tmp_path / "c.raw").read_bytes() == Path(source).read_bytes()
