"""Block status: merged, complete, however the server tells it."""

import random
from pathlib import Path

import pytest

from nbd_vmdk import client
from nbd_vmdk.client.client import Run
from nbd_vmdk.client.plan import Piece, pieces
from nbd_vmdk.errors import NbdError, OutOfRange
from tests.client.servers import nbdkit, run

#: Tells as much as it likes: a state for each block, `some` blocks in one answer.
PLUGIN = """
import nbdkit
API_VERSION = 2
states, block, some = [], 0, 0
def config(key, value):
    global states, block, some
    if key == "states": states = [int(each) for each in value]
    if key == "block": block = int(value)
    if key == "some": some = int(value)
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def open(readonly): return 1
def get_size(h): return len(states) * block
def can_extents(h): return True
def pread(h, buf, offset, flags):
    buf[:] = bytes(len(buf))
def extents(h, count, offset, flags):
    first = offset // block
    return [(at * block, block, states[at]) for at in range(first, min(first + some, len(states)))]
def dump_plugin(): pass
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "plugin.py"
    file.write_text(PLUGIN)
    return file


def of(states: str, block: int) -> list[Run]:
    """What the server should be understood to tell."""
    found: list[Run] = []
    for at, state in enumerate(states):
        hole, zero = bool(int(state) & 1), bool(int(state) & 2)
        if found and (found[-1].hole, found[-1].zero) == (hole, zero):
            found[-1] = found[-1]._replace(length=found[-1].length + block)
        else:
            found.append(Run(at * block, block, hole, zero))
    return found


@pytest.mark.parametrize("some", [1, 2, 7, 1000])
def test_short_answers_are_continued(plugin: Path, some: int) -> None:
    states = "".join(random.Random(some).choice("00333210") for _ in range(60))

    async def main(uri: str) -> None:
        async with client.connect(uri) as disk:
            assert await disk.block_status() == of(states, 512)
            for offset, length in ((0, 512), (512 * 7, 512 * 20), (512 * 59, 512), (100, 1000), (0, 0)):
                told = await disk.block_status(length, offset)
                assert sum(each.length for each in told) == length
                at = offset
                for each in told:
                    assert each.offset == at
                    state = int(states[at // 512])
                    assert (each.hole, each.zero) == (bool(state & 1), bool(state & 2))
                    at += each.length
            with pytest.raises(OutOfRange):
                await disk.block_status(512, 512 * 60)

    with nbdkit("python", plugin, f"states={states}", "block=512", f"some={some}") as kit:
        run(main(kit.uri))


def test_pieces_are_aligned_and_cover_all_zeros_that_are(plugin: Path) -> None:
    states = "".join(random.Random(1).choice("0033333") for _ in range(61))

    async def main(uri: str) -> None:
        async with client.connect(uri) as disk:
            for align in (512, 1024, 4096):
                found = [each async for each in pieces(disk, align)]
                at = 0
                for each in found:
                    assert each.offset == at
                    at += each.length
                    assert each.offset % align == 0
                    blocks = range(each.offset // 512, (each.offset + each.length) // 512)
                    if each.zero:
                        assert all(states[block] == "3" for block in blocks)
                assert at == disk.size
                whole = [
                    block
                    for block in range(0, disk.size, align)
                    if set(states[block // 512 : (block + align) // 512]) == {"3"}
                ]
                told = [
                    block
                    for each in found
                    if each.zero
                    for block in range(each.offset, each.offset + each.length, align)
                ]
                assert whole == told

    with nbdkit("python", plugin, f"states={states}", "block=512", "some=4") as kit:
        run(main(kit.uri))


def test_a_server_without_block_status_has_data_all_over() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri) as disk:
            assert not disk.export.has_block_status
            assert await disk.block_status() == [Run(0, 1 << 20, hole=False, zero=False)]
            assert [each async for each in pieces(disk, 512)] == [Piece(0, 1 << 20, zero=False)]

    with nbdkit("--no-sr", "memory", "1M") as kit:
        run(main(kit.uri))


def test_an_error_of_block_status_is_raised() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri) as disk:
            with pytest.raises(NbdError, match="ask for the status"):
                await disk.block_status()

    with nbdkit("--filter=error", "memory", "1M", "error-extents=EIO", "error-extents-rate=1") as kit:
        run(main(kit.uri))
