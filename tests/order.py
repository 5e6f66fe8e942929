"""The order of writes and syncs that DESIGN promises, checked on a log of all that was done to the files."""

from __future__ import annotations

import struct

from nbd_vmdk.ondisk.descriptor import Descriptor
from tests.images.content import SECTOR
from tests.images.cowd import Head
from tests.images.hosted import Header
from tests.recording import Event, RecordingFolder, apply
from tests.sound import MAGICS, parse_tables


def numbers(data: bytes) -> list[int]:
    return [entry for (entry,) in struct.iter_unpack("<I", data[: len(data) // 4 * 4])]


class FileWatch:
    """One file with tables while its log is walked: what it holds now, and what is durable of it."""

    def __init__(self, initial: bytes, final: bytes, *, alone: bool) -> None:
        self.alone = alone
        self.now = bytearray(initial)
        self.durable = bytes(initial)
        self.unsynced: list[tuple[int, int]] = []
        # Places of grains that were written to and synced since a table last named others there.
        self.filled: set[int] = set()
        # Where tables will have been made too: tables never move.
        last = parse_tables(final)
        self.grain = last.grain
        self.length = last.header.gtes_per_gt * 4
        self.tables = last.table_ranges()
        self.directories = last.directory_ranges()
        self.unclean_at = last.unclean_at
        self.keeps_free_sector = isinstance(last.header, Head)

    @property
    def flag_is_durable(self) -> bool:
        return bool(self.durable[self.unclean_at])

    def changed(self, event: Event, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """(old, new) of the entries that a write changes in directories or tables."""
        found = []
        for begin, end in places:
            first, last = max(begin, event.at), min(end, event.end)
            if first < last:
                assert (first - begin) % 4 == 0
                old = numbers(bytes(self.now[first:last]).ljust(last - first, b"\0"))
                new = numbers(event.data[first - event.at : last - event.at])
                found += [pair for pair in zip(old, new, strict=True) if pair[0] != pair[1]]
        return found

    def is_metadata(self, event: Event) -> bool:
        return any(event.at < end and begin < event.end for begin, end in [*self.tables, *self.directories])

    def write(self, event: Event) -> None:
        if self.is_metadata(event):
            for old, entry in self.changed(event, self.tables):
                self.filled.discard(old * SECTOR // self.grain)
                if entry > 1:
                    self.must_be_durable(entry * SECTOR, self.grain, f"event {event.number}: a grain")
                    self.must_not_be_free(entry * SECTOR + self.grain, f"event {event.number}: a grain")
            for _old, entry in self.changed(event, self.directories):
                if entry:
                    end = entry * SECTOR + self.length
                    assert end <= len(self.durable), f"event {event.number}: names a table beyond the file"
                    self.must_not_be_free(end, f"event {event.number}: a table")
        elif (event.at, event.data) == (self.unclean_at, b"\0"):
            for begin, end in [*self.tables, *self.directories]:
                assert self.durable[begin:end] == self.now[begin:end], "the flag falls before all is durable"
        else:
            if self.alone:
                self.must_be_free(event, "is written to")
            self.unsynced.append((event.at, event.end))

    def must_be_durable(self, begin: int, length: int, what: str) -> None:
        end = begin + length
        for first, last in self.unsynced:
            # Between a commit's first sync and its tables, others may overwrite what it has synced.
            overwritten = not self.alone and begin // self.grain in self.filled
            legal = end <= first or begin >= last or overwritten
            assert legal, f"{what} at {begin} is named before it is durable"
        assert end <= len(self.durable), f"{what} at {begin} is named before the file is so long"

    def must_not_be_free(self, end: int, what: str) -> None:
        """By freeSector, if the file has one and it was set since it was opened."""
        free = Head.unpack(self.durable).free_sector if self.keeps_free_sector else 0
        assert not self.keeps_free_sector or end <= free * SECTOR, f"{what} lies where freeSector says free"

    def must_be_free(self, event: Event, what: str) -> None:
        """What is given back, or to another grain, is named by no table that a crash could bring back."""
        before, now = self.named(self.durable), self.named(bytes(self.now))
        for at in before - now:
            assert event.end <= at or event.at >= at + self.grain, (
                f"event {event.number}: a grain at {at} {what} while a durable table names it"
            )

    def named(self, data: bytes) -> set[int]:
        return set(parse_tables(data).grains.values())

    def sync(self) -> None:
        self.durable = bytes(self.now)
        for begin, end in self.unsynced:
            self.filled.update(range(begin // self.grain, -(-end // self.grain)))
        self.unsynced.clear()


def cid_of(data: bytes) -> int | None:
    """The content ID in a descriptor file, or in the descriptor inside a sparse file."""
    if data.startswith(b"KDMV"):
        head = Header.unpack(data)
        at = head.descriptor_offset * SECTOR
        data = data[at : at + head.descriptor_size * SECTOR].partition(b"\0")[0]
    return Descriptor.parse(data, "descriptor").cid if data else None


def check_order(folder: RecordingFolder, top: str, *, alone: bool = True) -> int:
    """Walk a log; the number of table entries that were seen to change.  `top` is the file that was opened.

    Only where a single thread was writing (`alone`) is a write to a grain one of its owner for certain.

    I1 no table names a grain that is not durable, no directory a table beyond the durable end
    I4 uncleanShutdown is durable before the first change of a table
    I5 the content ID has changed, durably, before any table changes, and before a flush returns
    I6 no space is given back, or to another grain, that a durable table still names
    and freeSector of COWD is durably behind all that a table or directory is about to name
    """
    watches: dict[str, FileWatch] = {}
    descriptor, durable_descriptor = bytearray(folder.log.initial[top]), folder.log.initial[top]
    was = cid_of(durable_descriptor)
    for name, initial in folder.log.initial.items():
        if initial.startswith(MAGICS):
            watches[name] = FileWatch(initial, folder.content(name), alone=alone)
    changes = 0
    wrote = False
    for event in folder.log.events:
        watch = watches.get(event.file)
        if event.op == "mark":
            if event.file == "flushed" and wrote:
                assert cid_of(durable_descriptor) != was, "a flush returned before the content ID was durable"
            continue
        wrote = wrote or event.op != "sync"
        if watch is not None:
            if event.op == "write":
                watch.write(event)
                if watch.is_metadata(event):
                    changes += len(watch.changed(event, [*watch.tables, *watch.directories]))
                    assert watch.flag_is_durable, f"event {event.number}: tables change, no flag is set"
                    assert cid_of(durable_descriptor) != was, f"event {event.number}: the content ID is old"
            elif event.op == "punch":
                watch.must_be_free(event, "is given back")
            elif event.op == "sync":
                watch.sync()
            if event.op != "sync":
                apply(watch.now, event)
        if event.file == top:
            if event.op == "sync":
                durable_descriptor = bytes(descriptor)
            else:
                apply(descriptor, event)
    return changes
