"""The contract of an extent, on one screen: an extent maps, and reading goes by that.

A link is a row of extents; a chain is a row of links.  All of them are asked one question, "what backs the
bytes from here on?", and answer with a mapping; reading, block status, ``map`` and checking are loops over
the answers (see disk.py), so they cannot disagree.  What an extent reads or writes at once, without being
asked that question, must be what its map says.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import ClassVar, Final, Protocol

from nbd_vmdk.pages import Changes
from nbd_vmdk.storage.base import Storage


class Kind(IntEnum):
    """What backs a range of guest bytes."""

    HOLE = 0  #: nothing here: the parent's bytes, or zeros if there is no parent
    ZERO = 1  #: zeros, whatever the parent has
    DATA = 2  #: bytes of a file, as they are
    PACKED = 3  #: bytes that must be inflated
    LOST = 4  #: bytes that can't be read: a read fails with EIO


#: Kinds of mapping that read as zeros once no parent is left to ask.
NOTHING: Final = (Kind.HOLE, Kind.ZERO)


class Source(Protocol):
    """Where the bytes of a DATA, PACKED or LOST range come from: a storage, or what stands before it."""

    @property
    def name(self) -> str:
        """The file, for messages."""

    def read_into(self, buf: memoryview, at: int) -> None:
        """Fill ``buf`` from ``at``, in the source's own counting, or raise."""

    def advise(self, at: int, length: int) -> None:
        """Say that a range will be read soon."""


#: (kind, length, source, at): the first ``length`` bytes of the range that was asked about are backed by
#: ``source`` from ``at`` on.  Source is None for HOLE and ZERO.  A plain tuple, because one is made for
#: every request that is not answered at once.
Mapping = tuple[Kind, int, Source | None, int]

#: (places, something): from the first place on there is something, or nothing, and at each further place that
#: changes.  Nothing is what reads as zeros.
Edges = tuple[list[int], bool]

#: Fills a buffer with the bytes of an extent, a link or a disk from an offset on, or raises.
Reader = Callable[[memoryview, int], None]

#: Writes a buffer at an offset of an extent or a link, and tells the extent; None, with nothing done, where
#: that takes more than a look at a table in memory.
Writer = Callable[[memoryview, int], "WritableExtent | None"]

#: Fills a buffer with what the links below hold at an offset of this extent (copy-on-write needs it).
Below = Callable[[memoryview, int], None]


class Extent(ABC):
    """A run of guest bytes backed by one file, or by nothing.

    Offsets are in bytes from the extent's own start, and callers stay inside ``size``.  Any number of
    threads may call at once.  ``storage`` is None where there is no file.
    """

    type_word: ClassVar[str]  #: what a descriptor calls the kind
    storage: Storage | None = None
    size: int
    grain: int = 0  #: bytes of the allocation unit, 0 if there is none
    origin: int = 0  #: guest byte of the disk at which it begins, for messages

    def place(self, origin: int) -> None:
        """Tell the extent where in the disk it is."""
        self.origin = origin

    @abstractmethod
    def map(self, offset: int, length: int) -> Mapping:
        """What backs the bytes at ``offset``: the first piece, at most ``length`` long, cheap to find."""

    def runs(self, offset: int, length: int) -> Iterator[Mapping]:
        """What backs the whole range, in as much detail as the file system can tell."""
        end = offset + length
        while offset < end:
            mapping = self.map(offset, end - offset)
            yield mapping
            offset += mapping[1]

    def edges(self, offset: int, length: int) -> Iterator[Edges]:
        """Where in a range something begins or ends, if no parent fills the holes: runs() in short.

        That is all that NBD clients are told.  Two Edges in a row may say the same: then nothing changes.
        """
        for kind, count, _source, _at in self.runs(offset, length):
            yield [offset], kind not in NOTHING
            offset += count

    def presence(self, offset: int, length: int, unit: int) -> bytes:
        """For each ``unit`` of a range a byte: 0 if all of it is a hole.

        1 says nothing; it is for those who look for holes in bulk, and ask :meth:`map` where there is none.
        """
        return b"\1" * -(-length // unit)

    def reader(self, otherwise: Reader) -> Reader:
        """A function that reads at once what takes no more than a look and a call of the kernel.

        Nearly every small request is of that sort, and a step through each layer would cost it more than the
        look.  All else it leaves to ``otherwise``: ranges in several pieces, tables that are not in memory,
        ranges outside the extent, and every error, which is met there again and told.
        """
        return otherwise

    def close(self) -> None:
        """Let go of the file."""
        if self.storage is not None:
            self.storage.close()


def _write_nothing(_buf: memoryview, _offset: int) -> None:
    return None


class WritableExtent(Extent):
    """An extent of a kind that can be written in place, and is if its file is open for writing.

    It is also what commit.py calls a Member: tables and flags of its own are told here; a kind that has none,
    as flat files, leaves these as they are.
    """

    storage: Storage
    writable: bool = False
    #: Set by every write, cleared by the commit that makes it durable.
    touched: bool = False
    #: Set where ``held`` has grown, cleared by who has looked at it.
    holds_more: bool = False
    #: Commits are to be made only when they are asked for.
    lazy: bool = False
    #: What writes must be a multiple of, and lie at, in bytes.
    minimum_block: int = 1
    #: All that may hold dirty pages, in the order in which they must be written.
    tables: Sequence[Changes] = ()
    #: Byte positions of grains that have been freed, until a commit takes them.
    freed: Sequence[int] = ()

    @abstractmethod
    def write(self, buf: memoryview, offset: int, below: Below | None) -> None:
        """Write ``buf``.  ``below`` reads the parent; None says that there is none."""

    def writer(self, *, alone: bool) -> Writer:
        """A function that writes at once what is there in one piece, as :meth:`reader` reads.

        ``alone`` says that there is no parent: then what is not there yet may be made, too.
        """
        return _write_nothing

    def share(self, other: Storage, at: int, offset: int, length: int) -> bool:
        """Make bytes of ``other`` from ``at`` on those at ``offset`` without copying them; see Storage.

        False where that can't be, or is not for this kind.
        """
        return False

    @abstractmethod
    def zero(self, offset: int, length: int, below: Below | None, *, may_trim: bool) -> None:
        """Make a range read as zeros; ``may_trim`` allows giving its space back."""

    @abstractmethod
    def trim(self, offset: int, length: int, below: Below | None) -> None:
        """Give the space of a range back where that is possible; what it reads as is then undefined."""

    def must_write_zeros(self, offset: int, length: int, below: Below | None, *, may_trim: bool) -> bool:
        """Tell whether some of a range could only be zeroed by writing zeros.

        Once False this stays so, whatever other threads do; but a file system may show only when it is asked
        that it has no other way of zeroing.
        """
        return not self.storage.zeroes_fast(punch=may_trim)

    def announce(self) -> None:
        """Write what must be durable before the tables that a commit has just copied."""

    @property
    def held(self) -> int:
        """Bytes of memory that only a commit gives back."""
        return 0

    def take_freed(self) -> list[int]:
        """What is in ``freed``, which is then empty."""
        return []

    def release(self, positions: list[int]) -> None:
        """Give space back that no durable table entry names any more."""

    def finish(self) -> None:
        """End a session of writing, after its last commit: mark the file as closed cleanly."""
