"""The read path built up step by step, so that what each step costs is the difference of two runs.

``step=`` names how much of it is done, each step doing all that stands before it:

noop     nothing: what nbdkit and its Python plugin cost by themselves
kept     the thread's Python state is kept between requests
map      the engine is asked where the bytes are
read     they are read: all that the engine does for a request
asyncio  as read, but by a coroutine on an event loop in another thread, which the request waits for
"""

import asyncio
import os
import sys
import threading
from collections.abc import Callable

import nbdkit

for _folder in (os.environ["NBD_VMDK_SITE"], os.path.dirname(os.path.dirname(os.path.dirname(__file__)))):
    sys.path.insert(0, _folder)

from nbd_vmdk.disk import Disk  # noqa: E402  the path must be set first
from nbd_vmdk.opening import open_disk  # noqa: E402  the path must be set first
from nbd_vmdk.plugin.threadstates import KeptStates  # noqa: E402

API_VERSION = 2

_told: dict[str, str] = {}
_disk: Disk
_loop = asyncio.new_event_loop()


def config(key: str, value: str) -> None:
    """Take file= and step=."""
    _told[key] = value


def get_ready() -> None:
    """Open the image."""
    global _disk
    _disk = open_disk(_told["file"])


def after_fork() -> None:
    """Start the event loop's thread, if it is used."""
    if _told["step"] == "asyncio":
        threading.Thread(target=_loop.run_forever, daemon=True).start()


def thread_model() -> int:
    """Let requests run in parallel."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def open(readonly: bool) -> KeptStates:  # noqa: ARG001
    """Begin a connection."""
    return KeptStates()


def close(h: KeptStates) -> None:
    """End it."""
    h.give_back()


def get_size(h: KeptStates) -> int:  # noqa: ARG001
    """Tell the disk's size."""
    return _disk.size


def can_multi_conn(h: KeptStates) -> bool:  # noqa: ARG001
    """As ours."""
    return True


def _noop(h: KeptStates, buf: memoryview, offset: int, flags: int) -> None:
    pass


def _kept(h: KeptStates, buf: memoryview, offset: int, flags: int) -> None:  # noqa: ARG001
    if threading.get_ident() not in h.threads:
        h.keep()


def _map(h: KeptStates, buf: memoryview, offset: int, flags: int) -> None:  # noqa: ARG001
    if threading.get_ident() not in h.threads:
        h.keep()
    _disk.links[0].map(offset, len(buf))


def _read(h: KeptStates, buf: memoryview, offset: int, flags: int) -> None:  # noqa: ARG001
    if threading.get_ident() not in h.threads:
        h.keep()
    _disk.read_into(buf, offset)


async def _on_loop(buf: memoryview, offset: int) -> None:
    _disk.read_into(buf, offset)


def _hop(h: KeptStates, buf: memoryview, offset: int, flags: int) -> None:  # noqa: ARG001
    if threading.get_ident() not in h.threads:
        h.keep()
    asyncio.run_coroutine_threadsafe(_on_loop(buf, offset), _loop).result()


_STEPS: dict[str, Callable[[KeptStates, memoryview, int, int], None]] = {
    "noop": _noop,
    "kept": _kept,
    "map": _map,
    "read": _read,
    "asyncio": _hop,
}


def config_complete() -> None:
    """Put the step in place of the callback, so that choosing it costs nothing later."""
    globals()["pread"] = _STEPS[_told["step"]]


def pread(h: KeptStates, buf: memoryview, offset: int, flags: int) -> None:
    """Be there when nbdkit looks; config_complete() replaces it."""
    raise NotImplementedError
