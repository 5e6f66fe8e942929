"""Keeping two processes from writing one image, in a way that QEMU understands.

QEMU (block/file-posix.c) marks what it does to a file by shared locks on single bytes far apart from any
data: byte 100+i says "I use permission i", byte 200+i "I don't want others to use permission i", with
i = 0 consistent read, 1 write, 2 write unchanged data, 3 resize.  Since all locks are shared, taking one
never fails; a holder takes its bytes first and then asks whether somebody else holds an opposing byte.  Two
that start at the same time may so both give way, but never both go on.

These are open-file-description locks: they belong to the descriptor, not to the process, so closing
another descriptor of the same file does not drop them, and they live on in a forked server.

VMware's products do not know them; they put a file or folder NAME.lck beside the disk instead.
"""

import errno
import fcntl
import struct

from nbd_vmdk.errors import FileMissing, InUse, StorageError, TrustError
from nbd_vmdk.storage.folder import Folder

_USES = 100
_UNSHARED = 200
_READ, _WRITE, _RESIZE = 0, 1, 3

_WRITER = (_USES + _READ, _USES + _WRITE, _USES + _RESIZE, _UNSHARED + _WRITE, _UNSHARED + _RESIZE)
_READER = (_USES + _READ, _UNSHARED + _WRITE)

#: What the holder of a byte is doing; the order is that of asking, so that a writer is called a writer
#: although it too does not want others to write.
_DOING = {
    _USES + _WRITE: "writing it",
    _USES + _RESIZE: "resizing it",
    _UNSHARED + _WRITE: "reading it and relying on it not to change",
    _UNSHARED + _RESIZE: "relying on its size",
    _UNSHARED + _READ: "changing it, so that nobody can read it",
}

#: fcntl's answers where the file system, or the kernel, has no such locks.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})

#: struct flock: type, whence, start, length, pid (and padding to its alignment).
_FLOCK = struct.Struct("hhqqi0q")


def acquire(fd: int, name: str, writable: bool) -> str | None:
    """Mark ``fd`` as read or written by us; a warning for the user, or None.

    For a writer a conflict raises InUse.  A reader is only warned: the image of a running machine may
    be worth reading.  It then holds nothing, so as not to get in the way of that machine.  Raises
    StorageError where locking fails for another reason than being unknown to the file system.
    """
    wanted = _WRITER if writable else _READER
    try:
        how = _take(fd, wanted)
        if how is None:
            return None
        for byte in wanted:
            _set(fd, byte, fcntl.F_UNLCK)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return "its file system has no locks, so other processes can't be kept from changing it"
        raise StorageError.of(error, name, "lock") from error
    if writable:
        raise InUse(name, how=how)
    return f"another process is {how}; what is read may be inconsistent"


def probe(fd: int) -> str | None:
    """What a process that writes the file is doing ("writing it, pid 7"), or None; takes no lock."""
    try:
        return _holder(fd, (_USES + _WRITE, _USES + _RESIZE))
    except OSError:
        return None  # no locks here, so nobody can have said anything


def vmware_lock(folder: Folder, name: str) -> str | None:
    """What shows that a VMware product has the disk ``name`` open, or None.

    It makes a folder ``NAME.lck`` with a file for each user in it (a plain file in some versions), and
    takes them away at the end; an empty folder is a leftover.
    """
    lock = f"{name}.lck"
    try:
        users = folder.folder_of(f"{lock}/owner")
        try:
            held = bool(users.names())
        except StorageError as error:
            held = _number(error) == errno.EACCES  # it is there, and we may not list it
    except FileMissing:
        return None
    except TrustError:
        held = True  # a link to where we may not look
    except StorageError as error:
        # Where we may not look into the disk's own folder, nothing is known, and opening the disk will tell.
        held = _number(error) == errno.ENOTDIR
    return f"VMware's lock {lock} is there" if held else None


def _number(error: StorageError) -> int | None:
    return error.__cause__.errno if isinstance(error.__cause__, OSError) else None


def check_vmware_lock(folder: Folder, name: str, label: str) -> None:
    """Raise InUse, of ``label``, if a VMware product has the disk ``name`` open."""
    if held := vmware_lock(folder, name):
        hint = f"close the machine in VMware; if none runs, its host crashed, and {label}.lck can be removed"
        raise InUse(label, how=held, hint=hint)


def _take(fd: int, wanted: tuple[int, ...]) -> str | None:
    """Hold ``wanted``; what another holder that opposes is doing, or None."""
    for byte in wanted:
        try:
            _set(fd, byte, fcntl.F_RDLCK)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            # Not QEMU's way: somebody has locked the whole file for himself.
            return _holder(fd, (byte,)) or "locking it"
    opposed = {byte + _UNSHARED - _USES if byte < _UNSHARED else byte - _UNSHARED + _USES for byte in wanted}
    return _holder(fd, tuple(byte for byte in _DOING if byte in opposed))


def _holder(fd: int, asked: tuple[int, ...]) -> str | None:
    """What the first other holder found of a byte in ``asked`` is doing, or None."""
    for byte in asked:
        # An exclusive lock is asked about, never taken: any holder would stand in its way.
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
        kind, _, _, _, pid = _FLOCK.unpack(answer)
        if kind != fcntl.F_UNLCK:
            doing = "locking it" if kind == fcntl.F_WRLCK else _DOING.get(byte, "locking it")
            # A lock that belongs to a descriptor (as QEMU's and ours) has no process: -1.
            return f"{doing}, pid {pid}" if pid > 0 else doing
    return None


def _set(fd: int, byte: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, byte, 1, 0))
