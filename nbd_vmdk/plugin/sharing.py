"""Taking turns: several nbdkits that serve the clients of one listening socket, which they have inherited.

nbdkit polls such a socket, and all are told of a client.  Left to themselves, the one that runs first takes
it, and on a busy machine the next ones too; the others then wait in accept(), where nbdkit 1.32 does not hear
that it shall end.  So nbdkit is given a private socket in the place of the inherited one, and a thread of
ours waits in accept().  There the kernel keeps a queue: a client goes to the process at its head, which then
joins it again at its end.  A lock around it would not do: who gives one up may take it again at once.

A client gets into nbdkit, which takes clients from accept() alone, by changing places: the thread calls the
private socket, nbdkit accepts that call, and asks preconnect() before it says a word on it; there the
client's connection is put on the accepted one's descriptor.  From then on nothing of ours is between them.
The private socket has a path, in a folder for this user alone: names that the kernel chooses are for all.
"""

import os
import socket
import threading
import time
from contextlib import closing

from nbd_vmdk.errors import StorageError
from nbd_vmdk.plugin.connections import sockets

#: The descriptor of a socket that nbdkit inherits (sd_listen_fds(3)).
_INHERITED = 3
#: Seconds that nbdkit may take to accept a call of our own.
_PATIENCE = 10.0
#: Seconds until the next try when there are no descriptors or no memory for one client more.
_PAUSE = 0.1
#: Seconds until one who has got a client joins the queue again: the next one, once called, has to wake up
#: before he can take his, and who comes meanwhile would be served first.
_COURTESY = 0.005


class Turns:
    """This process's part in serving the clients of the inherited socket.

    ``path`` is for the private one; what an earlier process left there is replaced.  Made before nbdkit polls
    the socket.  Raises StorageError if no socket was inherited, or none can be made.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._shared = socket.socket(fileno=os.dup(_INHERITED))
            if os.path.lexists(path):
                os.unlink(path)
            with socket.socket(socket.AF_UNIX) as private:
                private.bind(path)
                private.listen()
                os.dup2(private.fileno(), _INHERITED, inheritable=False)
        except OSError as error:
            raise StorageError.of(error, path, "make a socket") from error
        self._guest: tuple[socket.socket, str | bytes] | None = None
        self._seated = threading.Event()
        threading.Thread(target=self._take, name="turns", daemon=True).start()

    def seat(self) -> None:
        """Put the client on the connection that nbdkit has accepted for it; called by preconnect()."""
        if self._guest is None:
            return
        client, name = self._guest
        with closing(sockets()) as found:
            for fd, one in found:
                try:
                    if one.family == socket.AF_UNIX and one.getpeername() == name:
                        os.dup2(client.fileno(), fd, inheritable=False)
                        self._guest = None
                        self._seated.set()
                        return
                except OSError:
                    pass  # not connected

    def _take(self) -> None:
        while True:
            try:
                client, _ = self._shared.accept()
                with client, socket.socket(socket.AF_UNIX) as call:
                    self._bring(client, call)
                time.sleep(_COURTESY)
            except OSError:
                time.sleep(_PAUSE)

    def _bring(self, client: socket.socket, call: socket.socket) -> None:
        if client.family in (socket.AF_INET, socket.AF_INET6):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as nbdkit does
        call.bind("")  # a name that nobody else has
        self._seated.clear()
        self._guest = client, call.getsockname()
        call.connect(self._path)
        self._seated.wait(_PATIENCE)
        self._guest = None
