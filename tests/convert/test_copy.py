"""The copier: every byte once, zeros told, order kept where it is asked for, the first error and no more."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk.extents.base import Kind
from nbd_vmdk.ops import copy as copying
from nbd_vmdk.ops.copy import copy

UNIT = 512


class Runs:
    """A source of runs of UNITs: data is random, the rest zeros."""

    def __init__(self, kinds: list[Kind], tail: int = 0, zero_units: frozenset[int] = frozenset()) -> None:
        rng = random.Random(len(kinds))
        self.kinds = kinds
        self.size = len(kinds) * UNIT - tail
        data = bytearray(len(kinds) * UNIT)
        for index, kind in enumerate(kinds):
            if kind is Kind.DATA and index not in zero_units:
                data[index * UNIT : (index + 1) * UNIT] = rng.randbytes(UNIT - 1) + b"\1"
        self.data = bytes(data[: self.size])
        self.fail_at: int | None = None

    def runs(self, offset: int, length: int) -> Iterator[tuple[Kind, int]]:
        end = offset + length
        while offset < end:
            step = min(UNIT - offset % UNIT, end - offset)
            yield self.kinds[offset // UNIT], step
            offset += step

    def read_into(self, buf: memoryview, offset: int) -> None:
        if self.fail_at is not None and offset <= self.fail_at < offset + len(buf):
            raise OSError(5, "broken")
        assert 0 <= offset <= offset + len(buf) <= self.size
        buf[:] = self.data[offset : offset + len(buf)]


class Memory:
    """A sink that notes what it is told, and that every byte is told once."""

    def __init__(self, size: int, *, ordered: bool = False, fill: int = 0xEE) -> None:
        self.data = bytearray([fill]) * size
        self.told = bytearray(size)
        self.zeros: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.done: list[int] = []
        self._ordered = ordered
        self._lock = threading.Lock()

    def write(self, buf: memoryview, offset: int) -> Callable[[], None] | None:
        with self._lock:
            self.writes.append((offset, len(buf)))
        content = bytes(buf)
        if not self._ordered:
            self._put(offset, content)
            return None
        time.sleep(random.random() / 2000)
        return lambda: (self.done.append(offset), self._put(offset, content))[1]

    def zero(self, offset: int, length: int) -> None:
        with self._lock:
            self.zeros.append((offset, length))
        self._put(offset, bytes(length))

    def _put(self, offset: int, content: bytes) -> None:
        end = offset + len(content)
        with self._lock:
            assert not any(self.told[offset:end]), "told twice"
            self.told[offset:end] = b"\1" * len(content)
            self.data[offset:end] = content


kinds = st.lists(
    st.tuples(st.sampled_from([Kind.DATA, Kind.ZERO, Kind.HOLE, Kind.PACKED]), st.integers(1, 20)),
    max_size=30,
).map(lambda runs: [kind for kind, count in runs for _ in range(count)])


@settings(max_examples=60, deadline=None)
@given(
    kinds,
    st.integers(0, UNIT - 1),
    st.sets(st.integers(0, 300)),
    st.sampled_from([0, UNIT, 4 * UNIT]),
    st.sampled_from([UNIT, 4 * UNIT, 16 * UNIT]),
    st.integers(1, 4),
    st.booleans(),
)
def test_every_byte_once(
    row: list[Kind],
    tail: int,
    zero_units: set[int],
    zero_grain: int,
    chunk: int,
    threads: int,
    ordered: bool,
) -> None:
    source = Runs(row, tail if row else 0, frozenset(zero_units))
    sink = Memory(source.size, ordered=ordered)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "CHUNK", chunk)
        copied = copy(source, sink, zero_grain=zero_grain, threads=threads)
    for at in range(source.size):
        if row[at // UNIT] is Kind.HOLE:
            assert not sink.told[at]
        else:
            assert sink.told[at]
            assert sink.data[at] == source.data[at]
    assert copied.data == sum(length for _, length in sink.writes)
    assert copied.zeros == sum(length for _, length in sink.zeros)
    assert copied.data + copied.zeros + copied.holes == source.size
    if ordered:
        assert sink.done == sorted(sink.done)
    if zero_grain:
        for offset, length in sink.writes:
            for at in range(offset, offset + length, zero_grain):
                assert any(source.data[at : min(at - at % zero_grain + zero_grain, offset + length)])


@settings(max_examples=60, deadline=None)
@given(
    kinds.map(lambda row: [Kind.ZERO if kind is Kind.HOLE else kind for kind in row]),
    st.integers(0, UNIT - 1),
    st.sampled_from([2 * UNIT, 8 * UNIT]),
    st.booleans(),
)
def test_whole_grains(row: list[Kind], tail: int, grain: int, detect: bool) -> None:
    source = Runs(row, tail if row else 0)
    sink = Memory(source.size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "CHUNK", 16 * UNIT)
        copy(source, sink, grain=grain, zero_grain=grain if detect else 0, threads=2)
    assert bytes(sink.data) == source.data
    for offset, length in sink.writes:
        assert offset % grain == 0
        assert length % grain == 0 or offset + length == source.size


@settings(max_examples=60, deadline=None)
@given(kinds, st.integers(0, UNIT - 1), st.sampled_from([0, UNIT, 4 * UNIT]), st.integers(1, 4))
def test_what_is_shared_is_not_written(row: list[Kind], tail: int, zero_grain: int, part: int) -> None:
    """Of each range a part is taken, at times nothing, and told once like all the others."""
    source = Runs(row, tail if row else 0)
    sink = Memory(source.size)
    shared: list[int] = []

    def share(offset: int, length: int) -> int:
        count = length // part if offset // UNIT % 3 else 0
        sink._put(offset, source.data[offset : offset + count])
        shared.append(count)
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "CHUNK", 4 * UNIT)
        copied = copy(source, sink, zero_grain=zero_grain, threads=2, share=share)
    for at in range(source.size):
        assert sink.told[at] == (row[at // UNIT] is not Kind.HOLE)
        if sink.told[at]:
            assert sink.data[at] == source.data[at]
    assert copied.data == sum(shared) + sum(length for _, length in sink.writes)
    assert copied.data + copied.zeros + copied.holes == source.size


def test_a_range() -> None:
    source = Runs([Kind.DATA] * 64)
    sink = Memory(source.size)
    copy(source, sink, offset=5 * UNIT, length=7 * UNIT)
    assert bytes(sink.told) == bytes(5 * UNIT) + b"\1" * 7 * UNIT + bytes(52 * UNIT)


def test_first_error_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "CHUNK", UNIT)
    source = Runs([Kind.DATA] * 5000)
    source.fail_at = 40 * UNIT
    for ordered in (False, True):
        sink = Memory(source.size, ordered=ordered)
        with pytest.raises(OSError, match="broken"):
            copy(source, sink, threads=4)
        assert len(sink.writes) < 200
        if ordered:
            assert sink.done == [at * UNIT for at in range(len(sink.done))]
            assert len(sink.done) <= 40
    assert threading.active_count() == 1 or not any("copy" in t.name for t in threading.enumerate())


def test_an_error_in_order_stops_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "CHUNK", UNIT)

    class Full(Memory):
        def _put(self, offset: int, content: bytes) -> None:
            if offset == 30 * UNIT:
                raise OSError(28, "full")
            super()._put(offset, content)

    source = Runs([Kind.DATA] * 2000)
    sink = Full(source.size, ordered=True)
    with pytest.raises(OSError, match="full"):
        copy(source, sink, threads=4)
    assert sink.done == [at * UNIT for at in range(31)]


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt comes to the thread that waits; it is raised when the items at work are done."""
    monkeypatch.setattr(copying, "CHUNK", UNIT)
    monkeypatch.setattr(copying, "_TELL_EVERY", 0.01)
    source = Runs([Kind.DATA] * 20_000)
    sink = Memory(source.size, ordered=True)
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(source, sink, threads=3, progress=progress)
    assert 0 < len(sink.done) < 20_000
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("copy")]


def test_progress_ends_at_the_whole() -> None:
    source = Runs([Kind.DATA, Kind.ZERO, Kind.HOLE] * 100)
    told: list[tuple[int, int]] = []
    copy(source, Memory(source.size), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (source.size, source.size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_nothing() -> None:
    told: list[tuple[int, int]] = []
    copied = copy(Runs([]), Memory(0), progress=lambda done, total: told.append((done, total)))
    assert (copied.data, copied.zeros, copied.holes) == (0, 0, 0)
    assert told == [(0, 0)]
