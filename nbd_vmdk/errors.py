"""Everything that can go wrong, one class a cause.

The text lives on the class; a call site hands over the file and the fields, not a sentence::

    VmdkError
    ├── FormatError           the bytes can't be what they claim                     EIO
    │   ├── NotVmdk           the file is something else, or not the right file
    │   ├── BadField          a header field or table entry has an impossible value
    │   ├── BadDescriptor     a line of the descriptor can't be understood
    │   ├── Truncated         the file ends before what it must hold
    │   └── Unreadable        guest data that is lost, or that access NOACCESS hides
    ├── Unsupported           understood, and not served                             EIO
    ├── ChainError            the links do not make one disk                         EIO
    │   ├── ParentNotFound
    │   ├── ContentIdMismatch
    │   └── ChainTooDeep      a loop, or too many links
    ├── TrustError            a file that the image names, and may not have          EPERM
    ├── StorageError          the operating system said no                           its errno
    │   ├── FileMissing
    │   ├── FileExists        a new file would take the place of another
    │   ├── FileChanged       a file is not the one any more that was opened
    │   └── Latched           an earlier sync failed: nothing is promised any more   EIO
    ├── InUse                 another process holds the image                        EIO, exit 5
    ├── WriteRefused          writing here would break something, or is not possible EPERM
    ├── OutOfRange            a request beyond the disk's end                        EINVAL
    │   └── InputTooLong      more to be written than there is room for
    ├── InputTooShort         less to be written than was said                       EIO
    ├── Closed                a disk that is used after it was closed                EIO
    ├── NotFast               a zero that would not be faster than writing           ENOTSUP
    ├── Difference            two disks that should be equal are not                 EIO, exit 3
    ├── ServerError           nbdkit could not be started, or ended unasked          EIO
    ├── DeviceError           a device or a mount can't be made, or taken away       EIO
    ├── NbdError              an NBD server said no, or the connection to it is lost the server's
    └── OptionError           what the user asked for makes no sense                 EINVAL, exit 2

``str(error)`` is one line, ``FILE: what is wrong``; ``error.hint`` is what to do, or None.  IMAGE in it is
the disk, of which the file may be only a part; who opens the disk puts its name there.  ``errno`` is
what an NBD client may be told: nbdkit 1.32 passes on EPERM, EIO, ENOMEM, EINVAL, ENOSPC, ENOTSUP and
ESHUTDOWN, and turns the rest into EINVAL, so only those appear.  ``slug`` is a stable name for programs.
"""

import errno as _errno
import os
import re
from typing import ClassVar, Self

#: errno values that reach an NBD client as themselves; everything else becomes EIO.
_PASSED = {
    _errno.EPERM: _errno.EPERM,
    _errno.EROFS: _errno.EPERM,
    _errno.EACCES: _errno.EPERM,
    _errno.ENOMEM: _errno.ENOMEM,
    _errno.ENOSPC: _errno.ENOSPC,
    _errno.EDQUOT: _errno.ENOSPC,
    _errno.EFBIG: _errno.ENOSPC,
}


#: The hint for what may be damage, and may be of a product that came later.
NEWER = "if it is not damaged it is newer than this program: let the product that made it export the disk"

#: What a terminal or a log would obey, or that breaks a line; names in images may hold it.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """``text`` on one line and without anything that a terminal or a log would obey."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class VmdkError(Exception):
    """Base of all errors this package raises on purpose.

    ``file`` is the file concerned, as the user would know it, or None.  The other fields fill the class's
    ``template`` and ``hint_template``; an explicit ``hint`` replaces the latter.  In the text control
    characters are shown as escapes.
    """

    slug: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    template: ClassVar[str] = "{why}"
    hint_template: ClassVar[str | None] = None
    errno: int = _errno.EIO

    def __init__(
        self, file: str | os.PathLike[str] | None, /, *, hint: str | None = None, **fields: object
    ) -> None:
        self.file = None if file is None else os.fspath(file)
        self.fields = fields
        self.message = printable(self.template.format_map(fields))
        self.hint = hint
        if hint is None and self.hint_template is not None:
            self.hint = self.hint_template.format_map(fields | {"file": self.file})
        if self.hint is not None:
            self.hint = printable(self.hint)
        super().__init__(self.message if self.file is None else f"{printable(self.file)}: {self.message}")

    def kept(self) -> Self:
        """This error without the way that it came, for who keeps it and goes on.

        The frames on that way are those of who keeps it, too: a circle, in which what they have stays open.
        """
        self.__traceback__ = self.__context__ = self.__cause__ = None
        return self

    def as_dict(self) -> dict[str, object]:
        """The error for ``--json``: slug, file, message, hint."""
        return {
            "error": self.slug,
            "file": self.file,
            "message": self.message,
            "hint": self.hint,
        }


class FormatError(VmdkError):
    """The bytes can't be what they claim to be.  Fields: why."""

    slug = "bad-format"


class NotVmdk(FormatError):
    """The file is something else, or it is not the file to open.  Fields: what."""

    slug = "not-vmdk"
    template = "{what}"


class BadField(FormatError):
    """A header field or a table entry has an impossible value.  Fields: field, value, why."""

    slug = "bad-field"
    template = "{field} is {value}: {why}"
    hint_template = "nbd-vmdk check IMAGE tells all that is damaged, nbd-vmdk repair IMAGE what can be mended"


class BadDescriptor(FormatError):
    """A line of the descriptor can't be understood.  Fields: line (number from 1), why."""

    slug = "bad-descriptor"
    template = "descriptor line {line}: {why}"
    hint_template = "it is a text: mend the line by hand, or get the file again"


class Truncated(FormatError):
    """The file ends before what it must hold.  Fields: what, need (bytes), have (bytes)."""

    slug = "truncated"
    template = "the file ends too early for {what}: {need} bytes needed, {have} there"
    hint_template = (
        "the file was cut off, perhaps by an interrupted copy or download: get it again; "
        "nbd-vmdk check IMAGE tells what is lost, nbd-vmdk repair IMAGE what can be mended"
    )


class Unreadable(FormatError):
    """Guest data that can't be had.  Fields: offset (guest, bytes), length, why."""

    slug = "unreadable"
    template = "guest bytes {offset}+{length} can't be read: {why}"


class Unsupported(VmdkError):
    """Understood, and not served.  Fields: what."""

    slug = "unsupported"
    template = "{what}"


class ChainError(VmdkError):
    """The links do not make one disk.  Fields: why."""

    slug = "chain"


class ParentNotFound(ChainError):
    """The parent that a child link needs is nowhere.  Fields: parent (as the child names it), cid."""

    slug = "parent-not-found"
    template = "its parent {parent} (content ID {cid}) was not found"
    hint_template = "put the parent beside it, or name it with --parent FILE"


class ContentIdMismatch(ChainError):
    """The parent was changed after the child was made.  Fields: parent, expected, found."""

    slug = "cid-mismatch"
    template = "expects parent content ID {expected}, but {parent} has {found}"
    hint_template = (
        "{parent} was written after this snapshot was taken, or is another disk; "
        "to look all the same, add --ignore-cid"
    )


class ChainTooDeep(ChainError):
    """A loop in the chain, or more links than any product makes.  Fields: why."""

    slug = "chain-too-deep"
    hint_template = "a parent is misnamed in one of the descriptors: parentFileNameHint"


class TrustError(VmdkError):
    """A file that the image names and may not have.  Fields: name, why."""

    slug = "not-trusted"
    errno = _errno.EPERM
    template = "{name}: {why}"


#: What is done where reading alone is wanted.
_READING = ("open", "read", "list", "look at", "open, to see whether it is in use,")


def _what_to_do(number: int | None, doing: str) -> str | None:
    """The hint for this errno, met while ``doing`` something; None where nothing always helps."""
    match number, doing:
        case (_errno.EACCES | _errno.EPERM | _errno.EROFS, "open for writing"):
            return "to serve it without writing, add -r"
        case (_errno.EACCES, word) if word in _READING:
            return "do it as a user who may read it, or let its owner change that with chmod"
        case (_errno.EACCES, "listen"):
            return "ports below 1024 are root's: choose another"
        case (_errno.ENOENT, "make a socket"):
            return "make its folder first"
        case (_errno.ENOSPC | _errno.EDQUOT, _):
            return "make room in that file system, and do the same again"
        case (_errno.EMFILE, _):
            more = "let it have more files open: ulimit -n, or LimitNOFILE= in a unit"
            return f"{more}; to serve it without writing, add -r" if doing == "open for writing" else more
        case (_errno.EACCES | _errno.EPERM, _):
            return "do it as a user who may write to that folder, or choose another one"
        case (_errno.EROFS, _):
            return "its file system is there for reading only: choose another folder"
        case (_errno.ENAMETOOLONG, _):
            return "choose a shorter name: 255 bytes is what file systems take"
        case (_errno.ENOTDIR, _):
            return "what its name has as a folder is a file: is there a word too much in it?"
        case (_errno.EISDIR, _):
            return "that is a folder: name a file"
        case (_errno.ELOOP, _):
            return "symbolic links lead to each other there: name the file that is meant"
    return None


class StorageError(VmdkError):
    """The operating system refused.  Fields: doing.  Built with :meth:`of` from an OSError."""

    slug = "storage"
    template = "{doing}: {why}"

    @classmethod
    def of(cls, error: OSError, file: str | None, doing: str) -> "StorageError":
        """The error for an OSError met while ``doing`` something to ``file``."""
        made = cls(file, doing=doing, why=error.strerror or str(error))
        made.errno = _PASSED.get(error.errno or _errno.EIO, _errno.EIO)
        made.hint = _what_to_do(error.errno, doing)
        return made


class FileMissing(StorageError):
    """A file that is needed is not there.  Fields: none."""

    slug = "file-missing"
    template = "no such file"


class FileExists(StorageError):
    """A file is where a new one should be.  Fields: none."""

    slug = "file-exists"
    errno = _errno.EPERM
    template = "it is there already, and nothing is overwritten"
    hint_template = "choose another name, or move it away first"


class FileChanged(StorageError):
    """A file is not what it was when it was opened.  Fields: why."""

    slug = "file-changed"
    template = "since it was opened it has changed: {why}"
    hint_template = (
        "put it back as it was, or open the disk again; "
        "it would have stayed open if more files might be open at once: ulimit -n"
    )


class Latched(StorageError):
    """A sync failed earlier, so nothing can be promised any more.  Fields: first (that error)."""

    slug = "latched"
    template = "an earlier sync failed ({first}); writing stops until the image is opened again"


class InUse(VmdkError):
    """Another process has the image.  Fields: how."""

    slug = "in-use"
    exit_code = 5
    template = "in use by another process ({how})"
    hint_template = "stop the other user, or read it as it is with -r"


class WriteRefused(VmdkError):
    """Writing here is not possible, or would break something else.  Fields: why."""

    slug = "write-refused"
    errno = _errno.EPERM


class OutOfRange(VmdkError):
    """A request beyond the end of the disk.  Fields: offset, length, size."""

    slug = "out-of-range"
    errno = _errno.EINVAL
    template = "request of {length} bytes at {offset} is outside the disk of {size} bytes"


class InputTooLong(OutOfRange):
    """What is to be written does not end where the disk does.  Fields: got (bytes written), size."""

    slug = "input-too-long"
    template = "the input goes on where the disk ends, at {size} bytes: {got} bytes were written, and no more"


class InputTooShort(VmdkError):
    """What is to be written ends before the length that was asked for.  Fields: got (written), length."""

    slug = "input-too-short"
    template = "the input ended after {got} of {length} bytes, which were written"


class Closed(VmdkError):
    """A disk is used that has been closed.  Fields: none."""

    slug = "closed"
    template = "it is closed"


class NotFast(VmdkError):
    """Zeroing this range would be no faster than writing it.  Fields: none."""

    slug = "not-fast"
    errno = _errno.ENOTSUP
    template = "zeroing would not be fast"


class Difference(VmdkError):
    """A copy that does not have the bytes of its source.  Fields: offset (guest, bytes)."""

    slug = "differs"
    exit_code = 3
    template = "differs from its source at byte {offset}"


class ServerError(VmdkError):
    """The server could not be started, did not answer, or ended without being asked.  Fields: why."""

    slug = "server"


class DeviceError(VmdkError):
    """A block device or a mount that could not be made or taken away.  Fields: why."""

    slug = "device"


class NbdError(VmdkError):
    """An NBD server said no, or can't be reached, or the connection to it was lost.  Fields: why.

    ``file`` is the URI.  ``errno`` is what the server said, ENOTCONN once the connection is lost.
    """

    slug = "nbd"

    @classmethod
    def of(cls, uri: str, why: str, number: int, hint: str | None = None) -> "NbdError":
        """The error with this ``errno``; EIO if there is none."""
        made = cls(uri, why=why, hint=hint)
        made.errno = number or _errno.EIO
        return made


class OptionError(VmdkError):
    """What the user asked for makes no sense.  Fields: why."""

    slug = "usage"
    errno = _errno.EINVAL
    exit_code = 2
