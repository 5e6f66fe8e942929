"""The changes of a repair, put together for each file and made in order.

Several repairs may change one file, and even the same bytes: here they become ranges that do not overlap,
each with its stage.  They are made from a log that holds the old and the new bytes, so what is written is
what can be taken back.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from nbd_vmdk.ops.check.findings import Copy, ImageFile, Resize, Stage, Write
from nbd_vmdk.ops.undo import FileChange, Piece
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB

#: Bytes that are read or written at once, so that a range may be of any length.
_STEP: Final = MIB

Step = Write | Copy | Resize


@dataclass(slots=True)
class _Range:
    """New bytes of a file: those of ``data``, or those that are at ``source`` now."""

    begin: int
    end: int
    stage: Stage
    data: bytes | None
    source: int

    def part(self, begin: int, end: int) -> "_Range":
        skip = begin - self.begin
        data = None if self.data is None else self.data[skip : skip + end - begin]
        return _Range(begin, end, self.stage, data, self.source + skip)


class FileWork:
    """All changes of one file as ranges that do not overlap: a later one takes the place of an earlier."""

    def __init__(self, file: ImageFile, storage: Storage, steps: Sequence[Step]) -> None:
        self.file = file
        self.storage = storage
        self._ranges: list[_Range] = []
        size = storage.size
        least, exact = 0, None
        for step in steps:
            if isinstance(step, Resize):
                least = least if step.exact else max(least, step.size)
                exact = max(exact or 0, step.size) if step.exact else exact
                continue
            length = step.length if isinstance(step, Copy) else len(step.data)
            data = None if isinstance(step, Copy) else step.data
            source = step.source if isinstance(step, Copy) else 0
            self._put(_Range(step.at, step.at + length, step.stage, data, source))
        written = self._ranges[-1].end if self._ranges else 0
        after = max(size if exact is None else exact, least, written)
        pieces = [
            Piece(at, max(min(end, size) - at, 0), end - at, int(each.stage))
            for each in self._ranges
            for at in range(each.begin, each.end, _STEP)
            for end in (min(at + _STEP, each.end),)
        ]
        if after < size:
            # What is cut off must be in the undo file as well: pieces that are written as they are.
            pieces += [
                Piece(at, min(_STEP, size - at), 0, int(Stage.FLAGS))
                for at in range(max(after, written), size, _STEP)
            ]
        self.change = FileChange(file.name, size, after, pieces)

    def _put(self, new: _Range) -> None:
        first = bisect_left(self._ranges, new.begin, key=lambda each: each.end - 1)
        last = first
        row = [new]
        while last < len(self._ranges) and self._ranges[last].begin < new.end:
            old = self._ranges[last]
            if old.begin < new.begin:
                row.insert(0, old.part(old.begin, new.begin))
            if old.end > new.end:
                row.append(old.part(new.end, old.end))
            last += 1
        self._ranges[first:last] = row

    def contents(self) -> Iterator[bytes]:
        """The old and the new bytes of every piece."""
        index = 0
        for piece in self.change.pieces:
            yield self.storage.read(piece.at, piece.old) if piece.old else b""
            if not piece.new:
                continue
            while self._ranges[index].end <= piece.at:
                index += 1
            part = self._ranges[index].part(piece.at, piece.at + piece.new)
            if part.data is not None:
                yield part.data
                continue
            have = min(piece.new, self.storage.size - part.source)
            yield (self.storage.read(part.source, have) if have > 0 else b"").ljust(piece.new, b"\0")


class Log(Protocol):
    """Where the new bytes are taken from once the old ones are safe."""

    def pieces(self, file: FileChange) -> Iterator[tuple[Piece, bytes, bytes]]:
        """Every piece of a file with its old and its new bytes."""


class MemoryLog:
    """The pieces of all files, held in memory."""

    def __init__(self, work: Sequence[FileWork]) -> None:
        self._pieces = {id(each.change): list(_in_threes(each)) for each in work}

    def pieces(self, file: FileChange) -> Iterator[tuple[Piece, bytes, bytes]]:
        """See Log."""
        return iter(self._pieces[id(file)])


def _in_threes(each: FileWork) -> Iterator[tuple[Piece, bytes, bytes]]:
    contents = each.contents()
    for piece in each.change.pieces:
        old = next(contents)
        yield piece, old, next(contents) if piece.new else b""


def carry_out(work: Sequence[FileWork], log: Log) -> None:
    """Make the changes that were logged, one stage after the other."""
    for stage in Stage:
        for each in work:
            if _make(each, log, stage):
                each.storage.sync()


def _make(each: FileWork, log: Log, stage: Stage) -> bool:
    """Make the changes of one stage in one file; whether there were any."""
    changed = False
    storage, change = each.storage, each.change
    if stage is Stage.CONTENT and change.after > storage.size:
        storage.truncate(change.after)
        changed = True
    if any(piece.stage == stage for piece in change.pieces):
        for piece, _old, new in log.pieces(change):
            if piece.stage == stage and new:
                storage.write(new, piece.at)
                changed = True
    if stage is Stage.FLAGS and change.after < storage.size:
        storage.truncate(change.after)
        changed = True
    return changed
