"""Keeping nbdkit's worker threads known to Python between requests, and giving them back.

nbdkit's threads are not Python threads.  For each request its Python plugin calls PyGILState_Ensure, which
builds a whole PyThreadState (with a frame stack from mmap) where the thread has none, and PyGILState_Release,
which tears it down again.  One PyGILState_Ensure more, made inside the first callback on a thread, keeps the
state alive: 346 instead of 105 thousand requests a second at depth 16 for a plugin that does nothing, on
2 cores with CPython 3.11 (``python -m benchmarks.profile_read`` measures it).

A state that is kept must be given back, or each connection leaks one per worker.  nbdkit joins a
connection's workers before it calls close(), so there the states that were noted for the connection belong
to threads that are gone, and are cleared and deleted.  The state of the thread that runs close() itself,
which served the requests where nbdkit was started with one thread, is not deleted: its extra Ensure is taken
back, and nbdkit's own Release then tears it down.
"""

import ctypes
import threading

_api = ctypes.pythonapi
_api.PyGILState_Ensure.restype = ctypes.c_int
_api.PyGILState_Release.argtypes = [ctypes.c_int]
_api.PyGILState_Release.restype = None
_api.PyThreadState_Get.restype = ctypes.c_void_p
_api.PyThreadState_Clear.argtypes = [ctypes.c_void_p]
_api.PyThreadState_Clear.restype = None
_api.PyThreadState_Delete.argtypes = [ctypes.c_void_p]
_api.PyThreadState_Delete.restype = None

#: PyGILState_LOCKED: the caller held the GIL before its Ensure.
_LOCKED = 0


class KeptStates:
    """The thread states kept for one connection.

    ``threads`` holds the identities of the threads whose state is kept; looking a thread up there before each
    request is all that a request costs.
    """

    def __init__(self) -> None:
        self.threads: dict[int, int] = {}

    def keep(self) -> None:
        """Keep the calling thread's state until :meth:`give_back`."""
        _api.PyGILState_Ensure()
        self.threads[threading.get_ident()] = _api.PyThreadState_Get()

    def give_back(self) -> None:
        """Let go of all kept states; the threads, but for the calling one, must have ended."""
        current = _api.PyThreadState_Get()
        for state in self.threads.values():
            if state == current:
                _api.PyGILState_Release(_LOCKED)
            else:
                _api.PyThreadState_Clear(state)
                _api.PyThreadState_Delete(state)
        self.threads.clear()
