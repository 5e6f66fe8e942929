"""copy() and verify(), between servers of others and ours."""

import asyncio
import errno
import random
import subprocess
from pathlib import Path

import pytest

import nbd_vmdk
from nbd_vmdk import client
from nbd_vmdk.client.verifying import Range, _insert
from nbd_vmdk.errors import NbdError, OptionError
from tests.client.servers import nbdkit, run

MIB = 1 << 20


def patchwork(size: int, seed: int = 1) -> bytes:
    """Data and zeros by turns, in pieces from a sector to some MiB."""
    chance = random.Random(seed)
    made = bytearray()
    while len(made) < size:
        length = 512 * chance.choice([1, 7, 64, 128, 1000, 3000])
        made += chance.randbytes(length) if chance.random() < 0.5 else bytes(length)
    return bytes(made[:size])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A VMDK of patchwork."""
    (tmp_path / "raw").write_bytes(patchwork(24 * MIB))
    made = tmp_path / "disk.vmdk"
    command = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", str(tmp_path / "raw"), str(made)]
    subprocess.run(command, check=True)
    return made


def test_a_vmdk_to_another_server_and_into_another_vmdk(image: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.vmdk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", str(new), "24M"], check=True)
    told: list[tuple[int, int]] = []

    async def main(uri: str) -> None:
        async with nbd_vmdk.serve(image, read_only=True) as source, nbd_vmdk.serve(new) as target:
            done = await client.copy(source.uri, uri, progress=lambda *now: told.append(now))
            assert done.size == 24 * MIB == done.written + done.zeroed
            assert 5 * MIB < done.written < 20 * MIB
            async with client.connect(uri, connections=2) as middle:
                assert await middle.pread(24 * MIB, 0) == patchwork(24 * MIB)
                done = await client.copy(middle, target.uri, destination_is_zero=True)
                assert done.zeroed == 0
                assert done.skipped > 4 * MIB
            assert await client.verify(source.uri, target.uri) == []
        subprocess.run(
            ["qemu-img", "compare", "-q", "-f", "vmdk", "-F", "raw", new, tmp_path / "raw"], check=True
        )

    with nbdkit("memory", "24M") as kit:
        run(main(kit.uri))
    assert told == sorted(told)
    assert told[-1] == (24 * MIB, 24 * MIB)
    assert len(told) > 10


def test_zeros_are_really_written_over_what_was_there(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(patchwork(5 * MIB, ord(name[0])))

    async def main(uri: str) -> None:
        a, b, c = (client.export_uri(uri, name) for name in ("a", "b", "c"))
        assert await client.verify(a, b)
        await client.copy(a, b, connections=2, window=3, request_size=100_000)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        done = await client.copy(a, c, allocated=True)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
        assert done.skipped == 0

    with nbdkit("file", f"dir={tmp_path}") as kit:
        run(main(kit.uri))


def test_a_destination_that_can_not_zero() -> None:
    async def main(source: str, target: str) -> None:
        async with client.connect(source) as disk:
            await disk.pwrite(patchwork(3 * MIB), 0)
        async with client.connect(target) as disk:
            await disk.pwrite(b"x" * (4 * MIB), 0)
            assert not disk.export.can_zero
        done = await client.copy(source, target)
        assert (done.written, done.zeroed) == (3 * MIB, 0)
        async with client.connect(target) as disk:
            # What is beyond the source's end is not touched.
            assert await disk.pread(4 * MIB, 0) == patchwork(3 * MIB) + b"x" * MIB

    with nbdkit("memory", "3M") as source, nbdkit("--filter=nozero", "memory", "4M") as target:
        run(main(source.uri, target.uri))


def test_blocks_larger_than_the_sources_runs(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(patchwork(4 * MIB))
    policy = ["blocksize-minimum=32K", "blocksize-preferred=32K", "blocksize-maximum=64K"]

    async def main(source: str, target: str) -> None:
        await client.copy(source, target, connections=1)
        assert await client.verify(source, target) == []
        async with client.connect(target) as disk:
            assert disk.export.minimum_block == 32 << 10
            assert await disk.pread(4 * MIB, 0) == patchwork(4 * MIB)

    with (
        nbdkit("file", tmp_path / "raw") as source,
        nbdkit(
            "--filter=blocksize-policy", "memory", "4M", *policy, "blocksize-error-policy=error"
        ) as target,
    ):
        run(main(source.uri, target.uri))


def test_what_does_not_go() -> None:
    async def main(big: str, small: str, fixed: str, odd: str) -> None:
        for source, target, why in (
            (big, small, "has 1048576 bytes"),
            (small, fixed, "read-only"),
            (odd, big, "blocks of 4096 bytes"),
        ):
            with pytest.raises(OptionError, match=why):
                await client.copy(source, target)
        with pytest.raises(OptionError):
            await client.copy(small, big, window=0)
        with pytest.raises(OptionError):
            await client.verify(small, big, limit=0)
        with pytest.raises(NbdError, match="No such file"):
            await client.copy(small, "nbd+unix:///?socket=/nowhere/s")

    with (
        nbdkit("--filter=blocksize-policy", "memory", "2M", "blocksize-minimum=4096") as big,
        nbdkit("memory", "1M") as small,
        nbdkit("-r", "memory", "1M") as fixed,
        nbdkit("memory", 512 * 9) as odd,
    ):
        run(main(big.uri, small.uri, fixed.uri, odd.uri))


@pytest.mark.parametrize("side", ["source", "target"])
def test_the_first_error_ends_it(side: str) -> None:
    async def main(source: str, target: str) -> None:
        tasks = len(asyncio.all_tasks())
        with pytest.raises(NbdError) as caught:
            await client.copy(source, target)
        assert caught.value.errno == errno.EIO
        assert caught.value.file == (source if side == "source" else target)
        assert len(asyncio.all_tasks()) == tasks

    fails = ["--filter=error", "error-pread=EIO", "error-pwrite=EIO", "error-rate=100%"]
    with (
        nbdkit("data", "data=1", "size=32M", *(fails if side == "source" else [])) as source,
        nbdkit("memory", "32M", *(fails if side == "target" else [])) as target,
    ):
        run(main(source.uri, target.uri))


def test_what_the_progress_raises_is_raised() -> None:
    def tired(done: int, size: int) -> None:
        raise ZeroDivisionError

    async def main(uri: str) -> None:
        with pytest.raises(ZeroDivisionError):
            await client.copy(uri, uri, progress=tired)

    with nbdkit("memory", "1M") as kit:
        run(main(kit.uri))


@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_server_killed_while_copying(victim: str) -> None:
    async def main(after: float) -> None:
        with nbdkit("pattern", "8G") as source, nbdkit("null", "8G") as target:
            under_way = asyncio.Event()
            copying = asyncio.create_task(
                client.copy(source.uri, target.uri, connections=2, progress=lambda *_: under_way.set())
            )
            await under_way.wait()
            await asyncio.sleep(after)
            (source if victim == "source" else target).kill()
            with pytest.raises(NbdError) as caught:
                await asyncio.wait_for(copying, 20)
            assert caught.value.errno == errno.ENOTCONN
            assert caught.value.file == (source if victim == "source" else target).uri

    for after in (0.0, 0.02, 0.04, 0.06):
        run(main(after))


def test_verify_tells_where(tmp_path: Path) -> None:
    a, b = bytearray(patchwork(3 * MIB)), bytearray(patchwork(3 * MIB) + bytes(MIB))
    for at in (0, 700, 1024, MIB + 5, 3 * MIB - 1):
        b[at] ^= 1
    (tmp_path / "a").write_bytes(a)
    (tmp_path / "b").write_bytes(b)
    expected = [Range(0, 1536), Range(MIB, 512), Range(3 * MIB - 512, 512)]

    async def main(uri: str) -> None:
        one, other = (client.export_uri(uri, name) for name in ("a", "b"))
        told: list[tuple[int, int]] = []
        assert await client.verify(one, other, progress=lambda *now: told.append(now)) == expected
        assert told[-1] == (4 * MIB, 4 * MIB)
        assert await client.verify(other, one, connections=1, window=1) == expected
        assert await client.verify(one, other, limit=2) == expected[:2]
        assert (await client.verify(one, other, limit=1))[0].offset == 0
        async with client.connect(other) as disk:
            await disk.pwrite(b"x", 4 * MIB - 513)
        assert (await client.verify(one, other))[-1] == Range(4 * MIB - 1024, 512)

    with nbdkit("file", f"dir={tmp_path}") as kit:
        run(main(kit.uri))


def test_ranges_grow_together_in_any_order() -> None:
    ranges = [Range(at * 512, 512) for at in range(20) if at not in (5, 12)]
    for seed in range(20):
        random.Random(seed).shuffle(ranges)
        found: list[Range] = []
        for each in ranges:
            _insert(found, each)
        assert found == [Range(0, 5 * 512), Range(6 * 512, 6 * 512), Range(13 * 512, 7 * 512)]


def test_memory_stays_bounded(image: Path) -> None:
    """A copy of much data, and the leftovers of the binding."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    async def main(source: str, target: str) -> None:
        await client.copy(source, target, window=4)
        before = resident()
        for _ in range(3):
            await client.copy(source, target, window=4)
        assert resident() - before < 40 * MIB

    with nbdkit("pattern", "128M") as source, nbdkit("memory", "128M") as target:
        run(main(source.uri, target.uri))
