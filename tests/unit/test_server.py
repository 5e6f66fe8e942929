"""Starting, watching and ending nbdkit, with a small plugin in the place of the real one."""

import asyncio
import errno
import logging
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nbd_vmdk.errors import FileMissing, InUse, OptionError, ServerError, StorageError
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.serving import server as server_module
from nbd_vmdk.serving.handshake import Export, read_exports
from nbd_vmdk.serving.listener import Listener, listen_private, listen_tcp, listen_unix
from nbd_vmdk.serving.process import clean
from nbd_vmdk.serving.server import plugin_config, plugin_path, serve
from nbd_vmdk.serving.supervisor import Server

PLUGIN = """
import os, sys, time, threading
API_VERSION = 2
seen = {}
me = __file__
def say(text):
    print(text, file=sys.stderr, flush=True)
def config(key, value):
    seen[key] = value
def thread_model():
    import nbdkit
    return nbdkit.THREAD_MODEL_PARALLEL
def get_ready():
    say("warning: from the start")
    if "fail" in seen:
        say("nbdkit: error: " + me + ": get_ready: error: error: disk.vmdk: it is bad")
        say("hint: get a better one")
        os._exit(1)
    if "bug" in seen:
        raise ValueError("a bug")
    if "wait" in seen:
        time.sleep(float(seen["wait"]))
def after_fork():
    if "chatty" in seen:
        threading.Timer(0.2, lambda: [say("x" * 999) for _ in range(2000)]).start()
    if "die" in seen:
        threading.Timer(float(seen["die"]), lambda: os._exit(7)).start()
def cleanup():
    if "numbers" in seen:
        say("stats: [" + "0, " * int(seen["numbers"]) + seen["last"])
    if "mark" in seen:
        time.sleep(0.3)
        open_file(seen["mark"], "w").write("clean")
    if "dirty" in seen:
        say("error: disk.vmdk: no space for the tables")
        os._exit(1)
    if "stuck" in seen:
        time.sleep(60)
open_file = open
def open(readonly):
    if "refuse" in seen:
        raise RuntimeError("not you")
    return 1
def can_write(h): return True
def get_size(h): return int(seen.get("size", 65536))
def pread(h, buf, offset, flags): buf[:] = bytes(len(buf))
def pwrite(h, buf, offset, flags): pass
def dump_plugin(): pass
"""


T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run it, and never for long."""
    return asyncio.run(asyncio.wait_for(main, 60))


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no corpse."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


async def started(listener: Listener, plugin: Path, **config: object) -> Server:
    made = Server(listener, plugin, [(key, str(value)) for key, value in config.items()])
    await made.start()
    return made


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "plugin.py"
    file.write_text(PLUGIN)
    return file


# listening


def test_private_socket_is_for_us_alone_and_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made = listen_private()
    assert made.path is not None
    folder = os.path.dirname(made.path)
    assert os.path.dirname(folder) == str(tmp_path)
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert made.uri() == f"nbd+unix:///?socket={made.path}"
    made.remove()
    assert not os.path.exists(folder)


def test_private_socket_without_a_runtime_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere/at/all")
    made = listen_private()
    assert made.path is not None
    assert made.path.startswith("/tmp/nbd-vmdk-")
    made.remove()


def test_uri_is_percent_encoded(tmp_path: Path) -> None:
    made = listen_unix(tmp_path / "a b&c#d\u00e9")
    assert made.uri("x/y z").startswith("nbd+unix:///x%2Fy%20z?socket=")
    assert made.uri().endswith("/a%20b%26c%23d%C3%A9")
    environment = made.environment()
    assert environment["unixsocket"] == made.path
    assert environment["nbd"] == f"nbd:unix:{made.path}"
    made.remove()


def test_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen_unix(path)
    with pytest.raises(InUse, match="a server answers there") as caught:
        listen_unix(path)
    assert caught.value.exit_code == 5
    first.release()
    time.sleep(0.02)
    second = listen_unix(path)
    # The first no longer owns the path, so its end must not take the second's socket away.
    first.remove()
    assert path.exists()
    second.remove()
    assert not path.exists()


def test_a_stale_socket_that_may_not_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of another user in /tmp."""

    def refuse(_path: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    path = tmp_path / "s"
    listen_unix(path).release()
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        with pytest.raises(StorageError, match="remove what a dead server left: Operation not permitted"):
            listen_unix(path)
    listen_unix(path).remove()
    assert not path.exists()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("data")
    with pytest.raises(OptionError, match="no socket"):
        listen_unix(file)
    assert file.read_text() == "data"
    with pytest.raises(StorageError, match="make a socket"):
        listen_unix(tmp_path / "no folder" / "s")
    with pytest.raises(OptionError, match="at most 107 bytes"):
        listen_unix(tmp_path / ("x" * 120))


def test_tcp(tmp_path: Path) -> None:
    made = listen_tcp("127.0.0.1", 0)
    assert made.port > 0
    assert made.uri() == f"nbd://127.0.0.1:{made.port}"
    assert made.uri("disk 1") == f"nbd://127.0.0.1:{made.port}/disk%201"
    assert made.environment()["port"] == str(made.port)
    with pytest.raises(InUse, match="the port is taken") as caught:
        listen_tcp("127.0.0.1", made.port)
    assert "--port 0" in str(caught.value.hint)
    made.remove()
    everywhere = listen_tcp("0.0.0.0", 0)
    assert everywhere.uri() == f"nbd://localhost:{everywhere.port}"
    everywhere.remove()
    with pytest.raises(OptionError, match="can't listen there"):
        listen_tcp("192.0.2.1", 0)
    with pytest.raises(OptionError, match="can't listen there"):
        listen_tcp("no such host.invalid", 0)


def test_tcp_over_ipv6() -> None:
    try:
        made = listen_tcp("::1", 0)
    except OptionError:
        pytest.skip("no IPv6 here")
    assert made.uri() == f"nbd://[::1]:{made.port}"
    made.remove()


# starting and ending


def test_serves_and_ends_cleanly(plugin: Path, tmp_path: Path) -> None:
    async def main() -> None:
        pidfile = tmp_path / "pid"
        listener = listen_unix(tmp_path / "s")
        made = Server(listener, plugin, [("size", "1048576"), ("mark", str(tmp_path / "m"))], pidfile=pidfile)
        await made.start()
        assert int(pidfile.read_text()) == made.pid
        assert [(each.name, each.size, each.read_only) for each in made.exports] == [("", 1 << 20, False)]
        assert made.uri == f"nbd+unix:///?socket={tmp_path}/s"
        size = await asyncio.create_subprocess_exec("nbdinfo", "--size", made.uri, stdout=subprocess.PIPE)
        assert (await size.communicate())[0] == b"1048576\n"
        await made.stop()
        assert (tmp_path / "m").read_text() == "clean"
        assert not pidfile.exists()
        assert not (tmp_path / "s").exists()
        assert not alive(made.pid)
        await made.stop()

    run(main())


def test_tcp_server_and_read_only(plugin: Path) -> None:
    async def main() -> None:
        made = Server(listen_tcp("127.0.0.1", 0), plugin, [], read_only=True, threads=2)
        await made.start()
        assert made.exports[0].read_only
        size = await asyncio.create_subprocess_exec("nbdinfo", "--size", made.uri, stdout=subprocess.PIPE)
        assert (await size.communicate())[0] == b"65536\n"
        await made.stop()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((made.listener.host, made.listener.port), 5)

    run(main())


def test_two_servers_in_one_loop(plugin: Path) -> None:
    async def main() -> None:
        both = await asyncio.gather(
            started(listen_private(), plugin, size=4096), started(listen_private(), plugin, size=8192)
        )
        assert [each.exports[0].size for each in both] == [4096, 8192]
        assert both[0].uri != both[1].uri
        await both[0].stop()
        assert alive(both[1].pid)
        await both[1].stop()

    run(main())


def test_waits_as_long_as_opening_takes_and_no_longer(plugin: Path) -> None:
    async def main() -> None:
        begin = time.monotonic()
        made = await started(listen_private(), plugin, wait=0.5)
        assert 0.5 <= time.monotonic() - begin < 2
        await made.stop()

    run(main())


def test_own_words_explain_a_failed_start(plugin: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        listener = listen_private()
        with pytest.raises(ServerError) as caught:
            await started(listener, plugin, fail=1)
        assert str(caught.value) == "disk.vmdk: it is bad"
        assert caught.value.hint == "get a better one"
        assert listener.path is not None
        assert not os.path.exists(os.path.dirname(listener.path))

    with caplog.at_level(logging.INFO, logger="nbd_vmdk.serving.server"):
        run(main())
    assert [record.getMessage() for record in caplog.records] == ["from the start"]


def test_a_bug_keeps_its_traceback(plugin: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        with pytest.raises(ServerError, match="did not start: it exited with code 1"):
            await started(listen_private(), plugin, bug=1)

    with caplog.at_level(logging.INFO, logger="nbd_vmdk.serving.server"):
        run(main())
    assert "ValueError: a bug" in caplog.text


def test_an_export_that_does_not_open_fails_the_start(plugin: Path) -> None:
    async def main() -> None:
        with pytest.raises(ServerError):
            await started(listen_private(), plugin, refuse=1)

    run(main())


def test_no_plugin_and_no_nbdkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: Path) -> None:
    async def missing() -> None:
        with pytest.raises(ServerError, match="cannot open file"):
            await started(listen_private(), tmp_path / "nothing.py")

    async def absent() -> None:
        with pytest.raises(ServerError, match="nbdkit is not installed") as caught:
            await started(listen_private(), plugin)
        assert "apt-get install" in str(caught.value.hint)

    async def silent() -> None:
        listener = listen_unix(tmp_path / "s")
        with pytest.raises(ServerError, match=r"did not answer within 0\.3 s"):
            await started(listener, plugin, wait=60)
        assert not (tmp_path / "s").exists()

    run(missing())
    monkeypatch.setenv("NBDKIT", "/nowhere/nbdkit")
    run(absent())
    monkeypatch.delenv("NBDKIT")
    monkeypatch.setattr("nbd_vmdk.serving.supervisor.START_TIMEOUT", 0.3)
    run(silent())


@pytest.mark.parametrize("name", ["no/pid", "folder"])
def test_pidfile_that_can_not_be_written(plugin: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    there = set(tmp_path.iterdir())

    async def main() -> None:
        made = Server(listen_private(), plugin, [], pidfile=tmp_path / name)
        with pytest.raises(StorageError, match="write the pidfile"):
            await made.start()
        assert not alive(made.pid)

    run(main())
    assert set(tmp_path.iterdir()) == there


def test_death_is_noticed_and_told_once(plugin: Path) -> None:
    async def main() -> None:
        made = await started(listen_private(), plugin, die=0.2)
        with pytest.raises(ServerError, match="ended unasked: it exited with code 7"):
            await made.wait()
        await made.stop()
        killed = await started(listen_private(), plugin)
        os.kill(killed.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match="was killed by SIGKILL"):
            await killed.wait()
        await killed.stop()
        unnoticed = await started(listen_private(), plugin, die=0.1)
        await asyncio.sleep(0.5)
        with pytest.raises(ServerError, match="ended unasked"):
            await unnoticed.stop()

    run(main())


def test_told_to_end_by_another(plugin: Path) -> None:
    async def main() -> None:
        made = await started(listen_private(), plugin)
        os.kill(made.pid, signal.SIGTERM)
        await made.wait()
        await made.stop()

    run(main())


def test_a_failed_close_is_an_error(plugin: Path) -> None:
    async def main() -> None:
        made = await started(listen_private(), plugin, dirty=1)
        with pytest.raises(ServerError, match=r"disk\.vmdk: no space for the tables"):
            await made.stop()

    run(main())


def test_one_that_does_not_end_is_killed_aloud(plugin: Path, tmp_path: Path) -> None:
    async def main() -> None:
        made = await started(listen_unix(tmp_path / "s"), plugin, stuck=1)
        with pytest.raises(ServerError, match=r"did not end within 0\.3 s and was killed"):
            await made.stop(timeout=0.3)
        assert not (tmp_path / "s").exists()
        assert not alive(made.pid)

    run(main())


def test_cancelling_does_not_cut_a_clean_close_short(plugin: Path, tmp_path: Path) -> None:
    async def main() -> None:
        made = await started(listen_private(), plugin, mark=tmp_path / "m")
        stopping = asyncio.create_task(made.stop())
        for _ in range(3):
            await asyncio.sleep(0.02)
            stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert (tmp_path / "m").read_text() == "clean"

    run(main())


def test_a_talkative_server_never_blocks(plugin: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        made = await started(listen_private(), plugin, chatty=1)
        for _ in range(200):
            if sum(record.getMessage().startswith("xxx") for record in caplog.records) == 2000:
                break
            await asyncio.sleep(0.05)
        await made.stop()

    with caplog.at_level(logging.INFO, logger="nbd_vmdk.serving.server"):
        run(main())
    assert sum(record.getMessage() == "x" * 999 for record in caplog.records) == 2000


@pytest.mark.parametrize(("last", "told"), [("0]", [0] * 300_001), ("", None)])
def test_the_numbers_of_many_exports_are_taken_whole_or_not(
    plugin: Path, last: str, told: list[int] | None
) -> None:
    """They are one line, as long as it may be; who is killed in the middle of it leaves none."""

    async def main() -> None:
        made = await started(listen_private(), plugin, numbers=300_000, last=last)
        await made.stop(timeout=10)
        assert made.stats == told

    run(main())


def test_it_dies_with_its_parent(plugin: Path, tmp_path: Path) -> None:
    script = f"""
import asyncio, os, sys
from nbd_vmdk.serving.handshake import Export, read_exports
from nbd_vmdk.serving.listener import listen_unix
from nbd_vmdk.serving.supervisor import Server
async def main():
    made = Server(listen_unix({str(tmp_path / "s")!r}), {str(plugin)!r}, [("mark", {str(tmp_path / "m")!r})])
    await made.start()
    print(made.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(pid)
    assert (tmp_path / "m").read_text() == "clean"
    # What the killed parent could not remove is no obstacle for the next one.
    listen_unix(tmp_path / "s").remove()


MAGIC = b"NBDMAGICIHAVEOPT"


def reply(option: int, kind: int, body: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(body)) + body


@pytest.mark.parametrize(
    ("said", "error", "match"),
    [
        (b"SSH-2.0-OpenSSH_9\r\n", ServerError, "no NBD server"),
        (b"NBDMAGIC" + bytes.fromhex("00420281861253") + bytes(20), ServerError, "no NBD server"),
        (MAGIC + b"\0\0", ServerError, "old form"),
        (MAGIC + b"\0\1" + bytes(20), ServerError, "makes no sense"),
        (MAGIC + b"\0\1" + reply(3, 2, bytes(20000)), ServerError, "makes no sense"),
        (MAGIC + b"\0\1" + reply(3, 1 << 31 | 2, b"go away"), ServerError, "refused: go away"),
        (MAGIC + b"\0\1" + reply(3, 1 << 31 | 1), ServerError, "refused: error 1"),
        (MAGIC + b"\0\1", EOFError, "bytes read"),
        (b"", EOFError, "bytes read"),
    ],
)
def test_what_is_no_good_nbd_server(said: bytes, error: type[Exception], match: str, tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.write_eof()
        await reader.read()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_unix_server(answer, tmp_path / "s"):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            with pytest.raises(error, match=match):
                await read_exports(reader, writer)
            writer.close()

    run(main())


def test_several_exports(tmp_path: Path) -> None:
    said = MAGIC + b"\0\1"
    said += reply(3, 2, b"\0\0\0\1a") + reply(3, 2, b"\0\0\0\3b ctwo") + reply(3, 1)
    said += reply(6, 3, struct.pack(">HQH", 0, 4096, 1)) + reply(6, 3, b"\0\3") + reply(6, 1)
    said += reply(6, 3, struct.pack(">HQH", 0, 1 << 40, 3)) + reply(6, 1)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await reader.read()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_unix_server(answer, tmp_path / "s"):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            assert await read_exports(reader, writer) == [
                Export("a", 4096, False),
                Export("b c", 1 << 40, True),
            ]
            writer.close()

    run(main())
    server = Server(listen_unix(tmp_path / "t"), "/p.py", [])
    server.exports = [Export("a", 1, False), Export("b c", 1, False)]
    assert server.uris == [f"nbd+unix:///{name}?socket={tmp_path}/t" for name in ("a", "b%20c")]
    server.listener.remove()


def test_prefixes_of_nbdkit() -> None:
    plugin = "/a b/p.py"
    for said, meant in [
        ("nbdkit: error: /a b/p.py: get_ready: error: error: d.vmdk: bad\n", "error: d.vmdk: bad"),
        ("nbdkit: python.3: error: /a b/p.py: pread: error: d: lost", "error: d: lost"),
        ("nbdkit: python[1]: error: cannot do", "error: cannot do"),
        ("nbdkit: error: /a b/p.py: cannot open file", "error: /a b/p.py: cannot open file"),
        ("nbdkit: debug: hello", "hello"),
        (
            "nbdkit: error: /a b/p.py: open: error: Traceback (most recent call last):",
            "Traceback (most recent call last):",
        ),
        ("hint: try again", "hint: try again"),
        ("warning: odd", "warning: odd"),
    ]:
        assert clean(said, plugin) == meant


# serve()


def test_plugin_config_names_what_differs(tmp_path: Path) -> None:
    assert plugin_config(["/d/a.vmdk"], OpenOptions(writable=True)) == [("file", "/d/a.vmdk")]
    several = plugin_config(["/a.ova:x", "/b.vmx"], OpenOptions(), snapshot="s", skip_broken=True)
    assert several[1:] == [("file", "/b.vmx"), ("snapshot", "s"), ("skip-broken", "true")]
    options = OpenOptions(
        parent="/p.vmdk", allow_dirs=("/a", "/b"), allow_devices=True, ignore_cid=True, cache_size=4096
    )
    assert plugin_config(["/d/a.vmdk"], options) == [
        ("file", "/d/a.vmdk"),
        ("parent", "/p.vmdk"),
        ("allow-dir", "/a"),
        ("allow-dir", "/b"),
        ("allow-devices", "true"),
        ("ignore-cid", "true"),
        ("cache-size", "4096"),
    ]
    assert plugin_config(["x.vmdk"], OpenOptions())[0][1] == os.path.abspath("x.vmdk")


def test_plugin_path_is_a_file_of_ours() -> None:
    assert os.path.basename(os.path.realpath(plugin_path())) == "nbdkit_shim.py"


def test_the_plugin_for_another_python_is_one_clean_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["nbdkit", "python", plugin_path(), "--dump-plugin"]
    environment = os.environ | {"NBD_VMDK_SITE": "/x/lib/python3.1/site-packages"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = done.stderr.splitlines()
    assert done.returncode == 1
    assert said[0].startswith("error: nbdkit embeds Python 3.")
    assert said[0].endswith("is installed for Python 3.1 (/x/lib/python3.1/site-packages)")
    assert said[1].startswith("hint: ")
    assert len(said) == 2
    # The same in a checkout whose .venv was made by another Python than nbdkit's.
    package = tmp_path / "nbd_vmdk"
    package.mkdir()
    shutil.copy(plugin_path(), package / "nbdkit_shim.py")
    (tmp_path / "plugin.py").symlink_to("nbd_vmdk/nbdkit_shim.py")
    (tmp_path / ".venv/lib/python3.2/site-packages").mkdir(parents=True)
    environment.pop("NBD_VMDK_SITE")
    command[2] = str(tmp_path / "plugin.py")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is installed for Python 3.2" in done.stderr
    assert "Traceback" not in done.stderr

    async def main() -> None:
        monkeypatch.setattr(
            "nbd_vmdk.serving.launch.sysconfig.get_path", lambda _: "/x/lib/python3.1/site-packages"
        )
        with pytest.raises(ServerError, match=r"is installed for Python 3\.1") as caught:
            await started(listen_private(), Path(plugin_path()), file="x.vmdk")
        assert "make clean setup" in str(caught.value.hint)

    run(main())


def test_the_plugin_loads_by_itself() -> None:
    done = subprocess.run(
        ["nbdkit", "python", plugin_path(), "--dump-plugin"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "nbd_vmdk_version=" in done.stdout


def test_serve_refuses_what_makes_no_sense() -> None:
    async def attempt(**options: Any) -> None:
        async with serve("x.vmdk", **options):
            pass

    for options in ({"socket": "s", "port": 1}, {"bind": "::1"}, {"threads": 0}, {"colour": "blue"}):
        with pytest.raises(OptionError):
            run(attempt(**options))
    for name, hint in (
        ("prot", "is it port"),
        ("write_paren", "is it write_parent"),
        ("locks", "it always locks"),
        ("colour", "vsock, activated, tls"),
    ):
        with pytest.raises(OptionError, match=f"^no option '{name}'$") as caught:
            run(attempt(**{name: 1}))
        assert hint in str(caught.value.hint)


def test_serve_checks_first_and_then_serves(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def check(paths: list[str], options: OpenOptions, *_: object) -> server_module.Checked:
        checked.append((paths[0], options.writable, options.ignore_cid))
        if paths == ["gone.vmdk"]:
            raise FileMissing(paths[0], doing="open", why="no")
        return server_module.Checked(("odd, but harmless",))

    monkeypatch.setattr(server_module, "_check", check)
    monkeypatch.setattr(server_module, "plugin_path", lambda: str(plugin))

    async def main() -> None:
        async with serve("x.vmdk", read_only=True, ignore_cid=True) as made:
            assert made.warnings == ("odd, but harmless",)
            assert made.exports[0].size == 65536
        assert not alive(made.pid)
        with pytest.raises(FileMissing):
            async with serve("gone.vmdk"):
                pass
        with pytest.raises(ZeroDivisionError):
            async with serve("x.vmdk") as made:
                raise ZeroDivisionError
        assert not alive(made.pid)

    run(main())
    assert checked == [("x.vmdk", False, True), ("gone.vmdk", True, False), ("x.vmdk", True, False)]
