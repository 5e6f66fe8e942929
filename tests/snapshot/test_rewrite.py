"""
Replacing descriptors: files of their own and embedded ones, cut short by a kill or by the loss of power.
"""

from __future__ import annotations

import os
import random
import stat
from functools import partial
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.errors import InUse, NotVmdk, VmdkError, WriteRefused
from nbd_vmdk.ondisk.descriptor import Descriptor
from nbd_vmdk.ops.rewrite import SAVED, DescriptorFile, mend_descriptor, mend_folder
from nbd_vmdk.ops.snapshot.commit import commit
from nbd_vmdk.ops.snapshot.delete import delete_link
from nbd_vmdk.ops.snapshot.rebase import rebase
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.units import SECTOR
from tests.snapshot import BASE, killed_at, make_base, make_chain, make_child, names_in, scribble, shows

KINDS = ["monolithicSparse", "monolithicFlat"]


def held(path: Path) -> DescriptorFile:
    folder, name = LocalFolder.for_image(path)
    return DescriptorFile.open(folder, name)


def comment(path: Path, text: str) -> None:
    with held(path) as file:
        file.replace(file.descriptor.set("ddb.comment", text))


def commented(path: Path) -> str | None:
    with open_disk(path) as disk:
        assert disk.links[0].descriptor is not None
        return disk.links[0].descriptor.get("ddb.comment")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_what_it_says_changes_and_nothing_else(tmp_path: Path, kind: str, mode: int) -> None:
    path = make_base(tmp_path, kind)
    scribble(path, 1)
    path.chmod(mode)
    content, names = shows(path), names_in(tmp_path)
    comment(path, "x" * 3000)
    comment(path, "short again")
    assert commented(path) == "short again"
    assert shows(path) == content
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert names_in(tmp_path) == names


def test_an_embedded_one_must_fit(tmp_path: Path) -> None:
    path = make_base(tmp_path)
    scribble(path, 1)
    before = path.read_bytes()
    with pytest.raises(WriteRefused, match="there is room for 10239"):
        comment(path, "x" * 10_000)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == {BASE}


@pytest.mark.parametrize("kind", KINDS)
def test_it_stays_locked(tmp_path: Path, kind: str) -> None:
    path = make_base(tmp_path, kind)
    with held(path) as file:
        for text in ("one", "two"):
            file.replace(file.descriptor.set("ddb.comment", text))
            with pytest.raises(InUse):
                held(path)
    assert commented(path) == "two"
    with open_disk(path, writable=True), pytest.raises(InUse):
        held(path)


def test_a_symbolic_link_is_not_replaced(tmp_path: Path) -> None:
    """By a link's name the file that it leads to is changed."""
    (tmp_path / "real").mkdir()
    path = make_base(tmp_path / "real", "monolithicFlat")
    link = tmp_path / "link.vmdk"
    link.symlink_to(path)
    comment(link, "by a link")
    assert link.is_symlink()
    assert commented(path) == "by a link"


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_step(quick_path: Path, kind: str) -> None:
    path = make_base(quick_path, kind)
    scribble(path, 1)
    content = shows(path)
    comment(path, "old")
    step = 0
    while killed_at(step, partial(comment, path, "new")):
        assert commented(path) in ("old", "new")
        mend_folder(LocalFolder.for_image(path)[0])
        comment(path, "another")
        comment(path, "old")
        assert commented(path) == "old"
        assert not any(name.startswith(".") or SAVED in name for name in names_in(quick_path))
        step += 1
    assert step > 3
    assert commented(path) == "new"
    assert shows(path) == content


def test_power_lost_while_sectors_were_written(quick_path: Path) -> None:
    """Any of the sectors may be the old or the new ones; what comes out is one whole text."""
    path = make_base(quick_path)
    scribble(path, 1)
    content = shows(path)
    folder, name = LocalFolder.for_image(path)
    comment(path, "long " * 400)
    old = path.read_bytes()
    comment(path, "n")
    new = path.read_bytes()
    old_text, new_text = (Descriptor.parse(data[SECTOR : 21 * SECTOR], "") for data in (old, new))
    saved = _saved(path, new_text)
    rng = random.Random(5)
    seen = set()
    for _ in range(40):
        torn = bytearray(old)
        for sector in range(1, 21):
            if rng.random() < 0.5:
                at = sector * SECTOR
                torn[at : at + SECTOR] = new[at : at + SECTOR]
        path.write_bytes(torn)
        (quick_path / (name + SAVED)).write_bytes(saved)
        assert mend_descriptor(folder, name)
        assert commented(path) in ("long " * 400, "n")
        assert shows(path) == content
        seen.add(commented(path))
        assert names_in(quick_path) == {BASE}
    path.write_bytes(new)
    (quick_path / (name + SAVED)).write_bytes(saved)
    assert mend_descriptor(folder, name)
    assert commented(path) == "n"
    assert old_text.get("ddb.comment") in seen


def _saved(path: Path, new: Descriptor) -> bytes:
    """The file that is beside while ``path`` is overwritten, caught in the act."""
    caught = []
    unlink = os.unlink

    def keep(name: str) -> None:
        if name.endswith(SAVED) and os.path.exists(name):
            caught.append(Path(name).read_bytes())
        unlink(name)

    comment(path, "long " * 400)
    with pytest.MonkeyPatch.context() as patch, held(path) as file:
        patch.setattr(os, "unlink", keep)
        file.replace(file.descriptor.set("ddb.comment", "n"))
        assert file.descriptor.to_bytes() == new.to_bytes()
    assert len(caught) == 1
    return caught[0]


def test_a_torn_grandchild_is_not_forgotten(tmp_path: Path) -> None:
    """A power cut came while it was pointed to its new parent: its text is mended before any link goes."""
    base, middle, top = make_chain(tmp_path)
    expected = shows(top)
    text = top.read_bytes()[SECTOR : 21 * SECTOR].rstrip(b"\0")
    torn = top.read_bytes()
    top.write_bytes(torn[:SECTOR] + b"\xff" * SECTOR + torn[2 * SECTOR :])
    (tmp_path / (top.name + SAVED)).write_bytes(
        text + b"\n# replaced by the text with the SHA-256 " + b"0" * 64 + b"\n"
    )
    with pytest.raises(VmdkError):
        shows(top)
    commit(middle)
    assert shows(top) == expected
    assert names_in(tmp_path) == {base.name, top.name}


def test_a_saved_text_that_is_none_of_ours(tmp_path: Path) -> None:
    path = make_base(tmp_path)
    comment(path, "kept")
    folder, name = LocalFolder.for_image(path)
    (tmp_path / (name + SAVED)).write_bytes(
        b"no descriptor\n# replaced by the text with the SHA-256 " + b"0" * 64 + b"\n"
    )
    with pytest.raises(NotVmdk):
        mend_descriptor(folder, name)
    assert commented(path) == "kept"
    # Never completed, so nothing can have been overwritten.
    (tmp_path / (name + SAVED)).write_bytes(b"# Disk Descr")
    assert mend_descriptor(folder, name)
    assert commented(path) == "kept"
    assert names_in(tmp_path) == {BASE}
    assert not mend_descriptor(folder, name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_descriptor_beside_is_its_owners(tmp_path: Path, kind: str) -> None:
    """Users call one so; it is no saved text of ours, and neither removed nor in the way."""
    path = make_base(tmp_path, kind)
    child = make_child(path)
    beside = [Path(f"{each}.descriptor") for each in (path, child)]
    for copy in beside:
        copy.write_text("by hand")
    rebase(child, path)
    delete_link(child, apply=True)
    assert [copy.read_text() for copy in beside] == ["by hand"] * 2
