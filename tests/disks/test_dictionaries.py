"""Configurations (.vmx) and snapshot lists (.vmsd): what is read, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_vmdk.errors import FormatError
from nbd_vmdk.ondisk.vmsd import parse_snapshots
from nbd_vmdk.ondisk.vmx import (
    MAX_DICTIONARY,
    AttachedDisk,
    disks_of,
    node_order,
    parse_dictionary,
    with_values,
)


def parsed(text: str | bytes) -> dict[str, str]:
    return parse_dictionary(text.encode() if isinstance(text, str) else text, "vm.vmx")


def disks(text: str) -> list[tuple[str, str]]:
    return [(disk.node, disk.file) for disk in disks_of(parsed(text))]


def test_lines() -> None:
    text = '#!/usr/bin/vmware\r\n.encoding = "UTF-8"\r\nA.b="1"\r  c = two words \n\nd=""\n\t# x = "y"\n\x1a'
    assert parsed(text) == {".encoding": "UTF-8", "a.b": "1", "c": "two words", "d": ""}
    assert parsed('a = "say |22hi|22 |7c |0A|FF" # why\n') == {"a": 'say "hi" | \n|FF'}
    assert parsed('a = "b"c" d"') == {"a": 'b"c" d'}
    assert parsed('a = "open') == {"a": "open"}
    assert parsed(b"\xef\xbb\xbf" + b'a = "x"\n') == {"a": "x"}
    assert parsed("") == {}
    assert parsed('a = "1"\nA = "1"\n') == {"a": "1"}


@pytest.mark.parametrize(
    ("label", "codec", "name"),
    [
        ("UTF-8", "utf-8", "Größe 磁盘.vmdk"),
        ("windows-1252", "cp1252", "Größe.vmdk"),
        ("GBK", "gbk", "磁盘.vmdk"),
        ("Shift_JIS", "cp932", "ディスク表.vmdk"),
        ("windows-1251", "cp1251", "Диск.vmdk"),
        ("no-such", "utf-8", "Größe.vmdk"),  # what it says is not known: it is UTF-8 as it stands
        ("UTF-8", "cp1252", "Größe.vmdk"),  # what it says is not true
    ],
)
def test_encodings(label: str, codec: str, name: str) -> None:
    raw = f'.encoding = "{label}"\nscsi0:0.fileName = "{name}"\n'.encode(codec)
    assert parsed(raw)["scsi0:0.filename"] == name


@pytest.mark.parametrize(
    ("before", "value", "after"),
    [
        ('a = "1"\r\nX = "2"\r\n', "new", 'a = "1"\r\nX = "new"\r\n'),
        ('\ufeffx="2" # why\n', "n w", '\ufeffx="n w" # why\n'),
        ('\t x  =  two words \t\ry = ""', "n", '\t x  =  "n" \t\ry = ""'),
        ("x =\n", "n", 'x ="n"\n'),
        ('x = "open', "n", 'x = "n"'),
        ('x = "x = "', "x", 'x = "x"'),
        ('x = "1"\nX = "1"\n', '2|"\n', 'x = "2|7C|22|0A"\nX = "2|7C|22|0A"\n'),
        ('# x = "1"\nx = "1"', "2", '# x = "1"\nx = "2"'),
    ],
)
def test_another_value(before: str, value: str, after: str) -> None:
    made = with_values(before.encode(), "vm.vmx", {"x": value})
    assert made.decode() == after
    assert parsed(made)["x"] == value


def test_another_value_in_its_own_encoding() -> None:
    raw = '.encoding = "Shift_JIS"\nname = "表"\nx = "1"\n'.encode("cp932")
    assert with_values(raw, "vm.vmx", {"x": "ディスク.vmdk"}) == raw.replace(
        b'"1"', '"ディスク.vmdk"'.encode("cp932")
    )
    with pytest.raises(FormatError, match="can't be written in its encoding"):
        with_values(raw, "vm.vmx", {"x": "Größe.vmdk"})
    raw = b'.encoding = "UTF-8"\nname = "\xff"\nx = "1"\n'  # in truth something else: that stays as it is
    assert with_values(raw, "vm.vmx", {"x": "2"}) == raw.replace(b'"1"', b'"2"')
    with pytest.raises(FormatError):
        with_values(raw, "vm.vmx", {"not-there": "2"})


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b.c", "X"]), st.text(max_size=9)), max_size=5),
    st.text(max_size=9),
)
def test_no_other_value_changes(lines: list[tuple[str, str]], value: str) -> None:
    text = "".join(f"{key} = {old}\n" for key, old in lines) + 'x1 = "old" # "\n'
    with contextlib.suppress(FormatError, UnicodeEncodeError):
        before = parsed(text)
        assert parsed(with_values(text.encode(), "vm.vmx", {"x1": value})) == before | {"x1": value}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b'a = "1"\nb = "2"\na = "3"\n', "line 3"),
        (b'a = "1"\nno assignment\n', "line 2"),
        (b'a = "1"\n= "2"\n', "line 2"),
        (b"\x7fELF\0\0", "zero bytes"),
        (b"#" * (MAX_DICTIONARY + 1), "longer"),
        ('a = "1"\n'.encode("utf-16"), "zero bytes"),
    ],
)
def test_what_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        parsed(raw)


def test_disks_in_bus_order() -> None:
    places = [
        "ide1:0",
        "nvme0:0",
        "scsi1:2",
        "scsi0:10",
        "scsi0:2",
        "sata0:3",
        "ide0:1",
        "scsi10:0",
        "scsi2:0",
    ]
    text = "".join(f'{place}.present = "TRUE"\n{place}.fileName = "{place}.vmdk"\n' for place in places)
    order = [
        "scsi0:2",
        "scsi0:10",
        "scsi1:2",
        "scsi2:0",
        "scsi10:0",
        "sata0:3",
        "nvme0:0",
        "ide0:1",
        "ide1:0",
    ]
    assert [node for node, _ in disks(text)] == order


def test_what_is_no_disk() -> None:
    text = """
        scsi0:0.present = "TRUE"
        scsi0:0.fileName = "a.vmdk"
        SCSI0:1.PRESENT = "true"
        scsi0:1.fileName = "B.vmdk"
        scsi0:1.deviceType = "scsi-hardDisk"
        scsi0:2.present = "FALSE"
        scsi0:2.fileName = "gone.vmdk"
        scsi0:3.fileName = "not plugged in.vmdk"
        scsi0:4.present = "TRUE"
        scsi0:4.fileName = ""
        scsi0:5.present = "TRUE"
        scsi0:6.present = "TRUE"
        scsi0:6.fileName = "/dev/sg0"
        scsi0:6.deviceType = "scsi-passthru"
        ide1:0.present = "TRUE"
        ide1:0.fileName = "auto detect"
        ide1:0.deviceType = "cdrom-raw"
        ide0:0.present = "TRUE"
        ide0:0.fileName = "raw.vmdk"
        ide0:0.deviceType = "rawDisk"
        sata0:1.present = "TRUE"
        sata0:1.deviceType = "cdrom-image"
        sata0:1.fileName = "linux.iso"
        floppy0.present = "TRUE"
        floppy0.fileName = "a.flp"
        scsi-1:0.present = "TRUE"
        scsi-1:0.fileName = "negative.vmdk"
        scsi00:0.present = "TRUE"
        scsi00:0.fileName = "two names of one place.vmdk"
        scsi0:99999.present = "TRUE"
        scsi0:99999.fileName = "far.vmdk"
        usb0:0.present = "TRUE"
        usb0:0.fileName = "stick.vmdk"
    """
    assert disks(text) == [("scsi0:0", "a.vmdk"), ("scsi0:1", "B.vmdk"), ("ide0:0", "raw.vmdk")]
    assert disks_of(parsed('ide0:0.present="1"\nide0:0.fileName="a"\nide0:0.redo="a.REDO_x"\n')) == [
        AttachedDisk("ide0:0", "a", "a.REDO_x")
    ]


def test_nodes() -> None:
    assert node_order("SCSI1:15") == (0, 1, 15)
    for wrong in ("", "scsi", "scsi0", "scsi0:", "scsi0:-1", "scsi0:0:0", "scsi0:0\n", "scsi٣:0", " scsi0:0"):
        assert node_order(wrong) is None


VMSD = """
snapshot.lastUID = "7"
snapshot.numSnapshots = "2"
snapshot.current = "7"
snapshot0.uid = "1"
snapshot0.displayName = "clean"
snapshot0.numDisks = "2"
snapshot0.disk0.fileName = "data.vmdk"
snapshot0.disk0.node = "scsi0:1"
snapshot0.disk1.fileName = "boot.vmdk"
snapshot0.disk1.node = "scsi0:0"
snapshot4.uid = "7"
snapshot4.displayName = "Vor dem |22großen|22 Update"
snapshot4.parent = "1"
snapshot4.disk0.fileName = "boot-000001.vmdk"
snapshot4.disk0.node = "scsi0:0"
snapshot4.disk1.fileName = "odd.vmdk"
snapshot9.displayName = "without a uid"
snapshot-1.uid = "3"
"""


def test_snapshots() -> None:
    clean, update = parse_snapshots(VMSD.encode(), "vm.vmsd")
    assert (clean.uid, clean.name) == ("1", "clean")
    assert clean.disks == (AttachedDisk("scsi0:0", "boot.vmdk"), AttachedDisk("scsi0:1", "data.vmdk"))
    assert (update.uid, update.name) == ("7", 'Vor dem "großen" Update')
    assert [disk.file for disk in update.disks] == ["boot-000001.vmdk", "odd.vmdk"]
    assert parse_snapshots(b"", "vm.vmsd") == []
    assert parse_snapshots(b'.encoding = "UTF-8"\nsnapshot.numSnapshots = "5"\n', "vm.vmsd") == []


WORDS = st.sampled_from(
    [
        *("scsi0:0", "ide1:1", ".fileName", ".present", ".deviceType", "=", '"TRUE"', '"a.vmdk"', "\n", "\r"),
        *("#", "|", '"', "\0", "é", "snapshot1", ".uid", ".disk0", " "),
    ]
)


@given(st.lists(WORDS).map("".join).map(str.encode) | st.binary(max_size=200))
def test_any_text_is_an_answer_or_an_error(raw: bytes) -> None:
    with contextlib.suppress(FormatError):
        values = parse_dictionary(raw, "x")
        assert all(key == key.lower() for key in values)
        assert [node_order(disk.node) for disk in disks_of(values)] == sorted(
            order for disk in disks_of(values) if (order := node_order(disk.node)) is not None
        )
        parse_snapshots(raw, "x")


TEXT = st.text(st.characters(exclude_categories=("C",), exclude_characters='"|\u2028\u2029\x85'), max_size=30)


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9.:]{0,10}", fullmatch=True), TEXT))
def test_what_is_written_is_read(values: dict[str, str]) -> None:
    text = "\n".join(f'{key.upper()} = "{value}"' for key, value in values.items())
    assert parse_dictionary(text.encode(), "x") == values
