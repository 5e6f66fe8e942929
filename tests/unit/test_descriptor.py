"""Descriptors: recognised, understood, kept byte for byte, edited, written."""

import json
import shutil
import string
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nbd_vmdk.errors import BadDescriptor, NotVmdk, Unsupported, VmdkError
from nbd_vmdk.ondisk.descriptor import (
    FRESH_CID,
    MAX_DESCRIPTOR,
    NO_PARENT,
    Descriptor,
    ExtentLine,
    build_descriptor,
    is_absolute,
    last_component,
    looks_like_descriptor,
    random_cid,
    windows_to_posix,
)

VMWARE = b"""\
# Disk DescriptorFile
version=1
encoding="windows-1252"
CID=8bb99479
parentCID=ffffffff
isNativeSnapshot="no"
createType="monolithicFlat"

# Extent description
RW 1048576 FLAT "Data-flat.vmdk" 0

# The Disk Data Base\x20
#DDB

ddb.virtualHWVersion = "9"
ddb.longContentID = "14867bce0a01ca27832895318bb99479"
ddb.uuid = "60 00 C2 9c 1e 8d 52 65-83 c7 fc 04 5d 06 19 fc"
ddb.adapterType = "ide"
"""

CTK = b"""\
# Disk DescriptorFile
version=3
encoding="UTF-8"
CID=fd71677b
parentCID=ffffffff
createType="vmfs"

# Extent description
RW 16 VMFS "vm-flat.vmdk"

# Change Tracking File
changeTrackPath="vm-ctk.vmdk"

# The Disk Data Base
#DDB

ddb.thinProvisioned = "1"
"""

CHILD = b"""\
# Disk DescriptorFile
version=1
CID=aab4db7
parentCID=9b5067f5
createType="monolithicSparse"
parentFileNameHint="..\\base\\b.vmdk"
# Extent description
RW 81923 SPARSE "child.vmdk"
"""

ENCRYPTED = b"""\
# Disk DescriptorFile
version=2
encoding="UTF-8"
encryption.keySafe = "vmware:key/list/(pair/(phrase/abc/pass2key=PBKDF2))"
YmFzZTY0IGxpbmU=/+ not a key nor an extent
encryption.data="c29tZXRoaW5n"
"""


def minimal(*lines: str, cid: str = "12345678") -> bytes:
    return "\n".join(["# Disk DescriptorFile", "version=1", f"CID={cid}", *lines, ""]).encode()


def parse(data: bytes) -> Descriptor:
    return Descriptor.parse(data, "x.vmdk")


def patched(data: bytes, patches: list[tuple[int, bytes]]) -> bytes:
    out = bytearray(data)
    for at, new in patches:
        out[at : at + len(new)] = new
    assert len(out) == len(data)
    return bytes(out)


# ---------------------------------------------------------------------------------------- recognition


@pytest.mark.parametrize(
    "data",
    [
        VMWARE,
        CTK,
        CHILD,
        ENCRYPTED,
        b"\xef\xbb\xbf" + VMWARE,
        VMWARE.replace(b"\n", b"\r\n"),
        VMWARE.replace(b"\n", b"\r"),
        VMWARE + bytes(5000),
        b"\n\n  \t\n" + VMWARE,
        b"#Disk Descriptor File\n",
        b"# Description file for a stream\nversion=1\nCID=1\n",
        b"version=1\n",
        b"version=1 and more\nother=2\n",
        b"VERSION = 1\nCreateType=x\n",
        b'rw 1 flat "x" 0',
        b"unknown=1\nCID=5\n",
        b'keyID=1\nversion=1\nencryptionKeys="vmware:key/fqid/a"\n',
        b"version=1\n" + b"filler=" * 4000,
        b"version=1\n" + b"x" * 9000,
    ],
)
def test_recognised(data: bytes) -> None:
    assert looks_like_descriptor(data)
    assert looks_like_descriptor(data[:8192])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 512,
        b"\0" + VMWARE,
        b"\n\n \n",
        b"# only a comment\n",
        b"\xeb<\x90mkfs.fat" + bytes(range(256)) * 20,
        bytes(range(255, 0, -1)) * 20,
        b"KDMV\x01\0\0\0",
        b"COWD\x01\0\0\0",
        "# Disk DescriptorFile\nversion=1\n".encode("utf-16"),
        b'\n\n<!DOCTYPE html>\n<html lang="en">\ncreateType="monolithicFlat"\nCID=1\nRW 1 FLAT "x" 0\n',
        b'<pre># Disk DescriptorFile\nversion=1\nRW 1 FLAT "x" 0\n',
        b'# This file is generated\nversion = 3\n\n[[package]]\nname = "a"\n',
        b'[project]\nversion = "1"\nCID=1\n',
        b"other=1\nversion=1\n",
        b'version="one"\n',
        b'.encoding = "UTF-8"\ndisplayName = "vm"\nencryption.keySafe = "vmware:key/list"\n',
        b'.encoding = "windows-1252"\nconfig.version = "8"\nscsi0:0.fileName = "disk.vmdk"\n',
        b"#!/bin/sh\nset -e\nCID=1\n",
    ],
)
def test_not_recognised(data: bytes) -> None:
    assert not looks_like_descriptor(data)
    with pytest.raises(NotVmdk):
        parse(data)


def test_text_that_is_too_long() -> None:
    parse(VMWARE.ljust(MAX_DESCRIPTOR, b" "))
    parse(VMWARE.ljust(MAX_DESCRIPTOR + 10, b"\0"))
    with pytest.raises(NotVmdk):
        parse(VMWARE.ljust(MAX_DESCRIPTOR + 1, b" "))
    with pytest.raises(BadDescriptor, match="so many lines"):
        parse(VMWARE + b"\n" * 65536)


# -------------------------------------------------------------------------------------------- reading


def test_vmware_text() -> None:
    made = parse(VMWARE)
    assert made.file == "x.vmdk"
    assert (made.version, made.cid, made.parent_cid, made.has_parent) == (1, 0x8BB99479, NO_PARENT, False)
    assert made.cid_digits == 8
    assert made.encoding == "cp1252"
    assert made.create_type == "monolithicFlat"
    assert made.parent_hint is None
    assert made.change_track_path is None
    assert not made.native_snapshot
    assert not made.encrypted
    assert made.extents == (ExtentLine("RW", 1048576, "FLAT", "Data-flat.vmdk", line=10),)
    assert made.total_sectors == 1048576
    assert made.long_content_id == "14867bce0a01ca27832895318bb99479"
    assert list(made.ddb) == ["ddb.virtualHWVersion", "ddb.longContentID", "ddb.uuid", "ddb.adapterType"]
    assert made.ddb["ddb.uuid"] == "60 00 C2 9c 1e 8d 52 65-83 c7 fc 04 5d 06 19 fc"
    assert made.get("CREATETYPE") == "monolithicFlat"
    assert made.get("DDB.adaptertype") == "ide"
    assert made.get("nothing") is None
    assert made.get("nothing", "x") == "x"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark(end: bytes, mark: bytes) -> None:
    data = mark + VMWARE.replace(b"\n", end)
    made, plain = parse(data), parse(VMWARE)
    assert made.to_bytes() == data
    assert made.extents == plain.extents
    assert made.ddb == plain.ddb
    assert made.cid == plain.cid


def test_what_follows_a_nul_is_nothing() -> None:
    made = parse(VMWARE + b"\0" + b'RW 5 FLAT "more" 0\n\xff\xfe')
    assert made.total_sectors == 1048576
    assert made.to_bytes() == VMWARE


def test_odd_spacing() -> None:
    text = (
        b"# Disk DescriptorFile\n\n  # a comment\nversion = 1\nCID\t=\tdeadbeef\nparentCID =ffffffff \n"
        b'createType = "monolithicFlat"  \n\n#RW 99 FLAT "no.bin" 0\n\tRW\t300\tFLAT\t"b c.bin"\t7   \n'
        b'noaccess 0 ZERO \nRdOnly  64   zero\n#DDB\nddb.adapterType=ide\nddb.comment=""\n\x1a'
    )
    made = parse(text)
    assert made.cid == 0xDEADBEEF
    assert made.create_type == "monolithicFlat"
    assert made.extents == (
        ExtentLine("RW", 300, "FLAT", "b c.bin", 7, line=10),
        ExtentLine("NOACCESS", 0, "ZERO", line=11),
        ExtentLine("RDONLY", 64, "ZERO", line=12),
    )
    assert made.total_sectors == 364
    assert made.ddb == {"ddb.adapterType": "ide", "ddb.comment": ""}
    assert made.to_bytes() == text


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ('RW 8 FLAT "a.bin"', ExtentLine("RW", 8, "FLAT", "a.bin")),
        ('RW 8 FLAT "a.bin" 007', ExtentLine("RW", 8, "FLAT", "a.bin", 7)),
        ('RW 8 vmfssparse "a b-delta.vmdk"', ExtentLine("RW", 8, "VMFSSPARSE", "a b-delta.vmdk")),
        ('RW 8 FLAT "k=v.bin" 0', ExtentLine("RW", 8, "FLAT", "k=v.bin")),
        ('RW 8 FLAT "#1.bin" 0', ExtentLine("RW", 8, "FLAT", "#1.bin")),
        ('RW 8 FLAT " "', ExtentLine("RW", 8, "FLAT", " ")),
        (
            r'RW 63 FLAT "\\.\PhysicalDrive1" 5 partitionUUID \\?\Volume{1}',
            ExtentLine("RW", 63, "FLAT", r"\\.\PhysicalDrive1", 5, ("partitionUUID", r"\\?\Volume{1}")),
        ),
        (
            'RW 63 FLAT "/dev/sdb" partitionUUID 12',
            ExtentLine("RW", 63, "FLAT", "/dev/sdb", 0, ("partitionUUID", "12")),
        ),
        ("RW 8 ZERO 0", ExtentLine("RW", 8, "ZERO", None, 0, ("0",))),
        ("NOACCESS 8 ZERO", ExtentLine("NOACCESS", 8, "ZERO")),
        (
            f'RW {2**54 - 2} SESPARSE "a" 1',
            ExtentLine("RW", 2**54 - 2, "SESPARSE", "a", 1),
        ),
    ],
)
def test_extent_line(line: str, want: ExtentLine) -> None:
    (extent,) = parse(minimal(line)).extents
    assert extent.line == 4
    assert ExtentLine(*[getattr(extent, name) for name in ExtentLine.__slots__[:-1]]) == want


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('WO 8 FLAT "a" 0', "'WO' is no known access"),
        ('R 8 FLAT "a" 0', "'R' is no known access"),
        ('RW 8 PLAT "a" 0', "'PLAT' is no known type"),
        ('RW 8 FLAT"a" 0', "no known type"),
        ("RW", "a size and a type"),
        ("RW 8", "a size and a type"),
        ("RW 8 FLAT", "file name in quotes"),
        ("RW 8 FLAT a.bin 0", "file name in quotes"),
        ('RW 8 FLAT ""', "file name in quotes"),
        ('RW 8 FLAT "a', "file name in quotes"),
        ('RW 8 FLAT "a"b" 0', "file name in quotes"),
        ('RW 8 FLAT "a" "b"', "no number of sectors"),
        ('RW 8 FLAT "a" 0x40', "no number of sectors"),
        ('RW 8 FLAT "a" -1', "no number of sectors"),
        ('RW 8 FLAT "a" junk', "no number of sectors"),
        ('RW -8 FLAT "a" 0', "no number of sectors"),
        ('RW +8 FLAT "a" 0', "no number of sectors"),
        ('RW 8.5 FLAT "a" 0', "no number of sectors"),
        ('RW 0x8 FLAT "a" 0', "no number of sectors"),
        ('RW ٣ FLAT "a" 0', "no number of sectors"),
        ("RW " + "9" * 5000 + ' FLAT "a" 0', "no number of sectors"),
        (f"RW {2**54} ZERO", "more than a file can hold"),
        (f'RW 1 FLAT "a" {2**54 - 1}', "more than a file can hold"),
        (f"RW {2**53} ZERO\nRW {2**53} ZERO", "together are more than"),
        ('"RW 8 FLAT a" 0', "neither a comment"),
        ("Disk DescriptorFile", "neither a comment"),
        ("<<<<<<< mine", "neither a comment"),
        ("= value", "neither a comment"),
        ("CID", "neither a comment"),
        ('parentFileNameHint="a"b"', "can't contain quotes"),
        ('changeTrackPath="a" "b"', "can't contain quotes"),
    ],
)
def test_line_that_cant_be_understood(line: str, why: str) -> None:
    with pytest.raises(BadDescriptor) as caught:
        parse(minimal(line))
    assert why in caught.value.message
    assert caught.value.fields["line"] == 4 + line.count("\n")
    assert caught.value.file == "x.vmdk"
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_every_known_word() -> None:
    kinds = ["FLAT", "SPARSE", "VMFS", "VMFSSPARSE", "SESPARSE", "VMFSRDM", "VMFSRAW", "VSANSPARSE"]
    lines = [f'{access} 1 {kind} "f"' for access in ("RW", "RDONLY", "NOACCESS") for kind in kinds]
    assert [f'{e.access} 1 {e.type} "f"' for e in parse(minimal(*lines)).extents] == lines


@pytest.mark.parametrize(
    ("value", "cid", "digits"),
    [
        ("acce287", 0xACCE287, 7),
        ("0", 0, 1),
        ("FFFFFFFF", NO_PARENT, 8),
        ('"00ab"', 0xAB, 4),
        ("000000001 ", 1, 9),
    ],
)
def test_content_id(value: str, cid: int, digits: int) -> None:
    made = parse(minimal("RW 1 ZERO", cid=value))
    assert (made.cid, made.cid_digits) == (cid, digits)


@pytest.mark.parametrize(
    "value", ["", "xyz", "123456789", "0x12", "-1", "12 34", "1_0", "ffffffffpa", "٣", '""']
)
@pytest.mark.parametrize("key", ["CID", "parentCID"])
def test_malformed_content_id(key: str, value: str) -> None:
    with pytest.raises(BadDescriptor, match="hex digits") as caught:
        parse(f"version=1\n{key}={value}\nRW 1 ZERO\n".encode())
    assert caught.value.fields["line"] == 2


def test_text_without_content_ids() -> None:
    made = parse(b'version=1\nRW 300 FLAT "b.bin" 0\n')
    assert (made.cid, made.cid_digits, made.parent_cid, made.has_parent) == (None, 0, None, False)
    assert made.long_content_id is None
    with pytest.raises(ValueError, match="0 digits"):
        made.cid_patches(1)


def test_text_that_says_nothing() -> None:
    for text in (b"# Disk DescriptorFile\n", b"version=1\nother=2\n"):
        with pytest.raises(BadDescriptor):
            parse(text)
    assert parse(b"version=1\nCID=1\n").extents == ()


@pytest.mark.parametrize(
    ("text", "version"),
    [("1", 1), ("1 ", 1), ("2", 2), ("3 or so", 3), ('"3"', 3), ("4", 4), ("01", 1)],
)
def test_version(text: str, version: int) -> None:
    assert parse(f"version={text}\nCID=1\n".encode()).version == version


def test_version_absent_or_impossible() -> None:
    assert parse(b"CID=1\n").version == 1
    for text in (b"", b"0", b"x", b"-1", b"9" * 5000):
        with pytest.raises(BadDescriptor, match="no version"):
            parse(b"CID=1\nversion=%b\n" % text)
    with pytest.raises(Unsupported, match="version 5"):
        parse(b"version=5\nCID=1\n")


def test_first_of_a_repeated_key_wins() -> None:
    made = parse(b'CID=1\ncid=zz\ncreateType="a"\nCREATETYPE="b"\n#DDB\nddb.x = "1"\nDDB.X = "2"\n')
    assert (made.cid, made.create_type, dict(made.ddb)) == (1, "a", {"ddb.x": "1"})


def test_values_with_quotes_and_more_behind_them() -> None:
    made = parse(b'CID=1\na="x" junk\nb="say "hi""\nc="open\nd=bare words\ne="\nf=\ng="one" "two"\n')
    assert [made.get(key) for key in "abcdefg"] == [
        "x",
        'say "hi"',
        "open",
        "bare words",
        "",
        "",
        'one" "two',
    ]


def test_odd_lines_below_the_disk_database_are_passed_over() -> None:
    made = parse(VMWARE + b'\xff\xfe junk without a NUL before it\nddb.late = "1"\n')
    assert made.ddb["ddb.late"] == "1"
    assert made.total_sectors == 1048576


def test_extent_below_the_disk_database_counts() -> None:
    assert parse(VMWARE + b"RW 7 ZERO\n").total_sectors == 1048576 + 7
    with pytest.raises(BadDescriptor):
        parse(VMWARE + b"RX 7 ZERO\n")


def test_second_descriptor_is_trailing_text() -> None:
    made = parse(VMWARE + VMWARE.replace(b"Data", b"Other") + b"junk\n")
    assert [extent.name for extent in made.extents] == ["Data-flat.vmdk"]
    changed = made.set("ddb.new", "1").set("other", "2")
    assert changed.get("ddb.new") == "1"
    assert changed.get("other") == "2"
    assert changed.to_bytes().endswith(VMWARE.replace(b"Data", b"Other") + b"junk\n")


def test_parents() -> None:
    made = parse(CHILD)
    assert (made.parent_cid, made.has_parent, made.parent_hint) == (0x9B5067F5, True, r"..\base\b.vmdk")
    assert parse(minimal("parentCID=00000000", 'parentFileNameHint=""')).has_parent
    assert parse(minimal("parentCID=00000000", 'parentFileNameHint=""')).parent_hint is None
    assert not parse(minimal("parentCID=FFFFFFFF")).has_parent


def test_change_tracking_and_native_snapshots() -> None:
    made = parse(CTK)
    assert (made.version, made.change_track_path, made.native_snapshot) == (3, "vm-ctk.vmdk", False)
    assert parse(minimal('isNativeSnapshot="yes"')).native_snapshot
    assert parse(minimal('ISNATIVESNAPSHOT="YES"')).native_snapshot


@pytest.mark.parametrize(
    "line",
    [
        'encryptionKeys="vmware:key/fqid/a"',
        "EncryptionKeys=x",
        'encryption.data = "x"',
        'keySafe="vmware:key"',
        "keyID=1",
        'ddb.encryption = "1"',
        'ddb.iofilters = "vmwarelwd,VMwarevmcrypt"',
    ],
)
def test_encrypted(line: str) -> None:
    assert parse(minimal(line)).encrypted


def test_encrypted_text_with_little_else() -> None:
    made = parse(ENCRYPTED)
    assert made.encrypted
    assert made.extents == ()
    assert made.cid is None


def test_not_encrypted() -> None:
    assert not parse(b"version=2\nCID=1\n").encrypted
    assert not parse(minimal('ddb.iofilters = "vmwarelwd"', 'ddb.toolsVersion = "1"')).encrypted


# ------------------------------------------------------------------------------------------ encodings


@pytest.mark.parametrize(
    ("label", "codec", "name"),
    [
        ("UTF-8", "utf-8", "Größe-日本"),
        ("utf8", "utf-8", "é"),
        ("windows-1252", "cp1252", "Größe €"),
        ("Windows-1250", "cp1250", "Łódź"),
        ("windows-1251", "cp1251", "диск"),
        ("ISO-8859-15", "iso8859_15", "€"),
        ("GBK", "gbk", "虚拟磁盘"),
        ("windows-936", "gbk", "磁"),
        ("GB18030", "gb18030", "磁ᠠ"),
        ("Big5", "cp950", "許功蓋"),  # second bytes that are backslashes
        ("Shift_JIS", "cp932", "表示ソ①"),
        ("EUC-JP", "euc_jp", "日本"),
        ("EUC-KR", "cp949", "디스크"),
        ("us-ascii", "ascii", "plain"),
    ],
)
@pytest.mark.parametrize("key", ["encoding", "ddb.encoding"])
def test_encoding(key: str, label: str, codec: str, name: str) -> None:
    text = f'CID=1\n{key} = "{label}"\nRW 1 FLAT "{name}.bin" 0\nparentCID=2\nparentFileNameHint="{name}"\n'
    made = parse(text.encode(codec))
    assert made.encoding == codec
    assert made.extents[0].name == f"{name}.bin"
    assert made.parent_hint == name
    assert made.to_bytes() == text.encode(codec)
    assert patched(made.to_bytes(), made.cid_patches(9)) == text.replace("CID=1", "CID=9", 1).encode(codec)


@pytest.mark.parametrize(
    "label", [None, "klingon", "rot13", "idna", "utf-16", "unicode_escape", "hex", "\xff", ""]
)
def test_without_an_encoding_that_is_known(label: str | None) -> None:
    head = "" if label is None else f'encoding="{label}"\n'
    assert parse(f'{head}CID=1\nRW 1 FLAT "Größe" 0\n'.encode()).extents[0].name == "Größe"
    made = parse(f'{head}CID=1\nRW 1 FLAT "Größe" 0\n'.encode("cp1252"))
    assert (made.encoding, made.extents[0].name) == ("cp1252", "Größe")


def test_text_that_is_not_in_the_encoding_it_names() -> None:
    made = parse('encoding="UTF-8"\nCID=1\nRW 1 FLAT "Größe" 0\n'.encode("cp1252"))
    assert (made.encoding, made.extents[0].name) == ("cp1252", "Größe")
    made = parse(b'encoding="Shift_JIS"\nCID=1\nRW 1 FLAT "\x81\xff" 0\n')
    assert (made.encoding, made.extents[0].name) == ("latin-1", "\x81\xff")


def test_byte_order_mark_beats_the_encoding_key() -> None:
    made = parse('encoding="windows-1252"\nCID=1\nRW 1 FLAT "Größe" 0\n'.encode("utf-8-sig"))
    assert (made.encoding, made.extents[0].name) == ("utf-8", "Größe")


def test_header_encoding_beats_the_disk_database() -> None:
    text = 'ddb.encoding = "GBK"\nencoding="windows-1252"\nCID=1\nRW 1 FLAT "Größe" 0\n'
    assert parse(text.encode("cp1252")).extents[0].name == "Größe"


# ------------------------------------------------------------------------------------ generated texts

OddText = tuple[bytes, int, list[ExtentLine], dict[str, str]]
BLANKS = st.text(" \t", max_size=3)
PLAIN = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters='"'), min_size=1, max_size=12
).filter(lambda text: text == text.strip())
KEYS = st.text(string.ascii_letters + string.digits + "._-:", min_size=1, max_size=10).filter(
    lambda key: (
        not key.lower().startswith((".", "ddb.", "encrypt", "keysafe", "keyid", "encoding"))
        and key.lower()
        not in {"cid", "parentcid", "version", "createtype", "parentfilenamehint", "changetrackpath"}
    )
)


@st.composite
def extents(draw: st.DrawFn) -> ExtentLine:
    kind = draw(st.sampled_from(["FLAT", "SPARSE", "ZERO", "VMFS", "VMFSSPARSE", "SESPARSE", "VMFSRDM"]))
    access = draw(st.sampled_from(["RW", "RDONLY", "NOACCESS"]))
    sectors = draw(st.integers(0, 1 << 40))
    if kind == "ZERO":
        return ExtentLine(access, sectors, kind)
    offset = draw(st.integers(0, 1 << 40))
    extras = draw(st.sampled_from([(), ("partitionUUID", "4-5-6")]))
    return ExtentLine(access, sectors, kind, draw(PLAIN), offset, extras)


@st.composite
def odd_texts(draw: st.DrawFn) -> OddText:
    """A descriptor as no product writes it, and what it says: content ID, extents, other keys."""
    cid = draw(st.integers(0, NO_PARENT))
    lines = [f"CID{draw(BLANKS)}={draw(BLANKS)}{cid:0{draw(st.integers(1, 8))}x}"]
    if draw(st.booleans()):
        lines.append(f'{draw(BLANKS)}parentCID=ffffffff{draw(BLANKS)}\ncreateType="custom"')
    wanted = draw(st.lists(extents(), max_size=4))
    for extent in wanted:
        words = [extent.access, str(extent.sectors), extent.type]
        if extent.name is not None:
            words += [f'"{extent.name}"', str(extent.offset_sectors), *extent.extras]
        if draw(st.booleans()):
            words[0] = words[0].lower()
        gap = draw(BLANKS) + " "
        lines.append(draw(BLANKS) + gap.join(words) + draw(BLANKS))
    others: dict[str, str] = {}
    for key, value in draw(st.dictionaries(KEYS, PLAIN, max_size=4)).items():
        name = key if draw(st.booleans()) else f"ddb.{key}"
        if name.lower() not in others:
            others[name.lower()] = value
            lines.append(f'{draw(BLANKS)}{name}{draw(BLANKS)}={draw(BLANKS)}"{value}"{draw(BLANKS)}')
    text = draw(st.sampled_from(["", "# Disk DescriptorFile\n"]))
    for line in lines:
        text += draw(st.sampled_from(["", "\n", "# remark\n", " \t\n", "#DDB\n"])) + line + "\n"
    if draw(st.booleans()):
        text = text.removesuffix("\n")
    raw = text.replace("\n", draw(st.sampled_from(["\n", "\r\n", "\r"]))).encode()
    raw = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + raw
    return raw, cid, wanted, others


def facts(made: Descriptor) -> list[ExtentLine]:
    return [ExtentLine(e.access, e.sectors, e.type, e.name, e.offset_sectors, e.extras) for e in made.extents]


@given(odd_texts())
def test_generated_text_is_understood_and_kept(
    odd: OddText,
) -> None:
    raw, cid, wanted, others = odd
    made = parse(raw + b"\0junk")
    assert made.to_bytes() == raw
    assert made.cid == cid
    assert facts(made) == wanted
    assert {key: made.get(key) for key in others} == others
    assert made.total_sectors == sum(extent.sectors for extent in wanted)


@given(odd_texts(), st.integers(0, NO_PARENT))
def test_content_id_changes_in_place(odd: OddText, new: int) -> None:
    raw, _, wanted, others = odd
    made = parse(raw)
    if len(f"{new:x}") > made.cid_digits:
        with pytest.raises(ValueError, match="does not fit"):
            made.cid_patches(new)
        new %= 16**made.cid_digits
    changed = parse(patched(raw, made.cid_patches(new)))
    assert changed.cid == new
    assert changed.cid_digits == made.cid_digits
    assert facts(changed) == wanted
    assert {key: changed.get(key) for key in others} == others


@given(odd_texts(), KEYS, PLAIN, st.booleans())
def test_setting_a_key_changes_nothing_else(odd: OddText, name: str, value: str, in_ddb: bool) -> None:
    raw, cid, wanted, others = odd
    key = f"ddb.{name}" if in_ddb else name
    changed = parse(raw).set(key, value)
    assert changed.get(key) == value
    assert changed.cid == cid
    assert facts(changed) == wanted
    assert {k: changed.get(k) for k in others} == others | (
        {key.lower(): value} if key.lower() in others else {}
    )
    again = changed.set(key, value)
    assert again.to_bytes() == changed.to_bytes()
    gone = again.remove(key)
    assert gone.get(key) is None
    assert facts(gone) == wanted


@given(odd_texts(), st.lists(extents(), min_size=1, max_size=4))
def test_other_extents(odd: OddText, new: list[ExtentLine]) -> None:
    raw, cid, _, others = odd
    changed = parse(raw).replace_extents(new)
    assert facts(changed) == new
    assert changed.cid == cid
    assert {key: changed.get(key) for key in others} == others


@given(odd_texts(), PLAIN)
def test_renaming_an_extent(odd: OddText, name: str) -> None:
    raw, _, wanted, _ = odd
    for index, extent in enumerate(wanted):
        if extent.name is None:
            with pytest.raises(ValueError, match="no file"):
                parse(raw).set_extent_name(index, name)
            continue
        changed = parse(raw).set_extent_name(index, name)
        assert changed.extents[index].name == name
        assert changed.set_extent_name(index, extent.name).to_bytes() == raw


@given(odd_texts(), st.sampled_from(["1", "3"]))
def test_change_tracking_goes_without_a_trace(odd: OddText, version: str) -> None:
    raw, cid, wanted, others = odd
    tracked = parse(raw).set("version", version).set("changeTrackPath", "x-ctk.vmdk")
    plain = tracked.without_ctk()
    assert plain.change_track_path is None
    assert plain.version == 1
    assert len(plain.to_bytes()) < len(tracked.to_bytes())
    assert (plain.cid, facts(plain)) == (cid, wanted)
    assert {key: plain.get(key) for key in others} == others


# -------------------------------------------------------------------------------------------- editing


def test_set_keeps_the_style_of_the_line() -> None:
    made = parse(b'CID = 1 \r\nx\t=\t"a" junk\r\ny=b\r\n#DDB\r\nddb.z="c"')
    changed = made.set("X", "A").set("Y", "B").set("ddb.z", "C").set("CID", "2")
    assert changed.to_bytes() == b'CID = 2 \r\nx\t=\t"A" junk\r\ny=B\r\n#DDB\r\nddb.z="C"'
    assert made.get("x") == "a"  # the old one is as it was


def test_set_puts_new_lines_where_they_belong() -> None:
    made = parse(VMWARE).set("parentFileNameHint", "b.vmdk").set("ddb.deletable", "true").to_bytes()
    assert b'createType="monolithicFlat"\nparentFileNameHint="b.vmdk"\n\n# Extent' in made
    assert made.endswith(b'ddb.adapterType = "ide"\nddb.deletable = "true"\n')
    assert parse(CTK).set("x", "1").to_bytes().index(b"x=") < CTK.index(b"# Extent")


def test_set_in_a_text_with_hardly_anything() -> None:
    made = parse(b"\xef\xbb\xbf# Disk DescriptorFile\r\nRW 1 ZERO").set("parentCID", "ffffffff")
    made = made.set("CID", "1").set("version", "1").set("ddb.a", "b").set("createType", "x")
    assert made.to_bytes() == (
        b'\xef\xbb\xbf# Disk DescriptorFile\r\nversion=1\r\nCID=1\r\nparentCID=ffffffff\r\ncreateType="x"\r\n'
        b'RW 1 ZERO\r\n\r\n# The Disk Data Base\r\n#DDB\r\n\r\nddb.a = "b"\r\n'
    )
    assert parse(b"RW 1 ZERO").set("a", "b").to_bytes() == b'a="b"\nRW 1 ZERO'
    assert parse(b"\xef\xbb\xbfRW 1 ZERO").set("a", "b").to_bytes() == b'\xef\xbb\xbfa="b"\nRW 1 ZERO'
    assert parse(b'CID=1\nddb.a="b"').set("ddb.c", "d").to_bytes() == b'CID=1\nddb.a="b"\nddb.c="d"\n'
    assert parse(b"CID=1\n#DDB").set("ddb.c", "d").to_bytes() == b'CID=1\n#DDB\nddb.c = "d"\n'


def test_set_mends_quotes() -> None:
    assert parse(b'CID=1\na="open\n').set("a", "x ").to_bytes() == b'CID=1\na="x "\n'
    assert parse(b"CID=1\na=b\n").set("a", " x").get("a") == " x"
    assert parse(b"CID=1\na=b\n").set("a", "").to_bytes() == b"CID=1\na=\n"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a", 'say "x"'),
        ("a", "two\nlines"),
        ("a", "nul\0"),
        ("", "x"),
        ("a b", "x"),
        ("a=b", "x"),
        ("#a", "x"),
        ('a"', "x"),
        ("encoding", "UTF-8"),
        ("ddb.ENCODING", "UTF-8"),
        ("a", "日本"),  # VMWARE is in windows-1252
    ],
)
def test_set_refuses_what_a_text_cant_hold(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(VMWARE).set(key, value)


def test_set_refuses_to_change_what_the_rest_means() -> None:
    made = parse(b'CID=1\na="\xfc"\n')
    assert made.encoding == "cp1252"
    with pytest.raises(ValueError, match="taken for utf-8"):
        made.set("a", "Ã¼")


def test_set_refuses_an_impossible_content_id() -> None:
    with pytest.raises(BadDescriptor):
        parse(VMWARE).set("CID", "hello")


def test_remove() -> None:
    made = parse(b"CID=1\nx=1\ny=2\nX=3\n")
    assert made.remove("X").to_bytes() == b"CID=1\ny=2\n"
    assert made.remove("absent") is made


def test_remove_leaves_no_blank_line_before_an_extent() -> None:
    assert parse(b"CID=1\n\n\nx=1\nRW 1 ZERO\n").remove("x").to_bytes() == b"CID=1\nRW 1 ZERO\n"
    assert parse(b"CID=1\n\nx=1\n\ny=2\n").remove("x").to_bytes() == b"CID=1\n\ny=2\n"


def test_without_change_tracking() -> None:
    made = parse(CTK)
    plain = made.without_ctk()
    want = CTK.replace(b"version=3", b"version=1").replace(
        b'# Change Tracking File\nchangeTrackPath="vm-ctk.vmdk"\n\n', b""
    )
    assert plain.to_bytes() == want
    assert plain.without_ctk().to_bytes() == want
    assert parse(VMWARE).without_ctk().to_bytes() == VMWARE


def test_replace_extents_where_there_were_none() -> None:
    text = b"# Disk DescriptorFile\nCID=1\n\n#DDB\n"
    made = parse(text).replace_extents([ExtentLine("RW", 8, "FLAT", "a", 0), ExtentLine("RW", 1, "ZERO")])
    assert made.to_bytes() == (
        b'# Disk DescriptorFile\nCID=1\n# Extent description\nRW 8 FLAT "a" 0\nRW 1 ZERO\n\n#DDB\n'
    )


@pytest.mark.parametrize(
    "extent",
    [
        ExtentLine("WO", 1, "ZERO"),
        ExtentLine("RW", 1, "PLAT", "a"),
        ExtentLine("RW", -1, "ZERO"),
        ExtentLine("RW", 2**54, "ZERO"),
        ExtentLine("RW", 1, "FLAT", "a", 2**54 - 1),
        ExtentLine("RW", 1, "FLAT", "a", -1),
        ExtentLine("RW", 1, "FLAT"),
        ExtentLine("RW", 1, "FLAT", ""),
        ExtentLine("RW", 1, "FLAT", 'a"b'),
        ExtentLine("RW", 1, "FLAT", "a\nb"),
        ExtentLine("RW", 1, "ZERO", "a"),
    ],
)
def test_extent_that_cant_be_written(extent: ExtentLine) -> None:
    with pytest.raises(ValueError, match=r"."):
        extent.to_text()


# ---------------------------------------------------------------------------------------- content IDs


def test_patches_of_content_id_and_long_content_id() -> None:
    made = parse(VMWARE)
    assert made.cid_patches(0x1F) == [
        (VMWARE.index(b"8bb99479"), b"0000001f"),
        (VMWARE.rindex(b"8bb99479"), b"0000001f"),
    ]
    marked = b"\xef\xbb\xbf" + VMWARE
    assert [at for at, _ in parse(marked).cid_patches(1)] == [at + 3 for at, _ in made.cid_patches(1)]
    changed = parse(patched(marked, parse(marked).cid_patches(0xDEADBEEF)))
    assert changed.cid == 0xDEADBEEF
    assert changed.long_content_id == "14867bce0a01ca2783289531deadbeef"


def test_patch_keeps_the_number_of_digits() -> None:
    made = parse(CHILD)
    assert made.cid_patches(5) == [(CHILD.index(b"aab4db7"), b"0000005")]
    for new in (0x10000000, -1, 1 << 32):
        with pytest.raises(ValueError, match="does not fit"):
            made.cid_patches(new)


def test_short_content_id_beside_a_long_one() -> None:
    data = VMWARE.replace(b"CID=8bb99479", b"CID=b")
    changed = parse(patched(data, parse(data).cid_patches(7)))
    assert changed.cid == 7
    assert changed.long_content_id == "14867bce0a01ca278328953100000007"


@pytest.mark.parametrize("long", ["", "8bb99479", "x" * 32])
def test_long_content_id_that_is_none_stays(long: str) -> None:
    data = VMWARE.replace(b"14867bce0a01ca27832895318bb99479", long.encode())
    assert len(parse(data).cid_patches(1)) == 1


@given(st.integers(1, 12))
def test_random_content_id(digits: int) -> None:
    first = random_cid(digits)
    second = random_cid(digits, avoid=first)
    assert first != second
    for cid in (first, second):
        assert 0 < cid < min(16**digits, FRESH_CID)


def test_random_content_id_needs_a_place() -> None:
    with pytest.raises(ValueError, match="digit"):
        random_cid(0)


# --------------------------------------------------------------------------------------------- writing


def test_built_text_to_the_letter() -> None:
    raw = build_descriptor(
        create_type="monolithicFlat",
        extents=[ExtentLine("RW", 300, "FLAT", "d-flat.vmdk"), ExtentLine("RW", 8, "ZERO")],
        cid=0xABC,
        parent_cid=0x12345678,
        parent_hint="../base.vmdk",
        ddb={"ddb.adapterType": "lsilogic", "ddb.comment": "", "ddb.longContentID": "0" * 29 + "abc"},
        encoding="UTF-8",
    )
    assert raw == (
        b'# Disk DescriptorFile\nversion=1\nencoding="UTF-8"\nCID=00000abc\nparentCID=12345678\n'
        b'createType="monolithicFlat"\nparentFileNameHint="../base.vmdk"\n\n# Extent description\n'
        b'RW 300 FLAT "d-flat.vmdk" 0\nRW 8 ZERO\n\n# The Disk Data Base\n#DDB\n\n'
        b'ddb.adapterType = "lsilogic"\nddb.comment = ""\nddb.longContentID = "%babc"\n' % (b"0" * 29)
    )


@given(
    st.lists(extents().filter(lambda extent: extent.sectors), min_size=1, max_size=5),
    st.integers(0, NO_PARENT - 1),
    st.one_of(st.none(), st.tuples(st.integers(0, NO_PARENT - 1), PLAIN)),
    st.dictionaries(KEYS.map("ddb.".__add__), PLAIN, max_size=5),
)
def test_built_text_reads_back(
    wanted: list[ExtentLine], cid: int, parent: tuple[int, str] | None, ddb: dict[str, str]
) -> None:
    assume(len({key.lower() for key in ddb}) == len(ddb))
    assume(not any(key.lower() == "ddb.longcontentid" for key in ddb))
    raw = build_descriptor(
        create_type="custom",
        extents=wanted,
        cid=cid,
        parent_cid=parent[0] if parent else NO_PARENT,
        parent_hint=parent[1] if parent else None,
        ddb=ddb,
    )
    made = parse(raw)
    assert looks_like_descriptor(raw)
    assert facts(made) == wanted
    assert (made.version, made.cid, made.cid_digits, made.create_type) == (1, cid, 8, "custom")
    assert made.has_parent == (parent is not None)
    assert made.parent_hint == (parent[1] if parent else None)
    assert made.ddb == ddb
    assert made.get("encoding") == (None if raw.isascii() else "UTF-8")
    lines = raw.split(b"\n")
    assert lines[-1] == b""
    for before, line in pairwise(lines):
        assert before or not line.startswith((b"RW", b"RDONLY", b"NOACCESS"))


def test_built_in_another_encoding() -> None:
    one = [ExtentLine("RW", 1, "FLAT", "Größe")]
    raw = build_descriptor(create_type="custom", extents=one, cid=1, encoding="windows-1252")
    assert "Größe".encode("cp1252") in raw
    assert parse(raw).extents[0].name == "Größe"
    with pytest.raises(ValueError, match="has no 'ö'"):
        build_descriptor(create_type="custom", extents=one, cid=1, encoding="Big5")
    with pytest.raises(ValueError, match="no encoding"):
        build_descriptor(create_type="custom", extents=one, cid=1, encoding="klingon")


@pytest.mark.parametrize(
    "wrong",
    [
        {"extents": []},
        {"extents": [ExtentLine("RW", 0, "ZERO")]},
        {"extents": [ExtentLine("RW", 2**53, "ZERO")] * 2},
        {"extents": [ExtentLine("RW", 1, "FLAT", 'a"b')]},
        {"cid": NO_PARENT},
        {"cid": -1},
        {"parent_cid": 5},
        {"parent_hint": "p.vmdk"},
        {"parent_cid": 1 << 32, "parent_hint": "p.vmdk"},
        {"parent_cid": 5, "parent_hint": ""},
        {"create_type": ""},
        {"create_type": "a\nb"},
        {"ddb": {"adapterType": "ide"}},
        {"ddb": {"ddb.a b": "x"}},
        {"ddb": {"ddb.a": 'x"'}},
        {"ddb": {"ddb.longContentID": "0" * 32}},
        {"ddb": {"ddb.a": "x" * 10240}, "embedded": True},
    ],
)
def test_what_cant_be_built(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {
        "create_type": "custom",
        "extents": [ExtentLine("RW", 1, "ZERO")],
        "cid": 1,
        "embedded": True,
    }
    assert build_descriptor(**right)
    with pytest.raises(ValueError, match=r"."):
        build_descriptor(**(right | wrong))


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
def test_qemu_opens_what_is_built(tmp_path: Path) -> None:
    with open(tmp_path / "d ü-flat.vmdk", "wb") as flat:
        flat.truncate(300 * 512)
    raw = build_descriptor(
        create_type="monolithicFlat",
        extents=[
            ExtentLine("RW", 200, "FLAT", "d ü-flat.vmdk"),
            ExtentLine("RW", 100, "FLAT", "d ü-flat.vmdk", 200),
        ],
        cid=0xC0FFEE,
        ddb={"ddb.adapterType": "lsilogic", "ddb.virtualHWVersion": "4"},
    )
    (tmp_path / "d.vmdk").write_bytes(raw)
    done = subprocess.run(
        ["qemu-img", "info", "--output=json", tmp_path / "d.vmdk"],
        capture_output=True,
        check=True,
        timeout=30,
    )
    info = json.loads(done.stdout)
    assert (info["format"], info["virtual-size"]) == ("vmdk", 300 * 512)
    details = info["format-specific"]["data"]
    assert (details["cid"], details["parent-cid"]) == (0xC0FFEE, NO_PARENT)
    assert [extent["virtual-size"] for extent in details["extents"]] == [200 * 512, 100 * 512]


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "posix", "last", "absolute"),
    [
        ("a.vmdk", "a.vmdk", "a.vmdk", False),
        ("sub/a b.vmdk", "sub/a b.vmdk", "a b.vmdk", False),
        (r"..\base\a.vmdk", "../base/a.vmdk", "a.vmdk", False),
        (r"C:\VMs\x\a.vmdk", "C:/VMs/x/a.vmdk", "a.vmdk", True),
        ("c:/VMs/a.vmdk", "c:/VMs/a.vmdk", "a.vmdk", True),
        ("C:a.vmdk", "C:a.vmdk", "a.vmdk", False),
        (r"\\server\share\a.vmdk", "//server/share/a.vmdk", "a.vmdk", True),
        (r"\\.\PhysicalDrive0", "//./PhysicalDrive0", "PhysicalDrive0", True),
        (r"\a.vmdk", "/a.vmdk", "a.vmdk", True),
        ("/vmfs/volumes/4c-1/vm/a.vmdk", "/vmfs/volumes/4c-1/vm/a.vmdk", "a.vmdk", True),
        ("/dev/sda", "/dev/sda", "sda", True),
        (r"mixed/a\b.vmdk", "mixed/a/b.vmdk", "b.vmdk", False),
        ("folder/", "folder/", "folder", False),
        ("/", "/", "", True),
        ("", "", "", False),
        ("C:\\", "C:/", "", True),
    ],
)
def test_names(name: str, posix: str, last: str, absolute: bool) -> None:
    assert windows_to_posix(name) == posix
    assert last_component(name) == last
    assert is_absolute(name) is absolute


# --------------------------------------------------------------------------------------------- hostile


def survive(data: bytes) -> None:
    try:
        made = parse(data)
    except VmdkError as error:
        if "\n" in str(error):
            raise AssertionError("a message of several lines") from error
        return
    assert looks_like_descriptor(data)
    assert made.to_bytes() == data.partition(b"\0")[0]
    assert made.total_sectors * 512 < 2**63
    if made.cid_digits:
        assert parse(patched(made.to_bytes(), made.cid_patches(0))).cid == 0
    assert facts(made.without_ctk()) == facts(made)


@given(st.binary(max_size=200))
def test_hostile_bytes(data: bytes) -> None:
    survive(data)
    survive(b"CID=1\n" + data)
    survive(VMWARE + data)


WORDS = ["RW", "rdonly", "8", "99999999999999999999", "FLAT", "ZERO", '"', '"a"', "=", "#", "CID=1", "GBK"]
BREAKS = [" ", "\t", "\n", "\r", "\v", "\x1a", "\x00", "\ufeff", "é", "表"]
STARTS = [
    "version=3",
    "parentCID",
    "ddb.x",
    "ddb.longContentID=",
    "encoding=",
    "changeTrackPath",
    "encryption",
]
TITLES = ["# Disk DescriptorFile", "# Change Tracking File", "#DDB"]
PIECES = st.sampled_from([*WORDS, *BREAKS, *STARTS, *TITLES])


@given(
    st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=40),
    st.sampled_from(["utf-8", "utf-16", "gb18030"]),
)
def test_hostile_text(pieces: list[str], codec: str) -> None:
    survive(("version=1\n" + "".join(pieces)).encode(codec, "replace"))
    survive("".join(pieces).encode(codec, "replace"))


@given(st.integers(0, len(VMWARE) - 1), st.integers(0, 255))
def test_one_wrong_byte(at: int, byte: int) -> None:
    survive(VMWARE[:at] + bytes([byte]) + VMWARE[at + 1 :])


LONG_LINES = [
    b" ",
    b"\t=",
    b'"',
    b"RW ",
    b"RW 1 ",
    b"a",
    b"a ",
    b"1",
    b"#",
    b"# ",
    b"# disk ",
    b'RW 1 FLAT "',
]
MANY_LINES = [b"\r\n", b"\n", b"a=\n", b"a=b\n#\n", b"RW 1 ZERO\n", b"CID=1\n", b'ddb.a="b"\n', b"<\n"]


@pytest.mark.parametrize("piece", LONG_LINES + MANY_LINES)
@pytest.mark.parametrize("head", [b"CID=1\n", b"CID=1\n#DDB\n", b""])
def test_no_text_takes_long(piece: bytes, head: bytes) -> None:
    times = 65000 if piece in MANY_LINES else MAX_DESCRIPTOR
    data = (head + piece * times)[:MAX_DESCRIPTOR]
    started = time.monotonic()
    try:
        parse(data)
    except VmdkError:
        pass
    assert time.monotonic() - started < 5
