"""The kinds of images that are written to in place, small, with blocks that history.py knows."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbd_vmdk import open_disk
from nbd_vmdk.ops.check.findings import Repair, Severity
from nbd_vmdk.ops.check.runner import check_image
from tests.failing.history import BLOCK, History, filled
from tests.images import desc, peek
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image
from tests.sound import MAGICS, check_tables, read_tables

SIZE = 6 * MIB + 12 * KIB
BLOCKS = SIZE // BLOCK


def blocks(seed: int, version: int, size: int = SIZE, share: float = 0.3) -> tuple[Content, list[int]]:
    """A content some of whose blocks have a version; and the versions of all."""
    rng = random.Random(f"kinds {seed}")
    content = Content(size)
    found = [0] * (size // BLOCK)
    at = 0
    while at < len(found):
        count = min(rng.randrange(1, 40), len(found) - at)
        if rng.random() < share:
            content.put(at * BLOCK, filled(at, count, version))
            found[at : at + count] = [version] * count
        at += count
    return content, found


def over(child: list[int], parent: list[int]) -> list[int]:
    return [mine or theirs for mine, theirs in zip(child, parent, strict=True)]


@dataclass
class Case:
    """An image and what its blocks hold."""

    image: Image
    history: History

    @property
    def path(self) -> str:
        return self.image.path

    def survived(self) -> None:
        """Compare with what the clients know, after the server has died."""
        with open_disk(self.path) as disk:
            self.history.survived(disk.pread(disk.size, 0))

    def sound(self, *, clean: bool) -> None:
        """Nothing is wrong with its structure; `clean`: and nothing at all is left of a crash."""
        for extent in self.image.files:
            if peek(extent, 0, 4) in MAGICS:
                check_tables(read_tables(extent), clean=clean)
        findings = check_image(self.path).findings
        if clean:
            assert {finding.slug for finding in findings} <= {"unused-space"}, findings
        # What a crash leaves must be mendable without touching the guest's data.
        for finding in findings:
            if finding.severity is Severity.ERROR:
                assert isinstance(finding.repair, Repair), finding
                assert finding.repair.asks is None, finding


def _plain(folder: str, **options: object) -> Case:
    content, found = blocks(1, 1)
    return Case(desc.monolithic_sparse(folder, "top", content, **options), History(found))


def _small_grains(folder: str) -> Case:
    """Several tables, some of which don't exist yet; the grain is a block."""
    return _plain(folder, grain_sectors=8, preallocate_tables=False)


def _split(folder: str) -> Case:
    content, found = blocks(2, 1)
    image = desc.split_sparse(folder, "top", content, 2 * MIB // SECTOR, grain_sectors=32, descriptor=b"")
    return Case(image, History(found))


def _child(folder: str, **options: object) -> Case:
    below, under = blocks(3, 1, share=0.6)
    parent = desc.monolithic_sparse(folder, "base", below)
    content, found = blocks(4, 2, share=0.2)
    grain = 64 * KIB // BLOCK
    # What a grain of the child does not fill it hides all the same: the builder makes it zeros.
    for first in range(0, len(found), grain):
        if any(found[first : first + grain]):
            under[first : first + grain] = [0] * len(under[first : first + grain])
    image = desc.monolithic_sparse(folder, "top", content, parent=parent, **options)
    return Case(image, History(over(found, under)))


def _flat(folder: str) -> Case:
    content, found = blocks(5, 1)
    return Case(desc.monolithic_flat(folder, "top", content), History(found))


def _split_flat(folder: str) -> Case:
    content, found = blocks(6, 1)
    return Case(desc.split_flat(folder, "top", content, 2 * MIB // SECTOR), History(found))


def _cowd(folder: str) -> Case:
    """The grain is a block: of smaller ones, requests that meet may each leave a part of a block."""
    content, found = blocks(7, 1)
    image = desc.vmfs_sparse(folder, "top", content, grain_sectors=8, first_sector=8)
    return Case(image, History(found))


def _cowd_child(folder: str) -> Case:
    """A host's delta: over its flat disk, in a file that is longer than what is used."""
    below, under = blocks(8, 1, share=0.6)
    content, found = blocks(9, 2, share=0.2)
    parent = desc.vmfs(folder, "base", below)
    options: dict[str, Any] = {"grain_sectors": 8, "first_sector": 8, "grow_to": 256 * KIB}
    image = desc.vmfs_sparse(folder, "top", content, parent=parent, **options)
    return Case(image, History(over(found, under)))


KINDS: dict[str, Callable[[str], Case]] = {
    "monolithic": _plain,
    "small-grains": _small_grains,
    "split": _split,
    "child": _child,
    "child-zeroed-grains": lambda folder: _child(folder, zero_gte=True),
    "flat": _flat,
    "split-flat": _split_flat,
    "cowd": _cowd,
    "cowd-child": _cowd_child,
}
