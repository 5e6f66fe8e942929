"""Whether enough file descriptors are left for clients once the disks are open.

A disk of many files keeps one descriptor for each that is written, and for others as long as there are enough
(see storage/lent.py); nbdkit 1.32 has three for each client: its socket and a pipe.  A client for whom there
are too few is accepted and then neither answered nor hung up on (seen with 1.32.5), so it waits without end.
The soft limit has been raised as far as it goes when the images were opened: all that can be done here is to
say so at the start.
"""

import os
import resource
from typing import Final

#: What nbdkit has open for each client.
_EACH: Final = 3
#: What is open now and then besides.
_SPARE: Final = 4
#: Fewer clients than this are few: what one program opens is seldom more.
_FEW: Final = 32


def warn_of_few() -> list[str]:
    """A warning if there are descriptors for few clients only, else nothing."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        return []  # no /proc here: nobody knows
    clients = max(0, soft - used - _SPARE) // _EACH
    if soft == resource.RLIM_INFINITY or clients >= _FEW:
        return []
    room = f"of {soft} file descriptors {used} are taken, so there is room for {clients} clients"
    return [f"{room}; 'ulimit -n', or LimitNOFILE= in a unit, gives more"]
