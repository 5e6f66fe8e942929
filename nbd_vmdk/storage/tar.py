"""A virtual appliance in one file (OVA): an uncompressed tar archive, read in place.

A member is a contiguous range of the archive, so a disk is served from there and nothing is unpacked.  The
standard library decodes each 512-byte header; the way from one header to the next is ours, because an
archive is untrusted input and ``tarfile`` reads extension headers whole, and recursively.

Sparse members, which no appliance has, are refused.  Links, devices and folders are passed over, so no name
leads to them.
"""

# ruff: noqa: D102  the contract is in folder.py

import os
import tarfile
from collections.abc import Callable
from typing import NamedTuple

from nbd_vmdk.errors import FileMissing, FormatError, NotVmdk, Truncated, Unsupported, WriteRefused
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.window import Window
from nbd_vmdk.units import MIB, SECTOR, align_up

_AGAIN = "the archive is damaged: get it again"
_CUT = "the archive was cut off, perhaps by an interrupted copy or download: get it again"
#: Headers of all kinds.  An appliance has a dozen; reading as many as this takes a quarter of a second.
_MAX_HEADERS = 10_000

#: Bytes of extension headers in a whole archive: each holds a long name or a few numbers.
_MAX_EXTENSIONS = 8 * MIB

_PAX = frozenset({tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE})
#: Extensions that say nothing about where a file's bytes are: a link's long target, defaults for all.
_PASSED_OVER = frozenset({tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE})
_FILES = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
#: Whatever their size field says, nothing follows their header.
_NO_DATA = frozenset(
    {
        tarfile.LNKTYPE,
        tarfile.SYMTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
    }
)


class Member(NamedTuple):
    """A file in the archive: its name there, normalised, and its bytes."""

    name: str
    offset: int
    size: int


class TarFolder(Folder):
    """The files of an archive, or those below a folder in it.

    ``members`` are all of them, in the archive's order.  Each is opened with an opening of the archive of
    its own, by ``reopen``, and so lives and is locked by itself.
    """

    read_only = "a disk inside an archive is served read-only"

    def __init__(
        self,
        reopen: Callable[[], Storage],
        file: str,
        members: tuple[Member, ...],
        below: str = "",
    ) -> None:
        self.name = f"{file}/{below}".rstrip("/")
        self.members = members
        self._reopen = reopen
        self._file = file
        self._below = below
        self._found = {member.name: member for member in members}  # the last of a name counts

    def open(self, name: str, *, writable: bool = False, extent: bool = False) -> Storage:  # noqa: ARG002
        member = self._found.get(_resolve(self._below, name) or "")
        if member is None:
            raise FileMissing(self.label(name))
        if writable:
            raise WriteRefused(
                self.label(name),
                why="a file in an archive can't be written: its manifest would no longer fit",
                hint="to serve it without writing, add -r; to write, unpack the archive first",
            )
        return Window(self._reopen(), member.offset, member.size, self.label(name))

    def folder_of(self, name: str) -> "TarFolder":
        place = _resolve(self._below, name)
        if place is None:
            raise FileMissing(self.label(name))
        return TarFolder(self._reopen, self._file, self.members, place.rpartition("/")[0])

    def names(self) -> list[str]:
        start = f"{self._below}/" if self._below else ""
        return sorted(name[len(start) :] for name in self._found if name.startswith(start))


def tar_in(folder: Folder, name: str) -> TarFolder:
    """The archive ``name`` of ``folder``, opened anew for each of its members; errors as list_members."""
    storage = folder.open(name)
    try:
        file, identity, size = storage.name, storage.identity, storage.size
        members = list_members(storage, file)
    finally:
        storage.close()

    def reopen() -> Storage:
        again = folder.open(name)
        if (again.identity, again.size) != (identity, size):
            again.close()
            raise NotVmdk(file, what="it was replaced while it was being opened", hint="do it again")
        return again

    return TarFolder(reopen, file, members)


def list_members(storage: Storage, file: str) -> tuple[Member, ...]:
    """The files in the archive ``storage``, called ``file`` in messages, in its order.

    Raises FormatError for what is no sound archive, Truncated where it is cut off, Unsupported for sparse
    members.
    """
    members: list[Member] = []
    budget = _MAX_EXTENSIONS
    extra: dict[str, bytes] = {}
    at = 0
    for _ in range(_MAX_HEADERS):
        header = _header(storage, file, at)
        if header is None:
            return tuple(members)
        at += SECTOR
        size = 0 if header.type in _NO_DATA else header.size
        if "size" in extra and header.type in _FILES:
            size = _number(file, extra["size"])
        if size < 0:
            raise FormatError(file, why=f"an archive's member of {size} bytes", hint=_AGAIN)
        if at + size > storage.size:
            raise Truncated(
                file, what=f"its member {header.name!a}", need=at + size, have=storage.size, hint=_CUT
            )
        if header.type in _PAX or header.type == tarfile.GNUTYPE_LONGNAME:
            budget -= size
            if budget < 0:
                raise FormatError(file, why="an archive with far too long extension headers", hint=_AGAIN)
            body = storage.read(at, size)
            extra |= _pax(file, body) if header.type in _PAX else {"path": body.partition(b"\0")[0]}
        elif header.type not in _PASSED_OVER:
            if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extra):
                raise Unsupported(
                    file,
                    what=f"the archive's member {header.name!a} is stored as sparse",
                    hint="unpack the archive with tar, and name what was in it",
                )
            name = _normal(os.fsdecode(extra.get("path", b"")) or header.name)
            if header.type in _FILES and name:
                members.append(Member(name, at, size))
            extra = {}
        at += align_up(size, SECTOR)
    raise FormatError(file, why=f"an archive with more than {_MAX_HEADERS} headers", hint=_AGAIN)


def _header(storage: Storage, file: str, at: int) -> tarfile.TarInfo | None:
    """The header at ``at``; None at the archive's end, with or without the zeros that should mark it."""
    if at >= storage.size:
        return None
    if at + SECTOR > storage.size:
        raise Truncated(file, what="an archive's header", need=at + SECTOR, have=storage.size, hint=_CUT)
    block = storage.read(at, SECTOR)
    if not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise FormatError(file, why=f"no archive header at byte {at}: {error}", hint=_AGAIN) from error


def _pax(file: str, body: bytes) -> dict[str, bytes]:
    """The records of a pax extension that matter here: "LENGTH KEY=VALUE", a line feed; LENGTH counts all."""
    records = {}
    at = 0
    while at < len(body) and body[at]:
        digits = body[at : at + 20].partition(b" ")[0]
        end = at + _number(file, digits)
        key, equals, value = body[at + len(digits) + 1 : end].partition(b"=")
        if end > len(body) or not equals or not value.endswith(b"\n"):
            raise FormatError(file, why="an archive's extension header that can't be understood", hint=_AGAIN)
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):  # others could be a million
            records[key.decode("utf-8", "replace")] = value[:-1]
        at = end
    return records


def _number(file: str, digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise FormatError(file, why=f"{digits[:40]!a} in an archive, where a number is expected", hint=_AGAIN)
    return int(digits)


def _normal(name: str) -> str | None:
    """A member's name without ``./``; None for one that claims a place outside the archive."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        return None
    return "/".join(part for part in parts if part not in ("", "."))


def _resolve(below: str, name: str) -> str | None:
    """The member that ``name`` means in the folder ``below``; None for what can't be one."""
    if name.startswith("/") or name.endswith("/"):
        return None
    here = below.split("/") if below else []
    for part in name.split("/"):
        if part == "..":
            if not here:
                return None
            here.pop()
        elif part not in ("", "."):
            here.append(part)
    return "/".join(here)
