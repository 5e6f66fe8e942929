"""Guest bytes out to files and pipes, and in from them."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk import open_disk
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.ops.content import open_content
from nbd_vmdk.ops.transfer import receive, send
from tests.content import GRAIN, KINDS, MIB, ROOT, SECTOR, Content, answer, command
from tests.images import desc


@pytest.fixture
def image(tmp_path: Path) -> tuple[str, Content]:
    """A disk that can be written, and what it shows."""
    content = Content.random(3 * MIB, 4)
    return KINDS["sparse"](str(tmp_path), "x", content), content


def show(path: str) -> bytes:
    with open_disk(path) as disk:
        return disk.pread(disk.size, 0)


# out


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 3 * MIB), st.integers(0, 3 * MIB), st.sampled_from(sorted(KINDS)))
def test_any_range_in_order(first: int, second: int, kind: str) -> None:
    begin, end = sorted((first, second))
    content = Content.random(3 * MIB, 2, density=0.6)
    got, holey = bytearray(), bytearray()
    with tempfile.TemporaryDirectory() as folder, open_content(KINDS[kind](folder, "x", content)) as found:
        send(found, begin, end - begin, got.extend)
        send(found, begin, end - begin, holey.extend, lambda count: holey.extend(bytes(count)))
    assert got == holey == content.read(begin, end - begin)


def test_read_to_stdout(image: tuple[str, Content]) -> None:
    path, content = image
    assert command("read", path).stdout == content.read()
    assert command("read", path, "--offset", "3s", "--length", "1M").stdout == content.read(3 * SECTOR, MIB)
    assert command("read", path, "--offset", "3M").stdout == b""
    for words in (("--offset", "4M"), ("--offset", "2M", "--length", "2M")):
        done = command("read", path, *words)
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"outside the disk" in done.stderr
    assert (
        b"hint: --offset is behind the end of the disk (3 MiB)"
        in command("read", path, "--offset", "4M").stderr
    )
    assert command("read", path, "--offset", "x").returncode == 2
    assert command("read", path, "--json").returncode == 2


def test_a_reader_that_leaves_early(image: tuple[str, Content]) -> None:
    words = [sys.executable, "-m", "nbd_vmdk", "read", image[0]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.read(1000) == image[1].read(0, 1000)
        running.stdout.close()
        assert running.wait() == 141
        assert running.stderr.read() == b""


def test_nothing_is_sent_to_a_terminal(image: tuple[str, Content]) -> None:
    controller, terminal = pty.openpty()
    try:
        words = [sys.executable, "-m", "nbd_vmdk"]
        read = subprocess.run(
            [*words, "read", image[0]], stdout=terminal, stderr=subprocess.PIPE, cwd=ROOT, check=False
        )
        write = subprocess.run(
            [*words, "write", image[0]], stdin=terminal, stderr=subprocess.PIPE, cwd=ROOT, check=False
        )
    finally:
        os.close(controller)
        os.close(terminal)
    for done in (read, write):
        assert done.returncode == 2
        assert b"is a terminal" in done.stderr


def test_streams_that_can_not_be_used(image: tuple[str, Content]) -> None:
    words = f"{sys.executable} -m nbd_vmdk"
    for line, code, word in (
        (f"{words} write '{image[0]}' <&-", 2, b"stdin is closed"),
        (f"{words} read '{image[0]}' >&-", 2, b"stdout is closed"),
        (f"{words} read '{image[0]}' > /dev/full", 1, b"stdout: write: No space left"),
        (f"{words} write '{image[0]}' --input /", 1, b"/: read: Is a directory"),
    ):
        done = subprocess.run(line, shell=True, capture_output=True, cwd=ROOT, check=False)
        assert done.returncode == code
        assert word in done.stderr
    assert show(image[0]) == image[1].read()


def test_read_to_a_new_file(tmp_path: Path) -> None:
    content = Content(64 * MIB).put(10 * MIB, b"data").put(60 * MIB, b"more")
    path = KINDS["sparse"](str(tmp_path), "x", content)
    made = tmp_path / "out.img"
    facts = answer(command("read", path, "--output", made, "--offset", "10M", "--json"))
    assert (facts["start"], facts["length"]) == (10 * MIB, 54 * MIB)
    assert made.read_bytes() == content.read(10 * MIB, 54 * MIB)
    assert made.stat().st_blocks * 512 < MIB
    again = command("read", path, "--output", made)
    assert again.returncode == 1
    assert made.stat().st_size == 54 * MIB


def test_no_half_file_is_left(tmp_path: Path) -> None:
    rows = [desc.Row("RW", "FLAT", Content.of(os.urandom(MIB))), desc.Row("NOACCESS", "FLAT", Content(MIB))]
    path = desc.custom(str(tmp_path), "x", rows).path
    before = set(os.listdir(tmp_path))
    done = command("read", path, "--output", tmp_path / "out.img")
    assert done.returncode == 1
    assert b"can't be read" in done.stderr
    assert set(os.listdir(tmp_path)) == before


def test_a_dash_is_the_standard_stream(image: tuple[str, Content]) -> None:
    path, content = image
    assert command("read", path, "--output", "-", "--length", "1M").stdout == content.read(0, MIB)
    assert command("read", path, "--output", "-", "--json").returncode == 2
    assert command("write", path, "--input", "-", input=b"by stdin").returncode == 0
    assert show(path)[:8] == b"by stdin"
    assert not os.path.exists("-")


def test_read_to_a_named_pipe(tmp_path: Path, image: tuple[str, Content]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    assert command("read", image[0], "--output", pipe).returncode == 0
    reader.join()
    assert got == [image[1].read()]
    assert pipe.is_fifo()


# in


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, MIB), st.integers(0, MIB), st.integers(0, 99), st.sampled_from(["sparse", "flat", "split"])
)
def test_what_is_written_is_there(first: int, second: int, seed: int, kind: str) -> None:
    begin, end = sorted((first, second))
    content = Content.random(MIB, seed)
    rng = random.Random(seed)
    data = rng.randbytes(end - begin)
    left = memoryview(data)

    def read(buf: memoryview) -> int:
        nonlocal left
        count = min(len(buf), len(left), rng.randrange(1, 300_000))  # as pipes do
        buf[:count] = left[:count]
        left = left[count:]
        return count

    with tempfile.TemporaryDirectory() as folder:
        path = KINDS[kind](folder, "x", content)
        with open_disk(path, writable=True) as disk:
            assert receive(disk, begin, None, read) == len(data)
        wanted = bytearray(content.read())
        wanted[begin:end] = data
        assert show(path) == wanted
        assert not check_image(path).findings


def test_write_from_a_file_and_from_a_pipe(tmp_path: Path, image: tuple[str, Content]) -> None:
    path, content = image
    wanted = bytearray(content.read())
    source = tmp_path / "in"
    source.write_bytes(b"0123456789" * 20000)
    with open(source, "rb") as stdin:
        stdin.seek(7)
        assert command("write", path, "--offset", "100", stdin=stdin).returncode == 0
    wanted[100 : 100 + 199_993] = source.read_bytes()[7:]
    assert show(path) == wanted
    facts = answer(command("write", path, "--offset", "1M", "--json", input=b"pipe"))
    assert (facts["start"], facts["length"], facts["done"]) == (MIB, 4, "written")
    wanted[MIB : MIB + 4] = b"pipe"
    assert command("write", path, "--offset", "2M", "--length", "5", "--input", source).returncode == 0
    wanted[2 * MIB : 2 * MIB + 5] = b"01234"
    assert command("write", path, "--length", "2", input=b"pipe").returncode == 0
    wanted[:2] = b"pi"
    assert show(path) == wanted
    assert command("check", path).returncode == 0


def test_too_much_is_refused_before_anything_changes(tmp_path: Path, image: tuple[str, Content]) -> None:
    path, content = image
    before = Path(path).read_bytes()
    source = tmp_path / "in"
    source.write_bytes(b"x" * (MIB + 1))
    for words, code in (
        (("--offset", "2M", "--input", source), 1),
        (("--offset", "4M", "--input", source), 1),
        (("--length", "4M"), 1),
        (("--length", "2M", "--input", source), 2),
        (("--zero",), 2),
        (("--zero", "--trim", "--length", "1"), 2),
        (("--zero", "--offset", "2M", "--length", "2M"), 1),
        (("--input", tmp_path / "nothing"), 1),
    ):
        done = command("write", path, *words, input=b"")
        assert done.returncode == code, words
    assert Path(path).read_bytes() == before
    assert show(path) == content.read()


def test_the_image_is_no_input_for_itself(image: tuple[str, Content]) -> None:
    path, content = image
    done = command("write", path, "--input", path, "--length", "1M")
    assert done.returncode == 2
    assert b"file of the image itself" in done.stderr
    assert show(path) == content.read()


def test_a_pipe_that_is_too_long_fills_the_disk(image: tuple[str, Content]) -> None:
    path, content = image
    done = command("write", path, "--offset", "2M", input=b"y" * (MIB + 1))
    assert done.returncode == 1
    assert b"1048576 bytes were written" in done.stderr
    assert show(path) == content.read(0, 2 * MIB) + b"y" * MIB


def test_a_pipe_that_is_too_short(image: tuple[str, Content]) -> None:
    path, content = image
    done = command("write", path, "--length", "1M", "--json", input=b"abc")
    assert done.returncode == 1
    assert answer(done)["error"]["error"] == "input-too-short"
    assert show(path)[:4] == b"abc" + content.read(3, 1)


@pytest.mark.parametrize("how", ["--zero", "--trim"])
def test_zero_and_trim(image: tuple[str, Content], how: str) -> None:
    path, content = image
    wanted = bytearray(content.read())
    done = command("write", path, how, "--offset", "64K", "--length", "1M", "--json")
    assert answer(done)["length"] == MIB
    wanted[GRAIN : GRAIN + MIB] = bytes(MIB)
    assert show(path) == wanted


def test_what_can_not_be_written_is_refused(tmp_path: Path) -> None:
    content = Content.random(MIB, 1)
    stream = KINDS["stream"](str(tmp_path), "stream", content)
    base = desc.monolithic_sparse(str(tmp_path), "base", content)
    desc.monolithic_sparse(str(tmp_path), "child", Content(MIB), parent=base)
    for path, word in (
        (stream, b"hint: its warnings tell why; 'nbd-vmdk convert' makes a copy"),
        (base.path, b"parent of"),
    ):
        before = Path(path).read_bytes()
        done = command("write", path, input=b"data")
        assert done.returncode == 1
        assert word in done.stderr
        assert Path(path).read_bytes() == before
    assert command("write", base.path, "--write-parent", input=b"data").returncode == 0


def test_another_user_is_heeded(image: tuple[str, Content]) -> None:
    path, content = image
    with open_disk(path, writable=True):
        done = command("write", path, input=b"data")
        assert done.returncode == 5
        with contextlib.closing(open(path, "rb")) as file:
            assert file.read(4) == b"KDMV"
    assert show(path) == content.read()


def test_a_full_disk_says_how_far_it_came(
    image: tuple[str, Content], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An error in the middle is told with what was written before it."""
    from nbd_vmdk.cli import main
    from nbd_vmdk.disk import Disk
    from nbd_vmdk.errors import StorageError

    original: Callable[..., None] = Disk.pwrite

    def pwrite(self: Disk, buf: memoryview, offset: int, *, fua: bool = False) -> None:
        if offset >= MIB:
            raise StorageError.of(OSError(28, "No space left on device"), "x", "write")
        original(self, buf, offset, fua=fua)

    monkeypatch.setattr(Disk, "pwrite", pwrite)
    source = Path(image[0]).with_name("in")
    source.write_bytes(b"z" * 2 * MIB)
    assert main(["write", image[0], "--input", str(source)]) == 1
    said = capfd.readouterr().err
    assert "note: 1048576 bytes were written before that" in said
    assert "No space left" in said
