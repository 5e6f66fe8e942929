"""The pieces in which a link is looked through for zeros."""

from typing import Final

from nbd_vmdk.link import Link
from nbd_vmdk.units import KIB, MIB

_LEAST: Final = 4 * KIB
_MOST: Final = 16 * MIB


def block_of(link: Link) -> int:
    """The size of a piece: that of a whole grain, if grains are not huge."""
    block = max(link.grain, _LEAST)
    return block if block <= _MOST else MIB
