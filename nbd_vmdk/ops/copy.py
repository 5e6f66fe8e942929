"""The one copier: bytes from a source to a sink, by several threads, without what is not there.

convert, commit, compact and rebase are the same loop over different pairs.  A source tells what backs its
ranges (its runs) and reads; a sink is told zeros and written to.  The loop::

    runs of the source -> cut and gathered into items of at most a chunk of data -> workers

A worker takes the next item, reads all its data into a buffer of its own, looks for zeros in it if that was
asked for, and hands the rest to the sink.  Where both are files of one file system that lets files share
blocks, it reads nothing and has the sink share them.  Items are taken in the order of the disk and done in
any order.  A sink that must append in order (streamOptimized) does what it can at once, deflating, and gives
the rest back as a function, which is called when all that lies before it has been done.

Memory is a chunk for each worker, whatever the size of the disk, and what a sink keeps of it until its
turn.  The first error stops everybody and is raised; so does an interrupt, after the items at work.

What is not done here: a sink's end (flush, close, publish) is its owner's to call, and only if nothing was
raised.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from nbd_vmdk.extents.base import NOTHING, Kind
from nbd_vmdk.units import MIB, align_down, align_up

#: Bytes that a worker reads and writes at once.  From 256 KiB to 4 MiB copying between files of the page
#: cache goes at the same speed (8 to 9 GB/s with two workers on two processors); deflating wants items small
#: enough to be shared out evenly, a network large ones.
CHUNK: Final = MIB
#: Workers beyond which nothing gets faster where bytes are only moved: as many as processors is best, and
#: more take turns at the interpreter.  Deflating, which does not hold it, takes all processors there are.
MAX_MOVERS: Final = 4
MAX_WORKERS: Final = 64
#: Parts of an item, so that one with many small parts does not keep the others waiting for its turn.
_MAX_PARTS: Final = 64
#: Seconds between two calls of ``progress``.
_TELL_EVERY: Final = 0.1

#: Told bytes of the disk that are done, and how many there are; called in the thread that called copy().
Progress = Callable[[int, int], None]
#: Told a range of data, makes it the sink's without copying; how many bytes of it, from its beginning, were.
Share = Callable[[int, int], int]
#: What must be done in the order of the disk.
Rest = Callable[[], None]


class Source(Protocol):
    """What is read.  Any number of threads may call at once."""

    @property
    def size(self) -> int:
        """Bytes it has."""

    def runs(self, offset: int, length: int) -> Iterable[tuple[Kind, int]]:
        """What backs a range, in order, as (kind, length); the lengths add up to ``length``.

        ZERO must read as zeros in the sink, HOLE is to be left as it is there, everything else is copied.
        """

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf`` from ``offset`` on, or raise; HOLE and ZERO read as zeros."""


class Sink(Protocol):
    """What is written.  Any number of threads may call at once; a buffer is not kept after the call.

    Either call may return a function: the rest of the work, called when everything before it is done.
    """

    def write(self, buf: memoryview, offset: int) -> Rest | None:
        """Write ``buf`` at ``offset``."""

    def zero(self, offset: int, length: int) -> Rest | None:
        """Make a range read as zeros; nothing to do where the sink is new and does so already."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did, in bytes: ``data`` written, ``zeros`` known or found, ``holes`` left alone.

    ``shared`` is what of the data was not written but shared.
    """

    data: int
    zeros: int
    holes: int
    shared: int = 0


class _Part(NamedTuple):
    offset: int
    length: int
    kind: Kind


def default_threads(*, deflating: bool = False) -> int:
    """Workers that are best here: one for each processor this process may use, within reason.

    Moving bytes takes two even on one processor: one waits for the disk while the other copies.
    """
    processors = len(os.sched_getaffinity(0))
    if deflating:
        return min(processors + 1, MAX_WORKERS)
    return min(max(processors, 2), MAX_MOVERS)


def copy(
    source: Source,
    sink: Sink,
    *,
    offset: int = 0,
    length: int | None = None,
    grain: int = 1,
    zero_grain: int = 0,
    threads: int | None = None,
    share: Share | None = None,
    progress: Progress | None = None,
) -> Copied:
    """Copy a range (to the end by default) of ``source`` to the same place of ``sink``.

    With ``grain`` the sink is written whole grains only, cut at the source's end: zeros around data are
    read along with it (a source that has HOLEs must be copied without).  With ``zero_grain``, a multiple of
    ``grain``, pieces of that size of the data that are all zeros are told to the sink as zeros; not so of
    what ``share`` takes, which is not read.  Raises the first error of source, sink or ``progress``; an
    interrupt is raised once the items at work are done.
    """
    end = source.size if length is None else offset + length
    copier = _Copier(source, sink, offset, end, grain, zero_grain, share, progress)
    return copier.run(threads or default_threads())


class _Copier:
    """One copy, and what its workers share."""

    def __init__(
        self,
        source: Source,
        sink: Sink,
        offset: int,
        end: int,
        grain: int,
        zero_grain: int,
        share: Share | None,
        progress: Progress | None,
    ) -> None:
        self._source = source
        self._sink = sink
        self._start, self._end = offset, end
        self._zero_grain = zero_grain
        self._share = share
        self._chunk = align_up(CHUNK, max(grain, zero_grain, 1))
        self._zeros = memoryview(bytes(self._chunk))
        self._progress = progress
        runs = _placed(source.runs(offset, end - offset), offset)
        parts = runs if grain <= 1 else _widened(runs, offset, end, grain)
        self._items = enumerate(_items(parts, self._chunk))
        self._taking = threading.Lock()
        #: Guards what follows, and wakes who waits for its turn.
        self._turn = threading.Condition()
        self._next = 0  # the first item that is not done
        self._done: set[int] = set()  # later ones that are
        self._covered = 0
        self._counts = {Kind.DATA: 0, Kind.ZERO: 0, Kind.HOLE: 0}
        self._shared = 0
        self._error: BaseException | None = None

    def run(self, threads: int) -> Copied:
        workers: list[Future[None]] = []
        with ThreadPoolExecutor(threads, "copy") as pool:
            try:
                workers.extend(pool.submit(self._work) for _ in range(threads))
                while wait(workers, _TELL_EVERY, FIRST_EXCEPTION).not_done and self._error is None:
                    self._tell()
            except BaseException as error:
                self._stop(error)  # leaving the pool waits for the workers, who see it
                raise
        if self._error is not None:
            raise self._error
        self._tell()
        counts = self._counts
        return Copied(counts[Kind.DATA], counts[Kind.ZERO], counts[Kind.HOLE], self._shared)

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._covered, self._end - self._start)

    def _stop(self, error: BaseException) -> None:
        with self._turn:
            if self._error is None:
                self._error = error
            self._turn.notify_all()

    def _work(self) -> None:
        try:
            buf = bytearray(self._chunk)
            while (item := self._take()) is not None:
                number, parts = item
                rests = [rest for part in parts for rest in self._do(buf, part)]
                if rests:
                    self._wait_for(number)
                    for rest in rests:
                        rest()
                self._finish(number, parts)
        except BaseException as error:
            self._stop(error)
            raise

    def _take(self) -> tuple[int, list[_Part]] | None:
        """The next item, None if there is none or somebody met an error."""
        with self._taking:
            return None if self._error is not None else next(self._items, None)

    def _do(self, buf: bytearray, part: _Part) -> Iterator[Rest]:
        """Copy one part; what is left to do in order."""
        if part.kind is Kind.HOLE:
            self._count(Kind.HOLE, part.length)
            return
        if self._share is not None and part.kind is not Kind.ZERO:
            shared = self._share(part.offset, part.length)
            self._count(Kind.DATA, shared, shared)
            part = _Part(part.offset + shared, part.length - shared, part.kind)
            if not part.length:
                return
        pieces: Iterable[_Part] = (part,)
        if part.kind is not Kind.ZERO:
            with memoryview(buf) as view:
                self._source.read_into(view[: part.length], part.offset)
            if self._zero_grain:
                pieces = self._sifted(buf, part)
        for piece in pieces:
            if piece.kind is Kind.ZERO:
                rest = self._sink.zero(piece.offset, piece.length)
            else:
                begin = piece.offset - part.offset
                with memoryview(buf) as view:
                    rest = self._sink.write(view[begin : begin + piece.length], piece.offset)
            self._count(piece.kind, piece.length)
            if rest is not None:
                yield rest

    def _sifted(self, buf: bytearray, part: _Part) -> Iterator[_Part]:
        """The data of ``part``, which is in ``buf``, as runs of pieces that are zeros and that are not."""
        done = 0
        for begin, end in self._zero_runs(buf, part):
            if begin > done:
                yield _Part(part.offset + done, begin - done, Kind.DATA)
            yield _Part(part.offset + begin, end - begin, Kind.ZERO)
            done = end
        if done < part.length:
            yield _Part(part.offset + done, part.length - done, Kind.DATA)

    def _zero_runs(self, buf: bytearray, part: _Part) -> Iterator[tuple[int, int]]:
        """Where ``buf`` has pieces of zeros, as (begin, end); pieces lie on whole grains of the disk."""
        zeros, grain, length = self._zeros, self._zero_grain, part.length
        if buf.startswith(zeros[:length]):
            yield 0, length
            return
        head = min(-part.offset % grain, length)
        # The first byte of a piece tells of nearly all data that it is no zeros.
        firsts = zip(range(head, length, grain), buf[head:length:grain], strict=True)
        maybe = [at for at, byte in firsts if not byte]
        begin = end = 0
        for at in (0, *maybe) if head else maybe:
            stop = at + grain - (part.offset + at) % grain
            # Compares in place: a slice would be a copy, and memoryviews are compared byte by byte.
            if buf.startswith(zeros[: min(stop, length) - at], at):
                if at > end:
                    if end > begin:
                        yield begin, end
                    begin = at
                end = min(stop, length)
        if end > begin:
            yield begin, end

    def _count(self, kind: Kind, length: int, shared: int = 0) -> None:
        with self._turn:
            self._shared += shared
            self._counts[kind if kind in self._counts else Kind.DATA] += length

    def _wait_for(self, number: int) -> None:
        with self._turn:
            while self._next != number:
                if self._error is not None:
                    raise self._error
                self._turn.wait()

    def _finish(self, number: int, parts: list[_Part]) -> None:
        with self._turn:
            self._covered += sum(part.length for part in parts)
            self._done.add(number)
            while self._next in self._done:
                self._done.remove(self._next)
                self._next += 1
            self._turn.notify_all()


def _placed(runs: Iterable[tuple[Kind, int]], offset: int) -> Iterator[_Part]:
    for kind, length in runs:
        yield _Part(offset, length, kind)
        offset += length


def widened(runs: Iterable[tuple[Kind, int]], start: int, end: int, grain: int) -> Iterator[tuple[Kind, int]]:
    """The runs of a range without HOLEs, made to begin and end on grains: a grain with any data is data."""
    for part in _widened(_placed(runs, start), start, end, grain):
        yield part.kind, part.length


def _widened(runs: Iterable[_Part], start: int, end: int, grain: int) -> Iterator[_Part]:
    """The same range, in runs that begin and end on grains: a grain with any data in it is data."""
    done = start
    for offset, length, kind in runs:
        if kind in NOTHING:
            continue
        begin = max(align_down(offset, grain), done)
        stop = min(align_up(offset + length, grain), end)
        if begin > done:
            yield _Part(done, begin - done, Kind.ZERO)
        if stop > begin:
            yield _Part(begin, stop - begin, Kind.DATA)
            done = stop
    if end > done:
        yield _Part(done, end - done, Kind.ZERO)


def _items(parts: Iterable[_Part], chunk: int) -> Iterator[list[_Part]]:
    """What one worker does at a time: parts in order with at most a chunk of data in them."""
    item: list[_Part] = []
    room = chunk
    for offset, length, kind in parts:
        if kind in NOTHING:
            item.append(_Part(offset, length, kind))
            length = 0
        while length:
            count = min(length, room)
            item.append(_Part(offset, count, kind))
            offset, length, room = offset + count, length - count, room - count
            if not room:
                yield item
                item, room = [], chunk
        if len(item) >= _MAX_PARTS:
            yield item
            item, room = [], chunk
    if item:
        yield item
