"""How a server encrypts: certificates or pre-shared keys, looked at before anything is started.

With either, nbdkit gets ``--tls=require``: a client that does not encrypt is refused, there is no half way.
What can be known beforehand to be wrong with the files is told by their name and what to do; GnuTLS, inside
nbdkit, would say "Error while reading file" of most of it.  It has the last word on what is in them.
"""

import os
import re
import stat
from dataclasses import dataclass
from urllib.parse import quote

from nbd_vmdk.errors import FileMissing, OptionError, StorageError, VmdkError

#: What nbdkit reads in a folder of certificates: ``(file, what it is)``.
_CERTIFICATES = (
    ("ca-cert.pem", "the certificate of the authority that clients trust"),
    ("server-cert.pem", "the certificate of this server"),
    ("server-key.pem", "the private key that belongs to it"),
)
_PEM = b"-----BEGIN "
_KEY = re.compile(rb"([^:\s][^:]*):((?:[0-9a-fA-F]{2})+)\s*")

#: More than any file of keys or certificates has.
_MOST = 1 << 20

_CLOSED = "its permissions let others read it: chmod 600 would stop that"


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What a server encrypts with; TLS is then required of every client.

    certificates  a folder with ca-cert.pem, server-cert.pem and server-key.pem
    psk           a file of pre-shared keys instead, a ``NAME:HEX`` on each line
    verify_peer   with certificates: take only clients that show one that this ca-cert.pem vouches for

    Raises OptionError for what does not go together.
    """

    certificates: str | os.PathLike[str] | None = None
    psk: str | os.PathLike[str] | None = None
    verify_peer: bool = False

    def __post_init__(self) -> None:
        if self.certificates is None and self.psk is None:
            why = "clients can't be verified without certificates" if self.verify_peer else "nothing to use"
            raise OptionError(None, why=f"TLS: {why}", hint="add --tls-certificates DIR, or --tls-psk FILE")
        if self.certificates is not None and self.psk is not None:
            raise OptionError(None, why="TLS takes certificates or pre-shared keys, not both")
        if self.verify_peer and self.certificates is None:
            hint = "leave --tls-verify-peer out: with pre-shared keys every client is verified"
            raise OptionError(None, why="peers are verified by certificates, and there are none", hint=hint)

    def check(self) -> list[str]:
        """Look at the files; warnings.  Raises FileMissing, StorageError, OptionError."""
        if self.psk is not None:
            path = os.path.abspath(self.psk)
            return _check_keys(path)
        assert self.certificates is not None
        folder = os.path.abspath(self.certificates)
        if not os.path.isdir(folder):
            raise OptionError(folder, why="is no folder", hint="name the folder that holds server-cert.pem")
        warnings = []
        for name, what in _CERTIFICATES:
            path = os.path.join(folder, name)
            content, mode = _read(path, f"it would be {what}")
            if _PEM not in content:
                raise OptionError(path, why=f"holds nothing in PEM form; it should be {what}")
            if name == "server-key.pem" and mode & (stat.S_IRGRP | stat.S_IROTH):
                warnings.append(f"{path}: {_CLOSED}")
        return warnings

    def options(self) -> list[str]:
        """The words for nbdkit."""
        words = ["--tls=require"]
        if self.psk is not None:
            words.append(f"--tls-psk={os.path.abspath(self.psk)}")
        if self.certificates is not None:
            words.append(f"--tls-certificates={os.path.abspath(self.certificates)}")
        if self.verify_peer:
            words.append("--tls-verify-peer")
        return words

    def user(self) -> str:
        """The name of the first key, empty with certificates, as a part of a URI."""
        if self.psk is None:
            return ""
        content, _mode = _read(os.path.abspath(self.psk), "")
        return next((quote(found[1], safe="") for found in _keys(content) if found), "")

    def query(self) -> str:
        """What a URI says of the files, for clients that can read them as we do."""
        if self.psk is not None:
            return f"tls-psk-file={quote(os.path.abspath(os.fspath(self.psk)))}"
        assert self.certificates is not None
        return f"tls-certificates={quote(os.path.abspath(os.fspath(self.certificates)))}"


def _keys(content: bytes) -> list[re.Match[bytes] | None]:
    """What is on each line, None where that is no key; comments and empty lines are passed over."""
    lines = (line.strip() for line in content.splitlines())
    return [_KEY.fullmatch(line) for line in lines if line and not line.startswith(b"#")]


def _check_keys(path: str) -> list[str]:
    content, mode = _read(path, "make one: psktool -u NAME -p FILE")
    keys = _keys(content)
    if not keys or None in keys:
        why = "has a line that is no NAME:HEX" if keys else "holds no key"
        raise OptionError(path, why=why, hint="each line is a name, a colon and hexadecimal digits")
    return [f"{path}: {_CLOSED}"] if mode & (stat.S_IRGRP | stat.S_IROTH) else []


def _read(path: str, hint: str) -> tuple[bytes, int]:
    """What is in a small file, and its mode."""
    try:
        # A pipe would make us wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            there = os.fstat(descriptor)
            if not stat.S_ISREG(there.st_mode):
                raise OptionError(path, why="is no regular file")
            return file.read(_MOST), there.st_mode
    except FileNotFoundError as error:
        missing: VmdkError = FileMissing(path, hint=hint or None)
        raise missing from error
    except OSError as error:
        raise StorageError.of(error, path, "read") from error
