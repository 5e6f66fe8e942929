"""Private folders for what need not outlive us, removed in the end: by us, or by the next one after a crash.

Its owner holds a lock on a folder, which the kernel drops with the process, whatever becomes of that.  Who
makes a folder of his own removes those of the same kind beside it that are his user's and that nobody holds.

Where scratch disks are: what is thrown away may still be as large as the disks that are written to.  ``/tmp``
is often in memory, so it is ``$TMPDIR`` or else ``/var/tmp``, unless the user names a place.
"""

import fcntl
import os
import shutil
import stat
import tempfile
from typing import Self

from nbd_vmdk.errors import OptionError, StorageError

_PREFIX = "nbd-vmdk-scratch-"


def scratch_place() -> str:
    """The folder to make scratch folders in."""
    usual = os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108  mkdtemp makes a folder of mode 0700
    return usual if os.path.isdir(usual) else tempfile.gettempdir()


class HeldFolder:
    """A new folder ``path`` in ``where`` that only this user can enter; a context manager that removes it.

    Its name, and that of all of its kind, begins with ``prefix``.  Raises StorageError if none can be made.
    """

    def __init__(self, where: str, prefix: str) -> None:
        _sweep(where, prefix)
        try:
            self.path, self._held = _make(where, prefix)
        except OSError as error:
            raise StorageError.of(error, where, "make a folder") from error

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class ScratchFolder(HeldFolder):
    """A folder in ``place`` for disks that are thrown away.  Raises OptionError if that is no folder."""

    def __init__(self, place: str | os.PathLike[str] | None = None) -> None:
        where = os.path.abspath(place or scratch_place())
        if not os.path.isdir(where):
            raise OptionError(where, why="is no folder", hint="name one that is there with --scratch-dir")
        super().__init__(where, _PREFIX)


def _make(where: str, prefix: str) -> tuple[str, int]:
    while True:
        path = tempfile.mkdtemp(prefix=prefix, dir=where)
        try:
            held = _lock(path, fcntl.LOCK_EX)
        except FileNotFoundError:
            continue  # somebody swept it before it was ours
        if os.path.lexists(path):
            return path, held
        os.close(held)


def _lock(path: str, how: int) -> int:
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(held, how)
    except BaseException:
        os.close(held)
        raise
    return held


def _sweep(where: str, prefix: str) -> None:
    """Remove what dead processes of this user have left."""
    try:
        names = [name for name in os.listdir(where) if name.startswith(prefix)]
    except OSError:
        return  # a folder may be made in a place that may not be listed
    for name in names:
        path = os.path.join(where, name)
        try:
            there = os.lstat(path)
            if there.st_uid != os.geteuid() or not stat.S_ISDIR(there.st_mode):
                continue
            held = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # it is in use, or gone
        try:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(held)
