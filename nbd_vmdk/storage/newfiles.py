"""New files that appear all at once, or not at all.

Whoever makes an image makes its files in a temporary folder beside the place where they will stand, under
their final plain names.  ``publish`` makes them durable and moves them out, the file that names the others
last, so nobody ever sees an image without its extents, and a power cut leaves it absent or whole::

    with NewFiles("vms/disk.vmdk") as new:
        ...  # make disk-flat.vmdk and disk.vmdk in new.folder
        new.publish(main="disk.vmdk")

Nothing that exists is replaced, not even what came into being meanwhile: files are moved with the kernel's
"do not replace", and where a file system does not know that, by a hard link, which refuses as well.  With
``replace`` files of the same names give way to the new ones, which get their permissions, owner and
extended attributes; the old ones are kept in the temporary folder until all went well.  They are locked
meanwhile, as for writing: who has one open would go on with a file that nobody else can find any more.

The temporary folder of a process that was killed is removed by the next one with the same target: a living
maker holds a lock on its own, and gives it the name by which it is recognized only then.  One that was killed
before that has left an empty folder, which is recognized by its age.

What is not done: several files are not replaced in one instant, so a kill or a power cut between the first
and the last leaves some new and some old.  The temporary folder then still has the rest of both, and the
next process with the same target refuses to go on until somebody has looked.  On a file system that knows
neither the kernel's flag nor hard links, another program may slip in between looking whether a name is free
and taking it, and a replaced file has no name for an instant.
"""

import ctypes
import errno
import fcntl
import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from typing import Final, NamedTuple, Self, cast

from nbd_vmdk.errors import FileExists, FileMissing, InUse, StorageError, WriteRefused
from nbd_vmdk.storage.local import LocalFile
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.storage.locks import vmware_lock
from nbd_vmdk.units import SECTOR

_NO_REPLACE: Final = 1
#: What a kernel or a file system says that does not know renameat2, a flag of it, or hard links.
_NOT_KNOWN: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})
#: Longest part of the target's name, in bytes, that the temporary folder's name repeats.
_NAME_PART: Final = 200
#: Seconds in which a maker surely locks the temporary folder that he has made.
_YOUNG: Final = 60
#: More files than this are synced side by side, so many at a time.
_MANY: Final = 8
#: Where, in the temporary folder, replaced files are kept under their own names.
_OLD: Final = ".old"


class NewFiles:
    """A temporary folder beside ``target``; a context manager.

    ``folder`` is the path of the temporary folder.  Only its maker can look into it.  Leaving without
    ``publish`` removes it with all that is in it.

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
        self._place, self._name = os.path.split(place)
        self.folder = ""
        self._into = -1
        self._from = -1

    def __enter__(self) -> Self:
        if not self._name or self._name in (os.curdir, os.pardir):
            raise StorageError.of(
                OSError(errno.EISDIR, os.strerror(errno.EISDIR)), self.target, "make files in place of"
            )
        try:
            self._into = os.open(self._place or os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise FileMissing(self._place, hint="make that folder first") from error
        except OSError as error:
            raise StorageError.of(error, self._place or os.curdir, "open the folder") from error
        try:
            if not self._replace and _lstat(self._into, self._name):
                raise FileExists(self.target)
            self._lock_old(self._name)
            self._make_folder()
        except BaseException:
            self._close()
            raise
        return self

    def _make_folder(self) -> None:
        part = os.fsdecode(os.fsencode(self._name)[:_NAME_PART])
        locked_name = f".{part}.new-"
        _sweep_empty(self._into, f".{part}.tmp-")
        if kept := _sweep(self._into, locked_name):
            raise WriteRefused(
                self._label(kept),
                why="an earlier run ended while it was replacing files: the old ones are in .old in there",
                hint="put them back, or the new ones beside .old in place, and remove that folder",
            )
        try:
            self.folder = tempfile.mkdtemp(prefix=f".{part}.tmp-", dir=self._place or os.curdir)
            self._from = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _lock(self._from):
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
        old = _lstat(self._into, name)
        if self._held or old is None or not stat.S_ISREG(old.st_mode) or name in self._locked:
            return
        path = self.target if name == self._name else self._label(name)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._into)
        except OSError as error:
            raise StorageError.of(error, path, "open, to see whether it is in use,") from error
        file = self._locked[name] = LocalFile(fd, path, writable=False)
        try:
            if how := vmware_lock(*LocalFolder.for_image(self._label(name))):
                raise InUse(path, how=how)
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
            raise FileExists(self._label(name)) from error
        except OSError as error:
            raise StorageError.of(error, self._label(name), "create") from error
        return LocalFile(fd, self._label(name), writable=True)

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
        if not self._replace and _lstat(self._into, name):
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
        old = _lstat(self._into, name)
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
                return _Move(name, _identity(os.fstat(fd)), old is not None)
            finally:
                os.close(fd)
        except OSError as error:
            raise StorageError.of(error, self._label(name), "sync") from error

    def _sync_folder(self) -> None:
        try:
            if self._durable:
                os.fsync(self._into)
        except OSError as error:
            raise StorageError.of(error, self._place or os.curdir, "sync the folder") from error

    def _keep_old(self, names: list[str]) -> None:
        """Give the files that will be replaced a second name, by which they can be put back."""
        if not names:
            return
        try:
            os.mkdir(_OLD, dir_fd=self._from)
            for name in names:
                kept = f"{_OLD}/{name}"
                try:
                    os.link(name, kept, src_dir_fd=self._into, dst_dir_fd=self._from, follow_symlinks=False)
                except OSError as error:
                    if error.errno not in _NOT_KNOWN:
                        raise
        except OSError as error:
            raise StorageError.of(error, self.target, "keep the old files") from error

    def _move(self, move: "_Move") -> None:
        try:
            if not move.replaces:
                _move_only(self._from, self._into, move.name)
                return
            if not _lstat(self._from, f"{_OLD}/{move.name}"):  # no hard links here
                os.rename(move.name, f"{_OLD}/{move.name}", src_dir_fd=self._into, dst_dir_fd=self._from)
            os.rename(move.name, move.name, src_dir_fd=self._from, dst_dir_fd=self._into)
        except FileExistsError as error:
            raise FileExists(self._label(move.name)) from error
        except OSError as error:
            raise StorageError.of(error, self._label(move.name), "give the new file its name") from error

    def _take_back(self, move: "_Move") -> None:
        """Undo what was done of ``move``, judged by what is there: an interrupt can come at any point."""
        kept = f"{_OLD}/{move.name}"
        try:
            there = _lstat(self._into, move.name)
            if move.replaces and _lstat(self._from, kept):
                # Where both names are of one file this does nothing, as it should.
                os.rename(kept, move.name, src_dir_fd=self._from, dst_dir_fd=self._into)
            elif not move.replaces and there and _identity(there) == move.identity:
                os.unlink(move.name, dir_fd=self._into)
        except OSError:
            pass  # the first error is what the caller must hear

    def _label(self, name: str) -> str:
        return os.path.join(self._place, name)


class _Move(NamedTuple):
    """A file to be moved out: its inode, and whether it takes the place of another."""

    name: str
    identity: tuple[int, int]
    replaces: bool


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _sweep(folder: int, prefix: str) -> str | None:
    """Remove the temporary folders of this target whose makers are dead.

    The name of one that must be kept, because it came between replacing one file and another; else None.
    """
    kept = None
    try:
        for name in [name for name in os.listdir(folder) if name.startswith(prefix)]:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                if os.fstat(fd).st_uid != os.geteuid() or not _lock(fd):
                    continue
                if _is_needed(folder, fd):
                    kept = name
                else:
                    shutil.rmtree(name, ignore_errors=True, dir_fd=folder)
            finally:
                os.close(fd)
    except OSError:
        pass  # what can't be tidied up is in nobody's way
    return kept


def _sweep_empty(folder: int, prefix: str) -> None:
    """Remove what makers left who were killed before their temporary folders had their lock and name.

    These are empty, and not of just now: a living maker is about to lock his own.
    """
    try:
        for name in [name for name in os.listdir(folder) if name.startswith(prefix)]:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                found = os.fstat(fd)
                is_old = time.time() - found.st_mtime > _YOUNG
                if found.st_uid == os.geteuid() and is_old and not os.listdir(fd) and _lock(fd):
                    os.rmdir(name, dir_fd=folder)
            finally:
                os.close(fd)
    except OSError:
        pass  # what can't be tidied up is in nobody's way


def _is_needed(folder: int, left: int) -> bool:
    """Whether the temporary folder ``left`` has files that are part of a whole with those in ``folder``."""
    names = os.listdir(left)
    if names == [_OLD] or _OLD not in names:
        return False  # all were replaced, or none
    fd = os.open(_OLD, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=left)
    try:
        for name in os.listdir(fd):
            old, there = _lstat(fd, name), _lstat(folder, name)
            if old and not (there and _identity(there) == _identity(old)):
                return True
        return False
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """Hold a folder as long as ``fd`` is open; False if another does, or the file system can't."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lstat(folder: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None  # absent, or so odd that using the name will tell


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


def _move_only(source: int, target: int, name: str) -> None:
    """Move ``name`` from one folder to the other unless it is there; FileExistsError, OSError."""
    if _rename_noreplace(source, target, name):
        return
    try:
        os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NOT_KNOWN:
            raise
        if _lstat(target, name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
    else:
        os.unlink(name, dir_fd=source)


def _rename_noreplace(source: int, target: int, name: str) -> bool:
    """Whether the kernel did it; False means that it can't here.  OSError for anything else."""
    call = _libc_renameat2()
    if call is None:
        return False
    raw = os.fsencode(name)
    if call(source, raw, target, raw, _NO_REPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_KNOWN:
        return False
    raise OSError(number, os.strerror(number))


@functools.cache
def _libc_renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    # Python's os.rename takes no flags.  Some C libraries have no such function.
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return None
    call = libc.renameat2
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    call.restype = ctypes.c_int
    return cast("Callable[[int, bytes, int, bytes, int], int]", call)
