"""
What a block may hold, from what its clients were told.

A disk is a row of blocks, and whatever writes a block fills it with the block's number and a version that
is used only once; version 0 is zeros. For each block the history keeps who wrote it, when the request was
sent and when its reply was seen. That order is known even where many clients write at once, and from it
follows what a read may find, and what must still be there after the server has died:

- a write is out of the question once another one, sent after its reply had come, is known to have been
  carried out: by its own reply (for a read), or by a flush (after a crash);
- everything else that was sent is possible, with or without a reply.

A trim may leave what was there or zeros, so it only ever adds zeros to what is possible.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BLOCK = 4096
NEVER = 1 << 62
_HEAD = struct.Struct("<QQ")
_REPEAT = BLOCK // _HEAD.size
_ZEROS = bytes(BLOCK)


def filled(first: int, count: int, version: int) -> bytes:
    """The bytes of `count` blocks that were written with one version."""
    if not version:
        return bytes(count * BLOCK)
    return b"".join(_HEAD.pack(block, version) * _REPEAT for block in range(first, first + count))


def versions(data: bytes | memoryview, first: int) -> Iterator[tuple[int, int | None]]:
    """(block, version) of each block; None for what nobody ever wrote there, not even in part."""
    data = bytes(data)
    for at in range(0, len(data), BLOCK):
        block = first + at // BLOCK
        found = data[at : at + BLOCK]
        if found == _ZEROS:
            yield block, 0
            continue
        number, version = _HEAD.unpack_from(found)
        whole = number == block and version and found == _HEAD.pack(number, version) * _REPEAT
        yield block, version if whole else None


def mixed(data: bytes, block: int) -> set[int | None]:
    """The versions in a block that several of them fill."""
    pairs = set(_HEAD.iter_unpack(data))
    return {None if number not in (0, block) else version for number, version in pairs}


@dataclass(slots=True, eq=False)
class Write:
    """One request that wrote, zeroed or trimmed; moments are ticks of the history's clock."""

    version: int
    first: int
    count: int
    sent: int
    weak: bool = False  # a trim, which may have no effect
    done: int = NEVER  # its reply was seen
    durable: bool = False


class History:
    """All that happened to the blocks of a disk since it was last looked at from end to end."""

    def __init__(self, content: Iterable[int]) -> None:
        """`content` gives the version of each block."""
        self.clock = 0
        self._last_version = 0
        self._writes: list[list[Write]] = []
        self._not_durable: list[Write] = []
        self._forget_all(content)

    @property
    def blocks(self) -> int:
        return len(self._writes)

    def _forget_all(self, content: Iterable[int]) -> None:
        self.clock += 1
        self._writes = [
            [Write(version, block, 1, 0, done=0, durable=True)] for block, version in enumerate(content)
        ]
        self._not_durable = []
        self._last_version = max(self._last_version, *(row[0].version for row in self._writes))

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    # What clients do.

    def send(self, first: int, count: int, *, zeros: bool = False, weak: bool = False) -> Write:
        """A request is about to be sent that writes blocks."""
        if not zeros:
            self._last_version += 1
        write = Write(0 if zeros else self._last_version, first, count, self.tick(), weak)
        for block in range(first, first + count):
            self._writes[block].append(write)
        return write

    def replied(self, write: Write, *, durable: bool = False) -> None:
        """Its reply has come, and it was a good one."""
        write.done = self.tick()
        if durable:
            write.durable = True
        else:
            self._not_durable.append(write)

    def failed(self, write: Write) -> None:
        """Its reply was an error: it may have done anything of what it should, but nothing is promised.

        ext4 drops the cached pages of a range before it zeroes or punches it. If that then fails for want of
        space, what was written there and never synced is gone: older bytes show again.
        """
        write.weak = True
        write.done = self.tick()
        if not write.version:
            for row in self._writes[write.first : write.first + write.count]:
                for other in row:
                    other.weak = other.weak or not other.durable

    def flushed(self, sent: int) -> None:
        """A flush that was sent at this moment has succeeded."""
        rest = []
        for write in self._not_durable:
            if write.done < sent:
                write.durable = True
            else:
                rest.append(write)
        self._not_durable = rest

    # What may be found.

    def check_read(self, data: bytes | memoryview, first: int, sent: int) -> None:
        """A read that was sent at this moment, and whose reply has just come."""
        for block, version in versions(data, first):
            row = self._writes[block]
            sure = max((write.sent for write in row if write.done < sent and not write.weak), default=0)
            possible = [write for write in row if write.done >= sure]
            found = {version}
            if version is None and any(write.done > sent for write in possible):
                # File systems let a read meet half of a write that is under way beside it.
                at = (block - first) * BLOCK
                found = mixed(bytes(data[at : at + BLOCK]), block)
            for each in found:
                self._must_be_possible(block, each, possible)

    def check_survivors(self, data: bytes, *, first: int = 0) -> list[int]:
        """The disk, or a part, after the server died; the versions found."""
        found = []
        for block, version in versions(data, first):
            row = self._writes[block]
            sure = max((write.sent for write in row if write.durable and not write.weak), default=0)
            self._must_be_possible(block, version, [write for write in row if write.done >= sure])
            assert version is not None
            found.append(version)
        return found

    def survived(self, data: bytes) -> None:
        """Check the whole disk after the server died, and begin anew with what it holds."""
        assert len(data) == self.blocks * BLOCK
        self._forget_all(self.check_survivors(data))

    def _must_be_possible(self, block: int, version: int | None, possible: list[Write]) -> None:
        if version not in {write.version for write in possible}:
            wanted = sorted({write.version for write in possible})
            what = "bytes that nobody wrote there" if version is None else f"version {version}"
            raise AssertionError(
                f"block {block} holds {what}, not one of the versions {wanted}; "
                f"the last of its writes: {self._writes[block][-5:]}"
            )
