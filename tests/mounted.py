"""File systems of a test's own, mounted from a file; tests that need one are skipped where none can be."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0"),
    "btrfs": ("mkfs.btrfs", "-q"),
    "xfs": ("mkfs.xfs", "-q"),
}

# A user's PATH has no such folders on Debian, nor has root's behind a plain su.
FINDING_ALL = {**os.environ, "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"}


@contextmanager
def mounted(place: Path, kind: str, size: int) -> Iterator[str]:
    """A folder with a new file system of ``size`` bytes in it; ``place`` is where all that is kept."""
    where = place / f"mounted-{kind}"
    where.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(where)]
    else:
        image = place / f"image-{kind}"
        with open(image, "wb") as file:
            file.truncate(size)
        try:
            subprocess.run([*_MKFS[kind], str(image)], check=True, capture_output=True, env=FINDING_ALL)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no {kind} can be made: {error}")
        command = ["mount", "-o", "loop", str(image), str(where)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"nothing can be mounted: {error}")
    if done.returncode:
        pytest.skip(f"nothing can be mounted: {done.stderr.strip()}")
    try:
        yield str(where)
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)
