"""A disk: a chain of links as one row of bytes; the only read loop and the only write door.

What reads is a loop over mappings.  A request goes from the top link down through holes until somebody
has the bytes; that somebody's source fills the buffer, in one call for each piece.  pread, NBD block
status and the `map` command ask the same question, so they agree.  Small requests for plain data are
answered at once, before the question is asked: see Extent.reader and WritableExtent.writer.

Threads: any number may call anything.  Reading takes no lock.

Errors come with a hint that may leave room for the disk's name.  The calls of the Python API put it there.
read_into, write_from and edges do not: who calls them does it when he tells of the error (Disk.advise).
"""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from typing import NoReturn, Self

from nbd_vmdk.cache import Cache
from nbd_vmdk.commit import Committer
from nbd_vmdk.errors import Closed, NotFast, OutOfRange, VmdkError, WriteRefused
from nbd_vmdk.extents.base import NOTHING, Below, Edges, Kind, Mapping, WritableExtent
from nbd_vmdk.extents.flat import LostSource
from nbd_vmdk.link import Link
from nbd_vmdk.refusal import advise
from nbd_vmdk.runs import Run, joined
from nbd_vmdk.shortcuts import Shortcuts
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import KIB, MIB

_ZEROS = memoryview(bytes(MIB))
#: Blocks that a client had best use: a grain, within what clients can live with.
_MIN_BLOCK, _MAX_BLOCK = 64 * KIB, MIB
#: Packed bytes that one prefetch request inflates at most.
_MAX_PREFETCH = 8 * MIB


class Disk:
    """An open disk.  A context manager: leaving it closes cleanly, making everything durable.

    ``size`` is in bytes.  ``warnings`` tells what was odd but harmless at opening.  All calls raise
    VmdkError: among others OutOfRange for a range outside the disk, and Closed once it is closed.
    """

    #: Bytes of the smallest write that it takes, and to which writes must be aligned.
    minimum_block = 1

    def __init__(self, links: list[Link], cache: Cache, *, writable: bool) -> None:
        self.links = tuple(links)
        top = links[0]
        self.size = top.size
        #: Where requests must end: its size, or -1, which none keeps to, once it is closed.
        self._end = top.size
        self._cache = cache
        self.writable = writable and top.writable
        #: Writing was asked for: where it is not writable all the same, ``warnings`` say why.
        self.writing_asked = writable
        self.preferred_block = min(max(top.grain, _MIN_BLOCK), _MAX_BLOCK)
        unchanging = len(links) - self.writable
        #: Worth having where the search may take more than one step.
        self._shortcuts = Shortcuts(links, int(self.writable), cache) if unchanging > 1 else None
        self._unknown = LostSource(
            top.name, "it is in a parent that is not known", "name the parent: --parent FILE"
        )
        #: Finds what backs a range for reading; a base needs nobody to ask for its holes.
        self._locate = top.map if len(links) == 1 and not top.incomplete else self._map
        self._below: Below | None = self._read_below if len(links) > 1 else None
        extents = [entry.writable for entry in top.extents]
        self._members: list[WritableExtent] = [extent for extent in extents if extent is not None]
        if self.writable:
            self.minimum_block = max(extent.minimum_block for extent in self._members)
        self._only = self._members[0] if len(extents) == len(self._members) == 1 else None
        self._committer = Committer(self._members, top.change_cid)
        self._write_once = top.writer(alone=self._below is None)
        self._close_lock = threading.Lock()
        #: As read_into, once; asks the one who answers most requests first.
        shortcuts = self._shortcuts
        first_asked = top if shortcuts is None or shortcuts.first else shortcuts
        self._read_once = first_asked.reader(self._read_mapped)
        #: Fills a memoryview of bytes with the disk's from an offset on.  It is cut in pieces, which of
        #: other buffers would be copies: those are for pread_into.
        self.read_into = self._read_shared if self.writable else self._read_once

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd but harmless at opening, of all links."""
        return tuple(warning for link in self.links for warning in link.warnings)

    @property
    def commits(self) -> int:
        """How often what was written has been made durable, or tried to be."""
        return self._committer.commits

    @property
    def can_fast_zero(self) -> bool:
        """Zeroing may cost no data writes; whether it does depends on the range."""
        return self.writable

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._end:
            if self._end < 0:
                self._refuse()
            raise OutOfRange(self.links[0].name, offset=offset, length=length, size=self.size)

    def _refuse(self, *_: object) -> NoReturn:
        """What a closed disk does, whatever its caches still hold."""
        raise Closed(self.links[0].name)

    def advise(self, error: VmdkError) -> bool:
        """Put the link whose file an error is of into its hint, as the user would name it.

        False, with the hint as it was, for a file that is none of this disk.
        """
        for link in self.links:
            if any(storage.name == error.file for storage in link.storages):
                advise(error, link.folder, os.path.basename(link.name))
                return True
        return False

    # Reading.

    def _map(self, offset: int, length: int) -> Mapping:
        shortcuts = self._shortcuts
        if shortcuts is None:
            return self._map_from(offset, length, 0)[0]
        if not shortcuts.first:
            # Nearly every small request of a chain that is only read ends here.
            return shortcuts.find(offset, length) or self._map_from(offset, length, 0)[0]
        mapping = self.links[0].map(offset, length)
        if mapping[0] is not Kind.HOLE:
            return mapping
        length = mapping[1]
        return shortcuts.find(offset, length) or self._map_from(offset, length, 1)[0]

    def _map_from(self, offset: int, length: int, first: int) -> tuple[Mapping, int | None]:
        """What backs the bytes at ``offset``, from link ``first`` down; and which link has it."""
        shortcuts = self._shortcuts
        if shortcuts is not None and first == shortcuts.first:
            first, length = shortcuts.reach(offset, length)
        for depth in range(first, len(self.links)):
            link = self.links[depth]
            room = link.size - offset
            if room <= 0:
                return (Kind.HOLE, length, None, 0), None  # past the end of a smaller parent: zeros
            mapping = link.map(offset, min(length, room))
            if mapping[0] is not Kind.HOLE:
                return mapping, depth
            length = mapping[1]
            if depth == 0 and shortcuts is not None:
                return self._map_from(offset, length, 1)
        return self._nobody(offset, length), None

    def _nobody(self, offset: int, length: int) -> Mapping:
        """What no link holds: zeros, unless a link that belongs below is missing."""
        if self.links[-1].incomplete:
            return Kind.LOST, length, self._unknown, offset
        return Kind.HOLE, length, None, 0

    def _read_shared(self, buf: memoryview, offset: int) -> None:
        """Read from a disk that is written to meanwhile, see :meth:`read_into`.

        Between looking a grain up and reading it, it may have been freed and given to other guest bytes.
        That takes a commit, which says so by a number that never goes back.
        """
        while True:
            releases = self._committer.releases
            self._read_once(buf, offset)
            if self._committer.releases == releases:
                return

    def _read_mapped(self, buf: memoryview, offset: int) -> None:
        """Read what nobody could at once, see Extent.reader."""
        length = len(buf)
        if offset < 0 or offset + length > self.size:
            self._check(offset, length)
        _kind, count, source, at = self._locate(offset, length)
        if count == length:  # most requests that are not answered at once: holes, packed grains, cold tables
            if source is None:
                _fill_zeros(buf)
            else:
                source.read_into(buf, at)
            return
        self._read_pieces(buf, offset, 0)

    def _read_pieces(self, buf: memoryview, offset: int, first: int) -> None:
        done, length = 0, len(buf)
        while done < length:
            (kind, count, source, at), _depth = self._map_from(offset + done, length - done, first)
            piece = buf[done : done + count]
            if kind in NOTHING:
                _fill_zeros(piece)
            else:
                assert source is not None
                source.read_into(piece, at)
            done += count

    def _read_below(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf`` with what the parents hold, for copy-on-write."""
        self._read_pieces(buf, offset, 1)

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on."""
        self._check(offset, length)
        buf = bytearray(length)
        if length:
            try:
                self.read_into(memoryview(buf), offset)
            except VmdkError as error:
                self.advise(error)
                raise
        return bytes(buf)

    def place(self, offset: int, length: int) -> tuple[Storage, int, int] | None:
        """Which file has the bytes at ``offset`` as they are, where, and how many; None if none has."""
        self._check(offset, length)
        kind, count, source, at = self._locate(offset, length)
        return (source, at, count) if kind is Kind.DATA and isinstance(source, Storage) else None

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill a writable buffer of the caller's with the bytes from ``offset`` on."""
        view = memoryview(buffer).cast("B")
        self._check(offset, len(view))
        if len(view):
            try:
                self.read_into(view, offset)
            except VmdkError as error:
                self.advise(error)
                raise

    def cache(self, length: int, offset: int) -> None:
        """Fetch a range into memory: the page cache, or the cache of inflated grains."""
        self._check(offset, length)
        try:
            self._fetch(offset, length)
        except VmdkError as error:
            self.advise(error)
            raise

    def _fetch(self, offset: int, length: int) -> None:
        end = offset + length
        packed = 0
        while offset < end:
            kind, count, source, at = self._map(offset, end - offset)
            wanted = count
            if kind is Kind.PACKED:
                wanted = min(count, _MAX_PREFETCH - packed)
                packed += wanted
            if source is not None and wanted:
                source.advise(at, wanted)
            offset += count

    def runs(self, offset: int = 0, length: int | None = None) -> Iterator[Run]:
        """All of a range (to the end of the disk by default) as maximal runs, in order."""
        if length is None:
            length = self.size - offset
        self._check(offset, length)
        try:
            yield from joined(self._runs(offset, length))
        except VmdkError as error:
            self.advise(error)
            raise

    def _runs(self, offset: int, length: int) -> Iterator[Run]:
        """What :meth:`runs` joins."""
        for (kind, count, source, at), depth in self._mappings(offset, length, 0):
            run = Run(offset, count, kind, depth, None, None)
            if kind not in NOTHING:
                assert source is not None
                # A packed or lost range counts in guest bytes, which are no place in the file.
                run = run._replace(file=source.name, at=at if kind is Kind.DATA else None)
            yield run
            offset += count

    def _mappings(self, offset: int, length: int, first: int) -> Iterator[tuple[Mapping, int | None]]:
        """The mappings of a range in full detail, from link ``first`` down."""
        if first == len(self.links):
            yield self._nobody(offset, length), None
            return
        link = self.links[first]
        inside = max(min(length, link.size - offset), 0)
        at = offset
        for mapping in link.runs(offset, inside):
            if mapping[0] is Kind.HOLE:
                yield from self._mappings(at, mapping[1], first + 1)
            else:
                yield mapping, first
            at += mapping[1]
        if inside < length:
            yield (Kind.HOLE, length - inside, None, 0), None

    def edges(self, offset: int, length: int, most: int) -> tuple[list[int], bool]:
        """Where in a range data begins and ends, which is all that NBD clients are told: runs() in short.

        Pieces of data and of zeros take turns, ``most`` of them at most; the flag says whether the first one
        is data.  The places are where each piece begins, and at last where the last one ends.
        """
        self._check(offset, length)
        found: list[int] = []
        first = False
        for places, is_data in self._edges(offset, length, 0):
            if not found:
                first = is_data
            # Pieces take turns, so the last of an odd number of them is like the first.
            elif is_data is (first is (len(found) % 2 == 1)):
                places = places[1:]  # it goes on as before
            found += places
            if len(found) > most:
                return found[: most + 1], first
        found.append(offset + length)
        return found, first

    def _edges(self, offset: int, length: int, first: int) -> Iterator[Edges]:
        """What :meth:`edges` joins, from link ``first`` down."""
        if first == len(self.links):
            yield [offset], self.links[-1].incomplete
            return
        link = self.links[first]
        inside = max(min(length, link.size - offset), 0)
        if first == len(self.links) - 1 and not link.incomplete:
            yield from link.edges(offset, inside)
        else:
            at = offset
            for kind, count, _source, _at in link.runs(offset, inside):
                if kind is Kind.HOLE:
                    yield from self._edges(at, count, first + 1)
                else:
                    yield [at], kind is not Kind.ZERO
                at += count
        if inside < length:
            yield [offset + inside], False

    # Writing.

    def _check_writable(self, offset: int, length: int) -> None:
        self._check(offset, length)
        if not self.writable:
            raise self.no_writing()
        self._committer.admit()

    def no_writing(self) -> WriteRefused:
        """The error for who wants to write to a disk that is not writable."""
        name = self.links[0].name
        if not self.writing_asked:
            hint = "to write to it, open it with writable=True"
            return WriteRefused(name, why="it is open for reading only", hint=hint)
        hint = "its warnings tell why; 'nbd-vmdk convert' makes a copy that can be written"
        return WriteRefused(name, why="it can't be written", hint=hint)

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int, *, fua: bool = False) -> None:
        """Write ``data`` at ``offset``; with ``fua`` it is durable when this returns."""
        try:
            self.write_from(memoryview(data).cast("B"), offset, fua=fua)
        except VmdkError as error:
            self.advise(error)
            raise

    def write_from(self, buf: memoryview, offset: int, *, fua: bool = False) -> None:
        """As pwrite, for a memoryview of bytes: others count in something else."""
        committer = self._committer
        length = len(buf)
        # What _check_writable looks at, without the call.
        if not (self.writable and committer.admits and offset >= 0 and 0 < length <= self.size - offset):
            self._check_writable(offset, length)
            if not length:
                return  # there is nothing to be durable either
        extent = self._write_once(buf, offset)
        if extent is not None:
            if extent.holds_more or not committer.timed:
                committer.wrote(extent)
        elif self._only is not None:  # the usual case needs no search for the extent
            self._only.write(buf, offset, self._below)
            committer.wrote(self._only)
        else:
            for extent in self.links[0].write(buf, offset, self._below):
                committer.wrote(extent)
        if fua:
            committer.flush()

    def share(self, other: Storage, at: int, length: int, offset: int) -> bool:
        """Make ``length`` bytes from ``at`` of a file the disk's at ``offset``, without copying them.

        False where the file system, or the kind of image, can't do that: then they are to be written.  It is
        for new images, for what is shared may have been written before only in part.
        """
        self._check_writable(offset, length)
        extents = self.links[0].share(other, at, offset, length)
        for extent in extents or ():
            self._committer.wrote(extent)
        return extents is not None

    def zero(
        self,
        length: int,
        offset: int,
        *,
        may_trim: bool = False,
        fua: bool = False,
        fast: bool = False,
        by_itself: bool = False,
    ) -> None:
        """Make a range read as zeros.

        ``may_trim`` allows giving its space back; ``fast`` raises NotFast, changing nothing, where data
        would have to be written.  ``by_itself`` has the top say so also where its parents hold nothing,
        for one that is to get other parents.
        """
        self._check_writable(offset, length)
        top, below = self.links[0], self._below

        def parts() -> Iterable[tuple[int, int]]:
            return ((offset, length),) if by_itself or below is None else self._shown(offset, length)

        try:
            if fast and any(
                top.must_write_zeros(at, count, below, may_trim=may_trim) for at, count in parts()
            ):
                raise NotFast(top.name)
            steps = (top.zero(at, count, below, may_trim=may_trim) for at, count in parts())
            self._follow(chain.from_iterable(steps), fua=fua)
        except VmdkError as error:
            self.advise(error)
            raise

    def _shown(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of what must be zeroed in a range: all but what reads as zeros through the chain.

        The top sees its own tables alone: a hole there may show the parent's data, and to hide that it may
        have to write.  Pieces are as wide as grains, where the range is, as whole ones need not be written.
        """
        grain, end = self.preferred_block, offset + length
        start = stop = at = offset
        for (kind, count, _source, _at), _depth in self._mappings(offset, length, 0):
            if kind not in NOTHING:
                first = max(at // grain * grain, offset)
                if first > stop:
                    if start < stop:
                        yield start, stop - start
                    start = first
                stop = min(-(-(at + count) // grain) * grain, end)
            at += count
        if start < stop:
            yield start, stop - start

    def trim(self, length: int, offset: int, *, fua: bool = False) -> None:
        """Say that a range is no longer needed: its space is given back where that is possible."""
        self._check_writable(offset, length)
        try:
            self._follow(self.links[0].trim(offset, length, self._below), fua=fua)
        except VmdkError as error:
            self.advise(error)
            raise

    def _follow(self, steps: Iterator[WritableExtent], *, fua: bool) -> None:
        """Commit between the steps of a request as long as a disk where too much is held."""
        for extent in steps:
            self._committer.wrote(extent)
            self._committer.admit()
        if fua:
            self._committer.flush()

    def flush(self) -> None:
        """Return when every write that has returned, on whatever thread, is durable."""
        if self.writable:
            self._committer.flush()
        self._check(0, 0)  # only now: who asks while it is being closed waits for that

    def close(self) -> None:
        """Make everything durable, mark the image cleanly closed, and let go of all files.

        The files are let go of even if that fails; the image is then still marked as in use.
        """
        with self._close_lock:
            if self._end < 0:
                return
            self._end = -1
            # Reading and writing need not ask whether it is closed: these answer then.
            self.read_into = self._read_once = self._write_once = self._refuse
        with ExitStack() as closing:
            for link in reversed(self.links):
                closing.callback(link.close)
            self._committer.close()
            if self.writable:
                self._committer.flush()
                for extent in self._members:
                    extent.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fill_zeros(buf: memoryview) -> None:
    for start in range(0, len(buf), MIB):
        piece = buf[start : start + MIB]
        piece[:] = _ZEROS[: len(piece)]
