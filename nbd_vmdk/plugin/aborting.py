"""nbdkit's own death: what clients have written is made durable before it.

A client that vanishes with requests under way can make nbdkit 1.32 fail: the first answer that can't be sent
closes the connection's socket, and the next one finds it closed ("raw_send_socket: Assertion `sock >= 0'
failed").  Nothing is wrong with the disks then, and other clients that come back, as QEMU does by itself,
take for written what was acknowledged to them.  So the signal of abort(3) is caught and all disks are
flushed; then it takes its course.  What is acknowledged in the very last moment may be lost all the same.

Only after that assertion: in a process that has damaged its memory nothing is to be written that is in it.
glibc keeps the text of the last assertion for debuggers; without it all is as if this were not there.
"""

import ctypes
import signal
from collections.abc import Callable

#: What nbdkit's assertion says of itself.
_ASSERTION = b"raw_send_socket"

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
#: Whoever is called by C must not be forgotten by Python.
_kept: list[object] = []


def watch(flush: Callable[[], None]) -> None:
    """From now on call ``flush``, on the thread that failed, before this process ends by that assertion."""
    libc = ctypes.CDLL(None)
    try:
        message = ctypes.c_void_p.in_dll(libc, "__abort_msg")
    except ValueError:
        return  # another libc

    def aborted(_number: int) -> None:
        # An unsigned number comes before the text.
        where = message.value
        if where and _ASSERTION in ctypes.string_at(where + ctypes.sizeof(ctypes.c_uint)):
            flush()

    try:
        handler = _Handler(aborted)
    except MemoryError:
        return  # code can't be made where memory is never both written and run, and libffi is an old one
    _kept.append(handler)
    libc.signal.argtypes = (ctypes.c_int, _Handler)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, handler)
