"""What a user says of where a server shall listen, and the listener that this makes."""

import os
from dataclasses import dataclass

from nbd_vmdk.errors import OptionError
from nbd_vmdk.serving.listener import (
    Listener,
    given_listener,
    listen_private,
    listen_tcp,
    listen_unix,
    listen_vsock,
)

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; if nothing is said, on a private unix socket.

    socket         the path of a unix socket, with its permissions (mode) and its group
    port, bind     a TCP port (0: any) of an address (127.0.0.1)
    vsock          a port between this machine and its guests
    activated      take the socket that a service manager handed over, if there is one

    Raises OptionError for what does not go together.
    """

    socket: Path | None = None
    mode: int | None = None
    group: str | int | None = None
    port: int | None = None
    bind: str | None = None
    vsock: int | None = None
    activated: bool = False

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.socket, self.port, self.vsock)) > 1:
            raise OptionError(None, why="a server listens on a socket or on a port, not on both")
        if self.bind is not None and self.port is None:
            raise OptionError(None, why="an address to bind to needs a port as well")
        if self.socket is None and not (self.mode is None and self.group is None):
            why = "a mode and a group are for a socket that has a name"
            raise OptionError(None, why=why, hint="add --socket PATH")

    def listen(self, *, insecure: bool) -> Listener:
        """The socket; ``insecure`` says that others may reach it.

        Raises InUse if the address is taken, OptionError if it makes no sense or others could reach it, and
        StorageError.
        """
        given = given_listener(insecure=insecure) if self.activated else None
        if given is not None:
            if not (self.socket is None and self.port is None and self.vsock is None):
                given.remove()
                raise OptionError(None, why="a socket was handed over, and another one is asked for")
            return given
        if self.port is not None:
            return listen_tcp(self.bind or "127.0.0.1", self.port, insecure=insecure)
        if self.vsock is not None:
            return listen_vsock(self.vsock, insecure=insecure)
        if self.socket is not None:
            return listen_unix(self.socket, mode=self.mode, group=self.group)
        return listen_private()
