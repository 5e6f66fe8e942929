"""nbdkit's sockets, of which it tells its plugins nothing."""

import os
import socket
import stat
from collections.abc import Generator


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
