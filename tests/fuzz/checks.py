"""
Check and repair: whatever a file holds, it is checked, a plan is made and carried out, and can be taken back.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.repair import apply_repair, undo_repair
from nbd_vmdk.ops.undo import undo_path
from tests.fuzz import case
from tests.fuzz.answers import our_errors
from tests.fuzz.images import folder_for_images

#: Files are compared by blocks of this size.
BLOCK = 64 << 10


def fuzz_check(data: bytes) -> None:
    """Several files (case.py), the first of which is checked; one that opens the fuzzer's way is repaired."""
    files = case.decode(data)
    with folder_for_images() as folder:
        paths = [file.write(folder) for file in files]
        if paths and paths[0] is not None:
            _check(paths[0], folder)


def _check(path: str, folder: str) -> None:
    report: dict[str, Any] = {}
    with our_errors():
        report = check_image(path, data=True).as_dict()
        json.dumps(report)
    if not report.get("findings"):
        return
    before = _content(folder)
    with our_errors():
        plan, left = apply_repair(path)
        json.dumps(plan.as_dict())
        if plan.chosen:
            mended = {id(finding) for _repair, findings in plan.chosen for finding in findings}
            assert mended
            assert len(left.findings) < len(plan.report.findings) + 100, "repairing made it much worse"
    if os.path.exists(undo_path(path)):
        undo_repair(path)
        assert _content(folder) == before, "what was repaired is not what it was after the undo"


def _content(folder: str) -> dict[str, tuple[int, str]]:
    """Size and a hash of every file; huge holes cost nothing."""
    return {
        name: _sum(os.path.join(folder, name)) for name in sorted(os.listdir(folder)) if ".undo" not in name
    }


def _sum(path: str) -> tuple[int, str]:
    if os.path.islink(path) or not os.path.isfile(path):
        return 0, ""
    digest = hashlib.blake2b()
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break  # nothing but a hole follows
            at -= at % BLOCK
            block = os.pread(file.fileno(), BLOCK, at)
            if any(block):  # zeros that are written are as good as a hole
                digest.update(b"%d:" % at + block)
            at += BLOCK
    return size, digest.hexdigest()
