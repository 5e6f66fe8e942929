"""
What the commands say of a broken or foreign file: an error that names it, and a hint that helps.

The hints that name the disk must lead to something: the command in them is run.
"""

from __future__ import annotations

import gzip
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.cli import main
from nbd_vmdk.errors import ParentNotFound
from nbd_vmdk.ops.create import create_image
from nbd_vmdk.ops.info import image_info
from tests.breaking import BREAKS, CONTENT, sparse, streamed
from tests.images import cut, desc, ova, poke
from tests.images.content import MIB, SECTOR, Content

CUT_OFF = "the file was cut off, perhaps by an interrupted copy or download: get it again; "
LOOK = "nbd-vmdk check DISK tells all that is damaged, nbd-vmdk repair DISK what can be mended"
CUT_LOOK = f"{CUT_OFF}nbd-vmdk check DISK tells what is lost, nbd-vmdk repair DISK what can be mended"
NEWER = "if it is not damaged it is newer than this program: let the product that made it export the disk"
SALVAGE = (
    "nbd-vmdk repair DISK shows what can be mended; to read what is left of it, add --salvage: "
    "what was lost gives read errors"
)
TABLES = "what other tables map can still be read; nbd-vmdk repair DISK shows what can be mended"
GRAIN = "get the file again; nbd-vmdk check --data DISK lists all grains that are damaged"

#: Breaks that no command opens: (file, a part of the error, the hint).
OPENING = {
    "version": ("disk.vmdk", "version is 9: only 1, 2 and 3 are known", NEWER),
    "grain-size": ("disk.vmdk", "grainSize is 24: must be a power of two", LOOK),
    "table-size": ("disk.vmdk", "numGTEsPerGT is 500: must be a power of two", LOOK),
    "incompatible": ("disk.vmdk", "hold an incompatible feature", NEWER),
    "text-mode": ("disk.vmdk", "went through a text-mode transfer", "copy it again in binary mode"),
    "overhead": ("disk.vmdk", "the file ends too early for its tables", CUT_LOOK),
    "text-garbled": (
        "disk.vmdk",
        "not a disk descriptor",
        "nbd-vmdk repair DISK shows how the descriptor in it is made anew",
    ),
    "text-place": ("disk.vmdk", "the file ends too early for its descriptor", CUT_LOOK),
    "gd-offset": ("disk.vmdk", "too early for its grain directory (gdOffset)", CUT_LOOK),
    "gd-at-end": ("disk.vmdk", "gdOffset is in a footer", LOOK),
    "tables-cut-off": ("disk.vmdk", "the file ends too early for its tables", CUT_LOOK),
    "size-larger": ("disk.vmdk", "the descriptor says 10243 sectors", LOOK),
    "missing": ("disk-s002.vmdk", "no such file", "it needs all 2 and more files"),
    "other": ("disk-s002.vmdk", "its magic is 6e 6f 74 20", "another file lies where that extent should"),
    "named-twice": ("disk-s001.vmdk", "two extents of the disk name it", "mend its text by hand"),
    "flat-short": (
        "disk-flat.vmdk",
        "the file ends too early for the extent on line 9 of disk.vmdk",
        "get it again; nbd-vmdk repair DISK --also file-short puts zeros where data are missing",
    ),
    "flat-missing": ("disk-flat.vmdk", "no such file", "DISK only describes the disk"),
    "line": ("disk.vmdk", "descriptor line 8: ", "mend the line by hand, or get the file again"),
    "no-extents": ("disk.vmdk", "the descriptor names no extents", "nbd-vmdk create --extent"),
    "parent-changed": ("disk.vmdk", "expects parent content ID", "--ignore-cid"),
    "parent-renamed": ("disk.vmdk", "was not found", "elsewhere.vmdk has this content ID: --parent "),
    "parent-gone": ("disk.vmdk", "was not found", "put the parent beside it, or name it with --parent FILE"),
    "parent-loop": ("disk.vmdk", "leads back to", "parentFileNameHint"),
    "parent-denied": ("disk.vmdk", "but its parentCID says that it has none", "add --ignore-cid"),
    "stream-magic": (
        "disk.vmdk",
        "a compressed disk whose header is damaged, but repeated at its end",
        "nbd-vmdk repair DISK shows how it is made anew",
    ),
    "stream-header": ("disk.vmdk", "grainSize is 77: must be a power of two", LOOK),
    "footer-cut": ("disk.vmdk", "for its footer", f"the file was cut off: get it again; else {SALVAGE}"),
    "footer-place": ("disk.vmdk", "too early for its grain directory", SALVAGE),
    "footer-capacity": ("disk.vmdk", "does not belong to this file's header", SALVAGE),
    "footer-version": ("disk.vmdk", "footer is damaged", SALVAGE),
    "cowd-version": ("disk-delta.vmdk", "version is 3: only 1 is known", NEWER),
    "se-version": ("disk-sesparse.vmdk", "seSparse version 0x7", NEWER),
    "se-volatile": ("disk-sesparse.vmdk", "volatile magic is 0x1", LOOK),
    "se-journal": ("disk-sesparse.vmdk", "its journal must be replayed first", "let the ESXi host open"),
}

#: Breaks that are met only where a grain is read.
READING = {
    "gde-both": ("disk.vmdk", "grain directory entry 1 is 0xffffff", TABLES),
    "gte-past-end": ("disk.vmdk", "the file ends too early for a read", CUT_LOOK),
    "gte-low": ("disk.vmdk", "points into the extent's own tables", LOOK),
    "stream-gte-past-end": ("disk.vmdk", "too early for grain 6", SALVAGE),
    "stream-gte-other": ("disk.vmdk", "its marker is for guest sector 1024", GRAIN),
    "record-bits": ("disk.vmdk", "compressed grain 6 is damaged", GRAIN),
    "cowd-gde": ("disk-delta.vmdk", "grain directory entry 0 is 0xffffff", TABLES),
    "cowd-gte-low": ("disk-delta.vmdk", "own directory", LOOK),
    "se-gde": ("disk-sesparse.vmdk", "names no grain table", LOOK),
    "se-state": ("disk-sesparse.vmdk", "not a state that is known", LOOK),
}

#: Breaks that are met only by who wants to write.
WRITING = ("gde-past-end", "gte-past-end", "gte-low", "shared", "over-tables", "cowd-shared")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    """The exit code of a command, and its messages but for warnings."""
    capsys.readouterr()
    code = main(list(words))
    lines = capsys.readouterr().err.splitlines()
    return code, [line for line in lines if line.startswith(("error: ", "hint: "))]


def broken(name: str, folder: Path) -> str:
    each = next(each for each in BREAKS if each.name == name)
    image = each.build(str(folder))
    each.damage(image)
    return image.path


def expect(folder: Path, disk: str, lines: list[str], wanted: tuple[str, str, str]) -> None:
    file, error, hint = wanted
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"error: {folder / file}: "), lines
    assert error in lines[0]
    assert hint.replace("DISK", disk) in lines[1]


@pytest.mark.parametrize("name", OPENING)
def test_what_can_not_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    disk = broken(name, tmp_path)
    for words in (
        ("info", disk),
        ("serve", "-r", disk, "--socket", str(tmp_path / "socket")),
        ("convert", disk, str(tmp_path / "new.vmdk")),
    ):
        code, lines = said(capsys, *words)
        assert code in ((1, 3) if words[0] == "info" else (1,))  # info tells what it can all the same
        expect(tmp_path, disk, lines, OPENING[name])
    assert not (tmp_path / "new.vmdk").exists()
    run_the_hint(capsys, lines[1])


def run_the_hint(capsys: pytest.CaptureFixture[str], line: str) -> None:
    """Commands in a hint that name a file are ones that there are, and look at it."""
    for command in re.findall(
        r"nbd-vmdk ((?:check|check --data|repair) /\S+?(?: --also \S+)?)[ ,;)]", f"{line} "
    ):
        code, lines = said(capsys, *shlex.split(command))
        assert code in (3, 4), (command, lines)
        assert not lines or lines[0].startswith("hint: "), (command, lines)


@pytest.mark.parametrize("name", READING)
def test_what_can_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    disk = broken(name, tmp_path)
    assert said(capsys, "info", disk) == (0, [])
    code, lines = said(capsys, "convert", disk, str(tmp_path / "new.vmdk"))
    assert code == 1
    expect(tmp_path, disk, lines, READING[name])
    assert not (tmp_path / "new.vmdk").exists()
    run_the_hint(capsys, lines[1])


@pytest.mark.parametrize("name", WRITING)
def test_what_must_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """The disk is named, not the extent in which the damage is."""
    disk = broken(name, tmp_path)
    code, lines = said(capsys, "serve", disk, "--socket", str(tmp_path / "socket"))
    assert code == 1
    hint = "nbd-vmdk check DISK tells more, nbd-vmdk repair DISK shows what can be mended; or read it with -r"
    assert lines[1:] == [f"hint: {hint.replace('DISK', disk)}"]
    run_the_hint(capsys, lines[1])


# Files of other sorts, and parts of disks


def boot_sector(path: str) -> None:
    data = bytearray(MIB)
    data[:3], data[510:512] = b"\xeb\x63\x90", b"\x55\xaa"
    Path(path).write_bytes(data)


def unfinished(path: str) -> None:
    sparse(str(Path(path).parent))
    poke(path, 0, b"kdmv")


def gone(path: str) -> None:
    Path(path).write_bytes(bytes(MIB))


FOREIGN: dict[str, tuple[Callable[[str], object], str, str]] = {
    "empty": (lambda path: Path(path).write_bytes(b""), "an empty file", "make it again"),
    "boot-sector": (
        boot_sector,
        "a raw disk, by its boot sector",
        "nbd-vmdk convert --from raw DISK new.vmdk",
    ),
    "zeros": (gone, "zeros where a header should be", "get it again; of a raw disk a VMDK is made by: "),
    "unfinished": (unfinished, "whose writing never finished", "run the export or conversion"),
    "page": (
        lambda path: Path(path).write_bytes(b"<!DOCTYPE html>" + bytes(MIB)),
        "a web page",
        "get the file again",
    ),
    "qcow2": (lambda path: Path(path).write_bytes(b"QFI\xfb" + bytes(MIB)), "a qcow2 image", "qemu-nbd"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, error, hint = FOREIGN[name]
    disk = str(tmp_path / "disk.vmdk")
    make(disk)
    for verb in ("info", "check"):
        code, lines = said(capsys, verb, disk)
        assert code == 1
        expect(tmp_path, disk, lines, ("disk.vmdk", error, hint))


def test_the_hint_for_a_raw_disk_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = str(tmp_path / "disk.vmdk")
    boot_sector(disk)
    _code, lines = said(capsys, "info", disk)
    words = shlex.split(lines[1].partition("nbd-vmdk ")[2].replace("new.vmdk", str(tmp_path / "new.vmdk")))
    assert main(words) == 0
    assert main(["check", str(tmp_path / "new.vmdk")]) == 0


def test_a_part_of_a_disk_leads_to_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for make, part in ((desc.split_sparse, "disk-s001.vmdk"), (desc.monolithic_flat, "disk-flat.vmdk")):
        image = make(str(tmp_path), "disk", CONTENT)
        _code, lines = said(capsys, "info", str(tmp_path / part))
        assert lines[1] == f"hint: open {image.path} instead", lines


@pytest.mark.parametrize("name", ["footer-cut", "tables-cut-off"])
def test_a_disk_that_was_renamed_and_cut_off(tmp_path: Path, name: str) -> None:
    """The name in its descriptor means it all the same, and no file that is called so."""
    disk = Path(broken(name, tmp_path))
    for other in (False, True):
        renamed = disk.rename(tmp_path / "renamed.vmdk")
        if other:
            disk.touch()
        facts = image_info(renamed)
        assert facts["error"]["error"] == "truncated"
        (extent,) = facts["format-specific"]["data"]["extents"]
        assert (extent["filename"], extent["state"]) == (str(renamed), "there")
        renamed.rename(disk)


def test_damage_in_an_archive_is_not_to_be_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = streamed()(str(tmp_path))
    poke(image.path, 20, b"\x4d")
    path = str(tmp_path / "vm.ova")
    ova.write_ova(path, [ova.Disk(image.path, CONTENT.size)])
    _code, lines = said(capsys, "info", path)
    assert "grainSize is 77" in lines[0]
    assert lines[1:] == ["hint: the file is damaged, or was cut off: get it again"]
    cut(path, 80 * SECTOR)
    _code, lines = said(capsys, "info", path)
    assert lines[1:] == [
        "hint: the archive was cut off, perhaps by an interrupted copy or download: get it again"
    ]


def test_what_a_parent_needs_is_named_by_the_parent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair of the child mends nothing there, and one of an extent is refused."""
    monkeypatch.chdir(tmp_path)
    create_image("my base.vmdk", 4 * MIB, kind="twoGbMaxExtentSparse", extent_size=2 * MIB)
    create_image("child.vmdk", parent="my base.vmdk")
    poke("my base-s001.vmdk", 72, b"\1")
    assert main(["check", "child.vmdk"]) == 4
    out, err = capsys.readouterr()
    assert "warning: my base-s001.vmdk (byte 72): unclean" in out
    assert "clear the mark (repair my base.vmdk by its own name)" in out
    assert err == "hint: nbd-vmdk repair 'my base.vmdk' shows what would be mended\n"
    assert main(["repair", "child.vmdk"]) == 4
    assert "not here: repair my base.vmdk by its own name" in capsys.readouterr().out
    assert main(["repair", "my base.vmdk"]) == 4
    assert "1 repair planned" in capsys.readouterr().out
    poke("child-s001.vmdk", 72, b"\1")
    assert main(["check", "child.vmdk"]) == 4
    assert capsys.readouterr().err == "hint: nbd-vmdk repair child.vmdk shows what would be mended\n"


def test_no_repair_is_named_for_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = broken("gte-low", tmp_path)
    code, lines = said(capsys, "check", disk)
    assert (code, lines[-1]) == (3, f"hint: nbd-vmdk repair {disk} shows what would be mended")
    path = str(tmp_path / "vm.ova")
    ova.write_ova(path, [ova.Disk(disk, CONTENT.size)])
    code, lines = said(capsys, "check", path)
    assert (code, lines[-1]) == (3, "hint: in an archive nothing is mended: take the disk out of it first")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gte-low", "the file is damaged, or was cut off: get it again"),
        ("record-bits", "get the file again"),
        ("stream-gte-past-end", "to read what is left of it, add --salvage: what was lost gives read errors"),
    ],
)
def test_what_can_not_be_read_in_an_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, hint: str
) -> None:
    disk = broken(name, tmp_path)
    path = str(tmp_path / "vm.ova")
    ova.write_ova(path, [ova.Disk(disk, CONTENT.size)])
    _code, lines = said(capsys, "convert", path, str(tmp_path / "new.vmdk"))
    assert lines[1:] == [f"hint: {hint}"]


def test_the_disk_is_named_and_not_its_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = Content.random(4 * MIB, 5, density=1)
    image = desc.split_sparse(str(tmp_path), "disk", content, extent_sectors=4096)
    (tmp_path / "same.raw").write_bytes(content.read())
    cut(str(tmp_path / "disk-s002.vmdk"), -MIB)
    _code, lines = said(capsys, "convert", image.path, str(tmp_path / "new.vmdk"))
    expect(tmp_path, image.path, lines, ("disk-s002.vmdk", "the file ends too early for a read", CUT_LOOK))
    run_the_hint(capsys, lines[1])
    assert said(capsys, "compare", image.path, str(tmp_path / "same.raw"))[1][1:] == lines[1:]


@pytest.mark.parametrize(
    ("name", "verb", "hint"),
    [
        ("grain-size", "info", "nbd-vmdk check DISK tells"),
        ("flat-short", "info", "nbd-vmdk repair DISK --also"),
        ("text-mode", "check", "nbd-vmdk repair DISK shows"),
        ("parent-renamed", "info", "--parent DISK"),
    ],
)
def test_names_with_blanks_are_quoted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, verb: str, hint: str
) -> None:
    folder = tmp_path / "Windows 11"
    folder.mkdir()
    disk = broken(name, folder)
    _code, lines = said(capsys, verb, disk)
    named = folder / "elsewhere.vmdk" if name == "parent-renamed" else disk
    assert hint.replace("DISK", f"'{named}'") in lines[-1], lines


def test_the_hint_for_a_packed_disk_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "Windows 11.vmdk.gz"
    with gzip.open(disk, "wb") as file:
        file.write(b"anything")
    _code, lines = said(capsys, "info", str(disk))
    subprocess.run(shlex.split(lines[1].partition("first: ")[2]), check=True)
    assert (tmp_path / "Windows 11.vmdk").read_bytes() == b"anything"


def test_what_only_a_host_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk.vmdk"
    disk.write_bytes(desc.descriptor("vmfsRDM", [("RW", 2048, "VMFSRDM", "disk-rdm.vmdk")]))
    _code, lines = said(capsys, "info", str(disk))
    expect(tmp_path, str(disk), lines, ("disk.vmdk", "lies on a LUN", "vmkfstools -i"))


def test_lost_parts_of_a_salvaged_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = desc.stream_optimized(str(tmp_path), "disk", Content.random(4 * MIB, seed=3), gtes=32)
    cut(image.path, image.stream().grain_at(sorted(image.stream().records)[-3]) + 700)
    _code, lines = said(capsys, "convert", "--salvage", image.path, str(tmp_path / "new.vmdk"))
    expect(tmp_path, image.path, lines, ("disk.vmdk", "is lost", "only a whole copy of the file has it"))


def test_a_fresh_disk_of_another_size_is_no_missing_parent(tmp_path: Path) -> None:
    """Its content ID is that of all disks that were never written."""
    create_image(tmp_path / "base.vmdk", 4 * MIB)
    create_image(tmp_path / "child.vmdk", parent=str(tmp_path / "base.vmdk"))
    (tmp_path / "base.vmdk").unlink()
    create_image(tmp_path / "other.vmdk", 8 * MIB)
    with pytest.raises(ParentNotFound) as caught:
        open_disk(tmp_path / "child.vmdk")
    assert "other.vmdk" not in str(caught.value.hint)
    create_image(tmp_path / "moved.vmdk", 4 * MIB)
    with pytest.raises(ParentNotFound) as caught:
        open_disk(tmp_path / "child.vmdk")
    assert "moved.vmdk has this content ID" in str(caught.value.hint)
