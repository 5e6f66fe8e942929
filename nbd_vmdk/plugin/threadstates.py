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

All those threads share the GIL, which each takes twice a request.  A thread that is woken up to take it may
preempt the one that holds it, find it held, and sleep again.  With the 32 threads of 4 connections a request
took 11 to 29 us of CPU time for that instead of 5.  So where there are many threads they are scheduled as
SCHED_BATCH, which differs in one thing: who wakes up waits for the running thread's turn to end.  With few
threads it gains little, and where other programs fill the CPUs the wait is a loss; there all stays as it is.
"""

import ctypes
import os
import threading
from typing import Final

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


#: Threads known beyond which they are a crowd: those of three connections, by default.
_MANY: Final = 16
#: How this process was told to be scheduled; what is not the usual way is somebody's decision.
_OWN: Final = os.sched_getscheduler(0)


class _Crowd:
    """All connections of this process, and whether their threads are too many to wake each other up."""

    def __init__(self) -> None:
        self.policy = _OWN
        self._able = _OWN == os.SCHED_OTHER
        self._connections: set[KeptStates] = set()
        self._lock = threading.Lock()

    def join(self, connection: "KeptStates") -> None:
        """Note that a connection has one thread more."""
        with self._lock:
            self._connections.add(connection)
            self._judge()

    def leave(self, connection: "KeptStates") -> None:
        """Note that a connection has ended."""
        with self._lock:
            self._connections.discard(connection)
            self._judge()

    def _judge(self) -> None:
        many = sum(connection.count for connection in self._connections) > _MANY
        policy = os.SCHED_BATCH if many else os.SCHED_OTHER
        if self._able and policy != self.policy:
            self.policy = policy
            for connection in self._connections:
                # Each thread comes to keep() once more, and changes its own: by the number of a thread that
                # has just ended another process could be met.
                connection.threads.clear()

    def follow(self) -> None:
        """Have the calling thread scheduled as it should be now."""
        if self._able and os.sched_getscheduler(0) != self.policy:
            try:
                os.sched_setscheduler(0, self.policy, os.sched_param(0))
            except OSError:
                self._able = False  # a sandbox forbids it; all goes on, only slower


_crowd = _Crowd()


class KeptStates:
    """The thread states kept for one connection.

    ``threads`` holds the identities of the threads whose state is kept and that are scheduled as they should
    be; looking a thread up there before each request is all that a request costs.
    """

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self._states: dict[int, int] = {}

    @property
    def count(self) -> int:
        """How many threads have served requests."""
        return len(self._states)

    def keep(self) -> None:
        """Keep the calling thread's state until :meth:`give_back`."""
        thread = threading.get_ident()
        if thread not in self._states:
            _api.PyGILState_Ensure()
            self._states[thread] = _api.PyThreadState_Get()
            _crowd.join(self)
        self.threads.add(thread)  # first: if it is taken out again at once, the thread comes back
        _crowd.follow()

    def give_back(self) -> None:
        """Let go of all kept states; the threads, but for the calling one, must have ended."""
        current = _api.PyThreadState_Get()
        for state in self._states.values():
            if state == current:
                _api.PyGILState_Release(_LOCKED)
            else:
                _api.PyThreadState_Clear(state)
                _api.PyThreadState_Delete(state)
        self._states.clear()
        self.threads.clear()
        _crowd.leave(self)
