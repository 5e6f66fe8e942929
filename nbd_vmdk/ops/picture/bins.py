"""Counting bytes by where they are: a disk of any size, cut into some hundred bins of equal width."""

from itertools import accumulate

from nbd_vmdk.units import SECTOR


class Bins:
    """How many bytes of something lie in each bin.

    Adding a range costs the same however many bins it covers.
    """

    def __init__(self, width: int, count: int) -> None:
        """``count`` bins of ``width`` bytes."""
        self.width = width
        self.total = 0
        self._partly = [0] * count
        #: +1 where a row of bins that are wholly covered begins, -1 behind its end.
        self._edges = [0] * (count + 1)

    def add(self, offset: int, length: int) -> None:
        """Count a range, which is not empty and lies inside."""
        width = self.width
        self.total += length
        first, last = offset // width, (offset + length - 1) // width
        if first == last:
            self._partly[first] += length
        else:
            self._partly[first] += (first + 1) * width - offset
            self._partly[last] += offset + length - last * width
            self._edges[first + 1] += 1
            self._edges[last] -= 1

    def counts(self) -> list[int]:
        """Bytes in each bin."""
        whole = accumulate(self._edges[:-1])
        return [partly + covered * self.width for partly, covered in zip(self._partly, whole, strict=True)]


def bin_width(size: int, most: int) -> int:
    """The smallest power of two of whole sectors for which ``size`` bytes are at most ``most`` bins.

    Grains are powers of two as well, so the edges of both agree.
    """
    width = SECTOR
    while width * most < size:
        width *= 2
    return width
