"""What a flush promises: orders of writes and syncs, errors on the way, what a power cut leaves behind."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nbd_vmdk import Disk, VmdkError, commit
from nbd_vmdk.errors import Latched, StorageError
from nbd_vmdk.opening import open_in
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.pages import Pages
from tests.engine import same
from tests.images import desc
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image
from tests.order import check_order, cid_of
from tests.recording import Event, RecordingFolder
from tests.sound import check_tables, parse_tables

GRAIN = 64 * KIB
Case = tuple[RecordingFolder, Disk]


@pytest.fixture
def make(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Case]]:
    """Load an image into memory and open it; no commit comes by time unless a test wants it."""
    monkeypatch.setattr(commit, "_MAX_AGE", 3600.0)
    disks: list[Disk] = []

    def made(image: Image | None = None, **options: Any) -> Case:
        if image is None:
            image = sparse(str(tmp_path))
        folder = RecordingFolder.load(str(tmp_path))
        disk = reopen(folder, **options)
        disks.append(disk)
        return folder, disk

    yield made
    for disk in disks:
        try:
            disk.close()
        except VmdkError:
            pass


def pending(disk: Disk) -> bool:
    """Something was written that no commit has made durable yet."""
    members = disk._committer._members
    return any(member.touched or member.freed or any(t.dirty for t in member.tables) for member in members)


def reopen(folder: RecordingFolder, name: str = "top.vmdk", **options: Any) -> Disk:
    return open_in(folder, name, OpenOptions(**{"writable": True, **options}))


def sparse(folder: str, size: int = 4 * MIB, **options: Any) -> Image:
    """An image whose first grains hold data, which can be overwritten."""
    content = Content(size).put(0, random.Random(1).randbytes(3 * GRAIN))
    return desc.monolithic_sparse(folder, "top", content, **options)


def split(folder: str, **options: Any) -> Image:
    content = Content(4 * MIB).put(0, b"\1" * GRAIN).put(2 * MIB, b"\2" * GRAIN)
    return desc.split_sparse(folder, "top", content, MIB // SECTOR, **options)


def fault(number: int, when: Callable[[Event], bool]) -> Callable[[Event], None]:
    """Make calls fail with an errno."""

    def before(event: Event) -> None:
        if when(event):
            raise OSError(number, "on purpose")

    return before


def is_table(folder: RecordingFolder, name: str = "top.vmdk") -> Callable[[Event], bool]:
    """Whether an event writes a table or a directory that is there from the start."""
    tables = parse_tables(folder.log.initial[name])
    end = tables.header.overhead * SECTOR

    def asked(event: Event) -> bool:
        return (
            event.op == "write" and event.file == name and event.length > 4 and 21 * SECTOR <= event.at < end
        )

    return asked


@contextmanager
def only(folder: RecordingFolder) -> Iterator[list[Event]]:
    """The events of a block of code."""
    begin = len(folder.log.events)
    found: list[Event] = []
    yield found
    found += folder.log.since(begin)


def ops(events: list[Event]) -> list[str]:
    return [event.op for event in events]


def fails(call: Callable[[], None], number: int) -> VmdkError:
    with pytest.raises(VmdkError) as caught:
        call()
    assert caught.value.errno == number
    return caught.value


def outcome(call: Callable[[], None]) -> int:
    """The errno that a call fails with, 0 if it succeeds."""
    try:
        call()
    except VmdkError as error:
        return error.errno
    return 0


# The order of one flush.


def test_new_grain_data_then_tables(make: Callable[..., Case]) -> None:
    folder, disk = make()
    disk.pwrite(b"x" * GRAIN, MIB)
    with only(folder) as events:
        disk.flush()
    # Flag, content ID, long content ID; sync; table, twin; sync.
    assert ops(events) == ["write", "write", "write", "sync", "write", "write", "sync"]
    assert [event.length for event in events] == [1, 8, 8, 0, 2048, 2048, 0]
    assert check_order(folder, "top.vmdk") == 2


def test_second_flush_announces_nothing(make: Callable[..., Case]) -> None:
    folder, disk = make()
    disk.pwrite(b"x", MIB, fua=True)
    disk.pwrite(b"y" * 5, 2 * MIB)
    with only(folder) as events:
        disk.flush()
    assert ops(events) == ["sync", "write", "write", "sync"]


def test_many_grains_of_a_table_cost_one_write_of_it(make: Callable[..., Case]) -> None:
    folder, disk = make()
    for at in range(GRAIN * 3, 4 * MIB, GRAIN):
        disk.pwrite(b"z" * 512, at)
    with only(folder) as events:
        disk.flush()
    assert ops(events)[-4:] == ["sync", "write", "write", "sync"]
    assert folder.log.count("sync") == 2


def test_idle_flush_does_nothing(make: Callable[..., Case]) -> None:
    folder, disk = make()
    with only(folder) as events:
        disk.flush()
    assert not events
    disk.pwrite(b"x", 0)
    disk.flush()
    with only(folder) as events:
        disk.flush()
        disk.flush()
    assert not events


@pytest.mark.parametrize("kind", ["sparse", "flat", "split"])
def test_overwrites_cost_one_sync(make: Callable[..., Case], tmp_path: Any, kind: str) -> None:
    makers: dict[str, Callable[[], Image]] = {
        "sparse": lambda: sparse(str(tmp_path)),
        "flat": lambda: desc.monolithic_flat(str(tmp_path), "top", Content(MIB)),
        "split": lambda: split(str(tmp_path)),
    }
    folder, disk = make(makers[kind]())
    disk.pwrite(b"first", 0, fua=True)
    with only(folder) as events:
        disk.pwrite(b"again", 5)
        disk.flush()
    assert ops(events) == ["write", "sync"]
    assert cid_of(folder.content("top.vmdk")) != cid_of(folder.log.initial["top.vmdk"])


def test_first_overwrite_changes_the_content_id_and_no_flag(make: Callable[..., Case]) -> None:
    folder, disk = make()
    with only(folder) as events:
        disk.pwrite(b"x", 0, fua=True)
    assert [(event.op, event.length) for event in events] == [
        ("write", 1),
        ("write", 8),
        ("write", 8),
        ("sync", 0),
    ]
    assert folder.content("top.vmdk")[72] == 0


def test_flush_syncs_every_file_written_to_and_no_other(make: Callable[..., Case], tmp_path: Any) -> None:
    folder, disk = make(split(str(tmp_path)))
    disk.pwrite(b"x", 0, fua=True)
    disk.pwrite(b"y" * (MIB + 5), 2 * MIB - 3)  # three extents
    with only(folder) as events:
        disk.flush()
    files = ["top-s002.vmdk", "top-s003.vmdk", "top-s004.vmdk"]
    syncs = [event.file for event in events if event.op == "sync"]
    assert sorted(syncs) == sorted(files * 2)
    check_order(folder, "top.vmdk")


@pytest.mark.parametrize("change", ["trim", "zero", "hide", "new table"])
def test_changes_without_data_keep_the_order(make: Callable[..., Case], tmp_path: Any, change: str) -> None:
    """Only tables change, in an extent whose descriptor is another file."""
    options: dict[str, Any] = {}
    if change in ("hide", "new table"):
        below = desc.monolithic_flat(str(tmp_path), "base", Content.of(b"\7" * (4 * MIB)))
        options = {"parent": below, "zero_gte": True, "preallocate_tables": change == "hide", "gtes": 16}
    folder, disk = make(split(str(tmp_path), **options))
    calls: dict[str, Callable[[], None]] = {
        "trim": lambda: disk.trim(GRAIN, 0),
        "zero": lambda: disk.zero(GRAIN, 0, may_trim=True),
        "hide": lambda: disk.zero(GRAIN, MIB),
        "new table": lambda: disk.zero(GRAIN, MIB),
    }
    calls[change]()
    disk.flush()
    assert check_order(folder, "top.vmdk") >= 2
    disk.close()
    check_order(folder, "top.vmdk")


def test_new_tables_are_named_when_the_file_is_durably_so_long(
    make: Callable[..., Case], tmp_path: Any
) -> None:
    """Nothing but tables makes the file longer, by more than it grows in one step."""
    below = desc.monolithic_flat(str(tmp_path), "base", Content.of(b"\7" * 32 * MIB))
    options: dict[str, Any] = {"grain_sectors": 1, "zero_gte": True, "preallocate_tables": False}
    folder, disk = make(
        desc.monolithic_sparse(str(tmp_path), "top", Content(32 * MIB), parent=below, **options)
    )
    disk.pwrite(b"x", 0, fua=True)
    size = len(folder.content("top.vmdk"))
    for at in range(MIB, 30 * MIB, 256 * KIB):
        disk.zero(SECTOR, at)
    assert len(folder.content("top.vmdk")) > size
    disk.flush()
    check_order(folder, "top.vmdk")


def test_extent_that_joins_during_a_commit_is_announced_first(
    make: Callable[..., Case], tmp_path: Any
) -> None:
    """While a commit announces one extent, another gets its first new grain."""
    folder, disk = make(split(str(tmp_path)))
    disk.pwrite(b"x" * GRAIN, 3 * MIB)

    def before(event: Event) -> None:
        folder.log.before = None
        disk.pwrite(b"late" * 100, MIB)

    folder.log.before = before
    disk.flush()
    disk.flush()
    check_order(folder, "top.vmdk")


def test_fua_makes_durable_what_it_wrote(make: Callable[..., Case]) -> None:
    folder, disk = make()
    for call in (
        lambda: disk.pwrite(b"x" * 700, MIB + 5, fua=True),
        lambda: disk.zero(100, 7, fua=True),
        lambda: disk.zero(GRAIN, MIB, may_trim=True, fua=True),
        lambda: disk.trim(GRAIN, 2 * GRAIN, fua=True),
    ):
        call()
        cut = len(folder.log.events)
        left = [event for event in folder.log.undecided(cut) if event.op != "punch"]
        assert not left
    check_order(folder, "top.vmdk")


# Many at once.


def test_flushes_share_a_commit(make: Callable[..., Case]) -> None:
    folder, disk = make()
    entered, go = threading.Event(), threading.Event()

    def before(event: Event) -> None:
        if event.op == "sync" and not entered.is_set():
            entered.set()
            assert go.wait(10)

    folder.log.before = before
    disk.pwrite(b"0" * GRAIN, 3 * GRAIN)
    first = threading.Thread(target=disk.flush)
    first.start()
    assert entered.wait(10)
    arrived = threading.Barrier(17)

    def late(number: int) -> None:
        disk.pwrite(b"1" * GRAIN, (4 + number) * GRAIN)
        arrived.wait()
        disk.flush()
        same(folder.log.state(len(folder.log.events)).get("top.vmdk", b"")[:4], b"KDMV")
        done.append([event for event in folder.log.undecided(len(folder.log.events)) if event.op != "punch"])

    done: list[list[Event]] = []
    threads = [threading.Thread(target=late, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    arrived.wait()
    time.sleep(0.1)  # all 16 are in flush, which none may leave before a commit of their own
    assert not done
    go.set()
    for thread in [first, *threads]:
        thread.join()
    # One commit before, one for all that came meanwhile.
    assert folder.log.count("sync") == 4
    assert done == [[]] * 16
    check_order(folder, "top.vmdk")


def test_who_shares_a_failed_commit_is_told(make: Callable[..., Case]) -> None:
    """Also if the next commit fails before he wakes up."""
    folder, disk = make()
    disk.pwrite(b"x", 0, fua=True)
    folder.log.before = fault(errno.ENOSPC, is_table(folder))
    results: list[int] = []

    def work(number: int) -> None:
        for turn in range(5):
            disk.pwrite(b"1", (4 + number) * GRAIN + turn)
            results.append(outcome(disk.flush))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [errno.ENOSPC] * 40
    folder.log.before = None
    disk.flush()
    check_order(folder, "top.vmdk")


def test_failure_of_a_later_commit_is_nothing_to_whom_one_has_served(make: Callable[..., Case]) -> None:
    """Locks are not fair: who waits may have his turn after two commits, of which the second fails."""
    folder, disk = make()
    turn = disk._committer._turn
    waits, go = threading.Event(), threading.Event()

    class Turn:
        def __enter__(self) -> None:
            if threading.current_thread() is thread:
                waits.set()
                assert go.wait(10)
            turn.acquire()

        def __exit__(self, *_: object) -> None:
            turn.release()

    disk._committer._turn = Turn()
    disk.pwrite(b"x", MIB)
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(outcome(disk.flush)))
    thread.start()
    assert waits.wait(10)
    disk.flush()
    folder.log.before = fault(errno.ENOSPC, is_table(folder))
    disk.pwrite(b"y", 2 * MIB)
    fails(disk.flush, errno.ENOSPC)
    go.set()
    thread.join()
    assert results == [0]


@pytest.mark.parametrize("failing", [("write",), ("write", "punch")])
def test_failed_write_alone_changes_no_content_id(
    make: Callable[..., Case], failing: tuple[str, ...]
) -> None:
    """Its grain is given back, now or with the next commit, but no child of the disk need notice."""
    folder, disk = make()
    size = len(folder.log.initial["top.vmdk"])
    folder.log.before = fault(errno.ENOSPC, lambda event: event.op in failing and event.at >= size)
    with only(folder) as events:
        fails(lambda: disk.pwrite(b"x", MIB), errno.ENOSPC)
        assert disk._members[0].holds_more is ("punch" in failing)
        folder.log.before = None
        disk.flush()
    assert ops(events) == ["truncate", "punch"]
    disk.pwrite(b"x", 0, fua=True)
    assert cid_of(folder.content("top.vmdk")) != cid_of(folder.log.initial["top.vmdk"])


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("lacking", ["edit_tables", "edit_redundant"])
def test_writing_over_data_mends_no_directory(
    make: Callable[..., Case], tmp_path: Any, lacking: str, at_once: bool
) -> None:
    """A second place for a table is made where the table is to be changed: data alone needs no space."""

    def forget(directory: list[int], _tables: Any) -> None:
        directory[0] = 0

    own = Content(4 * MIB).put(0, b"full" * (GRAIN // 2))
    options: dict[str, Any] = {lacking: forget}
    folder, disk = make(desc.monolithic_sparse(str(tmp_path), "top", own, gtes=16, **options))
    if at_once:
        disk.pread(SECTOR, 0)
    with only(folder) as events:
        disk.pwrite(b"x" * SECTOR, GRAIN)
    assert ops(events) == ["write"]


def test_commit_that_dies_of_a_bug_is_no_success_for_others(make: Callable[..., Case], tmp_path: Any) -> None:
    folder, disk = make(split(str(tmp_path)))
    entered, go = threading.Event(), threading.Event()

    def before(event: Event) -> None:
        if event.op == "sync":
            entered.set()
            assert go.wait(10)
            raise MemoryError

    disk.pwrite(b"x", MIB)
    folder.log.before = before
    outcomes: list[str] = []

    def flush() -> None:
        try:
            disk.flush()
        except MemoryError:
            outcomes.append("died")
        else:
            outcomes.append("done")

    threads = [threading.Thread(target=flush) for _ in range(4)]
    threads[0].start()
    assert entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.05)
    go.set()
    for thread in threads:
        thread.join()
    assert outcomes == ["died"] * 4
    folder.log.before = None
    disk.flush()
    assert not folder.log.undecided(len(folder.log.events))
    check_order(folder, "top.vmdk")


def test_order_holds_with_many_writers(make: Callable[..., Case], tmp_path: Any) -> None:
    below = desc.monolithic_flat(str(tmp_path), "base", Content.of(b"\7" * (2 * MIB)))
    options: dict[str, Any] = {"grain_sectors": 8, "gtes": 16, "zero_gte": True, "preallocate_tables": False}
    folder, disk = make(
        desc.split_sparse(str(tmp_path), "top", Content(2 * MIB), MIB // SECTOR, parent=below, **options)
    )

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            offset = rng.randrange(2 * MIB - 20 * KIB)
            length = rng.randrange(1, 20 * KIB)
            match rng.randrange(8):
                case 0:
                    disk.flush()
                case 1:
                    disk.trim(length, offset)
                case 2:
                    disk.zero(length, offset, may_trim=bool(seed % 2))
                case _:
                    disk.pwrite(bytes([seed + 1]) * length, offset, fua=rng.random() < 0.1)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    disk.close()
    assert check_order(folder, "top.vmdk", alone=False) > 100
    for name in ("top-s001.vmdk", "top-s002.vmdk"):
        check_tables(parse_tables(folder.content(name)))


# Errors.


def test_no_space_for_data(make: Callable[..., Case]) -> None:
    folder, disk = make()
    folder.log.before = fault(errno.ENOSPC, lambda event: event.op == "write")
    error = fails(lambda: disk.pwrite(b"x" * GRAIN, MIB), errno.ENOSPC)
    assert isinstance(error, StorageError)
    same(disk.pread(GRAIN, MIB), bytes(GRAIN))
    folder.log.before = None
    disk.flush()
    assert not pending(disk)  # nothing of the failed write is left to do
    disk.pwrite(b"y" * 10, MIB + 1)
    disk.close()
    check_order(folder, "top.vmdk")
    check_tables(parse_tables(folder.content("top.vmdk")))
    with reopen(folder, writable=False) as again:
        same(again.pread(12, MIB), b"\0" + b"y" * 10 + b"\0")


def test_no_room_to_grow(make: Callable[..., Case]) -> None:
    """A file may not get as long as a whole step, but one grain still fits."""
    folder, disk = make()
    limit = len(folder.log.initial["top.vmdk"]) + GRAIN
    folder.log.before = fault(errno.EFBIG, lambda event: event.op == "truncate" and event.at > limit)
    disk.pwrite(b"x" * GRAIN, MIB)
    fails(lambda: disk.pwrite(b"x" * GRAIN, 2 * MIB), errno.ENOSPC)
    disk.close()
    check_order(folder, "top.vmdk")
    assert len(folder.content("top.vmdk")) == limit


@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_space_for_tables(make: Callable[..., Case], which: int) -> None:
    """The flush fails, nothing is lost, and the next one does it all."""
    folder, disk = make()
    asked = is_table(folder)
    seen: list[Event] = []

    def before(event: Event) -> None:
        if asked(event):
            seen.append(event)
            if len(seen) == which + 1 or which == 2:
                raise OSError(errno.ENOSPC, "on purpose")

    disk.pwrite(b"x" * GRAIN, MIB)
    folder.log.before = before
    fails(disk.flush, errno.ENOSPC)
    same(disk.pread(GRAIN, MIB), b"x" * GRAIN)
    disk.pwrite(b"y" * GRAIN, 2 * MIB)  # goes on
    if which == 2:
        fails(disk.flush, errno.ENOSPC)
        folder.log.before = None
    disk.flush()
    assert not folder.log.undecided(len(folder.log.events))
    disk.close()
    check_order(folder, "top.vmdk")
    check_tables(parse_tables(folder.content("top.vmdk")))
    with reopen(folder, writable=False) as again:
        same(again.pread(GRAIN, MIB), b"x" * GRAIN)
        same(again.pread(GRAIN, 2 * MIB), b"y" * GRAIN)


def test_no_space_for_the_second_of_two_new_tables(make: Callable[..., Case], tmp_path: Any) -> None:
    """A table must not be left without its twin."""
    folder, disk = make(sparse(str(tmp_path), gtes=512, grain_sectors=1, preallocate_tables=False))
    # Tables lie in room of 4 grains each; fail the growing for one of them.
    for fail_at in (1, 2):
        calls: list[Event] = []

        def before(event: Event, calls: list[Event] = calls, fail_at: int = fail_at) -> None:
            if event.op == "truncate":
                calls.append(event)
                if len(calls) >= fail_at:
                    raise OSError(errno.ENOSPC, "on purpose")

        folder.log.before = before
        for at in range(MIB * fail_at, MIB * fail_at + MIB, 256 * KIB):
            assert outcome(lambda at=at: disk.pwrite(b"x" * 200 * KIB, at)) in (0, errno.ENOSPC)
        folder.log.before = None
        disk.flush()
    disk.close()
    check_order(folder, "top.vmdk")
    check_tables(parse_tables(folder.content("top.vmdk")))


@pytest.mark.parametrize("good", range(6))
def test_directory_that_cannot_be_read_loses_nothing(
    make: Callable[..., Case], tmp_path: Any, good: int
) -> None:
    """With a cache that keeps nothing, a commit reads directories again; if that fails it can be repeated."""
    folder, disk = make(sparse(str(tmp_path), gtes=16), cache_size=1)
    for at in (MIB, 2 * MIB, 3 * MIB):
        disk.pwrite(b"x" * GRAIN, at)
    reads: list[int] = []

    def reading(file: str, at: int, length: int) -> None:
        reads.append(at)
        if len(reads) > good:
            raise OSError(errno.EIO, "on purpose")

    folder.log.reading = reading
    assert outcome(disk.flush) == (errno.EIO if len(reads) > good else 0)
    folder.log.reading = None
    disk.flush()
    disk.close()
    check_order(folder, "top.vmdk")
    with reopen(folder, writable=False) as again:
        for at in (MIB, 2 * MIB, 3 * MIB):
            same(again.pread(GRAIN, at), b"x" * GRAIN)


@pytest.mark.parametrize("first", [True, False])
def test_failed_sync_latches(make: Callable[..., Case], first: bool) -> None:
    """The first sync of a flush or the second: nothing is promised any more, whatever comes."""
    folder, disk = make()
    syncs: list[Event] = []

    def before(event: Event) -> None:
        if event.op == "sync":
            syncs.append(event)
            if len(syncs) == (1 if first else 2):
                raise OSError(errno.EIO, "on purpose")

    folder.log.before = before
    disk.pwrite(b"x" * GRAIN, MIB)
    fails(disk.flush, errno.EIO)
    calls: list[Callable[[], None]] = [
        disk.flush,
        lambda: disk.pwrite(b"y", 0),
        lambda: disk.pwrite(b"y", 0, fua=True),
        lambda: disk.zero(1, 0),
        lambda: disk.trim(1, 0),
        disk.flush,
    ]
    for call in calls:
        assert isinstance(fails(call, errno.EIO), Latched)
    same(disk.pread(GRAIN, MIB), b"x" * GRAIN)
    with pytest.raises(Latched):
        disk.close()
    assert len(syncs) == (1 if first else 2)
    assert folder.content("top.vmdk")[72] == 1, "the image is not cleanly closed"


def test_failed_sync_is_told_to_all_who_wait(make: Callable[..., Case]) -> None:
    folder, disk = make()
    folder.log.before = fault(errno.EIO, lambda event: event.op == "sync")
    disk.pwrite(b"x", MIB)
    outcomes: list[int] = []

    def flush() -> None:
        outcomes.append(fails(disk.flush, errno.EIO).errno)

    threads = [threading.Thread(target=flush) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [errno.EIO] * 8


def test_space_that_cannot_be_given_back_is_no_error(make: Callable[..., Case], caplog: Any) -> None:
    folder, disk = make()
    folder.log.before = fault(errno.EIO, lambda event: event.op == "punch")
    disk.trim(GRAIN, 0)
    disk.flush()
    assert "not given back" in caplog.text
    same(disk.pread(GRAIN, 0), bytes(GRAIN))
    assert not disk._committer._freed


# Space that is used again.


def test_freed_space_is_used_again_when_that_is_durable(make: Callable[..., Case]) -> None:
    folder, disk = make()
    size = len(folder.log.initial["top.vmdk"])
    at = parse_tables(folder.log.initial["top.vmdk"]).grains[1]
    disk.trim(GRAIN, GRAIN)
    disk.pwrite(b"early", MIB)  # before the commit: other space
    disk.flush()
    with only(folder) as events:
        disk.pwrite(b"late", 2 * MIB + 100)
    assert [event.at for event in events] == [at + 100]
    same(disk.pread(GRAIN, 2 * MIB), bytes(100) + b"late" + bytes(GRAIN - 104))
    disk.close()
    assert len(folder.content("top.vmdk")) == size + GRAIN
    check_order(folder, "top.vmdk")
    check_tables(parse_tables(folder.content("top.vmdk")))


def stopped(
    folder: RecordingFolder, at: int, work: Callable[[], None]
) -> tuple[threading.Thread, threading.Event]:
    """Run something in a thread until it writes to a place in a file; an event lets it go on."""
    there, go = threading.Event(), threading.Event()

    def before(event: Event) -> None:
        if event.op == "write" and event.at == at and threading.current_thread() is thread:
            there.set()
            assert go.wait(10)

    folder.log.before = before
    thread = threading.Thread(target=work)
    thread.start()
    assert there.wait(10)
    return thread, go


@pytest.mark.parametrize("at_once", [False, True])
def test_writer_that_comes_too_late_harms_nobody(make: Callable[..., Case], at_once: bool) -> None:
    """He has looked up a grain that is freed, durably, before he writes to it."""
    folder, disk = make()
    if at_once:
        disk.pread(SECTOR, 0)  # brings the table into memory
    at = parse_tables(folder.log.initial["top.vmdk"]).grains[1]
    thread, go = stopped(folder, at + 512, lambda: disk.pwrite(b"late" * 100, GRAIN + 512))
    disk.trim(GRAIN, GRAIN, fua=True)
    # While he is on his way nobody gets the space; afterwards it is zeros again.
    disk.pwrite(b"new", MIB)
    go.set()
    thread.join()
    for number in range(1, 5):
        disk.pwrite(b"new", MIB + number * GRAIN)
    for number in range(5):
        same(disk.pread(GRAIN, MIB + number * GRAIN), b"new" + bytes(GRAIN - 3))
    assert not any(disk.pread(GRAIN, GRAIN))
    disk.close()
    tables = parse_tables(folder.content("top.vmdk"))
    check_tables(tables)
    assert at in tables.grains.values(), "the space was not used again, so this proves nothing"


def test_reader_that_comes_too_late_sees_no_other_grain(make: Callable[..., Case]) -> None:
    """He has looked up a grain that is freed and given to others before he reads it."""
    folder, disk = make()
    at = parse_tables(folder.log.initial["top.vmdk"]).grains[1]
    there, go = threading.Event(), threading.Event()
    found: list[bytes] = []

    def reading(file: str, where: int, length: int) -> None:
        if where == at and threading.current_thread() is thread and not there.is_set():
            there.set()
            assert go.wait(10)

    folder.log.reading = reading
    thread = threading.Thread(target=lambda: found.append(disk.pread(GRAIN, GRAIN)))
    thread.start()
    assert there.wait(10)
    disk.trim(GRAIN, GRAIN, fua=True)
    disk.pwrite(b"secret" * 1000, MIB)
    go.set()
    thread.join()
    assert parse_tables_now(disk, folder)[MIB // GRAIN] == at, "the space was not used again"
    same(found[0], bytes(GRAIN))


def parse_tables_now(disk: Disk, folder: RecordingFolder) -> dict[int, int]:
    disk.flush()
    return parse_tables(folder.content("top.vmdk")).grains


@pytest.mark.parametrize("ready", [False, True])
def test_writes_that_fail_for_ever_take_nothing(make: Callable[..., Case], ready: bool) -> None:
    """A guest that tries again and again takes no memory by that, and no space, though it never flushes."""
    folder, disk = make()
    member = disk._members[0]
    size = len(folder.log.initial["top.vmdk"])
    if ready:
        disk.pwrite(b"y", MIB)
    held = member.held
    folder.log.before = fault(errno.ENOSPC, lambda event: event.op == "write")
    for turn in range(50):
        for length in (100, GRAIN, 3 * GRAIN):
            fails(lambda at=turn % 5 * GRAIN, n=length: disk.pwrite(b"x" * n, 2 * MIB + at), errno.ENOSPC)
    assert member.held == held
    folder.log.before = None
    for turn in range(3):
        disk.pwrite(b"z", 2 * MIB + turn * GRAIN)
        same(disk.pread(GRAIN, 2 * MIB + turn * GRAIN), b"z" + bytes(GRAIN - 1))
    disk.close()
    assert len(folder.content("top.vmdk")) == size + (3 + ready) * GRAIN
    check_order(folder, "top.vmdk")
    check_tables(parse_tables(folder.content("top.vmdk")))


@pytest.mark.parametrize("ready", [False, True])
def test_table_that_cannot_be_read_again(make: Callable[..., Case], ready: bool) -> None:
    """The cache forgets it while the new grain is written: that is given back, too."""
    folder, disk = make()
    tables = disk._members[0].tables[0]
    assert isinstance(tables, Pages)
    if ready:
        disk.pwrite(b"y", MIB, fua=True)
    disk.pread(1, MIB)

    def forget(event: Event) -> None:
        if event.op == "write" and event.length == 100:
            tables.clean.drop(0)
            folder.log.reading = failing

    def failing(_file: str, _at: int, _length: int) -> None:
        raise OSError(errno.EIO, "on purpose")

    folder.log.before = forget
    for _ in range(3):
        fails(lambda: disk.pwrite(b"x" * 100, 2 * MIB), errno.EIO)
        folder.log.reading = None
        same(disk.pread(100, 2 * MIB), bytes(100))
    folder.log.before = None
    disk.pwrite(b"z", 2 * MIB)
    same(disk.pread(GRAIN, 2 * MIB), b"z" + bytes(GRAIN - 1))
    disk.close()
    grains = parse_tables(folder.content("top.vmdk")).grains
    assert len(folder.content("top.vmdk")) == len(folder.log.initial["top.vmdk"]) + (1 + ready) * GRAIN
    assert len(grains) == 4 + ready
    check_order(folder, "top.vmdk")


@pytest.mark.parametrize("failing", [("write",), ("write", "punch")])
def test_space_of_failed_writes_is_used_again(make: Callable[..., Case], failing: tuple[str, ...]) -> None:
    folder, disk = make()
    size = len(folder.log.initial["top.vmdk"])
    folder.log.before = fault(errno.ENOSPC, lambda event: event.op in failing)
    for turn in range(5):
        fails(lambda turn=turn: disk.pwrite(b"x" * 100, MIB + turn * GRAIN), errno.ENOSPC)
    folder.log.before = None
    disk.pwrite(b"y", 0, fua=True)
    for turn in range(5):
        disk.pwrite(b"z", MIB + turn * GRAIN)
        same(disk.pread(GRAIN, MIB + turn * GRAIN), b"z" + bytes(GRAIN - 1))
    disk.close()
    assert len(folder.content("top.vmdk")) == size + 5 * GRAIN
    check_order(folder, "top.vmdk")
    check_tables(parse_tables(folder.content("top.vmdk")))


# Opening and closing.


def test_close_leaves_a_clean_image(make: Callable[..., Case]) -> None:
    folder, disk = make()
    disk.pwrite(b"x" * 10, MIB)
    disk.flush()
    assert folder.content("top.vmdk")[72] == 1
    size = len(folder.log.initial["top.vmdk"])
    assert len(folder.content("top.vmdk")) > size + GRAIN  # grown in a step
    disk.close()
    data = folder.content("top.vmdk")
    assert data[72] == 0
    assert len(data) == size + GRAIN
    assert not folder.log.undecided(len(folder.log.events)), "the flag is durable"
    check_order(folder, "top.vmdk")
    check_tables(parse_tables(data))
    disk.close()  # a second time does nothing


def test_flag_of_an_earlier_crash_stays(make: Callable[..., Case], tmp_path: Any) -> None:
    folder, disk = make(sparse(str(tmp_path), unclean=True))
    disk.pwrite(b"x", MIB)
    disk.close()
    assert folder.content("top.vmdk")[72] == 1


@pytest.mark.parametrize("kind", ["sparse", "split", "child"])
def test_session_without_writes_changes_nothing(make: Callable[..., Case], tmp_path: Any, kind: str) -> None:
    if kind == "split":
        image = split(str(tmp_path))
    else:
        below = desc.monolithic_flat(str(tmp_path), "base", Content.of(b"\7" * MIB))
        image = sparse(str(tmp_path), parent=below if kind == "child" else None)
    folder, disk = make(image)
    disk.pread(disk.size, 0)
    list(disk.runs())
    disk.pwrite(b"", 0)
    disk.flush()
    # Nothing to give back: a hole, or the parent's bytes, which no entry can hide.
    disk.trim(GRAIN, 900 * KIB // GRAIN * GRAIN)
    disk.zero(0, 0)
    if kind != "child":
        disk.zero(GRAIN, 900 * KIB // GRAIN * GRAIN)
    disk.flush()
    disk.close()
    assert not folder.log.events
    assert folder.contents() == folder.log.initial


@pytest.mark.parametrize("cid", ["12345678", "1234567", "5", "0badcafe"])
def test_content_id_changes_once(make: Callable[..., Case], tmp_path: Any, cid: str) -> None:
    """Only its digits are overwritten, as many as there are; the long one follows."""
    image = sparse(str(tmp_path), cid=cid)
    folder, disk = make(image)
    for at in range(0, 4 * MIB, MIB):
        disk.pwrite(b"x", at, fua=True)
    disk.close()
    at = image.text.index(b"CID=") + 4
    writes = [event for event in folder.log.events if event.op == "write" and event.length == len(cid)]
    writes = [event for event in writes if event.at == SECTOR + at]
    assert len(writes) == 1
    before, after = folder.log.initial["top.vmdk"], folder.content("top.vmdk")
    new = writes[0].data.decode()
    long = f'ddb.longContentID = "0123456789abcdef01234567{cid.rjust(8, "0")}"'.encode()
    assert long in before
    text = image.text.replace(b"\nCID=" + cid.encode(), b"\nCID=" + new.encode())
    text = text.replace(long, long[:-9] + new.rjust(8, "0").encode() + b'"')
    assert after[SECTOR : SECTOR + len(text)] == text
    assert int(new, 16) not in (int(cid, 16), 0, 0xFFFFFFFE, 0xFFFFFFFF)
    with reopen(folder) as again:
        again.pwrite(b"y", 0)
    assert cid_of(folder.content("top.vmdk")) != int(new, 16)


def test_child_notices(make: Callable[..., Case], tmp_path: Any) -> None:
    base = sparse(str(tmp_path))
    desc.monolithic_sparse(str(tmp_path), "child", Content(4 * MIB), parent=base)
    folder, disk = make(base, write_parent=True)
    reopen(folder, "child.vmdk", writable=False).close()
    disk.pwrite(b"x", 0, fua=True)
    with pytest.raises(VmdkError, match="expects parent content ID"):
        reopen(folder, "child.vmdk", writable=False)


# What comes without being asked.


def test_changes_are_committed_by_time(make: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, disk = make()
    monkeypatch.setattr(commit, "_MAX_AGE", 0.05)
    disk.pwrite(b"x", MIB)
    wait_for(lambda: folder.log.count("sync") == 2)
    disk.pwrite(b"x", 2 * MIB)
    wait_for(lambda: folder.log.count("sync") == 4)
    assert not pending(disk)
    check_order(folder, "top.vmdk")


def test_what_is_written_over_at_once_is_committed_by_time(
    make: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, disk = make()
    monkeypatch.setattr(commit, "_MAX_AGE", 0.05)
    disk.pread(SECTOR, 0)
    disk.pwrite(b"x", 100)
    wait_for(lambda: folder.log.count("sync") == 1)
    assert not pending(disk)
    assert not folder.log.undecided(len(folder.log.events))


def test_commit_by_time_is_tried_again(
    make: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    folder, disk = make()
    monkeypatch.setattr(commit, "_MAX_AGE", 0.05)
    folder.log.before = fault(errno.ENOSPC, is_table(folder))
    disk.pwrite(b"x", MIB)
    wait_for(lambda: len(folder.log.failed) >= 2)
    folder.log.before = None
    wait_for(lambda: not pending(disk))
    assert "on purpose" in caplog.text
    check_order(folder, "top.vmdk")


def test_commit_by_time_ends_with_the_latch(
    make: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    folder, disk = make()
    monkeypatch.setattr(commit, "_MAX_AGE", 0.02)
    folder.log.before = fault(errno.EIO, lambda event: event.op == "sync")
    disk.pwrite(b"x", MIB)
    wait_for(lambda: len(folder.log.failed) == 1)
    time.sleep(0.1)
    assert len(folder.log.failed) == 1
    assert len(caplog.records) == 1
    fails(disk.flush, errno.EIO)


def test_no_thread_for_the_timer(make: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """The write is done all the same, and closing is clean."""
    folder, disk = make()

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", start)
    disk.pwrite(b"x", MIB)
    disk.close()
    assert folder.content("top.vmdk")[72] == 0


def test_close_beside_the_timer(make: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_MAX_AGE", 0.002)
    for _ in range(10):
        folder, disk = make()
        monkeypatch.setattr(commit, "_MAX_AGE", 0.002)
        disk.pwrite(b"x", MIB)
        time.sleep(0.002)
        disk.close()
        check_order(folder, "top.vmdk")
        assert folder.content("top.vmdk")[72] == 0


@pytest.mark.parametrize("made", [False, True])
def test_dirty_tables_are_bounded(
    make: Callable[..., Case], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    monkeypatch.setattr(commit, "MAX_PINNED", 64 * KIB)
    options: dict[str, Any] = {"grain_sectors": 1, "gtes": 4, "preallocate_tables": not made}
    folder, disk = make(desc.monolithic_sparse(str(tmp_path), "top", Content(MIB), **options))
    member = disk._members[0]
    most = 0
    for slot in range(2):  # tables that are changed for the first time, and then those that are in memory
        syncs = folder.log.count("sync")
        for at in range(slot * SECTOR, MIB, 4 * SECTOR):
            disk.pwrite(b"x" * 10, at)
            most = max(most, member.held)
        assert most < 80 * KIB
        assert folder.log.count("sync") >= syncs + 4
        disk.flush()
    check_order(folder, "top.vmdk")
    syncs = folder.log.count("sync")
    for at in range(0, MIB, 4 * SECTOR):
        disk.trim(SECTOR, at)
        most = max(most, member.held)
    assert most < 80 * KIB
    assert folder.log.count("sync") >= syncs + 3


def test_dirty_tables_are_bounded_where_commits_fail(
    make: Callable[..., Case], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a write is refused before it changes anything."""
    monkeypatch.setattr(commit, "MAX_PINNED", 64 * KIB)
    folder, disk = make(desc.monolithic_sparse(str(tmp_path), "top", Content(MIB), grain_sectors=1, gtes=4))
    folder.log.before = fault(errno.ENOSPC, is_table(folder))
    refused = 0
    for at in range(0, MIB, 4 * SECTOR):
        result = outcome(lambda at=at: disk.pwrite(b"x" * 10, at))
        assert result == (errno.ENOSPC if refused else result)
        assert any(disk.pread(10, at)) is (result == 0)
        refused += result == errno.ENOSPC
    assert refused
    assert disk._members[0].held < 80 * KIB
    folder.log.before = None
    disk.pwrite(b"x" * 10, MIB - SECTOR)
    disk.close()
    check_tables(parse_tables(folder.content("top.vmdk")))


def test_one_request_as_long_as_the_disk_is_committed_in_steps(
    make: Callable[..., Case], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "MAX_PINNED", 64 * KIB)
    monkeypatch.setattr("nbd_vmdk.link._STEP", 64 * KIB)
    below = desc.monolithic_flat(str(tmp_path), "base", Content.of(b"\7" * (MIB)))
    options: dict[str, Any] = {"grain_sectors": 1, "gtes": 4, "zero_gte": True}
    folder, disk = make(desc.monolithic_sparse(str(tmp_path), "top", Content(MIB), parent=below, **options))
    disk.zero(MIB - 2, 1)
    assert folder.log.count("sync") >= 4
    same(disk.pread(MIB, 0), b"\7" + bytes(MIB - 2) + b"\7")
    assert len(parse_tables_now(disk, folder)) == 2, "a step ended inside a grain, which was copied"
    check_order(folder, "top.vmdk")


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


# Power cuts, in samples: what is lost is drawn at random; all of it, and nothing, are always tried.


def child(folder: str, **options: Any) -> Image:
    below = desc.monolithic_flat(folder, "base", Content.random(512 * KIB, 5, 1.0).solid())
    return desc.monolithic_sparse(
        folder, "top", Content(512 * KIB), parent=below, grain_sectors=16, **options
    )


CRASHES: dict[str, Callable[[str], Image]] = {
    "sparse": lambda folder: sparse(folder, 512 * KIB, grain_sectors=16, gtes=16),
    "no tables": lambda folder: sparse(
        folder, 512 * KIB, grain_sectors=16, gtes=16, preallocate_tables=False
    ),
    "split": lambda folder: desc.split_sparse(
        folder, "top", Content(512 * KIB), 512, grain_sectors=16, gtes=8
    ),
    "child": lambda folder: child(folder, gtes=16),
    "child with zeroed grains": lambda folder: child(folder, gtes=16, zero_gte=True),
    "child without tables": lambda folder: child(folder, gtes=8, preallocate_tables=False),
}


@pytest.mark.parametrize("kind", CRASHES)
def test_power_cuts(make: Callable[..., Case], tmp_path: Any, kind: str) -> None:
    folder, disk = make(CRASHES[kind](str(tmp_path)))
    rng = random.Random(kind)
    shown = disk.pread(disk.size, 0)
    #: (events so far, what the disk shows); the last flush that had returned by then.
    history: list[tuple[int, bytes, bool]] = [(0, shown, True)]
    for _ in range(60):
        offset = rng.randrange(disk.size // SECTOR) * SECTOR
        length = min(rng.randrange(1, 60) * SECTOR, disk.size - offset)
        flushed = False
        match rng.randrange(6):
            case 0:
                disk.flush()
                flushed = True
            case 1:
                disk.trim(length, offset)
            case 2:
                disk.zero(length, offset, may_trim=rng.random() < 0.5)
            case _:
                disk.pwrite(rng.randbytes(length), offset)
        history.append((len(folder.log.events), disk.pread(disk.size, 0), flushed))
    disk.close()
    check_order(folder, "top.vmdk")
    log = folder.log
    cuts = {event.number + late for event in log.events if event.op == "sync" for late in (0, 1)}
    for cut in sorted(cuts | set(rng.sample(range(len(log.events)), 15))):
        maybe = [event.number for event in log.undecided(cut)]
        for lost in ([], maybe, [number for number in maybe if rng.random() < 0.5]):
            after_power_cut(log.state(cut, frozenset(lost)), history, cut)


@pytest.mark.parametrize("lacking", ["directory", "redundant directory"])
def test_power_cuts_where_one_directory_lacks_a_table(
    make: Callable[..., Case], tmp_path: Any, lacking: str
) -> None:
    """The table gets a second place; until it holds what the first one does, nobody is led there."""

    def forget(directory: list[int], tables: dict[int, list[int]]) -> None:
        directory[0] = 0

    edit = "edit_tables" if lacking == "directory" else "edit_redundant"
    folder, disk = make(sparse(str(tmp_path), 512 * KIB, unclean=True, gtes=16, **{edit: forget}))
    before = disk.pread(disk.size, 0)
    disk.pwrite(b"x" * GRAIN, 5 * GRAIN)
    disk.flush()
    after = disk.pread(disk.size, 0)
    log = folder.log
    for cut in range(len(log.events) + 1):
        maybe = [event.number for event in log.undecided(cut)]
        for number in range(1 << len(maybe)):
            lost = {event for at, event in enumerate(maybe) if number >> at & 1}
            with reopen(RecordingFolder(log.state(cut, lost)), writable=False) as again:
                assert again.pread(again.size, 0) in (before, after), f"cut {cut}, lost {lost}"
    disk.close()
    data = folder.content("top.vmdk")
    check_tables(parse_tables(data[:72] + b"\0" + data[73:]))


def after_power_cut(files: dict[str, bytes], history: list[tuple[int, bytes, bool]], cut: int) -> None:
    """Each sector is as at the last flush, or as any write since has left it."""
    last = max(i for i, (events, _, flushed) in enumerate(history) if flushed and events <= cut)
    later = [i for i in range(last, len(history)) if i == last or history[i - 1][0] <= cut]
    allowed = [history[i][1] for i in later]
    with reopen(RecordingFolder(files), writable=False) as disk:
        found = disk.pread(disk.size, 0)
        if found in allowed:
            return
        for at in range(0, disk.size, SECTOR):
            sector = found[at : at + SECTOR]
            # Zeroing and trimming may have happened in a file and not yet in a table.
            if sector != allowed[0][at : at + SECTOR]:
                assert any(sector == one[at : at + SECTOR] for one in allowed), (
                    f"cut {cut}, sector {at // SECTOR}"
                )
    for data in files.values():
        if data.startswith(b"KDMV"):
            check_tables(parse_tables(data), clean=False)


# Files in memory, which no sync makes any safer; but a server may be killed where nothing else is lost.


def in_memory(disk: Disk, *, but: int = 0) -> None:
    """Make its files be on a tmpfs, the last ones excepted, and its content ID be changed already."""
    storages = disk.links[0].storages
    for storage in storages[: len(storages) - but]:
        storage.in_memory = True
    disk.pwrite(b"x", 0, fua=True)


@pytest.mark.parametrize("kind", [sparse, split])
def test_data_in_memory_is_not_synced(make: Callable[..., Case], tmp_path: Any, kind: Any) -> None:
    folder, disk = make(kind(str(tmp_path)))
    in_memory(disk)
    with only(folder) as events:
        disk.pwrite(b"again", 5, fua=True)
        disk.flush()
    assert ops(events) == ["write"]
    disk.pwrite(b"new", MIB + GRAIN)
    assert pending(disk)
    with only(folder) as events:
        disk.flush()
    assert "write" in ops(events)
    left = RecordingFolder({name: folder.content(name) for name in folder.log.initial})  # by a killed server
    with open_in(left, "top.vmdk", OpenOptions()) as found:
        assert found.pread(3, MIB + GRAIN) == b"new"


def test_one_file_on_a_disk_is_synced(make: Callable[..., Case], tmp_path: Any) -> None:
    folder, disk = make(split(str(tmp_path)))
    in_memory(disk, but=1)
    with only(folder) as events:
        disk.pwrite(b"again", 5, fua=True)
    assert ops(events) == ["write", "sync"]


@pytest.mark.parametrize("number", [0, errno.ENOSPC])
def test_flush_in_memory_waits_for_a_commit_under_way(make: Callable[..., Case], number: int) -> None:
    """It has taken the tables, so nothing seems to be left to do; and it may fail."""
    folder, disk = make()
    in_memory(disk)
    entered, go = threading.Event(), threading.Event()
    table = is_table(folder)

    def before(event: Event) -> None:
        if table(event):
            entered.set()
            assert go.wait(10)
            if number:
                raise OSError(number, "on purpose")

    disk.pwrite(b"new", 4 * GRAIN)
    folder.log.before = before
    outcomes: list[int] = []
    threads = [threading.Thread(target=lambda: outcomes.append(outcome(disk.flush))) for _ in range(3)]
    threads[0].start()
    assert entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.1)
    assert not outcomes
    go.set()
    for thread in threads:
        thread.join()
    assert outcomes == [number] * 3
    assert outcome(disk.flush) == number
    folder.log.before = None
    disk.flush()
    assert not pending(disk)
