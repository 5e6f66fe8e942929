"""Inflate one grain, with the fastest library present.

A compressed grain is a zlib stream (RFC 1950), whatever the technical note says; raw deflate is accepted
because the note asks for it.  Output is bounded: a grain that would inflate past its size is damage, not
a reason to allocate memory.  libdeflate is two to three times faster than zlib here and bounded by
design; zlib stands in where it is not installed, and names the reason when a grain is damaged.
"""

import zlib
from collections.abc import Callable
from typing import Final

_Inflate = Callable[[bytes | memoryview, int], bytes | bytearray]
_fast: tuple[_Inflate, type[Exception]] | None
try:
    import deflate as _deflate
except ImportError:
    _fast = None
else:
    _fast = _deflate.zlib_decompress, _deflate.DeflateError

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
