"""Making the files of a link anew, with its grains in the order of the disk.

One file after the other: each holds the same as the one whose place it takes, in one step, so that whatever
stops this leaves a whole link, and no more room is needed than for the largest of its files.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Final

from nbd_vmdk.cache import Cache
from nbd_vmdk.codec import DEFAULT_LEVEL
from nbd_vmdk.commit import Committer
from nbd_vmdk.errors import WriteRefused
from nbd_vmdk.extents.base import Extent, WritableExtent
from nbd_vmdk.extents.cowd import CowdExtent
from nbd_vmdk.extents.flat import FlatExtent, ZeroExtent
from nbd_vmdk.extents.hosted import HostedExtent
from nbd_vmdk.extents.stream import StreamExtent
from nbd_vmdk.link import Link, LinkExtent
from nbd_vmdk.ondisk import cowd, cowd_build, hosted_build, stream_build
from nbd_vmdk.ondisk.hosted import FLAG_REDUNDANT, new_layout
from nbd_vmdk.ops.compact.blocks import block_of
from nbd_vmdk.ops.convert import Work, fill_stream
from nbd_vmdk.ops.copy import Progress, copy
from nbd_vmdk.ops.rewrite import real_path
from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.merge import LinkSource
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.newfiles import NewFiles
from nbd_vmdk.units import KIB, SECTOR

#: What of a COWD header belongs to the disk: its flags; geometry, names and numbers.
_COWD_FLAGS: Final = slice(cowd.FLAGS_AT, cowd.FLAGS_AT + 4)
_COWD_WORDS: Final = slice(cowd.GEOMETRY_AT, 4 * SECTOR)
#: What file systems allocate at least; smaller holes in a file give nothing back.
_BLOCK: Final = 4 * KIB
_ZEROS: Final = bytes(_BLOCK)


def rewrite_link(
    place: files.Place, *, level: int | None, progress: Progress | None, threads: int | None
) -> bool:
    """Make all files of the link anew and put them in place of the old ones.

    False if that was not done because a compressed file would not get smaller.  Raises WriteRefused for
    extents that can't be made, and for files in other folders.
    """
    with ExitStack() as held:
        file = files.hold(held, place.link)
        link = files.hold_link(held, place.link, place.options, file)
        files.own_files(place.link, link.storages, place.links())
        if file.descriptor.change_track_path is not None:
            raise WriteRefused(
                link.name,
                why="its changes are tracked in a file that knows it as it is",
                hint="compact it in place",
            )
        only = link.extents[0].extent
        if len(link.extents) == 1 and isinstance(only, StreamExtent):
            work = Work(threads=threads, level=DEFAULT_LEVEL if level is None else level, progress=progress)
            return _recompress(link, only, file.descriptor.to_bytes(), work)
        _check(link)
        for entry in link.extents:
            if not isinstance(entry.extent, ZeroExtent):
                _make(link, entry, file.descriptor.to_bytes(), progress)
    return True


def _check(link: Link) -> None:
    """Raise WriteRefused if one of the extents can't be made anew, before any is."""
    users = [entry.extent.storage for entry in link.extents]
    for entry in link.extents:
        extent = entry.extent
        made = isinstance(extent, ZeroExtent) or (
            entry.access == "RW"
            and users.count(extent.storage) == 1
            and (
                (isinstance(extent, HostedExtent) and extent.header.version < 3)
                or (isinstance(extent, CowdExtent) and extent.header.version > 0)
                or (isinstance(extent, FlatExtent) and extent.start == 0)
            )
        )
        if not made:
            what = entry.access if entry.access != "RW" else extent.type_word
            raise WriteRefused(link.name, why=f"an extent of type {what} can't be made anew here")


def _recompress(link: Link, extent: StreamExtent, text: bytes, work: Work) -> bool:
    old = extent.header
    header = stream_build.stream_header(
        old.capacity_sectors,
        grain_sectors=old.grain_sectors,
        descriptor_sectors=max(stream_build.DESCRIPTOR_SECTORS, old.descriptor_sectors),
    )
    path = real_path(extent.storage)
    name = os.path.basename(path)
    with NewFiles(path, replace=True, held=True) as new:
        with closing(new.create(name)) as storage:
            storage.write(stream_build.empty_stream(header, text), 0)
            fill_stream(LinkSource(link), storage, header, work)
            if storage.size >= extent.storage.size:
                return False
        new.publish(main=name)
    return True


def _make(link: Link, entry: LinkExtent, text: bytes, progress: Progress | None) -> None:
    """Make the file of one extent anew."""
    assert entry.extent.storage is not None
    path = real_path(entry.extent.storage)
    name = os.path.basename(path)

    def told(done: int, _of: int) -> None:
        if progress is not None:
            progress(entry.start + done, link.size)

    with NewFiles(path, replace=True, held=True) as new:
        with closing(new.create(name)) as storage:
            extent = _begin(storage, entry.extent, text if entry.extent.storage is link.storages[0] else b"")
            has_parent = link.descriptor is not None and link.descriptor.has_parent
            sink = _Ordered(extent, entry.start, has_parent=has_parent)
            # One worker: so grains get their places in the order of the disk.
            copy(
                LinkSource(link),
                sink,
                offset=entry.start,
                length=extent.size,
                zero_grain=block_of(link),
                threads=1,
                progress=told,
            )
            sink.finish()
        new.publish(main=name)


def _begin(storage: Storage, old: Extent, text: bytes) -> WritableExtent:
    """Write what the new file of an extent begins with; the new extent, which is empty."""
    cache = Cache(files.CACHE)
    if isinstance(old, HostedExtent):
        header = new_layout(
            old.header.capacity_sectors,
            grain_sectors=old.header.grain_sectors,
            version=old.header.version,
            flags=old.header.flags | FLAG_REDUNDANT,
            descriptor_sectors=max(old.header.descriptor_sectors, hosted_build.DESCRIPTOR_SECTORS)
            if text
            else 0,
        )
        storage.truncate(header.overhead_sectors * SECTOR)
        for at, content in hosted_build.metadata(header, text):
            storage.write(content, at)
        return HostedExtent(storage, header, cache, size=old.size)
    if isinstance(old, CowdExtent):
        whole = bytearray(
            cowd_build.new_extent(old.header.capacity_sectors, grain_sectors=old.header.grain_sectors)
        )
        head = old.storage.read(0, 4 * SECTOR)
        whole[_COWD_FLAGS] = head[_COWD_FLAGS]
        whole[_COWD_WORDS] = head[_COWD_WORDS]
        whole[cowd.UNCLEAN_AT : cowd.UNCLEAN_AT + 4] = bytes(4)
        storage.write(whole, 0)
        return CowdExtent(storage, cowd.parse_header(bytes(whole), storage.name), cache, size=old.size)
    assert isinstance(old, FlatExtent)
    storage.truncate(old.storage.size)
    return FlatExtent(storage, start=0, size=old.size)


class _Ordered:
    """The new extent, which begins at byte ``start`` of the disk.  A sink of the copier; see _begin."""

    def __init__(self, extent: WritableExtent, start: int, *, has_parent: bool) -> None:
        self._extent = extent
        self._start = start
        self._has_parent = has_parent
        self._committer = Committer([extent], lambda: None)

    def write(self, buf: memoryview, offset: int) -> None:
        """See Sink; blocks of zeros in a grain stay holes of the file, as QEMU leaves them."""
        at = offset - self._start
        self._committer.admit()
        for begin, end in self._written(bytes(buf), at):
            self._extent.write(buf[begin:end], at + begin, None)
        self._committer.wrote(self._extent)

    def _written(self, data: bytes, at: int) -> Iterator[tuple[int, int]]:
        """What of ``data``, which begins at ``at`` of the extent, is not blocks of zeros, as (begin, end)."""
        grain = self._extent.grain or 0
        begin = done = 0
        while done < len(data) and grain > _BLOCK:
            place = (at + done) % _BLOCK
            step = min(_BLOCK - place, len(data) - done)
            # Over a parent every grain that holds something must be there, be it zeros.
            is_needed = self._has_parent and (not done or (at + done) % grain == 0)
            if not data[done] and not is_needed and data.startswith(_ZEROS[:step], done):
                if done > begin:
                    yield begin, done
                begin = done + step
            done += step
        if begin < len(data):
            yield begin, len(data)

    def zero(self, offset: int, length: int) -> None:
        """See Sink: zeros must hide a parent, and are what is there without one."""
        extent = self._extent
        if not self._has_parent:
            return
        if isinstance(extent, HostedExtent) and extent.zero_entry is not None:
            extent.zero(offset - self._start, length, _nothing, may_trim=True)
            self._committer.wrote(extent)
            self._committer.admit()
            return
        # A byte makes a grain, and the rest of it stays a hole in the file.
        for at in range(offset, offset + length, extent.grain or length):
            self.write(memoryview(b"\0"), at)

    def finish(self) -> None:
        """Make it complete and durable."""
        self._committer.flush()
        self._committer.close()
        self._extent.finish()


def _nothing(buf: memoryview, _offset: int) -> None:
    """What lies below a new extent as long as it is alone: nothing is read of it."""
    buf[:] = bytes(len(buf))
