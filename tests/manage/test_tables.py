"""
Larger tables under power cuts: whatever had reached the disk, the extent is the old one or the new one.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbd_vmdk.extents.cowd import CowdExtent
from nbd_vmdk.extents.hosted import HostedExtent
from nbd_vmdk.opening import open_disk, open_in
from nbd_vmdk.ops.resize.tables import grow_cowd, grow_hosted
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.units import GIB, MIB, SECTOR
from tests.manage import make
from tests.recording import RecordingFolder
from tests.snapshot import scribble, shows

OLD = 2 * MIB + 5 * SECTOR


def content(folder: RecordingFolder) -> bytes:
    with open_in(folder, "disk.vmdk", OpenOptions()) as disk:
        return disk.pread(min(disk.size, 4 * MIB), 0)


def with_size(files: dict[str, bytes], sectors: int) -> dict[str, bytes]:
    """The same files, with a descriptor that says the new size."""
    old, new = str(OLD // SECTOR).encode(), str(sectors).encode()
    text = files["disk.vmdk"]
    assert text.count(b"RW " + old) == 1
    if text.startswith(b"KDMV"):
        at = text.index(b"RW " + old)
        end = text.index(b"\0", at)
        changed = text[at:end].replace(old, new, 1)
        text = text[:at] + changed + text[at + len(changed) :]
    else:
        text = text.replace(b"RW " + old, b"RW " + new)
    return {**files, "disk.vmdk": text}


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("monolithicSparse", 3 * MIB),
        ("monolithicSparse", 90 * MIB),  # in the same directory
        ("monolithicSparse", 400 * MIB),
        ("vmfsSparse", 3 * MIB),
        ("vmfsSparse", 20 * GIB),  # where tables and grains must make way
    ],
)
def test_power_cuts(tmp_path: Path, kind: str, size: int) -> None:
    path = make(tmp_path, kind, OLD)
    scribble(path, 1, 30)
    with open_disk(path, writable=True) as disk:
        disk.pwrite(random.Random(2).randbytes(MIB), 0)
    before = shows(path)
    folder = RecordingFolder.load(str(tmp_path))
    name = "disk-delta.vmdk" if kind == "vmfsSparse" else "disk.vmdk"
    with open_in(folder, "disk.vmdk", OpenOptions(writable=True)) as disk:
        extent = disk.links[0].extents[0].extent
        if isinstance(extent, HostedExtent):
            changes = grow_hosted(extent.storage, extent.header, extent.size, size // SECTOR)
        else:
            assert isinstance(extent, CowdExtent)
            changes = grow_cowd(extent.storage, extent.header, extent.size, size // SECTOR, (1, 2, 3))
        for change in changes:
            change.apply()
    log = folder.log
    rng = random.Random(1)
    for cut in range(len(log.events) + 1):
        undecided = [event.number for event in log.undecided(cut)]
        subsets = [[], undecided, undecided[:-1], *([number] for number in undecided[-6:])]
        subsets += [rng.sample(undecided, len(undecided) // 2) for _ in range(3)]
        for lost in subsets:
            files = log.state(cut, lost)
            assert content(RecordingFolder(files)) == before
            head = files[name]
            width = 4 if kind == "vmfsSparse" else 8
            if int.from_bytes(head[12 : 12 + width], "little") * SECTOR == size:
                after = content(RecordingFolder(with_size(files, size // SECTOR)))
                assert after == before.ljust(len(after), b"\0")
    assert int.from_bytes(log.state(len(log.events))[name][12:16], "little") * SECTOR == size
