"""The least that a Python plugin can do: the bytes of one raw file, a system call for each request.

There is nothing to look up, to keep or to put in order.  So what separates this from nbdkit's own file
plugin, which is C, is what Python costs any plugin; and what separates ours from this is what a VMDK costs.
As ours, it keeps the Python state of nbdkit's threads between requests, and gives replies room in their
sockets: without that it would be slower.
"""

import os
import sys
from threading import get_ident

import nbdkit

# Nothing that is installed is needed, only the checkout.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(__file__))))

from nbd_vmdk.plugin.connections import make_room
from nbd_vmdk.plugin.threadstates import KeptStates

API_VERSION = 2

_told: dict[str, str] = {}


class Connection(KeptStates):
    """A connection: its threads' states, and the file as this connection may use it."""

    def __init__(self, *, readonly: bool) -> None:
        super().__init__()
        self.file = os.open(_told["file"], os.O_RDONLY if readonly else os.O_RDWR)


def config(key: str, value: str) -> None:
    """Take file=."""
    _told[key] = value


def thread_model() -> int:
    """Let requests run in parallel, as ours do."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def preconnect(readonly: bool) -> None:  # noqa: ARG001
    """As ours."""
    make_room()


def open(readonly: bool) -> Connection:
    """Begin a connection."""
    return Connection(readonly=readonly)


def close(h: Connection) -> None:
    """End it."""
    h.give_back()
    os.close(h.file)


def get_size(h: Connection) -> int:
    """Tell the file's size in bytes."""
    return os.fstat(h.file).st_size


def can_multi_conn(h: Connection) -> bool:  # noqa: ARG001
    """As ours."""
    return True


def can_fua(h: Connection) -> int:  # noqa: ARG001
    """As ours."""
    return int(nbdkit.FUA_NATIVE)


def pread(h: Connection, buf: memoryview, offset: int, flags: int) -> None:  # noqa: ARG001
    """Read."""
    if get_ident() not in h.threads:
        h.keep()
    if os.preadv(h.file, (buf,), offset) != len(buf):
        raise OSError("the file ends too early")


def pwrite(h: Connection, buf: memoryview, offset: int, flags: int) -> None:
    """Write; FUA takes a second call."""
    if get_ident() not in h.threads:
        h.keep()
    if os.pwrite(h.file, buf, offset) != len(buf):
        raise OSError("no room for all of it")
    if flags & nbdkit.FLAG_FUA:
        os.fdatasync(h.file)


def flush(h: Connection, flags: int) -> None:  # noqa: ARG001
    """Make all that was written durable."""
    if get_ident() not in h.threads:
        h.keep()
    os.fdatasync(h.file)
