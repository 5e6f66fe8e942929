"""
Chains: where a parent is looked for, when it is one, and what shows through.
"""

from __future__ import annotations

import gc
import itertools
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.chain import MAX_LINKS
from nbd_vmdk.errors import (
    ChainError,
    ChainTooDeep,
    ContentIdMismatch,
    FileMissing,
    NotVmdk,
    ParentNotFound,
    TrustError,
)
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.snapshot.tree import link_file, parent_of
from nbd_vmdk.storage.localfolder import LocalFolder
from tests.engine import reads, refused, runs, same, shows
from tests.images import desc, ova, poke
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image, Row

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

ODD = Content.random(3 * MIB + 7 * SECTOR, seed=1).settled(64 * KIB)  # all grains whole: none is filled up
PARENT = Content.random(3 * MIB + 7 * SECTOR, seed=3, density=1.0)
TOP = Content.random(3 * MIB + 7 * SECTOR, seed=4, density=0.3, grain=16 * KIB).settled(64 * KIB)
WRONG = Content(PARENT.size).put(0, b"wrong" * 1000).settled(64 * KIB)


def child(
    folder: Path, hint: str | None, *, name: str = "child", cid: str = "00000077", parent_cid: str
) -> Image:
    """A child by its texts alone; what it hides of a parent is ODD."""
    text = {"parent_cid": parent_cid, "hint": hint}
    return desc.monolithic_sparse(str(folder), name, ODD, cid=cid, text=text)


def base(folder: Path, name: str = "base", content: Content = PARENT, cid: str = "0badf00d") -> Image:
    folder.mkdir(exist_ok=True)
    return desc.monolithic_flat(str(folder), name, content, cid=cid)


# Where a parent is


def test_the_hint_as_written(tmp_path: Path) -> None:
    parent = base(tmp_path)
    (tmp_path / "sub").mkdir()
    below = base(tmp_path / "sub", content=TOP)
    for hint, found in (
        ("base.vmdk", parent),
        ("./base.vmdk", parent),
        (str(tmp_path / "base.vmdk"), parent),
        ("sub/base.vmdk", below),
        ("sub\\base.vmdk", below),
        ("sub/../sub//base.vmdk", below),
    ):
        made = child(tmp_path, hint, parent_cid="0badf00d")
        warnings = shows(made.path, ODD.over(found.content))
        assert warnings == ()


def test_the_hint_wins_over_guesses(tmp_path: Path) -> None:
    """Even if it has the wrong content: a mismatch is told, not worked around."""
    (tmp_path / "sub").mkdir()
    base(tmp_path)
    base(tmp_path / "sub", content=WRONG, cid="00000bad")
    made = child(tmp_path, "sub/base.vmdk", parent_cid="0badf00d")
    error = refused(made.path, ContentIdMismatch)
    assert "sub/base.vmdk" in str(error)
    assert "0badf00d" in str(error)
    assert "00000bad" in str(error)


HINTS = [
    "/vmfs/volumes/4f-33/vm/base.vmdk",
    "C:\\VMs\\vm\\base.vmdk",
    "c:/VMs/vm/base.vmdk",
    "\\\\server\\share\\vm\\base.vmdk",
    "../vm/base.vmdk",
    "..\\vm\\base.vmdk",
    "gone/vm/base.vmdk",
]


@pytest.mark.parametrize("hint", HINTS)
def test_a_guess_beside_the_child(tmp_path: Path, hint: str) -> None:
    """A moved machine: the name's last part beside the child, if its content is the right one."""
    here = tmp_path / "here"
    parent = base(here)
    made = child(here, hint, parent_cid="0badf00d")
    shows(made.path, ODD.over(parent.content))

    base(here, content=WRONG, cid="00000bad")
    error = refused(made.path)
    assert isinstance(error, ParentNotFound | TrustError)
    assert not isinstance(error, ContentIdMismatch)
    # Not even --ignore-cid takes what is a guess and does not fit.
    refused(made.path, type(error), ignore_cid=True)


@pytest.mark.parametrize("hint", HINTS[:4])
def test_a_guess_in_a_sibling_folder(tmp_path: Path, hint: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    parent = base(tmp_path / "vm")
    made = child(here, hint, parent_cid="0badf00d")
    refused(made.path)  # outside of the image's folder
    shows(made.path, ODD.over(parent.content), allow_dirs=[tmp_path])
    base(tmp_path / "vm", content=WRONG, cid="00000bad")
    refused(made.path, allow_dirs=[tmp_path])


def test_a_guess_is_told(tmp_path: Path) -> None:
    here = tmp_path / "here"
    parent = base(here)
    made = child(here, "/vmfs/vm/base.vmdk", parent_cid="0badf00d")
    with open_disk(made.path) as disk:
        told = f"{made.path}: {parent.path} is taken for its parent /vmfs/vm/base.vmdk"
        assert told in disk.warnings
    with open_disk(child(here, "base.vmdk", name="other", parent_cid="0badf00d").path) as disk:
        assert not [warning for warning in disk.warnings if "taken for" in warning]


def test_all_fresh_disks_have_one_content_id(tmp_path: Path) -> None:
    """So a guess must have the size, too; a file that the hint leads to need not."""
    here = tmp_path / "here"
    small = Content.random(MIB, seed=5)
    other = base(here, content=small, cid="fffffffe")
    made = child(here, "gone/base.vmdk", parent_cid="fffffffe")
    assert refused(made.path).hint == "put the parent beside it, or name it with --parent FILE"
    found = check_image(made.path).findings
    assert [each.slug for each in found if "parent" in each.slug] == ["parent-not-found"]
    assert tree_of(made.path) is None
    shows(child(here, "base.vmdk", name="led", parent_cid="fffffffe").path, ODD.over(small))
    for path in other.files:
        os.unlink(path)
    parent = base(here, cid="fffffffe")
    shows(made.path, ODD.over(parent.content))
    assert tree_of(made.path) == parent.path


def tree_of(path: str) -> str | None:
    """The parent that snapshot operations see."""
    link = link_file(*LocalFolder.for_image(path))
    assert link is not None
    found = parent_of(link)
    return None if found is None else found.label


def test_a_guess_beside_comes_before_one_elsewhere(tmp_path: Path) -> None:
    here = tmp_path / "here"
    near = base(here)
    base(tmp_path / "vm", content=WRONG)
    made = child(here, "/vmfs/vm/base.vmdk", parent_cid="0badf00d")
    shows(made.path, ODD.over(near.content), allow_dirs=[tmp_path])


def test_the_parent_that_the_user_names(tmp_path: Path) -> None:
    other = base(tmp_path / "other", "another name")
    base(tmp_path, content=WRONG)
    made = child(tmp_path, "base.vmdk", parent_cid="0badf00d")
    shows(made.path, ODD.over(other.content), parent=other.path)
    refused(made.path, FileMissing, parent=str(tmp_path / "gone.vmdk"))
    mismatched = base(tmp_path / "third", content=TOP, cid="00000bad")
    refused(made.path, ContentIdMismatch, parent=mismatched.path)
    warnings = shows(made.path, ODD.over(TOP), parent=mismatched.path, ignore_cid=True)
    assert len(warnings) == 1


def test_a_parent_for_a_disk_that_has_none(tmp_path: Path) -> None:
    parent = base(tmp_path)
    image = desc.monolithic_sparse(str(tmp_path), "disk", ODD)
    warnings = shows(image.path, ODD.over(PARENT), parent=parent.path)
    assert len(warnings) == 1
    assert "has no parent by itself" in warnings[0]


def test_only_the_top_has_the_named_parent(tmp_path: Path) -> None:
    bottom = base(tmp_path)
    middle = desc.monolithic_sparse(str(tmp_path), "middle", ODD, parent=bottom)
    other = desc.monolithic_sparse(str(tmp_path), "other", WRONG, parent=bottom)
    top = desc.monolithic_sparse(str(tmp_path), "top", TOP, parent=other)
    with open_disk(top.path, parent=middle.path, ignore_cid=True) as disk:
        assert [os.path.basename(link.name) for link in disk.links] == [
            "top.vmdk",
            "middle.vmdk",
            "base.vmdk",
        ]
        reads(disk, TOP.over(ODD.over(PARENT)))


def test_the_folder_of_a_parent_is_that_of_its_own_parent(tmp_path: Path) -> None:
    """Each hint counts from its own descriptor's folder."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    bottom = desc.monolithic_flat(str(tmp_path / "a" / "b"), "base", PARENT)
    middle = desc.monolithic_sparse(str(tmp_path / "a"), "middle", ODD, parent=bottom)
    top = desc.monolithic_sparse(str(tmp_path), "top", TOP, parent=middle)
    assert b'parentFileNameHint="b/base.vmdk"' in middle.text
    shows(top)
    up = desc.monolithic_sparse(str(tmp_path / "a" / "b"), "up", TOP, parent=middle)
    assert b'parentFileNameHint="../middle.vmdk"' in up.text
    refused(up.path, TrustError)
    shows(up, allow_dirs=[tmp_path / "a"])


# When there is none


def test_a_parent_that_is_nowhere(tmp_path: Path) -> None:
    made = child(tmp_path, "gone.vmdk", parent_cid="0badf00d")
    error = refused(made.path, ParentNotFound)
    assert "gone.vmdk" in str(error)
    assert "0badf00d" in str(error)
    assert "--parent FILE" in str(error.hint)


@pytest.mark.parametrize(
    "hint", [None, "gone.vmdk", "C:\\x\\gone.vmdk", "/vmfs/volumes/x/gone.vmdk", "../x/gone.vmdk"]
)
def test_a_sibling_with_the_right_content_is_named(tmp_path: Path, hint: str | None) -> None:
    """Named, not taken: a renamed parent is for the user to confirm."""
    parent = base(tmp_path, "renamed base")
    base(tmp_path, "unrelated", WRONG, cid="00000bad")
    made = child(tmp_path, hint, parent_cid="0badf00d")
    error = refused(made.path, ParentNotFound)
    assert f"--parent {shlex.quote(parent.path)}" in str(error.hint)
    shows(made.path, ODD.over(parent.content), parent=parent.path)


def test_a_parent_without_a_hint_is_no_base(tmp_path: Path) -> None:
    """Some tools take it for a base, and show zeros for what the parent has."""
    made = child(tmp_path, None, parent_cid="0badf00d")
    refused(made.path, ParentNotFound)
    refused(made.path, ParentNotFound, ignore_cid=True)


@pytest.mark.parametrize("parent_cid", ["ffffffff", "FFFFFFFF"])
def test_a_hint_without_a_parent(tmp_path: Path, parent_cid: str) -> None:
    base(tmp_path)
    made = child(tmp_path, "base.vmdk", parent_cid=parent_cid)
    error = refused(made.path, ChainError)
    assert "parentCID" in str(error)
    assert "--ignore-cid" in str(error.hint)
    shows(made.path, ODD, ignore_cid=True)


def test_no_parent_at_all(tmp_path: Path) -> None:
    """A base may state that, or nothing."""
    image = desc.monolithic_flat(str(tmp_path), "disk", ODD)
    shows(image)
    Path(image.path).write_bytes(image.text.replace(b"parentCID=ffffffff\n", b""))
    shows(image)


def test_a_parent_that_is_there_but_not_whole(tmp_path: Path) -> None:
    """What is missing is the parent's own file, and that is what is said."""
    parent = base(tmp_path)
    os.remove(parent.files[1])
    made = child(tmp_path, "base.vmdk", parent_cid="0badf00d")
    error = refused(made.path, FileMissing)
    assert "base-flat.vmdk" in str(error)


def test_a_parent_that_is_no_disk(tmp_path: Path) -> None:
    (tmp_path / "base.vmdk").write_bytes(b"gone")
    made = child(tmp_path, "base.vmdk", parent_cid="0badf00d")
    refused(made.path, NotVmdk)


# Content IDs


@pytest.mark.parametrize(
    ("written", "expected"), [("0badf00d", "badf00d"), ("BADF00D", "0badf00d"), ("5", "00000005")]
)
def test_content_ids_are_numbers(tmp_path: Path, written: str, expected: str) -> None:
    base(tmp_path, cid=written)
    shows(child(tmp_path, "base.vmdk", parent_cid=expected).path, ODD.over(PARENT))


def test_a_parent_that_was_written_since(tmp_path: Path) -> None:
    parent = base(tmp_path)
    made = child(tmp_path, "base.vmdk", parent_cid="0badf00e")
    error = refused(made.path, ContentIdMismatch)
    assert str(error).startswith(made.path)
    assert "--ignore-cid" in str(error.hint)
    warnings = shows(made.path, ODD.over(parent.content), ignore_cid=True)
    assert len(warnings) == 1
    assert "0badf00d" in warnings[0]


def test_a_mismatch_anywhere_in_the_chain(tmp_path: Path) -> None:
    bottom = base(tmp_path)
    middle = child(tmp_path, "base.vmdk", name="middle", parent_cid="11111111")
    top = desc.monolithic_sparse(str(tmp_path), "top", TOP, parent=middle)
    error = refused(top.path, ContentIdMismatch)
    assert "middle.vmdk" in str(error)
    assert len(shows(top.path, TOP.over(ODD.over(bottom.content)), ignore_cid=True)) == 1


def test_a_parent_without_a_content_id(tmp_path: Path) -> None:
    parent = base(tmp_path)
    Path(parent.path).write_bytes(parent.text.replace(b"CID=0badf00d\nparent", b"parent"))
    made = child(tmp_path, "base.vmdk", parent_cid="0badf00d")
    assert "none" in str(refused(made.path, ContentIdMismatch))
    shows(made.path, ODD.over(PARENT), ignore_cid=True)


def test_an_extent_as_parent(tmp_path: Path) -> None:
    """A sparse file without a descriptor has no content ID to compare."""
    desc.split_sparse(str(tmp_path / ""), "base", PARENT, 8192, descriptor=None)
    os.remove(tmp_path / "base.vmdk")
    made = child(tmp_path, "base-s001.vmdk", parent_cid="0badf00d")
    refused(made.path, ContentIdMismatch)
    shows(made.path, ODD.over(PARENT), ignore_cid=True)


# Loops and depth


def test_a_disk_that_is_its_own_parent(tmp_path: Path) -> None:
    made = child(tmp_path, "child.vmdk", cid="00000077", parent_cid="00000077")
    error = refused(made.path, ChainTooDeep)
    assert "leads back" in str(error)
    made = child(tmp_path, "child.vmdk", cid="00000078", parent_cid="00000077")
    refused(made.path, ContentIdMismatch)
    refused(made.path, ChainTooDeep, ignore_cid=True)
    # Under another name it is the same file.
    os.link(made.path, tmp_path / "hard.vmdk")
    child(tmp_path, "hard.vmdk", cid="00000077", parent_cid="00000077")
    refused(made.path, ChainTooDeep)


@pytest.mark.parametrize("length", [2, 5])
def test_a_circle_of_parents(tmp_path: Path, length: int) -> None:
    for number in range(length):
        following = (number + 1) % length
        child(
            tmp_path,
            f"{following}.vmdk",
            name=str(number),
            cid=f"{number:08x}",
            parent_cid=f"{following:08x}",
        )
    refused(str(tmp_path / "0.vmdk"), ChainTooDeep)


def test_the_deepest_chain(tmp_path: Path) -> None:
    content = Content(64 * KIB)
    link = desc.monolithic_flat(str(tmp_path), "link0", content)
    for number in range(1, MAX_LINKS + 1):
        piece = Content(64 * KIB).put(number % 128 * SECTOR, bytes([number % 256]) * SECTOR)
        row = [Row("RW", "VMFSSPARSE", piece, f"link{number}-delta.vmdk")]
        link = desc.custom(str(tmp_path), f"link{number}", row, create_type="vmfsSparse", parent=link)
        if number == MAX_LINKS - 1:
            with open_disk(link.path) as disk:
                assert len(disk.links) == MAX_LINKS
                same(disk.pread(64 * KIB, 0), link.visible.read())
                runs(disk, link.visible)
    assert str(MAX_LINKS) in str(refused(link.path, ChainTooDeep))


def test_nothing_stays_open_after_a_refusal(tmp_path: Path) -> None:
    base(tmp_path)
    made = child(tmp_path, "base.vmdk", parent_cid="11111111")
    gc.collect()  # folders are let go of with the last error that knows them
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        refused(made.path, ContentIdMismatch)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# Sizes, kinds and grains


@pytest.mark.parametrize("size", [SECTOR, 2 * MIB, 3 * MIB - SECTOR, 5 * MIB + 3 * SECTOR])
def test_a_parent_of_another_size(tmp_path: Path, size: int) -> None:
    parent = desc.monolithic_sparse(str(tmp_path), "base", Content.random(size, seed=9, density=1.0))
    made = desc.monolithic_sparse(str(tmp_path), "child", ODD, parent=parent)
    warnings = shows(made)
    assert len(warnings) == 1
    assert ("larger than its parent" if size < ODD.size else "smaller than its parent") in warnings[0]


def test_zeros_behind_a_small_parent_hide_nothing_below(tmp_path: Path) -> None:
    """What lies behind the middle link's end is zeros, whatever the base has there."""
    bottom = desc.monolithic_flat(str(tmp_path), "base", Content(3 * MIB).put(0, b"b" * 3 * MIB))
    middle = desc.monolithic_sparse(
        str(tmp_path), "middle", Content(MIB).put(0, b"m" * 64 * KIB), parent=bottom
    )
    top = desc.monolithic_sparse(
        str(tmp_path), "top", Content(3 * MIB).put(2 * MIB, b"t" * SECTOR), parent=middle
    )
    with open_disk(top.path) as disk:
        assert disk.pread(MIB, 0) == b"m" * 64 * KIB + b"b" * (MIB - 64 * KIB)
        assert not any(disk.pread(MIB, MIB))
        runs(disk, top.visible)


Make = Callable[[str, str, Content, "Image | None"], Image]
KINDS: dict[str, Make] = {
    "flat": lambda folder, name, content, parent: desc.monolithic_flat(folder, name, content),
    "hosted": lambda folder, name, content, parent: desc.monolithic_sparse(
        folder, name, content, parent=parent
    ),
    "tiny grains": lambda folder, name, content, parent: desc.monolithic_sparse(
        folder, name, content, parent=parent, grain_sectors=2, gtes=64, zero_gte=True
    ),
    "large grains": lambda folder, name, content, parent: desc.monolithic_sparse(
        folder, name, content, parent=parent, grain_sectors=4096, zero_gte=True
    ),
    "split": lambda folder, name, content, parent: desc.split_sparse(
        folder, name, content, 1001, parent=parent, zero_gte=True
    ),
    "stream": lambda folder, name, content, parent: desc.stream_optimized(
        folder, name, content, parent=parent
    ),
    "cowd": lambda folder, name, content, parent: desc.vmfs_sparse(folder, name, content, parent=parent),
    "sesparse": lambda folder, name, content, parent: desc.se_sparse(
        folder, name, content, parent=parent, zero_style="mixed"
    ),
}
PAIRS = [(top, bottom) for top, bottom in itertools.product(KINDS, KINDS) if top != "flat"]


@pytest.mark.parametrize(("top", "bottom"), PAIRS)
def test_any_kind_over_any_kind(tmp_path: Path, top: str, bottom: str) -> None:
    low = KINDS[bottom](str(tmp_path), "base", PARENT, None)
    shows(KINDS[top](str(tmp_path), "child", ODD, low))


def test_a_chain_of_all_kinds(tmp_path: Path) -> None:
    """Each link of another kind, grain and size, resolved by absolute position."""
    image: Image | None = None
    for number, (kind, make) in enumerate(KINDS.items()):
        size = 3 * MIB + (number % 3 - 1) * 5 * SECTOR
        density = 1.0 if kind == "flat" else 0.1
        content = Content.random(size, seed=20 + number, density=density, grain=16 * KIB)
        if kind == "large grains":
            content.punch(0, 2 * MIB)
        image = make(str(tmp_path), kind, content, image)
    assert image is not None
    warnings = shows(image)
    assert sum("its parent" in warning for warning in warnings) == len(KINDS) - 1
    with open_disk(image.path) as disk:
        depths = {run.depth for run in disk.runs()}
        assert depths >= set(range(len(KINDS)))


@pytest.mark.parametrize("kind", ["tiny grains", "large grains", "split", "sesparse"])
def test_zeroed_grains_hide_the_parent(tmp_path: Path, kind: str) -> None:
    content = Content(4 * MIB).zero(2 * MIB, 2 * MIB)
    low = desc.monolithic_flat(str(tmp_path), "base", Content(4 * MIB).put(0, b"p" * 4 * MIB))
    made = KINDS[kind](str(tmp_path), "child", content, low)
    with open_disk(made.path) as disk:
        found = runs(disk, made.visible)
    assert [(run.kind, run.depth) for run in found] == [(Kind.DATA, 1), (Kind.ZERO, 0)]


def test_a_child_of_an_ova(tmp_path: Path) -> None:
    """Tools that change an appliance without unpacking it; the base is read inside the archive."""
    low = desc.stream_optimized(str(tmp_path), "disk", PARENT)
    made = ova.write_ova(str(tmp_path / "vm.ova"), [ova.Disk(low.path, PARENT.size)])
    top = child(tmp_path, "vm.ova", parent_cid=low.cid)
    with open_disk(top.path) as disk:
        same(disk.pread(disk.size, 0), ODD.over(PARENT).read())
    with open_disk(top.path, parent=made.path) as disk:
        same(disk.pread(disk.size, 0), ODD.over(PARENT).read())


# Trust


@pytest.mark.parametrize("hint", ["../outside/base.vmdk", "ABSOLUTE", "link.vmdk", "linked/base.vmdk"])
def test_a_parent_outside(tmp_path: Path, hint: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    parent = base(tmp_path / "outside")
    (here / "link.vmdk").symlink_to(parent.path)
    (here / "linked").symlink_to(tmp_path / "outside")
    made = child(here, parent.path if hint == "ABSOLUTE" else hint, parent_cid="0badf00d")
    error = refused(made.path, TrustError)
    assert error.errno == 1
    assert "--allow-dir" in str(error.hint)
    assert made.path in str(error)
    for options in (
        {"allow_dirs": [tmp_path / "outside"]},
        {"parent": parent.path},
    ):  # the user's word opens it
        with open_disk(made.path, **options) as disk:
            reads(disk, ODD.over(PARENT))


def test_a_parent_whose_extent_is_outside(tmp_path: Path) -> None:
    """The parent's own names are not trusted more than the child's."""
    here = tmp_path / "here"
    parent = base(here)
    (tmp_path / "secret").mkdir()
    os.rename(parent.files[1], tmp_path / "secret" / "base-flat.vmdk")
    Path(parent.path).write_bytes(parent.text.replace(b'"base-flat', b'"../secret/base-flat'))
    made = child(here, "base.vmdk", parent_cid="0badf00d")
    error = refused(made.path, TrustError)
    assert "../secret/base-flat.vmdk" in str(error)


@pytest.mark.parametrize(
    "hint", ["/dev/null", "pipe.vmdk", "sub", "/etc/passwd", "../../../../etc/passwd", "x\x01y"]
)
def test_parents_that_are_no_files(tmp_path: Path, hint: str) -> None:
    os.mkfifo(tmp_path / "pipe.vmdk")
    (tmp_path / "sub").mkdir()
    error = refused(child(tmp_path, hint, parent_cid="0badf00d").path)
    assert isinstance(error, TrustError | ParentNotFound)
    assert str(error).isprintable()


# QEMU's


@needs_qemu
@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse"])
def test_a_chain_that_qemu_makes(tmp_path: Path, subformat: str) -> None:
    def run(*words: str) -> None:
        done = subprocess.run(words, capture_output=True, check=False, timeout=60, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    size = 3 * MIB + 7 * SECTOR
    content = Content(size)
    run("qemu-img", "create", "-f", "vmdk", "-o", f"subformat={subformat}", "base.vmdk", str(size))
    run("qemu-io", "-f", "vmdk", "-c", "write -P 1 0 1M", "-c", "write -P 2 2M 70000", "base.vmdk")
    content.put(0, b"\1" * MIB).put(2 * MIB, b"\2" * 70000)
    options = ["-f", "vmdk", "-F", "vmdk", "-o", f"subformat={subformat}"]
    run("qemu-img", "create", *options, "-b", "base.vmdk", "middle.vmdk")
    run("qemu-io", "-f", "vmdk", "-c", "write -P 3 1000 5000", "middle.vmdk")
    content.put(1000, b"\3" * 5000)
    run("qemu-img", "create", *options, "-b", "./middle.vmdk", "top.vmdk", str(size + 5 * MIB))
    run("qemu-io", "-f", "vmdk", "-c", f"write -P 4 {size - 512} 2M", "top.vmdk")
    content = content.resized(size + 5 * MIB).put(size - 512, b"\4" * (2 * MIB))
    warnings = shows(str(tmp_path / "top.vmdk"), content)
    assert len(warnings) == 1
    # And after QEMU wrote to the base, which it does without asking:
    run("qemu-io", "-f", "vmdk", "-c", "write -P 9 0 512", "base.vmdk")
    refused(str(tmp_path / "top.vmdk"), ContentIdMismatch)


def test_a_damaged_entry_of_the_child_does_not_show_the_parent(tmp_path: Path) -> None:
    low = base(tmp_path)
    made = desc.monolithic_sparse(
        str(tmp_path), "child", ODD.resized(ODD.size).put(0, b"mine" * 100), parent=low
    )
    poke(made.path, made.hosted().gte_at(0), b"\x02\0\0\0")
    with open_disk(made.path) as disk:
        assert next(disk.runs()).kind is Kind.LOST
        with pytest.raises(Exception, match="table entry of grain 0"):
            disk.pread(1, 0)
