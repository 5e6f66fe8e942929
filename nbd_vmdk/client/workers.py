"""Much work, a few at a time."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def each(
    items: AsyncIterator[T] | Iterable[T], width: int, worker: Callable[[], Callable[[T], Awaitable[None]]]
) -> None:
    """Do something with each item, ``width`` at once.  The first error cancels the rest, and is raised.

    ``worker`` is called once for each of those who work side by side, and gives the function that does it:
    what one needs again and again, as a buffer, it makes there.  An item is asked for when somebody is free.
    """
    source = items if isinstance(items, AsyncIterator) else _asynchronous(items)
    turn = asyncio.Lock()

    async def work(do: Callable[[T], Awaitable[None]]) -> None:
        while True:
            async with turn:
                try:
                    item = await anext(source)
                except StopAsyncIteration:
                    return
            await do(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(width):
                group.create_task(work(worker()))
    except BaseExceptionGroup as several:
        # They are in the order in which they happened; what came later came of the cancelling.
        raise several.exceptions[0] from several.exceptions[0].__cause__


async def _asynchronous(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item
