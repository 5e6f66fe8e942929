"""The plugin as nbdkit's users meet it: what it says of itself, requests, errors, and how it ends."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

import nbd
import pytest

from nbd_vmdk import __version__, open_disk
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.plugin.ending import CLOSE_FAILED
from tests.engine import same
from tests.images import desc, peek
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image, Row
from tests.plugin import PLUGIN, ROOT, Nbdkit, environment, errno_of, refusal
from tests.sound import check_sound

GRAIN = 64 * KIB
Serve = Callable[..., Nbdkit]


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def hosted(folder: Any, name: str = "top", size: int = 4 * MIB, **options: Any) -> Image:
    """The first four grains hold data, the rest nothing."""
    return desc.monolithic_sparse(str(folder), name, Content(size).put(0, noise(4 * GRAIN)), **options)


def over_base(folder: Any, **options: Any) -> Image:
    """A child whose first four grains hold data, over a parent full of data."""
    base = desc.monolithic_flat(str(folder), "base", Content.of(noise(4 * MIB, 9)))
    return hosted(folder, parent=base, **options)


def statuses(connection: nbd.NBD, offset: int, length: int, flags: int = 0) -> list[tuple[int, int]]:
    """(length, flags) as one block status answer has them."""
    found: list[int] = []

    def told(context: str, at: int, entries: list[int], error: int) -> int:
        assert (context, at) == (nbd.CONTEXT_BASE_ALLOCATION, offset)
        found.extend(entries)
        return 0

    connection.block_status(length, offset, told, flags)
    return list(zip(found[::2], found[1::2], strict=True))


def all_statuses(connection: nbd.NBD) -> list[tuple[int, int, int]]:
    """(offset, length, flags) of the whole disk, neighbours that are alike joined."""
    found: list[tuple[int, int, int]] = []
    offset, size = 0, connection.get_size()
    while offset < size:
        for length, flags in statuses(connection, offset, size - offset):
            if found and found[-1][2] == flags:
                found[-1] = found[-1][0], found[-1][1] + length, flags
            else:
                found.append((offset, length, flags))
            offset += length
    return found


# What it says of itself.


def test_handshake(serve: Serve, tmp_path: Any) -> None:
    server = serve(hosted(tmp_path).path)
    told = server.info()
    assert told["protocol"] == "newstyle-fixed"
    assert told["structured"] is True
    (export,) = told["exports"]
    facts = {
        "export-size": 4 * MIB,
        "is_read_only": False,
        "can_cache": True,
        "can_fast_zero": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        "block_size_minimum": 1,
        "block_size_preferred": GRAIN,
        "block_size_maximum": 32 * MIB,
        "description": "VMware disk, monolithicSparse",
        "export-name": "top.vmdk",
    }
    assert {key: export[key] for key in facts} == facts
    assert nbd.CONTEXT_BASE_ALLOCATION in export["contexts"]


def test_handshake_of_a_read_only_disk(serve: Serve, tmp_path: Any) -> None:
    image = over_base(tmp_path)
    (export,) = serve(image.path, options=("-r",)).info()["exports"]
    assert export["is_read_only"] is True
    assert export["description"] == "VMware disk, monolithicSparse, 2 links"
    for fact in ("can_trim", "can_zero", "can_fast_zero", "can_fua", "can_flush"):
        assert export[fact] is False, fact
    assert export["can_multi_conn"] is True
    assert export["can_cache"] is True


@pytest.mark.parametrize(("grain", "preferred"), [(4 * KIB, 64 * KIB), (MIB, MIB), (8 * MIB, MIB)])
def test_preferred_block_is_the_grain_within_bounds(
    serve: Serve, tmp_path: Any, grain: int, preferred: int
) -> None:
    image = hosted(tmp_path, grain_sectors=grain // SECTOR)
    connection = serve(image.path).connect()
    sizes = [
        connection.get_block_size(what) for what in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)
    ]
    assert sizes == [1, preferred, 32 * MIB]


def test_export_names(serve: Serve, tmp_path: Any) -> None:
    server = serve(hosted(tmp_path, "a disk").path)
    found = server.info("--list")
    assert [export["export-name"] for export in found["exports"]] == ["a disk.vmdk"]
    for name in ("", "a disk.vmdk"):
        assert server.connect(name).get_size() == 4 * MIB
    assert errno_of(lambda: server.connect("other")) == "ENOENT"
    # The server goes on, and says what there is.
    assert server.connect().get_size() == 4 * MIB
    server.stop()
    assert "no export 'other'" in server.errors
    assert "there is a disk.vmdk" in server.errors


def test_warnings_are_printed_at_start(serve: Serve, tmp_path: Any) -> None:
    image = desc.stream_optimized(str(tmp_path), "top", Content(MIB).put(0, noise(GRAIN)))
    server = serve(image.path)
    (export,) = server.info()["exports"]
    assert export["is_read_only"] is True
    server.stop()
    assert server.errors.count("warning: ") == 1
    assert "read-only" in server.errors


def test_dump_plugin() -> None:
    done = subprocess.run(
        ["nbdkit", "python", PLUGIN, "--dump-plugin"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    told = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert told["nbd_vmdk_version"] == __version__
    assert {"file", "allow-dir", "cache-size", "salvage"} <= set(told["nbd_vmdk_parameters"].split())
    assert told["nbd_vmdk_inflate"]
    # Each has a line that says what it is for, and none is left out that the engine has.
    for name in told["nbd_vmdk_parameters"].split():
        assert told[f"nbd_vmdk_parameter_{name.replace('-', '_')}"]
    known = {field.name for field in fields(OpenOptions)} - {"writable", "locks", "allow_dirs"}
    assert {name.replace("_", "-") for name in known} <= set(told["nbd_vmdk_parameters"].split())
    assert told["max_thread_model"] == "parallel"
    assert not done.stderr


# Requests.


def test_read_and_write(serve: Serve, tmp_path: Any) -> None:
    image = over_base(tmp_path)
    model = bytearray(image.visible.read())
    server = serve(image.path)
    connection = server.connect()
    rng = random.Random(1)
    for turn in range(120):
        offset = rng.randrange(4 * MIB)
        length = min(rng.choice((1, 100, SECTOR, 4096, 70000, 300000)), 4 * MIB - offset)
        if turn % 3:
            data = rng.randbytes(length)
            connection.pwrite(data, offset, nbd.CMD_FLAG_FUA if turn % 20 == 1 else 0)
            model[offset : offset + length] = data
        else:
            same(bytes(connection.pread(length, offset)), bytes(model[offset : offset + length]), offset)
    connection.flush()
    same(bytes(connection.pread(4 * MIB, 0)), bytes(model))
    assert server.stop() == 0
    assert not server.errors
    check_sound(image.path)
    with open_disk(image.path) as disk:
        same(disk.pread(4 * MIB, 0), bytes(model))


def test_zero_and_trim(serve: Serve, tmp_path: Any) -> None:
    image = hosted(tmp_path)
    connection = serve(image.path).connect()
    before = os.stat(image.path).st_blocks * 512

    def given_back() -> int:
        """Grains; the file system may need a block to note where the holes are."""
        return round((before - os.stat(image.path).st_blocks * 512) / GRAIN)

    connection.zero(GRAIN, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    connection.zero(100, GRAIN + 5, nbd.CMD_FLAG_FAST_ZERO)
    assert given_back() == 0
    connection.zero(GRAIN, 2 * GRAIN, nbd.CMD_FLAG_FUA)
    assert given_back() == 1
    connection.trim(GRAIN, 3 * GRAIN, nbd.CMD_FLAG_FUA)
    assert given_back() == 2
    wanted = bytearray(noise(4 * GRAIN))
    wanted[:GRAIN] = bytes(GRAIN)
    wanted[GRAIN + 5 : GRAIN + 105] = bytes(100)
    wanted[2 * GRAIN :] = bytes(2 * GRAIN)
    same(bytes(connection.pread(4 * GRAIN, 0)), bytes(wanted))


def test_fast_zero_that_would_not_be_fast(serve: Serve, tmp_path: Any) -> None:
    image = over_base(tmp_path)
    server = serve(image.path)
    connection = server.connect()
    for _ in range(3):
        assert errno_of(lambda: connection.zero(GRAIN, 8 * GRAIN, nbd.CMD_FLAG_FAST_ZERO)) == "ENOTSUP"
    same(bytes(connection.pread(GRAIN, 8 * GRAIN)), noise(4 * MIB, 9)[8 * GRAIN : 9 * GRAIN])
    connection.zero(GRAIN, 8 * GRAIN)
    assert not any(connection.pread(GRAIN, 8 * GRAIN))
    server.stop()
    assert not server.errors, "it is an answer, not an error"


def test_cache(serve: Serve, tmp_path: Any) -> None:
    image = desc.stream_optimized(str(tmp_path), "top", Content(4 * MIB).put(0, noise(2 * MIB)))
    connection = serve(image.path, options=("-r",)).connect()
    connection.cache(4 * MIB, 0)
    same(bytes(connection.pread(2 * MIB, 0)), noise(2 * MIB))


@pytest.mark.parametrize("kind", ["flat", "sparse", "child", "stream", "mixed"])
def test_block_status_agrees_with_runs(serve: Serve, tmp_path: Any, kind: str) -> None:
    content = Content.random(4 * MIB, 3, 0.4)
    folder = str(tmp_path)
    if kind == "flat":
        image = desc.monolithic_flat(folder, "top", content)
    elif kind == "child":
        base = desc.split_sparse(folder, "base", Content.random(4 * MIB, 4, 0.4), 2048)
        image = desc.monolithic_sparse(folder, "top", content, parent=base, zero_gte=True)
    elif kind == "stream":
        image = desc.stream_optimized(folder, "top", content)
    elif kind == "mixed":
        piece = Content.of(noise(GRAIN))
        image = desc.custom(
            folder,
            "top",
            [
                Row("RW", "SPARSE", Content(MIB).put(0, noise(GRAIN))),
                Row("RW", "ZERO", Content(MIB)),
                Row("RW", "FLAT", piece, offset=0),
            ],
        )
    else:
        image = hosted(tmp_path)
    connection = serve(image.path, options=("-r",)).connect()
    empty = nbd.STATE_HOLE | nbd.STATE_ZERO
    wanted: list[tuple[int, int, int]] = []
    with open_disk(image.path) as disk:
        for run in disk.runs():
            flags = empty if run.kind in (Kind.HOLE, Kind.ZERO) else 0
            if wanted and wanted[-1][2] == flags:
                wanted[-1] = wanted[-1][0], wanted[-1][1] + run.length, flags
            else:
                wanted.append((run.offset, run.length, flags))
    found = all_statuses(connection)
    assert found == wanted
    assert len(found) > 1
    for offset, length, flags in found:
        if flags:
            assert not any(connection.pread(length, offset))
    same(bytes(connection.pread(image.size, 0)), image.visible.read())
    # One piece, cut off or as long as it is; and from the middle of one.
    for offset, length, flags in found[:5]:
        assert statuses(connection, offset, length, nbd.CMD_FLAG_REQ_ONE) == [(length, flags)]
        assert statuses(connection, offset, image.size - offset, nbd.CMD_FLAG_REQ_ONE) == [(length, flags)]
        assert statuses(connection, offset + 1, 100, nbd.CMD_FLAG_REQ_ONE) == [(100, flags)]


def test_block_status_of_very_many_pieces(serve: Serve, tmp_path: Any) -> None:
    """More than one answer holds: the client asks again, and misses none."""
    content = Content(20 * MIB)
    for at in range(0, 20 * MIB, 2 * SECTOR):
        content.put(at, b"x")
    image = desc.monolithic_sparse(str(tmp_path), "top", content, grain_sectors=1)
    connection = serve(image.path, options=("-r",)).connect()
    first = statuses(connection, 0, 20 * MIB)
    assert len(first) == 16384
    assert len(all_statuses(connection)) == 20 * MIB // SECTOR


def test_flush_covers_other_connections(serve: Serve, tmp_path: Any) -> None:
    """Also when the server is killed right after it."""
    image = hosted(tmp_path)
    server = serve(image.path)
    one, two = server.connect(), server.connect()
    one.pwrite(noise(GRAIN, 5), 2 * MIB)
    two.flush()
    same(bytes(two.pread(GRAIN, 2 * MIB)), noise(GRAIN, 5))
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    server.process.returncode = 0  # as this test wants it
    with open_disk(image.path) as disk:
        same(disk.pread(GRAIN, 2 * MIB), noise(GRAIN, 5))
        assert any("not closed cleanly" in warning for warning in disk.warnings)


@pytest.mark.parametrize("request_", ["write", "zero", "trim"])
def test_fua_survives_a_kill(serve: Serve, tmp_path: Any, request_: str) -> None:
    image = hosted(tmp_path)
    server = serve(image.path)
    connection = server.connect()
    if request_ == "write":
        connection.pwrite(noise(GRAIN, 5), 0)
        connection.pwrite(noise(GRAIN, 5), 2 * MIB, nbd.CMD_FLAG_FUA)
    else:
        call = connection.zero if request_ == "zero" else connection.trim
        call(GRAIN, 0, nbd.CMD_FLAG_FUA)
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    server.process.returncode = 0  # as this test wants it
    with open_disk(image.path) as disk:
        same(disk.pread(GRAIN, 0), noise(GRAIN, 5) if request_ == "write" else bytes(GRAIN))
        same(disk.pread(GRAIN, 2 * MIB), noise(GRAIN, 5) if request_ == "write" else bytes(GRAIN))


def test_many_connections_at_once(serve: Serve, tmp_path: Any) -> None:
    image = hosted(tmp_path)
    server = serve(image.path)
    with open(tmp_path / "in", "wb") as file:
        file.write(noise(4 * MIB, 3))
    copy("--connections=8", "--request-size=16384", "--flush", str(tmp_path / "in"), server.uri)
    copy("--connections=8", "--request-size=4096", server.uri, str(tmp_path / "out"))
    same((tmp_path / "out").read_bytes(), noise(4 * MIB, 3))


def copy(*words: str) -> None:
    done = subprocess.run(["nbdcopy", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nbdcopy_out_and_in(serve: Serve, tmp_path: Any) -> None:
    """A whole disk leaves one image and comes into another, which qemu-img reads equal."""
    content = Content.random(24 * MIB + SECTOR, 7, 0.3)
    source = desc.stream_optimized(str(tmp_path), "source", content)
    out = str(tmp_path / "out.raw")
    copy(serve(source.path, options=("-r",)).uri, out)
    same(peek(out, 0, content.size), content.read())
    for name, made in {
        "sparse": desc.monolithic_sparse(str(tmp_path), "sparse", Content(content.size)),
        "split": desc.split_sparse(str(tmp_path), "split", Content(content.size), 16384),
    }.items():
        server = serve(made.path)
        copy("--flush", out, server.uri)
        assert server.stop() == 0
        raw = str(tmp_path / f"{name}.raw")
        subprocess.run(["qemu-img", "convert", "-O", "raw", made.path, raw], check=True)
        same(peek(raw, 0, content.size), content.read())
        for extent in made.files:
            if peek(extent, 0, 4) == b"KDMV":
                check_sound(extent)
        # What was zeros took no space.
        occupied = sum(os.stat(file).st_blocks * 512 for file in made.files)
        data = sum(end - start for start, end, part, _ in content.segments() if part == 2)
        assert occupied < 2 * data + MIB


# Errors as a client sees them.


def patchwork(folder: Any) -> Image:
    """RW, RDONLY, NOACCESS; each of 64 KiB."""
    piece = Content.of(noise(GRAIN))
    rows = [Row(access, "FLAT", piece, offset=0) for access in ("RW", "RDONLY", "NOACCESS")]
    return desc.custom(str(folder), "top", rows)


def test_errno_of_what_is_not_allowed(serve: Serve, tmp_path: Any) -> None:
    server = serve(patchwork(tmp_path).path)
    connection = server.connect()
    connection.set_strict_mode(0)
    assert errno_of(lambda: connection.pread(10, 2 * GRAIN)) == "EIO"
    assert errno_of(lambda: connection.pwrite(b"x", GRAIN)) == "EPERM"
    assert errno_of(lambda: connection.zero(10, GRAIN)) == "EPERM"
    assert errno_of(lambda: connection.zero(10, GRAIN, nbd.CMD_FLAG_FAST_ZERO)) == "EPERM"
    assert errno_of(lambda: connection.trim(10, GRAIN)) == "EPERM"
    assert errno_of(lambda: connection.cache(10, 2 * GRAIN)) is None
    assert errno_of(lambda: connection.pread(10, 3 * GRAIN - 5)) == "EINVAL"
    # The connection goes on.
    connection.pwrite(b"fine", 0)
    same(bytes(connection.pread(GRAIN, GRAIN)), noise(GRAIN))
    server.stop()
    assert "Traceback" not in server.errors
    assert "the descriptor gives no access to this extent" in server.errors


def test_errno_of_a_connection_that_may_not_write(serve: Serve, tmp_path: Any) -> None:
    connection = serve(hosted(tmp_path).path, "read-only=yes").connect()
    assert connection.is_read_only()
    connection.set_strict_mode(0)
    for call in (
        lambda: connection.pwrite(b"x", 0),
        lambda: connection.zero(1, 0),
        lambda: connection.trim(1, 0),
    ):
        assert errno_of(call) in ("EPERM", "EINVAL")


def test_no_space(serve: Serve, tmp_path: Any) -> None:
    """A file that may not grow: the client is told ENOSPC, and goes on where there is room."""
    image = hosted(tmp_path)
    size = os.path.getsize(image.path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2 * GRAIN, size + 2 * GRAIN))

    server = serve(image.path, preexec_fn=limit)
    connection = server.connect()
    results = [
        errno_of(lambda at=at: connection.pwrite(noise(GRAIN), at)) for at in range(MIB, 2 * MIB, GRAIN)
    ]
    assert results == [None, None, *["ENOSPC"] * 14]
    connection.flush()
    connection.pwrite(b"room", 0, nbd.CMD_FLAG_FUA)
    same(bytes(connection.pread(3 * GRAIN, MIB)), noise(GRAIN) * 2 + bytes(GRAIN))
    assert server.stop() == 0
    check_sound(image.path)
    with open_disk(image.path) as disk:
        same(disk.pread(3 * GRAIN, MIB), noise(GRAIN) * 2 + bytes(GRAIN))


def test_errors_of_requests_are_short_and_few(serve: Serve, tmp_path: Any) -> None:
    server = serve(patchwork(tmp_path).path)
    connection = server.connect()
    for _ in range(60):
        assert errno_of(lambda: connection.pread(10, 2 * GRAIN)) == "EIO"
    server.stop()
    lines = server.errors.splitlines()
    assert all(line.startswith(("nbdkit: ", "hint: ")) for line in lines[:-1])
    assert len([line for line in lines[:-1] if "can't be read" in line]) == 2
    assert lines[-1].startswith("warning: ")
    assert lines[-1].endswith("(and 58 more errors like it)")
    assert len(server.errors) < 60 * 150


# Opening.


def test_bad_images_stop_nbdkit(tmp_path: Any) -> None:
    nothing = tmp_path / "nothing.vmdk"
    text = tmp_path / "text.vmdk"
    text.write_bytes(b"hello " * 1000)
    child = over_base(tmp_path)
    os.remove(tmp_path / "base.vmdk")
    cut = hosted(tmp_path, "cut")
    os.truncate(cut.path, 20000)
    for path, words in {
        str(nothing): "no such file",
        str(text): "not a VMDK",
        child.path: "base.vmdk",
        cut.path: "too early",
        str(tmp_path): "",
    }.items():
        said = refusal("python", PLUGIN, f"file={path}")
        assert words in said
        assert path in said


def test_bad_parameters_stop_nbdkit(tmp_path: Any) -> None:
    path = hosted(tmp_path).path
    for words, says in {
        (): "no image to serve",
        (f"fiel={path}",): "unknown parameter fiel",
        (f"file={path}", "salvage=perhaps"): "not true or false",
        (f"file={path}", "cache-size=lots"): "is not a size",
        (f"file={path}", "locks=no"): "unknown parameter locks",
        (f"file={path}", "writable=no"): "unknown parameter writable",
        # "file=$UNSET" must not serve the folder that we are in.
        ("file=",): "file= has no value",
        (f"file={path}", "parent="): "parent= has no value",
        (f"file={path}", "allow_dir="): "allow_dir= has no value",
    }.items():
        said = refusal("python", PLUGIN, *words)
        assert says in said
        assert "error: error:" not in said
    assert "hint: is it file? known are file, " in refusal("python", PLUGIN, f"fiel={path}")


def test_too_few_descriptors(serve: Serve, tmp_path: Any) -> None:
    """What a client finds then is silence, so it is said before one comes; and which limit is meant."""
    image = desc.split_flat(str(tmp_path), "many", Content(4 * MIB), 128)

    def limited(limit: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    server = serve(image.path, preexec_fn=limited(100))
    assert server.connect().get_size() == 4 * MIB
    assert server.stop() == 0
    assert "of 100 file descriptors" in server.errors
    server = serve(image.path, preexec_fn=limited(400))
    assert server.stop() == 0
    assert "file descriptors" not in server.errors
    command = ["nbdkit", "-f", "-U", "-", "python", PLUGIN, f"file={image.path}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(), preexec_fn=limited(50)
    )
    assert done.returncode == 1
    assert "Too many open files" in done.stderr
    assert "hint: let it have more files open: ulimit -n" in done.stderr


def test_it_ends_with_no_descriptor_left(serve: Serve, tmp_path: Any) -> None:
    """Clients that are connected are found without one."""
    limit = 60
    server = serve(
        hosted(tmp_path).path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
    )
    disk = server.connect()
    disk.pwrite(b"last", 0)
    with ExitStack() as closing:
        for _ in range(limit):
            client = closing.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(server.socket)
        wait_for(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) == limit)
        assert server.stop() == 0
    assert "file descriptors" in server.errors
    with open_disk(tmp_path / "top.vmdk") as after:
        assert after.pread(4, 0) == b"last"
        assert after.warnings == ()


def test_parameters_reach_the_engine(serve: Serve, tmp_path: Any) -> None:
    base = hosted(tmp_path / ".", "base")
    away = tmp_path / "away"
    away.mkdir()
    child = hosted(tmp_path, "child", parent=base)
    os.rename(base.path, away / "base.vmdk")
    assert "base.vmdk" in refusal("python", PLUGIN, f"file={child.path}")
    serve(child.path, f"parent={away}/base.vmdk", "cache-size=1M").connect()
    # The other way: the descriptor leads there, and may.
    text = peek(child.path, SECTOR, 20 * SECTOR)
    with open(child.path, "r+b") as file:
        file.seek(SECTOR)
        file.write(text.replace(b'Hint="base.vmdk"', b'Hint="away/base.vmdk"').rstrip(b"\0"))
    server = serve(child.path, "read-only=1")
    assert server.connect().get_size() == 4 * MIB
    refusal("python", PLUGIN, f"file={away}/base.vmdk", "write-parent=no", "salvage=maybe")


@pytest.mark.parametrize("options", [("-r",), ("--read-only",), ("--readonly",), ("-nr",)])
def test_read_only_by_nbdkits_own_option(serve: Serve, tmp_path: Any, options: tuple[str, ...]) -> None:
    """Then nothing is locked for writing: another may read beside, and a parent may be served."""
    base = hosted(tmp_path, "base")
    hosted(tmp_path, "child", parent=base)
    server = serve(base.path, options=options)
    assert access_modes(server, base.path) == {os.O_RDONLY}
    assert server.info()["exports"][0]["is_read_only"] is True


@pytest.mark.parametrize("options", [(), ("-e", "-r"), ("-e-r",)])
def test_writable_by_default(serve: Serve, tmp_path: Any, options: tuple[str, ...]) -> None:
    server = serve(hosted(tmp_path).path, options=options, cwd=tmp_path)
    assert os.O_RDWR in access_modes(server, str(tmp_path / "top.vmdk"))
    assert server.info()["exports"][0]["is_read_only"] is False


def test_read_only_behind_the_plugin(serve: Serve, tmp_path: Any) -> None:
    """nbdkit takes its options anywhere."""
    server = serve(hosted(tmp_path).path, "-r")
    assert access_modes(server, str(tmp_path / "top.vmdk")) == {os.O_RDONLY}


def access_modes(server: Nbdkit, path: str) -> set[int]:
    """How the server has a file open."""
    found = set()
    for fd in os.listdir(f"/proc/{server.pid}/fd"):
        try:
            name = os.readlink(f"/proc/{server.pid}/fd/{fd}")
        except FileNotFoundError:
            continue  # a connection that has ended meanwhile
        if name == os.path.realpath(path):
            with open(f"/proc/{server.pid}/fdinfo/{fd}") as file:
                flags = next(line for line in file if line.startswith("flags:"))
            found.add(int(flags.split()[1], 8) & os.O_ACCMODE)
    return found


def test_second_server_is_refused(serve: Serve, tmp_path: Any) -> None:
    image = hosted(tmp_path)
    serve(image.path)
    said = refusal("python", PLUGIN, f"file={image.path}")
    assert "in use by another process" in said
    assert "-r" in said
    # Reading beside it is possible, with a warning.
    reader = serve(image.path, options=("-r",))
    reader.stop()
    assert "warning: " in reader.errors


def test_relative_path_in_the_background(tmp_path: Any) -> None:
    hosted(tmp_path)
    path, pidfile = tmp_path / "socket", tmp_path / "pid"
    command = ["nbdkit", "-U", str(path), "-P", str(pidfile), "python", PLUGIN, "file=top.vmdk"]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment(), timeout=20)
    # The file is written by the child, after the parent may have ended.
    wait_for(lambda: pidfile.exists() and pidfile.read_text().endswith("\n"))
    pid = int(pidfile.read_text())
    try:
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        connection = nbd.NBD()
        connection.connect_unix(str(path))
        connection.pwrite(noise(GRAIN, 3), 2 * MIB)
        same(bytes(connection.pread(4 * GRAIN, 0)), noise(4 * GRAIN))
        connection.shutdown()
        # The timer's thread, the states of threads: all was made after the fork.
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not os.path.exists(f"/proc/{pid}") or "Z" in status(pid))
    check_sound(str(tmp_path / "top.vmdk"))
    with open_disk(str(tmp_path / "top.vmdk")) as disk:
        same(disk.pread(GRAIN, 2 * MIB), noise(GRAIN, 3))


def status(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1]
    except OSError:
        return "Z"


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


# Ending.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_with_open_connections(serve: Serve, tmp_path: Any, number: int) -> None:
    """What was written and never flushed is in the file, which is cleanly closed."""
    image = hosted(tmp_path)
    server = serve(image.path)
    connections = [server.connect() for _ in range(3)]
    for turn, connection in enumerate(connections):
        connection.pwrite(noise(GRAIN, turn), MIB + turn * GRAIN)
    assert server.stop(number) == 0
    assert not server.errors
    check_sound(image.path)
    with open_disk(image.path) as disk:
        assert not disk.warnings
        for turn in range(3):
            same(disk.pread(GRAIN, MIB + turn * GRAIN), noise(GRAIN, turn))


def test_signal_while_requests_run(serve: Serve, tmp_path: Any) -> None:
    """What has been received is answered; what was answered is in the file.

    A client that can't send the rest may hang up while it is answered, which nbdkit 1.32 may abort over (see
    plugin/aborting.py): then once more.
    """
    for _ in range(3):
        if (code := _signal_while_requests_run(serve, tmp_path)) != -signal.SIGABRT:
            break
    assert code == 0


def _signal_while_requests_run(serve: Serve, folder: Any) -> int:
    image = hosted(folder, size=64 * MIB)
    server = serve(image.path)
    connection = server.connect()
    buffers = [nbd.Buffer.from_bytearray(bytearray(noise(256 * KIB, turn))) for turn in range(64)]
    cookies = [connection.aio_pwrite(buffer, MIB + turn * 256 * KIB) for turn, buffer in enumerate(buffers)]
    server.process.send_signal(signal.SIGTERM)
    done = set()
    try:
        while len(done) < 64:
            connection.poll(1000)
            done |= {
                turn
                for turn in range(64)
                if turn not in done and connection.aio_command_completed(cookies[turn])
            }
    except nbd.Error:
        pass  # the server has hung up
    code = server.stop()
    if code == 0:
        check_sound(image.path)
        with open_disk(image.path) as disk:
            for turn in done:
                same(disk.pread(256 * KIB, MIB + turn * 256 * KIB), noise(256 * KIB, turn))
    return code


def test_client_that_never_comes_to_an_end(serve: Serve, tmp_path: Any) -> None:
    """One that has only connected, before any negotiation."""
    server = serve(hosted(tmp_path).path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(server.socket)
        assert client.recv(8) == b"NBDMAGIC"
        begin = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begin < 5


def test_signal_with_a_connection_by_tcp(tmp_path: Any) -> None:
    image = hosted(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["nbdkit", "-f", "-p", str(port), "python", PLUGIN, f"file={image.path}"]
    with subprocess.Popen(command, env=environment()) as process:
        connection = nbd.NBD()

        def connected() -> bool:
            try:
                connection.connect_uri(f"nbd://127.0.0.1:{port}")
            except nbd.Error:
                return False
            return True

        for _ in range(500):
            if connected():
                break
            connection = nbd.NBD()
            time.sleep(0.01)
        connection.pwrite(noise(GRAIN), MIB)
        process.terminate()
        assert process.wait(10) == 0
    check_sound(image.path)


BROKEN = f"""
import errno, os, sys
sys.path[:0] = [{ROOT!r}, os.environ.get("NBD_VMDK_SITE", "")]
from nbd_vmdk.plugin.callbacks import *
from nbd_vmdk import disk
from nbd_vmdk.errors import StorageError
from nbd_vmdk.storage.local import LocalFile
real = LocalFile.sync
def sync(self):
    if os.path.exists(os.environ["BROKEN"]):
        raise StorageError.of(OSError(errno.EIO, "Input/output error"), self.name, "sync")
    real(self)
LocalFile.sync = sync
if "BUG" in os.environ:
    def bug(*args, **kwargs):
        raise ZeroDivisionError("a bug")
    disk.Disk.close = disk.Disk.write_from = bug
"""


@pytest.fixture
def broken(tmp_path: Any) -> tuple[str, Any]:
    """The plugin with a sync that fails as soon as a file is there: (its path, the file)."""
    (tmp_path / "broken.py").write_text(BROKEN)
    return str(tmp_path / "broken.py"), tmp_path / "switch"


def test_failed_sync(serve: Serve, tmp_path: Any, broken: tuple[str, Any]) -> None:
    """EIO for the flush and everything after it, and the server ends with 1, the image not cleanly closed."""
    plugin, switch = broken
    image = hosted(tmp_path)
    server = serve(image.path, plugin=plugin, env={"BROKEN": str(switch)})
    connection = server.connect()
    connection.pwrite(noise(GRAIN), MIB)
    switch.write_text("")
    assert errno_of(connection.flush) == "EIO"
    switch.unlink()
    assert errno_of(connection.flush) == "EIO"
    assert errno_of(lambda: connection.pwrite(b"x", 0)) == "EIO"
    same(bytes(connection.pread(GRAIN, MIB)), noise(GRAIN))
    assert server.stop() == CLOSE_FAILED
    server.process.returncode = 0  # as this test wants it
    assert "an earlier sync failed" in server.errors.splitlines()[-1]
    assert peek(image.path, 72, 1) == b"\1"


def test_failed_cleanup_is_told_by_the_exit_code(
    serve: Serve, tmp_path: Any, broken: tuple[str, Any]
) -> None:
    plugin, switch = broken
    server = serve(hosted(tmp_path).path, plugin=plugin, env={"BROKEN": str(switch)})
    server.connect().pwrite(noise(GRAIN), MIB)
    switch.write_text("")
    assert server.stop() == CLOSE_FAILED
    server.process.returncode = 0
    (line,) = server.errors.splitlines()
    assert line.startswith("error: ")
    assert "sync: Input/output error" in line


def test_bug_keeps_its_traceback(serve: Serve, tmp_path: Any, broken: tuple[str, Any]) -> None:
    plugin, switch = broken
    server = serve(hosted(tmp_path).path, plugin=plugin, env={"BROKEN": str(switch), "BUG": "1"})
    assert errno_of(lambda: server.connect().pwrite(b"x", 0)) == "EIO"
    assert server.stop() == CLOSE_FAILED
    server.process.returncode = 0
    server.traceback_expected = True
    assert server.errors.count("ZeroDivisionError: a bug") == 2


# Threads.


def test_thread_states_are_given_back(serve: Serve, tmp_path: Any) -> None:
    """Memory does not grow with the connections that were.

    Without the give-back these 60 connections of 16 workers make the server grow by 4 MiB, with it by 16 KiB.
    """
    image = hosted(tmp_path)
    server = serve(image.path, options=("-t", "16"))

    def visit() -> None:
        connection = server.connect(context=False)
        buffers = [nbd.Buffer(4096) for _ in range(96)]
        cookies = [connection.aio_pread(buffer, 4096 * turn) for turn, buffer in enumerate(buffers)]
        while cookies:
            connection.poll(-1)
            cookies = [cookie for cookie in cookies if not connection.aio_command_completed(cookie)]
        connection.shutdown()

    for _ in range(10):
        visit()
    before = resident(server.pid)
    for _ in range(60):
        visit()
    assert resident(server.pid) - before < MIB


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("threads", [1, 4])
def test_other_numbers_of_threads(serve: Serve, tmp_path: Any, threads: int) -> None:
    """With one thread, requests run on the connection's own, which also closes it."""
    image = hosted(tmp_path)
    server = serve(image.path, options=("-t", str(threads)))
    for turn in range(20):
        connection = server.connect()
        connection.pwrite(bytes([turn]) * 100, MIB + turn)
        same(bytes(connection.pread(100, MIB + turn)), bytes([turn]) * 100)
        connection.shutdown()


# nbdkit's filters.


def test_cow_filter(serve: Serve, tmp_path: Any) -> None:
    """Writes stay in the overlay: the image, opened for reading, is not changed."""
    image = hosted(tmp_path)
    before = peek(image.path, 0, os.path.getsize(image.path))
    server = serve(image.path, "read-only=yes", options=("--filter=cow",))
    connection = server.connect()
    assert not connection.is_read_only()
    connection.pwrite(noise(GRAIN, 4), 100)
    same(
        bytes(connection.pread(GRAIN + 200, 0)),
        noise(GRAIN)[:100] + noise(GRAIN, 4) + noise(4 * GRAIN)[GRAIN + 100 : GRAIN + 200],
    )
    assert server.stop() == 0
    assert peek(image.path, 0, os.path.getsize(image.path)) == before


def test_partition_filter(serve: Serve, tmp_path: Any) -> None:
    entry = bytes([0, 0, 2, 0, 0x83, 0, 0, 0]) + (128).to_bytes(4, "little") + (256).to_bytes(4, "little")
    table = bytes(446) + entry + bytes(48) + b"\x55\xaa"
    content = Content(4 * MIB).put(0, table).put(128 * SECTOR, noise(256 * SECTOR))
    image = desc.monolithic_sparse(str(tmp_path), "top", content)
    connection = serve(image.path, "partition=1", options=("--filter=partition",)).connect()
    assert connection.get_size() == 256 * SECTOR
    same(bytes(connection.pread(256 * SECTOR, 0)), noise(256 * SECTOR))
