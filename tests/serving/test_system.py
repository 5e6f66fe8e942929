"""Living in a system: sockets that are handed over, readiness, the journal, units, numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk.cli.stats import table
from nbd_vmdk.errors import InUse, OptionError, StorageError
from nbd_vmdk.serving import asking
from nbd_vmdk.serving.launch import find_nbdkit, nbdkit_environment
from nbd_vmdk.serving.listener import listen_unix
from nbd_vmdk.serving.notify import notify
from nbd_vmdk.serving.server import plugin_path
from tests.images import desc
from tests.images.content import Content
from tests.plugin import ROOT, errno_of, nbd
from tests.serving import command, served, size_of, vmdk
from tests.serving.conftest import MIB, Tls

# The log.


def test_one_damage_is_told_once(tmp_path: Path) -> None:
    content = Content.random(4 * MIB, 5, density=1)
    image = desc.split_sparse(str(tmp_path), "disk", content, extent_sectors=4096)
    part = tmp_path / "disk-s002.vmdk"
    os.truncate(part, MIB)
    with served("-r", image.path) as (uri, process):
        client = nbd.NBD()
        client.connect_uri(uri)
        failed = [errno_of(lambda at=at: client.pread(65536, at)) for at in range(0, 4 * MIB, 65536)]
        assert failed.count("EIO") > 10
    first, hint, second, last = process.said.splitlines()  # type: ignore[attr-defined]
    assert first.startswith(f"error: {part}: the file ends too early for a read: ")
    assert f"nbd-vmdk check {image.path} tells what is lost" in hint
    assert second.endswith("; more errors like this one are only counted")
    assert (
        last
        == f"warning: {first.removeprefix('error: ')} (and {failed.count('EIO') - 2} more errors like it)"
    )


# Socket activation.


def handed_over(made: socket.socket, *words: object, count: int = 1) -> subprocess.Popen[str]:
    """``serve`` with a socket as a service manager hands it over."""
    shell = f'LISTEN_PID=$$ LISTEN_FDS={count} exec "$@" 3<&0 4<&0 </dev/null'
    return subprocess.Popen(
        ["/bin/sh", "-c", shell, "sh", *command("serve", *words)],
        stdin=made,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_libnbd_hands_over_its_socket(disk: Path) -> None:
    client = nbd.NBD()
    client.connect_systemd_socket_activation(command("serve", disk))
    assert client.get_size() == 4 * MIB
    client.pwrite(b"hello", 0)
    client.shutdown()
    del client  # ends the server
    done = subprocess.run(
        ["qemu-io", "-r", "-f", "vmdk", "-c", "read -v 0 5", str(disk)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "hello" in done.stdout


@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="systemd is not installed")
def test_systemd_hands_over_a_socket(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = subprocess.Popen(
        ["systemd-socket-activate", "-l", str(path), *command("serve", disk, "-r")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 10
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert size_of(f"nbd+unix:///?socket={path}") == (0, str(4 * MIB))
    finally:
        process.terminate()
        assert "error" not in process.communicate(timeout=20)[1]
    assert process.returncode == 0
    assert path.exists()  # it is not ours to remove


def test_a_port_that_is_handed_over(disk: Path, tls: Tls) -> None:
    with socket.create_server(("127.0.0.1", 0)) as made:
        process = handed_over(made, disk)
        assert process.stdout is not None
        assert process.stdout.readline() == f"nbd://127.0.0.1:{made.getsockname()[1]}\n"
        process.terminate()
        assert process.communicate(timeout=20)[1] == ""
    with socket.create_server(("0.0.0.0", 0)) as made:
        process = handed_over(made, disk)
        assert "others can reach" in process.communicate(timeout=20)[1]
        assert process.returncode == 2
        process = handed_over(made, disk, "--tls-psk", tls.psk)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("nbds://")
        process.terminate()
        process.communicate(timeout=20)


def test_a_command_knows_nothing_of_what_was_handed_over(disk: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as made:
        process = handed_over(made, disk, "--run", "env; nbdinfo --size $uri")
        out, _errors = process.communicate(timeout=20)
    assert "LISTEN_" not in out
    assert out.endswith(f"{4 * MIB}\n")


@pytest.mark.parametrize(
    ("words", "count", "listening", "why"),
    [
        ([], 2, True, "2 sockets"),
        (["--port", "0"], 1, True, "another one is asked for"),
        ([], 1, False, "does not listen"),
    ],
)
def test_sockets_that_do_not_fit(disk: Path, words: list[str], count: int, listening: bool, why: str) -> None:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        if listening:
            made.listen()
        process = handed_over(made, disk, *words, count=count)
        assert why in process.communicate(timeout=20)[1]
        assert process.returncode == 2


def test_what_is_handed_over_to_somebody_else(disk: Path) -> None:
    """The variables of another process, inherited by accident, mean nothing."""
    environment = {"LISTEN_FDS": "1", "LISTEN_PID": "1"}
    assert vmdk("serve", disk, "--run", "true", environment=environment).stderr == ""


# The service manager and the journal.


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(disk: Path, tmp_path: Path, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"nbd-vmdk-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
        manager.bind("\0" + name if abstract else name)
        manager.settimeout(20)
        environment = os.environ | {"NOTIFY_SOCKET": "@" + name if abstract else name}
        with served(disk, env=environment) as (uri, process):
            news = manager.recv(4096).decode().splitlines()
            assert news[0] == "READY=1"
            assert re.fullmatch(r"STATUS=Serving 1 disk \(4 MiB\) on /.*/socket", news[1])
            assert size_of(uri)[0] == 0
            process.send_signal(signal.SIGTERM)
            assert manager.recv(4096) == b"STOPPING=1\nSTATUS=Closing the disks"


def test_nobody_is_told_without_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify(READY="1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert not notify(READY="1")
    monkeypatch.setenv("NOTIFY_SOCKET", "vsock:2:1")
    assert not notify(READY="1")


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}, {"LC_ALL": "", "LC_CTYPE": "C"}]
)
def test_names_in_a_locale_that_has_no_such_characters(
    disk: Path, tmp_path: Path, locale: dict[str, str]
) -> None:
    """Scripts set LC_ALL=C; the Python in nbdkit then opens by names in ASCII alone, if it is let."""
    named = tmp_path / "Gr\u00fc\u00dfe \u65e5\u672c.vmdk"
    disk.rename(named)
    environment = {"LANG": ""} | locale
    assert vmdk("serve", "-r", named, "--run", 'nbdinfo --size "$uri"', environment=environment).stdout


def test_nbdkit_alone_in_such_a_locale(disk: Path, tmp_path: Path) -> None:
    """It takes the locale as it is; the error says which one has the name."""
    named = tmp_path / "Gr\u00fc\u00dfe.vmdk"
    disk.rename(named)
    words = ["nbdkit", "-r", "-U", "-", "python", plugin_path(), f"file={named}", "--run", "true"]
    for locale, code in (("C", 1), ("C.UTF-8", 0)):
        environment = nbdkit_environment(find_nbdkit()) | {"LC_ALL": locale}
        done = subprocess.run(words, capture_output=True, check=False, timeout=60, env=environment)
        assert done.returncode == code, done
        assert (b"hint: the locale has no such characters: set LC_ALL=C.UTF-8" in done.stderr) == bool(code)


def test_a_name_that_nbdkit_does_not_take(disk: Path, tmp_path: Path) -> None:
    named = tmp_path / os.fsdecode(b"Gr\xfc\xdfe.vmdk")
    disk.rename(named)
    words = command("serve", "-r", named, "--run", "true")
    done = subprocess.run(words, capture_output=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: " + os.fsencode(named) + b": the name is not UTF-8")
    assert b"\nhint: rename the file" in done.stderr


def test_lines_for_the_journal(tmp_path: Path) -> None:
    reader, writer = socket.socketpair()
    with reader, writer:
        there = os.fstat(writer.fileno())
        stream = f"{there.st_dev}:{there.st_ino}"
        for value, head in ((stream, "<3>error: "), ("1:1", "error: ")):
            done = subprocess.run(
                command("serve", tmp_path / "nothing.vmdk"),
                stderr=writer,
                env=os.environ | {"JOURNAL_STREAM": value},
                check=False,
            )
            assert done.returncode == 1
            assert reader.recv(4096).decode().startswith(head)


UNITS = ("nbd-vmdk@.service", "nbd-vmdk@.socket")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_the_units_are_sound_and_in_a_sandbox(tmp_path: Path) -> None:
    for name in UNITS:
        text = Path(ROOT, "systemd", name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/bin/nbd-vmdk", "/bin/true"))
    # The instance is a path with blanks and dashes in it.
    escaped = subprocess.run(
        ["systemd-escape", "--path", "/srv/my disks/a-b.vmdk"], capture_output=True, text=True, check=True
    ).stdout.strip()
    shutil.copy(tmp_path / UNITS[0], tmp_path / f"nbd-vmdk@{escaped}.service")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"./nbd-vmdk@{escaped}.service", f"./{UNITS[1]}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=20", f"./{UNITS[0]}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout


def test_the_sandbox_lets_the_server_live(disk: Path) -> None:
    """What can be had of the sandbox without systemd: no new privileges, no memory that is both W and X."""
    text = Path(ROOT, "systemd", UNITS[0]).read_text()
    assert "MemoryDenyWriteExecute=yes" in text
    assert "NoNewPrivileges=yes" in text
    wrapper = (
        "import ctypes, os, sys; control = ctypes.CDLL(None).prctl; "
        "control(38, 1, 0, 0, 0); control(65, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", wrapper, *command("serve", disk, "--run", "nbdinfo --size $uri")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (f"{4 * MIB}\n", "")


# Numbers.


def work(uri: str) -> None:
    client = nbd.NBD()
    client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    client.connect_uri(uri)
    for at in range(3):
        client.pread(4096, at * 4096)
    client.pwrite(b"x" * 65536, MIB)
    client.pwrite(b"x" * 1000, 0)
    client.flush()
    client.zero(65536, MIB)
    client.trim(65536, 2 * MIB)
    client.cache(65536, 0)
    client.block_status(4 * MIB, 0, lambda *_: 0)
    client.set_strict_mode(0)
    assert errno_of(lambda: client.zero(MIB, MIB, nbd.CMD_FLAG_FAST_ZERO)) in (None, "ENOTSUP")
    client.shutdown()


def test_numbers_of_a_running_server(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with served(disk, "--socket", path, "--stats") as (uri, process):
        assert (tmp_path / "s.stats").stat().st_mode & 0o777 == 0o600
        work(uri)
        told = json.loads(vmdk("stats", path, "--json").stdout)
        requests: dict[str, Any] = told["exports"]["disk.vmdk"]["requests"]
        assert {
            kind: (each["count"], each["bytes"]) for kind, each in requests.items() if kind != "zero"
        } == {
            "read": (3, 3 * 4096),
            "write": (2, 66536),
            "flush": (1, 0),
            "trim": (1, 65536),
            "cache": (1, 65536),
            "extents": (1, 4 * MIB),
        }
        assert requests["zero"]["count"] == 2
        for each in requests.values():
            assert sum(each["histogram"]) == each["count"]
            assert 0 < each["longest"] <= each["seconds"]
        assert told["exports"]["disk.vmdk"]["commits"] >= 1
        assert told["cache"]["misses"] > 0
        # By its URI, its own process and the one above.
        for name in (uri, process.pid, told["pid"], f"{path}.stats"):
            assert json.loads(vmdk("stats", name, "--json").stdout)["pid"] == told["pid"]
        shown = vmdk("stats", path).stdout.splitlines()
        assert shown[0].split()[:4] == ["EXPORT", "REQUEST", "COUNT", "BYTES"]
        assert shown[1].split()[:5] == ["disk.vmdk", "read", "3", "12", "KiB"]
        text = vmdk("stats", path, "--prometheus").stdout
        assert 'nbd_vmdk_request_bytes_total{export="disk.vmdk",request="read"} 12288\n' in text
        assert text.count("# TYPE nbd_vmdk_request_duration_seconds histogram\n") == 1
        for line in text.splitlines():
            assert re.fullmatch(r'# (HELP|TYPE) .+|\w+(\{(\w+="[^"]*",?)+\})? [0-9.e+-]+', line), line
        check_histograms(text)
    said: str = process.said  # type: ignore[attr-defined]
    assert "commits: " in said
    assert said.startswith("EXPORT")
    assert not (tmp_path / "s.stats").exists()


def check_histograms(text: str) -> None:
    """Buckets only grow, and the last one holds all."""
    for kind in ("read", "write", "extents"):
        found = re.findall(rf'_bucket\{{export="disk.vmdk",request="{kind}",le="([^"]+)"\}} (\d+)', text)
        counts = [int(count) for _le, count in found]
        assert counts == sorted(counts)
        assert found[-1][0] == "+Inf"
        assert f'_count{{export="disk.vmdk",request="{kind}"}} {counts[-1]}\n' in text


def test_numbers_on_a_port_and_in_json(disk: Path) -> None:
    done = vmdk("serve", disk, "--port", 0, "--stats", "--run", "nbdcopy $uri null:")
    assert "read" in done.stderr
    with subprocess.Popen(
        command("serve", disk, "--port", 0, "--stats", "--json"), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        text = ""
        while not text.endswith("\n}\n"):
            text += process.stdout.readline()
        assert vmdk("stats", process.pid).stdout.startswith("no requests yet\n")
        process.terminate()
        assert json.loads(process.stdout.read())["stats"]["connections"]["total"] >= 1


def test_who_does_not_count(disk: Path, tmp_path: Path) -> None:
    with served(disk, "--socket", tmp_path / "s") as (uri, process):
        for name in (uri, process.pid, tmp_path / "s"):
            done = vmdk("stats", name, code=2)
            assert "--stats" in done.stderr
    for name in (tmp_path / "nothing", "nbd://localhost", "99999999"):
        vmdk("stats", name, code=2)
    saved = tmp_path / "saved.stats"
    saved.write_text("{}")
    for name, what in ((disk, "a file"), (saved, "a file"), (tmp_path, "a folder")):
        assert f"{name}: is {what}, and no server's socket" in vmdk("stats", name, code=2).stderr
    vmdk("stats", tmp_path / "s", "--json", "--prometheus", code=2)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "x.stats"))
    with pytest.raises(StorageError, match="refused"):
        asking.ask(str(tmp_path / "x"))
    with pytest.raises(OptionError):
        asking.ask(str(os.getpid()))


def test_quantiles() -> None:
    histogram = [0] * 26
    histogram[3], histogram[10], histogram[25] = 50, 49, 1
    request = {
        "count": 100,
        "histogram": histogram,
        "longest": 20.0,
        "seconds": 21.0,
        "bytes": 0,
        "errors": 0,
    }
    assert asking.quantile(request, 0.5) == 8e-6
    assert asking.quantile(request, 0.99) == 1024e-6
    assert asking.quantile(request, 1.0) == 20.0
    told: dict[str, Any] = {
        "exports": {'a "\x1b\n': {"commits": 0, "requests": {"read": request}}},
        "cache": {"hits": 0, "misses": 0},
        "connections": {"open": 0, "total": 0},
        "uptime": 10000.0,
    }
    assert "\x1b" not in "".join(table(told))
    assert 'export="a \\"\x1b\\n"' in "\n".join(asking.prometheus(told))


def test_a_server_that_was_killed_leaves_numbers_socket_and_all_to_the_next(
    disk: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with served(disk, "--socket", path, "--stats", code=-9) as (_, process):
        process.kill()
        process.wait()
    end = time.monotonic() + 10
    while size_of(f"nbd+unix:///?socket={path}")[0] == 0:
        assert time.monotonic() < end
    with served(disk, "--socket", path, "--stats") as (uri, _):
        work(uri)
        assert "read" in vmdk("stats", path).stdout


# The next server.


@pytest.mark.parametrize("encrypted", [False, True])
def test_who_finds_a_socket_taken_leaves_its_server_in_peace(
    disk: Path, tmp_path: Path, tls: Tls, encrypted: bool
) -> None:
    """A server sees its probe as a client, and one that just hangs up is an error in its log."""
    words = ["--tls-psk", tls.psk] if encrypted else []
    with served(disk, "-r", *words, "--socket", tmp_path / "s", "--max-connections", 3) as (_uri, process):
        for _ in range(8):
            begin = time.monotonic()
            with pytest.raises(InUse, match="a server answers there"):
                listen_unix(tmp_path / "s")
            assert time.monotonic() - begin < 0.9
        done = vmdk("serve", disk, "-r", "--socket", tmp_path / "s", code=5)
        assert "name another socket" in done.stderr
    assert process.said == ""  # type: ignore[attr-defined]


def test_a_taken_socket_of_something_else(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        other.listen()
        # Who says nothing is not waited for.
        begin = time.monotonic()
        with pytest.raises(InUse):
            listen_unix(tmp_path / "s")
        assert 0.9 < time.monotonic() - begin < 10
