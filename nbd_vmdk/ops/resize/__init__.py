"""Giving a disk another size where it is, so that whatever stops it leaves the old disk or the new one.

What a disk's size is, its descriptor says: extents may hold more than it speaks of.  So a disk grows by
making its files larger first, each of them safely by itself (see tables.py), and getting its new descriptor
last; and shrinks by getting the new descriptor first, once what will be cut off is known to be zeros, and
smaller files after that.  Between the two it has its old size, or its new one, and the same command goes on.
Before all that the new descriptor is tried out: a folder that can't be written takes none.

Only a disk on which nothing stands can have another size.  A child may grow beyond its parent: what that
does not have reads as zeros, and others than VMware read it so.  Merging the child makes its parent as large
(see ops/snapshot/commit.py).  It can't shrink, as there would be no way back.

What is not done: partition tables and file systems inside are the guest's, and stay as they are.
streamOptimized files can't change; convert makes another.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import OptionError, WriteRefused
from nbd_vmdk.extents.base import NOTHING
from nbd_vmdk.extents.cowd import CowdExtent
from nbd_vmdk.extents.flat import FlatExtent
from nbd_vmdk.extents.hosted import HostedExtent
from nbd_vmdk.link import LinkExtent
from nbd_vmdk.ondisk.descriptor import ExtentLine
from nbd_vmdk.opening import open_in
from nbd_vmdk.ops.copy import Progress
from nbd_vmdk.ops.resize.changes import Change, is_zero
from nbd_vmdk.ops.resize.description import describe
from nbd_vmdk.ops.resize.extents import kept_lines, leftovers
from nbd_vmdk.ops.resize.growing import grow_link
from nbd_vmdk.ops.resize.tables import shrink_cowd, shrink_hosted
from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.names import final_name
from nbd_vmdk.ops.snapshot.tree import LinkFile, children_of
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MAX_OFFSET, MIB, SECTOR, align_up, format_size

log = logging.getLogger("nbd_vmdk")

_PIECE: Final = MIB


@dataclass(slots=True)
class Resized:
    """What a resize does, or did; sizes in bytes.

    steps  what is done, in order, in words
    lost   where the first data behind the new end is, None if there is none
    """

    image: str
    old_size: int
    new_size: int
    steps: list[str] = field(default_factory=list)
    lost: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "image": self.image,
            "old-size": self.old_size,
            "new-size": self.new_size,
            "steps": self.steps,
            "data-lost-from": self.lost,
        }


def resize(
    path: str | os.PathLike[str],
    size: int | None = None,
    *,
    by: int = 0,
    shrink: bool = False,
    reserve: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Resized:
    """Give the image ``path`` the size ``size``, or ``by`` bytes more or less than it has.

    Sizes are rounded up to whole sectors.  With ``shrink`` data behind the new end may be lost; with
    ``reserve`` files without tables take the space of what is added at once; ``progress`` is told how much of
    what will be cut off has been looked at.  ``options`` are allow_dirs and drop_ctk of OpenOptions.

    Raises WriteRefused for a link that has children or a kind that can't change, OptionError for a size that
    can't be, InUse; then nothing has changed.  After any later error, and a kill, the same call goes on.
    """
    place = files.Place(path, files.opening(options), mend=not dry_run)
    link = place.link
    if final_name(link.name) is not None:
        raise WriteRefused(link.label, why="another link is being merged into it", hint="finish that first")
    links = place.links()
    if children := children_of(link, links):
        raise WriteRefused(
            link.label,
            why=f"{children[0].label} stands on it, and needs a parent that stays as it is",
            hint="resize the top of the chain instead" + _above(children, links),
        )
    with ExitStack() as held:
        work = _Work(place, _open(held, place, dry_run=dry_run), held)
        wanted = work.disk.size + by if size is None else size
        wanted = align_up(wanted, SECTOR)
        if not 0 < wanted <= MAX_OFFSET:
            raise OptionError(None, why=f"{wanted} bytes are no size of a disk")
        found = Resized(link.label, work.disk.size, wanted)
        if wanted > work.disk.size:
            changes = work.grow(wanted, reserve=reserve)
            if len(work.disk.links) > 1:
                log.warning(
                    "%s: VMware opens no link that is larger than its parent; nbd-vmdk snapshot commit %s "
                    "makes the parent as large and merges it into that, rebase --flatten makes it a disk of "
                    "its own",
                    link.label,
                    link.word,
                )
        else:
            changes = work.shrink(wanted, found, shrink=shrink or dry_run, progress=progress)
        found.steps = [change.text for change in changes]
        if not dry_run:
            for change in changes:
                change.rehearse()
            for change in changes:
                change.apply()
    return found


def _above(children: list[LinkFile], links: Sequence[LinkFile]) -> str:
    """The command for the link on top of ``children``, for a hint; nothing where there are several."""
    for _ in links:  # parents may go round
        if len(children) != 1:
            break
        if not (above := children_of(children[0], links)):
            return f": nbd-vmdk resize {children[0].word}"
        children = above
    return ""


def _open(held: ExitStack, place: files.Place, *, dry_run: bool) -> Disk:
    options = place.options
    chosen = OpenOptions(
        writable=True,
        drop_ctk=options.drop_ctk and not dry_run,  # which would be done at once
        allow_dirs=options.allow_dirs,
        cache_size=options.cache_size,
    )
    with files.writable_wanted():
        disk = held.enter_context(open_in(place.link.folder, place.link.name, chosen))
    if not disk.writable:
        raise WriteRefused(
            place.link.label,
            why=files.why_read_only(disk.links[0]),
            hint="nbd-vmdk convert makes a copy of another --type, which can have another size then",
        )
    return disk


class _Work:
    """One resize: the open disk, which keeps everybody else away, and the steps."""

    def __init__(self, place: files.Place, disk: Disk, held: ExitStack) -> None:
        self.place = place
        self.disk = disk
        self.link = disk.links[0]
        self._held = held
        descriptor = self.link.descriptor
        assert descriptor is not None
        self._descriptor = descriptor
        self._lines = [line for line in descriptor.extents if line.sectors]

    # Growing.

    def grow(self, size: int, *, reserve: bool) -> list[Change]:
        """The steps to a larger disk."""
        below = self.disk.links[1].size if len(self.disk.links) > 1 else 0
        name = self.place.link.name
        return grow_link(self._held, self.link, size, below=below, name=name, reserve=reserve)

    # Shrinking.

    def shrink(self, size: int, found: Resized, *, shrink: bool, progress: Progress | None) -> list[Change]:
        """The steps to a smaller disk, or to the end of an earlier resize to this size."""
        old = self.disk.size
        if size < old and len(self.disk.links) > 1:
            raise WriteRefused(
                self.link.name,
                why="a child can't be smaller than it is: its parent would show through if it grew again",
                hint="nbd-vmdk snapshot rebase --flatten makes it independent",
            )
        found.lost = self._first_data(size, progress)
        if found.lost is not None and not shrink:
            raise WriteRefused(
                self.link.name,
                why=f"there is data behind the new end, from byte {found.lost} on",
                hint="shrink what is on the disk first, in the guest; --shrink gives that data up",
            )
        lines = kept_lines(self._lines, size // SECTOR)
        changes = []
        if size < old:
            text = f"{self.link.name}: the last {format_size(old - size)} of the disk are given up"
            changes = [
                Change(text, lambda: self._discard(size)),
                describe(self._held, self.link, lines, size),
            ]
        doomed = self._doomed(len(lines))
        kept = self.link.extents[len(lines) - 1]
        if self._is_longer(kept, lines[-1]):
            assert kept.extent.storage is not None
            text = f"{kept.extent.storage.name}: cut to its new size"
            changes.append(Change(text, lambda: _cut(kept, lines[-1])))
        if doomed:
            changes.append(Change(f"removed: {', '.join(doomed)}", lambda: files.remove_files(doomed)))
        return changes

    def _first_data(self, begin: int, progress: Progress | None) -> int | None:
        """The first byte from ``begin`` on that is not zero."""
        end = self.disk.size
        for run in self.disk.runs(begin, end - begin):
            at, stop = run.offset, run.offset + run.length
            while run.kind not in NOTHING and at < stop:
                piece = self.disk.pread(min(_PIECE, stop - at), at)
                if piece.count(0) != len(piece):
                    return at + len(piece) - len(piece.lstrip(b"\0"))
                at += len(piece)
                if progress is not None:
                    progress(at - begin, end - begin)
        return None

    def _discard(self, size: int) -> None:
        self.disk.zero(self.disk.size - size, size, may_trim=True)
        self.disk.flush()

    def _doomed(self, kept: int) -> list[str]:
        """The files of the extents from ``kept`` on, and what an earlier attempt left of such ones."""
        keeps = {entry.extent.storage for entry in self.link.extents[:kept]}
        keeps.add(self.link.storages[0])
        storages: dict[Storage, None] = {}
        for entry in self.link.extents[kept:]:
            storage = entry.extent.storage
            if storage is not None and storage not in keeps:
                storages[storage] = None
        own = files.own_files(self.place.link, list(storages), self.place.links())
        tracking = self._descriptor.change_track_path
        own = [path for path in own if tracking is None or not path.endswith(f"/{tracking}")]
        return own + leftovers(self.link, self._lines)

    def _is_longer(self, entry: LinkExtent, line: ExtentLine) -> bool:
        extent = entry.extent
        if isinstance(extent, (HostedExtent, CowdExtent)):
            return extent.header.capacity_sectors > line.sectors
        if isinstance(extent, FlatExtent) and entry.writable is not None:
            alone = [each for each in self.link.extents if each.extent.storage is extent.storage]
            end = extent.start + line.sectors * SECTOR
            return (
                len(alone) == 1
                and extent.storage.size > end
                and (
                    line.sectors * SECTOR < extent.size
                    or is_zero(extent.storage, end, extent.storage.size - end)
                )
                and not getattr(extent.storage, "is_device", False)
            )
        return False


def _cut(entry: LinkExtent, line: ExtentLine) -> None:
    extent = entry.extent
    if isinstance(extent, HostedExtent):
        shrink_hosted(extent.storage, line.sectors)
    elif isinstance(extent, CowdExtent):
        shrink_cowd(extent.storage, extent.header, line.sectors)
    elif isinstance(extent, FlatExtent):
        extent.storage.truncate(extent.start + line.sectors * SECTOR)
        extent.storage.sync()
