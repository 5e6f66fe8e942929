"""Whatever is asked, in whatever company, the disk is what a bytearray would be."""

import asyncio
from collections.abc import Awaitable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbd_vmdk import client
from tests.client.servers import Kit, nbdkit

SLOT = 8192
SLOTS = 12


@pytest.fixture(scope="module")
def kit() -> Iterator[Kit]:
    with nbdkit("--filter=blocksize-policy", "memory", SLOT * SLOTS, "blocksize-maximum=4096") as made:
        yield made


#: What to do in a slot: which of the requests, from where, how much, with which byte, cancelled or not.
ACTION = st.tuples(
    st.sampled_from(["read", "write", "zero", "flush", "status"]),
    st.integers(0, SLOT - 1),
    st.integers(0, SLOT),
    st.integers(1, 255),
    st.booleans(),
)

#: Rounds; in each, requests for slots of their own are in flight at once.
ROUNDS = st.lists(st.dictionaries(st.integers(0, SLOTS - 1), ACTION), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=ROUNDS, connections=st.integers(1, 3), window=st.integers(1, 8))
def test_a_bytearray(
    kit: Kit,
    rounds: list[dict[int, tuple[str, int, int, int, bool]]],
    connections: int,
    window: int,
) -> None:
    async def main() -> None:
        async with client.connect(kit.uri, connections=connections, window=window) as disk:
            await disk.zero(disk.size, 0)
            model = bytearray(disk.size)
            for each in rounds:
                await one_round(disk, model, each)
            assert await disk.pread(disk.size, 0) == model
            for run in await disk.block_status():
                assert not run.zero or not any(model[run.offset : run.offset + run.length])

    asyncio.run(main())


async def one_round(
    disk: client.Client, model: bytearray, round: dict[int, tuple[str, int, int, int, bool]]
) -> None:
    before = bytes(model)
    tasks: dict[int, asyncio.Task[object]] = {}
    for slot, (what, start, length, byte, _cancelled) in round.items():
        offset = slot * SLOT + start
        length = min(length, SLOT - start)
        request: Awaitable[object]
        if what == "read":
            request = disk.pread(length, offset)
        elif what == "write":
            request = disk.pwrite(bytes([byte]) * length, offset)
            model[offset : offset + length] = bytes([byte]) * length
        elif what == "zero":
            request = disk.zero(length, offset)
            model[offset : offset + length] = bytes(length)
        elif what == "flush":
            request = disk.flush()
        else:
            request = disk.block_status(length, offset)
        tasks[slot] = asyncio.ensure_future(request)
    await asyncio.sleep(0)
    for slot, action in round.items():
        if action[4]:
            tasks[slot].cancel()
    found = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
    await disk.settled()
    for slot, result in found.items():
        what, start, length, _, _ = round[slot]
        offset = slot * SLOT + start
        length = min(length, SLOT - start)
        if isinstance(result, asyncio.CancelledError):
            # It may have happened or not, and a part of it may: what is there now is what is there.
            now = await disk.pread(SLOT, slot * SLOT)
            at = range(slot * SLOT, slot * SLOT + SLOT)
            assert all(byte in (before[place], model[place]) for place, byte in zip(at, now, strict=True))
            model[slot * SLOT : slot * SLOT + SLOT] = now
        elif what == "read":
            assert result == before[offset : offset + length]
        elif what == "status":
            assert isinstance(result, list)
            assert sum(run.length for run in result) == length
        else:
            assert result is None
