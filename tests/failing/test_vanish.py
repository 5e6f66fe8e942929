"""A client that vanishes with many requests under way, which nbdkit 1.32 may not survive.

Its workers go on to answer on a connection whose first failed answer has closed it: "Assertion `sock >= 0'
failed".  So a server that is to be started again is watched here: what was flushed is there, on the
next connection and in the file, however often it died, and the file is sound.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import nbd

from nbd_vmdk import open_disk, serve
from nbd_vmdk.client import connect
from nbd_vmdk.errors import NbdError
from nbd_vmdk.serving.restarts import Restart
from tests.engine import same
from tests.images import desc
from tests.images.content import KIB, MIB, Content
from tests.sound import check_tables, read_tables

TURNS = 8
BLOCK = 64 * KIB
#: Nothing is there before, so that what is not flushed is lost with the tables in memory.
PLACE = 20 * MIB


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK)


def vanish(uri: str, turn: int) -> None:
    """Ask for much at once, write in between, where nobody looks, and be gone."""
    leaver = nbd.NBD()
    leaver.connect_uri(uri)
    for number in range(12):
        if number % 4 == 3:
            leaver.aio_pwrite(bytearray(noise(-turn)), 48 * MIB + number * BLOCK)
        else:
            leaver.aio_pread(bytearray(MIB), number * MIB)
    del leaver


async def flushed(uri: str, turn: int) -> None:
    """Write and flush; as often as it takes, because the server may die meanwhile."""
    while True:
        try:
            async with connect(uri) as disk:
                await disk.pwrite(noise(turn), PLACE + turn * BLOCK)
                await disk.flush()
                # What came later and was not flushed is not promised, and harms nothing.
                await disk.pwrite(noise(1000 + turn), 32 * MIB + turn * BLOCK)
                return
        except NbdError:
            await asyncio.sleep(0.02)


async def found(uri: str, turn: int) -> bytes:
    while True:
        try:
            async with connect(uri) as disk:
                return bytes(await disk.pread(BLOCK, PLACE + turn * BLOCK))
        except NbdError:
            await asyncio.sleep(0.02)


def test_what_was_flushed_survives_clients_that_vanish(tmp_path: Path) -> None:
    content = Content(64 * MIB).put(0, random.Random(1).randbytes(16 * MIB))
    image = desc.monolithic_sparse(str(tmp_path), "disk", content)

    async def main() -> None:
        policy = Restart(limit=None, delay=0.01, longest=0.05)
        async with serve(image.path, restart=policy) as server:
            for turn in range(TURNS):
                await flushed(server.uri, turn)
                try:
                    await asyncio.to_thread(vanish, server.uri, turn)
                except nbd.Error:
                    pass  # the server of the turn before is only dying now
                for earlier in range(turn + 1):
                    same(await found(server.uri, earlier), noise(earlier))

    asyncio.run(asyncio.wait_for(main(), 60))
    with open_disk(image.path) as disk:
        for turn in range(TURNS):
            same(disk.pread(BLOCK, PLACE + turn * BLOCK), noise(turn))
    check_tables(read_tables(image.path), clean=False)  # a server that died leaves the flag to 'check'
