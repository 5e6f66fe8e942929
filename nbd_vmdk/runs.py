"""A run: a piece of the disk, and who holds it.  ``map``, copying and comparing go through a disk by them."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nbd_vmdk.extents.base import Kind


class Run(NamedTuple):
    """A piece of the disk, and who holds it.

    ``depth`` says which link (0 is the top), None if none does; ``file`` and ``at`` are the place in a file,
    ``at`` being None where the bytes are compressed.
    """

    offset: int
    length: int
    kind: Kind
    depth: int | None
    file: str | None
    at: int | None


def joined(pieces: Iterable[Run]) -> Iterator[Run]:
    """Runs that follow each other as maximal ones: those of one sort that lie next to each other as one."""
    last: Run | None = None
    for run in pieces:
        both = None if last is None else _join(last, run)
        if both is None and last is not None:
            yield last
        last = both or run
    if last is not None:
        yield last


def _join(one: Run, two: Run) -> Run | None:
    """Both as one run, if they are of the same sort and, for data, next to each other in one file."""
    if one.kind is not two.kind or one.depth != two.depth or one.file != two.file:
        return None
    if one.at is not None and one.at + one.length != two.at:
        return None
    return one._replace(length=one.length + two.length)
