"""Making an image occupy no more than it needs; what its disk shows stays as it is, and so its content ID.

In place, grains that are all zeros are released by the engine's own writer, in the order that survives a
crash at any point; over a parent they become entries that say "zeros" where the format has such, else holes
in the file.  Then space that no table names goes back, and the file is cut behind what is used.

Rewritten, an image's files are made anew beside, one by one, their grains in the order of the disk; each
takes the place of the old one in one step, and holds the same.  streamOptimized images, which can't be
changed in place, are compressed anew.

Any link of a chain can be compacted, as its children see no difference; its parents are not touched.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import WriteRefused
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.extents.cowd import CowdExtent
from nbd_vmdk.extents.flat import FlatExtent
from nbd_vmdk.extents.hosted import HostedExtent
from nbd_vmdk.link import Link
from nbd_vmdk.ondisk.descriptor import last_component
from nbd_vmdk.opening import open_in
from nbd_vmdk.ops.check.findings import Severity
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.compact.blocks import block_of
from nbd_vmdk.ops.compact.rewriting import rewrite_link
from nbd_vmdk.ops.compact.unused import Unused, occupied_in
from nbd_vmdk.ops.copy import Progress, copy
from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.merge import LinkSource
from nbd_vmdk.ops.snapshot.names import final_name
from nbd_vmdk.options import OpenOptions


@dataclass(slots=True)
class Compacted:
    """What compacting does, or did; in bytes.

    before   what the files of the link occupy, ``after`` what they do then (None: not yet known)
    zeros    guest bytes in grains that are all zeros
    freed    what these occupy in the files, and is given back
    unused   what the files occupy that belongs to nothing, and is given back
    """

    image: str
    rewritten: bool
    before: int
    after: int | None = None
    zeros: int = 0
    freed: int = 0
    unused: int = 0
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "image": self.image,
            "rewritten": self.rewritten,
            "occupied-before": self.before,
            "occupied-after": self.after,
            "zeros": self.zeros,
            "freed": self.freed,
            "unused": self.unused,
            "notes": self.notes,
        }


def compact(
    path: str | os.PathLike[str],
    *,
    rewrite: bool = False,
    level: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    threads: int | None = None,
    **options: Any,
) -> Compacted:
    """Release what the link ``path`` does not need; with ``rewrite`` by making its files anew.

    ``level`` is that of compressing anew.  ``options`` are allow_dirs and drop_ctk of OpenOptions.  Raises
    WriteRefused for an image that is damaged or of a kind that can't be changed this way, InUse; whatever
    stops it, the disk shows the same, and the same call goes on.
    """
    place = files.Place(path, files.opening(options, locks=not dry_run), mend=not dry_run)
    link = place.link
    if final_name(link.name) is not None:
        raise WriteRefused(link.label, why="another link is being merged into it", hint="finish that first")
    found = Compacted(link.label, rewrite, files.occupied_by(link))
    _refuse_damage(place)
    if rewrite and not dry_run:
        if not rewrite_link(place, level=level, progress=progress, threads=threads):
            found.notes.append("it is left as it was: compressed anew it would be no smaller")
    else:
        _in_place(place, found, write=not dry_run, progress=progress, threads=threads)
    if not dry_run:
        found.after = files.occupied_by(link)
        if rewrite and not found.notes and found.after >= found.before:
            found.notes.append("it is in the order of the disk now, and had no space to give back")
    return found


def _refuse_damage(place: files.Place) -> None:
    own = {last_component(line.name) for line in place.link.descriptor.extents if line.name is not None}
    own.add(place.link.name)
    for finding in check_image(place.link.path, allow_dirs=place.options.allow_dirs).findings:
        if finding.severity is Severity.ERROR and last_component(finding.file) in own:
            raise WriteRefused(
                place.link.label,
                why=f"it is damaged ({finding.what})",
                hint=f"nbd-vmdk repair {place.link.word} shows what can be mended",
            )


def _in_place(
    place: files.Place,
    found: Compacted,
    *,
    write: bool,
    progress: Progress | None,
    threads: int | None,
) -> None:
    with ExitStack() as held:
        disk = held.enter_context(_open(place, write=write))
        link = disk.links[0]
        if not disk.writable and write:
            raise WriteRefused(
                place.link.label,
                why=files.why_read_only(link),
                hint="--rewrite makes its file anew",
            )
        if write:
            link.keep_cid()
        sink = _Zeros(disk, found, write=write)
        copy(_Own(link), sink, zero_grain=block_of(link), progress=progress, threads=threads)
        if not write:
            _find_unused(link, found, release=False)
    if write:
        # The writer is done: what it freed is durable, and its own idea of the file's end is gone.
        with _open(place, write=True) as disk:
            _find_unused(disk.links[0], found, release=True)


def _open(place: files.Place, *, write: bool) -> Disk:
    options = place.options
    chosen = OpenOptions(
        writable=write,
        write_parent=True,  # what it shows stays
        drop_ctk=options.drop_ctk,
        allow_dirs=options.allow_dirs,
        cache_size=options.cache_size,
        locks=options.locks,
    )
    with files.writable_wanted():
        return open_in(place.link.folder, place.link.name, chosen)


class _Own:
    """The data of one link; everything else is left alone.  A source of the copier."""

    def __init__(self, link: Link) -> None:
        self._source = LinkSource(link)
        self.size = link.size
        self.read_into = self._source.read_into

    def runs(self, offset: int, length: int) -> Iterator[tuple[Kind, int]]:
        """See Source."""
        for kind, count in self._source.runs(offset, length):
            yield (kind if kind in (Kind.DATA, Kind.LOST) else Kind.HOLE), count


class _Zeros:
    """A sink of the copier that counts zeros, and releases them."""

    def __init__(self, disk: Disk, found: Compacted, *, write: bool) -> None:
        self._disk = disk
        self._found = found
        self._write = write
        self._lock = threading.Lock()

    def write(self, buf: memoryview, offset: int) -> None:
        """See Sink: data stays where it is."""

    def zero(self, offset: int, length: int) -> None:
        """See Sink."""
        zeros = freed = 0
        for extent in self._disk.links[0].extents:
            begin = max(offset, extent.start)
            end = min(offset + length, extent.start + extent.extent.size)
            if begin >= end or extent.extent.storage is None:
                continue
            if self._write and extent.writable is None:
                continue  # access RDONLY, for one
            zeros += end - begin
            for kind, count, _source, at in extent.extent.runs(begin - extent.start, end - begin):
                if kind is Kind.DATA:
                    freed += occupied_in(extent.extent.storage, at, count)
            if self._write:
                self._disk.zero(end - begin, begin, may_trim=True)
        with self._lock:
            self._found.zeros += zeros
            self._found.freed += freed


def _find_unused(link: Link, found: Compacted, *, release: bool) -> None:
    for entry in link.extents:
        extent = entry.extent
        if isinstance(extent, (HostedExtent, CowdExtent)):
            unused = Unused(extent)
            found.unused += unused.occupied
            if release and entry.writable is not None:
                unused.release()
        elif not isinstance(extent, FlatExtent) and extent.storage is not None:
            found.notes.append(
                f"{extent.storage.name}: how small it gets is known when --rewrite has compressed it anew"
            )
