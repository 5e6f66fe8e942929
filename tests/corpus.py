"""
The corpus of real images, which lives outside of the project: $NBD_VMDK_CORPUS names its folder.

manifest.json there lists entries: name, the file to open, whether it must be opened or refused, the SHA-256
of the guest's bytes, and its files, which are stored as they are or as gzip. Files are unpacked when a test
asks for an entry, once for all tests and all processes of a run.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from typing import Any, BinaryIO, cast

import pytest
from isal import igzip

Entry = dict[str, Any]

_BLOCK = 1 << 20
_ZEROS = bytes(_BLOCK)


def folder() -> str | None:
    return os.environ.get("NBD_VMDK_CORPUS") or None


def entries(expected: str) -> list[Any]:
    """Parameters for one test of each entry that must be opened ("open") or refused ("refuse")."""
    where = folder()
    if where is None:
        reason = "NBD_VMDK_CORPUS does not name the corpus of real images"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="no-corpus")]
    with open(os.path.join(where, "manifest.json"), encoding="utf-8") as file:
        found: list[Entry] = json.load(file)
    return [pytest.param(entry, id=entry["name"]) for entry in found if entry["expected"] == expected]


def unpack(entry: Entry, where: str) -> str:
    """Put an entry's files below a folder, unless they are there already; the path of the one to open."""
    stored = folder()
    assert stored is not None
    with open(os.path.join(where, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for file in entry["files"]:
            to = os.path.join(where, file["path"])
            if not os.path.exists(to):
                os.makedirs(os.path.dirname(to), exist_ok=True)
                copy(os.path.join(stored, "images", file["stored"]), to, packed=file["packed"] == "gz")
                assert os.path.getsize(to) == file["size"], f"{to} is not as the manifest says"
    return os.path.join(where, entry["open"])


def copy(source: str, to: str, *, packed: bool) -> None:
    """Copy a file, unpacked, leaving holes where there are zeros."""
    if not packed:
        shutil.copyfile(source, to)
        return
    with cast("BinaryIO", igzip.open(source, "rb")) as taken, open(to, "wb") as given:
        while block := taken.read(_BLOCK):
            if block == _ZEROS[: len(block)]:
                given.seek(len(block), os.SEEK_CUR)
            else:
                given.write(block)
        given.truncate()
