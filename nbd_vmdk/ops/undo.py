"""The undo file of a repair: what the changed bytes were, and what they became.

It is written, and durable, before the first change, so whatever happens during a repair can be taken back.
It describes itself:

    one line of text     what this file is
    one line of JSON     the image, its files with their sizes before and after, the pieces that change
    bytes                for each piece in that order, the old bytes and then the new ones
    one line of text     the SHA-256 of all of the above

Taking back is refused unless every changed sector holds exactly what the repair wrote, or still what was
there before: then nobody has used the image since, and a repair that was interrupted is taken back as well.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from nbd_vmdk import __version__
from nbd_vmdk.errors import FileMissing, FormatError, StorageError, WriteRefused
from nbd_vmdk.ops.rewrite import sync_folder
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import MIB, SECTOR

_TITLE: Final = b"nbd-vmdk undo file: nbd-vmdk repair --undo IMAGE takes the repair back\n"
_SCHEMA: Final = 1
_DIGEST_LINE: Final = 65
_MAX_HEADER: Final = 64 * MIB


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of one file that changes: ``old`` bytes of it were there before, ``new`` are written."""

    at: int
    old: int
    new: int
    stage: int


@dataclass(slots=True)
class FileChange:
    """One file: its name as it is opened, its sizes, its pieces in ascending order."""

    name: str
    before: int
    after: int
    pieces: list[Piece] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The file for the header."""
        rows = [[piece.at, piece.old, piece.new, piece.stage] for piece in self.pieces]
        return {"name": self.name, "size-before": self.before, "size-after": self.after, "pieces": rows}


def undo_path(image: str | os.PathLike[str]) -> str:
    """Where the undo file of an image is."""
    return f"{os.fspath(image)}.undo"


def write_undo(
    path: str, image: str, repairs: Sequence[str], files: Sequence[FileChange], contents: Iterator[bytes]
) -> None:
    """Write an undo file and make it durable; ``contents`` are the bytes of all pieces, in order.

    Raises WriteRefused if there is one already, StorageError if it can't be written; then nothing is left.
    """
    header = {
        "schema": _SCHEMA,
        "version": __version__,
        "image": os.path.basename(image),
        "repairs": list(repairs),
        "files": [file.as_dict() for file in files],
    }
    if os.path.lexists(path):
        raise WriteRefused(
            path,
            why="the undo file of an earlier repair is there",
            hint="take that repair back with --undo, or move the file away to keep the repair",
        )
    digest = hashlib.sha256()
    half_done = f"{path}.tmp"
    try:
        _remove(half_done)
        fd = os.open(half_done, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb", buffering=MIB) as out:
                for data in _stream(header, contents):
                    digest.update(data)
                    out.write(data)
                out.write(digest.hexdigest().encode() + b"\n")
                out.flush()
                os.fsync(out.fileno())
            os.rename(half_done, path)
            sync_folder(os.path.dirname(path))
        except BaseException:
            _remove(half_done)
            raise
    except OSError as error:
        raise StorageError.of(error, path, "write the undo file") from error


def _stream(header: Mapping[str, Any], contents: Iterator[bytes]) -> Iterator[bytes]:
    yield _TITLE
    yield json.dumps(header, separators=(",", ":")).encode() + b"\n"
    yield from contents


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


class Undo:
    """An undo file that was read; a context manager.

    Raises FileMissing, StorageError, or FormatError if the file is not whole.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            hint = "only a repair that was applied leaves one"
            raise FileMissing(path, hint=hint) from error
        except OSError as error:
            raise StorageError.of(error, path, "open") from error
        try:
            self._read()
        except OSError as error:
            os.close(self._fd)
            raise StorageError.of(error, path, "read") from error
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _read(self) -> None:
        size = os.fstat(self._fd).st_size - _DIGEST_LINE
        digest = hashlib.sha256()
        for at in range(0, max(size, 0), MIB):
            digest.update(os.pread(self._fd, min(MIB, size - at), at))
        stored = os.pread(self._fd, _DIGEST_LINE, max(size, 0))
        head = os.pread(self._fd, min(max(size, 0), len(_TITLE) + _MAX_HEADER), 0)
        title, _, rest = head.partition(b"\n")
        if title + b"\n" != _TITLE or stored != digest.hexdigest().encode() + b"\n":
            raise FormatError(self.path, why="no whole undo file")
        line = rest.partition(b"\n")[0]
        try:
            header = json.loads(line)
            if header["schema"] != _SCHEMA:
                raise FormatError(
                    self.path, why=f"an undo file of schema {header['schema']}, which is not known"
                )
            self.repairs: list[str] = [str(text) for text in header["repairs"]]
            self.files = [_file(row) for row in header["files"]]
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(self.path, why="an undo file whose header can't be understood") from error
        self._at = len(_TITLE) + len(line) + 1
        if self._at + sum(piece.old + piece.new for file in self.files for piece in file.pieces) != size:
            raise FormatError(self.path, why="an undo file that contradicts itself")

    def pieces(self, file: FileChange) -> Iterator[tuple[Piece, bytes, bytes]]:
        """Every piece of a file with its old and its new bytes."""
        at = self._at
        for other in self.files:
            if other is file:
                break
            at += sum(piece.old + piece.new for piece in other.pieces)
        for piece in file.pieces:
            old = self._bytes(at, piece.old)
            yield piece, old, self._bytes(at + piece.old, piece.new)
            at += piece.old + piece.new

    def _bytes(self, at: int, length: int) -> bytes:
        try:
            data = os.pread(self._fd, length, at)
        except OSError as error:
            raise StorageError.of(error, self.path, "read") from error
        if len(data) != length:
            raise FormatError(self.path, why="an undo file that became shorter")
        return data

    def check(self, file: FileChange, storage: Storage) -> None:
        """Raise WriteRefused unless ``storage`` is as the repair left it, or as it was before."""
        size = storage.size
        if size not in (file.before, file.after):
            raise _changed(storage, "its size is another")
        for piece, old, new in self.pieces(file):
            length = min(len(new), size - piece.at)
            there = storage.read(piece.at, length) if length > 0 else b""
            at = 0
            while at < len(there):
                # Up to the end of a sector of the file: that is what a power cut leaves old or new.
                end = min(SECTOR - (piece.at + at) % SECTOR + at, len(there))
                if there[at:end] not in (new[at:end], old[at:end].ljust(end - at, b"\0")):
                    raise _changed(storage, f"the bytes at {piece.at + at} are others")
                at = end

    def restore(self, file: FileChange, storage: Storage) -> None:
        """Put the old bytes and the old size back."""
        for piece, old, _new in self.pieces(file):
            if old:
                storage.write(old, piece.at)
        if storage.size != file.before:
            storage.truncate(file.before)
        storage.sync()

    def remove(self) -> None:
        """Take the undo file away, once all is restored."""
        try:
            _remove(self.path)
            sync_folder(os.path.dirname(self.path))
        except OSError as error:
            raise StorageError.of(error, self.path, "remove") from error


def _changed(storage: Storage, how: str) -> WriteRefused:
    return WriteRefused(
        storage.name,
        why=f"it was changed since the repair ({how})",
        hint="the repair can no longer be taken back; the undo file still has the bytes that it replaced",
    )


def _file(row: Mapping[str, Any]) -> FileChange:
    pieces = [Piece(*(int(number) for number in piece)) for piece in row["pieces"]]
    file = FileChange(str(row["name"]), int(row["size-before"]), int(row["size-after"]), pieces)
    if any(
        min(piece.at, piece.old, piece.new) < 0 or piece.old > max(file.before - piece.at, 0)
        for piece in pieces
    ):
        raise ValueError("a piece is outside of its file")
    return file
