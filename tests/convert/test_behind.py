"""What is written is sent to the disk while more is made; zeros are found whatever surrounds them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk import Work, convert
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.ops.copy import copy
from nbd_vmdk.storage import local
from nbd_vmdk.storage.local import LocalFile
from nbd_vmdk.units import MIB
from tests.images.content import Content

Call = tuple[int, int, int]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What was asked of the kernel, as (offset, length, flags)."""
    made: list[Call] = []

    def record(_fd: int, at: int, length: int, flags: int) -> int:
        made.append((at, length, flags))
        return 0

    monkeypatch.setattr(local, "_libc_sync_file_range", lambda: record)
    return made


def new_file(path: Path) -> LocalFile:
    return LocalFile(os.open(path, os.O_RDWR | os.O_CREAT), str(path), writable=True)


def test_all_but_the_end_is_sent_once(tmp_path: Path, calls: list[Call]) -> None:
    with closing(new_file(tmp_path / "a")) as file:
        file.write(bytes(MIB), 0)
        assert not calls, "nobody asked for it"
        file.write_behind = True
        for at in range(37):
            file.write(bytes(MIB), at * MIB)
    assert calls == [(at * 8 * MIB, 8 * MIB, local._START_WRITING) for at in range(3)]


def test_small_writes_send_nothing(tmp_path: Path, calls: list[Call]) -> None:
    with closing(new_file(tmp_path / "a")) as file:
        file.write_behind = True
        for at in range(0, MIB, 4096):
            file.write(b"x", at)
    assert not calls


def test_the_kernel_takes_it(tmp_path: Path) -> None:
    content = Content.random(20 * MIB, 4).read()
    with closing(new_file(tmp_path / "a")) as file:
        file.write_behind = True
        for at in range(0, len(content), MIB):
            file.write(content[at : at + MIB], at)
        file.sync()
        assert file.write_behind
    assert (tmp_path / "a").read_bytes() == content


def test_without_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_libc_sync_file_range", lambda: None)
    with closing(new_file(tmp_path / "a")) as file:
        file.write_behind = True
        for at in range(20):
            file.write(bytes([at]) * MIB, at * MIB)
        assert not file.write_behind, "not asked again"
    assert (tmp_path / "a").read_bytes() == b"".join(bytes([at]) * MIB for at in range(20))


@pytest.mark.parametrize("kind", ["raw", "monolithicSparse", "monolithicFlat", "streamOptimized", "ova"])
def test_new_images_are_sent(tmp_path: Path, calls: list[Call], kind: str) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(random.Random(3).randbytes(26 * MIB))
    convert(raw, tmp_path / "b.out", kind=kind, work=Work(verify=True))
    assert sum(length for _, length, _ in calls) >= 16 * MIB


class Row:
    """Bytes as a source and a sink."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.zeros = self.made = b"\1" * len(data)

    def runs(self, offset: int, length: int) -> Iterator[tuple[Kind, int]]:
        yield Kind.DATA, length

    def read_into(self, buf: memoryview, offset: int) -> None:
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, buf: memoryview, offset: int) -> None:
        self.made = self.made[:offset] + bytes(buf) + self.made[offset + len(buf) :]

    def zero(self, offset: int, length: int) -> None:
        self.write(memoryview(bytes(length)), offset)
        self.zeros = self.zeros[:offset] + bytes(length) + self.zeros[offset + length :]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4000),
    st.dictionaries(st.integers(0, 4000), st.integers(1, 255), max_size=12),
    st.integers(0, 900),
)
def test_zeros_are_found(size: int, bytes_at: dict[int, int], start: int) -> None:
    """Pieces lie on multiples of 512; one is zeros to the sink exactly if all its bytes are."""
    data = bytearray(size)
    for at, value in bytes_at.items():
        if at < size:
            data[at] = value
    row = Row(bytes(data))
    start = min(start, size)
    copy(row, row, offset=start, length=size - start, zero_grain=512, threads=1)
    assert row.made[start:] == data[start:]
    at = start
    while at < size:
        stop = min(at + 512 - at % 512, size)
        assert (not any(data[at:stop])) == (not any(row.zeros[at:stop]))
        at = stop
