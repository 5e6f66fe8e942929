"""What an NBD URI names, in the words of nbd-client.

Encryption is nbd-client's own work: a process of it stands between the kernel and the server.  It knows
certificates and no pre-shared keys.  It looks at the server's certificate only if it is told both whom to
trust and the name that must be in it, and says nothing where it does not look (3.24): it is always told both.
"""

import os
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from nbd_vmdk.attaching.unreached import WHO_CAN
from nbd_vmdk.errors import FileMissing, OptionError

_PORT = 10809

#: What an encrypted URI may say of TLS.
_TLS_KNOWN = {"tls-certificates", "tls-hostname", "tls-verify-peer"}


@dataclass(frozen=True, slots=True)
class Place:
    """``where``, a host and a port or a socket, the name of the ``export``, and options for ``tls``."""

    where: tuple[str, ...]
    export: str = ""
    tls: tuple[str, ...] = ()


def place_of(uri: str) -> Place:
    """The place that a URI names; OptionError if it can't be attached, FileMissing for a certificate."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port or _PORT
    except ValueError as error:
        raise OptionError(uri, why=f"is no NBD URI: {error}") from None
    export = unquote(parts.path.removeprefix("/"))
    query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
    if parts.scheme == "nbd" and host:
        return Place((host, str(port)), export)
    if parts.scheme == "nbds" and host:
        return Place((host, str(port)), export, _tls_words(uri, host, query))
    socket = query.get("socket")
    if parts.scheme == "nbd+unix" and socket:
        return Place(("-unix", socket), export)
    if parts.scheme.startswith("nbds"):
        why = "the kernel's NBD client encrypts only over TCP"
        raise OptionError(uri, why=why, hint=WHO_CAN)
    raise OptionError(uri, why="is no NBD URI that can be attached", hint="nbd://HOST:PORT/NAME can")


def _tls_words(uri: str, host: str, query: dict[str, str]) -> tuple[str, ...]:
    """Options from what the URI says, as libnbd understands it: a folder with certificates of these names."""
    if "tls-psk-file" in query:
        raise OptionError(uri, why="nbd-client takes certificates, and no pre-shared keys", hint=WHO_CAN)
    if query.get("tls-verify-peer", "true") not in ("true", "1", "yes", "on"):
        raise OptionError(uri, why="a device is attached only if its server's certificate is looked at")
    if unknown := sorted(key for key in query if key.startswith("tls-") and key not in _TLS_KNOWN):
        raise OptionError(uri, why=f"{unknown[0]} is not known")
    if not query.get("tls-certificates"):
        why = "nothing says whom to trust"
        hint = f"end it with ?tls-certificates=DIR, and have ca-cert.pem in DIR, for a certificate of {host}"
        raise OptionError(uri, why=why, hint=hint)
    folder = os.path.abspath(query["tls-certificates"])
    words = ["-cacertfile", _there(folder, "ca-cert.pem"), "-tlshostname", query.get("tls-hostname") or host]
    if any(os.path.lexists(os.path.join(folder, name)) for name in ("client-cert.pem", "client-key.pem")):
        words += ["-certfile", _there(folder, "client-cert.pem")]
        words += ["-keyfile", _there(folder, "client-key.pem")]
    return tuple(words)


def _there(folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise FileMissing(path)
    return path
