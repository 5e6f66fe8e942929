"""
What a check finds: nothing in a sound image however it is laid out, and whatever is damaged by its name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from nbd_vmdk.cli import main
from nbd_vmdk.errors import FileMissing, NotVmdk, StorageError, Unsupported, VmdkError
from nbd_vmdk.opening import open_disk
from nbd_vmdk.ops.check import runner
from nbd_vmdk.ops.check.findings import LISTED, Finding, Repair
from nbd_vmdk.ops.check.runner import Report, check_image
from nbd_vmdk.ops.create import create_image
from tests.breaking import BREAKS, COARSE, CONTENT, Break, child_of_sparse, sparse, split
from tests.images import desc, ova, peek, poke
from tests.images.content import GIB, KIB, MIB, SECTOR, TIB, Content
from tests.images.desc import Image, Row
from tests.images.hosted import write_hosted

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

ODD = Content.random(3 * MIB + 7 * SECTOR, seed=1)  # no multiple of a grain
WIDE = Content.random(40 * MIB, seed=2, grain=4 * KIB, touched=200)  # more than one grain table of any kind
PARENT = Content.random(3 * MIB, seed=3, density=1.0)


def told(report: Report) -> list[str]:
    """Findings as lines, for a message that says it all."""
    return [
        f"{finding.severity} {finding.slug} {finding.place}: {finding.what}" for finding in report.findings
    ]


def way(finding: Finding) -> str:
    if not isinstance(finding.repair, Repair):
        return "no"
    return "yes" if finding.repair.asks is None else "asks"


# Sound images

SOUND: dict[str, Callable[[str], Image]] = {
    f"hosted-{name}-{number}": lambda folder, options=options, content=content: desc.monolithic_sparse(
        folder, "disk", content, **options
    )
    for number, content in enumerate((ODD, WIDE))
    for name, options in {
        "plain": {},
        "zeros": {"zero_gte": True},
        "one-copy": {"rgd": False},
        "few-tables": {"preallocate_tables": False},
        "tables-last": {"tables_last": True},
        "shuffled": {"shuffle_grains": 3},
        "small-tables": {"gtes": 64},
        "small-grains": {"grain_sectors": 8},
        "tiny-grains": {"grain_sectors": 1},
        "tight-text": {"descriptor_sectors": 2},
        "beyond": {"beyond": 0xAA},
        "no-overhead": {"overhead": 0},
        "version-3": {"version": 3},
        "version-3-zeros": {"version": 3, "zero_gte": True},
    }.items()
}
SOUND |= {
    f"stream-{layout}-{name}": lambda folder, options=options, layout=layout: desc.stream_optimized(
        folder, "disk", ODD, gtes=16, layout=layout, **options
    )
    for layout in ("A", "B", "C", "mixed")
    for name, options in {
        "plain": {},
        "shuffled": {"order": 4},
        "short": {"last_grain": "short"},
        "zeros": {"zeros": "write"},
        "progress": {"progress_every": 3},
        "no-val": {"metadata_val": False},
        "all-tables": {"all_tables": True},
        "stored": {"level": 0},
        "padded": {"trailing": 4096},
    }.items()
}
SOUND |= {
    "stream-length": lambda folder: desc.stream_optimized(folder, "disk", ODD, layout="B", record="length"),
    "stream-bare": lambda folder: desc.stream_optimized(folder, "disk", ODD, layout="B", record="bare"),
    "stream-raw": lambda folder: desc.stream_optimized(folder, "disk", ODD, raw_deflate=True),
    "flat": lambda folder: desc.monolithic_flat(folder, "disk", ODD),
    "vmfs": lambda folder: desc.vmfs(folder, "disk", ODD),
    "split": lambda folder: desc.split_sparse(folder, "disk", ODD, extent_sectors=2048),
    "split-qemu": lambda folder: desc.split_sparse(folder, "disk", ODD, extent_sectors=2048, descriptor=b""),
    "split-flat": lambda folder: desc.split_flat(folder, "disk", ODD, extent_sectors=2048),
    "cowd": lambda folder: desc.vmfs_sparse(folder, "disk", WIDE),
    "cowd-coarse": lambda folder: desc.vmfs_sparse(folder, "disk", WIDE, grain_sectors=128),
    "cowd-tables": lambda folder: desc.vmfs_sparse(folder, "disk", WIDE, preallocate_tables=True),
    "cowd-shuffled": lambda folder: desc.vmfs_sparse(folder, "disk", WIDE, shuffle_grains=2),
    "cowd-grown": lambda folder: desc.vmfs_sparse(folder, "disk", WIDE, grow_to=16 * MIB),
    "sesparse": lambda folder: desc.se_sparse(folder, "disk", WIDE),
    "sesparse-zeros": lambda folder: desc.se_sparse(folder, "disk", WIDE, zero_style="mixed"),
    "sesparse-shuffled": lambda folder: desc.se_sparse(
        folder, "disk", WIDE, shuffle_grains=2, shuffle_tables=3
    ),
    "sesparse-high": lambda folder: desc.se_sparse(folder, "disk", WIDE, first_index=4090),
    "child": lambda folder: desc.monolithic_sparse(
        folder, "disk", WIDE, zero_gte=True, parent=desc.monolithic_sparse(folder, "base", WIDE)
    ),
    "custom": lambda folder: desc.custom(
        folder,
        "disk",
        [
            Row("RW", "SPARSE", ODD),
            Row("RW", "FLAT", PARENT, "disk-raw.vmdk", 5),
            Row("RW", "ZERO", Content(MIB)),
            Row("RDONLY", "FLAT", PARENT, "disk-raw.vmdk", 20000),
            Row("NOACCESS", "FLAT", ODD, "secret.bin", 0),
        ],
    ),
    "renamed": lambda folder: desc.monolithic_sparse(folder, "disk", ODD, extent_name="other.vmdk"),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_image(tmp_path: Path, name: str) -> None:
    image = SOUND[name](str(tmp_path))
    before = {path: peek(path, 0, os.path.getsize(path)) for path in image.files}
    report = check_image(image.path, data=True)
    assert not told(report)
    assert not report.in_use
    assert {path: peek(path, 0, os.path.getsize(path)) for path in image.files} == before


@needs_qemu
@pytest.mark.parametrize(
    "subformat",
    ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"],
)
def test_sound_qemu_image(tmp_path: Path, subformat: str) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(ODD.read())
    path = str(tmp_path / "disk.vmdk")
    command = ["qemu-img", "convert", "-O", "vmdk", "-o", f"subformat={subformat}", str(raw), path]
    subprocess.run(command, check=True, capture_output=True)
    assert not told(check_image(path, data=True))
    assert main(["check", path]) == 0


@needs_qemu
def test_sound_after_qemu_wrote(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.vmdk")
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", path, "100M"], check=True)
    writes = [f"-cwrite -P {at} {at * 700}k 70k" for at in range(1, 40)]
    subprocess.run(["qemu-io", "-f", "vmdk", *writes, path], check=True, capture_output=True)
    assert not told(check_image(path))


def test_sound_in_an_archive(tmp_path: Path) -> None:
    image = desc.stream_optimized(str(tmp_path), "disk", ODD)
    path = str(tmp_path / "vm.ova")
    ova.write_ova(path, [ova.Disk(image.path, ODD.size)])
    assert not told(check_image(path, data=True))


def test_written_by_us(tmp_path: Path) -> None:
    """Trimmed grains leave room that nothing names, but that costs no space: no finding."""
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD)
    with open_disk(image.path, writable=True) as disk:
        disk.pwrite(b"x" * MIB, 100)
        disk.trim(MIB, 0)
        disk.zero(MIB, MIB, may_trim=True)
    assert not told(check_image(image.path))


# Damage


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.name)
def test_damage_is_named(tmp_path: Path, broken: Break) -> None:
    image = broken.build(str(tmp_path))
    broken.damage(image)
    report = check_image(image.path, data=broken.data)
    found = [finding for finding in report.findings if finding.slug == broken.finds]
    assert found, told(report)
    assert {finding.severity.value for finding in found} == {broken.severity}
    assert {way(finding) for finding in found} == {broken.mends}
    others = {finding.slug for finding in report.findings} - {broken.finds, *broken.also}
    assert not others, told(report)
    for finding in report.findings:
        assert finding.effect
        assert finding.repair
        assert json.loads(json.dumps(finding.as_dict()))["finding"] == finding.slug


def test_what_the_system_refuses_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check has one extent open at a time; opening the disk takes them all, which may be too many."""
    image = desc.split_flat(str(tmp_path), "disk", Content(2 * MIB), extent_sectors=2048)

    def refused(*_: object) -> NoReturn:
        raise StorageError.of(OSError(errno.EMFILE, os.strerror(errno.EMFILE)), image.path, "open")

    monkeypatch.setattr(runner, "open_chain", refused)
    assert main(["check", image.path]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "Too many open files" in told.err
    assert "ulimit -n" in told.err


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.name)
def test_what_check_lets_through_opens(tmp_path: Path, broken: Break) -> None:
    """An image with warnings at most opens; all of one without --data damage reads, or a check said so."""
    image = broken.build(str(tmp_path))
    broken.damage(image)
    report = check_image(image.path, data=True)
    fault = None
    try:
        with open_disk(image.path, locks=False) as disk:
            disk.pread(disk.size, 0)
    except VmdkError as error:
        fault = error
    assert fault is None or report.count_errors, fault


def test_place_is_told(tmp_path: Path) -> None:
    image = split(str(tmp_path))
    extent = image.hosted(1)
    grain = sorted(extent.grains)[7]
    poke(extent.path, extent.gte_at(grain), b"\xff\xff\xff\x00")
    (finding,) = check_image(image.path).findings
    table, entry = divmod(grain, 512)
    assert (finding.file, finding.table, finding.entry) == (extent.path, table, entry)
    assert finding.guest == 4096 * SECTOR + grain * 8 * SECTOR
    assert finding.place == f"table {table}, entry {entry}, guest offset {finding.guest}"


def test_many_of_a_sort_are_counted(tmp_path: Path) -> None:
    image = sparse(str(tmp_path))
    extent = image.hosted()
    for redundant in (False, True):
        at = extent.gte_at(0, redundant=redundant)
        poke(extent.path, at, b"\xff\xff\xff\x00" * 400)
    report = check_image(image.path)
    assert len(report.findings) == LISTED + 1
    assert report.count_errors == 400
    assert report.findings[-1].more == 400 - LISTED


def test_grains_of_all_kinds_overlap_exactly(tmp_path: Path) -> None:
    """Misaligned grains that only touch are no overlap; one sector nearer and they are."""
    image = desc.monolithic_sparse(str(tmp_path), "disk", CONTENT, grain_sectors=8, gap_sectors=1)
    report = check_image(image.path)
    assert {finding.slug for finding in report.findings} == {"grain-misaligned"}
    extent = image.hosted()
    one, other = sorted(extent.grains)[4:6]
    for shift, overlaps in ((8, False), (7, True), (-8, False), (-7, True)):
        sector = extent.grains[one] + shift
        # Its neighbours on both sides are moved out of the way.
        for grain in extent.grains:
            value = extent.grains[grain] if grain in (one, other) else 0
            value = sector if grain == other else value
            for redundant in (False, True):
                poke(extent.path, extent.gte_at(grain, redundant=redundant), value.to_bytes(4, "little"))
        found = {finding.slug for finding in check_image(image.path).findings}
        assert ("grains-overlap" in found) is overlaps, shift


@pytest.mark.parametrize("name", ["shared", "shared-partly", "cowd-shared", "se-shared", "stream-gte-other"])
def test_large_files_are_looked_at_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With little memory for who uses what, the same is found in several passes."""
    broken = next(broken for broken in BREAKS if broken.name == name)
    image = broken.build(str(tmp_path))
    monkeypatch.setattr("nbd_vmdk.ops.check.claims._MAX_BYTES", 40)
    assert not told(check_image(image.path))
    broken.damage(image)
    few = told(check_image(image.path))
    monkeypatch.undo()
    assert few == told(check_image(image.path))


# What can't be checked


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        check_image(tmp_path / "no.vmdk")
    assert main(["check", str(tmp_path / "no.vmdk")]) == 1


def test_no_vmdk(tmp_path: Path) -> None:
    path = tmp_path / "page.vmdk"
    path.write_bytes(b"<html>createType=" + bytes(2000))
    with pytest.raises(NotVmdk):
        check_image(path)
    path.write_bytes(b"kdmv" + bytes(2000))
    with pytest.raises(NotVmdk, match="never finished"):
        check_image(path)


def test_part_of_a_disk(tmp_path: Path) -> None:
    image = split(str(tmp_path))
    with pytest.raises(NotVmdk, match=r"an extent of disk\.vmdk"):
        check_image(image.files[1])


def test_encrypted(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes(desc.encrypted_descriptor())
    with pytest.raises(Unsupported, match="encrypted"):
        check_image(path)


def test_extent_without_descriptor(tmp_path: Path) -> None:
    path = str(tmp_path / "alone.vmdk")
    write_hosted(path, ODD)
    report = check_image(path)
    assert [finding.slug for finding in report.findings] == ["no-descriptor"]


def test_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    image = desc.monolithic_flat(str(tmp_path / "inside"), "disk", ODD)
    text = Path(image.path).read_text().replace("disk-flat.vmdk", "../disk-flat.vmdk")
    os.rename(image.files[1], tmp_path / "disk-flat.vmdk")
    Path(image.path).write_text(text)
    (finding,) = check_image(image.path).findings
    assert finding.slug == "not-trusted"
    assert not told(check_image(image.path, allow_dirs=(tmp_path,)))


def test_parent_whose_name_has_a_backslash(tmp_path: Path) -> None:
    """What unpacks archives of Windows may leave such names: the backslash is a part of this one."""
    base, child = tmp_path / "vm\\base.vmdk", tmp_path / "child.vmdk"
    create_image(base, MIB)
    create_image(child, parent=str(base))
    with open_disk(child) as disk:
        assert [link.name for link in disk.links] == [str(child), str(base)]
    report = check_image(child)
    assert told(report) == []
    assert report.links == [str(child), str(base)]


def test_parent_outside_the_folder(tmp_path: Path) -> None:
    """It is there: the way is to allow its folder, not to look for it."""
    (tmp_path / "base").mkdir()
    (tmp_path / "child").mkdir()
    base, child = tmp_path / "base" / "base.vmdk", tmp_path / "child" / "child.vmdk"
    create_image(base, MIB)
    create_image(child, parent=str(base), allow_dirs=(base.parent,))
    (finding,) = check_image(child).findings
    assert (finding.slug, finding.what) == (
        "not-trusted",
        "its parent ../base/base.vmdk: outside the image's folder",
    )
    assert finding.repair == f"to let the image use it, add --allow-dir {base.parent}"
    assert not told(check_image(child, allow_dirs=(base.parent,)))
    # One beside it with the right content ID is the parent that was meant, as for reading.
    shutil.copy(base, child.parent / "copy.vmdk")
    assert [finding.slug for finding in check_image(child).findings] == ["parent-not-found"]


def test_parent_that_the_user_names(tmp_path: Path) -> None:
    image = child_of_sparse(str(tmp_path))
    assert image.parent is not None
    (tmp_path / "away").mkdir()
    moved = os.path.join(tmp_path, "away", "moved.vmdk")
    os.rename(image.parent.path, moved)
    assert [finding.slug for finding in check_image(image.path).findings] == ["parent-not-found"]
    report = check_image(image.path, parent=moved)
    assert not told(report)
    assert report.links == [image.path, moved]


# Large images


def test_memory_and_time_of_a_large_empty_image(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.vmdk")
    content = Content(2000 * GIB).put(1999 * GIB, b"x" * 65536)
    desc.monolithic_sparse(str(tmp_path), "disk", content)
    calls: list[tuple[int, int]] = []
    report = check_image(path, progress=lambda done, total: calls.append((done, total)))
    assert not told(report)
    assert calls[-1][0] == calls[-1][1] == 2 * 64000 * 2048
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_largest_sesparse(tmp_path: Path) -> None:
    content = Content(4 * TIB).put(3 * TIB, b"x" * 4096)
    image = desc.se_sparse(str(tmp_path), "disk", content)
    assert not told(check_image(image.path))


# The command


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = sparse(str(tmp_path))
    assert run("check", image.path, capsys=capsys) == (0, f"{image.path}: no errors were found\n", "")
    poke(image.path, 72, b"\1")
    code, out, err = run("check", image.path, capsys=capsys)
    assert code == 4
    assert "warning: " in out
    assert "1 warning was found" in out
    assert err == f"hint: nbd-vmdk repair {image.path} shows what would be mended\n"
    extent = image.hosted()
    poke(image.path, extent.gte_at(min(extent.grains)), b"\5")
    code, out, err = run("check", image.path, capsys=capsys)
    assert code == 3
    assert "1 error and 1 warning were found" in out
    assert f"error: {image.path} (table 0, entry" in out
    for word in ("grain-entry", "what:", "effect:", "repair:"):
        assert word in out


def test_command_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grain = sorted(desc.stream_optimized(str(tmp_path), "disk", COARSE).stream().records)[5]
    image = desc.stream_optimized(str(tmp_path), "disk", COARSE, broken={grain: "adler"})
    code, out, _ = run("check", "--json", image.path, capsys=capsys)
    assert (code, json.loads(out)["findings"]) == (0, [])
    code, out, _ = run("check", "--json", "--data", image.path, capsys=capsys)
    facts = json.loads(out)
    assert code == 3
    assert facts["schema"] == 1
    assert (facts["errors"], facts["warnings"], facts["data"]) == (1, 0, True)
    (finding,) = facts["findings"]
    assert (finding["finding"], finding["guest-offset"]) == ("grain-data", grain * 65536)
    assert finding["repair"] is None
    assert finding["why-not"]


def test_terminal_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = sparse(str(tmp_path))
    poke(image.path, 72, b"\1")
    monkeypatch.setattr("nbd_vmdk.cli.output.colourful", lambda _stream: True)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("check", image.path, capsys=capsys)
    assert code == 4
    assert "unclean" in out
    assert "clear the mark" in out


def test_names_in_findings_are_cleaned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes(desc.descriptor("monolithicFlat", [("RW", 100, "FLAT", "a\x1b[31mb-flat.vmdk", 0)]))
    code, out, _ = run("check", str(path), capsys=capsys)
    assert code == 3
    assert "\x1b" not in out
    assert "\\x1b" in out


def test_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = sparse(str(tmp_path))
    with open_disk(image.path, writable=True) as disk:
        code, out, err = run("check", image.path, capsys=capsys)
        assert code == 0
        assert "warning:" in err
        assert "writing it" in err
        disk.pwrite(b"x" * 4096, disk.size - 8192)
        disk.flush()
        code, out, err = run("check", "--json", image.path, capsys=capsys)
        assert code == 5  # the unclean mark is there, and will be gone
        assert json.loads(out)["in-use"]


def test_progress_off_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from nbd_vmdk.cli.progress import progress

    clock = iter([0.0, 3.0, 10.5, 11.0, 21.0])
    monkeypatch.setattr("nbd_vmdk.cli.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress("checking") as step:
        for done in (1, 2, 3, 4):
            step(done * MIB, 8 * MIB)
    err = capsys.readouterr().err
    assert err == "note: checking: 25%, 2 MiB of 8 MiB\nnote: checking: 50%, 4 MiB of 8 MiB\n"


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar for what takes long, and nothing for what does not."""
    from nbd_vmdk.cli.progress import progress

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for times, shown in (([0.0, 0.1, 0.2], False), ([0.0, 1.0, 2.0], True)):
        clock = iter(times)
        monkeypatch.setattr(
            "nbd_vmdk.cli.progress.time", SimpleNamespace(monotonic=lambda clock=clock: next(clock))
        )
        with progress("checking") as step:
            step(MIB, 8 * MIB)
            step(2 * MIB, 8 * MIB)
        assert ("checking" in capsys.readouterr().err) is shown
