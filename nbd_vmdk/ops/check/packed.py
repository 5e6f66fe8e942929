"""Inflating every grain of a compressed extent, on all processors (inflating lets Python's lock go).

The engine's own reader does it, so what is found here is what a guest would meet: a marker for another
grain, a size that can't be, a broken stream, a wrong checksum, too few bytes.  Grains are taken in the order
of the file, so that a disk drive reads on.
"""

import os
from array import array
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import Unreadable, VmdkError
from nbd_vmdk.extents.stream import Inflater
from nbd_vmdk.ondisk.hosted import HostedHeader
from nbd_vmdk.ops.check.entries import Rules
from nbd_vmdk.ops.check.scan import TableSet
from nbd_vmdk.units import SECTOR

#: Grains of one piece of work: some 100 calls to the threads' queue a second.
_TOGETHER: Final = 128
#: Tables whose grains are sorted together.
_TABLES: Final = 64


class _Rows:
    """The tables being looked at, as the inflater asks for them."""

    def __init__(self) -> None:
        self.tables: dict[int, array[int]] = {}

    def get(self, page: int) -> "array[int] | None":
        return self.tables.get(page)


def damaged_grains(rules: Rules, header: HostedHeader, tables: TableSet, used: int) -> dict[int, str]:
    """Grains that can't be inflated, and why; those whose entries can't be right are passed over."""
    context = rules.subject.context
    context.expect(used * header.grain)
    faults: dict[int, str] = {}
    workers = len(os.sched_getaffinity(0))
    waiting: deque[Future[dict[int, str]]] = deque()

    def collect(most: int) -> None:
        while len(waiting) > most:
            found = waiting.popleft().result()
            faults.update(found)

    pool = ThreadPoolExecutor(workers)
    try:
        for first in range(0, len(tables.places), _TABLES):
            rows = tables.rows(first, min(_TABLES, len(tables.places) - first))
            flat = rows.reshape(-1)
            grains = np.flatnonzero(rules.good(flat) & (flat >= rules.codes))
            grains = grains[grains + first * tables.entries < rules.total]
            grains = grains[np.argsort(flat[grains], kind="stable")]
            view = _Rows()
            for number in np.unique(grains // tables.entries).tolist():
                view.tables[first + number] = array("I", rows[number].tolist())
            # No cache: no grain is read twice.
            inflater = Inflater(rules.subject.storage, header, view, Cache(1), rules.visible * SECTOR)
            for at in range(0, len(grains), _TOGETHER):
                piece = (grains[at : at + _TOGETHER] + first * tables.entries).tolist()
                waiting.append(pool.submit(_inflate, rules, inflater, piece))
                collect(4 * workers)
                context.advance(len(piece) * header.grain)
        collect(0)
    finally:
        pool.shutdown(cancel_futures=True)
    return faults


def _inflate(rules: Rules, inflater: Inflater, grains: list[int]) -> dict[int, str]:
    faults = {}
    for index in grains:
        length = rules.shown(index) * SECTOR
        if not length:
            continue
        try:
            inflater.read_into(memoryview(bytearray(length)), index * rules.grain * SECTOR)
        except Unreadable as error:
            faults[index] = str(error.fields["why"])
        except VmdkError as error:
            faults[index] = error.message
    return faults
