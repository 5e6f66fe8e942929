"""One suite for all storages: what base.py promises holds wherever the bytes live."""

import errno
import gzip
import io
import os
import random
import resource
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from nbd_vmdk import create_image, open_disk
from nbd_vmdk.errors import StorageError, Truncated, WriteRefused
from nbd_vmdk.storage import local
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.joined import Joined
from nbd_vmdk.storage.lent import LentFile, Pool
from nbd_vmdk.storage.local import LocalFile, raise_file_limit
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.storage.tar import tar_in
from nbd_vmdk.storage.window import Window
from nbd_vmdk.units import KIB, MIB
from nbd_vmdk.vm.gunzipped import Gunzipped, Points
from tests.memory import MemoryStorage

Make = Callable[..., Storage]


_opened: list[Storage] = []


def local_file(path: Path, data: bytes = b"", *, writable: bool = True) -> LocalFile:
    path.write_bytes(data)
    made = LocalFile(os.open(path, os.O_RDWR if writable else os.O_RDONLY), str(path), writable=writable)
    _opened.append(made)
    return made


@pytest.fixture(autouse=True)
def _closed_at_the_end() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


def _local(tmp_path: Path) -> Make:
    return lambda data, writable=True: local_file(tmp_path / "file", data, writable=writable)


def _memory(tmp_path: Path) -> Make:
    return lambda data, writable=True: MemoryStorage(data, writable=writable)


def _window(tmp_path: Path) -> Make:
    def make(data: bytes) -> Storage:
        around = local_file(tmp_path / "around", b"\xaa" * 700 + data + b"\xbb" * 900, writable=False)
        return Window(around, 700, len(data), "window")

    return make


def _member(tmp_path: Path) -> Make:
    def make(data: bytes) -> Storage:
        with tarfile.open(tmp_path / "tar", "w") as archive:
            info = tarfile.TarInfo("disk.vmdk")
            info.size = len(data)
            archive.addfile(tarfile.TarInfo("before"), io.BytesIO())
            archive.addfile(info, io.BytesIO(data))
        member = tar_in(*LocalFolder.for_image(tmp_path / "tar")).open("disk.vmdk")
        _opened.append(member)
        return member

    return make


def _joined(tmp_path: Path) -> Make:
    def make(data: bytes) -> Storage:
        cuts = [0, 0, 1, 512, 65_537, len(data), len(data)]
        pieces = [data[start:end] for start, end in pairwise(cuts)]
        return Joined([MemoryStorage(piece, writable=False) for piece in pieces], "joined")

    return make


def _gunzipped(tmp_path: Path) -> Make:
    def make(data: bytes) -> Storage:
        packed = gzip.compress(data[:70_000]) + gzip.compress(data[70_000:])
        return Gunzipped(local_file(tmp_path / "packed.gz", packed, writable=False), Points(1 << 30))

    return make


def _lent(tmp_path: Path) -> Make:
    def make(data: bytes) -> Storage:
        first = local_file(tmp_path / "lent", data, writable=False)

        def again() -> LocalFile:
            return LocalFile(os.open(tmp_path / "lent", os.O_RDONLY), "lent", writable=False)

        pool = Pool(1)
        _opened.append(LentFile(again(), again, pool))
        lent = LentFile(first, again, pool)
        _opened.append(lent)
        pool.drop(lent)
        return lent

    return make


READABLE = {
    "local": _local,
    "lent": _lent,
    "memory": _memory,
    "window": _window,
    "tar": _member,
    "joined": _joined,
    "gzip": _gunzipped,
}


@pytest.fixture(params=READABLE.values(), ids=READABLE)
def readable(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """A way to make a storage that holds the given bytes."""
    return request.param(tmp_path)


@pytest.fixture(params=[_local, _memory], ids=["local", "memory"])
def writable(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    return request.param(tmp_path)


@pytest.fixture(params=["fallocate", "fallback"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalFile:
    """A local file of 3 MiB of ones; once as the file system is, once as if it could not zero or punch."""
    if request.param == "fallback":
        monkeypatch.setattr(local, "_libc_fallocate", lambda: refuse(errno.EOPNOTSUPP))
    return local_file(tmp_path / "file", b"\1" * (3 * MIB))


def refuse(number: int) -> Callable[..., int]:
    def fallocate(*_: int) -> int:
        local.ctypes.set_errno(number)
        return -1

    return fallocate


def fill(storage: Storage, at: int, length: int) -> bytes:
    buf = bytearray(length)
    storage.read_into(memoryview(buf), at)
    return bytes(buf)


DATA = random.Random(7).randbytes(100_000)


# Reading


@pytest.mark.parametrize(("at", "length"), [(0, 100_000), (0, 1), (99_999, 1), (511, 4098), (65_536, 34_464)])
def test_reads_what_is_there(readable: Make, at: int, length: int) -> None:
    storage = readable(DATA)
    assert fill(storage, at, length) == DATA[at : at + length]
    assert storage.read(at, length) == DATA[at : at + length]
    assert storage.size == len(DATA)


@pytest.mark.parametrize(
    ("at", "length"), [(0, 100_001), (99_999, 2), (100_000, 1), (1 << 40, 1), (1 << 70, 1)]
)
def test_a_read_past_the_end_is_an_error(readable: Make, at: int, length: int) -> None:
    storage = readable(DATA)
    with pytest.raises(Truncated) as caught:
        fill(storage, at, length)
    assert caught.value.fields["need"] == at + length
    assert caught.value.fields["have"] == len(DATA)
    with pytest.raises(Truncated):
        storage.read(at, length)


def test_a_huge_read_asks_for_no_memory(readable: Make) -> None:
    with pytest.raises(Truncated):
        readable(DATA).read(0, 1 << 62)


def test_zero_length_calls_do_nothing(readable: Make) -> None:
    storage = readable(DATA)
    assert storage.read(5, 0) == b""
    assert storage.read(len(DATA), 0) == b""
    assert fill(storage, len(DATA) + 5, 0) == b""
    assert list(storage.segments(5, 0)) == []
    storage.advise(5, 0)


def test_reads_into_part_of_a_buffer_and_wide_items(readable: Make) -> None:
    storage = readable(DATA)
    buf = bytearray(b"\xee" * 64)
    storage.read_into(memoryview(buf)[8:24], 1000)
    assert buf == b"\xee" * 8 + DATA[1000:1016] + b"\xee" * 40
    storage.read_into(memoryview(buf).cast("I"), 3)
    assert buf == DATA[3:67]


def test_no_buffer_is_kept(readable: Make) -> None:
    buf = bytearray(16)
    readable(DATA).read_into(memoryview(buf), 0)
    buf.clear()  # BufferError if somebody still looked at it


def test_segments_cover_a_range_and_hide_no_data(readable: Make) -> None:
    data = b"\0" * 131_072 + DATA[:65_536] + b"\0" * 131_072
    storage = readable(data)
    for at, length in [(0, len(data)), (1000, 200_000), (140_000, 10), (len(data) - 5, 5)]:
        position = at
        for size, is_data in storage.segments(at, length):
            assert size > 0
            assert is_data or not any(data[position : position + size])
            position += size
        assert position == at + length


def test_segments_know_nothing_of_what_lies_beyond_the_end(readable: Make) -> None:
    storage = readable(DATA)
    assert list(storage.segments(len(DATA), 10)) == [(10, True)]
    assert sum(size for size, _ in storage.segments(len(DATA) - 4, 10)) == 10
    assert list(storage.segments(1 << 70, 10)) == [(10, True)]


def test_threads_share_a_storage(readable: Make) -> None:
    storage = readable(DATA)

    def reads(seed: int) -> bool:
        place = random.Random(seed)
        for _ in range(200):
            at = place.randrange(len(DATA) - 600)
            list(storage.segments(at, 600))  # moves the file position under everybody's feet
            if fill(storage, at, 600) != DATA[at : at + 600]:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(reads, range(8)))


def test_identity_tells_storages_apart(readable: Make, tmp_path: Path) -> None:
    storage = readable(DATA)
    assert storage.identity == storage.identity
    assert storage.identity != local_file(tmp_path / "other").identity
    assert storage.identity != MemoryStorage().identity


def test_closing_twice_is_harmless(readable: Make) -> None:
    storage = readable(DATA)
    storage.close()
    storage.close()


def test_reading_only_refuses_every_change(readable: Make, tmp_path: Path) -> None:
    storages = [Window(readable(DATA), 0, 5, "window"), MemoryStorage(DATA, writable=False)]
    storages.append(local_file(tmp_path / "other", DATA, writable=False))
    for storage in storages:
        assert not storage.writable
        for change in (
            lambda s=storage: s.write(b"x", 0),
            lambda s=storage: s.zero(0, 1),
            lambda s=storage: s.punch(0, 1),
            lambda s=storage: s.truncate(0),
            lambda s=storage: s.sync(),
        ):
            with pytest.raises(WriteRefused):
                change()


# Writing


def test_writes_and_grows(writable: Make) -> None:
    storage = writable(DATA)
    storage.write(b"abc", 10)
    storage.write(bytearray(b"def"), 13)
    storage.write(memoryview(b"xghix")[1:4], 16)
    storage.write(b"end", 100_100)
    assert storage.read(9, 11) == DATA[9:10] + b"abcdefghi" + DATA[19:20]
    assert storage.size == 100_103
    assert storage.read(100_000, 103) == bytes(100) + b"end"
    storage.write(b"", 200_000)
    assert storage.size == 100_103
    storage.sync()


def test_writes_wide_items(writable: Make) -> None:
    storage = writable(b"")
    storage.write(memoryview(DATA[:4000]).cast("Q"), 0)
    assert storage.read(0, 4000) == DATA[:4000]


def test_truncate_cuts_and_fills_with_zeros(writable: Make) -> None:
    storage = writable(DATA)
    storage.truncate(10)
    storage.truncate(20)
    assert storage.size == 20
    assert storage.read(0, 20) == DATA[:10] + bytes(10)


@pytest.mark.parametrize("method", ["zero", "punch"])
@pytest.mark.parametrize(("at", "length"), [(0, 100_000), (4096, 8192), (1, 99_998), (5, 0), (99_990, 500)])
def test_zeroing_leaves_the_rest_and_the_size(writable: Make, method: str, at: int, length: int) -> None:
    storage = writable(DATA)
    getattr(storage, method)(at, length)
    end = min(at + length, len(DATA))
    assert storage.read(0, len(DATA)) == DATA[:at] + bytes(end - at) + DATA[end:]
    assert storage.size == len(DATA)


@pytest.mark.parametrize("method", ["zero", "punch"])
def test_zeroing_beyond_the_end_does_nothing(writable: Make, method: str) -> None:
    storage = writable(DATA)
    getattr(storage, method)(len(DATA) + 10, 1 << 40)
    assert storage.size == len(DATA)


def test_threads_write_side_by_side(writable: Make) -> None:
    storage = writable(b"")

    def writes(number: int) -> None:
        for turn in range(50):
            storage.write(bytes([number]) * 100, (turn * 8 + number) * 100)

    threads = [threading.Thread(target=writes, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.read(0, storage.size) == b"".join(bytes([n]) * 100 for n in range(8)) * 50


# What only a file has


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = local_file(tmp_path / "file", DATA)
    calls = []

    def short(fd: int, buffers: list[memoryview], at: int) -> int:
        calls.append(at)
        data = os.pread(fd, min(7, len(buffers[0])), at)
        buffers[0][: len(data)] = data
        return len(data)

    monkeypatch.setattr(os, "preadv", short)
    assert fill(storage, 100, 20) == DATA[100:120]
    assert calls == [100, 107, 114]
    with pytest.raises(Truncated):
        fill(storage, len(DATA) - 10, 20)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = local_file(tmp_path / "file")
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, buf, at: whole(fd, bytes(buf)[:7], at))
    storage.write(DATA[:20], 3)
    assert storage.read(3, 20) == DATA[:20]
    monkeypatch.setattr(os, "pwrite", lambda fd, buf, at: 0)
    with pytest.raises(StorageError):
        storage.write(b"abc", 0)


def test_errors_carry_an_errno_a_client_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = local_file(tmp_path / "file", DATA)

    def fails(number: int) -> Callable[..., None]:
        def call(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return call

    for number, told in [(errno.EIO, errno.EIO), (errno.ENOSPC, errno.ENOSPC), (errno.ESTALE, errno.EIO)]:
        for name in ("preadv", "pwrite", "ftruncate", "fdatasync"):
            monkeypatch.setattr(os, name, fails(number))
        for call in (
            lambda: fill(storage, 0, 1),
            lambda: storage.write(b"x", 0),
            lambda: storage.truncate(5),
            lambda: storage.sync(),
        ):
            with pytest.raises(StorageError) as caught:
                call()
            assert caught.value.errno == told
            assert os.strerror(number) in str(caught.value)


def test_a_file_in_memory_is_known_for_one(tmp_path: Path) -> None:
    told = subprocess.run(["stat", "-f", "-c", "%t", tmp_path], capture_output=True, text=True, check=True)
    there = local_file(tmp_path / "file", DATA)
    assert there.in_memory is (told.stdout.strip() in ("1021994", "858458f6"))
    assert not local_file(tmp_path / "other", DATA, writable=False).in_memory
    storage = LocalFile(os.memfd_create("file"), "memory", writable=True)  # in a tmpfs of the kernel's own
    assert storage.in_memory
    storage.sync()
    storage.close()


def test_a_full_file_system_says_so() -> None:
    storage = LocalFile(os.open("/dev/full", os.O_RDWR), "/dev/full", writable=True)
    with pytest.raises(StorageError) as caught:
        storage.write(b"x", 0)
    assert caught.value.errno == errno.ENOSPC


def test_what_closing_tells_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system writes only then, as NFS may; all else that is open is let go of."""
    create_image(tmp_path / "disk.vmdk", 4 * MIB, kind="monolithicFlat")
    disk = open_disk(tmp_path / "disk.vmdk", writable=True)
    files = [file for file in disk.links[0].storages if isinstance(file, LocalFile)]
    left = {file.fd for file in files}
    assert len(left) == 2
    close = os.close

    def full(fd: int) -> None:
        close(fd)
        if fd in left:
            left.remove(fd)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", full)
        with pytest.raises(StorageError, match="close: Disk quota exceeded") as caught:
            disk.close()
    assert caught.value.errno == errno.ENOSPC
    assert not left
    for file in files:
        file.close()


def test_too_far_is_no_crash(tmp_path: Path) -> None:
    storage = local_file(tmp_path / "file", DATA)
    for call in (
        lambda: storage.write(b"x", 1 << 70),
        lambda: storage.write(b"xy", (1 << 63) - 2),
        lambda: storage.truncate(1 << 70),
        lambda: storage.punch(1 << 70, 5),
    ):
        with pytest.raises(StorageError):
            call()
    storage.advise(1 << 70, 5)
    assert storage.size == len(DATA)


def test_a_closed_file_is_an_error(tmp_path: Path) -> None:
    storage = local_file(tmp_path / "file", DATA)
    storage.close()
    for call in (lambda: fill(storage, 0, 1), lambda: storage.size, lambda: storage.write(b"x", 0)):
        with pytest.raises(StorageError):
            call()


def test_zero_and_punch_with_and_without_the_kernel(file: LocalFile) -> None:
    file.zero(100, 2 * MIB)
    file.punch(2 * MIB + 200, 500)
    file.punch(3 * MIB - 10, MIB)
    file.zero(3 * MIB - 20, MIB)
    expected = bytearray(b"\1" * (3 * MIB))
    expected[100 : 2 * MIB + 100] = bytes(2 * MIB)
    expected[2 * MIB + 200 : 2 * MIB + 700] = bytes(500)
    expected[3 * MIB - 20 :] = bytes(20)
    assert file.read(0, file.size) == expected


def test_zero_keeps_space_and_punch_gives_it_back(tmp_path: Path) -> None:
    storage = local_file(tmp_path / "file", b"\1" * MIB)
    storage.sync()
    storage.zero(0, MIB // 2)
    assert storage.allocated >= MIB
    storage.punch(0, MIB // 2)
    storage.sync()
    if storage.allocated > MIB // 2 + 64 * KIB:
        pytest.skip("no holes on this file system")
    assert list(storage.segments(0, MIB)) == [(MIB // 2, False), (MIB // 2, True)]
    assert list(storage.segments(MIB // 4, MIB // 2)) == [(MIB // 4, False), (MIB // 4, True)]


@pytest.mark.parametrize(
    ("number", "again"), [(errno.EOPNOTSUPP, 1), (errno.ENOSYS, 1), (errno.EINVAL, 2)], ids=lambda n: str(n)
)
def test_a_missing_call_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, again: int
) -> None:
    calls = []

    def fallocate(*arguments: int) -> int:
        calls.append(arguments)
        local.ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(local, "_libc_fallocate", lambda: fallocate)
    storage = local_file(tmp_path / "file", DATA)
    storage.zero(0, 10)
    storage.zero(10, 10)
    assert len(calls) == again
    monkeypatch.undo()
    assert storage.zeroes_fast(punch=False) is (again > 1)
    assert storage.zeroes_fast(punch=True), "what can't be zeroed may still be punched"
    assert storage.read(0, 21) == bytes(20) + DATA[20:21]


def test_what_is_fast_is_known_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried out beside the file, which stays; and a folder that lets nobody try tells nothing."""
    calls: list[int] = []

    def fallocate(*arguments: int) -> int:
        calls.append(arguments[0])
        local.ctypes.set_errno(errno.EOPNOTSUPP if arguments[1] & 0x10 else 0)
        return -1 if arguments[1] & 0x10 else 0

    monkeypatch.setattr(local, "_libc_fallocate", lambda: fallocate)
    storage = local_file(tmp_path / "file", DATA)
    before = sorted(os.listdir(tmp_path))
    for _ in range(2):
        assert not storage.zeroes_fast(punch=False)
        assert storage.zeroes_fast(punch=True)
    assert len(calls) == 2
    assert sorted(os.listdir(tmp_path)) == before
    assert storage.read(0, len(DATA)) == DATA

    def refused(number: int) -> Callable[..., int]:
        def no_file(*_arguments: object) -> int:
            raise OSError(number, os.strerror(number))

        return no_file

    for number, known in ((errno.EACCES, True), (errno.EROFS, True), (errno.EOPNOTSUPP, False)):
        storage = local_file(tmp_path / f"file{number}", DATA)
        with monkeypatch.context() as patched:
            patched.setattr(local.os, "open", refused(number))
            assert storage.zeroes_fast(punch=False) is known
        assert storage.zeroes_fast(punch=True)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a tmpfs")
def test_a_file_in_memory_has_no_ranges_of_zeros() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        storage = local_file(Path(folder, "file"), DATA)
        fast = storage.zeroes_fast(punch=False)
        storage.zero(0, 4096)
        assert storage.zeroes_fast(punch=False) == fast
        storage.close()


def test_zeroing_without_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros are written where marking a range as zeros finds no space; where that fails too, it is told."""
    storage = local_file(tmp_path / "file", DATA)
    monkeypatch.setattr(local, "_libc_fallocate", lambda: refuse(errno.ENOSPC))
    storage.zero(0, 10)
    assert storage.read(0, 11) == bytes(10) + DATA[10:11]

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local.os, "pwrite", full)
    with pytest.raises(StorageError) as caught:
        storage.zero(0, 10)
    assert caught.value.errno == errno.ENOSPC


def test_segments_of_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    storage = local_file(tmp_path / "file")
    storage.truncate(16 * MIB)
    for at in range(0, 16, 2):
        storage.write(b"\1" * 65_536, at * MIB)
    walk = storage.segments(0, 16 * MIB)
    total = next(walk)[0]
    storage.truncate(5 * MIB)
    rest = list(walk)
    assert total + sum(size for size, _ in rest) == 16 * MIB
    assert rest[-1][1], "what is gone is not called zero"


def test_segments_where_the_file_system_knows_no_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = local_file(tmp_path / "file", DATA)

    def lseek(*_: int) -> int:
        raise OSError(errno.EINVAL, "no SEEK_DATA here")

    monkeypatch.setattr(os, "lseek", lseek)
    assert list(storage.segments(10, 100)) == [(100, True)]


def test_sparse_file_of_many_terabytes(tmp_path: Path) -> None:
    storage = local_file(tmp_path / "file")
    storage.truncate(8 << 40)
    storage.write(b"x", (8 << 40) - 1)
    found = list(storage.segments(0, 8 << 40))
    assert [is_data for _, is_data in found] == [False, True]
    assert storage.allocated < MIB


def test_identity_of_a_file_is_its_inode(tmp_path: Path) -> None:
    one = local_file(tmp_path / "one")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    two = LocalFile(os.open(tmp_path / "two", os.O_RDONLY), "two", writable=False)
    assert one.identity == two.identity


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_file_limit_is_raised_once(limits: tuple[int, int]) -> None:
    hard = limits[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    raise_file_limit.cache_clear()
    raise_file_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


# What only a window has


def test_a_window_shows_nothing_around_it(tmp_path: Path) -> None:
    base = MemoryStorage(b"secret" + DATA[:100] + b"secret")
    window = Window(base, 6, 100, "window")
    for at, length in [(-1, 1), (-6, 106), (99, 2), (100, 1)]:
        with pytest.raises(Truncated):
            window.read_into(memoryview(bytearray(length)), at)
    assert window.read(0, 100) == DATA[:100]


def test_a_window_of_a_window(tmp_path: Path) -> None:
    inner = Window(Window(MemoryStorage(DATA), 1000, 5000, "outer"), 10, 20, "inner")
    assert inner.read(5, 10) == DATA[1015:1025]
    assert inner.name == "inner"


def test_a_window_sees_its_part_of_the_holes(tmp_path: Path) -> None:
    base = local_file(tmp_path / "file")
    base.truncate(4 * MIB)
    base.write(b"\1" * MIB, MIB)
    base.sync()
    window = Window(base, MIB // 2, 2 * MIB, "window")
    if len(list(base.segments(0, 4 * MIB))) == 1:
        pytest.skip("no holes on this file system")
    assert list(window.segments(0, 2 * MIB)) == [(MIB // 2, False), (MIB, True), (MIB // 2, False)]
    assert window.allocated == MIB


def test_a_window_owns_what_it_shows_a_part_of(tmp_path: Path) -> None:
    base = local_file(tmp_path / "file", DATA)
    Window(base, 0, 10, "window").close()
    with pytest.raises(StorageError):
        base.read(0, 10)
