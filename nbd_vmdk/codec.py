"""Inflate and deflate one grain, with the fastest library present.

A compressed grain is a zlib stream (RFC 1950), whatever the technical note says; raw deflate is accepted
because the note asks for it.  Output is bounded: a grain that would inflate past its size is damage, not
a reason to allocate memory.  libdeflate is two to three times faster than zlib here and bounded by
design; zlib stands in where it is not installed, and names the reason when a grain is damaged.

Deflating, libdeflate is three times as fast as zlib at the same ratio, level for level.  Level 1 is isal's
instead, twice as fast again for some per cent more bytes (MB/s on machine code: 99 at level 6, 186 and 467
at level 1; ratio 0.473, 0.510 and 0.526).
"""

import zlib
from collections.abc import Callable
from typing import Final

_Deflate = Callable[[bytes | bytearray | memoryview, int], bytes | bytearray]
_Inflate = Callable[[bytes | memoryview, int], bytes | bytearray]
_fast: tuple[_Inflate, type[Exception]] | None
_strong: _Deflate
_quick: _Deflate
try:
    import deflate as _deflate
except ImportError:
    _fast = None
    _strong = zlib.compress
    #: The highest level there is.
    MAX_LEVEL = 9
else:
    _fast = _deflate.zlib_decompress, _deflate.DeflateError
    _strong = _deflate.zlib_compress
    MAX_LEVEL = 12
try:
    from isal import isal_zlib as _isal
except ImportError:
    _quick = _strong
else:
    _quick = _isal.compress

#: As small as everybody's default makes grains, and faster.
DEFAULT_LEVEL: Final = 6

#: What inflates grains here, for `doctor`.
INFLATE_LIBRARY: Final = "zlib" if _fast is None else "libdeflate"


class CorruptGrain(Exception):
    """The compressed bytes are damaged; the text says how."""


def inflate(data: bytes | memoryview, size: int) -> bytes | bytearray:
    """Inflate one grain to at most ``size`` bytes.

    A stream that gives fewer bytes is returned as it is: QEMU and open-vmdk store a short last grain.
    Raises CorruptGrain for a broken stream, a wrong checksum or more than ``size`` bytes.
    """
    if _fast is not None:
        inflate_fast, error = _fast
        try:
            return inflate_fast(data, size)
        except error:
            pass  # zlib names the reason, and takes raw deflate
    return _inflate_zlib(data, size)


def _inflate_zlib(data: bytes | memoryview, size: int) -> bytes:
    # A zlib stream begins with a method byte x8 and a check that makes the first two bytes divisible by 31.
    has_header = len(data) >= 2 and data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0
    decoder = zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
    try:
        plain = decoder.decompress(data, size)
        rest = b"" if decoder.eof else decoder.decompress(decoder.unconsumed_tail, 1)
    except zlib.error as error:
        raise CorruptGrain(str(error)) from None
    if rest:
        raise CorruptGrain(f"inflates to more than {size} bytes")
    if not decoder.eof:
        raise CorruptGrain("the compressed stream is cut off")
    return plain


def deflate(data: bytes | bytearray | memoryview, level: int = DEFAULT_LEVEL) -> bytes | bytearray:
    """Deflate one grain to a zlib stream.  ``level`` is 1 (fastest) to MAX_LEVEL (smallest)."""
    return _quick(data, 1) if level == 1 else _strong(data, level)


#: Packed bytes taken at a time; a copy of a Gunzip holds on to as many.
_TAKEN = 16 << 10
_GZIP = b"\x1f\x8b"


class Gunzip:
    """Inflates gzip data (RFC 1952, also several members in a row) from its start on.

    ``fetch(at, length)`` gives packed bytes, fewer only at their end.  ``given`` counts the plain bytes so
    far.  A copy goes on from where its original was; it costs some 40 KiB, most of it zlib's window.
    """

    __slots__ = ("_decoder", "_fetch", "_taken", "given")

    def __init__(self, fetch: Callable[[int, int], bytes]) -> None:
        self._fetch = fetch
        self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._taken = 0
        self.given = 0

    def copy(self, fetch: Callable[[int, int], bytes] | None = None) -> "Gunzip":
        """Another one at the same place, which may have another way to the same packed bytes."""
        made = Gunzip(fetch or self._fetch)
        made._decoder = self._decoder.copy()
        made._taken, made.given = self._taken, self.given
        return made

    def read(self, length: int) -> bytes:
        """The next ``length`` plain bytes, fewer only at the end; CorruptGrain if the data are damaged."""
        pieces = []
        while length:
            if self._decoder.eof and not self._begin_member():
                break
            packed = self._fetch(self._taken, _TAKEN)
            if not packed:
                raise CorruptGrain("the gzip data are cut off")
            try:
                plain = self._decoder.decompress(packed, length)
            except zlib.error as error:
                raise CorruptGrain(str(error)) from None
            rest = self._decoder.unused_data if self._decoder.eof else self._decoder.unconsumed_tail
            self._taken += len(packed) - len(rest)
            self.given += len(plain)
            length -= len(plain)
            pieces.append(plain)
        return b"".join(pieces)

    def _begin_member(self) -> bool:
        """Go on behind the end of a member; False at the end of all, which zeros may follow."""
        follows = self._fetch(self._taken, _TAKEN)
        if not any(follows):
            return False
        if not follows.startswith(_GZIP):
            raise CorruptGrain("something else follows the gzip data")
        self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)
        return True
