"""A disk that was found behind a path, and the names by which several are told apart."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from nbd_vmdk.errors import NotVmdk, VmdkError, printable
from nbd_vmdk.storage.folder import Folder

#: The longest name, in bytes; NBD has 4096, and the members of an archive may be called whatever they like.
_LONGEST = 1024
#: Disks that an error lists.
_LISTED = 20


@dataclass(slots=True)
class FoundDisk:
    """A disk to open: ``opening.open_in(found.folder, found.file, ...)``.

    folder      the folder that holds it, through the gate of what the user named
    file        its name there
    path        the same as a user would write it, for messages
    place       where the machine has it (``scsi0:0``), or an appliance's name for it; empty if neither
    name        its file's name, with as many folders before it as tell it from the others that were found
    alone       what a user gives to name this disk and no other: the path, or ``app.ova:disk1.vmdk``
    frozen      links stand on it that are no part of it: it is a snapshot's, to be read only
    warnings    what was odd but harmless in finding it
    fault       why it can't be had; then there is nothing to open
    """

    folder: Folder
    file: str
    path: str
    place: str = ""
    name: str = ""
    alone: str = ""
    frozen: bool = False
    warnings: tuple[str, ...] = ()
    fault: VmdkError | None = None


def name_uniquely(disks: Sequence[FoundDisk]) -> None:
    """Give each disk the shortest name that only it has: its file, and folders before it where need be."""
    parts = [_parts(disk.path) for disk in disks]
    lengths = [1] * len(disks)
    while True:
        names = ["/".join(own[-length:]) for own, length in zip(parts, lengths, strict=True)]
        clashing = _repeated(names)
        growing = [
            index
            for index, name in enumerate(names)
            if name in clashing and lengths[index] < len(parts[index])
        ]
        if not growing:
            break
        for index in growing:
            lengths[index] += 1
    names = [_shortened(name) for name in names]
    taken = set(names)
    clashing = _repeated(names)
    for disk, name in zip(disks, names, strict=True):
        disk.name = name
        if name in clashing:
            # Two paths that look alike once they are fit to be shown: rare enough for a number to do.
            numbered = (f"{name} ({number})" for number in count(1))
            disk.name = next(each for each in numbered if each not in taken)
            taken.add(disk.name)


def _shortened(name: str) -> str:
    raw = name.encode()
    return name if len(raw) <= _LONGEST else "..." + raw[-_LONGEST:].decode(errors="ignore")


def alone(disks: list[FoundDisk], path: str) -> list[FoundDisk]:
    """Give the disks behind ``path`` their names there, and so the words that mean each of them."""
    name_uniquely(disks)
    for disk in disks:
        disk.alone = f"{path}:{disk.name}"
    return disks


def _parts(path: str) -> list[str]:
    """The components of a path, as text that is valid UTF-8 and without control characters.

    NBD's names are text; a file's need not be.
    """
    text = os.fsencode(os.path.abspath(path)).decode("utf-8", "backslashreplace")
    return [printable(part) for part in text.split("/") if part]


def _repeated(names: Iterable[str]) -> set[str]:
    return {name for name, times in Counter(names).items() if times > 1}


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key by which disk2 comes before disk10."""
    return [
        (0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"([0-9]{1,18})", name.lower())
    ]


def listed(disks: Sequence[FoundDisk], path: str | None = None) -> str:
    """How each of several disks may be named; with ``path`` that and a colon stand before it.

    A machine's disk is named by its place, which it keeps when a snapshot gives it another file; any other
    by its file.
    """
    from nbd_vmdk.ondisk.vmx import node_order  # seldom needed

    shown = []
    for disk in disks[:_LISTED]:
        if node_order(disk.place) is not None:
            word = disk.place if path is None else f"{path}:{disk.place}"
            shown.append(f"{shlex.quote(word)} ({disk.name})")
        else:
            shown.append(disk.name if path is None else shlex.quote(disk.alone))
    return ", ".join(shown) + (" ..." if len(disks) > _LISTED else "")


def only_disk(disks: Sequence[FoundDisk], path: str, what: str) -> FoundDisk:
    """The only one of ``disks``; NotVmdk says how to name one of several.  Its fault, if any, is raised."""
    if not disks:
        raise NotVmdk(path, what=f"{what} without a .vmdk in it")
    if len(disks) > 1:
        raise NotVmdk(
            path, what=f"{what} with {len(disks)} disks", hint=f"name one of them: {listed(disks, path)}"
        )
    if disks[0].fault is not None:
        raise disks[0].fault
    return disks[0]
