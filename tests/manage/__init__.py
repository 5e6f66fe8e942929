"""
What the tests of resizing, compacting, renaming, cloning and deleting share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.create import create_image
from nbd_vmdk.units import KIB, MIB

#: Kinds and options of small images with several extents, and grains where they have some.
KINDS: dict[str, dict[str, Any]] = {
    "monolithicSparse": {"grain_size": 4 * KIB},
    "monolithicFlat": {},
    "twoGbMaxExtentSparse": {"grain_size": 4 * KIB, "extent_size": MIB},
    "twoGbMaxExtentFlat": {"extent_size": MIB},
    "vmfs": {},
    "vmfsSparse": {},
}


def make(folder: Path, kind: str, size: int, name: str = "disk.vmdk", **options: Any) -> Path:
    create_image(folder / name, size, kind=kind, **{**KINDS[kind], **options})
    return folder / name


def faults(path: Path, *but: str) -> list[str]:
    """What check finds, but for space that is used by nothing."""
    found = check_image(path).findings
    return [finding.slug for finding in found if finding.slug not in ("unused-space", *but)]
