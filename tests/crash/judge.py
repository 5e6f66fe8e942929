"""What must hold in every state that a power cut can leave, and how each of it is found out."""

from __future__ import annotations

import random
from bisect import bisect_left
from dataclasses import replace
from functools import cached_property

import numpy as np

from nbd_vmdk import VmdkError
from nbd_vmdk.errors import WriteRefused
from nbd_vmdk.opening import open_in
from nbd_vmdk.ops.check.findings import Repair, Severity
from nbd_vmdk.ops.check.runner import Report, check_in
from nbd_vmdk.ops.repair import apply_in
from nbd_vmdk.options import OpenOptions
from tests.crash.states import State, states
from tests.crash.workloads import TOP, Flush, Session
from tests.images.content import SECTOR
from tests.images.cowd import Head
from tests.images.hosted import Header
from tests.recording import RecordingFolder
from tests.sound import MAGICS, Tables, check_tables, parse_tables

READ = OpenOptions(locks=False)
WRITE = OpenOptions(writable=True)


class Violation(AssertionError):
    """A state that must not be; the message says which, and what is wrong in it."""


class Judge:
    """Knows one session, and says of any state after a power cut in it whether a promise is broken."""

    #: freeSector is looked at, too. What spoils the order of a commit mostly spoils it first.
    free_sector = True

    def __init__(self, session: Session, rng: random.Random, *, thorough: float = 0.1) -> None:
        """`thorough` is the share of states in which the image is repaired, too, and written to again."""
        self.session = session
        self.rng = rng
        self.thorough = thorough
        self.log = session.log
        self.first_events = [request.event for request in session.requests]
        self.sparse = [name for name, data in self.log.initial.items() if data.startswith(MAGICS)]
        self.sparse = [name for name in self.sparse if name not in session.parents]
        self.before = {name: parse_tables(self.log.initial[name]) for name in self.sparse}
        touched = {event.file for event in self.log.events}
        if touched & session.parents:
            raise Violation(f"a parent was changed: {touched & session.parents}")

    @cached_property
    def after(self) -> dict[str, Tables]:
        """The tables after a clean close."""
        return {name: parse_tables(self.session.folder.content(name)) for name in self.sparse}

    @cached_property
    def cleared(self) -> dict[str, int]:
        """The event with which each file's unclean flag falls."""
        return {
            event.file: event.number
            for event in self.log.events
            if event.op == "write"
            and event.file in self.before
            and (event.at, event.data) == (self.before[event.file].unclean_at, b"\0")
        }

    def check(self, state: State) -> None:
        """Raise Violation if a state breaks a promise."""
        try:
            flush = [flush for flush in self.session.flushes if flush.event <= state.cut][-1]
            found, cid = self._open(state.files)
            self._contents(found, flush, state.cut)
            changed = self._tables(state)
            if (changed or flush.wrote) and cid is not None:
                assert cid != self.session.cid, "the content ID is what it was, and not all else is"
            self._twins(state, flush)
            self._report(state.files)
            if self.rng.random() < self.thorough:
                self._repair(state, found, flush)
                self._go_on(state.files, found)
        except (AssertionError, VmdkError) as error:
            raise Violation(f"{state}:\n{error}") from error

    def _open(self, files: dict[str, bytes]) -> tuple[bytes, int | None]:
        """It opens for reading and for writing, alike, and opening changes nothing."""
        folder = RecordingFolder(files)
        with open_in(folder, TOP, WRITE) as disk:
            assert disk.writable
            found = disk.pread(disk.size, 0)
            cid = disk.links[0].cid
        assert not folder.log.events, "opening and closing changes the image"
        with open_in(folder, TOP, READ) as disk:
            assert disk.pread(disk.size, 0) == found, "a reader sees something else than a writer"
        return found, cid

    def _contents(self, found: bytes, flush: Flush, cut: int) -> None:
        """Each byte is what the last flush promised, or what a request since then may have made of it."""
        assert len(found) == len(flush.shown), "the size is another"
        if found == flush.shown:
            return
        row = np.frombuffer(found, np.uint8)
        good = row == np.frombuffer(flush.shown, np.uint8)
        last = bisect_left(self.first_events, cut)
        for request in self.session.requests[flush.requests : last]:
            part = slice(request.offset, request.offset + len(request.data))
            for data in (request.data, *request.others):
                good[part] |= row[part] == np.frombuffer(data, np.uint8)
        bad = np.flatnonzero(~good)
        if len(bad):
            at = int(bad[0])
            kind = "zeros" if not row[bad].any() else f"what nobody wrote there ({found[at : at + 8].hex()})"
            text = f"{len(bad)} bytes from guest byte {at} on are {kind}"
            raise AssertionError(text + f", flushed was {flush.shown[at : at + 8].hex()}")

    def _tables(self, state: State) -> bool:
        """Tables are sound, and where they have changed the flag is set; whether any have."""
        any_changed = False
        for name in self.sparse:
            before, now = self.before[name], parse_tables(state.files[name])
            changed = _entries(now) != _entries(before)
            any_changed = any_changed or changed
            flag = now.header.unclean
            check_tables(now, clean=False)
            if isinstance(now.header, Head) and self.free_sector:
                free = now.header.free_sector * SECTOR
                assert free >= now.used_end, f"freeSector of {name} is lower than what is used"
            if now.rgd:
                twin = replace(now, gd=now.rgd, rgd=now.gd, gt=now.rgt, rgt=now.gt)
                check_tables(twin, clean=False)
            if not flag and changed:
                is_last = self.session.closed and state.cut > self.cleared.get(name, state.cut)
                assert is_last, f"tables of {name} have changed and its unclean flag is not set"
                assert _entries(now) == _entries(self.after[name]), f"{name} is marked clean too early"
                check_tables(now)
        return any_changed

    def _twins(self, state: State, flush: Flush) -> None:
        """After a crash either copy of directories and tables is enough (I3)."""
        files = dict(state.files)
        for name in self.sparse:
            head = Header.unpack(files[name])
            if not self.before[name].rgd:
                continue
            if self.before[name].header.unclean:
                return  # what another crash left may differ, until it is repaired
            head = replace(head, gd_offset=head.rgd_offset, rgd_offset=head.gd_offset)
            files[name] = head.pack() + files[name][512:]
        if files != state.files:
            with open_in(RecordingFolder(files), TOP, READ) as disk:
                self._contents(disk.pread(disk.size, 0), flush, state.cut)

    def _report(self, files: dict[str, bytes]) -> Report:
        """Nothing is wrong that can't be mended without touching the guest's data."""
        report = check_in(RecordingFolder(files), TOP, READ, probe=False)
        for finding in report.findings:
            safe = isinstance(finding.repair, Repair) and finding.repair.asks is None
            assert safe or finding.severity is Severity.WARNING, f"check: {finding.what}"
        return report

    def _repair(self, state: State, found: bytes, flush: Flush) -> None:
        """A repair leaves nothing to repair, and changes nothing that the guest sees."""
        folder = RecordingFolder(state.files)
        apply_in(folder, TOP, READ, undo=None)
        mended = folder.contents()
        for finding in self._report(mended).findings:
            assert isinstance(finding.repair, str), f"a repair left this: {finding.what}"
        shown = self._open(mended)[0]
        self._contents(shown, flush, state.cut)
        assert shown == found, "a repair changes what the guest sees"
        for name in self.sparse:
            check_tables(parse_tables(mended[name]))

    def _go_on(self, files: dict[str, bytes], found: bytes) -> None:
        """Who writes next finds no garbage in new space, and closes what he has written."""
        folder = RecordingFolder(files)
        shown = bytearray(found)
        with open_in(folder, TOP, WRITE) as disk:
            for _ in range(5):
                offset = self.rng.randrange(disk.size - 600)
                data = self.rng.randbytes(self.rng.choice((3, 600)))
                try:
                    disk.pwrite(data, offset)
                except WriteRefused:
                    continue  # zeros without a file
                shown[offset : offset + len(data)] = data
            assert disk.pread(disk.size, 0) == shown, "new space shows what was there before"
        with open_in(folder, TOP, READ) as disk:
            assert disk.pread(disk.size, 0) == shown, "what was written after the cut is not there"


def _entries(tables: Tables) -> tuple[object, ...]:
    return tables.gd, tables.rgd, tables.gt, tables.rgt


def judge(
    session: Session, rng: random.Random, *, samples: int = 6, others: int = 15, most: int | None = None
) -> list[State]:
    """Judge the states of a session, `most` of them at most; those that were distinct.

    Raises Violation.
    """
    found: list[State] = []
    seen: set[tuple[int, int]] = set()
    distinct: set[int] = set()
    judged = Judge(session, rng)
    for state in states(session.log, rng, samples, others):
        if len(found) == most:
            break
        mark = hash(tuple(hash(data) for data in state.files.values()))
        flushes = sum(flush.event <= state.cut for flush in session.flushes)
        # The same files after a later flush must hold more; after more requests they may only hold more.
        if (mark, flushes) not in seen:
            judged.check(state)
            seen.add((mark, flushes))
            if mark not in distinct:
                found.append(state)
                distinct.add(mark)
    return found
