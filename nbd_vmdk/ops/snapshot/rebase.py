"""Giving a child another parent without changing what it shows.

Where a child holds nothing itself, its parent shows through.  Under another parent it would show something
else wherever the two differ; so the old bytes are first copied into the child there, which changes nothing of
what it shows while it has its old parent.  Only when they are durable the child is pointed to the new one, in
one write.  Whatever stops this leaves the child on the one parent or the other, and right on both; running it
again goes on.  The child's content ID stays, as its content does, and so do its own children.

Both chains are asked for their runs, and what lies in the same place of the same file, or is known to be
zeros in both, is not read at all: rebasing to a grandparent reads what the parent holds and no more.

A child may have been made larger than its parent, or that than its own.  Such a child may stand on any
smaller one, behind whose end are zeros; others must be as large as their new parent.

``relink`` changes the pointer alone, once reading has proved that nothing would have to be copied, or
unchecked, which is for parents that were moved, or touched but not changed.
"""

import logging
import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import ChainError, ContentIdMismatch, Difference, InUse, ParentNotFound, WriteRefused
from nbd_vmdk.extents.base import NOTHING, Kind
from nbd_vmdk.ondisk.descriptor import NO_PARENT, Descriptor
from nbd_vmdk.opening import open_in
from nbd_vmdk.ops.copy import Progress, copy
from nbd_vmdk.ops.create.child import parent_hint
from nbd_vmdk.ops.rewrite import DescriptorFile, real_path
from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.merge import zero_block
from nbd_vmdk.ops.snapshot.names import final_name
from nbd_vmdk.ops.snapshot.tree import LinkFile, ancestors_of
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.runs import Run
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.units import SECTOR

log = logging.getLogger("nbd_vmdk")

#: What a child has from its base and needs when it stands alone.
_INHERITED: Final = (
    "ddb.adapterType",
    "ddb.geometry.cylinders",
    "ddb.geometry.heads",
    "ddb.geometry.sectors",
    "ddb.geometry.biosCylinders",
    "ddb.geometry.biosHeads",
    "ddb.geometry.biosSectors",
    "ddb.virtualHWVersion",
    "ddb.toolsVersion",
    "ddb.toolsInstallType",
)


@dataclass(slots=True)
class Rebased:
    """What a rebase does, or did.

    parent   the new parent's path, None for none
    hint     how the child names it
    copied   bytes in which the parents differ, which go into the child
    """

    child: LinkFile
    parent: str | None
    hint: str | None
    copied: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"child": self.child.label, "parent": self.parent, "hint": self.hint, "copied": self.copied}


def rebase(
    path: str | os.PathLike[str],
    parent: str | os.PathLike[str] | None,
    *,
    relink: bool = False,
    unchecked: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    threads: int | None = None,
    **options: Any,
) -> Rebased:
    """Make ``parent`` the parent of the child ``path``; None makes the child independent.

    With ``relink`` only the pointer is changed: after a proof that both parents show the same through the
    child, or ``unchecked``.  With ``dry_run`` nothing is changed.  ``options`` are allow_dirs, allow_devices
    and drop_ctk of OpenOptions.  Raises WriteRefused, ChainError and InUse before anything is changed.
    """
    place = files.Place(path, files.opening(options, locks=not dry_run), mend=not dry_run)
    child = place.link
    with ExitStack() as held:
        new = None if parent is None else _open_new(held, parent, child, place.options)
        done = Rebased(child, None if parent is None else os.fspath(parent), None)
        if new is not None:
            folder = os.path.dirname(os.path.realpath(child.path))
            done.hint = parent_hint(real_path(new.links[0].storages[0]), folder)
            _fit(child, new)
        if unchecked:
            if not dry_run:
                _point(files.hold(held, child), new, None)
            return done
        disk, file, why = _open_child(held, place, relink=relink, dry_run=dry_run)
        there = None if new is None else _Lengthened(new)
        sink = _Differences(disk, there, write=disk.writable and not dry_run, prove=why is not None)
        try:
            copy(_Shown(disk, there), sink, progress=progress, threads=threads)
        except Difference as error:
            raise _differs(done, error, why) from None
        done.copied = sink.bytes
        if file is not None:
            disk.flush()
            _point(file, new, disk)
            disk.close()
    return done


def _open_new(held: ExitStack, parent: str | os.PathLike[str], child: LinkFile, options: OpenOptions) -> Disk:
    """The new parent with its chain."""
    folder, name = LocalFolder.for_image(parent, options.allow_dirs, options.allow_devices)
    label = folder.label(name)
    if final_name(name) is not None:
        raise WriteRefused(label, why="another link is being merged into it", hint="finish that first")
    new = held.enter_context(
        open_in(
            folder,
            name,
            OpenOptions(
                allow_dirs=options.allow_dirs,
                allow_devices=options.allow_devices,
                cache_size=options.cache_size,
                locks=options.locks,
            ),
        )
    )
    for link in new.links:
        if link.storages[0].identity == child.identity:
            itself = link is new.links[0]
            why = "it can't stand on itself" if itself else f"{label} stands on it, so it can't be its parent"
            raise ChainError(child.label, why=why)
    if new.links[0].cid in (None, NO_PARENT):
        raise ChainError(label, why="it has no content ID by which a child could know it")
    for storage in new.links[0].storages:
        if how := storage.writer():
            raise InUse(storage.name, how=how, hint="stop the other user: a parent must not change any more")
    return new


def _open_child(
    held: ExitStack, place: files.Place, *, relink: bool, dry_run: bool
) -> tuple[Disk, DescriptorFile | None, str | None]:
    """The child with its chain; its descriptor, if it is to be changed; why data can't be copied into it."""
    child, options = place.link, place.options
    why = None
    if not relink:
        chosen = OpenOptions(
            writable=True,
            write_parent=True,  # its content stays, so no child of its own minds
            drop_ctk=options.drop_ctk,
            allow_dirs=options.allow_dirs,
            allow_devices=options.allow_devices,
            cache_size=options.cache_size,
            locks=options.locks,
        )
        disk = _open_chain(held, child, chosen)
        if disk.writable:
            if dry_run:
                return disk, None, None
            disk.links[0].keep_cid()
            return disk, held.enter_context(DescriptorFile(disk.links[0].storages[0])), None
        why = files.why_read_only(disk.links[0])
        disk.close()
    # Its descriptor is locked as for writing, which would be in the way of a reader's lock of our own.
    file = None if dry_run else files.hold(held, child)
    disk = _open_chain(held, child, files.unlocked(options))
    return disk, file, why or ("" if not dry_run else None)


def _open_chain(held: ExitStack, child: LinkFile, options: OpenOptions) -> Disk:
    try:
        with files.writable_wanted():
            return held.enter_context(open_in(child.folder, child.name, options))
    except (ContentIdMismatch, ParentNotFound) as error:
        error.hint = (
            "what it showed can't be known from this chain; if you know that the parent you name has what "
            "it had, use --relink --unchecked"
        )
        raise


def _fit(child: LinkFile, new: Disk) -> None:
    if any(line.type in ("FLAT", "VMFS") for line in child.descriptor.extents):
        raise WriteRefused(child.label, why="a flat disk has no holes for a parent to show through")
    size = child.descriptor.total_sectors * SECTOR
    if new.size > size or (new.size < size and not _is_uneven(child)):
        parent = new.links[0].name
        if size < new.size:
            hint = f"make it as large first: nbd-vmdk resize {child.word} {new.size}"
        else:
            larger = f"nbd-vmdk resize {shlex.quote(parent)} {size}"
            hint = f"make that one as large first, if nothing stands on it: {larger}"
        raise ChainError(child.label, why=f"it has {size} bytes and {parent} {new.size}", hint=hint)


def _is_uneven(child: LinkFile) -> bool:
    """Whether the child is larger than some link below it, which VMware's products refuse already."""
    size = child.descriptor.total_sectors
    return any(link.descriptor.total_sectors < size for link in ancestors_of(child))


def _differs(done: Rebased, error: Difference, why: str | None) -> WriteRefused:
    where = done.parent or "nothing"
    at = error.fields["offset"]
    if not why:
        return WriteRefused(
            done.child.label,
            why=f"{where} does not have what it shows through the child now, from byte {at} on",
            hint="without --relink the difference is copied into the child first",
        )
    return WriteRefused(
        done.child.label,
        why=f"the difference to {where}, from byte {at} on, can't be copied into it: {why}",
        hint="convert it, with all its parents, to a disk of its own",
    )


def _point(file: DescriptorFile, new: Disk | None, disk: Disk | None) -> None:
    if new is not None:
        top = new.links[0]
        assert top.cid is not None
        files.point(file, real_path(top.storages[0]), top.cid)
        return
    descriptor = files.pointed(file.descriptor, None, NO_PARENT)
    if disk is not None:
        descriptor = _independent(descriptor, disk)
    file.replace(descriptor)


def _independent(descriptor: Descriptor, disk: Disk) -> Descriptor:
    """The descriptor with what it had from its parents, as far as it does not say so itself."""
    for key in _INHERITED:
        for link in disk.links[1:]:
            value = link.descriptor.get(key) if link.descriptor is not None else None
            if value is not None and descriptor.get(key) is None:
                descriptor = descriptor.set(key, value)
    return descriptor


class _Lengthened:
    """A parent that is as large as any child: behind its end are zeros."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.links = disk.links

    def pread(self, length: int, offset: int) -> bytes:
        """The bytes there."""
        inside = max(min(length, self._disk.size - offset), 0)
        there = self._disk.pread(inside, offset) if inside else b""
        return there.ljust(length, b"\0")

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """See Disk.runs."""
        inside = max(min(length, self._disk.size - offset), 0)
        if inside:
            yield from self._disk.runs(offset, inside)
        if inside < length:
            yield Run(offset + inside, length - inside, Kind.HOLE, None, None, None)


class _Shown:
    """What shows through the child's own holes, where the new parent may have something else.

    A source of the copier; HOLE stands for what needs no look.
    """

    def __init__(self, disk: Disk, new: _Lengthened | None) -> None:
        self._disk = disk
        self._new = new
        self.size = disk.size
        self.read_into = disk.read_into
        self._files = {
            storage.name: storage.identity
            for each in (disk, new)
            if each is not None
            for link in each.links
            for storage in link.storages
        }

    def runs(self, offset: int, length: int) -> Iterator[tuple[Kind, int]]:
        """See copy.Source."""
        for run in self._disk.runs(offset, length):
            if run.depth == 0:
                yield Kind.HOLE, run.length
            elif self._new is None:
                yield (Kind.HOLE if run.kind in NOTHING else Kind.DATA), run.length
            else:
                for other in self._new.runs(run.offset, run.length):
                    yield self._compared(run, other), other.length

    def _compared(self, run: Run, other: Run) -> Kind:
        if run.kind in NOTHING:
            return Kind.HOLE if other.kind in NOTHING else Kind.ZERO
        if run.kind is Kind.DATA is other.kind:
            assert run.at is not None
            assert run.file is not None
            assert other.file is not None
            file = self._files.get(run.file)
            is_same = file is not None and file == self._files.get(other.file)
            if is_same and run.at + other.offset - run.offset == other.at:
                return Kind.HOLE
        return Kind.DATA


class _Differences:
    """A sink of the copier that takes what the new parent does not have.

    ``write``  it goes into the child; else it is only counted
    ``prove``  it is an error
    """

    def __init__(self, disk: Disk, new: _Lengthened | None, *, write: bool, prove: bool) -> None:
        self._disk = disk
        self._new = new
        self._write = write
        self._prove = prove
        self._parented = len(disk.links) > 1
        self._block = zero_block(disk.links[0])
        self._zeros = bytes(self._block)
        self._lock = threading.Lock()
        self.bytes = 0

    def write(self, buf: memoryview, offset: int) -> None:
        """See copy.Sink."""
        there = bytes(len(buf)) if self._new is None else self._new.pread(len(buf), offset)
        mine = bytes(buf)
        if mine == there:
            return
        for begin in range(0, len(mine), self._block):
            piece = mine[begin : begin + self._block]
            if piece != there[begin : begin + self._block]:
                self._take(piece, offset + begin)

    def zero(self, offset: int, length: int) -> None:
        """See copy.Sink."""
        assert self._new is not None
        for begin in range(offset, offset + length, self._block):
            piece = self._zeros[: min(self._block, offset + length - begin)]
            if self._new.pread(len(piece), begin) != piece:
                self._take(piece, begin)

    def _take(self, piece: bytes, offset: int) -> None:
        with self._lock:
            self.bytes += len(piece)
        if self._prove:
            raise Difference(self._disk.links[0].name, offset=offset)
        if not self._write:
            return
        # Zeroing a hole of what has no parent yet would leave it a hole.
        if self._parented and piece == self._zeros[: len(piece)]:
            self._disk.zero(len(piece), offset, may_trim=True, by_itself=True)
        else:
            self._disk.pwrite(piece, offset)
