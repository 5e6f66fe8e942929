"""
Builders of VMDK test images, made byte by byte from the published facts of the format.

Nothing here imports the engine: the builders and the engine are two readings of the same format, and
each checks the other. A builder takes the guest's content as a sparse model (content.Content), writes
one file, and returns what it wrote and where, so that a test can damage exactly the place it means to.
The helpers in desc and ova put extents together to whole images and appliances.
"""

from __future__ import annotations

import os


def poke(path: str, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file in place; writing past the end makes it longer."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def peek(path: str, offset: int, length: int) -> bytes:
    """Return bytes of a file; fewer only at its end."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def cut(path: str, size: int) -> None:
    """Cut a file to `size` bytes, or by -size bytes if it is negative."""
    os.truncate(path, size if size >= 0 else os.path.getsize(path) + size)


def pad(path: str, length: int) -> None:
    """Put zero bytes behind a file."""
    os.truncate(path, os.path.getsize(path) + length)
