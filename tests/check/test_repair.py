"""
Repairing: what is mendable is mended, the guest's data are what they were, and all of it can be taken back.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk.cli import main
from nbd_vmdk.errors import FileMissing, FormatError, InUse, NotVmdk, OptionError, StorageError, WriteRefused
from nbd_vmdk.opening import open_disk
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.repair import apply_repair, plan_repair, undo_repair
from nbd_vmdk.ops.undo import Undo
from nbd_vmdk.storage.local import LocalFile
from tests.breaking import (
    BREAKS,
    GRAIN,
    Break,
    child_of_sparse,
    delta,
    flat,
    newer_delta,
    sparse,
    split,
    streamed,
)
from tests.images import cut, desc, ova, pad, peek, poke
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image

MENDABLE = [broken for broken in BREAKS if broken.mends != "no"]
LEFT = [broken for broken in BREAKS if broken.mends == "no"]


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder, but for undo files."""
    return {
        name: peek(str(folder / name), 0, os.path.getsize(folder / name))
        for name in os.listdir(folder)
        if not name.endswith(".undo")
    }


def read_all(path: str) -> bytes:
    with open_disk(path) as disk:
        return disk.pread(disk.size, 0)


def qemu_reads(path: str) -> bytes:
    target = f"{path}.raw"
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, target], check=True, timeout=60)
    with open(target, "rb") as file:
        data = file.read()
    os.remove(target)
    return data


def agrees_with_qemu(path: str) -> None:
    done = subprocess.run(
        ["qemu-img", "check", "-f", "vmdk", path], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 63), done.stdout + done.stderr  # 63: it can't check this kind


@pytest.mark.parametrize("broken", MENDABLE, ids=lambda broken: broken.name)
def test_mended(tmp_path: Path, broken: Break) -> None:
    image = broken.build(str(tmp_path))
    wanted = image.visible.read()
    broken.damage(image)
    damaged = files(tmp_path)
    also = [broken.finds] if broken.mends == "asks" else []

    plan = plan_repair(image.path, also=also, data=broken.data)
    assert broken.finds in {finding.slug for _repair, mended in plan.chosen for finding in mended}
    assert files(tmp_path) == damaged, "a plan changes nothing"

    _plan, after = apply_repair(image.path, also=also, data=broken.data)
    left = {finding.slug for finding in after.findings}
    # What is mended on request can uncover what was hidden behind it, as a size that is now believed.
    assert broken.finds not in left
    assert left <= {"grain-misaligned", "unused-space", *broken.also}, left
    assert check_image(image.path, data=True).count_errors == 0

    found = read_all(image.path)
    if not broken.lossy:
        assert found == wanted, "the guest's data are what they were"
    if broken.qemu and shutil.which("qemu-img"):
        assert qemu_reads(image.path) == found
        agrees_with_qemu(image.path)

    undo_repair(image.path)
    assert files(tmp_path) == damaged
    assert not os.path.exists(f"{image.path}.undo")


@pytest.mark.parametrize("broken", LEFT, ids=lambda broken: broken.name)
def test_left(tmp_path: Path, broken: Break) -> None:
    """What can't be mended is said so, and left, and nothing is made of it."""
    image = broken.build(str(tmp_path))
    broken.damage(image)
    damaged = files(tmp_path)
    plan = plan_repair(image.path, data=broken.data)
    mended = {finding.slug for _repair, found in plan.chosen for finding in found}
    assert broken.finds not in mended
    assert mended <= set(broken.also)
    with pytest.raises(OptionError, match="can be asked for"):
        plan_repair(image.path, also=[broken.finds], data=broken.data)
    if not plan.chosen:
        apply_repair(image.path, data=broken.data)
        assert files(tmp_path) == damaged
        assert not os.path.exists(f"{image.path}.undo")


def test_relatives_are_found_in_a_full_folder(tmp_path: Path) -> None:
    image = child_of_sparse(str(tmp_path))
    wanted = image.visible.read()
    assert image.parent is not None
    poke(image.parent.path, SECTOR, bytes(20 * SECTOR))
    for number in range(1100):
        (tmp_path / f"another {number}.vmdk").touch()
    apply_repair(image.parent.path, also=["descriptor-lost"])
    assert read_all(image.path) == wanted, "the parent has the content ID that its child expects"

    os.rename(image.parent.path, tmp_path / "moved.vmdk")
    apply_repair(image.path, also=["parent-not-found"])
    assert read_all(image.path) == wanted
    os.rename(tmp_path / "moved.vmdk", tmp_path / "moved again.vmdk")
    shutil.copy(tmp_path / "moved again.vmdk", tmp_path / "a copy.vmdk")
    with pytest.raises(OptionError, match="can be asked for"):
        plan_repair(image.path, also=["parent-not-found"])


def test_several_at_once(tmp_path: Path) -> None:
    """Damage of many sorts in one file, all mended in one go, and all taken back."""
    image = sparse(str(tmp_path), text={"version": 3, "extra": ['changeTrackPath="disk-ctk.vmdk"']})
    wanted = image.visible.read()
    extent = image.hosted()
    grains = sorted(extent.grains)
    poke(image.path, extent.gde_at(0), b"\xff\xff\xff\xff")
    poke(image.path, extent.gde_at(2, redundant=True), bytes(4))
    poke(image.path, extent.gte_at(next(grain for grain in grains if grain // 512 == 1)), b"\5\0\0\0")
    poke(image.path, 72, b"\1")
    poke(image.path, 73, b"\n \n\n")
    at = image.text.index(b"longContentID = ")
    poke(image.path, SECTOR + at + 40, b"99999999")
    pad(image.path, 3)
    damaged = files(tmp_path)
    before = {finding.slug for finding in check_image(image.path).findings}
    assert before == {
        "directory-entry",
        "redundant-directory",
        "grain-entry",
        "unclean",
        "text-mode",
        "long-content-id",
        "tracking-file",
        "odd-size",
    }
    _plan, after = apply_repair(image.path)
    assert not after.findings
    assert read_all(image.path) == wanted
    undo_repair(image.path)
    assert files(tmp_path) == damaged


def test_parents_are_left_alone(tmp_path: Path) -> None:
    image = child_of_sparse(str(tmp_path))
    assert image.parent is not None
    poke(image.parent.path, 72, b"\1")
    damaged = files(tmp_path)
    plan = plan_repair(image.path)
    assert [finding.depth for finding in plan.report.findings] == [1]
    assert not plan.chosen
    apply_repair(image.path)
    assert files(tmp_path) == damaged
    _plan, after = apply_repair(image.parent.path)
    assert not after.findings


def test_files_of_a_split_image(tmp_path: Path) -> None:
    image = desc.split_sparse(str(tmp_path), "disk", Content.random(4 * MIB, seed=1), extent_sectors=2048)
    for path in image.files[1:]:
        poke(path, 72, b"\1")
    damaged = files(tmp_path)
    plan, after = apply_repair(image.path)
    assert len(plan.chosen) == 4
    assert not after.findings
    undo_repair(image.path)
    assert files(tmp_path) == damaged


# Who may repair


def test_not_while_in_use(tmp_path: Path) -> None:
    image = sparse(str(tmp_path))
    poke(image.path, 72, b"\1")
    damaged = files(tmp_path)
    with open_disk(image.path):
        plan_repair(image.path)
        with pytest.raises(InUse):
            apply_repair(image.path)
    with open_disk(image.path, writable=True):
        with pytest.raises(InUse):
            plan_repair(image.path)
        assert main(["repair", image.path]) == 5
        assert main(["repair", "--apply", image.path]) == 5
    (tmp_path / "disk.vmdk.lck").mkdir()
    (tmp_path / "disk.vmdk.lck" / "M1.lck").write_bytes(b"x")
    with pytest.raises(InUse, match="VMware"):
        apply_repair(image.path)
    shutil.rmtree(tmp_path / "disk.vmdk.lck")
    assert {name: data for name, data in files(tmp_path).items() if data != damaged.get(name)} == {}


def test_not_in_an_archive(tmp_path: Path) -> None:
    image = desc.stream_optimized(str(tmp_path), "disk", Content.random(MIB, seed=2))
    cut(image.path, -SECTOR)
    path = str(tmp_path / "vm.ova")
    ova.write_ova(path, [ova.Disk(image.path, MIB)])
    assert plan_repair(path).chosen
    with pytest.raises(WriteRefused, match="archive"):
        apply_repair(path)


# The undo file


def broken_image(folder: Path) -> Image:
    image = sparse(str(folder))
    extent = image.hosted()
    poke(image.path, extent.gde_at(1), b"\xff\xff\xff\xff")
    poke(image.path, extent.gte_at(min(extent.grains)), b"\5\0\0\0")
    poke(image.path, 72, b"\1")
    return image


def test_undo_needs_a_repair(tmp_path: Path) -> None:
    image = sparse(str(tmp_path))
    with pytest.raises(FileMissing):
        undo_repair(image.path)
    os.mkdir(f"{image.path}.undo")
    with pytest.raises(StorageError, match="read: Is a directory"):
        undo_repair(image.path)


def test_second_repair_needs_the_first_settled(tmp_path: Path) -> None:
    image = broken_image(tmp_path)
    apply_repair(image.path)
    poke(image.path, 72, b"\1")
    damaged = files(tmp_path)
    with pytest.raises(WriteRefused, match="earlier repair"):
        apply_repair(image.path)
    assert files(tmp_path) == damaged
    os.rename(f"{image.path}.undo", f"{image.path}.kept")
    apply_repair(image.path)


def test_undo_refuses_a_changed_image(tmp_path: Path) -> None:
    image = broken_image(tmp_path)
    apply_repair(image.path)
    extent = image.hosted()
    for at, data in ((extent.gde_at(1), b"\1"), (extent.gd[1] * SECTOR + 900, b"X")):
        old = peek(image.path, at, len(data))
        poke(image.path, at, data)
        changed = files(tmp_path)
        with pytest.raises(WriteRefused, match="changed since"):
            undo_repair(image.path)
        assert files(tmp_path) == changed
        poke(image.path, at, old)
    pad(image.path, 1)
    with pytest.raises(WriteRefused, match="size"):
        undo_repair(image.path)
    cut(image.path, -1)
    undo_repair(image.path)


def test_undo_file_that_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = broken_image(tmp_path)
    apply_repair(image.path)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Undo(f"{image.path}.undo") as undo:
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(StorageError, match=r"\.undo: read: Input/output error"):
            list(undo.pieces(undo.files[0]))


def test_undo_file_must_be_whole(tmp_path: Path) -> None:
    image = broken_image(tmp_path)
    apply_repair(image.path)
    undo = f"{image.path}.undo"
    whole = Path(undo).read_bytes()
    repaired = files(tmp_path)
    for spoilt in (
        whole[:-1],
        whole[: len(whole) // 2],
        b"",
        whole.replace(b"schema", b"SCHEMA"),
        whole[:200] + b"x" + whole[201:],
    ):
        Path(undo).write_bytes(spoilt)
        with pytest.raises(FormatError):
            undo_repair(image.path)
    assert files(tmp_path) == repaired
    Path(undo).write_bytes(whole)
    undo_repair(image.path)


def test_undo_file_describes_itself(tmp_path: Path) -> None:
    image = broken_image(tmp_path)
    apply_repair(image.path)
    title, header, _rest = Path(f"{image.path}.undo").read_bytes().split(b"\n", 2)
    assert b"--undo" in title
    facts = json.loads(header)
    assert facts["image"] == "disk.vmdk"
    assert facts["files"][0]["name"] == "disk.vmdk"
    assert facts["repairs"]


class Power(Exception):
    """The machine stopped."""


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """Every change of a file and every sync, as (what, place, length); the list may be given a limit."""
    made: list[tuple[str, int, int]] = []
    real = {name: getattr(LocalFile, name) for name in ("write", "truncate", "sync")}

    def wrap(name: str) -> Any:
        def call(self: LocalFile, *arguments: Any) -> None:
            if len(made) == limits[0]:
                raise Power
            buf, at = arguments if name == "write" else (b"", arguments[0] if arguments else 0)
            made.append((name, at, len(buf)))
            if name == "write" and len(made) == limits[0]:
                # Torn between sectors; a disk writes a sector or does not.
                buf = memoryview(buf)[: max((at + len(buf) // 2) // SECTOR * SECTOR - at, 0)]
                arguments = (buf, at)
            real[name](self, *arguments)

        return call

    limits[0] = -1
    for name in real:
        monkeypatch.setattr(LocalFile, name, wrap(name))
    yield made
    monkeypatch.undo()


limits = [-1]


@pytest.mark.parametrize("build", [sparse, child_of_sparse], ids=["base", "child"])
def test_power_cut_at_any_step(tmp_path: Path, build: Any, writes: list[tuple[str, int, int]]) -> None:
    """A repair, or taking it back, that ends anywhere is taken back by the undo file."""
    image = build(str(tmp_path))
    extent = image.hosted()
    poke(image.path, extent.gde_at(1), b"\xff\xff\xff\xff")
    poke(image.path, extent.gte_at(min(extent.grains)), b"\5\0\0\0")
    poke(image.path, 72, b"\1")
    pad(image.path, 5)
    damaged = files(tmp_path)
    apply_repair(image.path)
    steps = len(writes)
    undo_repair(image.path)
    undo_steps = len(writes) - steps
    assert steps > 6
    for limit in range(steps):
        writes.clear()
        limits[0] = limit
        with pytest.raises(Power):
            apply_repair(image.path)
        limits[0] = -1
        undo_repair(image.path)
        assert files(tmp_path) == damaged, limit
    for limit in range(undo_steps):
        apply_repair(image.path)
        writes.clear()
        limits[0] = limit
        with pytest.raises(Power):
            undo_repair(image.path)
        limits[0] = -1
        undo_repair(image.path)
        assert files(tmp_path) == damaged, limit


def test_order_of_changes(tmp_path: Path, writes: list[tuple[str, int, int]]) -> None:
    """Tables before what points at them, marks last, a sync between."""
    image = broken_image(tmp_path)
    extent = image.hosted()
    apply_repair(image.path)
    table, entry = extent.gd[1] * SECTOR, extent.gte_at(min(extent.grains))
    rows = {
        "table": [at for at, row in enumerate(writes) if row[0] == "write" and row[1] == table],
        "entry": [at for at, row in enumerate(writes) if row[0] == "write" and row[1] == entry],
        "pointer": [at for at, row in enumerate(writes) if row[0] == "write" and row[1] == extent.gde_at(1)],
        "mark": [at for at, row in enumerate(writes) if row[0] == "write" and row[1] == 72],
    }
    order = [rows[name][0] for name in ("table", "entry", "pointer", "mark")]
    assert order == sorted(order)
    syncs = [at for at, row in enumerate(writes) if row[0] == "sync"]
    for first, second in pairwise(order):
        assert any(first < at < second for at in syncs)
    assert writes[-1][0] == "sync"


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for the undo file: nothing is changed, and no half of it stays."""
    image = broken_image(tmp_path)
    damaged = files(tmp_path)

    def fsync(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nbd_vmdk.ops.undo.os.fsync", fsync)
    with pytest.raises(StorageError, match="undo"):
        apply_repair(image.path)
    monkeypatch.undo()
    assert files(tmp_path) == damaged
    assert os.listdir(tmp_path) == ["disk.vmdk"]
    apply_repair(image.path)


def test_failing_disk_tells_of_undo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = broken_image(tmp_path)
    damaged = files(tmp_path)
    real = LocalFile.sync
    left = [1]

    def sync(self: LocalFile) -> None:
        if not left[0]:
            raise StorageError.of(OSError(errno.EIO, "Input/output error"), self.name, "sync")
        left[0] -= 1
        real(self)

    monkeypatch.setattr(LocalFile, "sync", sync)
    with pytest.raises(StorageError) as caught:
        apply_repair(image.path)
    monkeypatch.undo()
    assert caught.value.hint is not None
    assert "--undo" in caught.value.hint
    undo_repair(image.path)
    assert files(tmp_path) == damaged


# Damage of everything at random


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_is_never_made_worse(tmp_path: Path, seed: int) -> None:
    """Damage to one copy of the tables anywhere: what reads after a safe repair is what was there, or EIO."""
    rng = random.Random(seed)
    image = sparse(str(tmp_path))
    wanted = image.visible.read()
    extent = image.hosted()
    redundant = rng.random() < 0.5
    base = extent.rgd_sector if redundant else extent.gd_sector
    begin, length = base * SECTOR, 512 + 3 * 2048
    at = begin + rng.randrange(length)
    size = rng.choice((1, 4, 64, 512, 2048, 4096))
    data = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    poke(image.path, at, data[: begin + length - at])
    damaged = files(tmp_path)
    plan, after = apply_repair(image.path)
    assert read_all(image.path) == wanted
    assert not after.findings
    if plan.chosen:
        undo_repair(image.path)
    assert files(tmp_path) == damaged


ANYTHING = {
    "sparse": sparse,
    "child": child_of_sparse,
    "split": split,
    "flat": flat,
    "cowd": delta(),
    "sesparse": newer_delta(),
    "stream-a": streamed(),
    "stream-b": streamed(layout="B"),
    "stream-c": streamed(layout="C"),
}


@pytest.mark.parametrize("kind", ANYTHING)
def test_any_damage_is_survived(tmp_path: Path, kind: str) -> None:
    """Bytes changed anywhere, files cut off: no repair fails, none hides damage, all can be taken back."""
    source = tmp_path / "source"
    source.mkdir()
    ANYTHING[kind](str(source))
    for seed in range(8):
        rng = random.Random(f"{kind} {seed}")
        folder = tmp_path / str(seed)
        shutil.copytree(source, folder)
        names = sorted(os.listdir(folder))
        for _ in range(rng.choice((1, 2, 4))):
            spoil(str(folder / rng.choice(names)), rng)
        damaged = files(folder)
        path = str(folder / "disk.vmdk")
        try:
            plan, after = apply_repair(path, data=True)
        except NotVmdk:
            continue
        if not after.count_errors:
            read_all(path)
        if plan.chosen:
            undo_repair(path)
        assert files(folder) == damaged
        assert sorted(os.listdir(folder)) == names


def spoil(path: str, rng: random.Random) -> None:
    """Change some bytes of a file, near its beginning most often, or its length."""
    size = os.path.getsize(path)
    how = rng.random()
    if how < 0.15:
        os.truncate(path, rng.randrange(size + 4000))
        return
    at = rng.randrange(min(size, rng.choice((80, SECTOR, 12 * SECTOR, 64 * SECTOR, size))) or 1)
    length = rng.choice((1, 2, 4, 8, 64, SECTOR, 4096))
    data = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    poke(path, at, data[: max(size - at, 0)])


# The command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = broken_image(tmp_path)
    damaged = files(tmp_path)
    assert main(["repair", image.path]) == 3
    out = capsys.readouterr().out
    assert "planned: " in out
    assert "--apply makes them" in out
    assert files(tmp_path) == damaged
    assert main(["repair", "--apply", image.path]) == 0
    out = capsys.readouterr().out
    assert "done: " in out
    assert f"{image.path}.undo" in out
    assert "no errors were found" in out
    assert main(["check", image.path]) == 0
    assert main(["repair", "--apply", image.path]) == 0
    assert "nothing is to be mended" in capsys.readouterr().out
    assert main(["repair", "--undo", image.path]) == 0
    assert files(tmp_path) == damaged
    assert main(["repair", "--undo", image.path]) == 1
    assert main(["repair", "--undo", "--apply", image.path]) == 2


def test_command_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = sparse(str(tmp_path))
    extent = image.hosted()
    grain = min(extent.grains)
    for redundant in (False, True):
        poke(image.path, extent.gte_at(grain, redundant=redundant), b"\5\0\0\0")
    assert main(["repair", "--apply", image.path]) == 3
    assert "only with --also grain-entry: make the grain a hole" in capsys.readouterr().out
    assert main(["repair", "--also", "no-such", image.path]) == 2
    assert "grain-entry can be asked for" in capsys.readouterr().err
    assert main(["repair", "--apply", "--also", "grain-entry", image.path]) == 4
    wanted = bytearray(image.visible.read())
    wanted[grain * GRAIN * SECTOR : (grain + 1) * GRAIN * SECTOR] = bytes(4 * KIB)
    assert read_all(image.path) == bytes(wanted)


def test_command_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = broken_image(tmp_path)
    assert main(["repair", "--json", image.path]) == 3
    facts = json.loads(capsys.readouterr().out)
    assert (facts["schema"], facts["applied"]) == (1, False)
    assert all(finding["planned"] for finding in facts["before"]["findings"])
    assert main(["repair", "--json", "--apply", image.path]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["applied"]
    assert facts["undo-file"] == f"{image.path}.undo"
    assert facts["after"]["findings"] == []
    assert main(["repair", "--json", "--undo", image.path]) == 0
    assert json.loads(capsys.readouterr().out)["undone"]
