"""A file or a block device of this machine, by its descriptor.

Nothing here opens by name: that is the gate's work (localfolder.py).  All reading and writing is
positional, so threads share one descriptor without a lock; the file position, which nobody reads, is
moved about by ``segments`` alone.
"""

# ruff: noqa: D102  the contract is in base.py

import ctypes
import errno
import fcntl
import functools
import os
import resource
import struct
from collections.abc import Callable, Iterator
from typing import cast

from nbd_vmdk.errors import StorageError, Truncated
from nbd_vmdk.storage import locks
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MAX_OFFSET, MIB, SECTOR

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10

#: ioctl_ficlonerange(2): blocks of one file become another's, too.
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("qQQQ")

#: The file system has no such call at all: it is not asked a second time.
_NEVER = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.ENOTTY})

#: The descriptor of a file that was closed: every call says EBADF, as an OSError, which some calls do not
#: for -1.
_CLOSED = 0x7FFFFFFF

#: Sent to the disk at once of a file that is written from front to back.  With less a file system lays the
#: file out in smaller pieces; with more there is more left to wait for at the end.
_BEHIND = 8 * MIB
#: statfs(2): what file systems in memory call themselves, tmpfs and ramfs; and more room than the structure,
#: which begins with that, takes on any machine.
_IN_MEMORY = frozenset({0x01021994, 0x858458F6})
_STATFS_LONGS = 32
#: sync_file_range: start writing what was changed, and wait for nothing.
_START_WRITING = 2

#: What is written where nothing faster works.  calloc'ed and only read, it occupies no memory.
_ZEROS = bytes(MIB)


class LocalFile(Storage):
    """An open descriptor as a storage.

    It takes ``fd`` over and closes it.  ``close`` must not run beside another call: the number may be
    given to another file at once.  A file that is being written by somebody else may shrink at any time,
    which shows as Truncated, never as zeros.
    """

    def __init__(self, fd: int, name: str, *, writable: bool, is_device: bool = False) -> None:
        #: The descriptor, for those who read at once, and ask the storage itself after any error; a number
        #: that no file has once it is closed.
        self.fd = fd
        self.name = name
        self.writable = writable
        self.is_device = is_device
        self.in_memory = writable and not is_device and _is_in_memory(fd)
        stat = os.fstat(fd)
        self._identity = (stat.st_rdev,) if is_device else (stat.st_dev, stat.st_ino)
        # A device's size is not in its inode, and it does not grow under its users.
        self._device_size = os.lseek(fd, 0, os.SEEK_END) if is_device else 0
        self._can = {_PUNCH_HOLE: True, _ZERO_RANGE: True}
        self._tried = is_device
        self._sent = 0  # where writing behind goes on

    @property
    def size(self) -> int:
        if self.is_device:
            return self._device_size
        try:
            return os.fstat(self.fd).st_size
        except OSError as error:
            raise StorageError.of(error, self.name, "size") from error

    @property
    def identity(self) -> tuple[int, ...]:
        return self._identity

    @property
    def allocated(self) -> int:
        if self.is_device:
            return self._device_size
        try:
            return os.fstat(self.fd).st_blocks * SECTOR  # POSIX leaves the unit open; Linux says 512
        except OSError as error:
            raise StorageError.of(error, self.name, "size") from error

    def read_into(self, buf: memoryview, at: int) -> None:
        try:
            got = os.preadv(self.fd, (buf,), at)
            if got != buf.nbytes:
                self._read_rest(buf, at, got)
        except OSError as error:
            raise StorageError.of(error, self.name, f"read at byte {at}") from error
        except OverflowError as error:
            raise Truncated(self.name, what="a read", need=at + buf.nbytes, have=self.size) from error

    def _read_rest(self, buf: memoryview, at: int, done: int) -> None:
        # The kernel moves at most 2 GiB at a time, and network file systems less when they please.
        view = buf.cast("B")
        while done < len(view):
            got = os.preadv(self.fd, (view[done:],), at + done)
            if got == 0:
                raise Truncated(self.name, what="a read", need=at + len(view), have=self.size)
            done += got

    def read(self, at: int, length: int) -> bytes:
        if length > MIB and at + length > self.size:  # memory is not taken for what can't be there
            raise Truncated(self.name, what="a read", need=at + length, have=self.size)
        try:
            data = os.pread(self.fd, length, at)
        except OSError as error:
            raise StorageError.of(error, self.name, f"read at byte {at}") from error
        except OverflowError as error:
            raise Truncated(self.name, what="a read", need=at + length, have=self.size) from error
        return data if len(data) == length else super().read(at, length)

    def write(self, buf: bytes | bytearray | memoryview, at: int) -> None:
        if not self.writable:
            super().write(buf, at)
        try:
            done = os.pwrite(self.fd, buf, at)
            if done != len(buf):
                with memoryview(buf) as view:
                    self._write_rest(view.cast("B"), at, done)
        except OSError as error:
            raise StorageError.of(error, self.name, f"write at byte {at}") from error
        except OverflowError as error:
            raise self._too_far(f"write at byte {at}") from error
        if self.write_behind and at + len(buf) >= self._sent + 2 * _BEHIND:
            self._start_writing((at + len(buf)) // _BEHIND * _BEHIND - _BEHIND)

    def _write_rest(self, view: memoryview, at: int, done: int) -> None:
        while done < len(view):
            put = os.pwrite(self.fd, view[done:], at + done)
            if put == 0:
                raise OSError(errno.EIO, "nothing was written")
            done += put

    def _start_writing(self, end: int) -> None:
        """Send what lies before ``end`` to the disk; waits only for room in the disk's queue.

        Other threads may still be at work on a little of it.  That, and what is changed later, is left to the
        sync, which also tells of errors that the disk meets.
        """
        start, self._sent = self._sent, end
        call = _libc_sync_file_range()
        if call is None or call(self.fd, start, end - start, _START_WRITING) != 0:
            self.write_behind = False

    def zero(self, at: int, length: int) -> None:
        if not self.writable:
            super().zero(at, length)
        length = min(length, self.size - at)
        if not self._fallocate(_ZERO_RANGE, at, length):
            self._write_zeros(at, length)

    def punch(self, at: int, length: int) -> None:
        if not self.writable:
            super().punch(at, length)
        if not self._fallocate(_PUNCH_HOLE, at, length):
            self._write_zeros(at, min(length, self.size - at))

    def share(self, other: Storage, at: int, length: int, to: int) -> bool:
        if not isinstance(other, LocalFile) or self.is_device or not self.writable:
            return False
        try:
            fcntl.ioctl(self.fd, _FICLONERANGE, _CLONE_RANGE.pack(other.fd, at, length, to))
        except (OSError, struct.error):
            return False
        return True

    def zeroes_fast(self, *, punch: bool) -> bool:
        """See Storage: the first time it is tried out, on a new file without a name in the same folder.

        In the file itself each range is somebody's.  Where the folder may not be written, nothing is known.
        """
        if not self._tried:
            self._tried = True
            self._try_out()
        return self._can[_PUNCH_HOLE if punch else _ZERO_RANGE]

    def _try_out(self) -> None:
        try:
            beside = os.path.dirname(os.readlink(f"/proc/self/fd/{self.fd}"))
            fd = os.open(beside, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            # What has no files without names has no ranges of zeros either, SMB apart: NFS, FAT.
            if error.errno == errno.EOPNOTSUPP:
                self._can[_ZERO_RANGE] = False
            return
        try:
            if os.fstat(fd).st_dev == self._identity[0]:  # a file may be mounted alone
                call = _libc_fallocate()
                for mode in self._can:
                    if call(fd, mode | _KEEP_SIZE, 0, 4096) != 0 and ctypes.get_errno() in _NEVER:
                        self._can[mode] = False
        finally:
            os.close(fd)

    def _fallocate(self, mode: int, at: int, length: int) -> bool:
        """Whether the kernel did it; False means: write zeros instead.  The size stays."""
        if length <= 0:
            return True
        if at + length > MAX_OFFSET:
            raise self._too_far("zero")
        if not self._can[mode]:
            return False
        call = _libc_fallocate()
        while call(self.fd, mode | _KEEP_SIZE, at, length) != 0:
            number = ctypes.get_errno()
            if number in _NEVER:
                self._can[mode] = False
                return False
            # EINVAL: a device wants whole sectors.  ENOSPC: a full file system may not be able to note what
            # it was asked to, and ext4 has dropped the cached pages by then, with all that was not synced;
            # writing zeros puts something definite there, and mostly needs no space.
            if number in (errno.EINVAL, errno.ENOSPC):
                return False
            if number != errno.EINTR:
                raise StorageError.of(OSError(number, os.strerror(number)), self.name, f"zero at byte {at}")
        return True

    def _write_zeros(self, at: int, length: int) -> None:
        while length > 0:
            step = min(length, len(_ZEROS))
            self.write(memoryview(_ZEROS)[:step], at)
            at += step
            length -= step

    def truncate(self, size: int) -> None:
        if not self.writable:
            super().truncate(size)
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise StorageError.of(error, self.name, f"change the size to {size}") from error
        except OverflowError as error:
            raise self._too_far(f"change the size to {size}") from error

    def sync(self) -> None:
        if not self.writable:
            super().sync()
        if self.fleeting:
            return
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise StorageError.of(error, self.name, "sync") from error

    def advise(self, at: int, length: int) -> None:
        if length <= 0:  # to the kernel 0 means everything
            return
        try:
            os.posix_fadvise(self.fd, at, length, os.POSIX_FADV_WILLNEED)
        except (OSError, OverflowError):
            pass  # a hint; the read will tell what is wrong

    def segments(self, at: int, length: int) -> Iterator[tuple[int, bool]]:
        stop = at + length
        while at < stop:
            found = self._segment(at, stop)
            if found is None:
                # Beyond the end, or a file system that can't tell: nothing is known to be zero.
                yield stop - at, True
                return
            yield found
            at += found[0]

    def _segment(self, at: int, stop: int) -> tuple[int, bool] | None:
        try:
            data = os.lseek(self.fd, at, os.SEEK_DATA)
            if data > at:
                return min(data, stop) - at, False
            hole = os.lseek(self.fd, at, os.SEEK_HOLE)
        except OverflowError:
            return None
        except OSError as error:
            # ENXIO: no data from here to the end, or the end is not even as far as here.
            here = min(stop, self.size) - at if error.errno == errno.ENXIO else 0
            return (here, False) if here > 0 else None
        return (min(hole, stop) - at, True) if hole > at else None

    def lock(self, writable: bool) -> str | None:
        return locks.acquire(self.fd, self.name, writable)

    def writer(self) -> str | None:
        return locks.probe(self.fd)

    def close(self) -> None:
        fd, self.fd = self.fd, _CLOSED
        if fd != _CLOSED:
            try:
                os.close(fd)
            except OSError as error:
                # NFS may write only now, and find no room.  The descriptor is gone all the same.
                raise StorageError.of(error, self.name, "close") from error

    def _too_far(self, doing: str) -> StorageError:
        return StorageError.of(OSError(errno.EFBIG, os.strerror(errno.EFBIG)), self.name, doing)


@functools.cache
def _libc_fallocate() -> Callable[[int, int, int, int], int]:
    # Python has posix_fallocate alone, which can neither zero nor punch.
    libc = ctypes.CDLL(None, use_errno=True)
    # Where off_t may be 32 bits the 64-bit call has a name of its own.
    call = libc.fallocate64 if hasattr(libc, "fallocate64") else libc.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    call.restype = ctypes.c_int
    return cast("Callable[[int, int, int, int], int]", call)


def _is_in_memory(fd: int) -> bool:
    """Whether the file system keeps its files in memory alone."""
    call = _libc_fstatfs()
    told = (ctypes.c_long * _STATFS_LONGS)()
    return call is not None and call(fd, told) == 0 and told[0] & 0xFFFFFFFF in _IN_MEMORY


@functools.cache
def _libc_fstatfs() -> Callable[[int, "ctypes.Array[ctypes.c_long]"], int] | None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "fstatfs"):
        return None
    call = libc.fstatfs
    call.argtypes = (ctypes.c_int, ctypes.c_void_p)
    call.restype = ctypes.c_int
    return cast('Callable[[int, "ctypes.Array[ctypes.c_long]"], int]', call)


@functools.cache
def _libc_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "sync_file_range"):
        return None
    call = libc.sync_file_range
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    call.restype = ctypes.c_int
    return cast("Callable[[int, int, int, int], int]", call)


@functools.cache
def raise_file_limit() -> None:
    """Let this process have as many files open as it may: a split image has hundreds of extents."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass  # as it was; more files than that are closed in between, see lent.py
