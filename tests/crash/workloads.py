"""
Seeded workloads on small images in memory, and what their client may rely on at every moment.

The images are small in every respect (grains of one to eight sectors, tables of a few entries), so that a few
dozen requests cross every edge and give freed grains to new owners. No two writes write the same bytes, so
bytes in a wrong place are found out. Requests also come while a commit is under way, between its writes and
syncs, and now and then a commit meets a full disk and is repeated.
"""

from __future__ import annotations

import errno
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from nbd_vmdk import Disk, VmdkError, commit
from nbd_vmdk.opening import open_in
from nbd_vmdk.options import OpenOptions
from tests.images import desc
from tests.images.content import KIB, SECTOR, Content
from tests.images.desc import Row
from tests.recording import Event, RecordingFolder

TOP = "top.vmdk"
SIZE = 96 * KIB
#: Not a multiple of any grain: the last one reaches past the end of the disk.
ODD_SIZE = SIZE - 3 * SECTOR
#: As many entries as fill a sector.
COWD_ENTRIES = 128


@dataclass
class Request:
    """What a client asked for; `event` is the first that may be its doing.

    `data` is what it makes its range show. `others` may be seen there instead until a flush settles it.
    """

    event: int
    offset: int
    data: bytes
    others: list[bytes] = field(default_factory=list)


@dataclass
class Flush:
    """A flush that has returned before event `event`, for the first `requests` requests.

    `shown` is what the disk must then show; `wrote` says that anything was written before it.
    """

    event: int
    requests: int
    shown: bytes
    wrote: bool


def _sparse(size: int = SIZE, **options: Any) -> Callable[[str, random.Random], None]:
    def build(folder: str, rng: random.Random) -> None:
        shape = _shape(rng) | options
        content = Content.random(size, rng.randrange(1000), 0.4, grain=shape["grain_sectors"] * SECTOR)
        desc.monolithic_sparse(folder, "top", content, **shape)

    return build


def _shape(rng: random.Random) -> dict[str, Any]:
    return {"grain_sectors": rng.choice((1, 2, 8, 8)), "gtes": rng.choice((4, 8, 16))}


def _split(size: int = SIZE, **options: Any) -> Callable[[str, random.Random], None]:
    def build(folder: str, rng: random.Random) -> None:
        content = Content.random(size, rng.randrange(1000), 0.4, grain=4 * KIB)
        desc.split_sparse(folder, "top", content, 32 * KIB // SECTOR, **_shape(rng) | options)

    return build


def _flat(folder: str, rng: random.Random) -> None:
    desc.monolithic_flat(folder, "top", Content.random(SIZE, rng.randrange(1000), grain=4 * KIB))


def _split_flat(folder: str, rng: random.Random) -> None:
    content = Content.random(SIZE, rng.randrange(1000), grain=4 * KIB)
    desc.split_flat(folder, "top", content, 40 * KIB // SECTOR)


def _mixed(folder: str, rng: random.Random) -> None:
    def piece() -> Content:
        return Content.random(32 * KIB, rng.randrange(1000), grain=4 * KIB)

    rows = [
        Row("RW", "FLAT", piece(), "top-flat.vmdk", 0),
        Row("RW", "ZERO", Content(4 * KIB)),
        Row("RW", "SPARSE", piece(), options=_shape(rng)),
        Row("RW", "FLAT", piece(), "top-flat.vmdk", 64),
    ]
    desc.custom(folder, "top", rows)


def _child(*, split: bool = False, sparse_parent: bool = False, **options: Any) -> Any:
    def build(folder: str, rng: random.Random) -> None:
        below = Content.random(ODD_SIZE, rng.randrange(1000), 0.9, grain=4 * KIB)
        make = desc.monolithic_sparse if sparse_parent else desc.monolithic_flat
        base = make(folder, "base", below)
        shape = _shape(rng) | options
        own = Content.random(ODD_SIZE, rng.randrange(1000), 0.25, grain=shape["grain_sectors"] * SECTOR)
        if split:
            desc.split_sparse(folder, "top", own, 32 * KIB // SECTOR, parent=base, **shape)
        else:
            desc.monolithic_sparse(folder, "top", own, parent=base, **shape)

    return build


def _cowd(size: int = SIZE) -> Callable[[str, random.Random], None]:
    def build(folder: str, rng: random.Random) -> None:
        shape = _cowd_shape(rng)
        content = Content.random(size, rng.randrange(1000), 0.4, grain=shape["grain_sectors"] * SECTOR)
        desc.vmfs_sparse(folder, "top", content, **shape)

    return build


def _cowd_shape(rng: random.Random) -> dict[str, Any]:
    """Grains of a sector mostly, as hosts make them; now and then the file is longer than what is used."""
    return {
        "grain_sectors": rng.choice((1, 1, 2, 8)),
        "preallocate_tables": rng.random() < 0.2,
        "grow_to": rng.choice((0, 0, 8 * KIB)),
    }


def _cowd_child(folder: str, rng: random.Random) -> None:
    below = Content.random(ODD_SIZE, rng.randrange(1000), 0.9, grain=4 * KIB)
    base = rng.choice((desc.vmfs, desc.monolithic_sparse, desc.vmfs_sparse))(folder, "base", below)
    shape = _cowd_shape(rng)
    own = Content.random(ODD_SIZE, rng.randrange(1000), 0.25, grain=shape["grain_sectors"] * SECTOR)
    desc.vmfs_sparse(folder, "top", own, parent=base, **shape)


KINDS: dict[str, Callable[[str, random.Random], None]] = {
    "flat": _flat,
    "split flat": _split_flat,
    "sparse": _sparse(),
    "sparse v2": _sparse(ODD_SIZE, zero_gte=True),
    "sparse without tables": _sparse(preallocate_tables=False),
    "sparse without twins": _sparse(ODD_SIZE, rgd=False),
    "sparse without tables and twins": _sparse(rgd=False, preallocate_tables=False),
    "tables at the end": _sparse(tables_last=True, shuffle_grains=1, misalign=1, gap_sectors=1),
    "split sparse": _split(ODD_SIZE),
    "split sparse without tables": _split(preallocate_tables=False, descriptor=b""),
    "flat, zeros and sparse": _mixed,
    "child": _child(),
    "child v2": _child(zero_gte=True),
    "child without tables": _child(preallocate_tables=False, sparse_parent=True),
    "child v2 without tables, split": _child(split=True, zero_gte=True, preallocate_tables=False),
    "COWD": _cowd(ODD_SIZE),
    "COWD child": _cowd_child,
}


def image(kind: str, rng: random.Random) -> dict[str, bytes]:
    """The files of a small image."""
    with tempfile.TemporaryDirectory() as folder:
        KINDS[kind](folder, rng)
        return RecordingFolder.load(folder).log.initial


@contextmanager
def small(rng: random.Random) -> Iterator[None]:
    """Make the engine's own steps as small as the images, so that few bytes cross many edges."""
    bound = rng.choice((600, 1 << 20, 1 << 20))
    numbers: dict[str, Any] = {
        "commit._MAX_AGE": 3600.0,
        "commit.MAX_PINNED": bound,
        "commit._MIN_SHARE": bound,
        "alloc._STEP_GRAINS": rng.choice((1, 3, 8)),
        "extents.tables._DIRECTORY_PAGE": rng.choice((16, 4 * KIB)),
        "extents.writing._PIECE": rng.choice((KIB, 1 << 20)),
        "link._STEP": 8 * KIB,
        # The tables of COWD always have 4096 entries; so many would hold the whole image.
        "ondisk.cowd.ENTRIES_PER_TABLE": COWD_ENTRIES,
        "extents.cowd.ENTRIES_PER_TABLE": COWD_ENTRIES,
        "ops.check.cowd.ENTRIES_PER_TABLE": COWD_ENTRIES,
        "ops.check.cowd._TABLE": 1,
    }
    with ExitStack() as patches:
        for name, number in numbers.items():
            patches.enter_context(patch(f"nbd_vmdk.{name}", number))
        patches.enter_context(patch("tests.images.cowd.GTES", COWD_ENTRIES))
        patches.enter_context(patch("tests.images.cowd.TABLE_SECTORS", 1))
        yield


class Session:
    """One time that an image is opened, written to, and closed or not."""

    def __init__(self, files: dict[str, bytes], rng: random.Random) -> None:
        self.folder = RecordingFolder(files)
        self.log = self.folder.log
        self.rng = rng
        self.disk: Disk = open_in(self.folder, TOP, OpenOptions(writable=True))
        self.cid = self.disk.links[0].cid
        self.shown = bytearray(self.disk.pread(self.disk.size, 0))
        self.requests: list[Request] = []
        self.flushes = [Flush(0, 0, bytes(self.shown), wrote=False)]
        self.closed = False
        self.parents = {storage.name for link in self.disk.links[1:] for storage in link.storages}
        self._grain = max(self.disk.links[0].grain, SECTOR)
        self._hot = [rng.randrange(self.disk.size) for _ in range(4)]
        self._in_flush = False
        # With a small bound the request may have to wait for the very commit that it interrupts.
        self._may_interrupt = commit.MAX_PINNED >= 1 << 20
        self.log.before, self.log.after = self._before, self._after

    def run(self, count: int, *, close: bool) -> None:
        """Make `count` requests and flushes; without `close` the disk is left as it is."""
        try:
            for _ in range(count):
                if self.rng.random() < 0.16:
                    self._flush()
                else:
                    self._request(may_flush=True)
        finally:
            self.disk._committer.close()  # stops a timer, no more
        if close:
            begin = len(self.requests)
            wrote = self._wrote
            self.disk.close()
            self.closed = True
            self.flushes.append(Flush(len(self.log.events), begin, bytes(self.shown), wrote))
        self.log.before = self.log.after = None

    @property
    def _wrote(self) -> bool:
        return any(event.op != "sync" for event in self.log.events)

    def _flush(self) -> None:
        covered, shown, wrote = len(self.requests), bytes(self.shown), self._wrote
        self._in_flush = True
        try:
            self.disk.flush()
        except VmdkError as error:
            if error.errno != errno.ENOSPC:
                raise
            return
        finally:
            self._in_flush = False
        self.flushes.append(Flush(len(self.log.events), covered, shown, wrote))
        assert self.disk.pread(self.disk.size, 0) == self.shown, (
            "the disk shows something else, without a cut"
        )

    def _before(self, event: Event) -> None:
        if not self._in_flush:
            return
        if event.op == "write" and self.rng.random() < 0.01:
            raise OSError(errno.ENOSPC, "on purpose")
        self._interrupt(event)

    def _after(self, event: Event) -> None:
        if self._in_flush:
            self._interrupt(event)

    def _interrupt(self, event: Event) -> None:
        """Now and then, another client's request in the middle of a commit."""
        if self._may_interrupt and self.rng.random() < (0.35 if event.op == "sync" else 0.06):
            self._in_flush = False
            try:
                self._request(may_flush=False)
            finally:
                self._in_flush = True

    def _range(self) -> tuple[int, int]:
        rng, size, grain = self.rng, self.disk.size, self._grain
        offset = rng.choice(self._hot) if rng.random() < 0.6 else rng.randrange(size)
        if rng.random() < 0.1:
            self._hot[rng.randrange(len(self._hot))] = rng.randrange(size)
        match rng.randrange(6):
            case 0:  # whole grains
                offset -= offset % grain
                length = grain * rng.randrange(1, 6)
            case 1 | 2:  # one grain
                offset -= offset % grain
                length = grain
            case 3:  # sectors
                offset -= offset % SECTOR
                length = SECTOR * rng.randrange(1, 2 * grain // SECTOR + 2)
            case 4:  # bytes
                length = rng.randrange(1, 200)
            case _:
                length = rng.randrange(1, 3 * grain)
        return offset, min(length, size - offset)

    def _request(self, *, may_flush: bool) -> None:
        """One request; a flush that FUA brings covers it and all before."""
        rng, disk = self.rng, self.disk
        offset, length = self._range()
        end = offset + length
        kind = rng.choices(("write", "zero", "free", "trim"), (11, 2, 3, 3))[0]
        if self._zeros_only(offset, length) and kind == "write":
            return
        fua = may_flush and rng.random() < 0.1
        request = Request(len(self.log.events), offset, bytes(length))
        wrote = self._wrote
        if kind == "write":
            request.data = rng.randbytes(length)
            disk.pwrite(request.data, offset, fua=fua)
        elif kind == "trim":
            disk.trim(length, offset, fua=fua)
            below = bytearray(length)
            if len(disk.links) > 1:
                disk._read_below(memoryview(below), offset)
            request.others = [bytes(length), bytes(below)]
            choices = (bytes(self.shown[offset:end]), *request.others)
            request.data = disk.pread(length, offset)
            assert all(byte in column for byte, *column in zip(request.data, *choices, strict=True))
        else:
            disk.zero(length, offset, may_trim=kind == "free", fua=fua)
        self.shown[offset:end] = request.data
        self.requests.append(request)
        if fua:
            wrote = wrote or len(self.log.events) > request.event
            self.flushes.append(Flush(len(self.log.events), len(self.requests), bytes(self.shown), wrote))

    def _zeros_only(self, offset: int, length: int) -> bool:
        """Whether some of a range is a piece that no file holds, where a write is refused."""
        for entry in self.disk.links[0].extents:
            first, last = entry.start, entry.start + entry.extent.size
            if entry.extent.storage is None and offset < last and offset + length > first:
                return True
        return False


def session(kind: str, seed: int | str, requests: int = 40) -> Session:
    """A workload that has been carried out."""
    rng = random.Random(f"{kind} {seed}")
    done = Session(image(kind, rng), rng)
    done.run(requests, close=rng.random() < 0.6)
    return done


def continued(files: dict[str, bytes], rng: random.Random, requests: int = 20) -> Session:
    """Another workload, on what a power cut has left."""
    done = Session(files, rng)
    done.run(requests, close=rng.random() < 0.5)
    return done
