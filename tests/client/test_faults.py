"""Servers that fail, hang, die or were never there; callers who leave."""

import asyncio
import builtins
import errno
import gc
import random
import socket
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nbd_vmdk import client
from nbd_vmdk.client import binding
from nbd_vmdk.errors import NbdError
from tests.client.servers import Kit, nbdkit, run


def test_the_servers_error_is_raised_and_harms_nothing_else() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri, connections=2) as disk:
            found = await asyncio.gather(
                *(disk.pread(512, at * 512) for at in range(50)),
                *(disk.pwrite(b"x" * 512, at * 512) for at in range(50)),
                return_exceptions=True,
            )
            assert {getattr(each, "errno", None) for each in found[:50]} == {errno.EIO}
            assert found[50:] == [None] * 50
            with pytest.raises(NbdError, match="failed to read 512 bytes at 1024: Input/output error"):
                await disk.pread(512, 1024)

    with nbdkit("--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=1") as kit:
        run(main(kit.uri))


def test_an_error_in_a_part_is_the_error_of_the_whole() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri) as disk:
            with pytest.raises(NbdError) as caught:
                await disk.pwrite(bytes(65 << 20), 0)
            assert caught.value.errno == errno.ENOSPC
            await disk.settled()
            assert len(await disk.pread(512, 0)) == 512

    with nbdkit("--filter=error", "memory", "70M", "error-pwrite=ENOSPC", "error-pwrite-rate=1") as kit:
        run(main(kit.uri))


def test_a_server_killed_in_the_middle() -> None:
    async def main(kit: Kit) -> None:
        async with client.connect(kit.uri, connections=2, window=8) as disk:
            # More than the window takes, so that some wait to be sent.
            waiting: list[asyncio.Task[object]] = [
                *(asyncio.create_task(disk.pread(512, at * 512)) for at in range(100)),
                asyncio.create_task(disk.flush()),
                asyncio.create_task(disk.block_status()),
            ]
            await asyncio.sleep(0.1)
            kit.kill()
            begin = time.monotonic()
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert time.monotonic() - begin < 8
            lost = [each for each in found if isinstance(each, NbdError)]
            assert len(lost) >= 100
            assert {each.errno for each in lost} == {errno.ENOTCONN}
            with pytest.raises(NbdError, match="the connection is lost"):
                await disk.pwrite(b"x", 0)

    with nbdkit("--filter=delay", "memory", "1M", "delay-read=10") as kit:
        run(main(kit))


def test_a_loss_while_idle_is_noticed() -> None:
    async def main(kit: Kit) -> None:
        async with client.connect(kit.uri) as disk:
            await disk.pread(512, 0)
            kit.kill()
            await asyncio.sleep(0.05)
            with pytest.raises(NbdError) as caught:
                await disk.pread(512, 0)
            assert caught.value.errno == errno.ENOTCONN

    with nbdkit("memory", "1M") as kit:
        run(main(kit))


def test_a_timeout_leaves_the_rest_alone() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri) as disk:
            buffer = bytearray(4096)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await disk.pread_into(buffer, 0)
            # The server has not answered: the buffer is still its to fill.
            with pytest.raises(BufferError):
                buffer.append(0)
            await disk.pwrite(b"x" * 512, 0)
            await disk.settled()
            buffer.append(0)
            assert await disk.pread(512, 0) == b"x" * 512

    with nbdkit("--filter=delay", "memory", "1M", "rdelay=200ms") as kit:
        run(main(kit.uri))


def test_a_storm_of_cancelling() -> None:
    async def main(uri: str) -> None:
        chance = random.Random(7)
        async with client.connect(uri, connections=2, window=16) as disk:
            await disk.pwrite(b"".join(bytes([at]) * 512 for at in range(256)), 0)
            for _ in range(10):
                tasks = [asyncio.create_task(disk.pread(512, at * 512)) for at in range(256)]
                cancelled = set()
                while pending := [each for each in tasks if not each.done()]:
                    victim = chance.choice(pending)
                    victim.cancel()
                    cancelled.add(victim)
                    await asyncio.sleep(0)
                    if len(cancelled) > 150:
                        break
                found = await asyncio.gather(*tasks, return_exceptions=True)
                for at, each in enumerate(found):
                    assert isinstance(each, asyncio.CancelledError) or each == bytearray([at]) * 512
            await disk.settled()
            assert [each.load for each in disk._connections] == [0, 0]
            assert [each._window._value for each in disk._connections] == [16, 16]
            assert await disk.pread(512, 512) == b"\1" * 512

    with nbdkit("memory", "1M") as kit:
        run(main(kit.uri))


def test_leaving_does_not_wait_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(uri: str) -> None:
        begin = time.monotonic()
        async with client.connect(uri) as disk:
            left = asyncio.create_task(disk.pread(512, 0))
            await asyncio.sleep(0.05)
        assert time.monotonic() - begin < 20
        with pytest.raises(NbdError, match="it was closed"):
            await left
        with pytest.raises(NbdError, match="it was closed"):
            await disk.pread(512, 0)

    monkeypatch.setattr("nbd_vmdk.client.client.CLOSE_TIMEOUT", 0.2)
    with nbdkit("--filter=delay", "memory", "1M", "rdelay=30") as kit:
        run(main(kit.uri))


def test_leaving_lets_what_is_in_flight_finish() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri) as disk:
            left = asyncio.create_task(disk.pwrite(b"x" * 512, 0))
            await asyncio.sleep(0.05)
        await left
        async with client.connect(uri) as disk:
            assert await disk.pread(1, 0) == b"x"

    with nbdkit("--filter=delay", "memory", "1M", "wdelay=200ms") as kit:
        run(main(kit.uri))


def test_nobody_there(tmp_path: Path) -> None:
    async def attempt(uri: str) -> NbdError:
        with pytest.raises(NbdError) as caught:
            async with client.connect(uri):
                pass
        return caught.value

    gone = run(attempt(f"nbd+unix:///?socket={tmp_path}/s"))
    assert gone.errno == errno.ENOENT
    assert "can't connect: No such file" in str(gone)
    assert f"is the server running? nbdinfo 'nbd+unix:///?socket={tmp_path}/s'" in str(gone.hint)
    assert run(attempt("nbd://localhost:1")).errno == errno.ECONNREFUSED
    assert run(attempt("disk.vmdk")).errno == errno.EINVAL
    assert run(attempt("http://localhost/")).errno == errno.EINVAL


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def attempt() -> None:
        async with client.connect(f"nbd+unix:///?socket={tmp_path}/mute"):
            pass

    monkeypatch.setattr(binding, "PATIENCE", 0.3)
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(f"{tmp_path}/mute")
        mute.listen()
        with pytest.raises(NbdError, match=r"mute: no answer in 0\.3 s") as caught:
            run(attempt())
    assert caught.value.errno == errno.ETIMEDOUT


def test_no_such_export() -> None:
    async def main(uri: str) -> None:
        wrong = uri.replace("nbd+unix:///", "nbd+unix:///wrong")
        with pytest.raises(NbdError, match=r"can't connect: .*'wrong'") as caught:
            async with client.connect(wrong):
                pass
        assert caught.value.hint == f"nbdinfo --list '{wrong}' tells what it offers"

    with nbdkit("--filter=exportname", "memory", "1M", "exportname=right", "exportname-strict=true") as kit:
        run(main(kit.uri))


@pytest.mark.parametrize("said", [b"", b"SSH-2.0-OpenSSH_9\r\n", b"NBDMAGICIHAVEOPT\0\1", bytes(200)])
def test_what_answers_is_no_nbd_server(said: bytes, tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.write_eof()
        try:
            await reader.read()
        except ConnectionError:
            pass
        writer.close()

    async def main() -> None:
        uri = f"nbd+unix:///?socket={tmp_path}/s"
        async with await asyncio.start_unix_server(answer, tmp_path / "s"):
            with pytest.raises(NbdError):
                async with client.connect(uri):
                    pass
            with pytest.raises(NbdError):
                await client.list_exports(uri)

    run(main())


def test_connecting_to_one_who_says_nothing_can_be_given_up(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_unix_server(silent, tmp_path / "s"):
            begin = time.monotonic()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1), client.connect(f"nbd+unix:///?socket={tmp_path}/s"):
                    pass
            assert time.monotonic() - begin < 8
            await asyncio.sleep(0.02)

    run(main())


def test_without_libnbd_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> ModuleType:
        if name == "nbd":
            raise ImportError(name)
        return real(name, *rest)

    async def main() -> None:
        with pytest.raises(NbdError, match="not installed") as caught:
            async with client.connect("nbd://localhost"):
                pass
        assert "apt-get install python3-libnbd" in str(caught.value.hint)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", missing)
        run(main())
    # Something else that goes by this name.
    monkeypatch.setitem(sys.modules, "nbd", ModuleType("nbd"))
    run(main())


def test_no_descriptor_is_left_open() -> None:
    async def main(uri: str) -> None:
        for _ in range(3):
            async with client.connect(uri, connections=3) as disk:
                await disk.pread(512, 0)
            await client.list_exports(uri)

    with nbdkit("memory", "1M") as kit:
        before = len(list(Path("/proc/self/fd").iterdir()))
        run(main(kit.uri))
        gc.collect()
        assert len(list(Path("/proc/self/fd").iterdir())) == before
