"""Servers as events, servers that are started again, and many of them."""

import asyncio
import logging
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import pytest

import nbd_vmdk
from nbd_vmdk import client
from nbd_vmdk.errors import NbdError, OptionError, ServerError
from nbd_vmdk.serving.events import (
    Event,
    EventLog,
    Exited,
    Failed,
    GaveUp,
    Line,
    Missed,
    Ready,
    Restarted,
    Restarting,
)
from nbd_vmdk.serving.listener import listen_private, listen_tcp
from nbd_vmdk.serving.restarts import Restart
from nbd_vmdk.serving.supervisor import Server
from tests.client.servers import run

#: Fails to start as soon as there is a file, `bad`.
PLUGIN = """
import os, sys
API_VERSION = 2
bad = ""
def config(key, value):
    global bad
    bad = value
def get_ready():
    if os.path.exists(bad):
        print("error: it is bad", file=sys.stderr)
        os._exit(1)
    print("warning: odd", file=sys.stderr)
    print("hello", file=sys.stderr)
def open(readonly): return 1
def get_size(h): return 65536
def pread(h, buf, offset, flags): buf[:] = bytes(len(buf))
"""

SOON = Restart(delay=0.02)

E = TypeVar("E", bound=Event)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "plugin.py"
    file.write_text(PLUGIN)
    return file


@pytest.fixture
def image(tmp_path: Path) -> Path:
    made = tmp_path / "disk.vmdk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", str(made), "4M"], check=True)
    return made


def bad(plugin: Path) -> list[tuple[str, str]]:
    return [("bad", str(plugin.parent / "bad"))]


async def until(events: AsyncIterator[Event], kind: type[E]) -> E:
    async with asyncio.timeout(20):
        async for event in events:
            if isinstance(event, kind):
                return event
    raise AssertionError(kind)


def test_options_are_refused_as_open_disk_refuses_them(image: Path) -> None:
    async def why(**options: object) -> OptionError:
        with pytest.raises(OptionError) as caught:
            async with nbd_vmdk.serve(image, **options):
                pass
        return caught.value

    with pytest.raises(OptionError) as opened:
        nbd_vmdk.open_disk(image, unknown=1)
    assert str(run(why(unknown=1))) == str(opened.value)
    for mine in ({"writable": True}, {"locks": False}):
        assert (run(why(**mine)).hint or "").startswith("read_only says")


def test_a_life_in_events(plugin: Path) -> None:
    async def main() -> list[Event]:
        server = Server(listen_private(), plugin, bad(plugin))
        await server.start()
        assert server.pid == (await until(aiter(server.events), Ready)).pid
        await server.stop()
        return [event async for event in server.events]

    events = run(main())
    assert [(each.word, each.text) for each in events if isinstance(each, Line)] == [
        ("warning", "odd"),
        ("nbdkit", "hello"),
    ]
    assert [type(each) for each in events] == [Line, Line, Ready, Exited]
    last = events[-1]
    assert isinstance(last, Exited)
    assert (last.code, last.how, last.asked) == (0, "exited with code 0", True)
    said = events[0].as_dict()
    assert 0 < time.time() - float(str(said.pop("at"))) < 60
    assert said == {"event": "line", "level": logging.WARNING, "word": "warning", "text": "odd"}


def test_without_a_policy_a_death_is_the_end(plugin: Path) -> None:
    async def main() -> list[Event]:
        server = Server(listen_private(), plugin, bad(plugin))
        await server.start()
        os.kill(server.pid, signal.SIGKILL)
        events = [event async for event in server.events]
        with pytest.raises(ServerError, match="was killed by SIGKILL"):
            await server.wait()
        await server.stop()
        return events

    last = run(main())[-1]
    assert isinstance(last, Exited)
    assert (last.code, last.asked) == (-9, False)


@pytest.mark.parametrize("tcp", [False, True])
def test_started_again_at_the_same_address(plugin: Path, tmp_path: Path, tcp: bool) -> None:
    async def main() -> None:
        listener = listen_tcp("127.0.0.1", 0) if tcp else listen_private()
        server = Server(listener, plugin, bad(plugin), restart=SOON, pidfile=tmp_path / "pid")
        await server.start()
        uri, first = server.uri, server.pid
        events = aiter(server.events)
        async with client.connect(uri) as disk:
            os.kill(first, signal.SIGKILL)
            # Who comes while nobody is there, waits.
            async with client.connect(uri) as later:
                assert await later.pread(512, 0) == bytes(512)
            with pytest.raises(NbdError, match="the connection is lost"):
                await disk.pread(512, 0)
        assert (await until(events, Exited)).pid == first
        assert await until(events, Restarting)
        assert (await until(events, Restarted)).pid == server.pid != first
        assert server.uri == uri
        assert int((tmp_path / "pid").read_text()) == server.pid
        waiting = asyncio.create_task(server.wait())
        os.kill(server.pid, signal.SIGTERM)
        # Somebody told it to end: that is no failure.
        await waiting
        await server.stop()
        assert not (tmp_path / "pid").exists()

    run(main())


def test_it_is_given_up_after_too_many_failures(plugin: Path) -> None:
    async def main() -> list[Event]:
        server = Server(listen_private(), plugin, bad(plugin), restart=Restart(limit=3, delay=0.01))
        await server.start()
        (plugin.parent / "bad").touch()
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match="ended unasked"):
            await server.wait()
        assert server.listener.path is not None
        assert not os.path.exists(server.listener.path)
        await server.stop()
        return [event async for event in server.events]

    events = [each for each in run(main()) if not isinstance(each, Line)]
    assert [type(each) for each in events] == [
        *(Ready, Exited, Restarting, Failed, Restarting, Failed, Restarting, Failed, GaveUp)
    ]
    delays = [each.delay for each in events if isinstance(each, Restarting)]
    assert delays == [0.01, 0.02, 0.04]
    assert [each.why for each in events if isinstance(each, Failed)] == ["it is bad"] * 3


def test_stopping_while_it_is_started_again(plugin: Path) -> None:
    async def main() -> None:
        server = Server(listen_private(), plugin, bad(plugin), restart=Restart(delay=30, longest=30))
        await server.start()
        waiting = asyncio.create_task(server.wait())
        os.kill(server.pid, signal.SIGKILL)
        await until(aiter(server.events), Restarting)
        with pytest.raises(ServerError, match="ended unasked"):
            await server.stop()
        await waiting
        assert server.listener.path is not None
        assert not os.path.exists(server.listener.path)

    run(main())


def test_a_first_start_that_fails_is_not_tried_again(plugin: Path) -> None:
    (plugin.parent / "bad").touch()

    async def main() -> None:
        with pytest.raises(ServerError, match="it is bad"):
            await Server(listen_private(), plugin, bad(plugin), restart=SOON).start()

    run(main())


def test_the_policy() -> None:
    policy = Restart(limit=3, within=100, delay=1, longest=3)
    earlier: list[float] = []
    for now, delay in ((0, 1), (10, 2), (20, 3), (30, None), (101, 3), (300, 1)):
        assert policy.after(earlier, now) == delay
        if delay is not None:
            earlier.append(now)
    assert Restart(limit=None).after([0.0] * 5000, 1) == 30
    for wrong in ({"limit": 0}, {"delay": -1.0}):
        with pytest.raises(OptionError):
            Restart(**wrong)


def test_a_slow_reader_is_told_what_he_missed() -> None:
    async def main() -> None:
        log = EventLog(keep=3)
        reader = aiter(log)
        for at in range(5):
            log.emit(Restarted(at))
        found = [await anext(reader) for _ in range(2)]
        assert [type(each) for each in found] == [Missed, Restarted]
        assert isinstance(found[0], Missed)
        assert found[0].count == 2
        later = asyncio.create_task(until(reader, Exited))
        await asyncio.sleep(0)
        log.emit(Exited(1, 0, "", asked=True))
        assert (await later).pid == 1
        log.close()
        assert [each async for each in reader] == []
        assert len([each async for each in log]) == 4

    run(main())


def test_a_real_image_comes_back_with_what_was_flushed(image: Path) -> None:
    async def main() -> None:
        async with nbd_vmdk.serve(image, restart=SOON) as server:
            events = aiter(server.events)
            exports = server.exports
            async with client.connect(server.uri) as disk:
                await disk.pwrite(b"flushed" * 1000, 70_000)
                await disk.flush()
                os.kill(server.pid, signal.SIGKILL)
                await until(events, Restarted)
                with pytest.raises(NbdError, match="connection is lost"):
                    await disk.pread(512, 0)
            assert server.exports == exports
            async with client.connect(server.uri) as disk:
                assert await disk.pread(7000, 70_000) == b"flushed" * 1000

    run(main())


def test_eight_servers_at_once(tmp_path: Path) -> None:
    images = [tmp_path / f"{at}.vmdk" for at in range(8)]
    for at, each in enumerate(images):
        subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", str(each), f"{at + 1}M"], check=True)

    async def one(at: int) -> int:
        async with nbd_vmdk.serve(images[at], restart=SOON) as server:
            async with client.connect(server.uri, connections=2) as disk:
                await disk.pwrite(bytes([at]) * 4096, 0)
                assert disk.size == (at + 1) << 20
            if at % 2:
                os.kill(server.pid, signal.SIGKILL)
                await until(aiter(server.events), Restarted)
            async with client.connect(server.uri) as disk:
                await disk.pwrite(bytes([at]) * 4096, 4096)
            return server.pid

    async def main() -> None:
        assert len(set(await asyncio.gather(*(one(at) for at in range(8))))) == 8

    run(main())
    for at, each in enumerate(images):
        with nbd_vmdk.open_disk(str(each)) as disk:
            assert disk.pread(4096, 4096) == bytes([at]) * 4096
