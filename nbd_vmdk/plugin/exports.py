"""Disks that are open together, under the names by which a server offers them.

They share one cache, so that memory is bounded by one number however many they are.  Opening is all or
nothing, unless the user wants broken disks passed over: a server never starts with half of what was asked.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest

from nbd_vmdk.cache import Cache
from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import OptionError, VmdkError
from nbd_vmdk.link import Link
from nbd_vmdk.opening import open_found, open_in
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.vm import FoundDisk, find_all, locate


class Exports:
    """Open disks by name, in order; the first is also what a client gets who names none.

    ``warnings`` are those of all disks, and what was passed over.
    """

    def __init__(self, disks: dict[str, Disk], skipped: Sequence[str] = ()) -> None:
        self.disks = disks
        self.first = next(iter(disks))
        self.warnings = (*skipped, *(warning for disk in disks.values() for warning in disk.warnings))

    def get(self, name: str) -> Disk | None:
        """The disk of that name, which is looked up here and nowhere else; "" is the first one."""
        return self.disks.get(name or self.first)

    def advise(self, error: VmdkError) -> None:
        """Put the name of the disk whose file an error is of into its hint."""
        any(disk.advise(error) for disk in self.disks.values())

    def close(self) -> list[VmdkError]:
        """Close all disks cleanly, whatever happens with each; what went wrong."""
        failed: list[VmdkError] = []
        with ExitStack() as closing:
            for disk in reversed(self.disks.values()):
                closing.callback(_close, disk, failed)
        return failed


def _close(disk: Disk, failed: list[VmdkError]) -> None:
    try:
        disk.close()
    except VmdkError as error:
        failed.append(error)


def open_exports(
    paths: Iterable[str | os.PathLike[str]],
    options: OpenOptions,
    *,
    snapshot: str | None = None,
    skip_broken: bool = False,
    overlays: Sequence[str] = (),
    scratch: bool = False,
    cache: Cache | None = None,
) -> Exports:
    """Open the disks behind ``paths``; see find_all for what these may be.

    ``overlays`` are child links, one for each disk in order: the disk is then opened for reading, as the
    parent of that one, which takes the writes.  An empty name stands for none: that disk is read-only.
    With ``scratch`` the overlays are thrown away in the end, so nothing in them is made durable.
    ``cache`` is a cache to use instead of a new one.

    Raises VmdkError for the first disk that can't be opened; with ``skip_broken`` only if none can.
    """
    found = find_all(
        paths, snapshot=snapshot, allow_dirs=options.allow_dirs, allow_devices=options.allow_devices
    )
    if options.parent is not None and len(found) > 1:
        raise OptionError(None, why=f"one parent for {len(found)} disks: it belongs to one of them")
    if overlays and len(overlays) != len(found):
        raise OptionError(None, why=f"{len(overlays)} overlays for {len(found)} disks")
    cache = cache or Cache(options.cache_size)
    disks: dict[str, Disk] = {}
    broken: list[VmdkError] = []
    with ExitStack() as opened:
        for each, overlay in zip_longest(found, overlays):
            try:
                disk = disks[each.name] = opened.enter_context(_open(each, overlay, options, cache))
                for storage in disk.links[0].storages if scratch and overlay else ():
                    storage.fleeting = True
            except VmdkError as error:
                if not skip_broken:
                    raise
                broken.append(error)
        if not disks:
            raise broken[0]
        opened.pop_all()
    return Exports(disks, [f"left out: {error}" for error in broken])


def _open(found: FoundDisk, overlay: str | None, options: OpenOptions, cache: Cache) -> Disk:
    if overlay is None:
        return open_found(found, options, cache)
    if not overlay:
        return open_found(found, replace(options, writable=False), cache)
    if found.fault is not None:
        raise found.fault
    top = locate(overlay)
    disk = open_in(top.folder, top.file, options, cache, overlaid=found)
    disk.links[0].warnings[:0] = found.warnings
    return disk


def describe(links: Sequence[Link]) -> str:
    """What a client is told of an export that has these links."""
    count = len(links)
    return f"VMware disk, {links[0].create_type}" + (f", {count} links" if count > 1 else "")
