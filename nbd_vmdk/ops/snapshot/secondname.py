"""Giving a file a second name and taking one away, each durable, each harmless to repeat."""

import errno
import os
from collections.abc import Iterable
from typing import Final

from nbd_vmdk.errors import FileExists, StorageError, WriteRefused
from nbd_vmdk.ops.rewrite import sync_folder

#: What a file system says that has no hard links (or whose administrator forbids them).
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES})


def add_name(now: str, new: str) -> None:
    """Let the file ``now`` also be called ``new``; only so, where the file system has no hard links.

    Raises FileExists if another file has that name, StorageError.
    """
    try:
        if _same(now, new):
            return
        try:
            os.link(now, new, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(new):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            os.rename(now, new)
    except FileExistsError as error:
        raise FileExists(new) from error
    except OSError as error:
        raise StorageError.of(error, now, f"give it the name {os.path.basename(new)}") from error
    sync_folder(os.path.dirname(new))


def drop_name(name: str, kept: str) -> None:
    """Take ``name`` away from the file that is also called ``kept``.

    Raises WriteRefused if another file has the name, StorageError.
    """
    try:
        if name == kept or not os.path.lexists(name):
            return
        if not _same(name, kept):
            raise WriteRefused(
                name, why="another file has this name, which is needed", hint="move it away first"
            )
        os.unlink(name)
    except OSError as error:
        raise StorageError.of(error, name, "take this name away") from error
    sync_folder(os.path.dirname(name))


def keep_one_name(kept: str, others: Iterable[str]) -> None:
    """Take those of ``others`` away from the file ``kept`` that are names of it; raises StorageError."""
    for name in others:
        try:
            is_same = name != kept and _same(name, kept)
        except OSError as error:
            raise StorageError.of(error, name, "look at this name") from error
        if is_same:
            drop_name(name, kept)


def _same(one: str, two: str) -> bool:
    """Whether both names lead to the same file, none of them by a symbolic link."""
    try:
        first, second = (os.stat(path, follow_symlinks=False) for path in (one, two))
    except FileNotFoundError:
        return False
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)
