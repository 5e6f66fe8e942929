"""Where runs write on disk, and what is in the page cache.

A block of a virtual or a new disk that nobody has written yet takes several times as long to write as one
that has been used, and which run meets such blocks is chance: a ratio of speeds then means nothing.  Removing
files does not help, because ext4 walks on over the disk instead of taking the blocks just freed, and a file
system mounted with ``discard`` makes them new again.  So runs write to a small file system of their own, in
one large file that was written in full before (:class:`WornDisk`): whatever it gives out has been used.
"""

import os
import random
import shutil
import subprocess
import sys
from typing import Self

from nbd_vmdk.units import GIB, MIB

#: More than what all copies that are kept and the largest run need together.
_SIZE = 6 * GIB
#: Nothing is left for the kernel to initialise while runs are measured, nor given back to the disk below.
_MADE_AT_ONCE = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"


class WornDisk:
    """A folder on a file system whose blocks have all been written; a context manager.

    It takes root and a loop device.  Where they can't be had it is an ordinary folder, and ``words`` says
    so.
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.join(folder, "work")
        self.words = "a file system in a file written before, on a loop device with direct I/O"
        self._file = os.path.join(folder, "arena")
        self._mounted = False

    def __enter__(self) -> Self:
        if os.path.ismount(self.folder):  # left by a run that was killed
            _run("umount", self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        try:
            self._mount()
            self._mounted = True
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or str(error)
            self.words = "an ordinary folder: blocks may be new ones, and ratios of writes chance"
            print(f"note: runs write to {self.words} ({why.strip()})", file=sys.stderr)
        return self

    def _mount(self) -> None:
        if os.geteuid() != 0:
            raise PermissionError("only root can mount")
        if not os.path.exists(self._file):
            _write_noise(self._file + ".new", _SIZE)
            os.rename(self._file + ".new", self._file)
        _run("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-E", _MADE_AT_ONCE, self._file)
        device = _run("losetup", "--find", "--show", "--direct-io=on", self._file)
        try:
            _run("mount", "-t", "ext4", "-o", "noatime,nodiscard", device, self.folder)
        finally:
            _run("losetup", "--detach", device)  # it stays until the file system is unmounted

    def settle(self) -> None:
        """Return when nothing is left to be written back beside the next run."""
        _run("sync", "--file-system", self.folder)

    def __exit__(self, *_: object) -> None:
        if self._mounted:
            _run("umount", self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)


def _run(*command: str) -> str:
    environment = os.environ | {"PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, env=environment)
    return done.stdout.strip()


def _write_noise(path: str, size: int) -> None:
    noise = random.Random("arena").randbytes(MIB)
    with open(path, "wb") as file:
        file.writelines(noise for _ in range(size // MIB))
        os.fsync(file.fileno())


def drop_from_cache(path: str) -> None:
    """Have the page cache forget a file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # dirty pages would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def bring_into_cache(path: str) -> None:
    """Read a file's data, holes left out, so that it is in the page cache."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(MIB)
        at = 0
        while True:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            except OSError:  # no more data
                return
            while at < end:
                at += os.preadv(file.fileno(), [memoryview(buffer)[: end - at]], at)
