"""What changed since a snapshot: the base of incremental backup.

A link of a chain is the disk as it was when the next link was made on top of it.  What the links above it
hold was written since, or at least may have been: those ranges, and nothing else, can differ.  They are
found in the tables alone.  That the link is still what it was is checked when the chain is opened, by its
content ID.

    with open_disk("vm-000003.vmdk") as disk:
        for offset, length in changed_since(disk, find_link(disk, "vm.vmdk")):
            ...  # disk.pread(length, offset) is the increment

Writing every such range over a copy of the link's disk, made as large as this one, gives this disk.

A range is as exact as the grains are: writing one sector to a child copies the whole grain.  Comparing the
contents finds the sectors.
"""

import os
from collections.abc import Iterator

from nbd_vmdk.cache import Cache
from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import OptionError
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.ops.compare import differences
from nbd_vmdk.ops.content import DiskContent, Range, merged
from nbd_vmdk.ops.copy import Progress
from nbd_vmdk.units import MIB


def find_link(disk: Disk, link: str | int) -> int:
    """The depth of a link, 0 being the top, by its depth or by the name of its file, with or without folder.

    Raises OptionError if there is none, or if the name fits several.
    """
    names = [each.name for each in disk.links]
    text = str(link)
    if text.isdecimal() and len(text) < len(str(len(names))) + 1:
        depth = int(text)
        if depth < len(names):
            return depth
    exact = [depth for depth, name in enumerate(names) if os.path.abspath(name) == os.path.abspath(text)]
    found = exact or [depth for depth, name in enumerate(names) if os.path.basename(name) == text]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{depth} ({name})" for depth, name in enumerate(names))
    why = f"several links of the chain are called {text}" if found else f"{text} is no link of the chain"
    raise OptionError(disk.links[0].name, why=why, hint=f"its links are {known}")


def disk_at(disk: Disk, depth: int) -> Disk:
    """The disk as it was when the link at ``depth`` was its top.

    It shares the files with ``disk``, which must stay open meanwhile and is the one to close.
    """
    return Disk(list(disk.links[depth:]), Cache(MIB), writable=False)


def changed_since(
    disk: Disk, depth: int, *, compare: bool = False, progress: Progress | None = None
) -> Iterator[Range]:
    """The ranges of ``disk`` that may differ from the disk at the link ``depth``, in order, maximal.

    What lies beyond the link's end, or came back into sight because a link between them was smaller, is
    among them.  With ``compare`` both are read and only sectors that do differ are told; beyond its end the
    link's disk then counts as zeros.  ``progress`` is told bytes that were compared, and the disk's size.
    Raises what reading raises.
    """
    ranges = merged(_held(disk, 0, disk.size, 0, depth))
    if not compare or depth == 0:
        return ranges
    then = disk_at(disk, depth)
    return differences(DiskContent(disk), DiskContent(then), ranges, progress=progress)


def _held(disk: Disk, offset: int, length: int, first: int, stop: int) -> Iterator[Range]:
    """What of a range the links from ``first`` on and above ``stop`` hold, or hide by being smaller."""
    link = disk.links[first]
    inside = max(min(length, link.size - offset), 0)
    if first < stop:
        at = offset
        for kind, count, _source, _at in link.runs(offset, inside):
            if kind is Kind.HOLE:
                yield from _held(disk, at, count, first + 1, stop)
            else:
                yield Range(at, count)
            at += count
    if inside < length:
        yield Range(offset + inside, length - inside)
