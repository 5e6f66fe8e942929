"""Ending nbdkit while clients are connected.

Told to end, nbdkit 1.32 takes no new connections and then waits until all that it has are closed, without a
limit; a client that has nothing to say (a mounted file system, a virtual machine) never closes its own, so
cleanup() would never come, and who waits for the server kills it in the end, with tables unwritten.

So a thread of ours waits for the signals in nbdkit's place.  It asks nbdkit to shut down and then ends what
can be received from each client, and only that: requests that have arrived are answered, then the reader
finds the end of the stream and the connection is closed as if the client had done it.

Clients are found by their sockets: connected ones whose own end has the address of a socket that listens.
"""

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

#: The exit code of a process that was told to end, and could not close a disk cleanly.
CLOSE_FAILED = os.EX_IOERR

#: What nbdkit itself takes as a request to end.
_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
#: Seconds between two looks for clients: one may have been accepted at the last moment.
_AGAIN = 0.1
#: Descriptors that are looked at where it can't be told which there are.
_MOST = 1 << 16
#: Seconds after which a client that does not take its replies is not waited for any more.
_PATIENCE = 10.0


def watch(shutdown: Callable[[], None]) -> None:
    """Begin to wait for a signal; called by the main thread before any connection is there.

    ``shutdown`` is nbdkit's, which returns at once.  Threads made later inherit that the signals are blocked,
    so that they all come to the one that waits.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_wait, args=(shutdown,), name="ending", daemon=True).start()


def _wait(shutdown: Callable[[], None]) -> None:
    signal.sigwait(_SIGNALS)
    shutdown()
    end = time.monotonic() + _PATIENCE
    while True:  # until the process ends
        hang_up(socket.SHUT_RD if time.monotonic() < end else socket.SHUT_RDWR)
        time.sleep(_AGAIN)


def hang_up(how: int = socket.SHUT_RD) -> None:
    """End what can be received from every client of this process, or all traffic with it."""
    opened: list[socket.socket] = []
    clients: list[tuple[socket.socket, tuple[int, Any]]] = []
    here: set[tuple[int, Any]] = set()
    try:
        for fd in _descriptors():
            try:
                # Not a copy: where descriptors have run out there is none for that.
                one = socket.socket(fileno=fd)
            except OSError:
                continue  # no socket, or closed meanwhile
            opened.append(one)
            try:
                if one.type != socket.SOCK_STREAM:
                    continue
                if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    here.add(_address(one))
                else:
                    clients.append((one, _address(one)))
            except OSError:
                pass  # closed meanwhile
        for one, address in clients:
            if address in here:
                try:
                    one.shutdown(how)
                except OSError:
                    pass  # gone meanwhile
    finally:
        for one in opened:
            one.detach()  # it is nbdkit's


def _descriptors() -> Iterable[int]:
    """Numbers among which all descriptors of this process are."""
    try:
        return [int(fd) for fd in os.listdir("/proc/self/fd")]
    except OSError:
        # No descriptor is left to look with, so that nearly all numbers are in use; or there is no /proc.
        most, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return range(_MOST if most == resource.RLIM_INFINITY else min(most, _MOST))


def _address(one: socket.socket) -> tuple[int, Any]:
    """Family and name (unix) or port: a connection has the address it came in by, not the wildcard."""
    name = one.getsockname()
    return one.family, name[1] if isinstance(name, tuple) else name
