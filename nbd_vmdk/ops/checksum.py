"""The checksum of what a guest sees, the same for every kind of image that shows the same bytes.

The *plain* checksum is the hash of all bytes from first to last, what ``nbdcopy … - | sha256sum`` gives.
Zeros are hashed too, one after the other, so it takes as long as the disk is large.

The *tree* checksum takes as long as there is data, and all processors.  With H the hash function (SHA-256, or
BLAKE2b with its full 64 bytes), it is defined so:

    the disk is cut into blocks of 65536 bytes, the last one may be shorter
    block digest   H(bytes of the block)
    group digest   H(the digests of 256 blocks one after the other; the last group may have fewer)
    checksum       H(the disk's size in bytes as 8 bytes, little endian, then all group digests)

How an image stores its zeros makes no difference: a block of zeros has the digest of 65536 zeros, be it a
hole, a grain marked zero or zeros written out, and a group of such blocks a digest that is known as well.
These are computed once.  The size is part of it, so a disk that was grown has another checksum.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Final, NamedTuple, Protocol

from nbd_vmdk.errors import OptionError
from nbd_vmdk.ops.ahead import in_order
from nbd_vmdk.ops.content import Content, Range, data_ranges
from nbd_vmdk.ops.copy import Progress
from nbd_vmdk.ops.transfer import send
from nbd_vmdk.units import KIB, MIB

BLOCK: Final = 64 * KIB
GROUP: Final = 256 * BLOCK
_ZERO_BLOCK: Final = bytes(BLOCK)
#: Groups of zeros that one piece of work stands for.
_MANY: Final = 4096
#: Blocks that are read at once.
_TOGETHER: Final = MIB // BLOCK

ALGORITHMS: Final = ("sha256", "blake2b")


class _Digest(Protocol):
    """What hashlib makes."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def digest(self) -> bytes: ...

    def hexdigest(self) -> str: ...


_Hash = Callable[[bytes | memoryview], _Digest]


class _Group(NamedTuple):
    """A group and what of it is not known to be zeros; or, with no data, ``count`` whole groups."""

    offset: int
    length: int
    data: list[Range]


def plain_checksum(content: Content, algorithm: str = "sha256", progress: Progress | None = None) -> str:
    """The hash of all bytes, in hexadecimal.  Raises what reading raises."""
    total = _hash_function(algorithm)(b"")
    send(content, 0, content.size, total.update, progress=progress)
    return total.hexdigest()


def tree_checksum(content: Content, algorithm: str = "sha256", progress: Progress | None = None) -> str:
    """The tree checksum, in hexadecimal.  Raises what reading raises."""
    tree = _Tree(content, _hash_function(algorithm))
    total = tree.hash(content.size.to_bytes(8, "little"))
    done = 0
    with closing(in_order(tree.digest, tree.groups())) as digests:
        for digest, length in digests:
            total.update(digest)
            done += length
            if progress is not None:
                progress(done, content.size)
    return total.hexdigest()


def _hash_function(algorithm: str) -> _Hash:
    if algorithm not in ALGORITHMS:
        raise OptionError(None, why=f"{algorithm} is none of {', '.join(ALGORITHMS)}")
    # They are here to find changes, not to sign, so systems that forbid hashes may allow them.
    return lambda data: hashlib.new(algorithm, data, usedforsecurity=False)


class _Tree:
    """The groups of one disk, and their digests."""

    def __init__(self, content: Content, hash_: _Hash) -> None:
        self.hash = hash_
        self._content = content
        self._zero_block = hash_(_ZERO_BLOCK).digest()
        self._zero_group = hash_(self._zero_block * (GROUP // BLOCK)).digest()
        self._own = threading.local()

    def groups(self) -> Iterator[_Group]:
        """The disk from front to back, whole groups of zeros many at a time."""
        size = self._content.size
        done = 0
        data: list[Range] = []
        for offset, length in data_ranges(self._content, 0, size):
            end = offset + length
            while offset < end:
                start = offset - offset % GROUP
                if start > done:
                    if data:
                        yield _Group(done, GROUP, data)
                        data, done = [], done + GROUP
                    yield from self._zeros(done, start)
                    done = start
                step = min(end, start + GROUP) - offset
                data.append(Range(offset, step))
                offset += step
        if data:
            yield _Group(done, min(GROUP, size - done), data)
            done = min(done + GROUP, size)
        yield from self._zeros(done, size)

    @staticmethod
    def _zeros(offset: int, end: int) -> Iterator[_Group]:
        while offset < end:
            length = min(end - offset, _MANY * GROUP)
            if length > GROUP:
                length -= length % GROUP
            yield _Group(offset, length, [])
            offset += length

    def digest(self, group: _Group) -> tuple[bytes, int]:
        """What the checksum takes of a group (or many of zeros), and how many bytes that stands for."""
        if not group.data and group.length % GROUP == 0:
            return self._zero_group * (group.length // GROUP), group.length
        blocks = [self._zero_block] * (group.length // BLOCK)
        if rest := group.length % BLOCK:
            blocks.append(self.hash(_ZERO_BLOCK[:rest]).digest())
        for first, count in _touched(group):
            self._read(group, first, count, blocks)
        return self.hash(b"".join(blocks)).digest(), group.length

    def _read(self, group: _Group, first: int, count: int, blocks: list[bytes]) -> None:
        """Put the digests of some blocks, read together, in their places."""
        if not hasattr(self._own, "buf"):
            self._own.buf = bytearray(_TOGETHER * BLOCK)
        start = first * BLOCK
        length = min(count * BLOCK, group.length - start)
        with memoryview(self._own.buf) as buf:
            self._content.read_into(buf[:length], group.offset + start)
            for at in range(0, length, BLOCK):
                step = min(BLOCK, length - at)
                # What is there of zeros is right already, the last block's too.
                if not self._own.buf.startswith(_ZERO_BLOCK, at):
                    blocks[(start + at) // BLOCK] = self.hash(buf[at : at + step]).digest()


def _touched(group: _Group) -> Iterator[tuple[int, int]]:
    """(first block, how many) of the blocks with data in them, as many at a time as are read together."""
    done = 0
    for offset, length in group.data:
        first = max((offset - group.offset) // BLOCK, done)
        done = max(-(-(offset + length - group.offset) // BLOCK), done)
        for at in range(first, done, _TOGETHER):
            yield at, min(_TOGETHER, done - at)
