"""Disks whose extents lie on block devices: written where the options allow it, refused where not."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.errors import Truncated, TrustError
from nbd_vmdk.ops.check.runner import check_image
from tests.engine import refused, same
from tests.failing import Served
from tests.images import desc, peek
from tests.images.content import KIB, MIB, SECTOR
from tests.images.desc import ExtentLine
from tests.mounted import FINDING_ALL
from tests.plugin import PLUGIN, Nbdkit, errno_of, refusal

SIZE = 8 * MIB
BOLD = ("--allow-dir", "/dev", "--allow-devices")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A loop device of 8 MiB of noise."""
    backing = tmp_path / "backing.img"
    backing.write_bytes(os.urandom(SIZE))
    try:
        done = subprocess.run(
            ["losetup", "--find", "--show", str(backing)],
            capture_output=True,
            text=True,
            check=False,
            env=FINDING_ALL,
        )
    except OSError as error:
        pytest.skip(f"no loop device can be made: {error}")
    if done.returncode:
        pytest.skip(f"no loop device can be made: {done.stderr.strip()}")
    name = done.stdout.strip()
    try:
        yield name
    finally:
        subprocess.run(["losetup", "--detach", name], check=True, env=FINDING_ALL)


def on_device(path: str) -> bytes:
    """What the device holds, by another opening of it."""
    return peek(path, 0, SIZE)


def full(folder: Path, device: str, kind: str = "fullDevice", name: str = "disk.vmdk") -> str:
    """A descriptor whose only extent is the device."""
    path = folder / name
    size = SIZE // SECTOR
    line: ExtentLine = (
        ("RW", size, "FLAT", device, 0) if kind == "fullDevice" else ("RW", size, "VMFSRAW", device)
    )
    path.write_bytes(desc.descriptor(kind, [line]))
    return str(path)


def partitions(folder: Path, device: str) -> tuple[str, bytes]:
    """Two partitions between a table of their own, zeros, and what nobody may see; the disk's bytes."""
    table = os.urandom(63 * SECTOR)
    (folder / "disk-pt.vmdk").write_bytes(table)
    path = folder / "disk.vmdk"
    path.write_bytes(
        desc.descriptor(
            "partitionedDevice",
            [
                ("RW", 63, "FLAT", "disk-pt.vmdk", 0),
                ("RW", 1985, "ZERO"),
                ("RW", 4096, "FLAT", device, 2048),
                ("NOACCESS", 2048, "ZERO"),
                ("RW", 8192, "FLAT", device, 8192),
            ],
        )
    )
    data = on_device(device)
    shown = table + bytes(1985 * SECTOR) + data[MIB : 3 * MIB] + bytes(MIB) + data[4 * MIB :]
    return str(path), shown


@pytest.mark.parametrize("kind", ["fullDevice", "vmfsRaw"])
def test_a_whole_device_is_written(
    command: Callable[..., Served], tmp_path: Path, device: str, kind: str
) -> None:
    path = full(tmp_path, device, kind)
    model = bytearray(on_device(device))
    server = command(path, *BOLD)
    connection = server.connect()
    assert connection.get_size() == SIZE
    same(bytes(connection.pread(SIZE, 0)), bytes(model))
    for data, offset in ((b"a" * 100, 7), (os.urandom(MIB), MIB + 512), (b"z", SIZE - 1)):
        connection.pwrite(data, offset)
        model[offset : offset + len(data)] = data
    for length, offset in ((64 * KIB, 4 * MIB), (1000, 5 * MIB + 3)):
        connection.zero(length, offset)
        model[offset : offset + length] = bytes(length)
    connection.trim(MIB, 6 * MIB)
    connection.flush()
    found = bytes(connection.pread(SIZE, 0))
    trimmed = found[6 * MIB : 7 * MIB]
    assert trimmed in (bytes(MIB), bytes(model[6 * MIB : 7 * MIB]))
    model[6 * MIB : 7 * MIB] = trimmed
    same(found, bytes(model))
    # The device is held as any file is: who would write it through another descriptor is told so.
    other = full(tmp_path, device, name="other.vmdk")
    said = refusal("python", PLUGIN, f"file={other}", "allow-dir=/dev", "allow-devices=yes")
    assert f"{device}: in use by another process" in said
    assert server.stop() == 0
    same(on_device(device), bytes(model))
    assert not check_image(path, allow_dirs=("/dev",), allow_devices=True).findings
    with open_disk(path, allow_dirs=("/dev",), allow_devices=True) as disk:
        same(disk.pread(SIZE, 0), bytes(model))


def test_partitions_are_written(serve: Callable[..., Nbdkit], tmp_path: Path, device: str) -> None:
    path, shown = partitions(tmp_path, device)
    before = on_device(device)
    model = bytearray(shown)
    server = serve(path, "allow-dir=/dev", "allow-devices=yes")
    connection = server.connect()
    same(bytes(connection.pread(len(shown), 0)), shown)
    for data, offset in ((b"t" * SECTOR, 0), (b"x" * 5000, MIB + 3), (b"y" * MIB, 5 * MIB)):
        connection.pwrite(data, offset)
        model[offset : offset + len(data)] = data
    for offset in (100 * SECTOR, 3 * MIB, 3 * MIB - 1):
        assert errno_of(lambda offset=offset: connection.pwrite(b"no", offset)) == "EPERM"
    connection.zero(SECTOR, 100 * SECTOR)
    connection.flush()
    same(bytes(connection.pread(len(shown), 0)), bytes(model))
    assert server.stop() == 0
    now = on_device(device)
    same(now[MIB : 3 * MIB], bytes(model[MIB : 3 * MIB]))
    same(now[4 * MIB :], bytes(model[4 * MIB :]))
    # What no extent names is what it was.
    assert now[:MIB] == before[:MIB]
    assert now[3 * MIB : 4 * MIB] == before[3 * MIB : 4 * MIB]
    assert (tmp_path / "disk-pt.vmdk").read_bytes() == bytes(model[: 63 * SECTOR])


@pytest.mark.parametrize("writable", [False, True])
def test_refused_without_the_options(tmp_path: Path, device: str, writable: bool) -> None:
    """Each error names the option that is missing."""
    path = full(tmp_path, device)
    before = on_device(device)
    error = refused(path, TrustError, writable=writable)
    assert device in str(error)
    assert "--allow-dir" in str(error.hint)
    error = refused(path, TrustError, writable=writable, allow_devices=True)
    assert "--allow-dir" in str(error.hint)
    error = refused(path, TrustError, writable=writable, allow_dirs=("/dev",))
    assert "block device" in str(error)
    assert "--allow-devices" in str(error.hint)
    assert on_device(device) == before


def test_a_device_that_is_too_small(tmp_path: Path, device: str) -> None:
    path = tmp_path / "disk.vmdk"
    line = ("RW", SIZE // SECTOR + 1, "FLAT", device, 0)
    path.write_bytes(desc.descriptor("fullDevice", [line]))
    error = refused(str(path), Truncated, writable=True, allow_dirs=("/dev",), allow_devices=True)
    assert error.file == device
