"""Checksums of what a guest sees, against the definition written down once more, and against other tools."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk.errors import OptionError, Unreadable
from nbd_vmdk.ops.checksum import plain_checksum, tree_checksum
from nbd_vmdk.ops.content import open_content
from tests.content import KIB, KINDS, MIB, SECTOR, Content, answer, command, raw_file
from tests.images import desc


def reference(data: bytes, algorithm: str) -> str:
    """The definition of the tree checksum, as plainly as can be."""

    def digest(piece: bytes) -> bytes:
        return hashlib.new(algorithm, piece).digest()

    blocks = [digest(data[at : at + 65536]) for at in range(0, len(data), 65536)]
    groups = [digest(b"".join(blocks[at : at + 256])) for at in range(0, len(blocks), 256)]
    return digest(len(data).to_bytes(8, "little") + b"".join(groups)).hex()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 2000),
    st.integers(0, 1000),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["sha256", "blake2b"]),
)
def test_is_as_defined(sectors: int, seed: int, kind: str, algorithm: str) -> None:
    content = Content.random(sectors * SECTOR, seed, density=0.4, grain=16 * KIB)
    with tempfile.TemporaryDirectory() as folder, open_content(KINDS[kind](folder, "x", content)) as found:
        assert tree_checksum(found, algorithm) == reference(content.read(), algorithm)
        assert plain_checksum(found, algorithm) == hashlib.new(algorithm, content.read()).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 16 * MIB - 1, 16 * MIB, 16 * MIB + 1, 33 * MIB + 12345])
@pytest.mark.parametrize("where", [(), (0,), (-1,), (0.5,), (0, -1)])
def test_edges_of_blocks_and_groups(tmp_path: Path, size: int, where: tuple[float, ...]) -> None:
    data = bytearray(size)
    for share in where if size else ():
        data[-1 if share < 0 else int(share * size)] = 7
    path = tmp_path / "x.img"
    with open(path, "wb") as file:
        file.truncate(size)
        for at in (index for index in range(0, size, 4096) if any(data[index : index + 4096])):
            file.seek(at)
            file.write(data[at : at + 4096])
    with open_content(path) as content:
        assert tree_checksum(content) == reference(bytes(data), "sha256")


def test_how_zeros_are_stored_does_not_matter(tmp_path: Path) -> None:
    content = Content.random(3 * MIB, 5)
    written = tmp_path / "full.img"
    written.write_bytes(content.read())
    with open_content(written) as full, open_content(KINDS["sparse"](str(tmp_path), "x", content)) as sparse:
        assert tree_checksum(full) == tree_checksum(sparse)


def test_a_huge_disk_takes_no_time(tmp_path: Path) -> None:
    size = 2000 << 30
    content = Content(size).put(size - 70000, b"the end")
    path = KINDS["sparse"](str(tmp_path), "x", content)

    def digest(piece: bytes) -> bytes:
        return hashlib.sha256(piece).digest()

    zeros = digest(bytes(65536))
    group = digest(zeros * 256)
    last = digest(zeros * 254 + digest(content.read(size - 131072, 65536)) + zeros)
    whole = digest(size.to_bytes(8, "little") + group * (size // (16 * MIB) - 1) + last)
    told: list[int] = []
    with open_content(path) as found:
        assert tree_checksum(found, progress=lambda done, _: told.append(done)) == whole.hex()
    assert told[-1] == size


def test_a_chain_is_one_disk(tmp_path: Path) -> None:
    base = desc.monolithic_sparse(str(tmp_path), "base", Content.random(2 * MIB, 1))
    child = desc.monolithic_sparse(str(tmp_path), "child", Content.random(2 * MIB, 2), parent=base)
    with open_content(child.path) as found:
        assert tree_checksum(found) == reference(child.visible.read(), "sha256")


def test_errors(tmp_path: Path) -> None:
    image = desc.custom(str(tmp_path), "x", [desc.Row("NOACCESS", "FLAT", Content(MIB))]).path
    with open_content(image) as content:
        for compute in (tree_checksum, plain_checksum):
            with pytest.raises(Unreadable):
                compute(content)
            with pytest.raises(OptionError):
                compute(content, "md5")
    assert command("checksum", image).returncode == 1


def test_the_command(tmp_path: Path) -> None:
    content = Content.random(MIB, 9)
    path = KINDS["stream"](str(tmp_path), "x", content)
    raw = raw_file(str(tmp_path), "y", content)
    tree = reference(content.read(), "sha256")
    assert command("checksum", path).stdout.decode() == f"tree-sha256:{tree}  {path}\n"
    facts = answer(command("checksum", "--json", "--algorithm", "blake2b", path))
    assert facts["checksum"] == reference(content.read(), "blake2b")
    assert (facts["tree"], facts["block-size"], facts["virtual-size"]) == (True, 65536, MIB)
    for tool, algorithm in (("sha256sum", "sha256"), ("b2sum", "blake2b")):
        theirs = subprocess.run([tool, raw], check=True, capture_output=True).stdout
        assert command("checksum", "--plain", "--algorithm", algorithm, raw).stdout == theirs
    assert command("checksum", "--raw", path).stdout != command("checksum", path).stdout
