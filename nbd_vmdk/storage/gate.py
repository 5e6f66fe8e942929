"""The gate to the files of this machine: which of them an image may have.

The folder of the image that the user named is open to it, and those that the user allows besides.  Each
is pinned by a descriptor when the gate is made; from there a name is followed one component at a time,
every step relative to the descriptor of the last one and never through a symbolic link, which is read and
walked in the same way instead.  So no name is checked first and opened later: whoever swaps a file or a
folder for a link meanwhile is led through the same steps.

Outside the allowed folders nothing is looked at, not even whether it exists: there, names are only
compared.  A name (or a link) that leads outside and back in is therefore let through exactly where it
goes by an allowed folder as the user wrote it or as it is really called.
"""

import errno
import os
import shlex
import stat
from typing import Final
from weakref import WeakValueDictionary

from nbd_vmdk.errors import FileMissing, StorageError

#: As many links as Linux itself follows in one name.
_MAX_LINKS = 40

_FOLDER_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: O_NONBLOCK keeps a pipe that is put in a file's place at the last moment from hanging us.
_FILE_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

KINDS = {
    stat.S_IFDIR: "a folder, not a file",
    stat.S_IFIFO: "a pipe, not a file",
    stat.S_IFSOCK: "a socket, not a file",
    stat.S_IFCHR: "a character device, not a file",
    stat.S_IFBLK: "a block device",
}


class Refused(Exception):
    """What the gate says, before it is known whose name it was."""

    def __init__(self, why: str, hint: str | None = None) -> None:
        self.why = why
        self.hint = hint


class _Pin:
    """A folder that stays the same whatever happens to its name, for as long as anybody needs it."""

    fd = -1  # also of one whose making is interrupted before its first line

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


#: The pins that there are, by path and inode: a server with a thousand disks of one folder needs one.
_pins: Final[WeakValueDictionary[tuple[str, int, int], _Pin]] = WeakValueDictionary()


def _pin(path: str) -> _Pin:
    """A pin of the folder that is there now; OSError."""
    made = _Pin(path)
    there = os.fstat(made.fd)
    return _pins.setdefault((path, there.st_dev, there.st_ino), made)


class Gate:
    """What one image may have.

    image          the image as the user named it
    pins           the allowed folders by their real paths
    aliases        other absolute names that the user trusts: allowed folders as written, the image itself
                   where it is a symbolic link -> real path
    towards        every folder above one of those: the way there, on which nothing may be opened
    """

    def __init__(self, image: str, *, allow_devices: bool) -> None:
        self.image = image
        self.allow_devices = allow_devices
        self.pins: dict[str, _Pin] = {}
        self.aliases: dict[str, str] = {}
        self.towards: set[str] = {"/"}

    def allow(self, folder: str) -> str:
        """Open ``folder`` to the image; its real path."""
        try:
            real = os.path.realpath(folder)
            written = os.path.abspath(folder)
            if real not in self.pins:
                self.pins[real] = _pin(real)
        except FileNotFoundError as error:
            raise FileMissing(folder) from error
        except OSError as error:
            raise StorageError.of(error, folder, "open") from error
        self._lead_to(real)
        # `..` after a link is not what it seems, so a name with it is no second name for the folder.
        if os.pardir not in folder.split("/"):
            self._alias(written, real)
        return real

    def allow_image(self, folder: str, name: str) -> tuple[str, ...]:
        """Let the image itself be opened whatever links its name has; the real paths of its folders."""
        place = self.allow(folder)
        written = _join([*_parts(place), name])
        real = os.path.realpath(written)
        if real == written or name in ("", os.curdir, os.pardir):
            return (place,)
        self._alias(written, real)
        try:
            return (place, self.allow(os.path.dirname(real)))
        except FileMissing as error:
            raise FileMissing(self.image) from error

    def _alias(self, written: str, real: str) -> None:
        if written != real:
            self.aliases[written] = real
            self._lead_to(written)

    def _lead_to(self, path: str) -> None:
        while path != "/":
            path = os.path.dirname(path)
            self.towards.add(path)


class Walk:
    """The way along one name, from the root folder on.

    ``_here`` are the names of the folders we are in.  Inside an allowed folder ``_fds`` has the descriptors
    of it and of those below; outside it is empty.  Raises Refused, or OSError about what is inside.
    """

    def __init__(self, gate: Gate, place: str, name: str) -> None:
        self._gate = gate
        self._left = [*_parts(place), *_parts(name)][::-1]
        self._links = 0
        self._here: list[str] = []
        self._fds: list[int] = []
        self._go_to_root()

    def find_folder(self) -> str:
        """Go to the folder of the name's last component; its real path."""
        while len(self._left) > 1:
            self._step(self._left.pop())
        if not self._fds:
            raise self._outside([])
        return _join(self._here)

    def find_file(self) -> str:
        """Go to the folder that really holds what the name leads to; its real path."""
        self._last()
        return _join(self._here)

    def open_file(self, access: int) -> tuple[int, bool]:
        """Open what the name leads to; its descriptor, and whether it is a device."""
        while True:
            last = self._last()
            try:
                fd = os.open(last, access | _FILE_FLAGS, dir_fd=self._fds[-1])
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                self._left.append(last)  # it has become a link since we looked
                self._count_link()
                continue
            try:
                mode = os.fstat(fd).st_mode
                self._check_kind(mode)
                os.set_blocking(fd, True)
            except BaseException:
                os.close(fd)
                raise
            return fd, stat.S_ISBLK(mode)

    def list_folder(self) -> list[str]:
        """What the folder holds that the walk leads to."""
        self._left.insert(0, os.curdir)  # where find_folder expects a file's name
        self.find_folder()
        fd = os.open(os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fds[-1])
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of the folders on the way."""
        while len(self._fds) > 1:  # the first is the pin's
            os.close(self._fds.pop())
        self._fds.clear()

    def _last(self) -> str:
        """Go on until the name of something that is neither a link nor to be opened as a folder."""
        while self._left:
            part = self._left.pop()
            if self._left or not self._fds or part == os.pardir or self._path(part) in self._gate.aliases:
                self._step(part)
                continue
            # Looked at before it is opened: opening a tape or a watchdog already does something.
            mode = os.stat(part, dir_fd=self._fds[-1], follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                self._follow(part)
                continue
            self._check_kind(mode)
            return part
        raise self._outside([]) if not self._fds else Refused(KINDS[stat.S_IFDIR])

    def _step(self, part: str) -> None:
        """Go into the folder ``part``, or up."""
        if part == os.pardir:
            self._up()
            return
        path = self._path(part)
        if path in self._gate.aliases:
            self._count_link()
            self._go_to_root()
            self._left.extend(_parts(self._gate.aliases[path])[::-1])
        elif self._fds:
            self._down(part)
        else:
            if path in self._gate.pins:
                self._fds.append(self._gate.pins[path].fd)
            elif path not in self._gate.towards:
                raise self._outside([part])
            self._here.append(part)

    def _up(self) -> None:
        if len(self._fds) > 1:
            os.close(self._fds.pop())
        elif self._here:
            self._fds.clear()
        if self._here:
            self._here.pop()
        if not self._here:
            self._go_to_root()

    def _down(self, part: str) -> None:
        try:
            self._fds.append(os.open(part, _FOLDER_FLAGS, dir_fd=self._fds[-1]))
        except NotADirectoryError:
            # A link, or a file in a folder's place: readlink knows.
            self._follow(part)
        else:
            self._here.append(part)

    def _follow(self, part: str) -> None:
        try:
            target = os.readlink(part, dir_fd=self._fds[-1])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
        self._count_link()
        if target.startswith("/"):
            self._go_to_root()
        self._left.extend(_parts(target)[::-1])

    def _go_to_root(self) -> None:
        self.close()
        self._here.clear()
        if "/" in self._gate.pins:
            self._fds.append(self._gate.pins["/"].fd)

    def _count_link(self) -> None:
        self._links += 1
        if self._links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))

    def _path(self, part: str) -> str:
        return _join([*self._here, part])

    def _check_kind(self, mode: int) -> None:
        if stat.S_ISREG(mode) or (stat.S_ISBLK(mode) and self._gate.allow_devices):
            return
        hint = "to let images use devices in allowed folders, add --allow-devices"
        raise Refused(KINDS.get(stat.S_IFMT(mode), "not a file"), hint if stat.S_ISBLK(mode) else None)

    def _outside(self, parts: list[str]) -> Refused:
        # Worked out from the names alone, so it says nothing of what is really there.
        wanted = os.path.normpath(_join([*self._here, *parts, *self._left[::-1]]))
        folder = shlex.quote(plain(os.path.dirname(wanted)))
        return Refused("outside the image's folder", f"to let the image use it, add --allow-dir {folder}")


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", os.curdir)]


def _join(parts: list[str]) -> str:
    return "/" + "/".join(parts)


def plain(name: str) -> str:
    """A name for a message: control characters of an untrusted one must not reach a terminal."""
    return name if name.isprintable() else ascii(name)
