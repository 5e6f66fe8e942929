"""
What fuzzing found once, and every seed of every target, run without a fuzzer.

A finding is kept as a file TARGET-what-it-was in tests/fuzz/regressions. Those whose bytes are told more
shortly than stored are written out here: most are short inputs that asked for much time or memory.
"""

from __future__ import annotations

import fcntl
import importlib.util
import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.errors import FormatError, NotVmdk
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.runs import Run
from tests.fuzz import case, fuzz
from tests.fuzz.limits import limited
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS
from tests.images import cut, desc, peek, poke, stream
from tests.images.content import GIB, KIB, MIB, SECTOR, TIB, Content
from tests.images.hosted import Header

REGRESSIONS = sorted((Path(__file__).parents[1] / "fuzz" / "regressions").iterdir())


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
def test_no_worker_outlives_the_fuzzer() -> None:
    words = [sys.executable, "-m", "tests.fuzz.fuzz", "--target", "dictionary", "--seconds", "60"]
    with subprocess.Popen(words, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL) as fuzzer:
        try:
            found: list[str] = []
            until = time.monotonic() + 30
            while not found and fuzzer.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
                found = [
                    pid
                    for task in Path(f"/proc/{fuzzer.pid}/task").iterdir()
                    for pid in (task / "children").read_text().split()
                    if b"--worker" in _command_line(Path(f"/proc/{pid}"))
                ]
            worker = Path(f"/proc/{found[0]}")
            environment = dict(
                each.split(b"=", 1) for each in (worker / "environ").read_bytes().split(b"\0") if b"=" in each
            )
        finally:
            fuzzer.kill()
    until = time.monotonic() + 10
    # Whoever is parent to orphans here may not take leave of them: then it is dead, and has no command line.
    while (is_alive := _command_line(worker) != b"") and time.monotonic() < until:
        time.sleep(0.05)
    if is_alive:
        os.kill(int(worker.name), signal.SIGKILL)
    shutil.rmtree(os.fsdecode(environment[b"NBD_VMDK_FUZZ_DIR"]))
    assert not is_alive


def test_what_killed_runs_left_is_swept(tmp_path: Path) -> None:
    old, held, young = (tmp_path / f"nbd-vmdk-fuzz-{name}" for name in ("old", "held", "young"))
    for folder in (old, held, young):
        folder.mkdir()
        (folder / "seeds").mkdir()
        if folder is not young:
            os.utime(folder, (1, 1))
    holder = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        fuzz._sweep(tmp_path)
    finally:
        os.close(holder)
    assert sorted(tmp_path.iterdir()) == [held, young]


def test_every_target_has_seeds() -> None:
    assert SEEDS.keys() == TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str) -> None:
    target = TARGETS[name]
    for label, data in SEEDS[name]().items():
        assert len(data) <= target.max_len, f"{label} would be cut off"
        target(data)


@pytest.mark.parametrize("finding", REGRESSIONS, ids=lambda path: path.name)
def test_findings(finding: Path) -> None:
    TARGETS[finding.name.split("-")[0]](finding.read_bytes())


def files(*parts: tuple[str, bytes]) -> None:
    """Run the target for several files; the first is opened."""
    TARGETS["files"](case.encode([case.File.of(name, data) for name, data in parts]))


def runs(path: str | Path, **options: Any) -> list[Run]:
    with open_disk(path, **options) as disk:
        return list(disk.runs())


def load(path: str) -> tuple[str, bytes]:
    return os.path.basename(path), peek(path, 0, os.path.getsize(path))


def archive(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def test_archive_that_names_itself(tmp_path: Path) -> None:
    """The name of the archive stood for the disk of that name in it, without end."""
    image = desc.stream_optimized(str(tmp_path), "fuzz", Content(4 * SECTOR))
    data = archive(load(image.path))
    Path(image.path).write_bytes(data)
    with open_disk(image.path) as disk:
        assert disk.size == 4 * SECTOR
    Path(image.path).write_bytes(archive(("fuzz.vmdk", data)))
    with pytest.raises(NotVmdk, match="archive inside an archive"):
        open_disk(image.path)


def test_archives_in_archives() -> None:
    data = b"no disk"
    for level in range(600):
        data = archive((f"{level}.vmdk", data))[: -8 * KIB]
    files(("fuzz.vmdk", data))


def test_a_million_extension_records() -> None:
    records = b"".join(b"14 %06x=abcd\n" % number for number in range(600_000))
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    TARGETS["tar"](
        info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // SECTOR) * SECTOR, b"\0")
    )


@pytest.mark.parametrize("kind", ["SPARSE", "VMFSSPARSE", "SESPARSE", "stream"])
def test_one_file_with_tables_as_many_extents(tmp_path: Path, kind: str) -> None:
    """A line of 20 bytes asked for tables of its own; and two writers of one file would ruin it."""
    row = desc.Row("RW", "SPARSE" if kind == "stream" else kind, Content(SECTOR), "s", builder=kind)
    image = desc.custom(str(tmp_path), "fuzz", [row])
    text = Path(image.path).read_bytes()
    line = next(line for line in text.splitlines(keepends=True) if line.startswith(b"RW"))
    with limited():
        for count in (2, 30_000):
            Path(image.path).write_bytes(text.replace(line, line * count))
            with pytest.raises(FormatError, match="two extents"):
                open_disk(image.path)


def test_many_extents(tmp_path: Path) -> None:
    """Each extent had zeros of its own to compare its tables with: 20 KiB in each of thousands."""
    data = peek(desc.split_sparse(str(tmp_path), "x", Content(SECTOR)).hosted().path, 0, 64 * KIB)
    lines: list[desc.ExtentLine] = []
    for number in range(3000):
        (tmp_path / f"s{number}").write_bytes(data)
        lines.append(("RW", 1, "SPARSE", f"s{number}"))
    (tmp_path / "fuzz.vmdk").write_bytes(desc.descriptor("custom", lines))
    with limited(memory=40 * MIB):
        assert [run.length for run in runs(tmp_path / "fuzz.vmdk")] == [3000 * SECTOR]


@pytest.mark.parametrize("grain", [1, 1 << 21])
def test_footer_with_other_grains(tmp_path: Path, grain: int) -> None:
    """Grains of 1 GiB to inflate, or tables that are shorter than the disk."""
    image = desc.stream_optimized(str(tmp_path), "fuzz", Content(MIB).put(0, b"data"))
    footer = image.stream().footer_sector
    assert footer is not None
    poke(image.path, footer * SECTOR + 20, struct.pack("<Q", grain))
    with limited():
        with pytest.raises(FormatError, match="footer"):
            open_disk(image.path)
        TARGETS["image"].run(Path(image.path).read_bytes())


def test_records_in_tables_far_apart() -> None:
    """To salvage a record of a sector took a table of 256 KiB."""
    entries, grains = 65536, 3000
    packed = stream.deflated(b"")
    records = [
        (struct.pack("<QI", number * entries * 8, len(packed)) + packed).ljust(SECTOR, b"\0")
        for number in range(grains)
    ]
    head = Header(
        version=3,
        flags=0x30001,
        capacity=grains * entries * 8,
        grain_size=8,
        gtes_per_gt=entries,
        gd_offset=2**64 - 1,
        overhead=8,
        compress_algorithm=1,
    )
    files(("fuzz.vmdk", head.pack().ljust(8 * SECTOR, b"\0") + b"".join(records)))


def test_a_stream_with_holes_of_terabytes(tmp_path: Path) -> None:
    image = desc.stream_optimized(str(tmp_path), "fuzz", Content(MIB).put(0, b"data"), footer="none")
    os.truncate(image.path, 8 * TIB)
    with limited():
        assert runs(image.path, salvage=True)[0].kind is Kind.PACKED


@pytest.mark.parametrize("redundant", [True, False])
def test_millions_of_missing_tables(tmp_path: Path, redundant: bool) -> None:
    """The runs of an empty disk took a step for each table that is not there."""
    path = tmp_path / "fuzz.vmdk"
    head = Header(
        flags=3 if redundant else 1,
        capacity=1 << 32,
        gtes_per_gt=1,
        gd_offset=1,
        rgd_offset=1 << 18,
        overhead=1,
    )
    path.write_bytes(head.pack())
    os.truncate(path, 512 * MIB)
    with limited():
        assert [run.kind for run in runs(path)] == [Kind.HOLE]


def test_geometry_of_thousands_of_digits() -> None:
    text = desc.descriptor(
        "custom", [("RW", 9, "ZERO")], ddb={"ddb.geometry.cylinders": "9" * 5000, "ddb.adapterType": "ide"}
    )
    files(("fuzz.vmdk", text))


def test_names_with_control_characters() -> None:
    name = "x\x1b[31m\ny.vmdk"
    files(("fuzz.vmdk", archive((name, b"no disk"))))
    files(("fuzz.vmdk", desc.descriptor("custom", [("RW", 9, "FLAT", "a\x1b[31m", 0)])))


def test_vetting_of_millions_of_tables(tmp_path: Path) -> None:
    """Before writing after a crash all directories were read whole, 256 MiB, and their entries sorted."""
    sectors = 1 << 25
    text = desc.descriptor("monolithicSparse", [("RW", sectors, "SPARSE", "fuzz.vmdk")])
    head = Header(
        capacity=sectors,
        grain_size=1,
        gtes_per_gt=1,
        rgd_offset=64,
        gd_offset=1 << 18,
        overhead=21,
        unclean=1,
    )
    head = replace(head, descriptor_offset=1, descriptor_size=20)
    (tmp_path / "fuzz.vmdk").write_bytes(head.pack() + text)
    os.truncate(tmp_path / "fuzz.vmdk", 512 * MIB)
    with limited(), pytest.raises(FormatError, match="looked at before writing"):
        open_disk(tmp_path / "fuzz.vmdk", writable=True)


def test_vetting_of_tables_among_grains(tmp_path: Path) -> None:
    """Each table of an image whose tables were made when needed was compared with all others."""
    count, step = 8000, 4 + 128
    path = tmp_path / "fuzz.vmdk"
    text = desc.descriptor("monolithicSparse", [("RW", count * 65536, "SPARSE", "fuzz.vmdk")])
    head = Header(capacity=count * 65536, flags=1, gd_offset=64, overhead=21, unclean=1)
    head = replace(head, descriptor_offset=1, descriptor_size=20)
    tables = [256 + number * step for number in range(count)]
    with open(path, "wb") as file:
        file.write(head.pack() + text)
        file.seek(64 * SECTOR)
        file.write(struct.pack(f"<{count}I", *tables))
        for number, table in enumerate(tables):
            file.seek(table * SECTOR)
            # One grain is far away, so that the others' tables lie between its grains.
            file.write(struct.pack("<2I", tables[number - 1] + 4, tables[-number] + 4))
        file.truncate((256 + count * step) * SECTOR)
    # Some of the grains share their places, which is what it finds when it has been through all tables.
    with limited(), pytest.raises(FormatError, match="another grain"):
        open_disk(path, writable=True).close()


def test_an_extent_in_the_descriptors_own_file(tmp_path: Path) -> None:
    """Opening the file for writing closed it under an extent that was open for reading."""
    text = desc.descriptor("custom", [("RDONLY", 1, "FLAT", "fuzz.vmdk", 0), ("RW", 1, "FLAT", "data", 0)])
    (tmp_path / "fuzz.vmdk").write_bytes(text + b"#" * SECTOR)
    (tmp_path / "data").write_bytes(bytes(SECTOR))
    with open_disk(tmp_path / "fuzz.vmdk", writable=True) as disk:
        assert disk.pread(20, 0) == text[:20]
        disk.pwrite(b"new", SECTOR)
        assert disk.pread(3, SECTOR) == b"new"


def test_writing_behind_the_end_of_a_cut_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written there, new grains overwrote; or the file was cut before it."""
    content = Content(2000 * GIB)  # not so small that all of its tables are looked at before writing
    for grain in range(64):
        content.put(grain * 64 * KIB, b"data")
    image = desc.monolithic_sparse(str(tmp_path), "fuzz", content, preallocate_tables=False)
    cut(image.path, image.hosted().grain_at(40))
    with pytest.raises(FormatError, match="no grain can be there"):
        open_disk(image.path, writable=True)
    monkeypatch.setattr("nbd_vmdk.opener.extents.reaches_past_end", lambda *_: False)
    with open_disk(image.path, writable=True) as disk:
        with pytest.raises(FormatError, match="beyond the end"):
            disk.pwrite(b"lost", 50 * 64 * KIB)
        disk.pwrite(b"kept", 20 * 64 * KIB)
    with open_disk(image.path) as disk:
        assert disk.pread(4, 20 * 64 * KIB) == b"kept"


def test_a_descriptor_area_without_end(tmp_path: Path) -> None:
    """A new table lay inside it, and was refused when the first flush wanted to write it."""
    image = desc.monolithic_sparse(
        str(tmp_path),
        "fuzz",
        Content(2000 * GIB),
        preallocate_tables=False,
        header={"descriptor_size": 1 << 40},
    )
    with open_disk(image.path, writable=True) as disk:
        disk.pwrite(b"kept", 40 * MIB)
        disk.flush()
    with open_disk(image.path) as disk:
        assert disk.pread(4, 40 * MIB) == b"kept"
