"""Every real image of the corpus through the engine: whole and right, or refused with one clean line."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbd_vmdk import Disk, VmdkError, open_disk
from nbd_vmdk.extents.base import Kind
from tests.corpus import Entry, entries
from tests.engine import NOTHING, joinable
from tests.images.content import GIB, KIB, MIB

Unpack = Callable[[Entry], str]
STEP = MIB
_ZEROS = bytes(STEP)


def pieces(disk: Disk, *, trust_runs: bool) -> Iterator[bytes | memoryview]:
    """The disk's bytes in order; with `trust_runs` long stretches of zeros are read in samples only."""
    buf = memoryview(bytearray(STEP))
    for run in disk.runs():
        for offset in range(run.offset, run.offset + run.length, STEP):
            length = min(STEP, run.offset + run.length - offset)
            if run.kind in NOTHING and trust_runs and offset % (64 * MIB) >= STEP:
                yield _ZEROS[:length]
                continue
            disk.read_into(buf[:length], offset)
            yield buf[:length]


def streams() -> list[Any]:
    """Parameters for the entries that are streamOptimized."""
    found = entries("open")
    return [entry for entry in found if entry.values[0] is None or "stream" in entry.values[0]["kind"]]


@pytest.mark.parametrize("entry", entries("open"))
def test_image_reads_right(corpus: Unpack, entry: Entry) -> None:
    digest = hashlib.sha256()
    try:
        disk = open_disk(corpus(entry))
    except VmdkError:
        if not entry.get("optional"):
            raise
        pytest.skip("refused, as it may be")
    with disk:
        assert disk.size == entry["virtual_size"]
        for piece in pieces(disk, trust_runs=disk.size > GIB):
            digest.update(piece)
    assert digest.hexdigest() == entry["sha256"]


@pytest.mark.parametrize("entry", entries("open"))
def test_runs_of_an_image(corpus: Unpack, entry: Entry) -> None:
    """They cover the disk, none could be longer, and what they call zeros is."""
    with open_disk(corpus(entry)) as disk:
        at, last = 0, None
        for run in disk.runs():
            assert run.offset == at
            assert last is None or not joinable(last, run)
            assert run.kind is not Kind.LOST
            at, last = at + run.length, run
            if run.kind in NOTHING:
                for offset in (run.offset, run.offset + run.length - min(run.length, 64 * KIB)):
                    assert not any(disk.pread(min(run.length, 64 * KIB), offset))
        assert at == disk.size


@pytest.mark.parametrize("entry", streams())
def test_salvage_of_a_whole_stream(corpus: Unpack, entry: Entry) -> None:
    """Walking the markers of what is not damaged loses nothing."""
    path = corpus(entry)
    with open_disk(path) as disk, open_disk(path, salvage=True) as salvaged:
        assert list(salvaged.runs()) == list(disk.runs())
        for run in disk.runs():
            if run.kind is Kind.PACKED:
                assert salvaged.pread(run.length, run.offset) == disk.pread(run.length, run.offset)


@pytest.mark.parametrize("entry", entries("refuse"))
def test_image_is_refused(corpus: Unpack, entry: Entry) -> None:
    path = corpus(entry)
    start = time.monotonic()
    with pytest.raises(VmdkError) as caught:
        open_disk(path).close()
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
