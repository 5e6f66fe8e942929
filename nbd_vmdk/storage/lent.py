"""Files beyond those that may be open at once, read by descriptors that are lent to them.

A process may have so many files open and no more: RLIMIT_NOFILE, often 1024 or 4096 in a container.  A split
disk of some TiB has thousands of files, a chain a hundred links, a server many disks.  What fits stays open,
and is read by its own descriptor at no further cost (local.py).  What does not fit is a LentFile: closed most
of the time, and opened again when it is read.

**Which files.**  The kernel gives out the lowest number that is free, so the number of a new descriptor says
how many are taken, by whomever: disks, clients, nbdkit itself.  An extent that gets one of the last (half of
all, at most 256) is lent.  Of these last ones an eighth is for all files that are lent, together.  Half may
be taken by the files that links are named by, which are lent only after that.  The rest is for what comes and
goes: clients, folders on the way to a file, temporary files.  What is opened for writing is never lent, since
its locks must not be let go of; nor is a device, since opening one may do something.

**By whom.**  A pool keeps those open that were used last.  Each call borrows a descriptor for as long as it
takes, and one that is borrowed is not closed.  If all are, the call waits for one.  So nobody ever reads by a
number that has become another file's; and since a LentFile is no LocalFile, nobody can keep its descriptor.

**Again the same file.**  It is opened in the way in which it was opened first, through the gate.  It must be
the same inode, have the same size, and not have been written to, as its time of modification tells.  The time
also tells of a file that was replaced by one that got its inode, as ext4 likes to give it.  Else the call
fails.  If the file was removed meanwhile its data are gone, though who has a file open can still read them.

**Locks** go with descriptors.  Whoever writes a link, we or QEMU, locks the file that it is named by; so that
one is lent last, and as long as its lock is held the others are safe as well.  Nothing keeps away who writes
an extent by itself between two calls, as the lock of a reader would.  So the lock is taken again whenever the
file is opened again, and the call fails if somebody writes it, or has written it in between: nobody would
hear a warning, and what is there now may not go with what was read before.  Who was warned at the start that
somebody writes the file goes on reading, as with any other file; it must only be as long as it was.
"""

# ruff: noqa: D102  the contract is in base.py

import errno
import os
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from nbd_vmdk.errors import FileChanged, FileMissing, InUse, StorageError, VmdkError
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.local import LocalFile

#: Descriptors that no extent takes for good; half of all, where there are few.
_KEPT_FREE: Final = 256


def _limits() -> tuple[int, int]:
    """How many files may be open, and how many of these extents do not take for good."""
    most, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        most = sys.maxsize
    return most, min(most // 2, _KEPT_FREE)


def must_lend(fd: int, *, extent: bool) -> bool:
    """Whether a file that has just got this descriptor should not keep it; see Folder.open."""
    most, kept_free = _limits()
    return fd >= most - (kept_free if extent else kept_free // 2)


@dataclass(slots=True)
class _Held:
    """An open file, and how many calls have borrowed it."""

    file: LocalFile
    users: int = 0


class Pool:
    """Open files for those that are lent, ``most`` at a time; None: what the limit on open files leaves."""

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._changed = threading.Condition()
        #: The one that was used longest ago comes first.
        self._held: OrderedDict[LentFile, _Held] = OrderedDict()

    @contextmanager
    def borrow(self, lent: "LentFile") -> Iterator[LocalFile]:
        """The open file of ``lent``, which stays open meanwhile; raises as LentFile.open_again does."""
        with self._changed:
            while (held := self._held.get(lent)) is None:
                if self._make_room():
                    held = self._held[lent] = _Held(self._open(lent))
                    break
                self._changed.wait()
            held.users += 1
            self._held.move_to_end(lent)
        try:
            yield held.file
        finally:
            with self._changed:
                held.users -= 1
                self._changed.notify_all()

    def take(self, lent: "LentFile", file: LocalFile) -> None:
        """Keep the file that ``lent`` was made of, if there is room; else it is closed."""
        with self._changed:
            if self._make_room():
                self._held[lent] = _Held(file)
                return
        _close(file)

    def drop(self, lent: "LentFile") -> None:
        """Close the file of ``lent``, which nobody uses any more."""
        with self._changed:
            held = self._held.pop(lent, None)
            self._changed.notify_all()
        if held is not None:
            _close(held.file)

    def _open(self, lent: "LentFile") -> LocalFile:
        while True:
            try:
                return lent.open_again()
            except StorageError as error:
                # Clients and other files have taken more than they were left: it goes with fewer, too.
                cause = error.__cause__
                too_many = isinstance(cause, OSError) and cause.errno == errno.EMFILE
                if not too_many or not self._close_one():
                    raise

    def _make_room(self) -> bool:
        """See to it that one more may be opened; False if all are in use."""
        most = _limits()[1] // 8 if self._most is None else self._most
        while len(self._held) >= max(most, 1):
            if not self._close_one():
                return False
        return True

    def _close_one(self) -> bool:
        """Close the file that nobody has used for longest; False if all are in use."""
        for lent, held in self._held.items():
            if not held.users:
                del self._held[lent]
                _close(held.file)
                return True
        return False


def _close(file: LocalFile) -> None:
    try:
        file.close()
    except StorageError:
        pass  # it was read only: whatever went wrong, nothing is lost


#: One for the process, as the limit is.
_POOL: Final = Pool()


class LentFile(Storage):
    """A file that is open only when it is read.  It takes ``first``, the file as it was opened, over.

    ``again`` opens it in the same way.  Every call raises FileChanged if the file is not the same any more,
    InUse if somebody writes it by now, FileMissing if it is gone.
    """

    is_device = False

    def __init__(self, first: LocalFile, again: Callable[[], LocalFile], pool: Pool = _POOL) -> None:
        self.name = first.name
        self._again = again
        self._pool = pool
        self._identity = first.identity
        stat = os.fstat(first.fd)
        self._size, self._time = stat.st_size, stat.st_mtime_ns
        self._locked = False
        #: Somebody writes it, and the user was told.
        self._is_written = False
        self._closed = False
        pool.take(self, first)

    def open_again(self) -> LocalFile:
        """The file, open, if it is still the same."""
        if self._closed:
            raise StorageError.of(OSError(errno.EBADF, os.strerror(errno.EBADF)), self.name, "open")
        try:
            file = self._again()
        except FileMissing as error:
            error.hint = "it was there when the disk was opened: put it back"
            raise
        try:
            self._compare(file)
        except BaseException:
            _close(file)
            raise
        return file

    def _compare(self, file: LocalFile) -> None:
        if file.identity != self._identity:
            raise FileChanged(self.name, why="another file has taken its place")
        if self._locked and file.lock(writable=False) is not None:
            how = file.writer() or "locking it"
            raise InUse(self.name, how=how, hint="stop the other user, and open the disk again")
        try:
            stat = os.fstat(file.fd)
        except OSError as error:
            raise StorageError.of(error, self.name, "open") from error
        if stat.st_size != self._size:
            why = f"it has {stat.st_size} bytes now, and had {self._size}"
            raise FileChanged(self.name, why=why)
        if stat.st_mtime_ns != self._time and not self._is_written:
            raise FileChanged(self.name, why="it has been written to")

    @property
    def size(self) -> int:
        return self._size

    @property
    def identity(self) -> tuple[int, ...]:
        return self._identity

    @property
    def allocated(self) -> int:
        with self._pool.borrow(self) as file:
            return file.allocated

    def read_into(self, buf: memoryview, at: int) -> None:
        with self._pool.borrow(self) as file:
            file.read_into(buf, at)

    def read(self, at: int, length: int) -> bytes:
        with self._pool.borrow(self) as file:
            return file.read(at, length)

    def advise(self, at: int, length: int) -> None:
        try:
            with self._pool.borrow(self) as file:
                file.advise(at, length)
        except VmdkError:
            pass  # a hint; the read will tell what is wrong

    def segments(self, at: int, length: int) -> Iterator[tuple[int, bool]]:
        stop = at + length
        while at < stop:
            # Who asks may do anything between two answers, so none of them holds the file.
            with self._pool.borrow(self) as file:
                found = next(file.segments(at, stop - at))
            yield found
            at += found[0]

    def lock(self, writable: bool) -> str | None:  # noqa: ARG002  it is for reading
        self._is_written = True  # perhaps; that is what is being found out
        with self._pool.borrow(self) as file:
            warning = file.lock(writable=False)
            self._locked = warning is None
            self._is_written = file.writer() is not None
        return warning

    def writer(self) -> str | None:
        self._is_written = True
        with self._pool.borrow(self) as file:
            writer = file.writer()
        self._is_written = writer is not None
        return writer

    def close(self) -> None:
        self._closed = True
        self._pool.drop(self)
