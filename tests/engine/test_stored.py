"""
Grains of stored blocks: a layout is right or there is none, and what is read by it is what zlib gives.
"""

from __future__ import annotations

import os
import random
import struct
import threading
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deflate
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from isal import igzip_lib, isal_zlib

from nbd_vmdk import Disk, open_disk
from nbd_vmdk.codec import CorruptGrain, inflate
from nbd_vmdk.errors import Truncated, Unreadable, VmdkError
from nbd_vmdk.extents import stream as reading
from nbd_vmdk.extents.stored import layout_of, read_stored, span
from tests.engine import same
from tests.images import cut, desc, poke, stream
from tests.images.content import KIB, MIB, Content
from tests.images.desc import Image
from tests.memory import MemoryStorage

GRAIN = 64 * KIB
#: A cache in which the bytes of three grains are kept, and some hundred layouts.
SMALL = 8 * GRAIN
NOISE = Content.of(random.Random(1).randbytes(40 * GRAIN))
SEARCH = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def block(data: bytes, *, last: bool, junk: int = 0) -> bytes:
    """A stored block; ``junk`` goes into the five bits that mean nothing."""
    return struct.pack("<BHH", last | junk << 3, len(data), len(data) ^ 0xFFFF) + data


def wrapped(blocks: bytes, plain: bytes, prefix: bytes = b"\x78\x01") -> bytes:
    return prefix + blocks + struct.pack(">I", zlib.adler32(plain))


def read_by(layout: array[int], file: bytes, within: int, length: int) -> bytes:
    buf = bytearray(length)
    read_stored(MemoryStorage(file), layout, memoryview(buf), within)
    return bytes(buf)


def check(packed: bytes, plain: bytes, place: int, ranges: list[tuple[float, float]]) -> bool:
    """Whether a sound stream has a layout; if it has, any part that is read by it is the plain bytes'."""
    assert zlib.decompress(packed) == plain
    layout = layout_of(memoryview(packed), place, len(plain))
    if layout is None:
        return False
    file = random.Random(place).randbytes(place) + packed + b"behind"
    assert read_by(layout, file, 0, len(plain)) == plain
    for one, two in ranges:
        begin, end = sorted((int(one * len(plain)), int(two * len(plain))))
        if begin < end:
            assert read_by(layout, file, begin, end - begin) == plain[begin:end]
    assert layout[0] + span(layout) <= place + len(packed)
    return True


RANGES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=8)
PLACES = st.integers(0, 2000)


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Noise, text, or some of both."""
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    size = draw(st.sampled_from([512, 4096, GRAIN, GRAIN, GRAIN, 2 * GRAIN]))
    text = draw(st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.3, 1.0]))
    begin = int(draw(st.floats(0, 1)) * (1 - text) * size)
    data = bytearray(rng.randbytes(size))
    data[begin : begin + int(text * size)] = (b"text" * size)[: int(text * size)]
    return bytes(data)


@SEARCH
@given(
    contents(), st.integers(0, 9), st.integers(0, 4), st.integers(1, 9), st.integers(9, 15), PLACES, RANGES
)
def test_zlib(
    plain: bytes, level: int, strategy: int, memory: int, window: int, place: int, ranges: list[Any]
) -> None:
    packer = zlib.compressobj(level, zlib.DEFLATED, window, memory, strategy)
    check(packer.compress(plain) + packer.flush(), plain, place, ranges)


@SEARCH
@given(contents(), st.data(), PLACES, RANGES)
def test_flushed_streams(plain: bytes, data: st.DataObject, place: int, ranges: list[Any]) -> None:
    """What a writer flushes on its way ends in an empty block."""
    packer = zlib.compressobj(data.draw(st.integers(0, 9)))
    packed, at = b"", 0
    while at < len(plain):
        step = data.draw(st.integers(1, len(plain)))
        packed += packer.compress(plain[at : at + step])
        packed += packer.flush(data.draw(st.sampled_from([zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH])))
        at += step
    check(packed + packer.flush(), plain, place, ranges)


@SEARCH
@given(contents(), st.integers(1, 12), st.integers(0, 3), PLACES, RANGES)
def test_libdeflate_and_isal(plain: bytes, level: int, quick: int, place: int, ranges: list[Any]) -> None:
    check(bytes(deflate.zlib_compress(plain, level)), plain, place, ranges)
    check(isal_zlib.compress(plain, quick), plain, place, ranges)
    check(igzip_lib.compress(plain, quick, flag=igzip_lib.COMP_ZLIB), plain, place, ranges)


@SEARCH
@given(st.data(), PLACES, RANGES)
def test_blocks_by_hand(data: st.DataObject, place: int, ranges: list[Any]) -> None:
    """Blocks of any length, empty ones too, with anything in the bits without meaning; others among them."""
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    lengths = data.draw(st.lists(st.sampled_from([0, 0, 1, 2, 100, 4096, 65535]), min_size=1, max_size=40))
    fixed = data.draw(st.sampled_from([None, None, rng.randrange(len(lengths))]))
    packed, plain = b"", b""
    for number, length in enumerate(lengths):
        piece = rng.randbytes(length)
        if number == fixed:
            piece = b"squeezed" * 50
            # zlib's own stream of a fixed block, which a flush ends at a byte with an empty stored one.
            packer = zlib.compressobj(6, zlib.DEFLATED, -15, 8, zlib.Z_FIXED)
            packed += packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH)
        else:
            packed += block(piece, last=False, junk=rng.randrange(32))
        plain += piece
    tail = rng.randbytes(10)
    packed += block(tail, last=True)
    plain += tail
    found = check(wrapped(packed, plain), plain, place, ranges)
    assert found == (fixed is None and len(lengths) < 32)


@pytest.mark.parametrize("make", [zlib.compress, deflate.zlib_compress, isal_zlib.compress])
def test_noise_has_a_layout(make: Any) -> None:
    """Of what all libraries make of noise; without this the feature could be gone, and no test would fail."""
    plain = random.Random(2).randbytes(GRAIN)
    assert check(bytes(make(plain)), plain, 1234, [(0.2, 0.9)])


@SEARCH
@given(st.data())
def test_garbage_has_no_wrong_layout(data: st.DataObject) -> None:
    """Bytes changed, cut off, inserted: what still inflates and has a layout is read as it inflates."""
    plain = random.Random(3).randbytes(2000)
    packed = bytearray(data.draw(st.sampled_from([zlib.compress(plain), zlib.compress(plain, 0)])))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(packed) - 1) | st.integers(0, min(12, len(packed) - 1)))
        match data.draw(st.sampled_from(["change", "cut", "insert"])):
            case "change":
                packed[at] = data.draw(st.integers(0, 255))
            case "cut":
                del packed[at:]
            case "insert":
                packed[at:at] = bytes([data.draw(st.integers(0, 255))])
        if not packed:
            return
    layout = layout_of(bytes(packed), 0, len(plain))
    try:
        shown = bytes(inflate(bytes(packed), len(plain)))
    except CorruptGrain:
        return
    if layout is not None:
        assert read_by(layout, bytes(packed), 0, len(plain)) == shown


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\x78",
        b"\x78\x01" + block(b"x" * 100, last=False),
        wrapped(block(b"x" * 99, last=True), b""),
        wrapped(block(b"x" * 101, last=True), b""),
        wrapped(block(b"x" * 100, last=True), b"", b"\x78\x20"),  # a dictionary
        wrapped(block(b"x" * 100, last=True), b"", b"\x78\x02"),  # not divisible by 31
        wrapped(block(b"x" * 100, last=True), b"", b"\x79\x00"),  # another method
        wrapped(struct.pack("<BHH", 1, 100, 100) + b"x" * 100, b""),
        # Another kind of block whose first bytes look like a length and its complement.
        wrapped(block(b"x" * 60, last=False) + b"\x03" + block(b"x" * 40, last=True)[1:], b""),
        wrapped(block(b"x" * 60, last=False) + b"\x05" + block(b"x" * 40, last=True)[1:], b""),
    ],
)
def test_odd_streams_have_none(packed: bytes) -> None:
    assert layout_of(packed, 0, 100) is None


# Disks.


def made(folder: Path, content: Content = NOISE, **options: Any) -> Image:
    return desc.stream_optimized(str(folder), "disk", content, **options)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of grains that have been inflated since."""
    calls: list[int] = []

    def counting(data: Any, size: int) -> Any:
        calls.append(len(data))
        return inflate(data, size)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "inflate", counting)
        yield calls


def read_all(disk: Disk, content: Content, step: int, seed: int = 1) -> None:
    places = list(range(0, content.size, step))
    random.Random(seed).shuffle(places)
    for at in places:
        length = min(step, content.size - at)
        same(disk.pread(length, at), content.read(at, length))


def entries(disk: Disk) -> dict[int, Any]:
    """What the cache has of the grains, by index."""
    part = disk.links[0].extents[0].extent._inflater._grains
    return {**part.old, **part.young}


@pytest.mark.parametrize("level", [0, 1, 6, 9])
@pytest.mark.parametrize("layout", ["A", "B", "C", "mixed"])
@pytest.mark.parametrize("step", [512, 4 * KIB + 512, GRAIN])
def test_stored_grains_are_inflated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, level: int, step: int
) -> None:
    """More than the cache could hold; but for the first ones, which are kept as bytes until they go."""
    content = NOISE.resized(10 * GRAIN) if step == 512 else NOISE
    image = made(tmp_path, content, layout=layout, level=level)
    with open_disk(image.path, cache_size=SMALL) as disk, counted(monkeypatch) as calls:
        read_all(disk, content, step)
        read_all(disk, content, step, 2)
        read_all(disk, content, 3 * GRAIN + 1024, 3)
        assert len(calls) <= content.size // GRAIN + 3
        held = entries(disk)
        assert sum(isinstance(value, array) for value in held.values()) >= content.size // GRAIN - 3


def test_what_fits_is_kept_as_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_disk(made(tmp_path).path) as disk, counted(monkeypatch) as calls:
        read_all(disk, NOISE, 4 * KIB)
        assert len(calls) == 40
        assert all(isinstance(value, bytes | bytearray) for value in entries(disk).values())


def test_memory_stays_bounded(tmp_path: Path) -> None:
    with open_disk(made(tmp_path).path, cache_size=SMALL) as disk:
        for seed in range(3):
            read_all(disk, NOISE, 16 * KIB, seed)
        held = entries(disk).values()
        assert sum(len(v) * (v.itemsize if isinstance(v, array) else 1) for v in held) <= SMALL


def test_other_grains_among_them(tmp_path: Path) -> None:
    """Text, noise with some text, zeros, a short last grain, with layouts for some of them."""
    noise = random.Random(5).randbytes
    parts = [
        noise(3 * GRAIN),
        b"text" * (3 * GRAIN // 4),
        noise(GRAIN // 2) + b"y" * GRAIN + noise(GRAIN // 2),
        bytes(2 * GRAIN),
        noise(20 * GRAIN + 1536),
    ]
    content = Content.of(b"".join(parts))
    for last in ("full", "short"):
        for salvage in (False, True):
            image = made(tmp_path, content, last_grain=last)
            with open_disk(image.path, cache_size=SMALL, salvage=salvage) as disk:
                for seed, step in enumerate((4 * KIB, 100 * 512, 3 * GRAIN, 4 * KIB)):
                    read_all(disk, content, step, seed)
                assert any(isinstance(value, array) for value in entries(disk).values())


HARMS: list[stream.Damage] = ["lba", "bits", "adler", "header", "short", "empty", "bomb", "truncated", "huge"]


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_met_by_whoever_reads_first(tmp_path: Path, harm: stream.Damage) -> None:
    """And by all who read after him; it is not spread to the neighbours."""
    image = made(tmp_path, broken={20: harm})
    with open_disk(image.path, cache_size=SMALL) as disk:
        for at in range(0, 20 * GRAIN, GRAIN):
            disk.pread(512, at)
        for _ in range(2):
            for length, at in [(512, 20 * GRAIN), (GRAIN, 20 * GRAIN), (4 * GRAIN, 18 * GRAIN)]:
                with pytest.raises(Unreadable, match="grain 20 is damaged"):
                    disk.pread(length, at)
            same(disk.pread(2 * GRAIN, 18 * GRAIN), NOISE.read(18 * GRAIN, 2 * GRAIN))
            same(disk.pread(2 * GRAIN, 21 * GRAIN), NOISE.read(21 * GRAIN, 2 * GRAIN))


def test_every_bit_of_a_record_is_vetted(tmp_path: Path) -> None:
    """One bit turned anywhere in the marker, the blocks' heads, the data or the checksum."""
    image = made(tmp_path)
    extent = image.stream()
    record = extent.records[30]
    start = record.sector * 512
    with open(extent.path, "rb") as file:
        file.seek(start)
        sound = file.read(12 + record.size)
    begin = start + 12
    layout = layout_of(sound[12:], begin, GRAIN)
    assert layout is not None
    heads = [layout[0] + end + 5 * number - 5 for number, end in enumerate([0, *layout[1:-1]])]
    rng = random.Random(6)
    places = [*range(start, begin + 2), begin + record.size - 1, begin + record.size - 4]
    places += [head + byte for head in heads for byte in range(5)]
    places += [rng.randrange(begin + 7, begin + record.size) for _ in range(40)]
    for at in places:
        mask = 1 << rng.randrange(8)
        changed = bytes([sound[at - start] ^ mask])
        poke(extent.path, at, changed)
        with open_disk(image.path, cache_size=SMALL) as disk:
            for other in range(5):
                disk.pread(512, other * GRAIN)  # there is no room for bytes from here on
            try:
                found = disk.pread(GRAIN, 30 * GRAIN)
            except Unreadable:
                pass
            else:  # a bit that means nothing
                assert found == NOISE.read(30 * GRAIN, GRAIN), at
        poke(extent.path, at, sound[at - start : at - start + 1])


def test_a_file_that_shrinks_is_told(tmp_path: Path) -> None:
    image = made(tmp_path)
    with open_disk(image.path, cache_size=SMALL) as disk:
        read_all(disk, NOISE, 4 * KIB)
        cut(image.stream().path, MIB)
        with pytest.raises(Truncated):
            disk.pread(4 * KIB, 39 * GRAIN)


def test_prefetching_a_stored_grain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_disk(made(tmp_path).path, cache_size=SMALL) as disk:
        disk.cache(40 * GRAIN, 0)
        with counted(monkeypatch) as calls:
            disk.cache(20 * GRAIN, 20 * GRAIN)
            same(disk.pread(20 * GRAIN, 20 * GRAIN), NOISE.read(20 * GRAIN, 20 * GRAIN))
            assert not calls


def test_many_readers(tmp_path: Path) -> None:
    """Threads that read the same grains for the first time, and again, while others are pushed out."""
    image = made(tmp_path)
    faults: list[BaseException] = []
    with open_disk(image.path, cache_size=SMALL) as disk:

        def work(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(300):
                    length = rng.choice([512, 4 * KIB, GRAIN, 3 * GRAIN])
                    at = rng.randrange(NOISE.size - length + 1)
                    same(disk.pread(length, at), NOISE.read(at, length))
            except (AssertionError, VmdkError) as error:
                faults.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults


def test_layouts_are_small(tmp_path: Path) -> None:
    """What the cache reckons for one is what it takes, within a half."""
    assert os.path.getsize(made(tmp_path).path) > NOISE.size
    with open_disk(str(tmp_path / "disk.vmdk"), cache_size=SMALL) as disk:
        read_all(disk, NOISE, GRAIN)
        held = [value for value in entries(disk).values() if isinstance(value, array)]
        assert held
        assert all(value.__sizeof__() + 150 <= 200 + 8 * len(value) + 100 for value in held)
