"""Work done by several threads, its results taken in order: for whoever reads a disk from front to back."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from nbd_vmdk.ops.copy import default_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Generator[Result, None, None]:
    """What ``work`` returns for each item, in the order of the items.

    At most twice as many results as there are threads are waiting to be taken, so memory is bounded.  Items
    are asked for in the caller's thread.  The first error is raised in its item's turn; then, and when the
    caller stops early, what was not begun is dropped and what was is waited for.
    """
    threads = threads or default_threads()
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, "ahead")
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
