"""nbdkit's connections, of whose sockets it tells its plugins nothing; and room in them for replies.

What was sent through a unix socket and not read yet counts against the sender's buffer, 208 KiB if nobody
asks for more.  That is three replies of 64 KiB: with more requests in flight than that nbdkit waits in send
for the client, and goes on only when that has woken up and caught up, where both have a processor.  So each
gets a larger one.  TCP sizes its buffers itself, better than anybody who sets them.
"""

import os
import socket
import stat
from collections.abc import Generator
from contextlib import closing
from typing import Final

from nbd_vmdk.units import MIB

#: Bytes that may be on their way to a client.  More made nothing faster, and the kernel may come to hold
#: twice as much for each connection.  Linux grants what net.core.wmem_max allows, on most hosts 208 KiB, and
#: that doubled, see socket(7).
_ROOM: Final = MIB


def sockets() -> Generator[tuple[int, socket.socket], None, None]:
    """The sockets of this process: the number of each, and a copy to use until the next one is asked for."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            copy = socket.socket(fileno=os.dup(fd))
        except OSError:
            continue  # closed meanwhile
        with copy:
            yield fd, copy


def make_room() -> None:
    """Give unix sockets room for replies; all are looked at, as nobody says which one is new."""
    try:
        with closing(sockets()) as found:
            for _fd, one in found:
                if one.family == socket.AF_UNIX:
                    had = one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
                    if had < _ROOM:
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
    except OSError:
        pass  # it works as it is
