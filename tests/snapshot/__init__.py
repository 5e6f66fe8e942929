"""
Trees of links for the tests of snapshots: made small and quickly, and remembered by what they show.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.errors import VmdkError
from nbd_vmdk.ops.create import create_image
from nbd_vmdk.ops.snapshot.create import create_child
from nbd_vmdk.units import KIB, MIB

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

SIZE = 2 * MIB
BASE, MIDDLE, TOP = "disk.vmdk", "disk-000001.vmdk", "disk-000002.vmdk"


def make_base(folder: Path, kind: str = "monolithicSparse", *, name: str = BASE, size: int = SIZE) -> Path:
    grain = 4 * KIB if "Sparse" in kind and kind != "vmfsSparse" else None
    create_image(folder / name, size, kind=kind, grain_size=grain)
    return folder / name


def make_child(parent: Path, child: Path | str | None = None, **options: Any) -> Path:
    return Path(create_child(parent, child, **options).path)


def scribble(path: Path, seed: int, pieces: int = 12, **options: Any) -> None:
    """Write pieces of random data and of zeros all over the disk, some of them odd in place and length."""
    rng = random.Random(seed)
    with open_disk(path, writable=True, **options) as disk:
        for _ in range(pieces):
            length = rng.choice((512, 4096, 40_000, 100))
            at = rng.randrange(0, disk.size - length)
            at -= at % rng.choice((1, 512, 4096))
            if rng.random() < 0.25:
                disk.zero(length, at, may_trim=rng.random() < 0.5)
            else:
                disk.pwrite(rng.randbytes(length), at)


def shows(path: Path, **options: Any) -> bytes:
    with open_disk(path, **options) as disk:
        return disk.pread(disk.size, 0)


def shows_or_refused(path: Path, **options: Any) -> bytes | None:
    """What a disk shows, None if it is refused with a word of ours."""
    try:
        return shows(path, **options)
    except VmdkError:
        return None


def make_chain(
    folder: Path, base: str = "monolithicSparse", *, size: int = SIZE, seed: int = 0, **options: Any
) -> list[Path]:
    """disk.vmdk, disk-000001.vmdk on it and disk-000002.vmdk on that, each with data of its own."""
    links = [make_base(folder, base, size=size)]
    scribble(links[0], seed + 1)
    for number in (2, 3):
        links.append(make_child(links[-1], **options))
        scribble(links[-1], seed + number)
    return links


def by_qemu(path: Path) -> bytes:
    raw = path.with_name("by-qemu.raw")
    subprocess.run(
        ["qemu-img", "convert", "-U", "-f", "vmdk", "-O", "raw", path, raw], check=True, capture_output=True
    )
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


#: What changes files: a process is killed before one of these.
_STEPS = ("pwrite", "fdatasync", "fsync", "ftruncate", "link", "rename", "unlink")


@contextmanager
def steps_told(told: Callable[[str], None]) -> Iterator[None]:
    """Call ``told`` before everything that this process does to files."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _STEPS:
            patch.setattr(os, name, _telling(name, getattr(os, name), told))
        yield


def _telling(name: str, call: Callable[..., Any], told: Callable[[str], None]) -> Callable[..., Any]:
    def tells(*args: Any, **kwargs: Any) -> Any:
        told(name)
        return call(*args, **kwargs)

    return tells


class PowerCuts:
    """What a loss of power could leave of a folder, at every step of some work on it.

    Of each file the bytes are there that were synced last.  Names are those of the last sync of the folder
    (``lazy``), or those of that moment: a file system may write them down earlier than what is in the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._durable = {entry.stat().st_ino: entry.read_bytes() for entry in folder.iterdir()}
        self._names = self._now()
        #: Names to inodes, inodes to bytes.
        self.states: list[tuple[dict[str, int], dict[int, bytes]]] = []

    def _now(self) -> dict[str, int]:
        return {entry.name: entry.stat().st_ino for entry in self.folder.iterdir()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "fdatasync"):
                patch.setattr(os, name, self._syncing(getattr(os, name)))
            with steps_told(self._note):
                yield
        self._note("end")

    def _note(self, _step: str) -> None:
        for names in (self._names, self._now()):
            state = names, {inode: self._durable.get(inode, b"") for inode in names.values()}
            if state not in self.states:
                self.states.append(state)

    def _syncing(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def syncs(fd: int) -> None:
            call(fd)
            found = os.fstat(fd)
            if stat.S_ISDIR(found.st_mode):
                self._names = self._now()
            else:
                self._durable[found.st_ino] = os.pread(fd, found.st_size, 0)

        return syncs

    def __iter__(self) -> Iterator[None]:
        """Put the folder into one of these states after the other."""
        for names, contents in self.states:
            for entry in self.folder.iterdir():
                entry.unlink()
            made: dict[int, Path] = {}
            for name, inode in names.items():
                path = self.folder / name
                if inode in made:
                    path.hardlink_to(made[inode])
                else:
                    path.write_bytes(contents[inode])
                    made[inode] = path
            yield


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a process of its own that is killed at that step; False if it ended before."""
    child = os.fork()
    if not child:
        try:
            left = step

            def told(_name: str) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            with steps_told(told):
                work()
            os._exit(0)
        finally:
            os._exit(1)
    _pid, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the work failed by itself"
    return False
