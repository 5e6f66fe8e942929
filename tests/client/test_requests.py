"""Single requests, and many at once."""

import asyncio
import errno
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from nbd_vmdk import client
from nbd_vmdk.client.client import _LONGEST
from nbd_vmdk.errors import NbdError, OptionError, OutOfRange
from tests.client.servers import nbdkit, run

MIB = 1 << 20


def test_all_kinds_of_requests() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri) as disk:
            assert (disk.size, disk.connections) == (8 * MIB, 1)
            assert disk.export.can_zero
            assert not disk.export.read_only
            await disk.pwrite(b"hello", 100)
            assert await disk.pread(7, 99) == b"\0hello\0"
            buffer = bytearray(b"x" * 8)
            await disk.pread_into(memoryview(buffer)[2:6], 100)
            assert buffer == b"xxhellxx"
            await disk.zero(2, 101, fua=True, no_hole=True)
            assert await disk.pread(5, 100) == b"h\0\0lo"
            await disk.trim(1 * MIB, 0)
            await disk.cache(1 * MIB, 0)
            await disk.pwrite(memoryview(b"fua"), 8 * MIB - 3, fua=True)
            assert await disk.pread(3, 8 * MIB - 3) == b"fua"
            await disk.flush()
            assert await disk.pread(0, 8 * MIB) == b""
            await disk.pwrite(b"", 0)
            await disk.zero(0, 0)
            for length, offset in ((1, 8 * MIB), (2, 8 * MIB - 1), (-1, 5), (5, -1)):
                with pytest.raises(OutOfRange):
                    await disk.pread(length, offset) if length > 0 else await disk.zero(length, offset)

    with nbdkit("memory", "8M") as kit:
        run(main(kit.uri))


def test_long_requests_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri, connections=2) as disk:
            assert disk.export.maximum_block == 64 << 10
            data = os.urandom(3 * MIB + 4096)
            await disk.pwrite(data, 4096)
            assert await disk.pread(len(data) + 8192, 0) == bytes(4096) + data + bytes(4096)
            await disk.zero(3 * MIB, 8192)
            assert await disk.pread(3 * MIB + 8192, 0) == bytes(4096) + data[:4096] + bytes(3 * MIB)

    monkeypatch.setattr("nbd_vmdk.client.client._LONGEST", 256 << 10)
    with nbdkit(
        "--filter=blocksize-policy", "memory", "8M", "blocksize-minimum=512", "blocksize-preferred=4096",
        "blocksize-maximum=64K", "blocksize-error-policy=error",
    ) as kit:  # fmt: skip
        run(main(kit.uri))


def test_a_huge_zero() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri) as disk:
            await disk.zero(disk.size, 0)
            assert await disk.block_status() == [client.Run(0, disk.size, hole=True, zero=True)]

    assert _LONGEST < 1 << 40
    with nbdkit("memory", "1T") as kit:
        run(main(kit.uri))


def test_what_is_not_aligned_is_refused() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri) as disk:
            with pytest.raises(NbdError) as caught:
                await disk.pread(100, 512)
            assert caught.value.errno == errno.EINVAL
            assert caught.value.file == uri
            assert len(await disk.pread(512, 512)) == 512

    with nbdkit("--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=512") as kit:
        run(main(kit.uri))


def test_two_hundred_in_flight() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri, connections=4, window=50) as disk:
            await disk.pwrite(b"".join(bytes([each]) * 512 for each in range(200)), 0)
            begin = time.monotonic()
            found = await asyncio.gather(*(disk.pread(512, each * 512) for each in range(200)))
            # One after another they would take 40 seconds.
            assert time.monotonic() - begin < 10
            assert [each[0] for each in found] == list(range(200))

    with nbdkit("-t", "64", "--filter=delay", "memory", "1M", "rdelay=200ms") as kit:
        run(main(kit.uri))


def test_the_window_bounds_what_is_in_flight() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri, window=3) as disk:
            (connection,) = disk._connections
            waiting = [asyncio.create_task(disk.pread(512, 0)) for _ in range(12)]
            while not all(each.done() for each in waiting):
                assert len(connection._open) <= 3
                await asyncio.sleep(0.005)
            assert connection.load == 0

    with nbdkit("--filter=delay", "memory", "1M", "rdelay=20ms") as kit:
        run(main(kit.uri))


def test_a_request_is_sent_at_once_whatever_else_waits() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri) as disk:
            slow = asyncio.create_task(disk.pread(512, 0))
            await asyncio.sleep(0.05)
            for _ in range(10):
                await disk.pwrite(b"x" * 512, 512)
            assert not slow.done()
            await slow

    with nbdkit("--filter=delay", "memory", "1M", "rdelay=1") as kit:
        run(main(kit.uri))


def test_reading_and_writing_much_at_once_on_one_connection() -> None:
    async def main(uri: str) -> None:
        blob = os.urandom(MIB)

        async def there_and_back(at: int) -> None:
            for _ in range(3):
                await disk.pwrite(blob, at * MIB)
                assert await disk.pread(MIB, at * MIB) == blob

        async with client.connect(uri) as disk:
            await asyncio.gather(*(there_and_back(at) for at in range(24)))

    with nbdkit("memory", "24M") as kit:
        run(main(kit.uri))


def test_buffers_are_let_go_of() -> None:
    async def main(uri: str) -> None:
        async with client.connect(uri) as disk:
            buffer = bytearray(4096)
            await disk.pread_into(buffer, 0)
            await disk.pwrite(buffer, 0)
            # While anybody holds a view of it this is a BufferError.
            buffer.append(0)
            task = asyncio.create_task(disk.pread_into(buffer, 0))
            await asyncio.sleep(0)
            with pytest.raises(BufferError):
                buffer.append(0)
            await task
            buffer.append(0)

    with nbdkit("memory", "1M") as kit:
        run(main(kit.uri))


def test_exports_by_name(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1" * 4096)
    (tmp_path / "zwei & zwei").write_bytes(b"2" * 8192)

    async def main(uri: str) -> None:
        found = {each.name: each for each in await client.list_exports(uri)}
        assert {name: each.size for name, each in found.items()} == {"one": 4096, "zwei & zwei": 8192}
        async with client.connect(found["zwei & zwei"].uri) as disk:
            assert disk.export.name == "zwei & zwei"
            assert await disk.pread(1, 0) == b"2"
        async with client.connect(uri, export="one") as disk:
            assert await disk.pread(1, 0) == b"1"
        with pytest.raises(NbdError):
            async with client.connect(uri, export="three"):
                pass

    with nbdkit("file", f"dir={tmp_path}") as kit:
        run(main(kit.uri))


def test_tcp_and_tls_with_a_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text(f"alice:{os.urandom(32).hex()}\n")
    keys.chmod(0o600)
    tls = client.Tls(psk=str(keys), username="alice")

    async def main(uri: str) -> None:
        async with client.connect(uri, connections=2, tls=tls) as disk:
            blob = os.urandom(2 * MIB)
            await asyncio.gather(*(disk.pwrite(blob, at * 2 * MIB) for at in range(4)))
            found = await asyncio.gather(*(disk.pread(2 * MIB, at * 2 * MIB) for at in range(4)))
            assert found == [blob] * 4
        assert [each.size for each in await client.list_exports(uri, tls=tls)] == [8 * MIB]
        for wrong in (None, client.Tls(psk=str(keys), username="mallory")):
            with pytest.raises(NbdError):
                async with client.connect(uri, tls=wrong):
                    pass

    async def plain(uri: str) -> None:
        with pytest.raises(NbdError):
            async with client.connect(uri, tls=tls):
                pass

    with nbdkit("--tls=require", f"--tls-psk={keys}", "memory", "8M") as kit:
        run(main(kit.uri))
    # TLS that was asked for is not done without.
    with nbdkit("--tls=off", "memory", "8M") as kit:
        run(plain(kit.uri))


def certificates(folder: Path) -> tuple[Path, Path]:
    """What a server and a client need, made by an authority of our own for localhost."""
    server, user = folder / "server", folder / "client"
    for each in (server, user):
        each.mkdir()
    for each, name, more in (
        (server, "ca", ["-subj", "/CN=test", "-addext", "basicConstraints=critical,CA:TRUE"]),
        (server, "server", ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]),
    ):
        signed = [] if name == "ca" else ["-CA", server / "ca-cert.pem", "-CAkey", server / "ca-key.pem"]
        command: list[str | Path] = [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-keyout", each / f"{name}-key.pem", "-out", each / f"{name}-cert.pem"),
            *map(str, signed),
            *more,
        ]
        subprocess.run(command, check=True, capture_output=True)
    shutil.copy(server / "ca-cert.pem", user)
    return server, user


def test_tls_with_certificates(tmp_path: Path) -> None:
    server, user = certificates(tmp_path)
    (tmp_path / "other").mkdir()
    _, stranger = certificates(tmp_path / "other")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def attempt(uri: str, tls: client.Tls | None) -> None:
        async with client.connect(uri, tls=tls) as disk:
            assert await disk.pread(512, 0) == bytes(512)

    ours, anyone = client.Tls(certificates=str(user)), client.Tls(verify_peer=False)
    with nbdkit(
        "--tls=require", f"--tls-certificates={server}", "-p", port, "-i", "127.0.0.1", "memory", "1M"
    ):
        run(attempt(f"nbds://localhost:{port}", ours))
        run(attempt(f"nbd://127.0.0.1:{port}", anyone))
        for uri, tls, why in (
            (f"nbds://localhost:{port}", None, "without a folder"),
            (f"nbds://localhost:{port}", client.Tls(), "without a folder"),
            (f"nbds://localhost:{port}", client.Tls(certificates=str(stranger)), "verification"),
            # The certificate is for another name.
            (f"nbds://127.0.0.1:{port}", ours, "verification"),
            (f"nbd://localhost:{port}", None, "requires TLS"),
        ):
            with pytest.raises(NbdError, match=why):
                run(attempt(uri, tls))
    with nbdkit("--tls=require", f"--tls-certificates={server}", "memory", "1M") as kit:
        run(attempt(kit.uri, anyone))
        for uri, tls in ((kit.uri, ours), (kit.uri.replace("nbd+", "nbds+"), ours)):
            with pytest.raises(NbdError, match="local socket"):
                run(attempt(uri, tls))


def test_connections_are_as_many_as_make_sense() -> None:
    async def main(uri: str, expected: int) -> None:
        async with client.connect(uri, connections=3) as disk:
            assert disk.connections == expected

    with nbdkit("memory", "1M") as kit:
        run(main(kit.uri, 3))
    with nbdkit("--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable") as kit:
        run(main(kit.uri, 1))

    async def refused(**options: int) -> None:
        with pytest.raises(OptionError):
            async with client.connect("nbd://localhost", **options):  # type: ignore[arg-type]
                pass

    run(refused(connections=0))
    run(refused(window=0))
