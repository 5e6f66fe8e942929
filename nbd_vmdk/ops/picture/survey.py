"""What a picture shows of a disk: who holds how much of each part of it, link by link.

Every run of the disk, and for the whole picture of every link, is looked at once and counted into bins, so
memory depends on the bins and the links alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nbd_vmdk.disk import Disk
from nbd_vmdk.extents.base import Kind, Mapping, Source
from nbd_vmdk.link import Link
from nbd_vmdk.ops.copy import Progress
from nbd_vmdk.ops.picture.bins import Bins

#: Runs between two calls of ``progress``.
_TELL_EVERY = 4096


@dataclass
class LinkSurvey:
    """One link: what it holds, and what of that is seen through the links above it.

    held, zero, lost   what it has itself: data, zeros that hide its parents, what can't be read
    seen, seen_zero    what of held and zero the disk shows
    places             for each bin the place in the files (as one row) of the first data in it, or None
    pieces             runs of data without a break in guest or file, None where grains are compressed
    backwards          how many of them lie in the file before the one that precedes them in the guest
    """

    link: Link
    held: Bins
    zero: Bins
    lost: Bins
    seen: Bins
    seen_zero: Bins
    places: list[int | None]
    pieces: int | None = 0
    backwards: int = 0

    @property
    def file_size(self) -> int:
        """Bytes of all its files, of which ``places`` are places."""
        return sum(storage.size for storage in self.link.storages)


@dataclass
class Survey:
    """A disk: its links, and what of it nobody holds.

    There are ``count`` bins of ``width`` bytes, enough for the largest link.
    """

    name: str
    size: int
    width: int
    count: int
    links: list[LinkSurvey]
    hole: Bins
    lost: Bins


def survey(
    disk: Disk, width: int, *, whole: bool = True, progress: Progress = lambda _done, _all: None
) -> Survey:
    """Look at all of ``disk`` in bins of ``width`` bytes; at what links hold unseen only if ``whole``."""
    # A link may be larger than the disk, which then does not show its tail.
    count = -(-max(link.size for link in (disk.links if whole else (disk,))) // width)
    found = Survey(disk.links[0].name, disk.size, width, count, [], Bins(width, count), Bins(width, count))
    for link in disk.links:
        held, zero, lost, seen, seen_zero = (Bins(width, count) for _ in range(5))
        found.links.append(LinkSurvey(link, held, zero, lost, seen, seen_zero, [None] * count))
    total = disk.size + (sum(link.size for link in disk.links) if whole else 0)
    done = 0
    for number, run in enumerate(disk.runs()):
        _bins_of(found, run.kind, run.depth).add(run.offset, run.length)
        done += run.length
        if number % _TELL_EVERY == 0:
            progress(done, total)
    if whole:
        for each in found.links:
            for looked in _look(each):
                progress(done + looked, total)
            done += each.link.size
    progress(total, total)
    return found


def _bins_of(found: Survey, kind: Kind, depth: int | None) -> Bins:
    if kind is Kind.LOST:
        return found.lost
    if depth is None or kind is Kind.HOLE:
        return found.hole
    link = found.links[depth]
    return link.seen_zero if kind is Kind.ZERO else link.seen


def _look(found: LinkSurvey) -> Iterator[int]:
    """Count what a link has itself; now and then, how far that has come."""
    bases: dict[str, int] = {}
    base = 0
    for storage in found.link.storages:
        bases[storage.name] = base
        base += storage.size
    order = _Order(found, bases)
    offset = 0
    for number, mapping in enumerate(found.link.runs(0, found.link.size)):
        kind, length, _source, _at = mapping
        if kind is Kind.ZERO:
            found.zero.add(offset, length)
        elif kind is Kind.LOST:
            found.lost.add(offset, length)
        elif kind is not Kind.HOLE:
            found.held.add(offset, length)
            order.add(offset, mapping)
        offset += length
        if number % _TELL_EVERY == 0:
            yield offset


class _Order:
    """How the order in the files agrees with the guest's."""

    def __init__(self, found: LinkSurvey, bases: dict[str, int]) -> None:
        self._found = found
        self._bases = bases
        #: The end of the last piece: in the guest, where, and in the file.
        self._last: tuple[int, Source | None, int] = (-1, None, -1)

    def add(self, offset: int, mapping: Mapping) -> None:
        """Take the next mapping with data."""
        found = self._found
        kind, length, source, at = mapping
        if kind is Kind.PACKED or source is None:
            found.pieces = None  # where a compressed grain lies is not told
        if found.pieces is None or source is None:
            return
        guest, last, end = self._last
        self._last = offset + length, source, at + length
        if source is not last or at != end or offset != guest:
            found.pieces += 1
            found.backwards += source is last and at < end
        width = found.held.width
        place = self._bases.get(source.name, 0) + at - offset
        for index in range(offset // width, -(-(offset + length) // width)):
            if found.places[index] is None:
                found.places[index] = place + max(offset, index * width)
