"""Incremental copies: full copy and increments give the disk again, however it was written in between."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbd_vmdk import VmdkError, Work, convert, open_disk
from nbd_vmdk.cli import main
from nbd_vmdk.converting.conversion import Converted
from nbd_vmdk.errors import ChainError, Difference, OptionError, StorageError, WriteRefused
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.create import create_image
from nbd_vmdk.ops.resize import resize
from nbd_vmdk.storage.local import LocalFile
from tests.convert import leftovers, qemu_raw
from tests.convert.test_nbd import nbdkit
from tests.images import desc
from tests.images.content import KIB, MIB, SECTOR, Content

VERIFY = Work(verify=True)


def link(folder: Path, number: int, kind: str, size: int, **options: Any) -> Path:
    """A new link of the disk, on the one before."""
    path = folder / f"vm-{number:06}.vmdk"
    if number:
        options["parent"] = folder / f"vm-{number - 1:06}.vmdk"
    create_image(path, None if number else size, kind=kind, **options)
    return path


def content(path: Path, **options: Any) -> bytes:
    with open_disk(path, **options) as disk:
        return disk.pread(disk.size, 0)


def written(path: Path, *writes: tuple[int, bytes]) -> None:
    with open_disk(path, writable=True) as disk:
        for offset, data in writes:
            disk.pwrite(data, offset)


class Machine:
    """A disk with a snapshot: 8 MiB, the first 2 of them data; and a folder for copies of it."""

    def __init__(self, folder: Path) -> None:
        self.vm, self.copies = folder / "vm", folder / "copies"
        self.vm.mkdir()
        self.copies.mkdir()
        self.base = link(self.vm, 0, "monolithicSparse", 8 * MIB)
        written(self.base, (0, random.Random(1).randbytes(2 * MIB)))
        self.top = link(self.vm, 1, "monolithicSparse", 8 * MIB, zeroed_grain=True)
        self.full = self.copies / "full.vmdk"
        convert(self.base, self.full)

    def increment(self, name: str = "inc.vmdk", **options: Any) -> Converted:
        return convert(
            self.top,
            self.copies / name,
            **{"since": self.base.name, "base": self.full, **options},
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


BASES = ["monolithicSparse", "monolithicFlat", "vmfs", "twoGbMaxExtentSparse"]
CHILDREN = [("monolithicSparse", False), ("monolithicSparse", True), ("vmfsSparse", False)]
INCREMENTS: list[dict[str, Any]] = [
    {},
    {"kind": "vmfsSparse"},
    {"create": {"zeroed_grain": False}},
    {"create": {"grain_size": 8 * KIB}},
]
SIZE = 2 * MIB + 5 * SECTOR

changes = st.lists(
    st.tuples(
        st.sampled_from(["write", "zeros", "zero", "trim"]),
        st.integers(0, SIZE // SECTOR - 1),
        st.sampled_from([1, 3, 128, 700]),
    ),
    max_size=5,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(BASES),
    levels=st.lists(
        st.tuples(st.sampled_from(CHILDREN), changes, st.sampled_from([0, 0, SECTOR, 300 * KIB])),
        min_size=1,
        max_size=3,
    ),
    first=changes,
    how=st.sampled_from(INCREMENTS),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_any_chain(
    tmp_path: Path, kind: str, levels: list[Any], first: Any, how: dict[str, Any], seed: int, threads: int
) -> None:
    """The disk at each of its links, from the full copy and the increments up to there."""
    vm, copies = tmp_path / "vm", tmp_path / "copies"
    for folder in (vm, copies):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    rng = random.Random(seed)
    work = Work(threads=threads)
    states, path = [], link(vm, 0, kind, SIZE)
    previous: Path | None = None
    for number, ((child, zeroed), steps, grown) in enumerate([(("", False), first, 0), *levels]):
        if number:
            path = link(vm, number, child, SIZE, zeroed_grain=zeroed)
        if grown:
            resize(path, by=grown)
        _change(path, [*steps, ("write", 7, 1)] if not number else steps, rng)
        states.append(content(path))
        copied = copies / f"{number}.vmdk"
        if previous is None:
            convert(path, copied, work=work)
            convert(path, copies / "disk.raw", work=work)
        else:
            convert(path, copied, since=1, base=previous, work=work, **how)
        assert content(copied) == states[-1]
        previous = copied
    assert qemu_raw(str(previous), copies / "q.raw") == states[-1]
    convert(path, copies / "all.vmdk", since=len(levels), base=copies / "0.vmdk", work=work, **how)
    assert content(copies / "all.vmdk") == states[-1]
    convert(path, copies / "disk.raw", since=len(levels), onto=True, work=Work(threads=threads, verify=True))
    assert (copies / "disk.raw").read_bytes() == states[-1]
    assert leftovers(copies) == []


def _change(path: Path, steps: list[tuple[str, int, int]], rng: random.Random) -> None:
    with open_disk(path, writable=True) as disk:
        for what, sector, count in steps:
            offset = sector * SECTOR
            length = min(count * SECTOR, disk.size - offset)
            if what == "write":
                disk.pwrite(rng.randbytes(length), offset)
            elif what == "zeros":
                disk.pwrite(bytes(length), offset)
            elif what == "zero":
                disk.zero(length, offset, may_trim=rng.random() < 0.5)
            else:
                disk.trim(length, offset)


def test_only_what_differs_is_in_it(machine: Machine) -> None:
    """Data and zeros that hide data, each grain once; what was written as it was before is not."""
    with open_disk(machine.top, writable=True) as disk:
        disk.pwrite(b"new", 5 * MIB)
        disk.zero(MIB, 0)
        disk.pwrite(bytes(256 * KIB), MIB)  # zeros as data
        same = disk.pread(512 * KIB, MIB + 512 * KIB)
        disk.pwrite(same, MIB + 512 * KIB)
    done = machine.increment()
    assert (done.kind, done.data) == ("monolithicSparse", 64 * KIB)
    made = machine.copies / "inc.vmdk"
    assert os.path.getsize(made) <= 256 * KIB
    assert content(made) == content(machine.top)
    assert qemu_raw(str(made), machine.copies / "q.raw") == content(machine.top)
    assert [f for f in check_image(str(made), data=True).findings if f.severity.name == "ERROR"] == []
    with open_disk(made) as disk:
        held = [(run.offset, run.length, run.kind.name) for run in disk.runs() if run.depth == 0]
    assert held == [(0, MIB + 256 * KIB, "ZERO"), (5 * MIB, 64 * KIB, "DATA")]


def test_nothing_changed(machine: Machine) -> None:
    assert machine.increment(work=VERIFY).data == 0
    assert content(machine.copies / "inc.vmdk") == content(machine.base)


def test_the_next_increment_stands_on_it(machine: Machine) -> None:
    """Each copy has its source's content ID, so the chain of copies checks itself."""
    written(machine.top, (3 * MIB, b"one"))
    machine.increment()
    later = link(machine.vm, 2, "monolithicSparse", 8 * MIB)
    written(later, (4 * MIB, b"two"))
    convert(later, machine.copies / "two.vmdk", since=machine.top.name, base=machine.copies / "inc.vmdk")
    with open_disk(machine.copies / "two.vmdk") as copied, open_disk(later) as disk:
        assert [each.cid for each in copied.links] == [each.cid for each in disk.links]
        assert copied.links[0].descriptor is not None
        assert copied.links[0].descriptor.parent_hint == "inc.vmdk"
    assert content(machine.copies / "two.vmdk") == content(later)


def rebuilt_by_qemu(machine: Machine) -> None:
    subprocess.run(["qemu-img", "convert", "-O", "vmdk", machine.base, machine.full], check=True)


def written_since(machine: Machine) -> None:
    written(machine.full, (7 * MIB, b"x"))


def never_written(machine: Machine) -> None:
    for path in (machine.full, machine.base):
        with open_disk(path) as disk:
            cid = disk.links[0].cid
        text = path.read_bytes().replace(b"CID=%08x" % cid, b"CID=fffffffe")
        path.write_bytes(text)
        machine.top.write_bytes(machine.top.read_bytes().replace(b"CID=%08x" % cid, b"CID=fffffffe"))


@pytest.mark.parametrize(
    ("change", "holds"), [(rebuilt_by_qemu, True), (written_since, False), (never_written, True)]
)
def test_a_base_that_is_not_known(
    machine: Machine, change: Callable[[Machine], None], holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused by its content ID; with --verify what comes out decides."""
    change(machine)
    written(machine.top, (3 * MIB, b"new"))
    with pytest.raises(ChainError, match="not known to hold the same") as caught:
        machine.increment()
    assert "--verify" in (caught.value.hint or "")
    if holds:
        machine.increment(work=VERIFY)
        assert content(machine.copies / "inc.vmdk") == content(machine.top)
    else:
        with pytest.raises(Difference) as found:
            machine.increment(work=VERIFY)
        assert "does not hold what" in (found.value.hint or "")
        assert sorted(os.listdir(machine.copies)) == ["full.vmdk"]


def test_content_ids_that_are_not_minded(machine: Machine) -> None:
    """A chain that does not agree with itself proves nothing, and its copies get content IDs of their own."""
    written(machine.top, (3 * MIB, b"new"))
    with open_disk(machine.base, writable=True, write_parent=True) as disk:
        disk.pwrite(b"other", 4 * MIB)
    with pytest.raises(ChainError, match="is not known"):
        machine.increment(ignore_cid=True)
    convert(machine.top, machine.copies / "all.vmdk", ignore_cid=True)
    with open_disk(machine.copies / "all.vmdk") as disk, open_disk(machine.top, ignore_cid=True) as top:
        assert disk.links[0].cid != top.links[0].cid


def test_a_base_that_was_copied_as_it_is(machine: Machine) -> None:
    shutil.copy(machine.base, machine.copies / "copy.vmdk")
    written(machine.top, (3 * MIB, b"new"))
    machine.increment(base=machine.copies / "copy.vmdk")
    assert content(machine.copies / "inc.vmdk") == content(machine.top)


@pytest.mark.parametrize("kind", ["streamOptimized", "monolithicFlat", "vmfs", "twoGbMaxExtentSparse"])
def test_a_base_of_any_kind(machine: Machine, kind: str) -> None:
    convert(machine.base, machine.copies / "b.vmdk", kind=kind)
    written(machine.top, (3 * MIB, b"new"), (100, bytes(4000)))
    done = machine.increment(base=machine.copies / "b.vmdk")
    assert done.kind == ("twoGbMaxExtentSparse" if "twoGb" in kind else "monolithicSparse")
    assert qemu_raw(str(machine.copies / "inc.vmdk"), machine.copies / "q.raw") == content(machine.top)


def test_another_folder(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    written(machine.top, (3 * MIB, b"new"))
    target = tmp_path / "far" / "inc.vmdk"
    done = convert(machine.top, target, since=1, base=machine.full, work=VERIFY)
    assert any("--allow-dir" in warning for warning in done.warnings)
    with open_disk(target, allow_dirs=(machine.copies,)) as disk:
        assert disk.links[0].descriptor is not None
        assert disk.links[0].descriptor.parent_hint == "../copies/full.vmdk"
        assert disk.pread(3, 3 * MIB) == b"new"


def test_what_is_read_is_not_replaced(machine: Machine) -> None:
    for target in (machine.full, machine.base, machine.top):
        with pytest.raises(WriteRefused, match="part of the source"):
            convert(machine.top, target, since=1, base=machine.full, work=Work(replace=True))


def test_a_disk_that_grew(tmp_path: Path) -> None:
    """Its copies grow, or shrink, with it."""
    for number, (before, after) in enumerate([(2 * MIB, 3 * MIB), (3 * MIB, 2 * MIB)]):
        old = desc.monolithic_sparse(str(tmp_path), f"a{number}", Content.random(before, 1))
        new = desc.monolithic_sparse(str(tmp_path), f"b{number}", Content.random(after, 2), parent=old)
        copied, raw = tmp_path / f"{number}.vmdk", tmp_path / f"{number}.raw"
        convert(old.path, copied)
        convert(old.path, raw)
        made = tmp_path / f"inc{number}.vmdk"
        done = convert(new.path, made, since=1, base=copied, work=VERIFY)
        assert any("differs in size" in warning for warning in done.warnings)
        assert qemu_raw(str(made), tmp_path / "q.raw") == content(Path(new.path)) == content(made)
        for _repeated in range(2):
            convert(new.path, raw, since=1, onto=True, work=VERIFY)
            assert raw.read_bytes() == content(Path(new.path))
        raw.write_bytes(bytes(MIB))
        with pytest.raises(OptionError, match="can't hold its state"):
            convert(new.path, raw, since=1, onto=True)


def test_a_target_with_another_state_does_not_grow(tmp_path: Path) -> None:
    base = link(tmp_path, 0, "monolithicSparse", MIB)
    written(base, (0, b"A" * MIB))
    top = link(tmp_path, 1, "monolithicSparse", MIB)
    resize(top, 2 * MIB)
    written(top, (0, b"B"))
    raw = tmp_path / "other.raw"
    raw.write_bytes(b"C" * MIB)
    with pytest.raises(Difference):
        convert(top, raw, since=1, onto=True, work=VERIFY)
    assert raw.read_bytes() == b"C" * MIB


def test_what_was_read_last_is_not_behind_the_end(tmp_path: Path) -> None:
    """The grown part gets what the base had elsewhere: it is written all the same."""
    base = link(tmp_path, 0, "monolithicSparse", MIB)
    written(base, (0, b"A" * MIB))
    top = link(tmp_path, 1, "monolithicSparse", MIB)
    resize(top, 2 * MIB)
    written(top, (0, b"B" * MIB + b"A" * MIB))
    convert(base, tmp_path / "full.vmdk")
    convert(top, tmp_path / "inc.vmdk", since=1, base=tmp_path / "full.vmdk", work=Work(threads=1))
    assert content(tmp_path / "inc.vmdk") == b"B" * MIB + b"A" * MIB


# In place.


def test_stopped_and_repeated(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = machine.copies / "a.raw"
    convert(machine.base, raw)
    rng = random.Random(2)
    written(machine.top, *((at * 512 * KIB, rng.randbytes(100 * KIB)) for at in range(12)))
    write, left = LocalFile.write, [4]

    def failing(self: LocalFile, buf: bytes | memoryview, at: int) -> None:
        if self.name == str(raw):
            left[0] -= 1
            if left[0] < 0:
                raise StorageError.of(OSError(5, "Input/output error"), self.name, "write")
        write(self, buf, at)

    with monkeypatch.context() as patched:
        patched.setattr(LocalFile, "write", failing)
        with pytest.raises(StorageError, match="Input/output"):
            convert(machine.top, raw, since=1, onto=True)
    assert raw.read_bytes() not in (content(machine.top), content(machine.base))
    done = convert(machine.top, raw, since=1, onto=True, work=VERIFY)
    assert raw.read_bytes() == content(machine.top)
    assert (done.kind, done.verified) == ("raw", True)
    assert done.data < 3 * MIB


def test_a_target_with_another_state_is_left_alone(machine: Machine) -> None:
    raw = machine.copies / "a.raw"
    convert(machine.base, raw)
    written(machine.top, (3 * MIB, b"new"))
    with raw.open("r+b") as file:
        file.seek(6 * MIB)
        file.write(b"other")
    before = raw.read_bytes()
    with pytest.raises(Difference, match=str(6 * MIB)) as caught:
        convert(machine.top, raw, since=1, onto=True, work=VERIFY)
    assert "nothing was written" in (caught.value.hint or "")
    assert raw.read_bytes() == before


@pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")
@pytest.mark.parametrize("filters", [[], ["--filter=blocksize-policy"]], ids=["plain", "blocks-of-4k"])
def test_onto_an_export(machine: Machine, filters: list[str]) -> None:
    """Only what changed is written, in whole blocks of the server's, on a larger export too."""
    raw, log = machine.copies / "a.raw", machine.copies / "log"
    convert(machine.base, raw)
    with raw.open("ab") as file:
        file.write(b"behind" * 1024)
        file.truncate(9 * MIB)
    grain = link(machine.vm, 2, "vmfsSparse", 8 * MIB)
    written(grain, (3 * MIB + SECTOR, b"n" * SECTOR), (5 * SECTOR, bytes(SECTOR)))
    words = ["--filter=log", *filters, "file", str(raw), f"logfile={log}"]
    if filters:
        words += ["blocksize-minimum=4k", "blocksize-preferred=4k", "blocksize-maximum=1M"]
        words += ["blocksize-error-policy=error"]
    with nbdkit(machine.copies, *words) as uri:
        convert(grain, uri, since=machine.base.name, onto=True, work=VERIFY)
    assert raw.read_bytes()[: 8 * MIB] == content(grain)
    assert raw.read_bytes()[8 * MIB :].startswith(b"behind")
    requests = log.read_text()
    assert 1 <= requests.count(" Write ") + requests.count(" Zero ") <= 3


# The command line.


def test_command(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    written(machine.top, (3 * MIB, b"new"))
    made = str(machine.copies / "inc.vmdk")
    words = ["convert", str(machine.top), made, "--since", machine.base.name, "--base", str(machine.full)]
    assert main(words) == 0
    assert "64 KiB of them data" in capsys.readouterr().out
    assert main(words) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*words, "--force", "--verify"]) == 0
    assert content(Path(made)) == content(machine.top)


@pytest.mark.parametrize(
    "words",
    [
        ["a.raw", "--since", "1"],
        ["a.vmdk", "--since", "1"],
        ["a.vmdk", "--since", "1", "--onto"],
        ["a.raw", "--since", "1", "--base", "full.vmdk"],
        ["a.ova", "--since", "1", "--base", "full.vmdk"],
        ["a.vmdk", "--base", "full.vmdk"],
        ["a.raw", "--onto"],
        ["a.vmdk", "--since", "0", "--base", "full.vmdk"],
        ["a.vmdk", "--since", "other.vmdk", "--base", "full.vmdk"],
        ["a.vmdk", "--since", "1", "--base", "full.vmdk", "--type", "streamOptimized"],
        ["a.raw", "--since", "1", "--onto", "--from", "raw"],
    ],
)
def test_what_makes_no_sense(machine: Machine, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(machine.copies)
    assert main(["convert", str(machine.top), *words]) == 2
    assert sorted(os.listdir(machine.copies)) == ["full.vmdk"]


def test_a_base_that_can_not_be_had(machine: Machine) -> None:
    with pytest.raises(VmdkError, match="no such file"):
        machine.increment(base=machine.copies / "none.vmdk")
    assert sorted(os.listdir(machine.copies)) == ["full.vmdk"]
