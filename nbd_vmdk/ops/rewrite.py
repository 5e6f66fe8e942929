"""Giving a link another descriptor, safely.

A descriptor that is a file of its own is written beside, synced and renamed into place, with the permissions
of the old one, so whoever opens it finds the old text or the new one.

One that lies inside a hosted sparse extent can only be overwritten in the room reserved for it, and a power
cut in between may leave some sectors of either text.  So the old text is saved beside first, durably, in a
file ``NAME.saved-by-nbd-vmdk``, which goes away once the new text is durable.  Found later, it says what
happened: its last line holds the digest of the new text.  If that is what is there the file is of no use any
more; else the old text is put back (``mend_descriptor``, which all that changes links calls first).

A file is replaced under the lock of its old inode, and the new one is locked before it gets the name, so
nobody else can come to write it in between.
"""

import errno
import hashlib
import os
from typing import Final, Self

from nbd_vmdk.errors import StorageError, Truncated, VmdkError, WriteRefused
from nbd_vmdk.link import Link
from nbd_vmdk.look import embedded_text, head_of
from nbd_vmdk.ondisk import hosted
from nbd_vmdk.ondisk.descriptor import EMBEDDED_LIMIT, MAX_DESCRIPTOR, Descriptor
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.lent import LentFile
from nbd_vmdk.storage.local import LocalFile
from nbd_vmdk.storage.newfiles import dress
from nbd_vmdk.units import SECTOR, align_up

#: What is put behind a file's name for the saved text of its descriptor: nothing that anybody else would put
#: there, as what is called so is removed.
SAVED: Final = ".saved-by-nbd-vmdk"
#: And behind that, for one that is a file of its own and not yet in place.
_NEW: Final = ".new"
_DIGEST: Final = b"# replaced by the text with the SHA-256 "


class DescriptorFile:
    """The descriptor of one link, in a file that is open for writing and locked; a context manager.

    ``descriptor`` is what it says now.  Closing lets go of what was opened here, not of a storage that was
    handed over.
    """

    def __init__(self, storage: Storage) -> None:
        """Take the descriptor in ``storage``, which its owner keeps open, writable and locked."""
        self._storage = storage
        self._owned: Storage | None = None
        head = head_of(storage)
        self._header = hosted.parse_header(head, storage.name) if head.startswith(hosted.MAGIC) else None
        if self._header is None:
            text = storage.read(0, min(storage.size, MAX_DESCRIPTOR + 1))
        else:
            text = embedded_text(storage, self._header)
        self.descriptor = Descriptor.parse(text, storage.name)

    @classmethod
    def open(cls, folder: Folder, name: str) -> Self:
        """Open and lock the link ``name``; InUse if another process has it."""
        storage = folder.open(name, writable=True)
        try:
            storage.lock(writable=True)
            made = cls(storage)
        except BaseException:
            storage.close()
            raise
        made._owned = storage
        return made

    @property
    def storage(self) -> Storage:
        """The file that holds the descriptor now."""
        return self._storage

    def replace(self, new: Descriptor) -> None:
        """Put ``new`` in the place of the descriptor; it is durable when this returns.

        Raises WriteRefused if there is no room, or if the file can't be replaced where it is; StorageError.
        Then the old text is there, or will be put back.
        """
        if new.to_bytes() != self.descriptor.to_bytes():
            if self._header is None:
                self._replace_file(new.to_bytes())
            else:
                self._overwrite(self._header, new.to_bytes())
        self.descriptor = new

    def rehearse(self, new: Descriptor) -> None:
        """Raise what keeps ``new`` from being put there, for who changes something else first.

        A file is made beside as replace() makes one, and taken away again; all stays as it is.
        """
        if self._header is not None:
            self._check_room(self._header, new.to_bytes())
        path = real_path(self._storage)
        beside = path + SAVED + _NEW
        try:
            _unlink(beside)  # one that is there was left by a process that was killed
            file = _create(beside, self._storage.name)
            try:
                dress(beside, path)
                file.write(new.to_bytes(), 0)
            finally:
                file.close()
                _unlink(beside)
        except OSError as error:
            raise StorageError.of(error, self._storage.name, "replace its descriptor") from error
        except StorageError as error:
            if error.errno == errno.EPERM:
                error.hint = "that takes making a file beside it: its folder can't be written"
            raise

    def _replace_file(self, text: bytes) -> None:
        path = real_path(self._storage)
        beside = path + SAVED + _NEW
        try:
            _unlink(beside)  # one that is there was left by a process that was killed
            file = _create(beside, self._storage.name)
            try:
                dress(beside, path)
                file.lock(writable=True)
                file.write(text, 0)
                file.sync()
                os.rename(beside, path)
            except BaseException:
                file.close()
                _unlink(beside)
                raise
        except OSError as error:
            raise StorageError.of(error, self._storage.name, "replace its descriptor") from error
        if self._owned is not None:
            self._owned.close()
        self._storage = self._owned = file
        sync_folder(os.path.dirname(path))

    def _overwrite(self, header: hosted.HostedHeader, text: bytes) -> None:
        storage = self._storage
        old = self.descriptor.to_bytes()
        self._check_room(header, text)
        saved = real_path(storage) + SAVED
        _save(saved, old + b"\n" + _DIGEST + _digest(text) + b"\n")
        length = min(align_up(max(len(old), len(text)) + 1, SECTOR), _room(header))
        storage.write(text.ljust(length, b"\0"), header.descriptor_sector * SECTOR)
        storage.sync()
        _remove(saved)

    def _check_room(self, header: hosted.HostedHeader, text: bytes) -> None:
        room = min(_room(header), EMBEDDED_LIMIT)
        if len(text) >= room:
            raise WriteRefused(
                self._storage.name,
                why=f"its descriptor would need {len(text)} bytes, and there is room for {room - 1}",
                hint="move the files so that the parent's path becomes shorter",
            )

    def close(self) -> None:
        """Let go of the file, lock included."""
        if self._owned is not None:
            self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def mend_descriptor(folder: Folder, name: str) -> bool:
    """Finish what a power cut interrupted in the embedded descriptor of ``name``; whether there was anything.

    Raises InUse if another process has the file, and WriteRefused if the saved text is none of ours.
    """
    if name + SAVED not in folder.names():
        return False
    saved = folder.open(name + SAVED)
    try:
        content = saved.read(0, min(saved.size, MAX_DESCRIPTOR))
    finally:
        saved.close()
    old, mark, rest = content.rpartition(b"\n" + _DIGEST)
    storage = folder.open(name, writable=True)
    try:
        storage.lock(writable=True)
        path = real_path(storage)
        header = hosted.parse_header(storage.read(0, SECTOR), storage.name)
        if not mark:
            # It was not yet durable, so nothing has been overwritten: any of ours ends in a digest.
            Descriptor.parse(embedded_text(storage, header), storage.name)
        elif _digest(_text(storage, header)) != rest.strip():
            Descriptor.parse(old, saved.name)  # nothing but a descriptor is put there
            if len(old) >= _room(header):
                raise WriteRefused(saved.name, why=f"it is no descriptor of {name}", hint="move it away")
            length = min(align_up(max(len(old), EMBEDDED_LIMIT), SECTOR), _room(header))
            storage.write(old.ljust(length, b"\0"), header.descriptor_sector * SECTOR)
            storage.sync()
        _remove(path + SAVED)
    finally:
        storage.close()
    return True


def mend_folder(folder: Folder) -> None:
    """Finish what a power cut interrupted in any embedded descriptor of ``folder``."""
    names = folder.names()
    for name in names:
        if name.endswith(SAVED) and name.removesuffix(SAVED) in names:
            mend_descriptor(folder, name.removesuffix(SAVED))


def is_embedded(link: Link) -> bool:
    """Whether the link's descriptor stands in one of its extents."""
    return any(entry.extent.storage is link.storages[0] for entry in link.extents)


def real_path(storage: Storage) -> str:
    """Where the open file really is, for what must be done by name: renaming, linking, removing.

    Raises WriteRefused if its name does not lead to it: it was reached in a way that a name can't go.
    """
    path = os.path.realpath(storage.name)
    try:
        stat = os.stat(path, follow_symlinks=False)
    except OSError:
        stat = None
    is_here = isinstance(storage, LocalFile | LentFile)
    if not is_here or stat is None or storage.identity != (stat.st_dev, stat.st_ino):
        raise WriteRefused(
            storage.name,
            why="its place is not known well enough to change its name or its descriptor",
            hint="name the image by its real path, not by a symbolic link",
        )
    return path


def remove_leftovers(path: str) -> None:
    """Remove what a process that was killed while it replaced the descriptor ``path`` left beside it.

    The caller holds its lock, so nobody is at it now.  Raises OSError.
    """
    for beside in (path + SAVED, path + SAVED + _NEW):
        _unlink(beside)


def sync_folder(path: str) -> None:
    """Make the names in the folder ``path`` durable."""
    try:
        fd = os.open(path or os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError.of(error, path, "sync the folder") from error


def _room(header: hosted.HostedHeader) -> int:
    """Bytes from the descriptor's place to whatever comes behind it."""
    at = header.descriptor_sector * SECTOR
    behind = [header.directory_at, header.redundant_at or 0, header.overhead_sectors * SECTOR]
    return min([header.descriptor_sectors * SECTOR, *(begin - at for begin in behind if begin > at)])


def _text(storage: Storage, header: hosted.HostedHeader) -> bytes:
    try:
        return embedded_text(storage, header)
    except Truncated:
        return b""


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _create(path: str, label: str) -> LocalFile:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError.of(error, label, "write its descriptor") from error
    return LocalFile(fd, label, writable=True)


def _save(path: str, content: bytes) -> None:
    """Write a file beside and make it durable; one that is there already was never completed."""
    try:
        _unlink(path)
        file = _create(path, path)
        try:
            file.write(content, 0)
            file.sync()
        except VmdkError:
            _unlink(path)
            raise
        finally:
            file.close()
    except OSError as error:
        raise StorageError.of(error, path, "save the descriptor") from error
    sync_folder(os.path.dirname(path))


def _remove(path: str) -> None:
    try:
        _unlink(path)
    except OSError as error:
        raise StorageError.of(error, path, "remove") from error
    sync_folder(os.path.dirname(path))


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
