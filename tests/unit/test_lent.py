"""Files that are lent a descriptor: the same bytes as from an open file, or an error, however they change."""

import errno
import gc
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from nbd_vmdk.errors import FileChanged, FileMissing, InUse, StorageError, TrustError
from nbd_vmdk.storage import localfolder
from nbd_vmdk.storage.lent import LentFile, Pool, must_lend
from nbd_vmdk.storage.local import LocalFile
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.storage.window import Window, local_file
from nbd_vmdk.units import KIB, MIB

DATA = random.Random(5).randbytes(8 * KIB)

Lend = Callable[[Path], LentFile]


@pytest.fixture
def pool() -> Pool:
    return Pool(1)


@pytest.fixture
def lend(pool: Pool) -> Iterator[Lend]:
    """Opens a file, and lends it a descriptor of the pool."""
    lent = []

    def made(path: Path) -> LentFile:
        lent.append(LentFile(_open(path), lambda: _open(path), pool))
        return lent[-1]

    yield made
    for each in lent:
        each.close()


@pytest.fixture
def other(lend: Lend, tmp_path: Path) -> LentFile:
    """Another file; reading it takes the only descriptor of the pool."""
    (tmp_path / "other").write_bytes(bytes(KIB))
    return lend(tmp_path / "other")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk-s001.vmdk"
    made.write_bytes(DATA)
    # A change must not fall into the same tick of the clock.
    os.utime(made, ns=(0, 1_000_000_000))
    return made


def _open(path: Path, *, writable: bool = False) -> LocalFile:
    try:
        fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    except FileNotFoundError as error:
        raise FileMissing(str(path)) from error
    return LocalFile(fd, path.name, writable=writable)


def is_open(path: Path) -> bool:
    return str(path) in map(_target, os.listdir("/proc/self/fd"))


def open_in(folder: Path) -> int:
    return sum(_target(fd).startswith(f"{folder}/") for fd in os.listdir("/proc/self/fd"))


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_the_pool_is_all_that_is_open(lend: Lend, other: LentFile, path: Path) -> None:
    lent = lend(path)
    for _ in range(3):
        assert lent.read(0, len(DATA)) == DATA
        assert is_open(path)
        assert other.read(0, KIB) == bytes(KIB)
        assert not is_open(path)
    assert lent.size == len(DATA)
    assert lent.identity == (os.stat(path).st_dev, os.stat(path).st_ino)
    assert not is_open(path)
    assert lent.allocated == os.stat(path).st_blocks * 512
    lent.close()
    assert not is_open(path)
    with pytest.raises(StorageError, match=os.strerror(errno.EBADF)):
        lent.read(0, 1)
    assert not is_open(path)
    lent.close()


def test_what_was_used_last_stays_open(tmp_path: Path) -> None:
    pool, paths = Pool(2), [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"x")
    one, two, three = (LentFile(_open(path), lambda path=path: _open(path), pool) for path in paths)
    for each in (one, two, one, three):
        assert each.read(0, 1) == b"x"
    assert [is_open(path) for path in paths] == [True, False, True]
    for each in (one, two, three):
        each.close()


def test_nobody_gets_its_descriptor(lend: Lend, path: Path) -> None:
    lent = lend(path)
    assert local_file(lent) is None
    assert local_file(Window(lent, 0, 512, "window")) is None
    assert not lent.writable


def test_what_is_in_use_stays_open(lend: Lend, other: LentFile, path: Path, pool: Pool) -> None:
    """Who needs a descriptor waits until one is given back."""
    lent = lend(path)
    with ThreadPoolExecutor(4) as threads:
        with pool.borrow(lent) as file:
            waiting = [threads.submit(other.read, 0, KIB) for _ in range(3)]
            time.sleep(0.05)
            assert not any(each.done() for each in waiting)
            assert lent.read(0, len(DATA)) == DATA  # who needs the same file does not wait
            assert os.pread(file.fd, len(DATA), 0) == DATA
        assert [each.result(timeout=10) for each in waiting] == [bytes(KIB)] * 3


def test_pieces_are_told_with_the_file_in_nobodys_hands(lend: Lend, other: LentFile, tmp_path: Path) -> None:
    path = tmp_path / "holes"
    with open(path, "wb") as file:
        file.truncate(8 * MIB)
        for at in (MIB, 3 * MIB, 5 * MIB):
            file.seek(at)
            file.write(b"x" * MIB)
    with closing(_open(path)) as local:
        expected = list(local.segments(0, 9 * MIB))
    found = []
    for each in lend(path).segments(0, 9 * MIB):
        found.append(each)
        assert other.read(0, 1) == b"\0"
    assert found == expected
    assert len(found) > 5


def test_many_threads_read_many_files_by_three_descriptors(tmp_path: Path) -> None:
    """Each reads what is in the file that it asks, and never are more than three open."""
    pool = Pool(3)
    opened = []
    lock = threading.Lock()

    class Counted(LocalFile):
        now = most = 0

        def __init__(self, path: Path) -> None:
            with lock:
                Counted.now += 1
                Counted.most = max(Counted.most, Counted.now)
            super().__init__(os.open(path, os.O_RDONLY), path.name, writable=False)
            opened.append(path)

        def close(self) -> None:
            super().close()
            with lock:
                Counted.now -= 1

    files = []
    for number in range(12):
        path = tmp_path / f"f{number}"
        path.write_bytes(bytes([number]) * 64 * KIB)
        files.append(LentFile(Counted(path), lambda path=path: Counted(path), pool))

    def read(seed: int) -> None:
        rng = random.Random(seed)
        buf = bytearray(512)
        for _ in range(400):
            number = rng.randrange(len(files))
            at = rng.randrange(64 * KIB - 511)
            match rng.randrange(8):
                case 0:
                    assert sum(count for count, _ in files[number].segments(at, 512)) == 512
                case 1:
                    assert files[number].read(at, 512) == bytes([number]) * 512
                case _:
                    files[number].read_into(memoryview(buf), at)
                    assert buf == bytes([number]) * 512

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(read, range(8)))
    assert len(opened) > 500
    assert Counted.most <= 4  # the first opening of each is before the pool makes room for it
    for each in files:
        each.close()
    assert Counted.now == 0


# Files that change


def test_a_file_that_was_replaced(lend: Lend, other: LentFile, path: Path) -> None:
    lent = lend(path)
    assert lent.lock(writable=False) is None
    other.read(0, 1)
    path.rename(path.with_suffix(".old"))
    path.write_bytes(DATA)
    with pytest.raises(FileChanged, match="another file has taken its place") as caught:
        lent.read(0, 512)
    assert caught.value.file == path.name
    assert not is_open(path)
    path.with_suffix(".old").rename(path)
    assert lent.read(0, len(DATA)) == DATA


@pytest.mark.parametrize("size", [0, 512, len(DATA) - 1, len(DATA) + 1])
def test_a_file_with_another_size(lend: Lend, other: LentFile, path: Path, size: int) -> None:
    lent = lend(path)
    other.read(0, 1)
    os.truncate(path, size)
    for _ in range(2):
        with pytest.raises(FileChanged, match=rf"it has {size} bytes now, and had {len(DATA)}"):
            lent.read_into(memoryview(bytearray(512)), 0)
    with pytest.raises(FileChanged):
        list(lent.segments(0, 512))
    lent.advise(0, 512)


def test_a_file_that_was_written_to(lend: Lend, other: LentFile, path: Path) -> None:
    """Also a new file that got the old one's inode, which can't be told from it otherwise."""
    lent = lend(path)
    other.read(0, 1)
    with open(path, "r+b") as file:
        file.write(b"new")
    with pytest.raises(FileChanged, match="it has been written to"):
        lent.read(0, 512)


def test_a_file_that_is_gone(lend: Lend, other: LentFile, path: Path) -> None:
    lent = lend(path)
    assert lent.read(0, 3) == DATA[:3]
    path.unlink()
    assert lent.read(0, 3) == DATA[:3]  # it is still open
    other.read(0, 1)
    with pytest.raises(FileMissing) as caught:
        lent.read(0, 3)
    assert "put it back" in (caught.value.hint or "")


def test_a_link_in_the_place_of_the_file(
    path: Path, other: LentFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened again through the gate."""
    monkeypatch.setattr(localfolder, "must_lend", lambda fd, extent: True)
    inside = path.parent / "vm"
    inside.mkdir()
    (inside / "disk.vmdk").write_bytes(DATA)
    lent = LocalFolder.for_image(inside / "disk.vmdk")[0].open("disk.vmdk")
    assert isinstance(lent, LentFile)
    lent._pool.drop(lent)
    lent._pool = other._pool
    assert lent.read(0, 9) == DATA[:9]
    other.read(0, 1)
    (inside / "disk.vmdk").unlink()
    (inside / "disk.vmdk").symlink_to(path)
    with pytest.raises(TrustError):
        lent.read(0, 9)


# Locks


def test_a_writer_is_kept_away_while_the_file_is_open(lend: Lend, other: LentFile, path: Path) -> None:
    lent = lend(path)
    assert lent.lock(writable=False) is None
    for _ in range(2):
        with closing(_open(path, writable=True)) as writer, pytest.raises(InUse, match="reading it"):
            writer.lock(writable=True)
        other.read(0, 1)
        lent.read(0, 1)


def test_a_writer_that_comes_while_it_is_closed(lend: Lend, other: LentFile, path: Path) -> None:
    lent = lend(path)
    assert lent.lock(writable=False) is None
    other.read(0, 1)
    with closing(_open(path, writable=True)) as writer:
        writer.lock(writable=True)
        with pytest.raises(InUse, match="writing it"):
            lent.read(0, 1)
        assert not lent._pool._held.get(lent)
    assert lent.read(0, len(DATA)) == DATA  # nothing was written
    other.read(0, 1)
    with closing(_open(path, writable=True)) as writer:
        writer.lock(writable=True)
        writer.write(b"new", 0)
    with pytest.raises(FileChanged):
        lent.read(0, 1)


@pytest.mark.parametrize("how", ["lock", "writer"])
def test_a_writer_that_was_there_from_the_start(lend: Lend, other: LentFile, path: Path, how: str) -> None:
    """Who was told of it, or asked for it, reads what is there, as from any other file."""
    with closing(_open(path, writable=True)) as writer:
        writer.lock(writable=True)
        lent = lend(path)
        other.read(0, 1)
        writer.write(b"one", 0)  # between opening and locking
        assert "writing it" in ((lent.lock(writable=False) if how == "lock" else lent.writer()) or "")
        assert lent.read(0, 3) == b"one"
        other.read(0, 1)
        writer.write(b"two", 0)
        assert lent.read(0, 3) == b"two"


# How many


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_last_descriptors_are_kept_free(limit: Callable[[int], None]) -> None:
    """From which on an extent is lent, and from which on the file that a disk is named by."""
    for most, extent, named in [(100, 50, 75), (512, 256, 384), (1024, 768, 896), (4096, 3840, 3968)]:
        limit(most)
        for fd in range(most):
            assert must_lend(fd, extent=True) is (fd >= extent)
            assert must_lend(fd, extent=False) is (fd >= named)


def test_what_fits_stays_open(tmp_path: Path, limit: Callable[[int], None]) -> None:
    for number in range(300):
        (tmp_path / f"f{number}").write_bytes(b"%03d" % number)
    folder, _ = LocalFolder.for_image(tmp_path / "f0")
    gc.collect()  # what earlier tests left would be closed in between
    taken = len(os.listdir("/proc/self/fd"))
    limit(256)
    files = [folder.open(f"f{number}", extent=number < 200) for number in range(300)]
    try:
        kinds = [type(file) for file in files]
        extents, named = kinds[:200].count(LocalFile), kinds[200:].count(LocalFile)
        assert 128 - taken - 2 <= extents <= 128
        assert kinds[:200] == [LocalFile] * extents + [LentFile] * (200 - extents)
        assert 48 <= named <= 64
        assert kinds[200:248] == [LocalFile] * 48
        assert open_in(tmp_path) == extents + named + 16
        for number in random.Random(1).sample(range(300), 300):
            assert files[number].read(0, 3) == b"%03d" % number
        assert open_in(tmp_path) == extents + named + 16
        with closing(folder.open("f7", writable=True, extent=True)) as written:
            assert type(written) is LocalFile
    finally:
        for file in files:
            file.close()


def test_others_took_more_than_they_were_left(tmp_path: Path, limit: Callable[[int], None]) -> None:
    """With one descriptor, which no other lent file is using, it goes on; without one it says why not."""
    for number in range(40):
        (tmp_path / f"f{number}").write_bytes(b"%03d" % number)
    pool = Pool(10)
    paths = [tmp_path / f"f{number}" for number in range(40)]

    def again(path: Path) -> LocalFile:
        try:
            return _open(path)
        except OSError as error:
            raise StorageError.of(error, path.name, "open") from error

    files = [LentFile(_open(path), lambda path=path: again(path), pool) for path in paths]
    limit(128)
    with ExitStack() as taken:
        for _ in range(9):
            assert pool._close_one()
        _take_all(taken)
        for number, file in enumerate(files):
            assert file.read(0, 3) == b"%03d" % number
        with pool.borrow(files[0]):
            while pool._close_one():
                pass
            _take_all(taken)
            with pytest.raises(StorageError, match="Too many open files") as caught:
                files[1].read(0, 3)
            assert "ulimit -n" in (caught.value.hint or "")
    for file in files:
        file.close()


def _take_all(taken: ExitStack) -> None:
    """Open as many files as may be open."""
    try:
        while True:
            taken.callback(os.close, os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
