"""The rows of ``nbd-vmdk map``: every run of a disk, in the words of ``qemu-img map --output=json``."""

from collections.abc import Iterable, Iterator
from typing import Any

from nbd_vmdk.disk import Disk
from nbd_vmdk.extents.base import NOTHING, Kind
from nbd_vmdk.ops.content import Range


def map_rows(disk: Disk, ranges: Iterable[Range] | None = None) -> Iterator[dict[str, Any]]:
    """Each run as start, length, depth, present, zero, data, and offset and filename where there are any.

    With ``ranges`` only what lies in them.  ``depth`` counts links from the top; a hole, which no link holds,
    has the depth of the base, where the search for it ended.  ``kind`` adds what qemu-img has no word for:
    hole, zero, data, packed or lost.
    """
    bottom = len(disk.links) - 1
    for offset, length in [Range(0, disk.size)] if ranges is None else ranges:
        for run in disk.runs(offset, length):
            row: dict[str, Any] = {
                "start": run.offset,
                "length": run.length,
                "depth": bottom if run.depth is None else run.depth,
                "present": run.kind is not Kind.HOLE,
                "zero": run.kind in NOTHING,
                "data": run.kind not in NOTHING,
                "kind": run.kind.name.lower(),
            }
            if run.kind is Kind.PACKED:
                row["compressed"] = True
            if run.at is not None:
                row["offset"] = run.at
            if run.file is not None:
                row["filename"] = run.file
            yield row
