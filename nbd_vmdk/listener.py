"""Where a server listens: a socket that we make and nbdkit inherits.

The socket is bound here and handed to nbdkit by socket activation.  So there is no moment in which the
address exists and nobody listens, a port can be chosen by the kernel, an address that is taken is found
before anything is started, and what is left on disk is known and removed by its maker.
"""

import errno
import os
import shutil
import socket
import stat
import tempfile
from urllib.parse import quote

from nbd_vmdk.errors import InUse, OptionError, StorageError

#: sun_path holds 108 bytes, the last one a NUL.
_MAX_SOCKET_PATH = 107

#: Clients that may knock before nbdkit takes the first one, as nbdkit itself has it.
_BACKLOG = 128


class Listener:
    """A bound and listening socket.  ``path`` is a unix socket's path; ``port`` a TCP one's."""

    def __init__(self, made: socket.socket, *, folder: str | None = None) -> None:
        self.socket = made
        self._folder = folder
        self._ours: tuple[int, ...] | None = None
        self.path: str | None = None
        self.host = ""
        self.port = 0
        name = made.getsockname()
        if made.family == socket.AF_UNIX:
            self.path = name
            self._ours = _identity(name)
        else:
            self.host, self.port = name[:2]

    def uri(self, export: str = "") -> str:
        """The NBD URI of an export, for any client on this machine."""
        name = quote(export.encode(errors="surrogateescape"), safe="")
        if self.path is not None:
            return f"nbd+unix:///{name}?socket={quote(os.fsencode(self.path))}"
        # A wildcard address is one to listen on, not one to call.
        host = "localhost" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104
        host = f"[{host}]" if ":" in host else host
        return f"nbd://{host}:{self.port}" + (f"/{name}" if name else "")

    def environment(self) -> dict[str, str]:
        """What a ``--run`` command finds in its environment; the names are those of ``nbdkit --run``."""
        if self.path is not None:
            return {"uri": self.uri(), "nbd": f"nbd:unix:{self.path}", "unixsocket": self.path, "port": ""}
        return {
            "uri": self.uri(),
            "nbd": f"nbd:{self.host}:{self.port}",
            "unixsocket": "",
            "port": str(self.port),
        }

    def release(self) -> None:
        """Close this process's copy, once nbdkit has its own: when it goes, clients are refused."""
        self.socket.close()

    def remove(self) -> None:
        """Close, and remove what was made on disk, unless somebody else has put his own in its place."""
        self.socket.close()
        if self.path is not None and _identity(self.path) == self._ours:
            os.unlink(self.path)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def listen_private() -> Listener:
    """A unix socket in a new folder that only this user can enter."""
    parent = os.environ.get("XDG_RUNTIME_DIR", "")
    # A socket's path has little room, so a long TMPDIR is passed over for /tmp.
    folders = [parent, "/tmp"]  # noqa: S108  mkdtemp makes a folder of mode 0700
    usable = [each for each in folders if os.path.isabs(each) and os.access(each, os.W_OK | os.X_OK)]
    folder = tempfile.mkdtemp(prefix="nbd-vmdk-", dir=usable[0] if usable else None)
    try:
        return _listen_unix(os.path.join(folder, "socket"), folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def listen_unix(path: str | os.PathLike[str]) -> Listener:
    """A unix socket at ``path``.  One that a dead server left behind is replaced.

    Raises InUse if a server answers there, OptionError if the path can't be a socket.
    """
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise OptionError(path, why=f"a socket's path has at most {_MAX_SOCKET_PATH} bytes")
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return _listen_unix(path)
    except OSError as error:
        raise StorageError.of(error, path, "make a socket") from error
    if not stat.S_ISSOCK(mode):
        raise OptionError(path, why="exists, and is no socket", hint="name a new file with --socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError as error:
            raise StorageError.of(error, path, "connect") from error
        else:
            raise InUse(path, how="a server answers there", hint="name another socket, or stop that server")
    return _listen_unix(path)


def listen_tcp(host: str, port: int) -> Listener:
    """A TCP socket on an address of this machine; port 0 takes any free one.

    Raises InUse if the port is taken, OptionError if the address is no address of this machine.
    """
    where = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OptionError(where, why=f"can't listen there: {error.strerror or error}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        if isinstance(error, PermissionError):
            raise StorageError.of(error, where, "listen") from error
        why = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            hint = "choose another port; --port 0 takes any free one"
            raise InUse(where, how="the port is taken", hint=hint) from error
        raise OptionError(where, why=f"can't listen there: {why}") from error
    return Listener(made)


def _listen_unix(path: str, folder: str | None = None) -> Listener:
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(path)
        made.listen(_BACKLOG)
        return Listener(made, folder=folder)
    except OSError as error:
        made.close()
        raise StorageError.of(error, path, "make a socket") from error


def _identity(path: str) -> tuple[int, ...] | None:
    try:
        there = os.lstat(path)
    except OSError:
        return None
    # Inode numbers are used again at once; the time of making tells the next one apart.
    return there.st_dev, there.st_ino, there.st_mtime_ns
