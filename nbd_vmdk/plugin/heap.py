"""How much memory the C library holds on to: told once, when the plugin starts to serve.

Inflated grains are blocks of 64 KiB that many threads take and, much later, others give back.  glibc by
itself keeps a heap for each thread, up to eight a processor, so that what one frees another does not use; and
it returns free memory to the kernel at once, which then has to clear the same pages for the next grain.  With
one heap that is kept, compressed disks with a cache of 64 MiB take 85 MiB at most; with two it was 90 to 125
MiB, as each grows to what it once had to hold.  Nobody waits for the one: grains are taken and given back
under the GIL.  Python takes small objects from pools of its own in any case.
"""

import ctypes
from typing import Final

_HEAPS: Final = 1
_KEPT: Final = 64 << 20

_M_TRIM_THRESHOLD: Final = -1
_M_ARENA_MAX: Final = -8


def keep_freed_memory() -> None:
    """Have freed memory kept for the next grain; does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_ARENA_MAX, _HEAPS)
