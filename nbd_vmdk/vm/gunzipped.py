"""Gzip data read as what they hold, at any place.

Inflating goes one way only.  The first thing that anybody asks is the size, which gzip does not tell (its
trailer has 32 bits of it), so the data are inflated once from end to end when they are opened; that also
proves their checksums.  On the way decoders are put aside as points to start again from.  At most
:data:`_POINTS` are kept: when there are more, every second one goes and the distance doubles.  So memory is
bounded whatever the length, and a read costs at most one distance of inflating.

Reading forwards, the usual way of all who copy, costs none of that: the decoders of the last few reads stay
where they were and go on from there; blocks read last are kept.

One lock guards it all: readers of one disk take turns.
"""

# ruff: noqa: D102  the contract is in base.py

import threading

from nbd_vmdk.codec import CorruptGrain, Gunzip
from nbd_vmdk.errors import FormatError, Truncated
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import KIB, MIB

_AGAIN = "the file is damaged, or was cut off: get it again"
#: Bytes that are inflated and kept at a time.
_BLOCK = 256 * KIB
#: Blocks kept: 8 MiB.
_KEPT = 32
#: Decoders put aside, each of some 40 KiB: 8 MiB.
_POINTS = 200
#: The first distance between two points.
_DISTANCE = MIB
#: Decoders that stay where a read ended: as many readers go forwards without starting anew.
_CURSORS = 4


class Points:
    """What was learnt of gzip data: their plain size, and where to start from.  It outlives an opening."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size: int | None = None
        self.distance = _DISTANCE
        self.decoders: list[Gunzip] = []
        self.lock = threading.Lock()

    def pass_by(self, decoder: Gunzip) -> None:
        """Put a decoder aside if it has come far enough from the last point."""
        if decoder.given < (self.decoders[-1].given if self.decoders else 0) + self.distance:
            return
        self.decoders.append(decoder.copy(_nothing))
        if len(self.decoders) > _POINTS:
            self.distance *= 2
            del self.decoders[::2]


class Gunzipped(Storage):
    """What the gzip data ``packed`` hold; ``packed`` is its own.

    ``points`` may be known from an earlier opening of the same bytes.  More plain bytes than its limit are
    refused.  Raises FormatError if the data are damaged.
    """

    def __init__(self, packed: Storage, points: Points) -> None:
        self.name = packed.name
        self._packed = packed
        self._points = points
        self._cursors: list[Gunzip] = []
        self._blocks: dict[int, bytes] = {}

    @property
    def size(self) -> int:
        size = self._points.size
        return self._measure() if size is None else size

    @property
    def identity(self) -> tuple[int, ...]:
        return (*self._packed.identity, -1)

    @property
    def allocated(self) -> int:
        return self._packed.allocated

    def read_into(self, buf: memoryview, at: int) -> None:
        size, end = self.size, at + buf.nbytes
        if (at < 0 or end > size) and buf.nbytes:
            raise Truncated(self.name, what="a read", need=end, have=size)
        view, done = buf.cast("B"), 0
        while done < len(view):
            number, within = divmod(at + done, _BLOCK)
            piece = self._block(number)[within : within + len(view) - done]
            view[done : done + len(piece)] = piece
            done += len(piece)

    def lock(self, writable: bool) -> str | None:  # noqa: ARG002  it is for reading
        return self._packed.lock(writable=False)

    def writer(self) -> str | None:
        return self._packed.writer()

    def close(self) -> None:
        self._cursors.clear()
        self._blocks.clear()
        self._packed.close()

    def _fetch(self, at: int, length: int) -> bytes:
        return self._packed.read(at, max(min(length, self._packed.size - at), 0))

    def _measure(self) -> int:
        """Inflate everything once."""
        with self._points.lock:
            if self._points.size is None:
                decoder = Gunzip(self._fetch)
                self._points.decoders.clear()
                while block := self._advance(decoder, _BLOCK):
                    # The last ones are read next: a stream's footer is there.
                    self._keep((decoder.given - len(block)) // _BLOCK, block)
                    if decoder.given > self._points.limit:
                        why = f"inflates to more than the {self._points.limit} bytes that its disk can need"
                        raise FormatError(self.name, why=why)
                self._points.size = decoder.given
            return self._points.size

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is not None:
            return block
        with self._points.lock:
            if number in self._blocks:
                return self._blocks[number]
            start = number * _BLOCK
            decoder = self._decoder_before(start)
            self._cursors = [*(each for each in self._cursors if each is not decoder), decoder][-_CURSORS:]
            while decoder.given < start and self._advance(decoder, min(_BLOCK, start - decoder.given)):
                pass
            block = self._advance(decoder, _BLOCK)
            if not block:
                raise FormatError(self.name, why="its gzip data have become shorter", hint=_AGAIN)
            self._keep(number, block)
            return block

    def _decoder_before(self, start: int) -> Gunzip:
        """The decoder that is the least way before a byte; one of its own, to be moved."""
        cursor = max((each for each in self._cursors if each.given <= start), key=_given, default=None)
        point = max((each for each in self._points.decoders if each.given <= start), key=_given, default=None)
        if cursor is not None and (point is None or cursor.given >= point.given):
            return cursor
        if point is None:
            return Gunzip(self._fetch)
        return point.copy(self._fetch)

    def _advance(self, decoder: Gunzip, length: int) -> bytes:
        try:
            plain = decoder.read(length)
        except CorruptGrain as error:
            raise FormatError(self.name, why=f"its gzip data are damaged: {error}", hint=_AGAIN) from None
        self._points.pass_by(decoder)
        return plain

    def _keep(self, number: int, block: bytes) -> None:
        self._blocks[number] = block
        if len(self._blocks) > _KEPT:
            del self._blocks[next(iter(self._blocks))]


def _nothing(_at: int, _length: int) -> bytes:
    """Where a decoder that was put aside reads: it keeps no file open, and goes on only as a copy."""
    return b""


def _given(decoder: Gunzip) -> int:
    return decoder.given
