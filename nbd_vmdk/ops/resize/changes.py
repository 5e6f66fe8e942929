"""What a resize consists of: steps that are told before they are done, in an order that may stop anywhere."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nbd_vmdk.errors import StorageError
from nbd_vmdk.ops.rewrite import real_path
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB

_PIECE: Final = MIB


@dataclass(frozen=True, slots=True)
class Change:
    """One step: what it does, in words, and the doing, after which it is durable.

    ``rehearse`` raises what would keep it from being done; it is called before the first step.
    """

    text: str
    apply: Callable[[], None]
    rehearse: Callable[[], None] = lambda: None


def is_zero(storage: Storage, at: int, length: int) -> bool:
    """Whether a range of a file reads as zeros; holes are not read."""
    for count, is_data in storage.segments(at, length):
        end = at + count
        while is_data and at < end:
            piece = storage.read(at, min(_PIECE, end - at))
            if piece.count(0) != len(piece):
                return False
            at += len(piece)
        at = end
    return True


def grow_file(storage: Storage, size: int, *, reserve: bool) -> None:
    """Make a file ``size`` bytes long at least, durably; what is new reads as zeros.

    With ``reserve`` its space is taken at once.  Raises StorageError; then the file is as long as before.
    """
    old = storage.size
    if old >= size:
        return
    if not reserve:
        storage.truncate(size)
    else:
        try:
            fd = os.open(real_path(storage), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.posix_fallocate(fd, old, size - old)
            finally:
                os.close(fd)
        except OSError as error:
            storage.truncate(old)
            raise StorageError.of(error, storage.name, f"reserve {size - old} bytes") from error
    storage.sync()
