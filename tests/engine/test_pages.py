"""Tables in memory: whoever looks one up finds what it holds now, wherever it is kept at the moment."""

from __future__ import annotations

import random
import threading
from array import array

import pytest

from nbd_vmdk.cache import Cache
from nbd_vmdk.pages import DirtyPage, Pages
from tests.memory import MemoryStorage

PAGES, PER_PAGE = 6, 16
PAGE = PER_PAGE * 4


def pages_of(storage: MemoryStorage, cache: Cache) -> Pages:
    return Pages(
        storage,
        cache,
        width=4,
        per_page=PER_PAGE,
        total=PAGES * PER_PAGE,
        locate=lambda page: (page * PAGE,),
    )


def is_right(pages: Pages, model: list[array[int]]) -> None:
    """All places where a page may be looked up agree, and one that is not pinned is as it is in the file."""
    for page, wanted in enumerate(model):
        pinned = pages.pinned.get(page)
        for generation in (pages.clean.young, pages.clean.old):
            kept = generation.get(page)
            assert kept is None or kept is pinned or (pinned is None and kept == wanted), page
        if pinned is None:
            assert pages.storage.read(page * PAGE, PAGE) == pages.encode(wanted)
        assert pages.get(page) == wanted
        assert page not in pages.dirty or pinned is not None


# With the first budget nothing is kept but what stands for zeros; with the last a page stays for long.
@pytest.mark.parametrize("budget", [500, 900, 2000, 1 << 20])
@pytest.mark.parametrize("seed", range(5))
def test_one_page_in_one_place(budget: int, seed: int) -> None:
    """Looking up, changing and commits, as they come, while other things push pages out of the cache."""
    rng = random.Random(seed)
    storage = MemoryStorage(bytes(PAGES * PAGE))
    cache = Cache(budget)
    pages, others = pages_of(storage, cache), cache.part()
    model = [array("I", bytes(PAGE)) for _ in range(PAGES)]
    taken: list[DirtyPage] = []
    for step in range(600):
        page = rng.randrange(PAGES)
        match rng.randrange(5):
            case 0:
                pages.get(page)
            case 1:
                with pages.lock(page):
                    slot = rng.randrange(PER_PAGE)
                    pages.pin(page)[slot] = model[page][slot] = rng.randrange(2)
                    pages.dirty.add(page)
            case 2:
                others.put(step, bytes(rng.randrange(budget // 2)))
            case 3:
                if not taken:
                    pages.take_dirty(taken)
                    assert not pages.dirty
            case _:
                durable = rng.random() < 0.8
                for dirty in taken if durable else ():
                    storage.write(dirty.data, dirty.places[0])
                pages.settle(taken, durable=durable)
                taken = []
        if rng.random() < 0.5:  # looking brings pages into the cache again
            is_right(pages, model)
    assert not pages.empty.count(1), "what stands for all pages of zeros was changed"


def test_pages_of_zeros_stay_as_cheap_as_they_were() -> None:
    """However often they are asked for: they are all one array."""
    cache = Cache(20_000)
    part = cache.part()
    zeros = array("I", bytes(4096))
    for page in range(40):
        part.put(page, zeros, shared=True)
    part.put(40, bytes(2_000))  # the generation is full, and ends
    assert not part.young
    for _ in range(3):
        assert all(part.get(page) is zeros for page in range(40))


def test_nothing_is_pinned_for_ever() -> None:
    storage = MemoryStorage(bytes(PAGES * PAGE))
    pages = pages_of(storage, Cache(1 << 20))
    for page in range(PAGES):
        with pages.lock(page):
            pages.pin(page)[0] = 1
            pages.dirty.add(page)
    taken: list[DirtyPage] = []
    pages.take_dirty(taken)
    pages.settle(taken, durable=False)
    assert len(pages.pinned) == len(pages.dirty) == PAGES
    again: list[DirtyPage] = []
    pages.take_dirty(again)
    assert again == taken
    pages.settle(again, durable=True)
    assert not pages.pinned
    assert not pages.dirty
    # It is in the cache from then on, so the file need not be asked.
    assert [table[0] for table in map(pages.get, range(PAGES)) if table is not None] == [1] * PAGES


def test_changed_by_threads_while_pages_are_pushed_out() -> None:
    """Each thread counts in slots of its own; no step is lost to a page that was read again."""
    storage = MemoryStorage(bytes(PAGES * PAGE))
    cache = Cache(900)
    pages = pages_of(storage, cache)
    steps, threads = 400, 4
    wrong: list[str] = []

    def count(number: int) -> None:
        rng = random.Random(number)
        mine = [0] * PAGES
        for _ in range(steps):
            page = rng.randrange(PAGES)
            with pages.lock(page):
                table = pages.pin(page)
                table[number] += 1
                pages.dirty.add(page)
            mine[page] += 1
            for other, wanted in enumerate(mine):
                found = pages.clean.young.get(other)
                if found is None:
                    found = pages.pinned.get(other)
                looked = [table[number] for table in (found, pages.get(other)) if table is not None]
                if looked.count(wanted) != len(looked):
                    wrong.append(f"{number}: page {other} has {looked}, not {wanted}")

    workers = [threading.Thread(target=count, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        taken: list[DirtyPage] = []
        pages.take_dirty(taken)
        for dirty in taken:
            storage.write(dirty.data, dirty.places[0])
        pages.settle(taken, durable=True)
    for worker in workers:
        worker.join()
    assert not wrong, wrong[:3]
    assert sum(sum(pages.get(page) or ()) for page in range(PAGES)) == steps * threads
