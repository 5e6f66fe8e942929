"""Sizes and alignment: the few arithmetic words that every layer shares.

On disk everything counts in sectors; in this package every offset and length is in bytes unless its
name says ``_sectors``.  Python integers do not overflow, so limits are checked where bytes are parsed.
"""

import re

SECTOR = 512
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

#: The largest byte offset a file can have on Linux (loff_t is signed).
MAX_OFFSET = (1 << 63) - 1

_SUFFIXES = {"": 1, "b": 1, "s": SECTOR, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "p": 1 << 50}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([bskmgtp]?)(?:i?b)?", re.IGNORECASE)


def align_up(value: int, to: int) -> int:
    """Round ``value`` up to a multiple of ``to``."""
    return -(-value // to) * to


def align_down(value: int, to: int) -> int:
    """Round ``value`` down to a multiple of ``to``."""
    return value - value % to


def parse_size(text: str) -> int:
    """Bytes meant by ``64M``, ``1.5G``, ``4096`` or ``8s`` (sectors), as nbdkit reads sizes.

    Raises ValueError with a sentence for the user.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size (write bytes, or a number with K, M, G or T)")
    number, suffix = match.groups()
    size = (
        float(number) * _SUFFIXES[suffix.lower()]
        if "." in number
        else (int(number) * _SUFFIXES[suffix.lower()])
    )
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def format_size(size: int) -> str:
    """``size`` for people: ``512 B``, ``1.5 GiB``; three digits, as qemu-img shows it, four from 1000 on."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    # Of four digits before the point Python's "g" would make 1.02e+03.
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.3g} {unit}"
