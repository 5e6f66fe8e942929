"""Grains that deflate could not make smaller: their bytes stand in the file, and are read from there.

Of noise, video or encrypted data a deflate stream is a row of stored blocks (RFC 1951, 3.2.4): 5 bytes that
say how many follow, and those bytes as they were.  Once such a grain has been inflated and its checksum
verified, where its blocks are is all that need be remembered: some 250 bytes in place of 64 KiB, so the
cache has room for hundreds of times as many grains.  From then on any part of the grain is read as that of a
flat disk is, and the kernel's page cache is what keeps the bytes.

A layout tells that the bytes were right when it was made, as a grain in the cache does; one that was
forgotten is made anew, with all that is verified.  So data is verified as often as it would be with a cache
of that many grains.  What happens to the file behind our back meanwhile is not noticed, as it is not on a
flat disk.

What is not done: a grain with other blocks among the stored ones, one that the disk's end cuts short, or a
stream without zlib's header and checksum has no layout, and is inflated as ever.
"""

import struct
from array import array
from bisect import bisect_right
from typing import Final

from nbd_vmdk.storage.base import Storage

#: A block's head: a byte with the flag of the last block, the kind (0 is stored) and bits without meaning;
#: the length; and, as a check, the length's complement.
_HEAD: Final = struct.Struct("<BHH")
_LAST: Final = 0b001
_KIND: Final = 0b110
#: What a zlib stream (RFC 1950) has before its first block: a byte for the method, and one of flags.
_PREFIX: Final = 2
_METHOD: Final = 0x0F
_DEFLATE: Final = 8
_DICTIONARY: Final = 0x20
#: Writers make two to five blocks of 64 KiB; a layout is to be much smaller than its grain.
_MAX_BLOCKS: Final = 32


def layout_of(stream: bytes | memoryview, place: int, size: int) -> "array[int] | None":
    """Where the ``size`` bytes stand that the sound zlib stream at byte ``place`` of a file inflates to.

    The layout is the byte of the file where the first block's data begin, and then for each block the byte
    of the grain where it ends.  None if there are blocks that are not stored, or too many.
    """
    # Nearly all streams that are not stored go away here.
    if len(stream) <= size or stream[_PREFIX] & _KIND:
        return None
    if stream[0] & _METHOD != _DEFLATE or stream[1] & _DICTIONARY or (stream[0] << 8 | stream[1]) % 31:
        return None
    layout = [place + _PREFIX + _HEAD.size]
    at, end = _PREFIX, 0
    try:
        for _ in range(_MAX_BLOCKS):
            head, length, check = _HEAD.unpack_from(stream, at)
            if head & _KIND or length + check != 0xFFFF:
                return None
            end += length
            layout.append(end)
            if head & _LAST:
                return array("Q", layout) if end == size else None
            at += _HEAD.size + length
    except struct.error:
        pass  # cut off, so no sound stream
    return None


def read_stored(storage: Storage, layout: "array[int]", buf: memoryview, within: int) -> None:
    """Fill ``buf`` with the bytes of a grain from ``within`` on; it must lie inside the grain."""
    block = bisect_right(layout, within, 1)
    at = layout[0] + within + (block - 1) * _HEAD.size
    length = len(buf)
    count = layout[block] - within
    if length <= count:  # nearly every small request
        storage.read_into(buf, at)
        return
    done = 0
    while True:
        storage.read_into(buf[done : done + count], at)
        done += count
        if done == length:
            return
        at += count + _HEAD.size
        block += 1
        count = min(layout[block] - layout[block - 1], length - done)


def span(layout: "array[int]") -> int:
    """Bytes of the file from the first block's data to the end of the last one's."""
    return layout[-1] + (len(layout) - 2) * _HEAD.size
