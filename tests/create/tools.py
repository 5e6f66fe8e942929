"""What the tests of making images share: QEMU's tools as oracles, and our own check."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk.ops.check.runner import check_image

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

#: Kinds that stand alone, and those of them that the engine writes.
WHOLE = (
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
    "vmfs",
    "vmfsSparse",
)
CHILDREN = ("monolithicSparse", "twoGbMaxExtentSparse", "vmfsSparse")


def qemu(*words: str | os.PathLike[str]) -> str:
    """What qemu-img says; it must not fail."""
    done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def qemu_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu("info", "--output=json", path))
    return found


def qemu_bytes(path: str | os.PathLike[str]) -> bytes:
    """The whole disk as QEMU reads it."""
    target = Path(f"{os.fspath(path)}.raw")
    qemu("convert", "-f", "vmdk", "-O", "raw", path, target)
    found = target.read_bytes()
    target.unlink()
    return found


def sound(path: str | os.PathLike[str], **options: Any) -> None:
    """Our check finds nothing at all."""
    report = check_image(path, data=True, **options)
    assert not report.findings, report.findings


def names(folder: str | os.PathLike[str]) -> list[str]:
    return sorted(os.listdir(folder))
