"""Files of this machine that an image names, opened through its gate."""

# ruff: noqa: D102  the contract is in folder.py

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager

from nbd_vmdk.errors import FileMissing, OptionError, StorageError, TrustError, VmdkError
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.gate import KINDS, Gate, Refused, Walk, plain
from nbd_vmdk.storage.lent import LentFile, must_lend
from nbd_vmdk.storage.local import LocalFile, raise_file_limit

#: Longest name taken, in bytes: PATH_MAX, beyond which no call would take it either.
_MAX_NAME = 4096


class LocalFolder(Folder):
    """A folder of this machine, seen through the gate of one image.

    Relative names are looked for in each of ``places`` (real paths): a file that the user named by a
    symbolic link has its companions beside the link or beside the file.  What is opened for reading does not
    keep its descriptor where few are left (lent.py).
    """

    def __init__(self, name: str, places: tuple[str, ...], gate: Gate) -> None:
        self.name = name
        self._places = places
        self._gate = gate

    @classmethod
    def for_image(
        cls,
        path: str | os.PathLike[str],
        allow_dirs: Iterable[str | os.PathLike[str]] = (),
        allow_devices: bool = False,
    ) -> tuple["LocalFolder", str]:
        """The folder of the image that the user named, and the image's plain name to open there.

        The user's word is trusted: the image may be a symbolic link, whose folder and whose target's folder
        are then both open to it.  Raises FileMissing or StorageError for a folder that can't be had, and
        OptionError for a name that can't be one.
        """
        raise_file_limit()
        image = os.fspath(path)
        allowed = tuple(os.fspath(folder) for folder in allow_dirs)
        for word in (image, *allowed):
            if _bytes(word) is None or not word:
                # The Python in nbdkit does not go over to UTF-8 in the locale C, as the program does.
                is_foreign = word and "\0" not in word
                hint = "the locale has no such characters: set LC_ALL=C.UTF-8" if is_foreign else None
                raise OptionError(None, why=f"{word!r} is no file name", hint=hint)
        folder, name = os.path.split(image.rstrip("/"))
        gate = Gate(image, allow_devices=allow_devices)
        places = gate.allow_image(folder or (os.curdir if name else "/"), name)
        for other in allowed:
            gate.allow(other)
        made = cls(folder or os.curdir, places, gate)
        gate.image = made.label(name) or image
        return made, name

    @classmethod
    def for_folder(
        cls,
        path: str | os.PathLike[str],
        allow_dirs: Iterable[str | os.PathLike[str]] = (),
        allow_devices: bool = False,
    ) -> "LocalFolder":
        """A folder that the user named, whose files are open to each other; raises as for_image does."""
        made, _ = cls.for_image(os.path.join(path, os.curdir), allow_dirs, allow_devices)
        made._gate.image = os.fspath(path)  # noqa: SLF001  what messages name; without the dot
        return made

    def label(self, name: str) -> str:
        return name if self.name == os.curdir else os.path.join(self.name, name)

    def open(self, name: str, *, writable: bool = False, extent: bool = False) -> LocalFile | LentFile:
        self._check(name)
        *others, last = self._places_for(name)
        refused: TrustError | None = None
        for place in others:
            try:
                return self._open_in(place, name, writable, extent)
            except FileMissing:
                continue
            except TrustError as error:
                refused = refused or error
        try:
            return self._open_in(last, name, writable, extent)
        except FileMissing:
            if refused is not None:
                raise refused from None  # it is there, in the other place
            raise

    def folder_of(self, name: str) -> "LocalFolder":
        self._check(name)
        *others, last = self._places_for(name)
        found: list[str] = []
        for place in others:
            try:
                found += self._holding(place, name)
            except (FileMissing, TrustError):
                continue
        try:
            found += self._holding(last, name)
        except (FileMissing, TrustError):
            if not found:
                raise
        return LocalFolder(
            os.path.dirname(self.label(name)) or os.curdir, tuple(dict.fromkeys(found)), self._gate
        )

    def names(self) -> list[str]:
        found: set[str] = set()
        for place in self._places:
            with self._told(os.curdir, "list"), closing(Walk(self._gate, place, "")) as walk:
                found.update(walk.list_folder())
        return sorted(found)

    def _open_in(self, place: str, name: str, writable: bool, extent: bool) -> LocalFile | LentFile:
        file = self._open_file(place, name, writable)
        if writable or file.is_device or not must_lend(file.fd, extent=extent):
            return file
        return LentFile(file, lambda: self._open_file(place, name, writable=False))

    def _open_file(self, place: str, name: str, writable: bool) -> LocalFile:
        doing, access = ("open for writing", os.O_RDWR) if writable else ("open", os.O_RDONLY)
        with self._told(name, doing), closing(Walk(self._gate, place, name)) as walk:
            fd, is_device = walk.open_file(access)
            return LocalFile(fd, self.label(name), writable=writable, is_device=is_device)

    def _holding(self, place: str, name: str) -> list[str]:
        """The real path of the folder with ``name`` in it, and where that is a link, of its file's folder."""
        with self._told(name, "open"), closing(Walk(self._gate, place, name)) as walk:
            found = [walk.find_folder()]
        try:
            with self._told(name, "open"), closing(Walk(self._gate, place, name)) as walk:
                found.append(walk.find_file())
        except VmdkError:
            pass  # no such file, or none that may be had: opening it will tell
        return found

    def _places_for(self, name: str) -> tuple[str, ...]:
        return ("/",) if name.startswith("/") else self._places

    def _check(self, name: str) -> None:
        """Refuse what can't be a file's name, without looking at any file."""
        raw = _bytes(name)
        if raw is None or len(raw) > _MAX_NAME:
            raise self._refusal(name, "not a file name")
        if not name or name.endswith("/") or name.rpartition("/")[2] in (".", ".."):
            raise self._refusal(name, KINDS[stat.S_IFDIR])

    @contextmanager
    def _told(self, name: str, doing: str) -> Iterator[None]:
        """Turn what a walk meets into errors of ours about ``name``."""
        label = self.name if name == os.curdir else self.label(name)
        try:
            yield
        except Refused as error:
            raise self._refusal(name, error.why, error.hint) from None
        except FileNotFoundError as error:
            raise FileMissing(label) from error
        except OSError as error:
            raise StorageError.of(error, label, doing) from error

    def _refusal(self, name: str, why: str, hint: str | None = None) -> TrustError:
        # The image that the user named is to blame, unless it is itself what can't be opened.
        image = None if self.label(name) == self._gate.image else self._gate.image
        if hint is None:
            hint = (
                "name a file that holds a disk, or the folder of a machine that has one"
                if image is None
                else "what names that is wrong, or was tampered with: get the image again, or mend its text"
            )
        return TrustError(image, name=plain(name if image else self._gate.image) or "''", why=why, hint=hint)


def _bytes(name: str) -> bytes | None:
    """The name as the kernel would get it; None if it can't."""
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:
        return None
    return None if b"\0" in raw else raw
