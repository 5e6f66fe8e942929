"""Conversion: the copier, the appending writer, every kind of source and target, appliances, NBD."""

from __future__ import annotations

import os
import subprocess

from tests.images.content import MIB, Content


def raw_file(path: object, content: Content) -> str:
    """The content as a raw file with holes."""
    with open(str(path), "wb") as file:
        for segment in content.segments():
            if segment.data:
                file.seek(segment.start)
                file.write(segment.data)
        file.truncate(content.size)
    return str(path)


def qemu_raw(path: str, to: object) -> bytes:
    """What qemu-img reads from an image."""
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, str(to)], check=True)
    with open(str(to), "rb") as file:
        return file.read()


def leftovers(folder: object) -> list[str]:
    """Temporary folders that a conversion left behind."""
    return [name for name in os.listdir(str(folder)) if ".new-" in name]


__all__ = ["MIB", "Content", "leftovers", "qemu_raw", "raw_file"]
