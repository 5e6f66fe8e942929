"""Passing over links that hold nothing changes no byte, whatever is written, read or forgotten meanwhile."""

import random
from array import array
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.extents.base import Mapping
from nbd_vmdk.shortcuts import Shortcuts
from nbd_vmdk.units import KIB, MIB, SECTOR
from tests.images.content import Content
from tests.images.desc import Image, monolithic_sparse, vmfs, vmfs_sparse


def chain(folder: Path, seed: int) -> Image:
    """Seven links of different kinds, sizes and grains, each with a little of its own."""
    random_ = random.Random(seed)
    image = vmfs(folder, "base", Content.random(3 * MIB + 5 * SECTOR, seed=seed))
    for depth in range(1, 7):
        size = 3 * MIB + random_.choice((-300, 0, 0, 5, 77)) * SECTOR
        content = Content(size)
        for _ in range(4):
            offset = random_.randrange(size // SECTOR) * SECTOR
            length = min(random_.choice((SECTOR, 4 * KIB, 200 * KIB)), size - offset)
            content.put(offset, random_.randbytes(length))
        grain = random_.choice((1, 8, 128))
        if depth % 3 == 2:
            image = vmfs_sparse(folder, f"link{depth}", content, parent=image, grain_sectors=grain)
        else:
            image = monolithic_sparse(folder, f"link{depth}", content, parent=image, grain_sectors=grain)
    return image


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cache_size", [64 * MIB, 8 * KIB])
def test_a_chain_reads_as_its_links_say(tmp_path: Path, seed: int, cache_size: int) -> None:
    image = chain(tmp_path, seed)
    truth = image.visible.read(0, image.visible.size)
    random_ = random.Random(seed)
    with open_disk(image.path, cache_size=cache_size) as disk:
        assert disk._shortcuts is not None
        for _ in range(300):
            offset = random_.randrange(disk.size)
            length = min(random_.choice((1, 512, 4096, 300_000)), disk.size - offset)
            assert disk.pread(length, offset) == truth[offset : offset + length]
        assert disk.pread(disk.size, 0) == truth


def test_what_is_written_to_the_top_shows_at_once(tmp_path: Path) -> None:
    image = chain(tmp_path, 1)
    truth = bytearray(image.visible.read(0, image.visible.size))
    random_ = random.Random(2)
    with open_disk(image.path, writable=True) as disk:
        for _ in range(100):
            offset = random_.randrange(disk.size)
            length = min(random_.choice((1, 512, 100_000)), disk.size - offset)
            assert disk.pread(length, offset) == truth[offset : offset + length]
            data = random_.randbytes(length)
            disk.pwrite(data, offset)
            truth[offset : offset + length] = data
            assert disk.pread(length, offset) == data
        assert disk.pread(disk.size, 0) == truth


def test_a_unit_is_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[list[int]] = []
    search = Shortcuts._search

    def counting(self: Shortcuts, page: "array[int]", units: list[int]) -> None:
        searched.append(units)
        search(self, page, units)

    monkeypatch.setattr(Shortcuts, "_search", counting)
    with open_disk(chain(tmp_path, 3).path) as disk:
        units = -(-disk.size // (64 * KIB))
        for _ in range(3):
            disk.pread(disk.size, 0)
    # The first of a group by itself, the second with all others.
    assert [len(part) for part in searched] == [1, units - 1]
    assert sorted(unit for part in searched for unit in part) == list(range(units))


@pytest.mark.parametrize("grain_sectors", [1, 8, 128, 256])
def test_a_group_is_found_as_its_units_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grain_sectors: int
) -> None:
    """What is kept does not depend on whether a unit was searched alone or with others."""
    size = 20 * MIB + 3 * SECTOR
    random_ = random.Random(grain_sectors)
    image = None
    for depth in range(5):
        content = Content(size)
        for _ in range(12):
            offset = random_.randrange(size // SECTOR) * SECTOR
            content.put(offset, random_.randbytes(min(random_.choice((SECTOR, 150 * KIB)), size - offset)))
        kind = vmfs_sparse if depth % 2 and grain_sectors < 128 else monolithic_sparse
        image = kind(tmp_path, f"link{depth}", content, parent=image, grain_sectors=grain_sectors)
    assert image is not None

    def kept() -> list[int]:
        with open_disk(image.path) as disk:
            assert disk._shortcuts is not None
            for at in range(0, size, 64 * KIB):
                disk._shortcuts.reach(at, 1)
            (page,) = disk._shortcuts._pages.young.values()
            assert disk.pread(size, 0) == image.visible.read(0, size)
            return list(page)

    together = kept()
    monkeypatch.setattr("nbd_vmdk.shortcuts._GROUP", 1)
    monkeypatch.setattr("nbd_vmdk.shortcuts._IN_GROUP", 0)
    alone = kept()
    # Sources are numbered as they are met: the same places, and the same links where there is none.
    assert [value % 2**48 for value in together] == [value % 2**48 for value in alone]


def test_what_lies_in_one_piece_is_read_without_asking_a_link(tmp_path: Path) -> None:
    image = chain(tmp_path, 3)
    truth = image.visible.read(0, image.visible.size)

    def ask(offset: int, length: int) -> Mapping:
        raise AssertionError("a link was asked")

    with open_disk(image.path) as disk:
        shortcuts = disk._shortcuts
        assert shortcuts is not None
        assert shortcuts.find(0, 512) is None  # nothing is known yet
        assert disk.pread(disk.size, 0) == truth
        for link in disk.links:
            link.map = ask
        known = [at for at in range(0, disk.size - 64 * KIB, 4 * KIB) if shortcuts.find(at, 4 * KIB)]
        assert len(known) > 100
        for at in known:
            assert disk.pread(4 * KIB, at) == truth[at : at + 4 * KIB]
        # What reaches into the next unit is not answered.
        assert shortcuts.find(64 * KIB - 512, 1024) is None


@pytest.mark.parametrize(("name", "value"), [("_MAX_SOURCES", 2), ("_PLACE_BITS", 17)])
def test_numbers_that_are_too_small_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    monkeypatch.setattr(f"nbd_vmdk.shortcuts.{name}", value)
    if name == "_PLACE_BITS":
        monkeypatch.setattr("nbd_vmdk.shortcuts._PLACE", (1 << value) - 1)
    image = chain(tmp_path, 2)
    truth = image.visible.read(0, image.visible.size)
    with open_disk(image.path) as disk:
        for _ in range(2):
            for at in range(0, disk.size, 60 * KIB):
                length = min(60 * KIB, disk.size - at)
                assert disk.pread(length, at) == truth[at : at + length]
