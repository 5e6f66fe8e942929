"""The fast part of a check, before an image that was not closed cleanly is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbd_vmdk.errors import BadField, VmdkError
from nbd_vmdk.extents.vetting import quick_check, quick_check_cowd, reaches_past_end
from nbd_vmdk.ondisk import cowd
from nbd_vmdk.ondisk.hosted import parse_header
from nbd_vmdk.opening import open_disk
from tests.breaking import BREAKS, CONTENT, PAST_END, Break, delta, sparse
from tests.images import desc, peek, poke
from tests.images.content import SECTOR, Content
from tests.images.desc import Image
from tests.memory import MemoryStorage

#: What may not be written; everything else of a hosted extent is harmless, or not looked for.
DANGEROUS = {
    "gde-past-end",
    "gde-in-header",
    "gde-doubled",
    "gde-overlaps",
    "gde-moved",
    "gde-both",
    "gde-alone",
    "rgde-past-end",
    "rgde-same",
    "gd-offset",
    "rgd-offset",
    "gd-offset-irregular",
    "gd-offset-alone",
    "text-area",
    "overhead",
    "gt-garbage",
    "gte-past-end",
    "gte-low",
    "gte-past-end-both",
    "gte-low-both",
    "gte-past-end-child",
    "cut-visible",
    "over-tables",
    "text-among-grains",
    "overhead-last",
    "shared",
    "shared-partly",
}
#: Breaks of other kinds, and of descriptors in files of their own.
_OTHERS = (
    "stream",
    "footer",
    "record",
    "cowd",
    "se-",
    "flat",
    "parent",
    "renamed",
    "missing",
    "other",
    "called",
)
_TEXTS = ("named", "line", "no-extents", "cid", "long-cid", "tracking", "gd-at-end")
HOSTED = [broken for broken in BREAKS if not broken.name.startswith((*_OTHERS, *_TEXTS))]


def vet(path: str) -> None:
    storage = MemoryStorage(peek(path, 0, os.path.getsize(path)), path)
    quick_check(storage, parse_header(storage.read(0, SECTOR), path))


@pytest.mark.parametrize("broken", HOSTED, ids=lambda broken: broken.name)
def test_dangerous_damage_is_refused(tmp_path: Path, broken: Break) -> None:
    image = broken.build(str(tmp_path))
    broken.damage(image)
    if broken.name not in DANGEROUS:
        try:
            parse_header(peek(image.path, 0, SECTOR), image.path)
        except VmdkError:
            return  # it can't even be opened
        vet(image.path)
        return
    with pytest.raises(VmdkError) as caught:
        vet(image.path)
    assert caught.value.file == image.path
    assert caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zero_gte": True},
        {"rgd": False},
        {"preallocate_tables": False},
        {"tables_last": True},
        {"shuffle_grains": 3},
        {"misalign": 3},
        {"gap_sectors": 5},
        {"gtes": 64},
        {"grain_sectors": 1},
        {"descriptor_sectors": 3},
        {"overhead": 0},
    ],
)
def test_sound_images_pass(tmp_path: Path, options: dict[str, int]) -> None:
    vet(desc.monolithic_sparse(str(tmp_path), "disk", CONTENT, **({"grain_sectors": 8} | options)).path)


def lacking(image: Image, *, redundant: bool) -> None:
    extent = image.hosted()
    poke(image.path, extent.gde_at(1, redundant=redundant), bytes(4))


@pytest.mark.parametrize("redundant", [False, True])
def test_what_a_crash_leaves_passes(tmp_path: Path, redundant: bool) -> None:
    """One directory has a table and the other not yet, a table is newer than its twin, the mark is set."""
    image = sparse(str(tmp_path))
    extent = image.hosted()
    lacking(image, redundant=redundant)
    for grain in sorted(extent.grains)[:5]:
        poke(image.path, extent.gte_at(grain, redundant=redundant), bytes(4))
    poke(image.path, 72, b"\1")
    vet(image.path)


@pytest.mark.parametrize(("bad", "is_past_end"), [(PAST_END, True), (4, False)])
def test_a_table_that_only_the_twin_has_is_looked_at_too(tmp_path: Path, bad: int, is_past_end: bool) -> None:
    """It is the one that is read there, so what it names would be written to."""
    image = sparse(str(tmp_path))
    extent = image.hosted()
    lacking(image, redundant=False)
    grain = max(number for number in extent.grains if number // extent.header.gtes_per_gt == 1)
    poke(image.path, extent.gte_at(grain, redundant=True), bad.to_bytes(4, "little"))
    storage = MemoryStorage(peek(image.path, 0, os.path.getsize(image.path)), image.path)
    header = parse_header(storage.read(0, SECTOR), image.path)
    assert reaches_past_end(storage, header) is is_past_end
    with pytest.raises(BadField, match=f"table entry of grain {grain} is {bad}: "):
        quick_check(storage, header)
    assert not opens(image.path)


# COWD


#: What of a COWD extent may not be written; freeSector, flags and generations are harmless.
DANGEROUS_COWD = {
    "cowd-gde",
    "cowd-gde-low",
    "cowd-gte-past-end",
    "cowd-gte-low",
    "cowd-over-table",
    "cowd-cut",
    "cowd-directory",
    "cowd-shared",
}
COWD = [broken for broken in BREAKS if broken.name.startswith("cowd-") and broken.name != "cowd-version"]


def vet_cowd(path: str) -> None:
    storage = MemoryStorage(peek(path, 0, os.path.getsize(path)), path)
    quick_check_cowd(storage, cowd.parse_header(storage.read(0, 2048), path))


@pytest.mark.parametrize("broken", COWD, ids=lambda broken: broken.name)
def test_dangerous_damage_of_cowd_is_refused(tmp_path: Path, broken: Break) -> None:
    image = broken.build(str(tmp_path))
    broken.damage(image)
    path = image.cowd().path
    if broken.name not in DANGEROUS_COWD:
        vet_cowd(path)
        return
    with pytest.raises(VmdkError) as caught:
        vet_cowd(path)
    assert caught.value.file == path
    assert caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grain_sectors": 8, "shuffle_grains": 3},
        {"preallocate_tables": True},
        {"first_sector": 99, "grow_to": 1 << 20, "free_sector": 1},
    ],
)
def test_sound_cowd_passes(tmp_path: Path, options: dict[str, int]) -> None:
    vet_cowd(delta(**options)(str(tmp_path)).cowd().path)


def test_an_empty_cowd_passes(tmp_path: Path) -> None:
    """The file ends with its directory: there is no room for a table, and none is named."""
    vet_cowd(desc.vmfs_sparse(str(tmp_path), "disk", Content(1 << 20)).cowd().path)


# Large images that were closed cleanly


def opens(path: str) -> bool:
    try:
        open_disk(path, writable=True, locks=False).close()
    except BadField:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "dangerous"),
    [
        ("gte-past-end", True),
        ("gt-garbage", True),
        ("cut-visible", True),
        ("gde-past-end", True),
        ("gte-past-end-child", True),
        ("cut-hidden", False),
        ("beyond", False),
        ("shared", False),
        ("gte-zero", False),
    ],
)
def test_large_images_are_looked_at_for_what_does_new_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dangerous: bool
) -> None:
    """What lies behind the end of the file is refused, what was wrong before is left to a check."""
    monkeypatch.setattr("nbd_vmdk.opener.extents._VETTED_GRAINS", -1)
    broken = next(each for each in BREAKS if each.name == name)
    image = broken.build(str(tmp_path))
    assert opens(image.path)
    broken.damage(image)
    assert opens(image.path) is not dangerous


@pytest.mark.parametrize("grain", [0, 700, 1279])
@pytest.mark.parametrize("options", [{}, {"tables_last": True}, {"gtes": 64}, {"preallocate_tables": False}])
def test_every_table_is_asked_for_its_end(tmp_path: Path, grain: int, options: dict[str, int]) -> None:
    content = Content(CONTENT.size).put(grain * 4096, b"x" * 4096).put(0, b"y")
    image = desc.monolithic_sparse(str(tmp_path), "disk", content, grain_sectors=8, **options)
    extent = image.hosted()
    storage = MemoryStorage(peek(image.path, 0, os.path.getsize(image.path)), image.path)
    header = parse_header(storage.read(0, SECTOR), image.path)
    assert not reaches_past_end(storage, header)
    storage.write((storage.size // SECTOR - 7).to_bytes(4, "little"), extent.gte_at(grain))
    assert reaches_past_end(storage, header)
