"""Where a server listens: a socket that we make, or were given, and that nbdkit inherits.

The socket is bound here and handed to nbdkit by socket activation.  So there is no moment in which the
address exists and nobody listens, a port can be chosen by the kernel, an address that is taken is found
before anything is started, and what is left on disk is known and removed by its maker.

Who can reach it is decided here, too.  Without TLS anybody who reaches a port can read the disk, and see and
change what others send: so an address that is not of this machine alone is refused, unless that is wanted.
"""

import errno
import fcntl
import grp
import ipaddress
import os
import socket
import stat
import tempfile
from urllib.parse import quote

from nbd_vmdk.errors import InUse, OptionError, StorageError
from nbd_vmdk.serving.handshake import take_leave
from nbd_vmdk.serving.scratch import HeldFolder
from nbd_vmdk.serving.tls import ServerTls

#: sun_path holds 108 bytes, the last one a NUL.
_MAX_SOCKET_PATH = 107

#: What the names of private folders begin with; all of them are held by who made them.
_FOLDER = "nbd-vmdk-run-"

#: Clients that may knock before nbdkit takes the first one, as nbdkit itself has it.
_BACKLOG = 128

#: The first descriptor that a service manager hands over (sd_listen_fds(3)).
_FIRST_GIVEN = 3

#: The address by which guests call the machine that runs them (vsock(7)).
_CID_HOST = 2


class Listener:
    """A bound and listening socket.

    ``path`` is a unix socket's path, None for others; ``host`` and ``port`` are a TCP socket's, ``name`` is
    the name that ``host`` was asked for by; ``vsock`` is the port of one between a machine and its guests.
    ``tls`` is what the server on it will encrypt with.  A socket that was ``given`` is never removed.
    """

    def __init__(
        self, made: socket.socket, *, folder: HeldFolder | None = None, name: str = "", given: bool = False
    ) -> None:
        self.socket = made
        self._folder = folder
        self._ours: tuple[int, ...] | None = None
        self._given = given
        self.path: str | None = None
        self.host = ""
        self.port = 0
        self.vsock: int | None = None
        self.name = name
        self.tls: ServerTls | None = None
        address = made.getsockname()
        if made.family == socket.AF_UNIX:
            self.path = address
            self._ours = None if given else _identity(address)
        elif made.family == socket.AF_VSOCK:
            self.vsock = address[1]
        else:
            self.host, self.port = address[:2]

    @property
    def public(self) -> bool:
        """Whether other machines can reach it."""
        return self.path is None and (self.vsock is not None or not _is_loopback(self.host))

    @property
    def where(self) -> str:
        """The address, for messages."""
        if self.vsock is not None:
            return f"vsock port {self.vsock}"
        return self.path if self.path is not None else f"{self.host} port {self.port}"

    def uri(self, export: str = "", *, local: bool = False) -> str:
        """The NBD URI of an export; with TLS, a ``local`` one says where its files are on this machine."""
        name = quote(export.encode(errors="surrogateescape"), safe="")
        scheme = "nbd" if self.tls is None else "nbds"
        user, query = "", ""
        if self.tls is not None and local:
            user, query = self.tls.user(), self.tls.query()
            user = user and f"{user}@"
        if self.path is not None:
            return f"{scheme}+unix://{user}/{name}?socket={quote(os.fsencode(self.path))}" + (
                query and f"&{query}"
            )
        rest = (f"/{name}" if name or query else "") + (query and f"?{query}")
        if self.vsock is not None:
            return f"{scheme}+vsock://{user}{_CID_HOST}:{self.vsock}{rest}"
        # A wildcard address is one to listen on, not one to call.
        host = "localhost" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104
        if self.tls is not None and self.name:
            host = self.name  # the one that the certificate is for
        host = f"[{host}]" if ":" in host else host
        return f"{scheme}://{user}{host}:{self.port}{rest}"

    def environment(self) -> dict[str, str]:
        """What a ``--run`` command finds in its environment; the names are those of ``nbdkit --run``."""
        uri = self.uri(local=True)
        if self.path is not None:
            return {"uri": uri, "nbd": f"nbd:unix:{self.path}", "unixsocket": self.path, "port": ""}
        return {
            "uri": uri,
            "nbd": "" if self.vsock is not None else f"nbd:{self.host}:{self.port}",
            "unixsocket": "",
            "port": str(self.vsock or self.port),
        }

    def beside(self, suffix: str) -> str:
        """The path of another socket that goes with this one: beside it, or in a private folder."""
        if (
            self.path is not None
            and not self._given
            and len(os.fsencode(self.path + suffix)) <= _MAX_SOCKET_PATH
        ):
            return self.path + suffix
        return self.private(suffix)

    def private(self, suffix: str) -> str:
        """The path of a file that goes with this socket, in a private folder."""
        if self._folder is None:
            self._folder = _private_folder()
        return os.path.join(self._folder.path, f"socket{suffix}")

    def release(self) -> None:
        """Close this process's copy, once nbdkit has its own: when it goes, clients are refused."""
        self.socket.close()

    def remove(self) -> None:
        """Close, and remove what was made on disk, unless somebody else has put his own in its place."""
        self.socket.close()
        if self.path is not None and self._ours is not None and _identity(self.path) == self._ours:
            os.unlink(self.path)
        if self._folder is not None:
            self._folder.remove()


def _private_folder() -> HeldFolder:
    """A new folder that only this user can enter."""
    # A service has a folder of its own.  A socket's path has little room: a long TMPDIR is passed over.
    named = [os.environ.get(name, "") for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR")]
    folders = [*named, "/tmp"]  # noqa: S108  mkdtemp makes a folder of mode 0700
    usable = [each for each in folders if os.path.isabs(each) and os.access(each, os.W_OK | os.X_OK)]
    return HeldFolder(usable[0] if usable else tempfile.gettempdir(), _FOLDER)


def listen_private() -> Listener:
    """A unix socket in a new folder that only this user can enter."""
    folder = _private_folder()
    try:
        return _listen_unix(os.path.join(folder.path, "socket"), folder=folder)
    except BaseException:
        folder.remove()
        raise


def listen_unix(
    path: str | os.PathLike[str], *, mode: int | None = None, group: str | int | None = None
) -> Listener:
    """A unix socket at ``path``, with permissions ``mode``, belonging to ``group``.

    One that a dead server left behind is replaced.  Raises InUse if a server answers there, OptionError if
    the path can't be a socket or there is no such group, StorageError if it may not be given to the group.
    """
    number = _group_number(group)
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise OptionError(path, why=f"a socket's path has at most {_MAX_SOCKET_PATH} bytes")
    try:
        there = os.lstat(path).st_mode
    except FileNotFoundError:
        return _listen_unix(path, mode, number)
    except OSError as error:
        raise StorageError.of(error, path, "make a socket") from error
    if not stat.S_ISSOCK(there):
        raise OptionError(path, why="exists, and is no socket", hint="name a new file with --socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            pass
        except OSError as error:
            raise StorageError.of(error, path, "connect") from error
        else:
            take_leave(probe)
            raise InUse(path, how="a server answers there", hint="name another socket, or stop that server")
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass  # another one has removed it meanwhile
    except OSError as error:
        raise StorageError.of(error, path, "remove what a dead server left") from error
    return _listen_unix(path, mode, number)


def listen_tcp(host: str, port: int, *, insecure: bool = True) -> Listener:
    """A TCP socket on an address of this machine; port 0 takes any free one.

    Raises InUse if the port is taken, OptionError if the address is no address of this machine, or one that
    others can reach though that would not be ``insecure``: what is looked at is what a name resolves to.
    """
    where = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        if not insecure and not _is_loopback(str(address[0])):
            raise _exposed(f"{address[0]} port {port}")
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
    return Listener(made, name="" if _is_address(host) else host)


def listen_vsock(port: int, *, insecure: bool = True) -> Listener:
    """A socket for the guests of this machine, or on a guest for its host.

    Raises OptionError if this kernel has none, or if it would not be ``insecure``: every guest can reach it.
    """
    if not insecure:
        raise _exposed(f"vsock port {port}")
    where = f"vsock port {port}"
    try:
        made = socket.socket(socket.AF_VSOCK)
    except OSError as error:
        hint = "load its module: modprobe vhost_vsock (on a host), or vmw_vsock_virtio_transport (in a guest)"
        raise OptionError(where, why=f"this kernel has no vsock: {error.strerror}", hint=hint) from error
    try:
        made.bind((socket.VMADDR_CID_ANY, port))
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise InUse(where, how="the port is taken", hint="choose another port") from error
        raise StorageError.of(error, where, "listen") from error
    return Listener(made)


def given_listener(*, insecure: bool = True) -> Listener | None:
    """The socket that a service manager has made and handed to us, by sd_listen_fds(3); None if it has not.

    The variables that say so are taken out of our environment: they are not meant for children.
    Raises OptionError if there are several, if it is no socket that listens, or as listen_tcp does.
    """
    count, mine = os.environ.get("LISTEN_FDS", ""), os.environ.get("LISTEN_PID", "")
    if mine != str(os.getpid()) or not count.isdigit() or count == "0":
        return None
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if int(count) > 1:
        hint = "one .socket unit has one ListenStream= here; start a server for each"
        raise OptionError(
            None, why=f"{count} sockets were handed over, and a server listens on one", hint=hint
        )
    try:
        fcntl.fcntl(_FIRST_GIVEN, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        made = socket.socket(fileno=_FIRST_GIVEN)
        fits = made.type == socket.SOCK_STREAM and made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise OptionError(None, why=f"what was handed over is no socket: {error.strerror}") from error
    if not fits:
        made.close()
        hint = "the .socket unit needs ListenStream= and Accept=no"
        raise OptionError(None, why="the socket that was handed over does not listen", hint=hint)
    found = Listener(made, given=True)
    if found.public and not insecure:
        found.remove()
        raise _exposed(found.where)
    return found


def _listen_unix(
    path: str, mode: int | None = None, group: int | None = None, *, folder: HeldFolder | None = None
) -> Listener:
    made = socket.socket(socket.AF_UNIX)
    bound = False
    try:
        made.bind(path)
        bound = True
        # Nobody can connect before it listens.
        if group is not None:
            os.chown(path, -1, group)
        if mode is not None:
            os.chmod(path, mode)
        made.listen(_BACKLOG)
        return Listener(made, folder=folder)
    except OSError as error:
        made.close()
        if bound:
            os.unlink(path)
        raise StorageError.of(error, path, "make a socket") from error


def _group_number(group: str | int | None) -> int | None:
    if group is None or isinstance(group, int):
        return group
    try:
        return int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise OptionError(None, why=f"there is no group {group!r}") from None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    """Whether an address, in digits, is of this machine alone."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _exposed(where: str) -> OptionError:
    hint = "encrypt with --tls-certificates DIR or --tls-psk FILE; or, in a network you trust, add --insecure"
    return OptionError(None, why=f"others can reach {where}, and could read and change all", hint=hint)


def _identity(path: str) -> tuple[int, ...] | None:
    try:
        there = os.lstat(path)
    except OSError:
        return None
    # Inode numbers are used again at once; the time of making tells the next one apart.
    return there.st_dev, there.st_ino, there.st_mtime_ns
