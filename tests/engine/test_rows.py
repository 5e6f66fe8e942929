"""Rows of grains side by side: one comparison of large numbers must say of them what each entry says."""

from __future__ import annotations

import random
import struct
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk import open_disk
from nbd_vmdk.errors import VmdkError
from nbd_vmdk.extents.base import Reader
from nbd_vmdk.extents.rows import MOST, is_row
from tests.engine import long_way, same
from tests.images import desc, poke
from tests.images.content import KIB, MIB, SECTOR, Content

GRAINS = 600
STEPS = st.sampled_from([0, 1, 8, 128, 1 << 20])


@given(
    wide=st.booleans(),
    step=STEPS,
    first=st.one_of(st.integers(0, 1 << 20), st.integers((1 << 32) - 200, (1 << 32) - 1)),
    count=st.integers(1, MOST),
    slot=st.integers(0, 20),
    changes=st.dictionaries(
        st.integers(0, MOST - 1), st.sampled_from([-(1 << 31), -1, 1, 2, 1 << 31]), max_size=2
    ),
)
def test_rows(wide: bool, step: int, first: int, count: int, slot: int, changes: dict[int, int]) -> None:
    bits = 64 if wide else 32
    row = [(first + number * step) % (1 << bits) for number in range(MOST)]
    for number, change in changes.items():
        row[number] = (row[number] + change) % (1 << bits)
    table = array("Q" if wide else "I", [7] * slot + row + [9] * 5)
    wanted = row[:count] == [row[0] + number * step for number in range(count)]
    assert is_row(bits // 8, step)(table, slot, row[0], count) is wanted


@pytest.mark.parametrize("step", [1, 128])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_row_that_does_not_fit(step: int, count: int) -> None:
    """Entries that would be the number of the row if one digit were carried into the next."""
    for over in range(1, count):
        first = (1 << 32) - over * step
        number = sum((first + at * step) << 32 * at for at in range(count))
        entries = array("I", [number >> 32 * at & 0xFFFFFFFF for at in range(count)])
        assert not is_row(4, step)(entries, 0, first, count)


def outcome(read: Reader, offset: int, length: int) -> bytes | tuple[type, str]:
    buf = bytearray(b"\xaa" * length)
    try:
        read(memoryview(buf), offset)
    except VmdkError as error:
        return type(error), str(error)
    return bytes(buf)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> desc.Image:
    """COWD as ESX makes it, with grains of 512 bytes, all of them there and different."""
    content = Content.of(random.Random(1).randbytes(GRAINS * SECTOR))
    return desc.vmfs_sparse(str(tmp_path_factory.mktemp("rows")), "disk", content, grain_sectors=1)


@settings(max_examples=200)
@given(
    breaks=st.dictionaries(
        st.integers(0, GRAINS - 1),
        st.one_of(
            st.sampled_from([0, 1, (1 << 32) - 1, (1 << 32) - MOST]),
            st.integers(0, 2 * GRAINS),  # another grain, or what lies before the first one
        ),
        max_size=6,
    ),
    ranges=st.lists(
        st.tuples(st.integers(0, GRAINS * SECTOR), st.one_of(st.just(4 * KIB), st.integers(0, 70 * KIB))),
        min_size=1,
        max_size=20,
    ),
)
def test_as_grain_by_grain(made: desc.Image, breaks: dict[int, int], ranges: list[tuple[int, int]]) -> None:
    """Also where a row goes on from another grain on, behind the end of the file, or is broken."""
    extent = made.cowd()
    first = extent.grain_at(0) // SECTOR
    entries, entry = [], first
    for grain in range(GRAINS):
        entry = breaks.get(grain, entry)
        entries.append(entry)
        entry = min(entry + 1, (1 << 32) - 1) if entry else first + grain
    poke(extent.path, extent.gte_at(0), struct.pack(f"<{GRAINS}I", *entries))
    with open_disk(made.path) as disk:
        outcome(disk.read_into, 0, 1)  # the table is in memory from now on
        at_breaks = [(max(grain - 3, 0) * SECTOR, 4 * KIB) for grain in breaks]
        at_breaks += [(grain * SECTOR, length) for grain in breaks for length in (SECTOR, 4 * KIB)]
        for offset, length in ranges + at_breaks:
            found = outcome(disk.read_into, offset, length)
            assert found == outcome(disk._read_mapped, offset, length), (offset, length)
            if isinstance(found, bytes):
                sectors = range(offset, offset + length, SECTOR)
                pieces = [outcome(disk._read_mapped, at, min(SECTOR, offset + length - at)) for at in sectors]
                assert pieces == [found[at - offset : at - offset + SECTOR] for at in sectors]


KINDS: dict[str, Callable[[str, Content], desc.Image]] = {
    "COWD": lambda folder, content: desc.vmfs_sparse(folder, "disk", content, grain_sectors=1),
    "sparse": lambda folder, content: desc.monolithic_sparse(
        folder, "disk", content, grain_sectors=8, gtes=512
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_who_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Requests of many grains are answered at once where these are side by side, and named in one table."""
    content = Content.of(random.Random(2).randbytes(5 * MIB + 3 * SECTOR))
    image = KINDS[kind](str(tmp_path), content)
    table = 2 * MIB
    asked = long_way(monkeypatch)
    with open_disk(image.path) as disk:
        extent = disk.links[0].extents[0].extent
        assert extent.map(0, 3 * table)[1] == table  # and not a piece of it
        assert extent.map(table + 5, 3 * table)[1] == table - 5
        same(disk.pread(disk.size, 0), content.read(0, disk.size))  # brings the tables into memory
        asked.clear()
        longest = (MOST - 1) * extent.grain
        for length in (SECTOR, 700, 4 * KIB, longest):
            edges = [edge for place in (table, 2 * table) for edge in range(place - length - 1, place + 2)]
            for offset in (
                *range(0, disk.size - length, 100_001),
                *edges[:4],
                *edges[-4:],
                disk.size - length,
            ):
                same(disk.pread(length, offset), content.read(offset, length), offset)
        assert asked
        for offset, length in asked:
            assert offset // table < (offset + length - 1) // table
        asked.clear()
        same(disk.pread(longest + 2 * extent.grain, 0), content.read(0, longest + 2 * extent.grain))
        assert asked
