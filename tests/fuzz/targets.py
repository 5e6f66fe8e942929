"""
What is fuzzed: each target takes bytes and returns, or raises because a rule was broken.

The rule of all of them: any input ends in a value, a disk or a VmdkError, within the bounds of limits.py.
Every other exception is a finding, an AssertionError (the engine's own or one made here) as well. Nothing
here needs atheris, so a finding is replayed by calling its target.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

from nbd_vmdk.codec import CorruptGrain, inflate
from nbd_vmdk.disk import Disk, Run, open_disk
from nbd_vmdk.errors import StorageError, VmdkError
from nbd_vmdk.extents.base import Extent, Kind
from nbd_vmdk.extents.flat import FlatExtent
from nbd_vmdk.extents.hosted import HostedExtent
from nbd_vmdk.extents.stream import StreamExtent
from nbd_vmdk.ondisk import cowd, hosted, sesparse, stream
from nbd_vmdk.ondisk.descriptor import (
    NO_PARENT,
    Descriptor,
    ExtentLine,
    build_descriptor,
    looks_like_descriptor,
)
from nbd_vmdk.ondisk.probe import FileKind, describe_other, identify
from nbd_vmdk.ops.info import image_info
from nbd_vmdk.ops.mapping import map_rows
from nbd_vmdk.storage.memory import MemoryStorage
from nbd_vmdk.storage.tar import is_tar, open_tar
from tests.fuzz import case
from tests.fuzz.limits import limited

SECTOR = 512
KIB = 1 << 10
#: Not more than this is read or written in one request, nor looked at of a disk's runs.
MOST = 256 * KIB
MAX_RUNS = 400

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

Plain = Callable[[bytes, int], bytes]


@dataclass(frozen=True)
class Target:
    """Something to fuzz. `mutate` changes an input in a way that keeps its form; `weight` shares out time."""

    name: str
    run: Callable[[bytes], None]
    max_len: int
    weight: int = 1
    mutate: Callable[[bytes, int, int, Plain], bytes] | None = None
    words: tuple[bytes, ...] = ()

    def __call__(self, data: bytes) -> None:
        """Run one input within bounds."""
        with limited():
            self.run(data)


def checked(error: VmdkError) -> None:
    """The promises of every error: one line, no trace of a file used after it was closed, fit for JSON."""
    for text in (str(error), error.message, error.hint or ""):
        assert not _CONTROL.search(text), f"control characters in {text!r}"
    assert not (isinstance(error, StorageError) and "Bad file descriptor" in str(error)), error
    json.dumps(error.as_dict())


@contextlib.contextmanager
def our_errors() -> Iterator[None]:
    """Take a VmdkError for an answer."""
    try:
        yield
    except VmdkError as error:
        checked(error)


# Pure parsers


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
    is_tar(data)
    archive = MemoryStorage(data, "fuzz.ova", writable=False)
    with our_errors():
        folder = open_tar(archive, "fuzz.ova")
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


# Whole images


def fuzz_image(data: bytes) -> None:
    """One file, whose bytes are the input."""
    with _folder() as folder:
        path = os.path.join(folder, "fuzz.vmdk")
        with open(path, "wb") as file:
            file.write(data)
        _open_every_way(path, data)


def fuzz_files(data: bytes) -> None:
    """Several files (case.py), the first of which is opened."""
    files = case.decode(data)
    with _folder() as folder:
        paths = [file.write(folder) for file in files]
        if paths and paths[0] is not None:
            _open_every_way(paths[0], data)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    # In memory where that is possible: what is fuzzed are the bytes, not the disk below.
    base = os.environ.get("NBD_VMDK_FUZZ_DIR") or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    folder = tempfile.mkdtemp(prefix="nbd-vmdk-fuzz-", dir=base)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _open_every_way(path: str, data: bytes) -> None:
    rng = random.Random(data)
    json.dumps(image_info(path))
    plain = _visit(path, rng)
    # A way is only taken where it can lead elsewhere than the plain one.
    if not plain:
        _visit(path, rng, salvage=True, ignore_cid=True)
    elif StreamExtent in plain:
        _visit(path, rng, salvage=True)
    if plain & {FlatExtent, HostedExtent}:
        careful = rng.random() < 0.2
        _visit(
            path, rng, writable=True, ignore_cid=not careful, drop_ctk=not careful, write_parent=not careful
        )
        with our_errors():  # what was written there may have damaged it, if two places were one
            open_disk(path, ignore_cid=True).close()


def _visit(path: str, rng: random.Random, **options: Any) -> set[type[Extent]]:
    """Open an image, use it, close it; the kinds of extent that it has, none if it was refused."""
    with our_errors():
        disk = open_disk(path, **options)
        try:
            assert disk.size > 0
            assert all(isinstance(warning, str) for warning in disk.warnings)
            _read(disk, rng)
            if disk.writable:
                _write(disk, rng)
        finally:
            with our_errors():
                disk.close()
        return {type(entry.extent) for link in disk.links for entry in link.extents}
    return set()


def _read(disk: Disk, rng: random.Random) -> None:
    runs = _runs(disk)
    for run in [*runs[:20], *rng.sample(runs, min(len(runs), 10))]:
        _check_run(disk, run)
    for offset, length in _places(disk, runs, rng):
        with our_errors():
            found = disk.pread(length, offset)
            assert len(found) == length
            assert disk.pread(length, offset) == found, "the same place reads differently"
            half = length // 2
            assert disk.pread(half, offset) + disk.pread(length - half, offset + half) == found
    with our_errors():
        disk.cache(min(disk.size, MOST), 0)
    with our_errors():
        json.dumps(list(islice(map_rows(disk), 20)))


def _runs(disk: Disk) -> list[Run]:
    """The first runs, which must follow each other; fewer if one of them can't be told."""
    runs: list[Run] = []
    with our_errors():
        runs.extend(islice(disk.runs(), MAX_RUNS))
        assert runs[0].offset == 0
        if len(runs) < MAX_RUNS:
            assert runs[-1].offset + runs[-1].length == disk.size, "the runs end before the disk"
    for one, two in pairwise(runs):
        assert one.length > 0
        assert one.offset + one.length == two.offset, f"{one} is not followed by {two}"
    return runs


def _check_run(disk: Disk, run: Run) -> None:
    """What a run says is what a read gives."""
    length = min(run.length, 4 * KIB)
    for offset in {run.offset, run.offset + run.length - length}:
        with our_errors():
            found = disk.pread(length, offset)
            if run.kind in (Kind.HOLE, Kind.ZERO):
                assert not any(found), f"{run} reads as data"
            assert run.kind is not Kind.LOST, f"{run} can be read"
            if run.kind is Kind.DATA and run.at is not None and run.file is not None:
                _check_data(run, offset, found)


def _check_data(run: Run, offset: int, found: bytes) -> None:
    with contextlib.suppress(OSError), open(run.file or "", "rb") as file:  # no file: it is in an archive
        assert run.at is not None
        file.seek(run.at + offset - run.offset)
        assert file.read(len(found)) == found, f"{run} reads as something else"


def _places(disk: Disk, runs: list[Run], rng: random.Random) -> list[tuple[int, int]]:
    """(offset, length) where reading may go wrong: both ends, and around edges of runs, grains and tables."""
    edges = [0, disk.size, rng.randrange(disk.size)]
    edges += [run.offset for run in [*runs[:6], *rng.sample(runs, min(len(runs), 4))]]
    entries = disk.links[0].extents
    edges += [entry.start for entry in entries[:4]]
    for entry in entries[:3]:
        edges += [entry.start + entry.extent.grain * count for count in (1, 128, 512, 4096)]
    places = []
    for edge in edges:
        start = max(0, edge - rng.choice((0, 1, SECTOR, 4 * KIB)))
        length = min(rng.choice((1, SECTOR, 4 * KIB, 70 * KIB)), disk.size - start)
        if length > 0:
            places.append((start, length))
    return places


def _write(disk: Disk, rng: random.Random) -> None:
    for offset, length in _places(disk, _runs(disk), rng)[:12]:
        match rng.randrange(8):
            case 0:
                with our_errors():
                    disk.trim(length, offset)
            case 1:
                with our_errors():
                    disk.zero(length, offset, may_trim=rng.random() < 0.5, fast=rng.random() < 0.3)
                    if length <= SECTOR:
                        assert not any(disk.pread(length, offset)), "zeroes read as data"
            case 2:
                with our_errors():
                    disk.pwrite(rng.randbytes(length), offset, fua=rng.random() < 0.3)
            case 3:
                with our_errors():
                    disk.flush()
            case _:
                _write_sector(disk, offset // SECTOR * SECTOR, rng)
    with our_errors():
        disk.flush()


def _write_sector(disk: Disk, offset: int, rng: random.Random) -> None:
    """One sector lies in one place, so it reads as written even where a damaged image has places twice."""
    new = rng.randbytes(min(SECTOR, disk.size - offset))
    with our_errors():
        disk.pwrite(new, offset)
        assert disk.pread(len(new), offset) == new, f"what was written at {offset} is not there"


_DESCRIPTOR_WORDS = tuple(word.encode() for word in case.WORDS)
_IMAGE_WORDS = (
    b"KDMV",
    b"COWD",
    b"\xbe\xba\xfe\xca\0\0\0\0",
    b"# Disk DescriptorFile\n",
    b"ustar",
    b"\xff" * 8,
)


def mutate_descriptor(data: bytes, max_size: int, seed: int, plain: Plain) -> bytes:
    """By lines and words, or as the fuzzer likes."""
    rng = random.Random(seed)
    if not data or rng.random() < 0.5:
        return plain(data, max_size)
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = case.change_text(rng, data)
    return data[:max_size]


TARGETS = {
    target.name: target
    for target in (
        Target("descriptor", fuzz_descriptor, 16 * KIB, 2, mutate_descriptor, _DESCRIPTOR_WORDS),
        Target("header", fuzz_header, 8 * KIB, 1, None, _IMAGE_WORDS),
        Target("stream", fuzz_stream, 16 * KIB),
        Target("tar", fuzz_tar, 64 * KIB, 1, mutate_tar),
        Target("image", fuzz_image, 64 * KIB, 3, None, _IMAGE_WORDS + _DESCRIPTOR_WORDS),
        Target("files", fuzz_files, 64 * KIB, 4, case.mutate),
    )
}

# What the engine logs of odd images would drown what is found.
logging.getLogger("nbd_vmdk").addHandler(logging.NullHandler())
logging.getLogger("nbd_vmdk").propagate = False
