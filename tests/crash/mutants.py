"""Engines with two steps swapped, or one left out: what the judge must find out about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from nbd_vmdk.commit import Committer
from nbd_vmdk.disk import Disk
from nbd_vmdk.extents.cowd import CowdExtent
from nbd_vmdk.extents.writing import WritableSparseExtent
from nbd_vmdk.pages import DirtyPage, Pages
from nbd_vmdk.storage.base import Storage

RIGHT = "take-and-flag data write sync release"


def _commit_in(order: str) -> Callable[[Committer], None]:
    """A commit that takes the engine's own steps in another order."""

    def commit(self: Committer) -> None:
        self.check()
        if not any(member.touched or any(t.dirty for t in member.tables) for member in self._members):
            return
        freed = [(member, member.take_freed()) for member in self._members]
        taken: list[tuple[Pages, list[DirtyPage]]] = []
        written: list[Storage] = []

        def flag() -> None:
            for member in self._members:
                if any(pages.dirty for pages in member.tables):
                    member.announce()

        def take() -> None:
            for member in self._members:
                self._take(member, taken)

        def take_and_flag() -> None:
            for member in self._members:
                if self._take(member, taken):
                    member.announce()

        def write() -> None:
            written.extend(self._write_tables(pages, dirty) for pages, dirty in taken)

        def flag_all() -> None:
            for member in self._members:
                member.announce()

        def flags_alone() -> None:
            with patch.object(CowdExtent, "announce", _without_free_sector):
                flag()

        def data() -> None:
            self._sync_data([member for member in self._members if member.touched])

        def data_without_cid() -> None:
            with patch.object(self, "_announce", lambda: None):
                data()

        def release() -> None:
            self.releases += 1
            for member, positions in freed:
                member.release(positions)

        steps: dict[str, Callable[[], Any]] = {
            "flag": flag,
            "all-flags": flag_all,
            "flags-alone": flags_alone,
            "take": take,
            "take-and-flag": take_and_flag,
            "data": data,
            "data-without-cid": data_without_cid,
            "write": write,
            "sync": lambda: self._sync(written),
            "sync-members": lambda: self._sync([member.storage for member in self._members]),
            "release": release,
            "late-cid": lambda: self._sync([self._announce()]),
        }
        durable = False
        try:
            for step in order.split():
                steps[step]()
            durable = True
        finally:
            for pages, dirty in taken:
                pages.settle(dirty, durable=durable)

    return commit


def _reuse_at_once(self: WritableSparseExtent, *args: Any, **keywords: Any) -> bool:
    before = len(self.freed)
    done = _zero_piece(self, *args, **keywords)
    freed = self.freed[before:]
    del self.freed[before:]
    self.release(freed)
    return done


_zero_piece = WritableSparseExtent._zero_piece


def _close_early(self: Disk) -> None:
    """The flag falls before the last commit is made."""
    for extent in self._members:
        extent.finish()
    _close(self)


_close = Disk.close


def _write_without_fua(self: Disk, buf: bytes, offset: int, *, fua: bool = False) -> None:
    _pwrite(self, buf, offset)


_pwrite = Disk.pwrite


def _wrong_twin(self: Committer, pages: Pages, dirty: list[DirtyPage]) -> Storage:
    """The twins of the tables are not written."""
    for page in dirty:
        pages.storage.write(page.data, page.places[0])
    return pages.storage


def _without_free_sector(self: CowdExtent) -> None:
    """Only the flag is set."""
    WritableSparseExtent.announce(self)


#: Bytes that are not what they must be, or a grain that is not even in the file.
LOST = ("guest byte", "no grain can be there")
FLAG = ("unclean flag is not set",)
FREE = ("is lower than what is used",)

#: The attribute of the engine that each replaces, and what the judge says of it.
MUTANTS: dict[str, tuple[type, str, Any, tuple[str, ...]]] = {
    "tables are written before the data is durable": (
        Committer,
        "_commit",
        _commit_in("flag take write data sync release"),
        LOST,
    ),
    "tables are copied after the data is durable": (
        Committer,
        "_commit",
        _commit_in("all-flags data take write sync release"),
        LOST,
    ),
    "grains are released before the tables are durable": (
        Committer,
        "_commit",
        _commit_in("flag take data release write sync"),
        LOST,
    ),
    "the content ID changes last": (
        Committer,
        "_commit",
        _commit_in("flag take data-without-cid write sync release late-cid"),
        ("the content ID is what it was",),
    ),
    "the unclean flag is set last": (
        Committer,
        "_commit",
        _commit_in("take data write sync release all-flags sync-members"),
        FLAG,
    ),
    "tables are not synced": (Committer, "_commit", _commit_in("flag take data write release"), LOST),
    "freed grains are reused at once": (WritableSparseExtent, "_zero_piece", _reuse_at_once, LOST),
    "the unclean flag falls before the last commit": (Disk, "close", _close_early, FLAG),
    "FUA is forgotten": (Disk, "pwrite", _write_without_fua, LOST),
    "twins are not written": (Committer, "_write_tables", _wrong_twin, LOST),
    "freeSector is not kept": (CowdExtent, "announce", _without_free_sector, FREE),
    "freeSector is written last": (
        Committer,
        "_commit",
        _commit_in("flags-alone take data write sync release all-flags sync-members"),
        FREE,
    ),
}
#: What can only be seen in one sort of extents.
HOSTED_ONLY = {"twins are not written"}
COWD_ONLY = {"freeSector is not kept", "freeSector is written last"}


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """Make the engine the mutant of this name."""
    owner, attribute, replacement, _found = MUTANTS[name]
    with patch.object(owner, attribute, replacement):
        yield


@contextmanager
def rebuilt() -> Iterator[None]:
    """The engine's commit put together as the mutants are, its steps in the right order."""
    with patch.object(Committer, "_commit", _commit_in(RIGHT)):
        yield
