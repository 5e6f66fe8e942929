"""The files of a new image: what is in each, and how it is put there."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nbd_vmdk.errors import StorageError
from nbd_vmdk.ondisk import hosted_build, stream_build
from nbd_vmdk.ondisk.hosted import HostedHeader
from nbd_vmdk.storage.newfiles import NewFiles
from nbd_vmdk.units import MIB, SECTOR

_ZEROS: Final = memoryview(bytes(MIB))


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """A file to be made; what is not said to be in it is zeros, and takes no space.

    name           its plain name
    role           what it is to the image: disk (all there is), descriptor or extent
    what           what it holds, for people
    length         in bytes, but for the descriptor, which is as long as its text
    pieces         (byte, bytes) of what it begins with
    text_at        the byte where the image's descriptor goes, None if not into this file
    preallocation  whether its space is taken at once: off, falloc or full
    """

    name: str
    role: str = "extent"
    what: str
    length: int = 0
    pieces: tuple[tuple[int, bytes], ...] = ()
    text_at: int | None = None
    preallocation: str = "off"

    @property
    def slow(self) -> int:
        """Bytes whose writing takes time."""
        return self.length if self.preallocation == "full" else 0

    def make(self, new: NewFiles, text: bytes, told: Callable[[int], None]) -> int:
        """Make the file in the folder of ``new``; its length.

        ``told`` hears how many bytes more were written of those that take time.  Raises StorageError.
        """
        pieces = self.pieces if self.text_at is None else (*self.pieces, (self.text_at, text))
        storage = new.create(self.name)
        try:
            storage.truncate(self.length)
            for at, content in pieces:
                storage.write(content, at)
            if self.preallocation != "off":
                # Also before writing everything out: a disk that is too full says so at once.
                self._reserve(new)
            if self.preallocation == "full":
                for at in range(0, self.length, len(_ZEROS)):
                    step = min(len(_ZEROS), self.length - at)
                    storage.write(_ZEROS[:step], at)
                    told(step)
            return storage.size
        finally:
            storage.close()

    def _reserve(self, new: NewFiles) -> None:
        try:
            new.reserve(self.name, self.length)
        except StorageError as error:
            if error.errno == errno.ENOSPC:
                error.hint = "--preallocation off takes space only as it is written"
            raise


def text_file(name: str) -> NewFile:
    """A descriptor of its own."""
    return NewFile(name=name, role="descriptor", what="the descriptor", text_at=0)


def sparse_file(name: str, header: HostedHeader) -> NewFile:
    """An empty hosted sparse extent; where its header has room for the descriptor, it is all of a disk."""
    alone = header.descriptor_sector > 0
    return NewFile(
        name=name,
        role="disk" if alone else "extent",
        what="sparse, with the descriptor" if alone else "sparse",
        length=header.overhead_sectors * SECTOR,
        pieces=tuple(hosted_build.metadata(header)),
        text_at=header.descriptor_sector * SECTOR if alone else None,
    )


def stream_file(name: str, header: HostedHeader) -> NewFile:
    """A streamOptimized extent without any grain; it is all of a disk."""
    content = stream_build.empty_stream(header, b"")
    return NewFile(
        name=name,
        role="disk",
        what="compressed, with the descriptor",
        length=len(content),
        pieces=((0, content),),
        text_at=header.descriptor_sector * SECTOR,
    )


def cowd_file(name: str, content: bytes) -> NewFile:
    """A COWD extent, as it is built whole."""
    return NewFile(name=name, what="COWD sparse", length=len(content), pieces=((0, content),))


def flat_file(name: str, length: int, preallocation: str) -> NewFile:
    """Raw bytes, all zeros."""
    what = {"off": "raw", "falloc": "raw, its space reserved", "full": "raw, written out"}[preallocation]
    return NewFile(name=name, what=what, length=length, preallocation=preallocation)
