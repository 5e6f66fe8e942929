"""Gzip data at any place: against zlib, over members and points, within bounds of memory."""

from __future__ import annotations

import gzip
import random
import threading
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk.errors import FormatError, Truncated
from nbd_vmdk.vm import gunzipped
from nbd_vmdk.vm.gunzipped import Gunzipped, Points
from tests.memory import MemoryStorage

MIB = 1 << 20


def plain_bytes(size: int, seed: int = 1) -> bytes:
    """Noise, words and zeros in pieces."""
    rng = random.Random(seed)
    made = bytearray()
    while len(made) < size:
        made += rng.choice((rng.randbytes(5000), b"words " * 3000, bytes(40_000)))
    return bytes(made[:size])


def opened(packed: bytes, limit: int = 1 << 40, points: Points | None = None) -> Gunzipped:
    return Gunzipped(MemoryStorage(packed, "disk.vmdk.gz", writable=False), points or Points(limit))


PLAIN = plain_bytes(3 * MIB + 12345)
PACKED = gzip.compress(PLAIN, 1, mtime=0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(PLAIN)), st.integers(0, 600_000)), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_any_reads_in_any_order(reads: list[tuple[int, int]], points: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gunzipped, "_DISTANCE", 64 << 10)
        patched.setattr(gunzipped, "_POINTS", points)
        patched.setattr(gunzipped, "_KEPT", 2)
        storage = opened(PACKED)
        assert storage.size == len(PLAIN)
        for at, length in reads:
            length = min(length, len(PLAIN) - at)
            assert storage.read(at, length) == PLAIN[at : at + length]


def test_members_and_padding() -> None:
    parts = [plain_bytes(300_000, 2), b"", b"x", plain_bytes(700_000, 3)]
    packed = b"".join(gzip.compress(part) for part in parts)
    whole = b"".join(parts)
    for padding in (0, 1, 511, 100_000):
        storage = opened(packed + bytes(padding))
        assert storage.size == len(whole)
        assert storage.read(0, len(whole)) == whole
        assert storage.read(299_990, 20) == whole[299_990:300_010]
    assert opened(gzip.compress(b"")).size == 0


def test_what_was_learnt_outlives_an_opening() -> None:
    points = Points(1 << 40)
    first = opened(PACKED, points=points)
    assert first.size == len(PLAIN)
    first.close()
    fetched = []

    class Counting(MemoryStorage):
        def read(self, at: int, length: int) -> bytes:
            fetched.append(length)
            return super().read(at, length)

    again = Gunzipped(Counting(PACKED, "x", writable=False), points)
    assert again.size == len(PLAIN)
    assert not fetched
    assert again.read(2 * MIB + 5, 1000) == PLAIN[2 * MIB + 5 :][:1000]
    assert 0 < sum(fetched) < len(PACKED)


def test_points_are_bounded_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gunzipped, "_DISTANCE", 64 << 10)
    monkeypatch.setattr(gunzipped, "_POINTS", 8)
    plain = bytes(40 * MIB)
    points = Points(1 << 40)
    assert opened(gzip.compress(plain, 1), points=points).size == len(plain)
    places = [decoder.given for decoder in points.decoders]
    assert 4 <= len(places) <= 8
    gaps = [two - one for one, two in zip([0, *places], [*places, len(plain)], strict=True)]
    assert max(gaps) <= 2 * points.distance + gunzipped._BLOCK
    assert points.distance >= 4 * MIB


def test_reading_forwards_does_not_start_anew() -> None:
    storage = opened(gzip.compress(PLAIN * 4, 1))
    assert storage.size == 4 * len(PLAIN)
    taken = 0
    inner = storage._packed.read

    def count(at: int, length: int) -> bytes:
        nonlocal taken
        taken += length
        return inner(at, length)

    storage._packed.read = count  # type: ignore[method-assign]
    for at in range(0, storage.size, 65536):
        storage.read(at, min(65536, storage.size - at))
    # Each fetch is 16 KiB, of which a full block of output may leave some for the next.
    assert taken < 3 * storage._packed.size


def test_data_that_become_shorter() -> None:
    points = Points(1 << 40)
    assert opened(PACKED, points=points).size == len(PLAIN)
    points.decoders.clear()
    storage = opened(gzip.compress(PLAIN[:1000]), points=points)
    with pytest.raises(FormatError, match="shorter"):
        storage.read(MIB, 10)


def test_several_readers_at_once() -> None:
    storage = opened(PACKED)
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(30):
            at = rng.randrange(len(PLAIN) - 5000)
            if storage.read(at, 5000) != PLAIN[at : at + 5000]:
                wrong.append(at)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_bombs() -> None:
    bomb = gzip.compress(bytes(30 * MIB), 6)
    assert len(bomb) < MIB // 20
    with pytest.raises(FormatError, match="more than the 1048576 bytes"):
        _ = opened(bomb, limit=MIB).size
    assert opened(bomb).size == 30 * MIB


@pytest.mark.parametrize(
    ("packed", "why"),
    [
        (PACKED[:-1], "cut off"),
        (PACKED[: len(PACKED) // 2], "cut off"),
        (PACKED[:5], "cut off"),
        (PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "data check"),
        (PACKED[:1000] + b"\xff" * 40 + PACKED[1040:], "damaged"),
        (PACKED + b"garbage", "something else follows"),
        (b"\x1f\x8b\x09" + bytes(40), "damaged"),
    ],
    ids=["end", "half", "start", "sum", "middle", "garbage", "method"],
)
def test_damage(packed: bytes, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        _ = opened(packed).size


def test_edges() -> None:
    storage = opened(PACKED)
    assert storage.read(len(PLAIN), 0) == b""
    for at, length in ((len(PLAIN), 1), (len(PLAIN) - 1, 2), (1 << 62, 1)):
        with pytest.raises(Truncated):
            storage.read(at, length)
    with pytest.raises(Truncated):
        storage.read_into(memoryview(bytearray(4)), -1)
    assert zlib.crc32(storage.read(0, storage.size)) == zlib.crc32(PLAIN)
