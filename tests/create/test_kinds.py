"""Every kind, of any size: opened by us and by QEMU, sound to our check, and as good as any once written."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk import create_image, open_disk
from nbd_vmdk.errors import OptionError
from nbd_vmdk.ops.info import image_info
from nbd_vmdk.units import GIB, KIB, MIB, SECTOR, TIB
from tests.create.tools import CHILDREN, WHOLE, names, needs_qemu, qemu, qemu_bytes, qemu_info, sound

GRAINS = {"monolithicSparse": (3, 9), "twoGbMaxExtentSparse": (3, 9), "vmfsSparse": (0, 11)}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, int, dict[str, Any]]:
    kind = draw(st.sampled_from(WHOLE))
    size = draw(st.integers(1, 9 * MIB) | st.integers(1, 40)) + draw(st.sampled_from([0, 0, 3 * GIB]))
    options: dict[str, Any] = {"kind": kind}
    if kind in GRAINS:
        least, most = GRAINS[kind]
        options["grain_size"] = draw(st.none() | st.integers(least, most).map(lambda power: SECTOR << power))
    if kind in ("monolithicSparse", "twoGbMaxExtentSparse"):
        options["zeroed_grain"] = draw(st.booleans())
    if kind.startswith("twoGb") and size < GIB:
        options["extent_size"] = draw(st.none() | st.integers(4, 20).map(lambda count: count * MIB // 4))
    options["adapter"] = draw(st.sampled_from([None, "ide", "buslogic", "lsilogic", "legacyESX"]))
    return kind, size, options


@needs_qemu
@settings(max_examples=30, deadline=None)
@given(requests())
def test_any_request_makes_a_sound_image(request_: tuple[str, int, dict[str, Any]]) -> None:
    kind, size, options = request_
    whole = -(-size // SECTOR) * SECTOR
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/my disk.vmdk"
        made = create_image(path, size, **options)
        assert sorted(Path(file.path).name for file in made.files) == names(folder)
        assert [Path(file.path).stat().st_size for file in made.files] == [file.length for file in made.files]
        assert made.size == whole
        assert ("rounded up" in " ".join(made.notes)) == (whole != size)
        with open_disk(path) as disk:
            assert disk.size == whole
            assert not disk.warnings
            assert not any(disk.pread(min(whole, 3 * SECTOR), whole - min(whole, 3 * SECTOR)))
        sound(path)
        info = qemu_info(path)
        assert info["virtual-size"] == whole
        assert info["format-specific"]["data"]["create-type"] == kind
        if kind in ("monolithicSparse", "twoGbMaxExtentSparse", "streamOptimized"):
            assert "No errors" in qemu("check", path)
        if whole < GIB:
            assert qemu_bytes(path) == bytes(whole)


@needs_qemu
@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind != "streamOptimized"])
def test_what_is_written_is_what_qemu_reads(tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    path = tmp_path / "disk.vmdk"
    size = 7 * MIB + 3 * SECTOR
    options = {"extent_size": 2 * MIB} if kind.startswith("twoGb") else {}
    create_image(path, size, kind=kind, **options)
    model = bytearray(size)
    with open_disk(path, writable=True) as disk:
        assert disk.writable
        for _ in range(12):
            data = rng.randbytes(rng.choice([1, 700, 70_000]))
            at = rng.randrange(size - len(data))
            disk.pwrite(data, at)
            model[at : at + len(data)] = data
    assert qemu_bytes(path) == model
    sound(path)
    assert image_info(path)["format-specific"]["data"]["cid"] != 0xFFFFFFFE


@needs_qemu
def test_qemu_writes_what_was_made(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(random.Random(1).randbytes(3 * MIB))
    for kind in ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "vmfs"):
        path = tmp_path / f"{kind}.vmdk"
        create_image(path, 3 * MIB, kind=kind, product="qemu")
        qemu("convert", "-n", "-f", "raw", "-O", "vmdk", tmp_path / "raw", path)
        with open_disk(path) as disk:
            assert disk.pread(disk.size, 0) == (tmp_path / "raw").read_bytes()
        sound(path)


@pytest.mark.parametrize(("base", "child"), [(base, child) for base in WHOLE for child in CHILDREN])
def test_a_child_of_every_kind(tmp_path: Path, base: str, child: str) -> None:
    size = 3 * MIB + 5 * SECTOR
    below, top = tmp_path / "base.vmdk", tmp_path / "base-000001.vmdk"
    create_image(below, size, kind=base)
    model = bytearray(size)
    if base != "streamOptimized":
        with open_disk(below, writable=True) as disk:
            disk.pwrite(b"below" * 1000, 70_001)
        model[70_001:75_001] = b"below" * 1000
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    made = create_image(top, parent=below, kind=child)
    assert made.size == size
    assert made.parent == "base.vmdk"
    assert made.parent_cid == image_info(below)["format-specific"]["data"]["cid"]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    with open_disk(top, writable=True) as disk:
        assert disk.pread(size, 0) == model
        disk.pwrite(b"above", 70_010)
        disk.pwrite(b"end", size - 3)
    model[70_010:70_015] = b"above"
    model[-3:] = b"end"
    with open_disk(top) as disk:
        assert disk.pread(size, 0) == model
        assert len(disk.links) == 2
    sound(top)


@needs_qemu
def test_a_chain_of_children_as_qemu_reads_it(tmp_path: Path) -> None:
    size = 2 * MIB
    create_image(tmp_path / "0.vmdk", size, kind="vmfs")
    model = bytearray(size)
    for number, kind in enumerate(("vmfsSparse", "monolithicSparse", "twoGbMaxExtentSparse"), 1):
        with open_disk(tmp_path / f"{number - 1}.vmdk", writable=True) as disk:
            disk.pwrite(bytes([number]) * 100_000, number * 60_000)
        model[number * 60_000 : number * 60_000 + 100_000] = bytes([number]) * 100_000
        create_image(tmp_path / f"{number}.vmdk", parent=tmp_path / f"{number - 1}.vmdk", kind=kind)
    assert qemu_bytes(tmp_path / "3.vmdk") == model


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind != "vmfsSparse"])
def test_two_thousand_gibibytes_take_no_time(tmp_path: Path, kind: str) -> None:
    start = time.process_time()  # not that of a disk which others use, too
    create_image(tmp_path / "large.vmdk", 2000 * GIB, kind=kind)
    assert time.process_time() - start < 1
    with open_disk(tmp_path / "large.vmdk") as disk:
        assert disk.size == 2000 * GIB
        assert disk.pread(512, disk.size - 512) == bytes(512)
    assert sum(path.stat().st_blocks * SECTOR for path in tmp_path.iterdir()) < 9 * MIB


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("monolithicSparse", 2 * TIB),
        ("streamOptimized", 2 * TIB),
        ("vmfsSparse", 2 * TIB),
        ("monolithicSparse", 9000 << 50),
        ("vmfs", 63 * TIB),
    ],
)
def test_what_is_too_large_is_refused(tmp_path: Path, kind: str, size: int) -> None:
    with pytest.raises(OptionError, match=r"is too much for.*(62|less than 2) TiB"):
        create_image(tmp_path / "large.vmdk", size, kind=kind)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("preallocation", "least"), [("off", 0), ("falloc", 5 * MIB), ("full", 5 * MIB)])
@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentFlat", "vmfs"])
def test_preallocation(tmp_path: Path, kind: str, preallocation: str, least: int) -> None:
    told: list[tuple[int, int]] = []
    made = create_image(
        tmp_path / "disk.vmdk",
        5 * MIB,
        kind=kind,
        preallocation=preallocation,
        progress=lambda done, total: told.append((done, total)),
    )
    data = [Path(file.path) for file in made.files[:-1]]
    taken = sum(path.stat().st_blocks * SECTOR for path in data)
    assert least <= taken <= least + 64 * KIB
    assert (told[-1:] == [(5 * MIB, 5 * MIB)]) == (preallocation == "full")
    thin = b'ddb.thinProvisioned = "1"\n' in (tmp_path / "disk.vmdk").read_bytes()
    assert thin == (kind == "vmfs" and preallocation == "off")
    sound(tmp_path / "disk.vmdk")
