"""Real COWD disks, and chains of them, written by other clients through a server that is then killed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.ops.check.findings import Repair
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.repair import apply_repair
from tests.corpus import Entry, entries
from tests.engine import same
from tests.failing import content, kill
from tests.images import desc
from tests.images.content import KIB, MIB, Content
from tests.plugin import Nbdkit
from tests.sound import MAGICS, check_sound

Serve = Callable[..., Nbdkit]

#: Disks that nobody has made a child of; the last one is made here.
REAL = ("du-cowd-chain-offset-2", "du-cowd-single", "desc-cowd-fixture", "no-corpus")
DISKS = [each for each in entries("open") if each.id in REAL] + [pytest.param(None, id="made")]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def disk(tmp_path: Path, corpus: Callable[[Entry], str], request: pytest.FixtureRequest) -> str:
    """A disk in a folder of its own."""
    if request.param is None:
        low = Content.random(9 * MIB, seed=1, touched=20)
        base = desc.vmfs_sparse(str(tmp_path), "base", low, grow_to=MIB)
        child = desc.monolithic_sparse(str(tmp_path), "child", Content.random(9 * MIB, seed=2), parent=base)
        return desc.vmfs_sparse(str(tmp_path), "disk", Content.random(9 * MIB, seed=3), parent=child).path
    path = corpus(request.param)
    folder = shutil.copytree(os.path.dirname(path), tmp_path / "copy")
    return os.path.join(folder, os.path.basename(path))


def requests(size: int, seed: int) -> list[tuple[int, bytes]]:
    """Writes for qemu-io, each of one byte repeated."""
    rng = random.Random(seed)
    found = []
    for number in range(12):
        length = min(rng.choice((512, 3 * 512, 4 * KIB, 200 * KIB)), size)
        offset = rng.randrange((size - length) // 512 + 1) * 512
        found.append((offset, bytes([seed * 16 + number]) * length))
    return found


def commands(writes: list[tuple[int, bytes]]) -> list[str]:
    found = []
    for offset, data in writes:
        found += ["-c", f"write -P {data[0]} {offset} {len(data)}"]
    return found


def read_all(path: str) -> bytes:
    with open_disk(path) as opened:
        return opened.pread(opened.size, 0)


@pytest.mark.parametrize("disk", DISKS, indirect=True)
def test_written_served_and_killed(serve: Serve, tmp_path: Path, disk: str) -> None:
    model = bytearray(read_all(disk))
    with open_disk(disk) as opened:
        files = [storage.name for link in opened.links[1:] for storage in link.storages]
        own = [storage.name for storage in opened.links[0].storages]
    parents = {name: content(name) for name in files}
    server = serve(disk)
    writes = requests(len(model), 1)
    for offset, data in writes:
        model[offset : offset + len(data)] = data
    part = min(64 * KIB, len(model) // 1024 * 512)
    run("qemu-io", "-f", "raw", *commands(writes), "-c", f"write -z 0 {part}", "-c", "flush", server.uri)
    model[:part] = bytes(part)
    run("nbdcopy", server.uri, str(tmp_path / "copied"))
    same(content(str(tmp_path / "copied")), bytes(model))
    assert server.stop() == 0
    for name in own:
        if content(name).startswith(MAGICS):
            check_sound(name)
    # Space that was there before may be unused: hosts lengthen the file by steps.
    assert {finding.slug for finding in check_image(disk).findings} <= {"unused-space"}
    same(read_all(disk), bytes(model))
    if not parents:  # QEMU does not read the extent lines that these chains have
        run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", disk, str(tmp_path / "raw"))
        same(content(str(tmp_path / "raw")), bytes(model))

    server = serve(disk)
    flushed, lost = requests(len(model), 2), requests(len(model), 3)
    run("qemu-io", "-f", "raw", *commands(flushed), "-c", "flush", server.uri)
    connection = server.connect()
    for offset, data in lost:
        connection.pwrite(data, offset)
    kill(server)
    for offset, data in flushed:
        model[offset : offset + len(data)] = data
    found = read_all(disk)
    for offset, data in lost:  # nothing was promised for these
        model[offset : offset + len(data)] = found[offset : offset + len(data)]
    same(found, bytes(model))
    for finding in check_image(disk).findings:
        assert isinstance(finding.repair, Repair), finding
        assert finding.repair.asks is None, finding
    apply_repair(disk)
    assert not check_image(disk).findings
    same(read_all(disk), found)
    assert {name: content(name) for name in files} == parents
