"""Writing to a new streamOptimized image as an NBD client does: pieces, jitter, flushes, power cuts."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk import create_image, open_disk
from nbd_vmdk.errors import StorageError, WriteRefused
from nbd_vmdk.extents import newstream
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.opening import open_in
from nbd_vmdk.ops.check.runner import check_image
from nbd_vmdk.options import OpenOptions
from tests.convert import qemu_raw, raw_file
from tests.convert.test_stream import front_to_back
from tests.crash.states import states
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.recording import RecordingFolder

GRAIN = 64 * KIB
WRITABLE = OpenOptions(writable=True, locks=False)


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newstream, "_WINDOW", 8 * GRAIN)
    monkeypatch.setattr(newstream, "_BATCH", 2 * GRAIN)


def new_image(folder: Path, size: int, grain: int = GRAIN) -> Path:
    path = folder / "a.vmdk"
    path.unlink(missing_ok=True)
    create_image(path, size, kind="streamOptimized", grain_size=grain)
    return path


def new_folder(tmp_path: Path, size: int) -> RecordingFolder:
    """A new image in memory whose storage keeps a log."""
    new_image(tmp_path, size)
    return RecordingFolder.load(str(tmp_path))


def show(folder: RecordingFolder) -> bytes:
    with open_in(folder, "a.vmdk", OpenOptions(locks=False)) as disk:
        return disk.pread(disk.size, 0)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 6 * MIB // SECTOR),
    st.integers(0, 10_000),
    st.sampled_from([8 * KIB, GRAIN, 256 * KIB]),
    st.booleans(),
)
def test_pieces_with_jitter(
    tmp_path_factory: pytest.TempPathFactory, sectors: int, seed: int, grain: int, flush: bool
) -> None:
    """Pieces of any length, each a little before or after its turn, read back at once and at the end."""
    tmp_path = tmp_path_factory.mktemp("new")
    content = Content.random(sectors * SECTOR, seed, grain=grain)
    wanted = content.read()
    rng = random.Random(seed)
    path = new_image(tmp_path, content.size, grain)
    pieces = []
    at = 0
    while at < content.size:
        length = min(rng.choice((SECTOR, 4 * KIB, GRAIN, MIB)) * rng.randint(1, 3), content.size - at)
        pieces.append((at, length))
        at += length
    jitter = rng.choice((0, MIB))
    pieces.sort(key=lambda piece: piece[0] + rng.random() * jitter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(newstream, "_WINDOW", 8 * MIB)
        patch.setattr(newstream, "_BATCH", MIB)
        with open_disk(path, writable=True) as disk:
            model = bytearray(content.size)
            for number, (at, length) in enumerate(pieces):
                piece = wanted[at : at + length]
                if any(piece) or rng.random() < 0.5:
                    disk.pwrite(piece, at)
                else:
                    disk.zero(length, at)
                model[at : at + length] = piece
                if number % 7 == 0:
                    begin = rng.randrange(content.size)
                    count = min(rng.randrange(3 * GRAIN), content.size - begin)
                    assert disk.pread(count, begin) == model[begin : begin + count]
            if flush:
                disk.flush()
                assert path.read_bytes()[-SECTOR:] == bytes(SECTOR)
            assert disk.pread(content.size, 0) == wanted
            covered = 0
            for run in disk.runs():
                if run.kind is not Kind.PACKED:
                    assert not any(wanted[run.offset : run.offset + run.length])
                covered += run.length
            assert covered == content.size
    plain, kinds = front_to_back(path.read_bytes(), content.size)
    assert plain == wanted
    assert kinds[-3:] == ["directory", "footer", "end"]
    with open_disk(path) as disk:
        assert disk.pread(content.size, 0) == wanted
    assert check_image(path, data=True).findings == []


def test_threads(tmp_path: Path, small_window: None) -> None:
    content = Content.random(32 * MIB, 3, density=0.8)
    wanted = content.read()
    path = new_image(tmp_path, content.size)
    places = iter(range(0, content.size, GRAIN))
    taking = threading.Lock()
    with open_disk(path, writable=True) as disk:

        def work() -> None:
            while True:
                with taking:
                    at = next(places, None)
                if at is None:
                    return
                disk.pwrite(wanted[at : at + GRAIN], at)
                assert disk.pread(GRAIN, at) == wanted[at : at + GRAIN]
                if at % (40 * GRAIN) == 0:
                    disk.flush()

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with open_disk(path) as disk:
        assert disk.pread(content.size, 0) == wanted
    assert [f for f in check_image(path, data=True).findings if f.severity.name == "ERROR"] == []
    assert qemu_raw(str(path), tmp_path / "q.raw") == wanted


def test_what_left_the_window_stays(tmp_path: Path, small_window: None) -> None:
    path = new_image(tmp_path, 4 * MIB)
    with open_disk(path, writable=True) as disk:
        disk.pwrite(b"a" * SECTOR, 0)
        disk.pwrite(b"b" * SECTOR, SECTOR)  # the same grain, still in memory
        disk.flush()
        for attempt in (
            lambda: disk.pwrite(b"c" * SECTOR, 2 * SECTOR),
            lambda: disk.pwrite(b"c" * 3 * GRAIN, 0),
            lambda: disk.zero(SECTOR, 0),
            lambda: disk.zero(4 * MIB, 0),
        ):
            with pytest.raises(WriteRefused, match=r"grain 0 .*can't be changed"):
                attempt()
        disk.trim(4 * MIB, 0)
        disk.zero(3 * MIB, MIB)
        disk.pwrite(b"d" * SECTOR, MIB)
        disk.zero(SECTOR, MIB)
        assert disk.pread(4 * MIB, 0) == b"a" * SECTOR + b"b" * SECTOR + bytes(4 * MIB - 2 * SECTOR)
    with open_disk(path) as disk:
        assert [run.length for run in disk.runs() if run.kind is Kind.PACKED] == [GRAIN]
    with open_disk(path, writable=True) as disk:
        assert not disk.writable
        assert any("holds data" in warning for warning in disk.warnings)


def test_opening_changes_nothing(tmp_path: Path) -> None:
    path = new_image(tmp_path, 4 * MIB)
    before = path.read_bytes()
    with open_disk(path, writable=True) as disk:
        assert disk.writable
        disk.zero(4 * MIB, 0)
        disk.flush()
    assert path.read_bytes()[SECTOR * 21 :] == before[SECTOR * 21 :]
    with open_disk(path, writable=True) as disk:
        assert disk.writable


def test_flushes_leave_a_file_that_reads_front_to_back(tmp_path: Path, small_window: None) -> None:
    content = Content.random(40 * MIB, 8, density=0.4)
    wanted = content.read()
    path = new_image(tmp_path, content.size)
    with open_disk(path, writable=True) as disk:
        for at in range(0, content.size, 5 * MIB):
            disk.pwrite(wanted[at : at + 5 * MIB], at)
            disk.flush()
    data = path.read_bytes()
    with open_disk(path) as disk:
        assert disk.pread(content.size, 0) == wanted
    assert check_image(path, data=True).findings == []
    # Later copies of a table come behind earlier ones: only grains and the end are looked at here.
    assert data[-SECTOR:] == bytes(SECTOR)
    header = data[:SECTOR]
    assert header[56:64] == b"\xff" * 8


def test_power_cuts(tmp_path: Path, small_window: None) -> None:
    """Whatever a power cut leaves shows what was flushed last, or more."""
    folder = new_folder(tmp_path, 2 * MIB)
    rng = random.Random(1)
    flushed: list[tuple[int, bytes]] = []
    model = bytearray(2 * MIB)
    with open_in(folder, "a.vmdk", WRITABLE) as disk:
        grains = list(range(2 * MIB // GRAIN))
        for number, grain in enumerate(grains):
            data = rng.randbytes(2 * SECTOR) + bytes(GRAIN - 2 * SECTOR)
            disk.pwrite(data, grain * GRAIN)
            model[grain * GRAIN : (grain + 1) * GRAIN] = data
            if number % 9 == 5:
                disk.flush()
                flushed.append((folder.log.mark("flushed"), bytes(model)))
    folder.log.mark("closed")
    checked = 0
    for state in states(folder.log, rng, samples=3, others=20):
        last = [content for mark, content in flushed if mark < state.cut]
        if not last:
            continue  # nothing was promised yet
        found = show(RecordingFolder(state.files))
        for at in range(0, len(found), GRAIN):
            piece = found[at : at + GRAIN]
            if any(last[-1][at : at + GRAIN]):
                assert piece == last[-1][at : at + GRAIN], state
            else:
                assert piece in (bytes(GRAIN), bytes(model[at : at + GRAIN])), state
        checked += 1
    assert checked > 30


def test_no_space(tmp_path: Path, small_window: None) -> None:
    """A write that finds no space fails, and what it brought is there once there is space again."""
    folder = new_folder(tmp_path, 4 * MIB)
    content = Content.random(4 * MIB, 2, density=1).read()
    full = [False]

    def before(event: object) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")

    folder.log.before = before
    with open_in(folder, "a.vmdk", WRITABLE) as disk:
        disk.pwrite(content[: 4 * GRAIN], 0)
        full[0] = True
        with pytest.raises(StorageError, match="No space"):
            disk.pwrite(content[4 * GRAIN : 40 * GRAIN], 4 * GRAIN)
        full[0] = False
        assert disk.pread(40 * GRAIN, 0) == content[: 40 * GRAIN]
        disk.pwrite(content[40 * GRAIN :], 40 * GRAIN)
        assert disk.pread(4 * MIB, 0) == content
    assert show(folder) == content


def test_served(tmp_path: Path) -> None:
    """qemu-img, which cuts at holes of 4 KiB and has several requests under way."""
    content = Content.random(24 * MIB + 3 * SECTOR, 6, density=0.6)
    source = raw_file(tmp_path / "a.raw", content)
    path = new_image(tmp_path, content.size)
    socket = tmp_path / "sock"
    words = [sys.executable, "-m", "nbd_vmdk", "serve", str(path), "--socket", str(socket)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        uri = f"nbd+unix:///?socket={socket}"
        subprocess.run(["qemu-img", "convert", "-n", "-f", "raw", source, "-O", "raw", uri], check=True)
    finally:
        server.terminate()
        server.wait()
    plain, _kinds = front_to_back(path.read_bytes(), content.size)
    assert plain == content.read()
