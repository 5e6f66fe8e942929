"""
seSparse read at once: its entries are taken apart in a second place there, which must agree with the first.

Entries of all sorts, most of them damaged, are put into an image; whatever is read of it at once must be what
is read by asking for a mapping, and so must be every refusal.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk import Disk, open_disk
from nbd_vmdk.errors import OutOfRange, StorageError, Truncated, VmdkError
from nbd_vmdk.extents.base import Reader
from nbd_vmdk.extents.sesparse import SeSparseExtent
from nbd_vmdk.ondisk.sesparse import ENTRY_ALLOCATED, ENTRY_STEP
from tests.engine import long_way, outside, same
from tests.images import desc, poke
from tests.images.content import MIB, SECTOR, Content
from tests.images.sesparse import GRAIN, GRAIN_SECTORS, GTES, TABLE_SECTORS, encode

#: Grains that have data at the beginning of each of the two tables; the last of the disk is no whole one.
STORED = 40
SIZE = GTES * GRAIN + 60 * GRAIN + 3 * SECTOR
#: The number of the first grain in the file: the low bits of the next ones overflow soon.
FIRST = 4090
#: Where the constant header has the size of the grain area, in sectors.
AREA_AT = 200


class Made(NamedTuple):
    """An image, its extent's file, and where the two tables and the grain area's size are in that."""

    path: str
    extent: str
    tables: tuple[int, int]
    area_sectors: int


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    content = Content(SIZE)
    for start in (0, GTES * GRAIN):
        data = b"".join(struct.pack("<Q", start + at) for at in range(0, STORED * GRAIN, 8))
        content.put(start, data)
    image = desc.se_sparse(str(tmp_path_factory.mktemp("sesparse")), "disk", content, first_index=FIRST)
    extent = image.sesparse()
    return Made(image.path, extent.path, (extent.gte_at(0), extent.gte_at(GTES)), extent.areas["grains"][1])


def outcome(read: Reader, offset: int, length: int) -> bytes | tuple[type, str, str | None]:
    buf = bytearray(b"\xaa" * length)
    try:
        read(memoryview(buf), offset)
    except VmdkError as error:
        return type(error), str(error), error.hint
    return bytes(buf)


def answered(disk: Disk, offset: int, length: int) -> bool:
    """Whether a read is answered at once, by a reader of its own."""
    asked = []
    extent = disk.links[0].extents[0].extent
    assert isinstance(extent, SeSparseExtent)
    extent.reader(lambda _buf, at: asked.append(at))(memoryview(bytearray(length)), offset)
    return not asked


IN_FILE = st.integers(FIRST, FIRST + 2 * STORED + 2)  # or just behind its end
NUMBERS = st.one_of(
    IN_FILE,
    st.builds(lambda number, bit: number | 1 << bit, IN_FILE, st.integers(13, 59)),  # one bit from there
    st.integers(0, 2 * GTES),
    st.integers(0, (1 << 60) - 1),
)
ENTRIES = st.one_of(
    st.builds(encode, NUMBERS),
    st.builds(encode, NUMBERS, st.integers(0, 15)),
    st.sampled_from([0, 1, 1 << 60, 2 << 60, ENTRY_ALLOCATED << 60, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
#: What of the 60 grains in a table that the disk has both of are changed.
CHANGES = st.dictionaries(st.integers(0, 60), ENTRIES, min_size=1, max_size=20)
#: Slots from which on entries go up by the step that names the file's next grain, for a while: beyond the low
#: bits, and the states that are known.
ROWS = st.lists(
    st.tuples(
        st.integers(0, 50),
        st.one_of(
            st.builds(encode, NUMBERS, st.sampled_from([1, 2, 3, 3, 3, 4, 15])),
            st.builds(encode, st.integers(GTES - 8, GTES + 2)),
        ),
        st.integers(2, 20),
    ),
    max_size=3,
)
RANGES = st.lists(
    st.tuples(
        st.integers(0, 61 * GRAIN),
        st.one_of(st.just(GRAIN), st.integers(0, 2 * GRAIN), st.integers(0, 40 * GRAIN)),
        st.booleans(),
    ),
    max_size=10,
)


@settings(max_examples=400)
@given(
    changes=st.tuples(CHANGES, CHANGES),
    rows=ROWS,
    area=st.one_of(
        st.none(),
        st.builds(lambda number, more: number * GRAIN_SECTORS + more, IN_FILE, st.integers(0, 7)),
        st.integers(0, 1 << 53),
    ),
    ranges=RANGES,
)
def test_as_by_its_map(
    made: Made,
    changes: tuple[dict[int, int], dict[int, int]],
    rows: list[tuple[int, int, int]],
    area: int | None,
    ranges: list[tuple[int, int, bool]],
) -> None:
    stored = [encode(FIRST + number) for number in range(2 * STORED)]
    for slot, entry, count in rows:
        for number in range(count):
            changes[0][slot + number] = (entry + number * ENTRY_STEP) % (1 << 64)
    poke(made.extent, AREA_AT, struct.pack("<Q", made.area_sectors if area is None else area))
    for table, (at, changed) in enumerate(zip(made.tables, changes, strict=True)):
        entries = stored[table * STORED : (table + 1) * STORED]
        entries += [0] * (TABLE_SECTORS * SECTOR // 8 - STORED)
        for slot, entry in changed.items():
            entries[slot] = entry
        poke(made.extent, at, struct.pack(f"<{GTES}Q", *entries))
    asked = [((GTES * table + grain) * GRAIN, GRAIN) for table in (0, 1) for grain in changes[table]]
    if area is not None and 0 <= (edge := area // GRAIN_SECTORS - FIRST) < 2 * STORED:
        # The grain behind the area's last one; it is in the file.  And the last ones and it.
        behind = (edge // STORED * GTES + edge % STORED) * GRAIN
        asked += [(behind, GRAIN), (max(behind - 3 * GRAIN, 0), 4 * GRAIN)]
    asked += [(slot * GRAIN, many * GRAIN) for slot, _, count in rows for many in (count, count - 1, 2)]
    asked += [(offset + GTES * GRAIN * second, length) for offset, length, second in ranges]
    with open_disk(made.path) as disk:
        for offset in (0, GTES * GRAIN):
            outcome(disk.read_into, offset, 1)  # the table is in memory from now on
        for offset, length in asked:
            wanted = outcome(disk._read_mapped, offset, length)
            assert outcome(disk.read_into, offset, length) == wanted, (offset, length)
            if isinstance(wanted, bytes) and offset // GRAIN == (offset + length - 1) // GRAIN:
                table, slot = divmod(offset // GRAIN, GTES)
                changed = changes[table].get(slot, stored[table * STORED + slot] if slot < STORED else 0)
                assert answered(disk, offset, length) == (changed >> 60 == ENTRY_ALLOCATED)


@pytest.fixture
def plain(tmp_path: Path) -> desc.Image:
    """An image with nothing but data, of a size that is no multiple of a grain."""
    content = Content.of(b"".join(b"%8d" % number for number in range((MIB + 3 * SECTOR) // 8)))
    room = 2 * GTES * GRAIN_SECTORS
    return desc.se_sparse(
        str(tmp_path), "disk", content, capacity_sectors=room, first_index=FIRST, shuffle_grains=1
    )


def ranges(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, 3 * SECTOR):
        yield start, min(GRAIN - start % GRAIN, size - start)
    yield size - 1, 1


def test_who_reads(plain: desc.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = long_way(monkeypatch)
    with open_disk(plain.path) as disk:
        for offset, length in ranges(disk.size):
            same(disk.pread(length, offset), plain.visible.read(offset, length), offset)
        assert [offset for offset, _ in calls] == [0]  # it brought the table into memory
        same(disk.pread(disk.size, 0), plain.visible.read(0, disk.size))
        assert [offset for offset, _ in calls] == [0, 0]


def test_who_reads_several(tmp_path: Path) -> None:
    """Grains side by side in the file are read together, to where the low bits overflow or a table ends."""
    content = Content(SIZE + GTES * GRAIN)
    content.put((GTES - 30) * GRAIN, random.Random(1).randbytes(60 * GRAIN))
    image = desc.se_sparse(str(tmp_path), "disk", content, first_index=GTES - 10)
    start = (GTES - 30) * GRAIN
    with open_disk(image.path) as disk:
        same(disk.pread(60 * GRAIN, start), content.read(start, 60 * GRAIN))
        for first in range(40):
            for many in (2, 3, 10, 20):
                offset, length = start + first * GRAIN - first, many * GRAIN
                last = (offset + length - 1 - start) // GRAIN
                first_grain = (offset - start) // GRAIN
                at_once = not any(first_grain < edge <= last for edge in (0, 10, 30))
                assert answered(disk, offset, length) == at_once, (first, many)
                same(disk.pread(length, offset), content.read(offset, length), offset)


def test_outside(plain: desc.Image) -> None:
    """The last grain goes on behind the disk's end, and tables have room for more."""
    buf = memoryview(bytearray(SECTOR))
    with open_disk(plain.path) as disk:
        disk.pread(disk.size, 0)
        for offset in outside(disk.size, GRAIN):
            with pytest.raises(OutOfRange):
                disk.read_into(buf, offset)
        disk.read_into(buf[:0], disk.size)


def test_closed(plain: desc.Image) -> None:
    disk = open_disk(plain.path)
    disk.pread(disk.size, 0)
    read_into = disk.read_into
    disk.close()
    with pytest.raises(StorageError):
        read_into(memoryview(bytearray(SECTOR)), SECTOR)


def test_file_that_was_cut_off(plain: desc.Image) -> None:
    extent = plain.sesparse()
    with open_disk(plain.path) as disk:
        disk.pread(disk.size, 0)
        os.truncate(extent.path, os.path.getsize(extent.path) - 10 * GRAIN)
        failures = 0
        for offset in range(0, disk.size - GRAIN, GRAIN):
            try:
                same(disk.pread(GRAIN, offset), plain.visible.read(offset, GRAIN), offset)
            except Truncated:
                failures += 1
        assert 9 <= failures <= 10  # the disk's last grain, which is no whole one, may be among them


def test_delta_over_a_parent(tmp_path: Path, made: Made) -> None:
    """Holes are the parent's bytes; zeros, and what was unmapped, are not."""
    base = desc.monolithic_sparse(str(tmp_path), "base", Content.of(b"\xbb" * (16 * GRAIN)))
    own = Content(16 * GRAIN).put(0, b"\x11" * (8 * GRAIN))
    gtes = {2: 0, 3: 1 << 60, 4: 2 << 60, 5: encode(3, 1)}
    child = desc.se_sparse(str(tmp_path), "child", own, parent=base, gtes=gtes)
    wanted = [b"\x11"[0]] * 2 + [0xBB] + [0] * 3 + [0x11] * 2 + [0xBB] * 8
    with open_disk(child.path) as disk:
        for _ in range(3):
            found = [disk.pread(GRAIN, grain * GRAIN) for grain in range(16)]
            assert found == [bytes([each]) * GRAIN for each in wanted]
