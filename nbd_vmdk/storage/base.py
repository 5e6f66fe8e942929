"""Where bytes live: the seam between the engine and files, tar members or remote objects.

A storage is positional: every call says where, none remembers a position, so any number of threads may
use one.  Calls do the whole amount or raise; a short read is an error, never padding.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from nbd_vmdk.errors import Truncated, WriteRefused


class Storage(ABC):
    """A row of bytes with a size.

    ``name`` is what the user would call it, for messages.  ``writable`` tells whether the writing calls
    work; on a storage that is not, they raise WriteRefused.  A buffer handed in is never kept: nbdkit's
    request buffers are C memory that is gone after the call.
    """

    name: str
    writable: bool = False
    #: It is thrown away in the end: nothing in it need outlive the system, and sync does nothing.
    fleeting: bool = False
    #: It is in memory alone: a sync makes nothing safer.
    in_memory: bool = False
    #: Somebody writes it from front to back and will sync it: what is written is sent to the disk at once,
    #: while the next is made, rather than all of it when the sync asks.  A wish; the result is the same.
    write_behind: bool = False

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes there now (a file may grow)."""

    @property
    @abstractmethod
    def identity(self) -> tuple[int, ...]:
        """Equal for two storages that are the same bytes, such as (device, inode)."""

    @abstractmethod
    def read_into(self, buf: memoryview, at: int) -> None:
        """Fill all of ``buf`` from byte ``at`` on; Truncated if the end comes first."""

    def read(self, at: int, length: int) -> bytes:
        """``length`` bytes from ``at``; Truncated if the end comes first."""
        if at + length > self.size:
            # Checked before memory is asked for: lengths come from untrusted headers.
            raise Truncated(self.name, what="a read", need=at + length, have=self.size)
        buf = bytearray(length)
        self.read_into(memoryview(buf), at)
        return bytes(buf)

    def write(self, buf: bytes | bytearray | memoryview, at: int) -> None:
        """Write all of ``buf`` at ``at``, growing the file if need be."""
        raise WriteRefused(self.name, why="it is open for reading only")

    def zero(self, at: int, length: int) -> None:
        """Make a range read as zeros and keep its space.

        Only what lies inside the file is touched; the size never changes.
        """
        raise WriteRefused(self.name, why="it is open for reading only")

    def punch(self, at: int, length: int) -> None:
        """Make a range read as zeros and give its space back where the file system can.

        The range may lie beyond the end; the size never changes.
        """
        raise WriteRefused(self.name, why="it is open for reading only")

    def share(self, other: "Storage", at: int, length: int, to: int) -> bool:
        """Make ``length`` bytes from ``at`` of ``other`` lie at ``to`` without copying them.

        Both files have the same blocks then, until one of them is written to.  False where that can't be, as
        on most file systems; then nothing has changed, and copying will tell of errors.
        """
        return False

    def zeroes_fast(self, *, punch: bool) -> bool:
        """Whether zeroing, or punching, costs no writing of zeros, as far as is known.

        What a file system can't do is learned when it is asked to do it first.
        """
        return True

    def truncate(self, size: int) -> None:
        """Make the file exactly ``size`` bytes; what is new reads as zeros."""
        raise WriteRefused(self.name, why="it is open for reading only")

    def sync(self) -> None:
        """Return when all that was written is durable (also the size)."""
        raise WriteRefused(self.name, why="it is open for reading only")

    def advise(self, at: int, length: int) -> None:  # noqa: B027  a hint may be ignored
        """Say that a range will be read soon."""

    def segments(self, at: int, length: int) -> Iterator[tuple[int, bool]]:
        """Split a range into (length, is data); what is not data is known to read as zeros.

        The lengths add up to ``length``.  What lies beyond the end counts as data: nothing is known of
        it, and a read will tell.  Neighbours may be alike; none is empty.
        """
        if length:
            yield length, True

    @property
    def allocated(self) -> int:
        """Bytes really occupied, as ``du`` counts them."""
        return self.size

    def lock(self, writable: bool) -> str | None:
        """Keep other processes from writing it (and, if ``writable``, from relying on it) until closed.

        Returns a warning for the user, or None.  Raises InUse if another process stands in the way of our
        writing; a reader is only warned.
        """
        return None

    def writer(self) -> str | None:
        """What another process that writes it is doing, in words, or None; takes no lock."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of it, locks included; StorageError if only now something turns out not to be written.

        A second call does nothing.
        """
