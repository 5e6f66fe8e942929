"""One VMDK: a descriptor and its extents, in guest order, as one row of bytes.

A link knows nothing of its parent.  What it does not have it maps as HOLE; who holds the chain goes on to
the next link (see disk.py).  Opening one is the opener's work.
"""

import shlex
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from nbd_vmdk.errors import WriteRefused
from nbd_vmdk.extents.base import Below, Edges, Extent, Mapping, Reader, WritableExtent, Writer
from nbd_vmdk.extents.flat import ZeroExtent
from nbd_vmdk.ondisk.descriptor import Descriptor, random_cid
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import ClosedFolder, Folder
from nbd_vmdk.units import GIB

#: Bytes that are zeroed or trimmed between two looks at what a commit would have to hold, a multiple of
#: every grain; and grains, where they are small.
_STEP = GIB
_STEP_GRAINS = 1 << 16


@dataclass(frozen=True, slots=True)
class LinkExtent:
    """An extent in its place: ``start`` is its first guest byte; access is RW, RDONLY or NOACCESS."""

    start: int
    extent: Extent
    access: str

    @property
    def writable(self) -> WritableExtent | None:
        """The extent, if guest writes may go to it."""
        extent = self.extent
        if self.access == "RW" and isinstance(extent, WritableExtent) and extent.writable:
            return extent
        return None


@dataclass(frozen=True, slots=True)
class DescriptorPlace:
    """Where a link's descriptor is: a file, and the byte in it."""

    storage: Storage
    at: int


class Link:
    """One link of a chain.

    name         the file that was opened, as the user would write it
    create_type  what the descriptor calls the kind, or the extents' type word where there is none
    descriptor   None for an extent that was opened without its descriptor
    folder       where the files that its descriptor names are looked for, until it is closed
    storages     all its files, each once
    """

    def __init__(
        self,
        *,
        name: str,
        folder: Folder,
        extents: Sequence[LinkExtent],
        storages: Sequence[Storage],
        descriptor: Descriptor | None,
        place: DescriptorPlace | None,
        warnings: Sequence[str],
        incomplete: bool = False,
    ) -> None:
        self.name = name
        self.folder: Folder = folder
        self.extents = tuple(extents)
        self.storages = tuple(storages)
        self.descriptor = descriptor
        self.warnings = list(warnings)
        #: Holes may belong to a parent that nobody knows: this is a delta's extent without its descriptor.
        self.incomplete = incomplete
        self.size = sum(entry.extent.size for entry in self.extents)
        self.create_type = (descriptor and descriptor.create_type) or self.extents[0].extent.type_word
        self.grain = max(entry.extent.grain for entry in self.extents)
        self._place = place
        self._starts = [entry.start for entry in self.extents]
        for entry in self.extents:
            entry.extent.place(entry.start)
        self._cid_lock = threading.Lock()
        self._cid_changed = False
        self.cid = descriptor.cid if descriptor is not None else None
        if len(self.extents) == 1:
            # The usual case needs no search for the extent.
            self.map: Callable[[int, int], Mapping] = self.extents[0].extent.map
        else:
            self.map = self._map

    @property
    def writable(self) -> bool:
        """Some part of it can be written."""
        return any(entry.writable for entry in self.extents)

    @property
    def actual_size(self) -> int:
        """Bytes that all its files really occupy."""
        return occupied(self.storages)

    def _map(self, offset: int, length: int) -> Mapping:
        index = bisect_right(self._starts, offset) - 1
        entry = self.extents[index]
        within = offset - entry.start
        return entry.extent.map(within, min(length, entry.extent.size - within))

    def reader(self, otherwise: Reader) -> Reader:
        """A function that reads at once what one extent can, and leaves the rest; see Extent.reader."""
        if len(self.extents) == 1:
            return self.extents[0].extent.reader(otherwise)
        starts = self._starts
        # A disk of 2 TiB has a thousand extents, few of which may ever be read.
        readers: list[Reader | None] = [None] * len(starts)

        def read(buf: memoryview, offset: int) -> None:
            index = bisect_right(starts, offset) - 1
            start = starts[index]
            inside = readers[index]
            if inside is None:
                inside = readers[index] = self.extents[index].extent.reader(
                    lambda buf, within: otherwise(buf, start + within)
                )
            inside(buf, offset - start)

        return read

    def runs(self, offset: int, length: int) -> Iterator[Mapping]:
        """What backs a range, in full detail; see Extent.runs."""
        for entry, within, count in self._parts(offset, length):
            yield from entry.extent.runs(within, count)

    def presence(self, offset: int, length: int, unit: int) -> bytes:
        """For each unit of a range whether it may hold anything; see Extent.presence."""
        entry = self.extents[bisect_right(self._starts, offset) - 1]
        within = offset - entry.start
        if within + length > entry.extent.size:
            return b"\1" * -(-length // unit)
        return entry.extent.presence(within, length, unit)

    def edges(self, offset: int, length: int) -> Iterator[Edges]:
        """Where in a range something begins or ends, if no parent fills the holes; see Extent.edges."""
        for entry, within, count in self._parts(offset, length):
            start = entry.start
            for places, something in entry.extent.edges(within, count):
                yield [at + start for at in places] if start else places, something

    def _parts(self, offset: int, length: int) -> Iterator[tuple[LinkExtent, int, int]]:
        """Split a range at the edges of extents: (extent, offset in it, length)."""
        end = offset + length
        index = bisect_right(self._starts, offset) - 1
        while offset < end:
            entry = self.extents[index]
            count = min(end, entry.start + entry.extent.size) - offset
            yield entry, offset - entry.start, count
            offset += count
            index += 1

    # Writing.  `below` counts in the whole disk's bytes, an extent's in its own.

    def write(self, buf: memoryview, offset: int, below: Below | None) -> list[WritableExtent]:
        """Write ``buf``; the extents that were written to.  WriteRefused before anything is changed."""
        done = 0
        written = []
        for extent, start, within, count in self._writable_parts(offset, len(buf)):
            extent.write(buf[done : done + count], within, _shifted(below, start))
            written.append(extent)
            done += count
        return written

    def writer(self, *, alone: bool) -> Writer:
        """A function that writes at once to one extent; see WritableExtent.writer."""
        starts = self._starts
        writers: list[Writer | None] = [None] * len(starts)

        def write(buf: memoryview, offset: int) -> WritableExtent | None:
            index = bisect_right(starts, offset) - 1
            inside = writers[index]
            if inside is None:
                extent = self.extents[index].writable
                if extent is None:
                    return None
                inside = writers[index] = extent.writer(alone=alone)
            return inside(buf, offset - starts[index])

        only = self.extents[0].writable if len(starts) == 1 else None
        return write if only is None else only.writer(alone=alone)

    def share(self, other: Storage, at: int, offset: int, length: int) -> list[WritableExtent] | None:
        """Make bytes of a file those of a range without copying them: the extents, or None if that can't be.

        Then some of the range may hold those bytes all the same.
        """
        shared = []
        for extent, _start, within, count in self._writable_parts(offset, length):
            if not extent.share(other, at, within, count):
                return None
            shared.append(extent)
            at += count
        return shared

    def zero(
        self, offset: int, length: int, below: Below | None, *, may_trim: bool
    ) -> Iterator[WritableExtent]:
        """Make a range read as zeros, step by step; zeros without a file are passed over."""
        for extent, start, within, count in self._steps(offset, length):
            extent.zero(within, count, _shifted(below, start), may_trim=may_trim)
            yield extent

    def trim(self, offset: int, length: int, below: Below | None) -> Iterator[WritableExtent]:
        """Give the space of a range back where that is possible, step by step."""
        for extent, start, within, count in self._steps(offset, length):
            extent.trim(within, count, _shifted(below, start))
            yield extent

    def _steps(self, offset: int, length: int) -> Iterator[tuple[WritableExtent, int, int, int]]:
        """What is written to of a range, in steps that end on grain edges: no grain is split in two."""
        for extent, start, within, count in self._writable_parts(offset, length, zeros_too=True):
            end = within + count
            step = min(_STEP, extent.grain * _STEP_GRAINS or _STEP)
            while within < end:
                edge = min(end, (within // step + 1) * step)
                yield extent, start, within, edge - within
                within = edge

    def must_write_zeros(self, offset: int, length: int, below: Below | None, *, may_trim: bool) -> bool:
        """Tell whether zeroing a range means writing zeros somewhere in it; see WritableExtent."""
        return any(
            extent.must_write_zeros(within, count, _shifted(below, start), may_trim=may_trim)
            for extent, start, within, count in self._writable_parts(offset, length, zeros_too=True)
        )

    def _writable_parts(
        self, offset: int, length: int, *, zeros_too: bool = False
    ) -> list[tuple[WritableExtent, int, int, int]]:
        parts = []
        for entry, within, count in self._parts(offset, length):
            extent = entry.writable
            if extent is not None:
                parts.append((extent, entry.start, within, count))
            elif not (zeros_too and isinstance(entry.extent, ZeroExtent)):
                what = entry.access if entry.access != "RW" else entry.extent.type_word
                raise WriteRefused(
                    self.name,
                    why=f"guest bytes {offset}+{length} reach into a {what} extent",
                    hint=f"a child takes writes anywhere: nbd-vmdk snapshot create {shlex.quote(self.name)}",
                )
        return parts

    def change_cid(self) -> Storage | None:
        """Give the link a new content ID, once a session; the file it is in, or None if there is none.

        Only the digits are overwritten, so that no lock is lost to a rename and nothing can be torn.
        """
        with self._cid_lock:
            if self.descriptor is None or self._place is None or not self.descriptor.cid_digits:
                return None
            if not self._cid_changed:
                new = random_cid(self.descriptor.cid_digits, avoid=self.cid)
                for at, digits in self.descriptor.cid_patches(new):
                    self._place.storage.write(digits, self._place.at + at)
                self.cid, self._cid_changed = new, True
            return self._place.storage

    def keep_cid(self) -> None:
        """Leave the content ID as it is in this session: what is written changes nothing of what is read."""
        with self._cid_lock:
            self._cid_changed = True

    def drop_change_tracking(self) -> None:
        """Take the change-tracking lines, if any, out of the descriptor, in place; it never gets longer."""
        assert self.descriptor is not None
        assert self._place is not None
        if self.descriptor.change_track_path is None:
            return
        old = self.descriptor.to_bytes()
        self.descriptor = self.descriptor.without_ctk()
        new = self.descriptor.to_bytes()
        storage, at = self._place.storage, self._place.at
        if at:
            storage.write(new.ljust(len(old), b"\0"), at)
        else:
            # Blank first: between the two steps a reader sees the whole text and blank lines behind it.
            storage.write(new + b"\n" * (len(old) - len(new)), 0)
            storage.truncate(len(new))
        storage.sync()

    def close(self) -> None:
        """Let go of all its files, whatever one of them says, and of its folder.

        Nobody need close a folder: it keeps a descriptor of its place, which goes with the last who has it.
        """
        self.folder = ClosedFolder(self.folder)
        with ExitStack() as closing:
            for storage in reversed(self.storages):
                closing.callback(storage.close)


def occupied(storages: Iterable[Storage]) -> int:
    """Bytes that files, and members of archives, really occupy; each is counted once."""
    files: dict[tuple[int, ...], Storage] = {}
    for storage in storages:
        files.setdefault(storage.identity, storage)
    return sum(storage.allocated for storage in files.values())


def _shifted(below: Below | None, start: int) -> Below | None:
    if below is None or not start:
        return below
    return lambda buf, offset: below(buf, start + offset)
