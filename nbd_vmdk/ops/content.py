"""What is compared, summed and read out: a disk or a raw file, as one row of bytes with known zeros.

Each tells who *holds* its ranges: nobody (they read as zeros), or a holder.  Two contents with equal holders
at the same offset have the same bytes there, so that two snapshots of one base are compared without reading
what they share.
"""

import logging
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from nbd_vmdk.disk import Disk
from nbd_vmdk.extents.base import NOTHING, Kind
from nbd_vmdk.opening import open_disk
from nbd_vmdk.ops.formats import RAW, guess_format
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.localfolder import LocalFolder

log = logging.getLogger("nbd_vmdk")

#: Equal for two ranges at the same offset that are the same bytes of the same file; None for zeros.
Holder = object | None


class Range(NamedTuple):
    """A range of guest bytes."""

    offset: int
    length: int


class Content(Protocol):
    """A row of bytes.  Any number of threads may call at once."""

    @property
    def name(self) -> str:
        """The file, as the user named it."""

    @property
    def size(self) -> int:
        """Bytes it has."""

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf`` from ``offset`` on, or raise."""

    def holders(self, offset: int, length: int) -> Iterator[tuple[int, Holder]]:
        """Who holds a range: (length, holder) in order; the lengths add up to ``length``."""


class DiskContent:
    """A disk, its whole chain seen as one."""

    def __init__(self, disk: Disk) -> None:
        self.name = disk.links[0].name
        self.size = disk.size
        self.read_into = disk.read_into
        self._disk = disk
        # A link shows the same bytes in every chain it is part of.  Its descriptor alone does not tell which
        # it is: backups made with hard links share one between folders whose extents differ.
        self._links = [("link", *(storage.identity for storage in link.storages)) for link in disk.links]

    def holders(self, offset: int, length: int) -> Iterator[tuple[int, Holder]]:
        """See Content; what is lost is held by somebody unlike all others, so that it is read and fails."""
        for run in self._disk.runs(offset, length):
            if run.kind in NOTHING:
                yield run.length, None
            elif run.kind is Kind.LOST or run.depth is None:
                yield run.length, object()
            else:
                yield run.length, self._links[run.depth]


class RawContent:
    """The bytes of a file or a device as they are."""

    def __init__(self, storage: Storage) -> None:
        self.name = storage.name
        self.size = storage.size
        self.read_into = storage.read_into
        self._storage = storage
        self._file = ("raw", storage.identity)

    def holders(self, offset: int, length: int) -> Iterator[tuple[int, Holder]]:
        """See Content; holes of the file are zeros."""
        for count, is_data in self._storage.segments(offset, length):
            yield count, self._file if is_data else None


@contextmanager
def open_content(path: str | os.PathLike[str], *, raw: bool = False, **options: Any) -> Iterator[Content]:
    """Open a VMDK with its chain, or a raw file; ``options`` are those of OpenOptions.

    Without ``raw`` the name decides, see formats.py.  Raises VmdkError of every sort.
    """
    if raw or guess_format(path, raw_option="--raw") == RAW:
        folder, name = LocalFolder.for_image(path, allow_devices=True)
        storage = folder.open(name)
        try:
            if warning := storage.lock(writable=False):
                log.warning("%s: %s", storage.name, warning)
            yield RawContent(storage)
        finally:
            storage.close()
    else:
        with open_disk(path, **options) as disk:
            for warning in disk.warnings:
                log.warning("%s", warning)
            yield DiskContent(disk)


def merged(ranges: Iterable[Range]) -> Generator[Range, None, None]:
    """Ranges in order, neighbours made one."""
    start = end = 0
    for offset, length in ranges:
        if offset != end and end > start:
            yield Range(start, end - start)
        if offset != end:
            start = offset
        end = offset + length
    if end > start:
        yield Range(start, end - start)


def data_ranges(content: Content, offset: int, length: int) -> Iterator[Range]:
    """What of a range is not known to read as zeros."""

    def found() -> Iterator[Range]:
        at = offset
        for count, holder in content.holders(offset, length):
            if holder is not None:
                yield Range(at, count)
            at += count

    return merged(found())
