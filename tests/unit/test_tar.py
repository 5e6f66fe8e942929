"""Archives: what tar and its dialects hold, and what a hostile one may not do."""

import io
import os
import random
import subprocess
import tarfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk.errors import FileMissing, FormatError, Truncated, Unsupported, VmdkError, WriteRefused
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.storage.tar import TarFolder, list_members, tar_in
from tests.images.ova import Disk, write_ova
from tests.memory import MemoryStorage

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def info(name: str, size: int = 0, **fields: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size = size
    for key, value in fields.items():
        setattr(made, key, value)
    return made


def archive(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as made:
        for member, data in members:
            made.addfile(member, io.BytesIO(data))
    return out.getvalue()


def files(*names: str, format: int = tarfile.PAX_FORMAT) -> bytes:
    return archive(*((info(name, len(name.encode())), name.encode()) for name in names), format=format)


def opened(data: bytes) -> TarFolder:
    storage = MemoryStorage(data, "app.ova", writable=False)
    return TarFolder(lambda: storage, "app.ova", list_members(storage, "app.ova"))


def text(folder: Any, name: str) -> str:
    member: Storage
    with closing(folder.open(name)) as member:
        return member.read(0, member.size).decode()


def block(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header by hand, for what no tool writes: ``size`` is the raw field of 12 bytes."""
    head = bytearray(512)
    head[: len(name)] = name
    head[100:108] = b"0000644\0"
    head[124:136] = size.ljust(12, b"\0")
    head[148:156] = b" " * 8
    head[156:157] = kind
    head[257:265] = b"ustar\00000"
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


# What must work


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
def test_members(format: int) -> None:
    folder = opened(files("vm.ovf", "vm.mf", "disk1.vmdk", "sub/disk2.vmdk", format=format))
    assert folder.names() == ["disk1.vmdk", "sub/disk2.vmdk", "vm.mf", "vm.ovf"]
    assert [member.name for member in folder.members] == ["vm.ovf", "vm.mf", "disk1.vmdk", "sub/disk2.vmdk"]
    for name in folder.names():
        assert text(folder, name) == name
    disk = folder.open("disk1.vmdk")
    assert disk.name == "app.ova/disk1.vmdk"
    assert not disk.writable


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_long_names_and_odd_ones(format: str) -> None:
    names = ["x" * 300 + ".vmdk", "y" * 90 + "/" + "z" * 200, "Größe 1.vmdk", "a=b\n.vmdk"]
    folder = opened(files(*names, format=FORMATS[format]))
    assert folder.names() == sorted(names)
    for name in names:
        assert text(folder, name) == name


def test_names_that_are_not_utf8() -> None:
    raw = os.fsdecode(b"gr\xfc\xdfe.vmdk")
    for format in FORMATS.values():
        data = archive((info(raw, 3), b"abc"), format=format)
        assert text(opened(data), raw) == "abc"


@pytest.mark.parametrize("sizes", ["octal", "base256", "pax"])
def test_an_appliance(tmp_path: Path, sizes: Any) -> None:
    disk = tmp_path / "disk1.vmdk"
    disk.write_bytes(random.Random(1).randbytes(70_000))
    ova = write_ova(str(tmp_path / "app.ova"), [Disk(str(disk), 1 << 20)], sizes=sizes)
    folder = tar_in(*LocalFolder.for_image(ova.path))
    assert {member.name: (member.offset, member.size) for member in folder.members} == ova.members
    with closing(folder.open("disk1.vmdk")) as member:
        assert member.read(0, member.size) == disk.read_bytes()


def test_a_member_of_16_gib(tmp_path: Path) -> None:
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        head = info("disk.vmdk", 16 << 30).tobuf(format)
        path = tmp_path / f"{format}.ova"
        path.write_bytes(head)
        os.truncate(path, len(head) + (16 << 30))
        with path.open("ab") as file:
            file.write(files("after"))
        folder = tar_in(*LocalFolder.for_image(path))
        with closing(folder.open("disk.vmdk")) as member:
            assert member.size == 16 << 30
        assert text(folder, "after") == "after"


def test_what_gnu_tar_makes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("vm.ovf", "disk1.vmdk", "sub/disk2.vmdk"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link.vmdk").symlink_to("disk1.vmdk")
    for format in ("v7", "ustar", "gnu", "pax"):
        made = subprocess.run(
            ["tar", f"--format={format}", "-C", tmp_path, "-c", "."], capture_output=True, check=True
        )
        folder = opened(made.stdout)
        assert folder.names() == ["disk1.vmdk", "sub/disk2.vmdk", "vm.ovf"]
        assert text(folder, "./sub/../disk1.vmdk") == "disk1.vmdk"


def test_folders() -> None:
    folder = opened(files("./vm/vm.ovf", "vm/disk.vmdk", "vm/more/x.vmdk", "top"))
    vm = folder.folder_of("vm/vm.ovf")
    assert vm.name == "app.ova/vm"
    assert vm.names() == ["disk.vmdk", "more/x.vmdk", "vm.ovf"]
    assert text(vm, "disk.vmdk") == "vm/disk.vmdk"
    assert text(vm, "../top") == "top"
    assert text(vm.folder_of("more/x.vmdk"), "../disk.vmdk") == "vm/disk.vmdk"
    assert folder.folder_of("top").names() == folder.names()
    assert folder.folder_of("nowhere/x").names() == []
    assert text(vm.folder_of("../top"), "top") == "top"


def test_the_last_of_one_name_counts() -> None:
    data = archive((info("a", 3), b"old"), (info("a", 3), b"new"))
    assert text(opened(data), "a") == "new"


def test_an_archive_without_its_closing_zeros() -> None:
    data = files("a", "b")
    whole = data.rstrip(b"\0")
    assert opened(whole).names() == ["a", "b"]  # even the last member's padding is missing
    assert opened(data[: 4 * 512]).names() == ["a", "b"]
    assert opened(b"").names() == []
    assert opened(bytes(1024)).names() == []


# What is refused


@pytest.mark.parametrize(
    "name", ["nothing", "", ".", "..", "/", "/a", "../a", "a/../../a", "a/", "A", "vm", "/etc/passwd", "a\0"]
)
def test_names_that_are_not_there(name: str) -> None:
    folder = opened(files("a", "vm/b"))
    with pytest.raises(FileMissing):
        folder.open(name)


def test_members_that_claim_a_place_outside() -> None:
    data = files("../a", "/b", "c/../../d", "./e", "f/..", "/etc/passwd")
    folder = opened(data)
    assert folder.names() == ["e"]
    for name in ("../a", "a", "/b", "b", "d", "etc/passwd", "/etc/passwd"):
        with pytest.raises(FileMissing):
            folder.open(name)
    with pytest.raises(FileMissing):
        folder.folder_of("../a")


def test_links_and_devices_are_no_members() -> None:
    kinds = [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
    ]
    members = [(info(f"no{kind!r}", type=kind, linkname="/etc/passwd"), b"") for kind in kinds]
    folder = opened(archive(*members, (info("yes", 3), b"yes")))
    assert folder.names() == ["yes"]
    assert text(folder, "yes") == "yes"


def test_writing_is_refused() -> None:
    folder = opened(files("disk.vmdk"))
    with pytest.raises(WriteRefused) as caught:
        folder.open("disk.vmdk", writable=True)
    assert str(caught.value).startswith("app.ova/disk.vmdk: a file in an archive can't be written")
    assert "-r" in (caught.value.hint or "")
    with pytest.raises(WriteRefused):
        folder.open("disk.vmdk").write(b"x", 0)


def test_sparse_members(tmp_path: Path) -> None:
    with (tmp_path / "disk.vmdk").open("wb") as file:
        file.truncate(1 << 20)
        file.write(b"x")
    for options in (
        ["--format=gnu"],
        ["--format=pax", "--sparse-version=0.1"],
        ["--format=pax", "--sparse-version=1.0"],
    ):
        made = subprocess.run(
            ["tar", "--sparse", *options, "-C", tmp_path, "-c", "disk.vmdk"], capture_output=True, check=True
        )
        with pytest.raises(Unsupported, match="stored as sparse"):
            opened(made.stdout)


@pytest.mark.parametrize("cut", [1, 300, 511, 512, 514, 1025, 1536, 1537, 5 * 512])
def test_a_truncated_archive(cut: int) -> None:
    data = archive((info("a", 3), b"abc"), (info("b", 2000), b"x" * 2000))
    with pytest.raises(Truncated) as caught:
        opened(data[:cut])
    assert caught.value.file == "app.ova"
    assert caught.value.hint is not None


def test_a_broken_header() -> None:
    data = bytearray(files("a", "b"))
    data[1024] ^= 1
    with pytest.raises(FormatError, match="no archive header at byte 1024: bad checksum"):
        opened(bytes(data))


@pytest.mark.parametrize(
    "size",
    [
        b"\xff" * 12,  # -1 in base 256
        b"\xff" + b"\0" * 11,
        b"\x80" + b"\xff" * 11,
        b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7,
        b"77777777777",
        b"-0000000512",
        b"9",
        b"0x10",
        b"\xb2\xb3",
    ],
)
@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"g", b"S", b"?"])
def test_sizes_that_can_not_be(size: bytes, kind: bytes) -> None:
    with pytest.raises(VmdkError):
        opened(block(b"a", size, kind) + bytes(4096))


@pytest.mark.parametrize(
    "records",
    [
        b"0 a=b\n",
        b"1 a=b\n",
        b"7 a=b\n",
        b"5 a=b\n",
        b"99 a=b\n",
        b"-6 a=b\n",
        b"a=b\n",
        b"6",
        b"6 ab!\n",
        b"1" * 2000,
        b"1" * 4999 + b" a=b\n",
        b"11 size=-1\n",
        b"11 size=1e\n",
        b"8 size=\n",
        b"29 size=99999999999999999999\n",
        b"28 size=9999999999999999999\n",
    ],
)
def test_extensions_that_can_not_be(records: bytes) -> None:
    head = block(b"pax", b"%o" % len(records), b"x") + records.ljust(-len(records) // 512 * -512, b"\0")
    with pytest.raises(FormatError):
        opened(head + files("a"))


def test_a_great_many_headers() -> None:
    head = block(b"a", b"0")
    with pytest.raises(FormatError, match="more than 10000 headers"):
        opened(head * 10_001)
    with pytest.raises(FormatError, match="more than 10000 headers"):
        opened(block(b"a", b"0", b"5") * 10_001)
    # tarfile would go a step deeper into its stack at each of these.
    with pytest.raises(FormatError, match="more than 10000 headers"):
        opened(block(b"a", b"0", b"x") * 10_001)
    assert len(opened(head * 9_999).members) == 9_999


def test_extensions_without_end() -> None:
    body = b"6 a=b\n" * 40_000
    with pytest.raises(FormatError, match="too long"):
        opened((block(b"x", b"%o" % len(body), b"x") + body.ljust(-len(body) // 512 * -512, b"\0")) * 40)
    storage = Hole(1 << 40, block(b"x", b"\x80" + (1 << 39).to_bytes(11, "big"), b"x"))
    with pytest.raises(FormatError, match="too long"):
        list_members(storage, "app.ova")


class Hole(MemoryStorage):
    """A file of any size that begins with some bytes."""

    def __init__(self, size: int, data: bytes) -> None:
        super().__init__(data)
        self._size = size

    @property
    def size(self) -> int:
        return self._size


def test_random_damage_ends_well_and_soon() -> None:
    made = archive(
        (info("vm.ovf", 10), b"0123456789"),
        (info("x" * 200, 600), b"y" * 600),
        (info("disk", 16 << 30 >> 24, pax_headers={"comment": "c" * 700}), b"z" * 1024),
    )
    chance = random.Random(3)
    start = time.monotonic()
    for _ in range(2000):
        data = bytearray(made)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            data[at] = chance.choice(
                [0, 255, 0x80, data[at] ^ (1 << chance.randrange(8)), chance.randrange(256)]
            )
            head = at // 512 * 512
            if chance.random() < 0.9:  # a header with a sum that fits, so that it is looked into
                data[head + 148 : head + 156] = b" " * 8
                data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + 512])
        try:
            folder = opened(bytes(data))
        except VmdkError:
            continue
        for name in folder.names():
            member = folder.open(name)
            assert len(member.read(0, member.size)) == member.size
    assert time.monotonic() - start < 30
