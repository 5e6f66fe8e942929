"""File systems other than the one that most tests run on: what is made there is whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbd_vmdk import create_image, open_disk
from nbd_vmdk.cli import main
from tests.images.content import MIB
from tests.mounted import mounted


@pytest.fixture(params=["btrfs", "xfs"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    with mounted(tmp_path, request.param, 512 * MIB) as where:
        yield Path(where)


@pytest.mark.parametrize(
    "kind", ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "vmfs"]
)
def test_all_files_of_a_new_image_get_their_names(folder: Path, kind: str) -> None:
    """btrfs lists a folder as it was when it was opened, which is before the files were made in it."""
    create_image(folder / "new.vmdk", 5 * MIB, kind=kind, extent_size=2 * MIB if "two" in kind else None)
    with open_disk(folder / "new.vmdk", writable=True) as disk:
        disk.pwrite(b"x" * MIB, 3 * MIB)
    assert main(["check", str(folder / "new.vmdk")]) == 0
