"""Moving a file to a name that must be free, between folders that are named by their descriptors.

The kernel's "do not replace" does it in one step.  A file system that does not know that takes a hard link,
which refuses as well; one that has no hard links either is asked whether the name is free, and then told to
take it, and another program may slip in between.
"""

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from typing import Final, cast

_NO_REPLACE: Final = 1
#: What a kernel or a file system says that does not know renameat2, a flag of it, or hard links.
NOT_KNOWN: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})


def lstat(folder: int, name: str) -> os.stat_result | None:
    """What is called ``name`` in a folder, itself and not what it leads to; None if nothing is."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None  # absent, or so odd that using the name will tell


def identity_of(found: os.stat_result) -> tuple[int, int]:
    """Equal for two names of one file."""
    return found.st_dev, found.st_ino


def move_only(source: int, target: int, name: str) -> None:
    """Move ``name`` from one folder to the other unless it is there; FileExistsError, OSError."""
    if _rename_noreplace(source, target, name):
        return
    if _link(source, target, name):
        os.unlink(name, dir_fd=source)
        return
    if lstat(target, name):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
    os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)


def link_or_move(source: int, target: int, name: str) -> None:
    """Give ``name`` a place in the other folder, too; where there are no hard links as move_only()."""
    if not _link(source, target, name):
        move_only(source, target, name)


def _link(source: int, target: int, name: str) -> bool:
    """Whether the file system made the hard link; False means that it knows none.  OSError for the rest."""
    try:
        os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NOT_KNOWN:
            raise
        return False
    return True


def _rename_noreplace(source: int, target: int, name: str) -> bool:
    """Whether the kernel did it; False means that it can't here.  OSError for anything else."""
    call = _libc_renameat2()
    if call is None:
        return False
    raw = os.fsencode(name)
    if call(source, raw, target, raw, _NO_REPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_KNOWN:
        return False
    raise OSError(number, os.strerror(number))


@functools.cache
def _libc_renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    # Python's os.rename takes no flags.  Some C libraries have no such function.
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return None
    call = libc.renameat2
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    call.restype = ctypes.c_int
    return cast("Callable[[int, bytes, int, bytes, int], int]", call)
