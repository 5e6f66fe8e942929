"""Why nbdfuse or nbd-client did not reach what an NBD URI names, as all else here says it that connects.

Both say it in words of their own, on stderr, and end.  nbdfuse's are libnbd's, after the name of the function
that failed.  nbd-client (3.24) tells of a socket no more than that connecting failed; so it is asked again.
"""

import errno
import os
import re
import socket
from collections.abc import Sequence
from urllib.parse import parse_qs, urlsplit

from nbd_vmdk.errors import NbdError

#: For an encrypted server that nbd-client or nbdfuse can't be used with.
WHO_CAN = "QEMU can, and nbd-vmdk convert copies the disk"

_LIBNBD = "nbd_connect_uri: "
#: libnbd's words for a URI that says whom to trust, if the program does not let it: nbdfuse (1.14) does not.
_NO_FILES = "is not allowed, call nbd_set_uri_allow_local_file"
#: nbd-client's words, and how far it got when it says so, in libnbd's.
_CLIENT = (
    (re.compile(r"Socket failed: (.+)"), "connect"),
    (re.compile(r"getaddrinfo failed: (.+)"), "getaddrinfo"),
    (re.compile(r"Negotiation: .*Error: (.+ returned by server)"), "handshake"),
)
_CLIENT_SOCKET = "CONNECT failed"
#: Seconds for a socket of this machine to answer.
_PATIENCE = 5.0


def unreached(uri: str, said: Sequence[str]) -> NbdError | None:
    """The error that these lines of a program tell of; None if they tell of something else."""
    from nbd_vmdk.client.binding import unreachable  # seldom needed, and slow to import

    if any(_NO_FILES in line for line in said):
        why = "can't connect: nbdfuse takes neither certificates nor pre-shared keys from a URI"
        return NbdError.of(uri, why, errno.EPERM, WHO_CAN)
    reason = next((found for line in reversed(said) if (found := _reason(uri, line))), None)
    return None if reason is None else unreachable(uri, reason, _number(reason))


def _reason(uri: str, line: str) -> str | None:
    """What a line says in libnbd's words, which begin with how far it got."""
    if line.startswith(_LIBNBD):
        return line.removeprefix(_LIBNBD)
    if line.endswith(_CLIENT_SOCKET):
        return f"connect: {_asked_again(uri)}"
    for words, reached in _CLIENT:
        if found := words.search(line):
            return f"{reached}: {found[1]}"
    return None


def _asked_again(uri: str) -> str:
    """What the kernel says of connecting to the socket that a URI names."""
    path = parse_qs(urlsplit(uri).query).get("socket", [""])[-1]
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_PATIENCE)
            client.connect(path)
    except OSError as error:
        return error.strerror or str(error)
    return _CLIENT_SOCKET


def _number(reason: str) -> int:
    """The errno whose text is the last of the words; 0 if there is none."""
    if reason.startswith("handshake: ") and reason.endswith("returned by server"):
        return errno.ENOENT  # of what was asked for it has nothing
    last = reason.rpartition(": ")[2]
    return next((number for number in errno.errorcode if os.strerror(number) == last), 0)
