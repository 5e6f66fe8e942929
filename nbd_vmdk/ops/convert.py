"""From any source to a new image: a raw file, or a VMDK of any kind that can be created.

Everything is made in a folder beside the target and moved there at the end (see storage/newfiles.py), so a
conversion that was killed at any point leaves no target, and one that is replaced stays until the new one is
whole and, if that was asked for, compared with its source.

The kinds differ in how bytes get there: a raw file and plain kinds are written at their places in any order;
streamOptimized is appended to in the order of the disk, deflated by all threads.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from nbd_vmdk.codec import DEFAULT_LEVEL, MAX_LEVEL
from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import OptionError, StorageError, VmdkError, WriteRefused, printable
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.extents.streamwriter import StreamWriter
from nbd_vmdk.link import Link
from nbd_vmdk.ondisk.descriptor import FRESH_CID, MAX_DESCRIPTOR, NO_PARENT, Descriptor, random_cid
from nbd_vmdk.ondisk.hosted import MAGIC, HostedHeader, parse_header
from nbd_vmdk.opening import open_disk
from nbd_vmdk.ops.copy import Copied, Progress, Rest, Sink, Source, copy, default_threads
from nbd_vmdk.ops.create import Created, create_image
from nbd_vmdk.ops.sides import Comparer, DiskSink, DiskSource, StorageSink, StorageSource, sharing
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.local import LocalFile
from nbd_vmdk.storage.newfiles import NewFiles
from nbd_vmdk.units import SECTOR, align_up

#: Zeros in a raw or flat file become holes in pieces of this size: the block of nearly all file systems.
HOLE_GRAIN: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How a conversion is done.

    threads   None takes what is best here
    level     of deflating: 1 is fastest, 6 as small as everybody's default
    verify    read the result back and compare it with the source before it gets its name
    replace   a target that exists gives way
    share     a raw or flat target gets blocks of the source's files where the file system lets files share
              them; they are not read, and zeros in them stay allocated
    progress  told bytes done and of how many; verifying starts from 0 again
    """

    threads: int | None = None
    level: int = DEFAULT_LEVEL
    verify: bool = False
    replace: bool = False
    share: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Raise OptionError for numbers that can't be, before anything is made."""
        if not 1 <= self.level <= MAX_LEVEL:
            raise OptionError(None, why=f"{self.level} is no level of deflating: they are 1 to {MAX_LEVEL}")
        if self.threads is not None and self.threads < 1:
            raise OptionError(None, why="threads must be at least 1")


class Padded:
    """A source filled up with zeros to whole sectors, which every disk has."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size = align_up(source.size, SECTOR)

    def runs(self, offset: int, length: int) -> Iterator[tuple[Kind, int]]:
        """See Source."""
        inside = max(min(length, self._source.size - offset), 0)
        if inside:
            yield from self._source.runs(offset, inside)
        if inside < length:
            yield Kind.ZERO, length - inside

    def read_into(self, buf: memoryview, offset: int) -> None:
        """See Source."""
        inside = max(min(len(buf), self._source.size - offset), 0)
        if inside:
            self._source.read_into(buf[:inside], offset)
        if inside < len(buf):
            buf[inside:] = bytes(len(buf) - inside)


class StreamSink:
    """A new streamOptimized file: pieces are deflated by whoever brings them, and appended in order."""

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer

    def write(self, buf: memoryview, offset: int) -> Rest:
        """See Sink: whole grains."""
        return partial(self._writer.append, self._writer.records(buf, offset))

    def zero(self, offset: int, length: int) -> None:
        """See Sink: grains of zeros are left out."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a conversion made: its files, the one to open last, and what creating it told of them."""

    copied: Copied
    files: tuple[str, ...] = ()
    created: Created | None = None


def write_raw(source: Source, path: str, work: Work) -> Made:
    """Make ``path`` the raw bytes of ``source``, with holes where there are zeros."""
    with NewFiles(path, replace=work.replace) as new:
        with closing(new.create(new.name)) as storage:
            storage.write_behind = True
            storage.truncate(source.size)
            sink = StorageSink(storage, fresh=True)
            copied = copy(
                source,
                sink,
                zero_grain=HOLE_GRAIN,
                threads=work.threads,
                share=sharing(source, sink) if work.share else None,
                progress=work.progress,
            )
            if work.verify:
                compare(source, StorageSource(storage), path, work)
        return Made(copied, new.publish(main=new.name))


@dataclass(frozen=True, slots=True)
class Place:
    """What is overwritten in place.

    size     bytes it has
    sink     what is written to, ``result`` what is read back
    block    bytes of the smallest write it takes, to which writes are aligned
    flush    makes what was written durable
    resize   gives it another size, where that is possible
    """

    name: str
    size: int
    sink: Sink
    result: Source
    block: int
    flush: Callable[[], None]
    resize: Callable[[int], None] | None = None

    def check_size(self, need: int) -> None:
        """Raise StorageError if it is smaller than that."""
        if self.size < need:
            why = f"it has {self.size} bytes, and {need} are needed"
            raise StorageError(self.name, doing="write to it", why=why)


def overwrite(source: Source, place: Place, work: Work) -> Copied:
    """Overwrite a place with ``source``: zeros too, as nobody knows what is there.

    Raises StorageError if it is too small; what lies behind the source's end stays.
    """
    place.check_size(source.size)
    copied = copy(
        source,
        place.sink,
        grain=place.block,
        zero_grain=align_up(HOLE_GRAIN, place.block),
        threads=work.threads,
        progress=work.progress,
    )
    place.flush()
    if work.verify:
        compare(source, place.result, place.name, work)
    return copied


def write_image(
    source: Source, path: str, work: Work, create: Mapping[str, Any], *, cid: int | None = None
) -> Made:
    """Make ``path`` a VMDK with the bytes of ``source``; ``create`` goes to create_image.

    ``cid`` is its content ID; None draws one.
    """
    with NewFiles(path, replace=work.replace) as new, final_names(new.folder, path):
        there = new.path(new.name)
        padded = source if source.size % SECTOR == 0 else Padded(source)
        created = create_image(there, padded.size, durable=False, **create)
        copied = fill_image(padded, there, path, work)
        if cid is not None:
            set_cid(there, cid, path)
        if work.verify:
            with open_disk(there, locks=False) as disk:
                compare(padded, DiskSource(disk), path, work)
        return Made(copied, new.publish(main=new.name), created)


def fill_image(source: Source, there: str, label: str, work: Work) -> Copied:
    """Fill the new, empty image ``there`` with the bytes of ``source``."""
    with closing(_open_file(there, label)) as storage:
        storage.write_behind = True
        head = storage.read(0, min(SECTOR, storage.size))
        header = parse_header(head, label) if head.startswith(MAGIC) else None
        if header is not None and header.compressed:
            head = storage.read(0, header.overhead_sectors * SECTOR)
            storage.write(with_new_cid(head, header, label), 0)
            return fill_stream(source, storage, header, work)
    with open_disk(there, writable=True, locks=False) as disk:
        for extent in disk.links[0].storages:
            extent.write_behind = True
        return _fill_disk(source, disk, work)


def with_new_cid(head: bytes, header: HostedHeader, label: str) -> bytes:
    """The beginning of a file with a content ID drawn for it: that of a new image says "never written"."""
    at = header.descriptor_sector * SECTOR
    patched = bytearray(head)
    for offset, digits in _cid_patches(head, at, random_cid(), label):
        patched[offset : offset + len(digits)] = digits
    return bytes(patched)


def set_cid(there: str, cid: int, label: str) -> None:
    """Give the new image ``there`` the content ID ``cid``, in its place in the descriptor."""
    with closing(_open_file(there, label)) as storage:
        head, at = storage.read(0, min(MAX_DESCRIPTOR, storage.size)), 0
        if head.startswith(MAGIC):
            at = parse_header(head, label).descriptor_sector * SECTOR
        for offset, digits in _cid_patches(head, at, cid, label):
            storage.write(digits, offset)


def _cid_patches(head: bytes, at: int, cid: int, label: str) -> list[tuple[int, bytes]]:
    """What to overwrite of a file that begins with ``head`` and has its descriptor at byte ``at``."""
    descriptor = Descriptor.parse(head[at:].partition(b"\0")[0], label)
    return [(at + offset, digits) for offset, digits in descriptor.cid_patches(cid)]


def known_cid(link: Link) -> int | None:
    """The content ID of a link, if it has one that tells its content from others.

    An image that says that it was never written may have been, by what keeps no content IDs.
    """
    return None if link.cid in (None, FRESH_CID, NO_PARENT) else link.cid


def fill_stream(source: Source, storage: Storage, header: HostedHeader, work: Work) -> Copied:
    """Append the grains of ``source`` to an empty streamOptimized file, in place of its end."""
    writer = StreamWriter(storage, header, level=work.level, in_order=True)
    copied = copy(
        source,
        StreamSink(writer),
        grain=header.grain,
        zero_grain=header.grain,
        threads=work.threads or default_threads(deflating=True),
        progress=work.progress,
    )
    writer.finish()
    return copied


def _fill_disk(source: Source, disk: Disk, work: Work) -> Copied:
    sink = DiskSink(disk, fresh=True)
    # Whole grains: a part of one would be filled up with zeros by a write of its own.
    grain = max(disk.links[0].grain, 1)
    return copy(
        source,
        sink,
        grain=grain,
        zero_grain=max(grain, HOLE_GRAIN),
        threads=work.threads,
        share=sharing(source, sink) if work.share else None,
        progress=work.progress,
    )


def compare(source: Source, result: Source, name: str, work: Work) -> None:
    """Raise Difference unless ``result`` has all bytes of ``source``."""
    threads = work.threads or default_threads(deflating=True)
    copy(source, Comparer(result, name), threads=threads, progress=work.progress)


@contextmanager
def final_names(folder: str, path: str) -> Iterator[None]:
    """Let errors about files of the temporary ``folder`` name them as they would have been called."""
    try:
        yield
    except VmdkError as error:
        if error.file is not None and os.path.dirname(error.file) == folder:
            error.file = os.path.join(os.path.dirname(path), os.path.basename(error.file))
            error.args = (f"{printable(error.file)}: {error.message}",)
        raise


def refuse_itself(files: Iterable[Storage], target: str) -> None:
    """Raise WriteRefused if ``target`` is one of the files that are read."""
    try:
        found = os.stat(target)
    except OSError:
        return
    same = (found.st_rdev,) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)
    if any(file.identity[: len(same)] == same for file in files):
        raise WriteRefused(target, why="it is a part of the source", hint="choose another target")


def new_file(path: str, label: str) -> LocalFile:
    """Make the file ``path``, called ``label`` in messages; StorageError."""
    return _told(lambda: os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), label)


def _open_file(path: str, label: str) -> LocalFile:
    return _told(lambda: os.open(path, os.O_RDWR | os.O_CLOEXEC), label)


def _told(opened: Callable[[], int], label: str) -> LocalFile:
    try:
        return LocalFile(opened(), label, writable=True)
    except OSError as error:
        raise StorageError.of(error, label, "make") from error
