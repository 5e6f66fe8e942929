"""Finding and serving many disks: folders, machines, snapshots, appliances."""

from __future__ import annotations

import os
from pathlib import Path

from nbd_vmdk import open_disk
from nbd_vmdk.vm import FoundDisk, find_disks
from tests.images import desc
from tests.images.content import MIB, SECTOR, Content


def content(seed: str, size: int = MIB) -> Content:
    """A few words, so that one disk is known from the other."""
    return Content(size).put(0, seed.encode()).put(size // 2, seed.encode() * 40)


def sparse(folder: Path, name: str, seed: str = "", **options: object) -> desc.Image:
    """A small monolithic disk whose content tells its name."""
    folder.mkdir(parents=True, exist_ok=True)
    return desc.monolithic_sparse(str(folder), name, content(seed or name), **options)


def stream(folder: Path, name: str, seed: str = "") -> desc.Image:
    folder.mkdir(parents=True, exist_ok=True)
    return desc.stream_optimized(str(folder), name, content(seed or name))


def dictionary(path: Path, values: dict[str, str], encoding: str = "UTF-8", codec: str = "utf-8") -> str:
    """A .vmx or .vmsd."""
    lines = [f'.encoding = "{encoding}"', *(f'{key} = "{value}"' for key, value in values.items())]
    path.write_bytes(("\n".join(lines) + "\n").encode(codec))
    return str(path)


def plugged(**disks: str) -> dict[str, str]:
    """Keys of a .vmx: ``scsi0_1="disk.vmdk"`` is scsi0:1."""
    values: dict[str, str] = {}
    for place, name in disks.items():
        node = place.replace("_", ":")
        values[f"{node.partition(':')[0]}.present"] = "TRUE"
        values[f"{node}.present"] = "TRUE"
        values[f"{node}.fileName"] = name
    return values


def shown(path: object, **options: object) -> str:
    """The words that the only disk behind a path begins with."""
    with open_disk(os.fspath(str(path)), **options) as disk:
        return disk.pread(min(SECTOR, disk.size), 0).rstrip(b"\0").decode()


def names(path: object, **options: object) -> list[str]:
    return [found.name for found in find_disks(str(path), **options)]


def faults(found: list[FoundDisk]) -> list[str]:
    return [str(disk.fault) for disk in found if disk.fault is not None]
