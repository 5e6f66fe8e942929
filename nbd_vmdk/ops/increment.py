"""Incremental copies: only what may differ from an earlier state of the disk, which a copy holds already.

The earlier state is a link of the disk's chain, a snapshot; what was written since is found in the tables
alone (see since.py).  There are two sorts of copies:

*A new child link* of a VMDK that holds what the snapshot does: the full copy, or the increment before this
one.  Grains that differ from the parent are in it, as data, or as zeros where zeros hide older data; all else
is a hole.  Full copy and increments are a chain like any other, which every reader of VMDKs opens at its last
link.  The new link appears when it is whole, or not at all.  It has the disk's size, whatever its
parent's is: where the disk grew, what the parent does not have is zeros.

*An update in place* of a raw file, a device or an NBD export that holds the snapshot's state: all that may
differ is written, zeros too.  A repetition does all of it again, which is how one that was stopped goes on.

How it is known that the parent holds what the snapshot does: by the content ID.  It is changed by whoever
writes to a link, so a copy keeps its source's: copies made by convert do, increments do, and so do files
that were copied as they are.  One that says "never written" proves nothing.  With ``verify`` nothing needs
to be believed: the child, with all its parents, is compared with the disk.

For an update in place the caller's word must do.  With ``verify`` all that can't differ is compared before
anything is written, so a target that holds something else is found out unharmed.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, Final

from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import ChainError, Difference, OptionError
from nbd_vmdk.extents.base import NOTHING, Kind
from nbd_vmdk.link import Link
from nbd_vmdk.opening import open_disk
from nbd_vmdk.ops.content import Range
from nbd_vmdk.ops.convert import (
    HOLE_GRAIN,
    Made,
    Place,
    Work,
    compare,
    final_names,
    known_cid,
    refuse_itself,
    set_cid,
)
from nbd_vmdk.ops.copy import Copied, copy, widened
from nbd_vmdk.ops.create import Created, CreateOptions, create_planned
from nbd_vmdk.ops.create.child import hosted_child_kind, is_elsewhere, parent_hint
from nbd_vmdk.ops.create.options import find_kind
from nbd_vmdk.ops.create.parent import held_parent
from nbd_vmdk.ops.rewrite import real_path
from nbd_vmdk.ops.sides import Comparer, DiskSource
from nbd_vmdk.ops.since import changed_since
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.storage.newfiles import NewFiles
from nbd_vmdk.units import MIB, align_down, align_up

_ZEROS: Final = bytes(MIB)


class Changed:
    """A source of the copier: what of ``disk`` may differ from what its link at ``depth`` shows.

    All else is a HOLE.  ``inverse`` turns that round.  Ranges are widened to whole blocks of ``block`` bytes.
    """

    def __init__(self, disk: Disk, depth: int, *, block: int = 1, inverse: bool = False) -> None:
        self.size = disk.size
        self.read_into = disk.read_into
        self._whole = DiskSource(disk)
        self._disk = disk
        self._depth = depth
        self._block = block
        self._inverse = inverse

    def runs(self, offset: int, length: int) -> Iterator[tuple[Kind, int]]:
        """See copy.Source."""
        at, end = offset, offset + length
        for begin, count in self._ranges():
            begin, stop = max(begin, at), min(begin + count, end)
            if stop > begin:
                yield from self._run(at, begin, is_changed=False)
                yield from self._run(begin, stop, is_changed=True)
                at = stop
        yield from self._run(at, end, is_changed=False)

    def _ranges(self) -> Iterator[Range]:
        done = 0
        for offset, length in changed_since(self._disk, self._depth):
            begin = max(align_down(offset, self._block), done)
            done = min(align_up(offset + length, self._block), self.size)
            if done > begin:
                yield Range(begin, done - begin)

    def _run(self, begin: int, end: int, *, is_changed: bool) -> Iterator[tuple[Kind, int]]:
        if begin == end:
            return
        if is_changed is self._inverse:
            yield Kind.HOLE, end - begin
        else:
            yield from widened(self._whole.runs(begin, end - begin), begin, end, self._block)


class IncrementSink:
    """A sink that puts into ``child`` what its parents, which are ``below``, do not have.

    ``data`` counts the bytes that were put there, those of zeros not among them.
    """

    def __init__(self, child: Disk, below: Disk) -> None:
        self._child = child
        self._below = below
        self._grain = max(child.links[0].grain, 1)
        self._own = threading.local()
        self._lock = threading.Lock()
        self.data = 0

    def write(self, buf: memoryview, offset: int) -> None:
        """See copy.Sink."""
        there = self._read_below(len(buf), offset)
        for begin, end in self._different(bytes(buf), there, offset):
            self._child.pwrite(buf[begin:end], offset + begin)
            with self._lock:
                self.data += end - begin

    def zero(self, offset: int, length: int) -> None:
        """See copy.Sink."""
        inside = max(min(length, self._below.size - offset), 0)
        for run in self._below.runs(offset, inside) if inside else ():
            if run.kind in NOTHING:
                continue
            for at in range(run.offset, run.offset + run.length, MIB):
                step = min(MIB, run.offset + run.length - at)
                there = self._read_below(step, at)
                for begin, end in self._different(_ZEROS[:step], there, at):
                    self._child.zero(end - begin, at + begin, may_trim=True)

    def _read_below(self, length: int, offset: int) -> bytearray:
        """A buffer of the thread's own that begins with what the parents have."""
        buf: bytearray | None = getattr(self._own, "buf", None)
        if buf is None or len(buf) < length:
            buf = self._own.buf = bytearray(max(length, MIB))
        inside = max(min(length, self._below.size - offset), 0)
        with memoryview(buf) as view:
            if inside:
                self._below.read_into(view[:inside], offset)
            view[inside:length] = bytes(length - inside)
        return buf

    def _different(self, mine: bytes, there: bytearray, offset: int) -> Iterator[tuple[int, int]]:
        """The parts of ``mine`` whose grains differ, from where to where, neighbours made one."""
        first: int | None = None
        at = 0
        while at < len(mine):
            end = min(align_down(offset + at, self._grain) + self._grain - offset, len(mine))
            if there.startswith(mine[at:end], at):
                if first is not None:
                    yield first, at
                first = None
            elif first is None:
                first = at
            at = end
        if first is not None:
            yield first, at


def write_increment(
    disk: Disk,
    depth: int,
    path: str,
    base: str,
    work: Work,
    create: Mapping[str, Any],
    *,
    cids_hold: bool = True,
    allow_dirs: tuple[str | os.PathLike[str], ...] = (),
) -> Made:
    """Make ``path`` a child of the image ``base`` that together with it has the bytes of ``disk``.

    ``base`` has what the link of ``disk`` at ``depth`` shows: known by its content ID, or with work.verify
    proved; ``cids_hold`` says that those of ``disk`` can be relied on.  ``create`` are fields of
    CreateOptions, ``allow_dirs`` those folders that ``base`` may name files in.

    Raises ChainError if the base is another disk, Difference if verifying finds it is, and all that creating
    raises.
    """
    since = disk.links[depth]
    with open_disk(base, allow_dirs=allow_dirs) as below:
        _check_base(below, since)
        if not work.verify:
            _check_cids(below.links[0], since, cids_hold=cids_hold)
        refuse_itself((file for link in below.links for file in link.storages), path)
        with NewFiles(path, replace=work.replace) as new, final_names(new.folder, path):
            there = new.path(new.name)
            fields = {**create, "parent": base, "allow_dirs": allow_dirs}
            created = _create(there, new.place, below, disk.size, fields)
            copied = _fill(disk, depth, there, base, below, work, allow_dirs)
            cid = known_cid(disk.links[0])
            if cid is not None and cids_hold:
                set_cid(there, cid, path)
            if work.verify:
                with open_disk(there, parent=base, locks=False, allow_dirs=allow_dirs) as made:
                    try:
                        compare(DiskSource(disk), DiskSource(made), path, work)
                    except Difference as error:
                        error.hint = f"{base} does not hold what {since.name} does: name another base"
                        raise
            return Made(copied, new.publish(main=new.name), created)


def _check_base(below: Disk, since: Link) -> None:
    if below.size != since.size:
        why = f"it has {below.size} bytes and {since.name} has {since.size}, so it is no copy of that"
        hint = f"name the copy that was made of {os.path.basename(since.name)}"
        raise ChainError(below.links[0].name, why=why, hint=hint)


def _check_cids(base: Link, since: Link, *, cids_hold: bool) -> None:
    if not cids_hold:
        why = "with content IDs that are not minded, or with other parents, what the disk holds is not known"
        raise ChainError(
            since.name, why=why, hint="add --verify, which compares what comes out with the disk"
        )
    if since.cid != base.cid or known_cid(since) is None:
        of_base, of_since = (_shown(link.cid) for link in (base, since))
        raise ChainError(
            base.name,
            why=f"its content ID is {of_base} and that of {since.name} is {of_since}, so it is not known "
            "to hold the same",
            hint=f"name the copy that was made of {os.path.basename(since.name)}; or add --verify, which "
            "compares what comes out with the disk",
        )


def _shown(cid: int | None) -> str:
    return "none" if cid is None else f"{cid:08x}"


def _create(there: str, place: str, below: Disk, size: int, create: dict[str, Any]) -> Created:
    """The empty child, of the disk's size whatever that of its parent is; it will stand in ``place``."""
    top = below.links[0]
    if create.get("kind") is None and create.get("product") is None:
        create["kind"] = hosted_child_kind(top.create_type)
    if create.get("product") is None and find_kind(create["kind"]).word == "SPARSE":
        create.setdefault("zeroed_grain", True)  # zeros that hide older data then take no space
    warnings = []
    if isinstance(top.folder, LocalFolder):
        found = real_path(top.storages[0])
        create["parent_hint"] = hint = parent_hint(found, place)
        if is_elsewhere(hint):
            folder = os.path.dirname(found)
            warnings.append(f"the base is in another folder: opening the copy takes --allow-dir {folder}")
    if size != below.size:
        warnings.append(
            "it differs in size from its base, as the disk does, and VMware's products refuse that"
        )
    try:
        options = CreateOptions(**create)
    except TypeError as error:
        raise OptionError(None, why=str(error)) from None
    with held_parent(there, options) as parent:
        assert parent is not None
        created = create_planned(there, None, options, replace(parent, size=size))
    return replace(created, warnings=(*created.warnings, *warnings))


def _fill(
    disk: Disk,
    depth: int,
    there: str,
    base: str,
    below: Disk,
    work: Work,
    allow_dirs: tuple[str | os.PathLike[str], ...],
) -> Copied:
    with closing(open_disk(there, writable=True, parent=base, locks=False, allow_dirs=allow_dirs)) as child:
        sink = IncrementSink(child, below)
        copied = copy(
            Changed(disk, depth),
            sink,
            zero_grain=max(child.links[0].grain, HOLE_GRAIN),
            threads=work.threads,
            progress=work.progress,
        )
    return Copied(sink.data, copied.zeros, disk.size - sink.data - copied.zeros)


def update(disk: Disk, depth: int, place: Place, work: Work) -> Copied:
    """Bring what has the state of the link at ``depth`` to that of ``disk``, in place.

    Raises StorageError if it is too small, OptionError for a file of a size that neither state has, and with
    work.verify Difference, before anything was written if it had another state.
    """
    since = disk.links[depth]
    if place.resize is not None and place.size not in (since.size, disk.size):
        raise OptionError(
            place.name,
            why=f"it has {place.size} bytes and {since.name} has {since.size}, so it can't hold its state",
            hint="without --onto and --since a full copy is made",
        )
    if place.resize is None:
        place.check_size(disk.size)
    threads, told = work.threads, work.progress
    changed = Changed(disk, depth, block=place.block)
    if work.verify:
        rest = Changed(disk, depth, block=place.block, inverse=True)
        try:
            copy(rest, Comparer(place.result, place.name), threads=threads, progress=told)
        except Difference as error:
            error.hint = f"it does not hold the state of {since.name}; nothing was written"
            raise
    if place.resize is not None and place.size < disk.size:
        place.resize(disk.size)
    zero_grain = align_up(HOLE_GRAIN, place.block)
    copied = copy(changed, place.sink, zero_grain=zero_grain, threads=threads, progress=told)
    if place.resize is not None and place.size > disk.size:
        place.resize(disk.size)
    place.flush()
    if work.verify:
        copy(changed, Comparer(place.result, place.name), threads=threads, progress=told)
    return copied
