"""libnbd's Python module, loaded when it is first needed: it comes from the distribution, not from PyPI.

What is known of the binding (1.14) and heeded by connection.py:

* A buffer given to an ``aio_`` call as bytes, bytearray or memoryview is held until the request is retired,
  whoever else lets go of it.  One wrapped in ``nbd.Buffer`` is held forever: each such call leaks a
  reference to what is wrapped, and the memory with it.  So requests get buffers as they are, and ``Buffer``
  serves only :func:`zero_test`.
* A completion callback that returns 1 retires its request.  It may be called from within the call that
  sends the request, and it is called with ENOTCONN for every request that a lost connection leaves open.
* What a callback raises is printed and forgotten, so callbacks here raise nothing.
* The GIL is released in every call, those that look up a host's name among them.
"""

import errno
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nbd_vmdk.errors import NbdError

if TYPE_CHECKING:
    import nbd

#: Bits of ``aio_get_direction``.
READ, WRITE = 1, 2

#: Flags of commands.
FUA, NO_HOLE, FAST_ZERO = 1 << 0, 1 << 1, 1 << 4

#: What block status says of a run.
HOLE, ZERO = 1 << 0, 1 << 1

ALLOCATION = "base:allocation"

_SIZE_MINIMUM, _SIZE_PREFERRED, _SIZE_MAXIMUM = 0, 1, 2

_TLS_REQUIRE = 2

#: Seconds for a server to get from taking a connection to offering its export, which it may open only then.
PATIENCE = 90.0

#: The longest read or write that any server may be sent, unless it names a limit of its own (NBD protocol).
_MAX_PAYLOAD = 32 << 20


@dataclass(frozen=True, slots=True)
class Tls:
    """How to encrypt a connection.  TLS is then required: a server that has none is refused.

    ``certificates`` is a folder in libnbd's layout (``ca-cert.pem``, and for a client that must show its own
    ``client-cert.pem`` and ``client-key.pem``); ``psk`` a file of pre-shared keys, with ``username`` as the
    one to use.  The server's certificate must be for the host that the URI names; a local socket has none, so
    there it takes a key.  ``verify_peer=False`` takes any certificate.
    """

    certificates: str | None = None
    psk: str | None = None
    username: str | None = None
    verify_peer: bool = True


@dataclass(frozen=True, slots=True)
class Export:
    """What a server offers under one name, and what can be asked of it.  Sizes are in bytes.

    Requests must be aligned to ``minimum_block``; longer ones than ``maximum_block`` are split by the client.
    ``description`` is known only of exports that were listed.
    """

    name: str
    uri: str
    size: int
    read_only: bool
    can_flush: bool
    can_fua: bool
    can_trim: bool
    can_zero: bool
    can_fast_zero: bool
    can_cache: bool
    can_multi_conn: bool
    has_block_status: bool
    minimum_block: int
    preferred_block: int
    maximum_block: int
    description: str = ""


def new_handle(tls: Tls | None) -> "nbd.NBD":
    """A handle of libnbd that is not connected yet.  NbdError if there is no libnbd, or it can't do TLS."""
    _need_libnbd()
    import nbd

    handle = nbd.NBD()
    # Buffers hold zeros or the user's own bytes, and nobody looks at one before its request succeeded.
    handle.set_pread_initialize(False)
    handle.add_meta_context(ALLOCATION)
    # Else a URI with tls-psk-file=, as a server of ours tells to clients on its machine, would be refused.
    handle.set_uri_allow_local_file(True)
    if tls is not None:
        try:
            handle.set_tls(_TLS_REQUIRE)
            handle.set_tls_verify_peer(tls.verify_peer)
            if tls.certificates is not None:
                handle.set_tls_certificates(tls.certificates)
            if tls.psk is not None:
                handle.set_tls_psk_file(tls.psk)
            if tls.username is not None:
                handle.set_tls_username(tls.username)
        except nbd.Error as error:
            raise NbdError(None, why=error.string) from error
    return handle


def error_class() -> type["nbd.Error"]:
    """What libnbd raises."""
    _need_libnbd()
    import nbd

    return nbd.Error


def in_words(error: "nbd.Error") -> str:
    """What libnbd says, without the name of the function that said it."""
    return error.string.split(": ", 1)[-1] if error.string.startswith("nbd_") else error.string


def unreachable(uri: str, reason: str, number: int) -> NbdError:
    """That no connection came about: libnbd's words, which begin with how far it got, and its errno."""
    hint = None
    reached, _, why = reason.partition(": ")
    match reached:
        case "connect":
            hint = f"is the server running? nbdinfo {shlex.quote(uri)} tries to reach it"
        case "getaddrinfo":
            hint = "is the host's name right?"
        case "handshake":
            if number == errno.ENOENT:
                hint = f"nbdinfo --list {shlex.quote(uri)} tells what it offers"
        case _:
            why = reason
    return NbdError.of(uri, f"can't connect: {why}", number, hint)


def silent(uri: str, seconds: float) -> NbdError:
    """That something took the connection, and never said what an NBD server says."""
    hint = "is that an NBD server? then it hangs, and its own log or a restart of it may help"
    return NbdError.of(uri, f"no answer in {seconds:g} s", errno.ETIMEDOUT, hint)


def describe(handle: "nbd.NBD", uri: str, name: str, description: str = "") -> Export:
    """What a connected handle, or one that asked about an export, knows of it."""
    minimum = handle.get_block_size(_SIZE_MINIMUM) or 1
    maximum = min(handle.get_block_size(_SIZE_MAXIMUM) or _MAX_PAYLOAD, _MAX_PAYLOAD)
    return Export(
        name=name,
        uri=uri,
        size=handle.get_size(),
        read_only=handle.is_read_only(),
        can_flush=handle.can_flush(),
        can_fua=handle.can_fua(),
        can_trim=handle.can_trim(),
        can_zero=handle.can_zero(),
        can_fast_zero=handle.can_fast_zero(),
        can_cache=handle.can_cache(),
        can_multi_conn=handle.can_multi_conn(),
        has_block_status=handle.can_meta_context(ALLOCATION),
        minimum_block=minimum,
        preferred_block=handle.get_block_size(_SIZE_PREFERRED) or 4096,
        maximum_block=max(minimum, maximum - maximum % minimum),
        description=description,
    )


def zero_test(buffer: bytearray) -> Callable[[int, int], bool]:
    """Tells of ``buffer[offset:offset + length]`` whether all of it is zero, at the speed of memory."""
    import nbd

    return nbd.Buffer.from_buffer(buffer).is_zero


def refuse_unverified(uri: str, tls: Tls | None) -> None:
    """Refuse TLS in which libnbd would take any certificate at all, without a word (seen with 1.14).

    It verifies none where it is given no folder of certificates, even if the system has authorities, and none
    on a socket that has no host name to verify.  Raises NbdError.
    """
    parts = urlsplit(uri)
    if tls is None and not parts.scheme.startswith("nbds"):
        return
    asked = tls or Tls()
    if not asked.verify_peer or asked.psk is not None or "tls-psk-file=" in parts.query:
        return
    if asked.certificates is None and "tls-certificates=" not in parts.query:
        why = "libnbd verifies no certificate without a folder of certificates"
    elif "+" in parts.scheme:
        why = "libnbd can't verify the certificate of a server on a local socket"
    else:
        return
    hint = (
        "over TCP, end the URI with ?tls-certificates=FOLDER, with a ca-cert.pem in it; or with "
        "?tls-psk-file=FILE; from Python also Tls(...), which may say verify_peer=False"
    )
    raise NbdError(uri, why=why, hint=hint)


def _need_libnbd() -> None:
    try:
        import nbd

        # A package of that name on PyPI is something else.
        found = hasattr(nbd, "NBD")
    except ImportError:
        found = False
    if not found:
        hint = "apt-get install python3-libnbd; 'nbd-vmdk doctor' tells how a virtual environment sees it"
        made = NbdError(None, why="libnbd's module for Python is not installed", hint=hint)
        made.errno = errno.ENOENT
        raise made
