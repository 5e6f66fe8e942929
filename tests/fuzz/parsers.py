"""
The parsers, which take bytes and open no file; and changes to an input that keep its form.
"""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Callable
from dataclasses import replace

from nbd_vmdk.codec import CorruptGrain, inflate
from nbd_vmdk.ondisk import cowd, hosted, sesparse, stream
from nbd_vmdk.ondisk.descriptor import (
    NO_PARENT,
    Descriptor,
    ExtentLine,
    build_descriptor,
    looks_like_descriptor,
)
from nbd_vmdk.ondisk.probe import FileKind, describe_other, identify
from nbd_vmdk.storage.tar import TarFolder, list_members
from tests.fuzz import case
from tests.fuzz.answers import our_errors
from tests.memory import MemoryStorage

SECTOR = 512
KIB = 1 << 10

#: The fuzzer's own way to change bytes, to at most so many.
Plain = Callable[[bytes, int], bytes]


def fuzz_descriptor(data: bytes) -> None:
    """Descriptors: parsing, what is said about them, and every way to change them."""
    looks_like_descriptor(data)
    with our_errors():
        found = Descriptor.parse(data, "fuzz")
        raw = found.to_bytes()
        assert raw == data.partition(b"\0")[0]
        _same(found, Descriptor.parse(raw, "fuzz"))
        assert found.total_sectors == sum(line.sectors for line in found.extents)
        assert found.has_parent == (found.parent_cid not in (None, NO_PARENT))
        _ = found.create_type, found.parent_hint, found.change_track_path, found.native_snapshot
        _ = found.encrypted, found.long_content_id, found.get("ddb.uuid")
        for line in found.extents:
            with contextlib.suppress(ValueError):  # read tolerantly, written strictly
                again = ExtentLine.parse(line.to_text(), line.line)
                assert replace(again, extras=()) == replace(line, extras=())
        if found.cid_digits:
            _patch_cid(found, data)
        rng = random.Random(data)
        rng.choice((_set_key, _set_key, _set_extents, _untrack, _rebuild))(found, rng)


def _same(one: Descriptor, two: Descriptor) -> None:
    for name in ("encoding", "version", "cid", "parent_cid", "extents"):
        assert getattr(one, name) == getattr(two, name), name
    assert dict(one.ddb) == dict(two.ddb)


def _lines(found: Descriptor) -> list[ExtentLine]:
    """The extent lines, wherever they are in the text."""
    return [replace(line, line=0) for line in found.extents]


def _patch_cid(found: Descriptor, data: bytes) -> None:
    new = random.Random(data).randrange(1, 1 << 4 * min(found.cid_digits, 8))
    patched = bytearray(data)
    for at, digits in found.cid_patches(new):
        patched[at : at + len(digits)] = digits
    assert len(patched) == len(data)
    again = Descriptor.parse(bytes(patched), "fuzz")
    assert again.cid == new
    assert again.extents == found.extents
    assert again.parent_cid == found.parent_cid


# Each edit gives a descriptor that says so, or a ValueError, or one of our errors.


def _set_key(found: Descriptor, rng: random.Random) -> None:
    key, value = rng.choice(
        (
            ("CID", "1234abcd"),
            ("parentCID", "ffffffff"),
            ("parentFileNameHint", "new base.vmdk"),
            ("ddb.adapterType", "ide"),
            ("ddb.new", "1"),
        )
    )
    with contextlib.suppress(ValueError), our_errors():
        changed = found.set(key, value)
        assert changed.get(key) == value, key
        assert _lines(changed) == _lines(found)
        assert changed.remove(key).get(key) is None


def _set_extents(found: Descriptor, rng: random.Random) -> None:
    for index, line in enumerate(found.extents[:3]):
        if line.name is not None:
            with contextlib.suppress(ValueError), our_errors():
                assert found.set_extent_name(index, "other.vmdk").extents[index].name == "other.vmdk"
    with contextlib.suppress(ValueError), our_errors():
        assert len(found.replace_extents(found.extents[:1]).extents) == len(found.extents[:1])


def _untrack(found: Descriptor, rng: random.Random) -> None:
    with contextlib.suppress(ValueError), our_errors():
        untracked = found.without_ctk()
        assert untracked.change_track_path is None
        assert len(untracked.to_bytes()) <= len(found.to_bytes())
        assert [line.sectors for line in untracked.extents] == [line.sectors for line in found.extents]


def _rebuild(found: Descriptor, rng: random.Random) -> None:
    with contextlib.suppress(ValueError), our_errors():
        built = build_descriptor(
            create_type=found.create_type or "custom",
            extents=found.extents,
            cid=found.cid or 0,
            parent_cid=NO_PARENT if found.parent_cid is None else found.parent_cid,
            parent_hint=found.parent_hint if found.has_parent else None,
            ddb=found.ddb,
        )
        again = Descriptor.parse(built, "fuzz")
        assert again.cid == (found.cid or 0)
        assert [line.name for line in again.extents] == [line.name for line in found.extents]
        assert again.total_sectors == found.total_sectors


def fuzz_header(data: bytes) -> None:
    """Headers of the sparse kinds, table entries of seSparse, and probing."""
    assert (identify(data) is FileKind.EMPTY) == (not data)
    what, hint = describe_other(data)
    assert what
    assert hint is None or hint
    with our_errors():
        header = hosted.parse_header(data, "fuzz")
        assert identify(data) is FileKind.HOSTED
        assert hosted.parse_header(header.to_bytes(), "fuzz") == header
        # 0 leaves no table; whatever is asked for is bounded.
        assert header.directory_entries * 4 <= 128 << 20
        hosted.check_directory(header, 1 << 40, "fuzz")
    with our_errors():
        header_cowd = cowd.parse_header(data, "fuzz")
        assert identify(data) is FileKind.COWD
        assert header_cowd.directory_entries <= 1 << 20
    with our_errors():
        header_se = sesparse.parse_header(data, "fuzz")
        assert identify(data) is FileKind.SESPARSE
        assert header_se.directory_entries <= header_se.directory.length // 8
        for at in range(0, min(len(data) - 8, 2048), 8):
            entry = int.from_bytes(data[at : at + 8], "little")
            with our_errors():
                index = sesparse.table_index(entry, header_se, "fuzz")
                assert index is None or index * 32768 < header_se.tables.length
            with our_errors():
                place = sesparse.grain_at(entry, header_se, "fuzz")
                assert 0 <= place - header_se.grains.at < header_se.grains.length
        sesparse.check_volatile(data[-512:].ljust(512, b"\0"), "fuzz")


def fuzz_stream(data: bytes) -> None:
    """Records and footers of streams, and inflating, where both libraries must agree."""
    at = stream.footer_header_offset(data)
    assert at is None or data[at : at + 4] == b"KDMV"
    header = hosted.HostedHeader(capacity_sectors=1 << 20, grain_sectors=16, flags=0x30001, compression=1)
    with our_errors():
        header = hosted.parse_header(data[at or 0 :], "fuzz")
    at = 0
    for _ in range(1000):
        record = stream.parse_record(data[at : at + SECTOR], header)
        if record is None:
            break
        assert record.length >= SECTOR
        assert record.length % SECTOR == 0
        if isinstance(record, stream.GrainRecord):
            assert 0 < record.size <= 2 * header.grain
            _inflate(data[at + 12 : at + 12 + record.size], 8 * KIB)
        at += record.length
    _inflate(data, 64)
    _inflate(data, 64 * KIB)


def _inflate(packed: bytes, size: int) -> None:
    decoder = zlib.decompressobj()
    wanted: bytes | None
    try:
        wanted = decoder.decompress(packed, size + 1)
    except zlib.error:
        wanted = None
    if wanted is not None and (not decoder.eof or len(wanted) > size):
        wanted = None
    try:
        found = inflate(packed, size)
    except CorruptGrain:
        assert wanted is None, "zlib inflates what was refused"
        return
    assert len(found) <= size
    if wanted is not None:
        assert bytes(found) == wanted


def fuzz_tar(data: bytes) -> None:
    """Archives."""
    archive = MemoryStorage(data, "fuzz.ova", writable=False)
    with our_errors():
        folder = TarFolder(lambda: archive, "fuzz.ova", list_members(archive, "fuzz.ova"))
        for member in folder.members:
            assert 0 <= member.offset <= member.offset + member.size <= len(data)
            assert ".." not in member.name.split("/")
            assert not member.name.startswith("/")
        names = folder.names()
        for name in names[:50]:
            window = folder.open(name)
            assert window.size >= 0
            window.read(0, window.size)
            with our_errors():
                folder.folder_of(name).names()
        for odd in ("", "/", "..", "a/../../b", "/etc/passwd", "."):
            with our_errors():
                folder.open(odd)


def mutate_tar(data: bytes, max_size: int, seed: int, plain: Plain) -> bytes:
    """Change an archive and make its checksums right again, or nothing behind them is ever reached."""
    changed = bytearray(plain(data, max_size))
    rng = random.Random(seed)
    if changed and rng.random() < 0.3:  # a field of a header, where it is
        at = rng.randrange(len(changed)) // SECTOR * SECTOR + rng.choice(
            (0, 124, 135, 156, 157, 257, 263, 345)
        )
        changed[at : at + 1] = bytes([rng.choice((*b"\0\x80\xff 017LKxgSVD56", rng.randrange(256)))])
    for at in range(0, len(changed) - SECTOR + 1, SECTOR):
        if changed[at + 257 : at + 262] == b"ustar":
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + SECTOR])
    return bytes(changed[:max_size])


def mutate_descriptor(data: bytes, max_size: int, seed: int, plain: Plain) -> bytes:
    """By lines and words, or as the fuzzer likes."""
    rng = random.Random(seed)
    if not data or rng.random() < 0.5:
        return plain(data, max_size)
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = case.change_text(rng, data)
    return data[:max_size]
