"""New files that appear all at once, or not at all.

Whoever makes an image makes its files in a temporary folder beside the place where they will stand, under
their final plain names.  ``publish`` makes them durable and moves them out, the file that names the others
last, so nobody ever sees an image without its extents, and a power cut leaves it absent or whole::

    with NewFiles("vms/disk.vmdk") as new:
        ...  # make disk-flat.vmdk and disk.vmdk in new.folder
        new.publish(main="disk.vmdk")

Nothing that exists is replaced, not even what came into being meanwhile: the last file is moved with the
kernel's "do not replace", and where a file system does not know that, by a hard link, which refuses as well.
The others get hard links before it, so that whoever finds the temporary folder of a killed process knows
them by what they are, not by their names, and takes them away: without the last one they are nothing.  With
``replace`` files of the same names give way to the new ones, which get their permissions, owner and
extended attributes; the old ones are kept in the temporary folder until all went well.  They are locked
meanwhile, as for writing: who has one open would go on with a file that nobody else can find any more.

The temporary folder of a process that was killed is removed by the next one with the same target, see
leftovers.py.

What is not done: several files are not replaced in one instant, so a kill or a power cut between the first
and the last leaves some new and some old.  The temporary folder then still has the rest of both, and the
next process with the same target refuses to go on until somebody has looked.  On a file system without hard
links the new files that had their names stay, too; and if it does not know the kernel's flag either, another
program may slip in between looking whether a name is free and taking it, and a replaced file has no name for
an instant.
"""

import binascii
import errno
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from typing import Final, NamedTuple, Self

from nbd_vmdk.errors import FileExists, FileMissing, InUse, StorageError, WriteRefused
from nbd_vmdk.storage.leftovers import OLD, lock_folder, sweep, sweep_empty
from nbd_vmdk.storage.local import LocalFile
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.storage.locks import check_vmware_lock
from nbd_vmdk.storage.moving import NOT_KNOWN, identity_of, link_or_move, lstat, move_only
from nbd_vmdk.units import SECTOR

#: Longest name of a target, in bytes, that the temporary folder's name repeats; of others a part and a sum.
_NAME_PART: Final = 200
#: More files than this are synced side by side, so many at a time.
_MANY: Final = 8


class NewFiles:
    """A temporary folder beside ``target``; a context manager.

    ``folder`` is the path of the temporary folder.  Only its maker can look into it.  Leaving without
    ``publish`` removes it with all that is in it.  ``place`` is the folder of the files to come, and ``name``
    what the target is called there.

    Raises FileExists when ``target`` is there, unless ``replace``; FileMissing or StorageError when its
    folder can't be had or written.  With ``replace`` a symbolic link stands for the file it leads to, and
    InUse is raised, here or by publish(), for a file that another process uses; ``held`` says that the caller
    holds their locks.  Without ``durable`` nothing is synced: the folder of the target is itself one that its
    maker has yet to publish.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        replace: bool = False,
        held: bool = False,
        durable: bool = True,
    ) -> None:
        self.target = os.fspath(target)
        self._durable = durable
        self._replace = replace
        self._held = held
        self._locked: dict[str, LocalFile] = {}
        place = os.path.realpath(self.target) if replace else self.target
        self.place, self.name = os.path.split(place)
        self.folder = ""
        self._into = -1
        self._from = -1

    def __enter__(self) -> Self:
        if not self.name or self.name in (os.curdir, os.pardir):
            raise StorageError.of(
                OSError(errno.EISDIR, os.strerror(errno.EISDIR)), self.target, "make files in place of"
            )
        try:
            self._into = os.open(self.place or os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise FileMissing(self.place, hint="make that folder first") from error
        except OSError as error:
            raise StorageError.of(error, self.place or os.curdir, "open the folder") from error
        try:
            if not self._replace and lstat(self._into, self.name):
                raise FileExists(self.target)
            self._lock_old(self.name)
            self._make_folder()
        except BaseException:
            self._close()
            raise
        return self

    def _make_folder(self) -> None:
        part, raw = self.name, os.fsencode(self.name)
        if len(raw) > _NAME_PART:
            part = f"{os.fsdecode(raw[: _NAME_PART - 9])}-{binascii.crc32(raw):08x}"
        locked_name = f".{part}.new-"
        sweep_empty(self._into, f".{part}.tmp-")
        if kept := sweep(self._into, locked_name, self.name):
            raise WriteRefused(
                self._label(kept),
                why="an earlier run ended while it was replacing files: the old ones are in .old in there",
                hint="put them back, or the new ones beside .old in place, and remove that folder",
            )
        try:
            self.folder = tempfile.mkdtemp(prefix=f".{part}.tmp-", dir=self.place or os.curdir)
            self._from = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if lock_folder(self._from):
                locked = os.path.join(
                    os.path.dirname(self.folder), locked_name + self.folder.rpartition(".tmp-")[2]
                )
                os.rename(self.folder, locked)
                self.folder = locked
        except OSError as error:
            raise StorageError.of(error, self.target, "make new files in its folder") from error

    def __exit__(self, *_: object) -> None:
        # What goes wrong here must not hide what went wrong before, and the files that count are elsewhere.
        shutil.rmtree(self.folder, ignore_errors=True)
        self._close()

    def _lock_old(self, name: str) -> None:
        """Keep all others from using the file that will be replaced, if there is one, until the end."""
        old = lstat(self._into, name)
        if self._held or old is None or not stat.S_ISREG(old.st_mode) or name in self._locked:
            return
        path = self._called(name)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._into)
        except OSError as error:
            raise StorageError.of(error, path, "open, to see whether it is in use,") from error
        file = self._locked[name] = LocalFile(fd, path, writable=False)
        try:
            check_vmware_lock(*LocalFolder.for_image(self._label(name)), path)
            file.lock(writable=True)
        except InUse as error:
            error.hint = "stop the other user first, or choose another name"
            raise

    def _close(self) -> None:
        for file in self._locked.values():
            file.close()
        self._locked.clear()
        for fd in (self._into, self._from):
            if fd >= 0:
                os.close(fd)
        self._into = self._from = -1

    def path(self, name: str) -> str:
        """Where to make the file that will be called ``name``."""
        return os.path.join(self.folder, name)

    def create(self, name: str) -> LocalFile:
        """Make the file that will be called ``name``, empty; the caller closes it.

        Raises StorageError, FileExists when it was made already.
        """
        try:
            fd = os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError as error:
            raise FileExists(self._called(name)) from error
        except OSError as error:
            raise StorageError.of(error, self._called(name), "create") from error
        return LocalFile(fd, self._called(name), writable=True)

    def reserve(self, name: str, length: int) -> None:
        """Take the space of the first ``length`` bytes of a file that was made.

        A file system that can't reserve is written to instead, a byte a block.  What it has no room for is
        refused before it is tried: others on it would find it full meanwhile.  Raises StorageError.
        """
        try:
            fd = os.open(self.path(name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                room = os.fstatvfs(fd)
                if length - os.fstat(fd).st_blocks * SECTOR > room.f_bavail * room.f_frsize:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.posix_fallocate(fd, 0, length)
            finally:
                os.close(fd)
        except OSError as error:
            raise StorageError.of(error, self._label(name), f"reserve {length} bytes") from error

    def check_free(self, name: str) -> None:
        """Raise FileExists if a file called ``name`` is beside the target, and files are not to be replaced.

        ``publish`` looks again; this spares the work that would come to nothing.
        """
        if not self._replace and lstat(self._into, name):
            raise FileExists(self._label(name))

    def publish(self, main: str) -> tuple[str, ...]:
        """Make all files durable and move them beside the target, ``main`` last; their new paths.

        Raises FileExists when a name is taken (unless replacing), WriteRefused for what can't be replaced,
        InUse for what is in use, StorageError.  Then nothing has changed: what was moved already has been
        taken back.
        """
        names = [name for name in sorted(self._names()) if name != main]
        names.append(main)
        moves = self._finish_all(names)
        try:
            self._keep_old([move.name for move in moves if move.replaces])
            for move in moves:
                if move.name == main and len(names) > 1:
                    self._sync_folder()  # a power cut must not keep the last name without the others
                self._move(move)
            self._drop_links(moves)
            self._sync_folder()
        except BaseException:
            for move in reversed(moves):
                self._take_back(move)
            raise
        return tuple(self._label(name) for name in names)

    def _names(self) -> list[str]:
        # Who opened a folder of btrfs is shown what it held then, so this opens it again.
        fd = os.open(os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._from)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def _finish_all(self, names: list[str]) -> list["_Move"]:
        if len(names) <= _MANY:
            return list(map(self._finish, names))
        from concurrent.futures import ThreadPoolExecutor  # seldom needed, and slow to import

        # Syncs that wait together cost one write of the file system's journal, not one each.
        with ThreadPoolExecutor(_MANY) as pool:
            return list(pool.map(self._finish, names))

    def _finish(self, name: str) -> "_Move":
        """Check that ``name`` can be published, give it what the replaced file had, and sync it."""
        old = lstat(self._into, name)
        if old and not self._replace:
            raise FileExists(self._label(name))
        if old and not stat.S_ISREG(old.st_mode):
            raise WriteRefused(self._label(name), why="it can't be replaced, it is no regular file")
        self._lock_old(name)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._from)
            try:
                if old:
                    dress(fd, self._label(name))
                if self._durable:
                    os.fsync(fd)
                return _Move(name, identity_of(os.fstat(fd)), old is not None)
            finally:
                os.close(fd)
        except OSError as error:
            raise StorageError.of(error, self._label(name), "sync") from error

    def _sync_folder(self) -> None:
        try:
            if self._durable:
                os.fsync(self._into)
        except OSError as error:
            raise StorageError.of(error, self.place or os.curdir, "sync the folder") from error

    def _keep_old(self, names: list[str]) -> None:
        """Give the files that will be replaced a second name, by which they can be put back."""
        if not names:
            return
        try:
            os.mkdir(OLD, dir_fd=self._from)
            for name in names:
                kept = f"{OLD}/{name}"
                try:
                    os.link(name, kept, src_dir_fd=self._into, dst_dir_fd=self._from, follow_symlinks=False)
                except OSError as error:
                    if error.errno not in NOT_KNOWN:
                        raise
        except OSError as error:
            raise StorageError.of(error, self.target, "keep the old files") from error

    def _move(self, move: "_Move") -> None:
        try:
            if not move.replaces:
                # What is left here, without the target, tells sweep() what the others were to be parts of.
                give = move_only if move.name == self.name else link_or_move
                give(self._from, self._into, move.name)
                return
            if not lstat(self._from, f"{OLD}/{move.name}"):  # no hard links here
                os.rename(move.name, f"{OLD}/{move.name}", src_dir_fd=self._into, dst_dir_fd=self._from)
            os.rename(move.name, move.name, src_dir_fd=self._from, dst_dir_fd=self._into)
        except FileExistsError as error:
            raise FileExists(self._label(move.name)) from error
        except OSError as error:
            raise StorageError.of(error, self._label(move.name), "give the new file its name") from error

    def _drop_links(self, moves: list["_Move"]) -> None:
        """Take the names here from what has its own: hidden ones that a kill leaves keep its space."""
        for move in moves:
            if not move.replaces:
                with suppress(OSError):  # leaving removes them, too
                    os.unlink(move.name, dir_fd=self._from)

    def _take_back(self, move: "_Move") -> None:
        """Undo what was done of ``move``, judged by what is there: an interrupt can come at any point."""
        kept = f"{OLD}/{move.name}"
        try:
            there = lstat(self._into, move.name)
            if move.replaces and lstat(self._from, kept):
                # Where both names are of one file this does nothing, as it should.
                os.rename(kept, move.name, src_dir_fd=self._from, dst_dir_fd=self._into)
            elif not move.replaces and there and identity_of(there) == move.identity:
                os.unlink(move.name, dir_fd=self._into)
        except OSError:
            pass  # the first error is what the caller must hear

    def _label(self, name: str) -> str:
        return os.path.join(self.place, name)

    def _called(self, name: str) -> str:
        """A file to come, as the user called it, who may have named a symbolic link."""
        return self.target if name == self.name else self._label(name)


class _Move(NamedTuple):
    """A file to be moved out: its inode, and whether it takes the place of another."""

    name: str
    identity: tuple[int, int]
    replaces: bool


def dress(new: int | str, old: str) -> None:
    """Give the file ``new`` the owner, permissions and extended attributes of ``old``, as far as one may.

    ``new`` is a path or a descriptor.  Raises OSError.
    """
    found = os.stat(old, follow_symlinks=False)
    try:
        os.chown(new, found.st_uid, found.st_gid)
    except PermissionError:
        pass  # only root can give files away; then the new one is the caller's
    try:
        for name in os.listxattr(old, follow_symlinks=False):
            os.setxattr(new, name, os.getxattr(old, name, follow_symlinks=False))
    except OSError:
        pass  # labels and access lists that this file system or this user can't set
    os.chmod(new, stat.S_IMODE(found.st_mode))
