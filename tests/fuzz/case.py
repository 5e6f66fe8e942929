"""
Several sparse files as one short input, and changes to them that make sense.

An image of megabytes is mostly zeros, and a disk may be many files. A case keeps of each file its name, its
size and the pieces that are not zeros, so that what a fuzzer changes is nearly always a header, a table or a
descriptor. Reading a case never fails: whatever does not fit is cut off. The first file is the one to open.
"""

from __future__ import annotations

import os
import random
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

SECTOR = 512
MAX_FILES = 12
MAX_PIECES = 200
MAX_SIZE = 1 << 46

_FILE = struct.Struct("<BQH")  # length of the name, size, pieces
_PIECE = struct.Struct("<QI")  # offset, length
#: A piece goes on over gaps that its own head would not be shorter than.
_NOT_ZEROS = re.compile(rb"[^\0](?:[^\0]|\0{1,23}(?=[^\0]))*")
_INTEGERS = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}

#: Words of descriptors, to be put in each other's place.
WORDS = (
    *("RW", "RDONLY", "NOACCESS", "FLAT", "SPARSE", "ZERO", "VMFS", "VMFSSPARSE", "SESPARSE", "VMFSRDM"),
    *("VSANSPARSE", "version=1", "version=3", "CID=1", "CID=ffffffff", "CID=fffffffe", "parentCID=ffffffff"),
    *("parentCID=00000001", 'createType="custom"', 'createType="streamOptimized"', 'encoding="GBK"'),
    *('encoding="Shift_JIS"', 'encoding="UTF-8"', 'encoding="windows-1252"', 'ddb.encoding="Big5"'),
    *('parentFileNameHint="base.vmdk"', 'changeTrackPath="x-ctk.vmdk"', 'isNativeSnapshot="yes"'),
    *('ddb.adapterType="ide"', 'ddb.geometry.heads="99999999999999999999"', 'ddb.longContentID="0"'),
    *(
        'encryption.data="x"',
        "../x.vmdk",
        "./x.vmdk",
        "/etc/passwd",
        '""',
        "0",
        "1",
        "2",
        "127",
        "128",
        "129",
    ),
    *("4294967296", "18014398509481983", "36028797018963967", "18446744073709551616"),
)


@dataclass
class Piece:
    """Bytes at an offset of a file."""

    offset: int
    data: bytes


@dataclass
class File:
    """A file of a case; between the pieces there are zeros."""

    name: str
    size: int
    pieces: list[Piece] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, data: bytes) -> File:
        """A file that holds ``data``."""
        return cls(name, len(data), [Piece(m.start(), m[0]) for m in _NOT_ZEROS.finditer(data)])

    @classmethod
    def load(cls, path: str) -> File:
        """The file at ``path``."""
        with open(path, "rb") as file:
            return cls.of(os.path.basename(path), file.read())

    def write(self, folder: str) -> str | None:
        """Write it into ``folder``; its path, or None if it can't have such a name."""
        path = os.path.join(folder, self.name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except (OSError, ValueError):
            return None
        try:
            os.ftruncate(fd, self.size)
            for piece in self.pieces:
                inside = piece.data[: max(0, self.size - piece.offset)]
                if inside:
                    os.pwrite(fd, inside, piece.offset)
        finally:
            os.close(fd)
        return path


def encode(files: list[File]) -> bytes:
    """A case as bytes."""
    made = []
    for file in files[:MAX_FILES]:
        name = file.name.encode("latin-1", "replace")[:255]
        pieces = file.pieces[:MAX_PIECES]
        made += [_FILE.pack(len(name), file.size, len(pieces)), name]
        for piece in pieces:
            made += [_PIECE.pack(piece.offset, len(piece.data)), piece.data]
    return b"".join(made)


def decode(data: bytes) -> list[File]:
    """The files that ``data`` stands for."""
    files: list[File] = []
    at = 0
    while at + _FILE.size <= len(data) and len(files) < MAX_FILES:
        length, size, count = _FILE.unpack_from(data, at)
        at += _FILE.size
        file = File(_safe(data[at : at + length].decode("latin-1")), min(size, MAX_SIZE))
        at += length
        while at + _PIECE.size <= len(data) and len(file.pieces) < min(count, MAX_PIECES):
            offset, length = _PIECE.unpack_from(data, at)
            at += _PIECE.size
            file.pieces.append(Piece(min(offset, MAX_SIZE), data[at : at + length]))
            at += length
        files.append(file)
    return files


def _safe(name: str) -> str:
    name = name.replace("/", "_").replace("\0", "_")
    return "_" if name in ("", ".", "..") else name


def mutate(data: bytes, max_size: int, seed: int, plain: Callable[[bytes, int], bytes]) -> bytes:
    """Change a case; ``plain(data, max_size)`` is the fuzzer's own way to change bytes."""
    rng = random.Random(seed)
    files = decode(data)
    if not files or rng.random() < 0.02:
        return plain(data, max_size)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        file = rng.choice(files)
        if not file.pieces or rng.random() < 0.08:
            _change_files(rng, files, file)
        elif rng.random() < 0.08:
            _change_size(rng, file)
        else:
            _change_piece(rng, files, file, plain)
    made = encode(files)
    return made if len(made) <= max_size else plain(data, max_size)


def _change_files(rng: random.Random, files: list[File], file: File) -> None:
    match rng.randrange(6):
        case 0 if len(files) > 1:
            files.remove(file)
        case 1:
            files.append(
                File(rng.choice((file.name, "x.vmdk", f"{file.name}.lck")), file.size, file.pieces[:])
            )
        case 2:
            file.name = rng.choice(files).name
        case 3:
            other = rng.choice(files)
            file.pieces, other.pieces = other.pieces, file.pieces
        case 4:
            rng.shuffle(files)
        case _:
            file.pieces.append(Piece(rng.randrange(64) * SECTOR, bytes([rng.randrange(256)]) * 16))


def _change_size(rng: random.Random, file: File) -> None:
    edges = [edge for piece in file.pieces for edge in (piece.offset, piece.offset + len(piece.data))]
    match rng.randrange(5):
        case 0:
            file.size = rng.choice(edges) + rng.choice((-1, 0, 1, 12))
        case 1:
            file.size += rng.choice((-SECTOR, SECTOR, -1, 1, 65536))
        case 2:
            file.size = rng.randrange(file.size + 1)
        case 3:
            file.size = 1 << rng.randrange(46)
        case _:
            file.size = file.size // SECTOR * SECTOR
    file.size = min(max(file.size, 0), MAX_SIZE)


def _change_piece(
    rng: random.Random, files: list[File], file: File, plain: Callable[[bytes, int], bytes]
) -> None:
    # The first pieces are headers, directories and descriptors; most of the rest is data.
    piece = file.pieces[min(rng.randrange(len(file.pieces)), rng.randrange(len(file.pieces)))]
    choice = rng.random()
    if _is_text(piece.data) and choice < 0.7:
        piece.data = change_text(rng, piece.data)
    elif choice < 0.6 and piece.data:
        piece.data = _set_integer(rng, files, file, piece.data)
    elif choice < 0.7:
        other = rng.choice(rng.choice(files).pieces or [piece])
        piece.data = other.data
    elif choice < 0.8:
        piece.offset = max(0, piece.offset + rng.choice((-SECTOR, SECTOR, -4, 4, -8, 8, 65536)))
    elif choice < 0.85:
        file.pieces.append(Piece(rng.choice(file.pieces).offset, piece.data))
    else:
        piece.data = plain(piece.data, len(piece.data) + 64)


def _is_text(data: bytes) -> bool:
    return len(data) > 20 and sum(byte < 9 for byte in data[:200]) == 0 and b"\n" in data


def _set_integer(rng: random.Random, files: list[File], file: File, data: bytes) -> bytes:
    """Put a telling number where one may be."""
    width = rng.choice((1, 2, 4, 4, 4, 8, 8, 8))
    at = rng.randrange(0, max(len(data) - width, 0) + 1)
    at -= at % min(width, 4)
    old = int.from_bytes(data[at : at + width], "little")
    size = rng.choice(files).size
    new = rng.choice(
        (
            0,
            1,
            2,
            old + 1,
            old - 1,
            old * 2,
            old // 2,
            old ^ 1 << rng.randrange(8 * width),
            size // SECTOR,
            size // SECTOR - 1,
            size // SECTOR + 1,
            rng.choice(file.pieces).offset // SECTOR,
            rng.choice(file.pieces).offset // SECTOR + 1,
            1 << rng.randrange(8 * width),
            (1 << rng.randrange(1, 8 * width + 1)) - 1,
            rng.randrange(1 << 8 * width),
            rng.randrange(300),
            int.from_bytes(data[(other := rng.randrange(len(data))) : other + width], "little"),
        )
    )
    packed = struct.pack(_INTEGERS[width], new % (1 << 8 * width))
    return data[:at] + packed + data[at + width :]


def change_text(rng: random.Random, data: bytes) -> bytes:
    """Change a descriptor by lines and words."""
    lines = data.split(b"\n")
    index = rng.randrange(len(lines))
    line = lines[index]
    match rng.randrange(9):
        case 0:
            lines.insert(rng.randrange(len(lines) + 1), line)
        case 1:
            del lines[index]
        case 2:
            other = rng.randrange(len(lines))
            lines[index], lines[other] = lines[other], line
        case 3:
            lines[index:index] = [line] * rng.choice((2, 10, 100))
        case 4:
            lines.insert(index, rng.choice(WORDS).encode())
        case 5:
            lines[index] = line + rng.choice(
                (b"\r", b" ", b"\0", b'"', b"\x1a", b"\xff", b"\xa1\xa1", b"=", b"#")
            )
        case 6 if digits := list(re.finditer(rb"[0-9a-f]+", line)):
            found = rng.choice(digits)
            new = rng.choice(
                (b"0", b"1", b"ffffffff", b"%d" % rng.randrange(1 << 20), b"9" * rng.randrange(1, 50))
            )
            lines[index] = line[: found.start()] + new + line[found.end() :]
        case _:
            words = line.split(b" ")
            words[rng.randrange(len(words))] = rng.choice(WORDS).encode()
            lines[index] = b" ".join(words)
    return b"\n".join(lines)
