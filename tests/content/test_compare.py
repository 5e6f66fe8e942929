"""Where two disks differ: against the plainest comparison there is, and against qemu-img's."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbd_vmdk.errors import Unreadable
from nbd_vmdk.ops.compare import compare, differences
from nbd_vmdk.ops.content import Range, open_content
from nbd_vmdk.storage.local import LocalFile
from tests.content import GRAIN, KIB, KINDS, MIB, SECTOR, Content, answer, command, differing, raw_file
from tests.images import desc, poke

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Content, Content]:
    """Two disks that are much alike, perhaps of different sizes."""
    sectors = draw(st.integers(1, 1500))
    one = Content.random(
        sectors * SECTOR, draw(st.integers(0, 1000)), density=draw(st.sampled_from([0.2, 0.8]))
    )
    size = one.size if draw(st.booleans()) else draw(st.integers(1, 1500)) * SECTOR
    other = Content(size)
    for segment in one.segments(0, min(size, one.size)):
        if segment.data:
            other.put(segment.start, segment.data)
        elif draw(st.booleans()):
            other.put(segment.start, bytes(segment.end - segment.start))  # zeros written out
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, size - 1))
        length = min(draw(st.sampled_from([1, 100, SECTOR, 3 * SECTOR, GRAIN])), size - at)
        fill = draw(st.sampled_from([0, 1]))
        other.put(at, (bytes if fill == 0 else random.Random(at).randbytes)(length))
    return one, other


@quick
@given(pairs(), st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(KINDS)))
def test_ranges_are_those_that_differ(pair: tuple[Content, Content], kind: str, other_kind: str) -> None:
    one, other = pair
    with tempfile.TemporaryDirectory() as folder:
        paths = KINDS[kind](folder, "one", one), KINDS[other_kind](folder, "other", other)
        with open_content(paths[0]) as first, open_content(paths[1]) as second:
            found = compare(first, second)
            wanted = differing(one.read(), other.read())
            assert [tuple(each) for each in found.ranges] == wanted
            assert (found.count, found.length) == (len(wanted), sum(length for _, length in wanted))
            assert found.sizes == (one.size, other.size)
            assert [tuple(each) for each in differences(second, first)] == wanted


@pytest.mark.parametrize("build", [desc.monolithic_sparse, desc.stream_optimized, desc.split_flat])
def test_qemu_img_agrees(tmp_path: Path, build: Callable[..., desc.Image]) -> None:
    content = Content.random(5 * MIB, 7)
    one = KINDS["sparse"](str(tmp_path), "one", content)
    changes = [(5 * MIB, None), (5 * MIB, 0), (5 * MIB, 5 * MIB - 1), (6 * MIB, None), (6 * MIB, 6 * MIB - 1)]
    for number, (size, changed) in enumerate(changes):
        other = Content(size).pasted(0, content.segments())
        if changed is not None:
            other.put(changed, bytes([other.read(changed, 1)[0] ^ 1]))
        path = build(str(tmp_path), f"other{number}", other).path
        said = subprocess.run(["qemu-img", "compare", one, path], check=False, stdout=subprocess.DEVNULL)
        assert command("compare", one, path).returncode == said.returncode


def test_what_is_shared_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two snapshots of one base: only their own grains are read; and where one has zeros, one is read."""
    base = desc.monolithic_sparse(str(tmp_path), "base", Content.of(os.urandom(8 * MIB)))
    one = desc.monolithic_sparse(
        str(tmp_path), "one", Content(8 * MIB).put(0, b"1" * GRAIN), parent=base, cid="00000001"
    )
    other = desc.monolithic_sparse(
        str(tmp_path), "other", Content(8 * MIB).put(GRAIN, b"2" * GRAIN), parent=base, cid="00000002"
    )
    read: dict[str, int] = {}
    original = LocalFile.read_into

    def read_into(self: LocalFile, buf: memoryview, at: int) -> None:
        read[self.name] = read.get(self.name, 0) + len(buf)
        original(self, buf, at)

    with open_content(one.path) as first, open_content(other.path) as second:
        monkeypatch.setattr(LocalFile, "read_into", read_into)
        found = compare(first, second)
    assert found.ranges == (Range(0, 2 * GRAIN),)
    assert read == {one.path: GRAIN, other.path: GRAIN, base.path: 2 * GRAIN}


def test_huge_disks_of_holes_take_no_time(tmp_path: Path) -> None:
    paths = []
    for name in ("one", "other"):
        content = Content(2000 << 30).put((1000 << 30) + 5, name.encode())
        paths.append(KINDS["sparse"](str(tmp_path), name, content))
    with open_content(paths[0]) as first, open_content(paths[1]) as second:
        assert compare(first, second).ranges == (Range(1000 << 30, SECTOR),)


def test_the_first_ranges_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    one, other = Content(4 * MIB), Content(4 * MIB)
    for at in range(0, 4 * MIB, 8 * KIB):
        other.put(at, b"x")
    first, second = (raw_file(str(tmp_path), name, each) for name, each in (("a", one), ("b", other)))
    with open_content(first) as left, open_content(second) as right:
        found = compare(left, right, limit=3)
        assert found.ranges == (Range(0, SECTOR), Range(8 * KIB, SECTOR), Range(16 * KIB, SECTOR))
        assert (found.count, found.length) == (512, 512 * SECTOR)
        stopped = compare(left, right, first_only=True)
        assert stopped.ranges == (Range(0, SECTOR),)
        told: list[tuple[int, int]] = []
        compare(left, right, progress=lambda done, total: told.append((done, total)))
        assert told[-1] == (4 * MIB, 4 * MIB)
        assert told == sorted(told)


def test_sizes_that_are_no_sectors(tmp_path: Path) -> None:
    """A raw file may end anywhere; what it lacks counts as zeros."""
    short, long = tmp_path / "a.img", tmp_path / "b.img"
    short.write_bytes(b"x" * 700)
    long.write_bytes(b"x" * 700 + bytes(400) + b"y")
    with open_content(short) as first, open_content(long) as second:
        assert compare(first, second).ranges == (Range(1024, 77),)


def test_lost_bytes_are_an_error(tmp_path: Path) -> None:
    rows = [desc.Row("NOACCESS", "FLAT", Content(MIB)), desc.Row("RW", "FLAT", Content(MIB))]
    image = desc.custom(str(tmp_path), "x", rows).path
    with open_content(image) as one, open_content(image) as other, pytest.raises(Unreadable):
        compare(one, other)
    done = command("compare", "--json", image, image)
    assert done.returncode == 2
    assert answer(done)["error"]["error"] == "unreadable"


# the command line


def test_exit_codes_and_words(tmp_path: Path) -> None:
    content = Content.random(MIB, 3)
    one, same = (KINDS[kind](str(tmp_path), kind, content) for kind in ("sparse", "stream"))
    other = raw_file(str(tmp_path), "raw", Content.of(content.read()).put(5000, b"difference"))
    assert command("compare", one, same).returncode == 0
    done = command("compare", one, other)
    assert done.returncode == 1
    assert b"4608" in done.stdout
    assert b"differ in 1 range, 512 B" in done.stdout
    facts = answer(command("compare", "--json", one, other))
    assert facts["ranges"] == [{"start": 4608, "length": 512}]
    assert (facts["equal"], facts["range-count"], facts["different-bytes"]) == (False, 1, 512)
    missing = command("compare", one, str(tmp_path / "no.vmdk"))
    assert missing.returncode == 2
    assert b"no such file" in missing.stderr
    assert command("compare", one).returncode == 2


def test_different_sizes(tmp_path: Path) -> None:
    small = raw_file(str(tmp_path), "a", Content.random(MIB, 1))
    large = raw_file(str(tmp_path), "b", Content(2 * MIB).pasted(0, Content.random(MIB, 1).segments()))
    done = command("compare", small, large)
    assert done.returncode == 0
    assert b"different sizes" in done.stdout
    assert b"equal but for zeros at the end" in done.stdout
    assert command("compare", "--strict", small, large).returncode == 1
    poke(large, 2 * MIB - 1, b"!")
    assert answer(command("compare", "--json", small, large))["ranges"] == [
        {"start": 2 * MIB - 512, "length": 512}
    ]


def test_what_is_taken_as_raw(tmp_path: Path) -> None:
    """Never a file that is called a VMDK or that is known to be something else, unless it is asked for."""
    content = Content.random(MIB, 1)
    plain = raw_file(str(tmp_path), "a", content)
    misnamed = str(tmp_path / "misnamed.vmdk")
    os.link(plain, misnamed)
    assert command("compare", plain, misnamed).returncode == 2
    assert command("compare", "--raw", "b", plain, misnamed).returncode == 0
    qcow = str(tmp_path / "x.img")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow, "1M"], check=True)
    refused = command("compare", qcow, plain)
    assert refused.returncode == 2
    assert b"qcow2" in refused.stderr
    assert command("compare", "--raw", "both", qcow, qcow).returncode == 0
    image = KINDS["sparse"](str(tmp_path), "b", content)
    renamed = str(tmp_path / "renamed.img")
    os.rename(image, renamed)
    # What it holds may be a guest's doing, who must not choose which files are read.
    refused = command("compare", plain, renamed)
    assert refused.returncode == 2
    assert b"give it a name that ends in .vmdk" in refused.stderr
    assert command("compare", "--raw", "b", plain, renamed).returncode == 1


@pytest.mark.parametrize("verb", ["read", "checksum"])
def test_a_guest_can_not_name_files(tmp_path: Path, verb: str) -> None:
    """A raw disk that begins with a descriptor is no VMDK because its guest wishes so."""
    (tmp_path / "victim.raw").write_bytes(b"secret" * 1024)
    text = (
        '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        'RW 8 FLAT "victim.raw" 0\n'
    )
    guest = tmp_path / "guest.img"
    guest.write_bytes(text.encode().ljust(MIB, b"\0"))
    refused = command(verb, str(guest))
    assert refused.returncode == 1
    assert b"secret" not in refused.stdout
    assert b"add --raw" in refused.stderr
    assert command(verb, "--raw", str(guest)).returncode == 0


def test_a_descriptor_shared_by_hard_links_is_not_the_disk(tmp_path: Path) -> None:
    """As backups make them: what did not change is a link to the older one, and the extent is another."""
    folders = [tmp_path / "monday", tmp_path / "tuesday"]
    for folder in folders:
        folder.mkdir()
    path = Path(KINDS["flat"](str(folders[0]), "x", Content.random(MIB, 1)))
    for file in folders[0].iterdir():
        if file == path:
            os.link(file, folders[1] / file.name)
        else:
            (folders[1] / file.name).write_bytes(bytes(MIB))
    assert command("compare", path, folders[1] / path.name).returncode == 1
    assert command("compare", path, folders[0] / path.name).returncode == 0
