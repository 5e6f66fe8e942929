"""What looks at whole disks: compare, checksum, read, write, what changed, the picture."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbd_vmdk.cli import main
from tests.images import desc
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image

ROOT = Path(__file__).parents[2]
GRAIN = 64 * KIB


def raw_file(folder: str, name: str, content: Content) -> str:
    """The content as a raw file with holes; its path."""
    path = os.path.join(folder, f"{name}.img")
    desc.write_flat(path, content)
    return path


def _path(build: Callable[..., Image], **options: Any) -> Callable[[str, str, Content], str]:
    return lambda folder, name, content: build(folder, name, content, **options).path


#: Ways to store a content; each gives the path to open.  All of them show holes as zeros.
KINDS: dict[str, Callable[[str, str, Content], str]] = {
    "sparse": _path(desc.monolithic_sparse),
    "stream": _path(desc.stream_optimized),
    "split": _path(desc.split_sparse, extent_sectors=700),
    "flat": _path(desc.monolithic_flat),
    "cowd": _path(desc.vmfs_sparse),
    "sesparse": _path(desc.se_sparse),
    "raw": raw_file,
}


def differing(one: bytes, other: bytes) -> list[tuple[int, int]]:
    """The plainest way to find (offset, length) of the sectors that differ, neighbours together."""
    size = max(len(one), len(other))
    one, other = one.ljust(size, b"\0"), other.ljust(size, b"\0")
    found: list[tuple[int, int]] = []
    for at in range(0, size, SECTOR):
        step = min(SECTOR, size - at)
        if one[at : at + step] != other[at : at + step]:
            if found and sum(found[-1]) == at:
                found[-1] = found[-1][0], found[-1][1] + step
            else:
                found.append((at, step))
    return found


def command(*arguments: str | os.PathLike[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run nbd-vmdk as a user would, in a process of its own if that needs ``options``."""
    words = [os.fspath(word) for word in arguments]
    if options:
        whole = [sys.executable, "-m", "nbd_vmdk", *words]
        done = subprocess.run(whole, capture_output=True, check=False, cwd=ROOT, **options)
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done
    said = []
    with contextlib.ExitStack() as stack:
        # Files, because a disk's bytes go by descriptor.
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
        streams = [stack.enter_context(io.TextIOWrapper(file, "utf-8", write_through=True)) for file in files]
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            code = main(words)
        for stream, file in zip(streams, files, strict=True):
            stream.flush()
            file.seek(0)
            said.append(file.read())
    return subprocess.CompletedProcess(words, code, *said)


def answer(done: subprocess.CompletedProcess[bytes]) -> Any:
    """The JSON that a command printed."""
    return json.loads(done.stdout)


__all__ = ["GRAIN", "KIB", "KINDS", "MIB", "SECTOR", "Content", "answer", "command", "differing", "raw_file"]
