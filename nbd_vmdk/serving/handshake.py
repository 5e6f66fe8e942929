"""The opening words of an NBD connection, enough to ask a server what it serves.

Used to know when a server that was just started answers, and to say in ``serve --json`` what it really
offers.  Only the fixed newstyle negotiation of the NBD protocol is spoken: list the exports, ask for the
size and the flags of each, say goodbye.  Nothing is read from the disk.
"""

import asyncio
import socket
import struct
from dataclasses import dataclass

from nbd_vmdk.errors import ServerError

_GREETING = b"NBDMAGIC"
_OPTION = b"IHAVEOPT"
_REPLY_MAGIC = 0x3E889045565A9
_FIXED_NEWSTYLE = 1

_ABORT, _LIST, _INFO = 2, 3, 6
_REP_ACK, _REP_SERVER, _REP_INFO, _REP_ERROR = 1, 2, 3, 1 << 31
_REP_TLS_REQUIRED = _REP_ERROR | 5
_INFO_EXPORT, _INFO_DESCRIPTION = 0, 2
_FLAG_READ_ONLY = 1 << 1

#: Longer than any reply here can honestly be: a name has at most 4096 bytes, and so has a description.
_MAX_REPLY = 16384


@dataclass(frozen=True, slots=True)
class Export:
    """What a server offers under one name.  ``size`` is in bytes.

    ``description`` is what the server says of it; ``kind`` is for who knows the disk to fill in.
    """

    name: str
    size: int
    read_only: bool
    description: str = ""
    kind: str = ""


async def read_exports(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> list[Export] | None:
    """Ask the server at the other end what it serves, then take leave of it.

    None if it tells that only to those who encrypt: then it lives, which may be all there is to know.
    Raises ServerError if it refuses or speaks something else, EOFError or OSError if it hangs up.
    """
    if await reader.readexactly(16) != _GREETING + _OPTION:
        raise ServerError(None, why="what answers is no NBD server")
    flags: int = struct.unpack(">H", await reader.readexactly(2))[0]
    if not flags & _FIXED_NEWSTYLE:
        raise ServerError(None, why="the server speaks only the old form of the NBD protocol")
    writer.write(struct.pack(">I", _FIXED_NEWSTYLE))
    listed = await _ask(reader, writer, _LIST, b"")
    if listed is None:
        return None
    names = [body[4 : 4 + struct.unpack_from(">I", body)[0]] for body in listed if len(body) >= 4]
    found = []
    for name in names:
        question = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, _INFO_DESCRIPTION)
        answers = [
            (struct.unpack_from(">H", body)[0], body[2:])
            for body in await _ask(reader, writer, _INFO, question) or ()
            if len(body) >= 2
        ]
        told = [body for kind, body in answers if kind == _INFO_DESCRIPTION]
        description = told[0].decode(errors="replace") if told else ""
        for kind, body in answers:
            if kind == _INFO_EXPORT and len(body) >= 10:
                size, export_flags = struct.unpack_from(">QH", body)
                text = name.decode(errors="surrogateescape")
                found.append(Export(text, size, bool(export_flags & _FLAG_READ_ONLY), description))
    writer.write(_OPTION + struct.pack(">II", _ABORT, 0))
    await writer.drain()
    return found


def take_leave(connected: socket.socket, patience: float = 1.0) -> None:
    """Say a polite goodbye to the server at the other end: who just hangs up is an error in its log.

    What does not answer within ``patience`` seconds, or is no NBD server, is left without.
    """
    connected.settimeout(patience)
    try:
        greeting = connected.recv(18, socket.MSG_WAITALL)
        if greeting[:16] == _GREETING + _OPTION:
            connected.sendall(struct.pack(">I", _FIXED_NEWSTYLE) + _OPTION + struct.pack(">II", _ABORT, 0))
            while connected.recv(64):
                pass
    except OSError:
        pass  # it was only politeness


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, option: int, data: bytes
) -> list[bytes] | None:
    """Send one option; the bodies of the replies that come before its acknowledgement; None without TLS."""
    writer.write(_OPTION + struct.pack(">II", option, len(data)) + data)
    await writer.drain()
    bodies: list[bytes] = []
    while True:
        magic, asked, kind, length = struct.unpack(">QIII", await reader.readexactly(20))
        if magic != _REPLY_MAGIC or asked != option or length > _MAX_REPLY:
            raise ServerError(None, why="the server's answer makes no sense")
        body = await reader.readexactly(length)
        if kind == _REP_ACK:
            return bodies
        if kind == _REP_TLS_REQUIRED:
            return None
        if kind & _REP_ERROR:
            why = body.decode(errors="replace") or f"error {kind & ~_REP_ERROR}"
            raise ServerError(None, why=f"the server refused: {why}")
        if kind in (_REP_SERVER, _REP_INFO):
            bodies.append(body)
