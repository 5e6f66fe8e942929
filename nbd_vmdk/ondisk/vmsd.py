"""A machine's snapshots (.vmsd): their names, and the links that each of them froze.

A dictionary as a .vmx is (see vmx.py).  ``snapshot3.disk0.fileName`` is the link in which the machine's
writes went *until* that snapshot was taken: that link and its parents are the disk as it was then.
``snapshot.numSnapshots`` is not believed: numbers may have gaps, and deleted snapshots leave lines behind.
"""

import re
from dataclasses import dataclass
from typing import Final

from nbd_vmdk.ondisk.vmx import AttachedDisk, node_order, parse_dictionary

_UID: Final = re.compile(r"snapshot(0|[1-9]\d{0,4})\.uid")
_DISK: Final = re.compile(r"(snapshot(?:0|[1-9]\d{0,4}))\.disk(0|[1-9]\d{0,3})\.filename")
#: Disks whose node is not told, or not understood, come last.
_NOWHERE: Final = (1 << 16, 0, 0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot.

    uid          its number, which no other snapshot of the machine has
    name         what the user called it; not unique
    disks        the machine's disks as they were then, in bus order
    """

    uid: str
    name: str
    disks: tuple[AttachedDisk, ...]


def is_link_key(key: str) -> bool:
    """Whether a key (in lower case) names a link that a snapshot froze."""
    return _DISK.fullmatch(key) is not None


def parse_snapshots(raw: bytes, file: str) -> list[Snapshot]:
    """All snapshots, in the order in which they are numbered; none for an empty file.

    FormatError names the line that is wrong.
    """
    values = parse_dictionary(raw, file)
    disks: dict[str, list[tuple[tuple[int, int, int], int, AttachedDisk]]] = {}
    for key, name in values.items():
        if (match := _DISK.fullmatch(key)) and name:
            node = values.get(f"{match[1]}.disk{match[2]}.node", "").lower()
            order = node_order(node) or _NOWHERE
            disks.setdefault(match[1], []).append((order, int(match[2]), AttachedDisk(node, name)))
    numbers = sorted(int(match[1]) for key in values if (match := _UID.fullmatch(key)))
    return [
        Snapshot(
            uid=values[f"snapshot{number}.uid"],
            name=values.get(f"snapshot{number}.displayname", ""),
            disks=tuple(disk for _, _, disk in sorted(disks.get(f"snapshot{number}", ()), key=_place)),
        )
        for number in numbers
    ]


def _place(entry: tuple[tuple[int, int, int], int, AttachedDisk]) -> tuple[tuple[int, int, int], int]:
    return entry[0], entry[1]
