"""What killed makers of new files left behind: their temporary folders (see newfiles.py).

A living maker holds a lock on its own, and gives it the name by which it is recognized only then.  One that
was killed before that has left an empty folder, which is recognized by its age.
"""

import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nbd_vmdk.storage.moving import identity_of, lstat

#: Where, in a temporary folder, files that are being replaced are kept under their own names.
OLD: Final = ".old"
#: Seconds in which a maker surely locks the temporary folder that he has made.
_YOUNG: Final = 60


def sweep(folder: int, prefix: str, main: str) -> str | None:
    """Remove the temporary folders of this target whose makers are dead, and what they had named.

    ``main`` is the file that its maker would have named last: as long as it is in the temporary folder, what
    also has a name in ``folder`` is a part of nothing.  The name of one that must be kept, because it came
    between replacing one file and another; else None.
    """
    kept = None
    for name in _named(folder, prefix):
        try:
            with _own(folder, name) as fd:
                if not lock_folder(fd):
                    continue
                if _is_needed(folder, fd):
                    kept = name
                else:
                    if lstat(fd, main):
                        _withdraw(folder, fd)
                    shutil.rmtree(name, ignore_errors=True, dir_fd=folder)
        except OSError:
            pass  # what can't be tidied up is in nobody's way
    return kept


def sweep_empty(folder: int, prefix: str) -> None:
    """Remove what makers left who were killed before their temporary folders had their lock and name.

    These are empty, and not of just now: a living maker is about to lock his own.
    """
    for name in _named(folder, prefix):
        try:
            with _own(folder, name) as fd:
                is_old = time.time() - os.fstat(fd).st_mtime > _YOUNG
                if is_old and not os.listdir(fd) and lock_folder(fd):
                    os.rmdir(name, dir_fd=folder)
        except OSError:
            pass  # as above


def _named(folder: int, prefix: str) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.startswith(prefix)]
    except OSError:
        return []  # a folder in which files may be made, and which may not be listed


@contextmanager
def _own(folder: int, name: str) -> Iterator[int]:
    """Open one of this user's folders; PermissionError for another's, OSError for what is none."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        yield fd
    finally:
        os.close(fd)


def _is_needed(folder: int, left: int) -> bool:
    """Whether the temporary folder ``left`` has files that are part of a whole with those in ``folder``."""
    pending = [name for name in os.listdir(left) if not _is_named(folder, left, name)]
    if pending == [OLD] or OLD not in pending:
        return False  # all were replaced, or none
    fd = os.open(OLD, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=left)
    try:
        for name in os.listdir(fd):
            old, there = lstat(fd, name), lstat(folder, name)
            if old and not (there and identity_of(there) == identity_of(old)):
                return True
        return False
    finally:
        os.close(fd)


def _is_named(folder: int, left: int, name: str) -> bool:
    """Whether a file of the temporary folder ``left`` has the same name in ``folder``, too."""
    made, there = lstat(left, name), lstat(folder, name)
    return made is not None and there is not None and identity_of(made) == identity_of(there)


def _withdraw(folder: int, left: int) -> None:
    """Take the names in ``folder`` from the files of ``left``; what got more names since is somebody's."""
    for name in os.listdir(left):
        made = lstat(left, name)
        if made and stat.S_ISREG(made.st_mode) and made.st_nlink == 2 and _is_named(folder, left, name):
            os.unlink(name, dir_fd=folder)


def lock_folder(fd: int) -> bool:
    """Hold a folder as long as ``fd`` is open; False if another does, or the file system can't."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
