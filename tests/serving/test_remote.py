"""Far clients: TLS that is required, strangers who are refused, who can reach the server at all."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import socket
import stat
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from nbd_vmdk import Work, client, convert, create_image, open_disk
from nbd_vmdk.errors import FileMissing, NbdError, OptionError, StorageError
from nbd_vmdk.serving import listener as listener_module
from nbd_vmdk.serving.listener import listen_tcp, listen_unix
from nbd_vmdk.serving.server import ServerTls, serve
from tests.plugin import nbd
from tests.serving import qemu_size, served, size_of, vmdk
from tests.serving.certificates import keys
from tests.serving.conftest import MIB, Tls


def with_query(uri: str, query: str, user: str = "") -> str:
    uri = uri.replace("://", f"://{user}@") if user else uri
    return uri + ("&" if "?" in uri else ("?" if urlsplit(uri).path else "/?")) + query


def trusting(uri: str, folder: Path) -> str:
    return with_query(uri, f"tls-certificates={quote(str(folder))}")


def knowing(uri: str, psk: Path, user: str = "alice") -> str:
    return with_query(uri, f"tls-psk-file={quote(str(psk))}", user)


def plaintext(uri: str) -> str:
    return uri.replace("nbds", "nbd", 1)


def test_converting_from_an_encrypted_server_and_into_one(disk: Path, tls: Tls, tmp_path: Path) -> None:
    copy = tmp_path / "copy.vmdk"
    with served(disk, "--port", 0, "--tls-certificates", tls.server) as (uri, _):
        assert convert(trusting(uri, tls.trusting), copy).data
        for way in (uri, trusting(uri, tls.stranger)):
            with pytest.raises(NbdError, match="verif") as refused:
                convert(way, tmp_path / "none.vmdk")
            assert way != uri or "?tls-certificates=" in (refused.value.hint or "")
        assert not (tmp_path / "none.vmdk").exists()
    new = create_image(tmp_path / "new.vmdk", 4 * MIB)
    with served(tmp_path / new.files[-1].path, "--port", 0, "--tls-psk", tls.psk) as (uri, _):
        with pytest.raises(NbdError):
            convert(copy, uri)
        convert(copy, knowing(uri, tls.psk), work=Work(verify=True))
    with open_disk(disk) as one, open_disk(tmp_path / "new.vmdk") as two:
        assert one.pread(one.size, 0) == two.pread(two.size, 0)


def test_certificates(disk: Path, tls: Tls) -> None:
    with served(disk, "--port", 0, "--tls-certificates", tls.server) as (uri, _):
        assert uri.startswith("nbds://127.0.0.1:")
        assert size_of(trusting(uri, tls.trusting)) == (0, str(4 * MIB))
        code, said = size_of(plaintext(uri))
        assert code != 0
        assert "TLS" in said
        # The wrong authority: the client does not trust this server.
        assert size_of(trusting(uri, tls.stranger))[0] != 0

        # QEMU as well, and it writes.
        port = urlsplit(uri).port
        place = f"driver=nbd,host=127.0.0.1,port={port},tls-creds=t"
        creds = ["--object", f"tls-creds-x509,id=t,endpoint=client,dir={tls.trusting}"]
        assert qemu_size(*creds, "--image-opts", place) == 0
        assert qemu_size("--image-opts", f"driver=nbd,host=127.0.0.1,port={port}") != 0
        strange = ["--object", f"tls-creds-x509,id=t,endpoint=client,dir={tls.stranger}"]
        assert qemu_size(*strange, "--image-opts", place) != 0


def test_peers_are_verified(disk: Path, tls: Tls) -> None:
    words = ("--tls-certificates", tls.server, "--tls-verify-peer")
    with served(disk, "--port", 0, *words) as (uri, _):
        assert size_of(trusting(uri, tls.client)) == (0, str(4 * MIB))
        assert size_of(trusting(uri, tls.trusting))[0] != 0  # shows no certificate
        assert size_of(trusting(uri, tls.impostor))[0] != 0  # shows one of somebody else's
        port = urlsplit(uri).port
        place = f"driver=nbd,host=127.0.0.1,port={port},tls-creds=t"
        for folder, code in ((tls.client, 0), (tls.impostor, 1)):
            creds = ["--object", f"tls-creds-x509,id=t,endpoint=client,dir={folder}"]
            assert qemu_size(*creds, "--image-opts", place) == code


def test_keys_on_a_unix_socket(disk: Path, tls: Tls, tmp_path: Path) -> None:
    with served(disk, "--socket", tmp_path / "s", "--tls-psk", tls.psk, "--json") as (_, process):
        uri = f"nbds+unix:///?socket={tmp_path}/s"
        assert process.stdout is not None
        told: Any = None
        text = "{"
        while told is None:
            text += process.stdout.readline()
            try:
                told = json.loads(text)
            except ValueError:
                pass
        assert told["exports"][0] == {
            "name": "disk.vmdk",
            "uri": uri,
            "size": 4 * MIB,
            "kind": "monolithicSparse",
            "description": "VMware disk, monolithicSparse",
            "read-only": False,
        }
        assert size_of(knowing(uri, tls.psk)) == (0, str(4 * MIB))
        assert size_of(knowing(uri, tls.psk, "bob")) == (0, str(4 * MIB))
        assert size_of(knowing(uri, tls.psk, "eve"))[0] != 0
        assert size_of(knowing(uri, tls.wrong))[0] != 0
        assert "TLS" in size_of(plaintext(uri))[1]


def test_a_command_gets_a_uri_that_works(disk: Path, tls: Tls) -> None:
    for words in (("--tls-psk", tls.psk), ("--tls-certificates", tls.server, "--port", 0)):
        done = vmdk("serve", disk, *words, "--run", 'nbdinfo --size "$uri"')
        assert done.stdout == f"{4 * MIB}\n"


def test_many_disks_keep_their_names(disk: Path, tls: Tls, tmp_path: Path) -> None:
    vmdk("create", tmp_path / "two.vmdk", "1M")

    async def main() -> None:
        async with serve([disk, tmp_path / "two.vmdk"], tls=ServerTls(psk=tls.psk)) as server:
            assert [(each.name, each.size) for each in server.exports] == [
                ("disk.vmdk", 4 * MIB),
                ("two.vmdk", MIB),
            ]
            assert [size_of(uri) for uri in server.local_uris] == [(0, str(4 * MIB)), (0, str(MIB))]
            async with client.connect(server.local_uris[1]) as ours:
                assert ours.size == MIB
            assert all(uri.startswith("nbds+unix:///") for uri in server.uris)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("missing", "hint"),
    [("ca-cert.pem", "clients trust"), ("server-cert.pem", "this server"), ("server-key.pem", "private key")],
)
def test_files_that_are_missing(disk: Path, tls: Tls, tmp_path: Path, missing: str, hint: str) -> None:
    folder = tmp_path / "tls"
    folder.mkdir()
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        if name != missing:
            (folder / name).write_bytes((tls.server / name).read_bytes())
    done = vmdk("serve", disk, "--tls-certificates", folder, code=1)
    assert done.stderr.startswith(f"error: {folder / missing}: no such file\nhint: ")
    assert hint in done.stderr


def test_files_that_are_wrong(disk: Path, tls: Tls, tmp_path: Path) -> None:
    for text, why in (("", "holds no key"), ("alice\n", "no NAME:HEX"), ("alice:xyz\n", "no NAME:HEX")):
        (tmp_path / "psk").write_text(text)
        with pytest.raises(OptionError, match=why):
            ServerTls(psk=tmp_path / "psk").check()
    (tmp_path / "psk").write_text("# a comment\n\nalice:00ff\n")
    (tmp_path / "psk").chmod(0o644)
    (warning,) = ServerTls(psk=tmp_path / "psk").check()
    assert "chmod 600" in warning
    with pytest.raises(FileMissing) as missing:
        ServerTls(psk=tmp_path / "nothing").check()
    assert "psktool" in str(missing.value.hint)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OptionError, match="no regular file"):
        ServerTls(psk=tmp_path / "fifo").check()
    with pytest.raises(OptionError, match="no folder"):
        ServerTls(certificates=tmp_path / "psk").check()
    folder = tmp_path / "tls"
    folder.mkdir()
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        (folder / name).write_bytes((tls.server / name).read_bytes())
    (folder / "server-key.pem").chmod(0o640)
    (warning,) = ServerTls(certificates=folder).check()
    assert "server-key.pem" in warning
    (folder / "server-cert.pem").write_text("not at all")
    with pytest.raises(OptionError, match="PEM"):
        ServerTls(certificates=folder).check()
    # What only GnuTLS can tell stops the server, with its words.
    (folder / "server-cert.pem").write_bytes((tls.client / "client-cert.pem").read_bytes())
    done = vmdk("serve", disk, "--tls-certificates", folder, code=1)
    assert done.stderr.startswith("error: loading server certificate and key")
    assert "do not match" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    if os.geteuid() != 0:
        (folder / "server-key.pem").chmod(0)
        with pytest.raises(StorageError, match="denied"):
            ServerTls(certificates=folder).check()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--tls-verify-peer"], "without certificates"),
        (["--tls-psk", "x", "--tls-verify-peer"], "none"),
        (["--tls-psk", "x", "--tls-certificates", "y"], "not both"),
        (["--socket-mode", "0660"], "has a name"),
        (["--socket-group", "root"], "has a name"),
        (["--socket", "s", "--socket-mode", "8"], "no mode"),
        (["--socket", "s", "--socket-mode", "1777"], "no mode"),
        (["--socket", "s", "--socket-group", "no such group"], "no group"),
        (["--socket", "s", "--vsock", "1"], "not on both"),
        (["--max-connections", "0"], "--max-connections"),
    ],
)
def test_what_makes_no_sense(disk: Path, words: list[str], why: str) -> None:
    assert why in vmdk("serve", disk, *words, code=2).stderr


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "::ffff:192.0.2.1"])
def test_what_others_can_reach_is_refused(disk: Path, address: str) -> None:
    done = vmdk("serve", disk, "--port", 0, "--bind", address, code=2)
    assert "others can reach" in done.stderr
    assert "--insecure" in done.stderr


def test_names_are_resolved_before_they_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(OptionError, match=r"192\.0\.2\.7"):
        listen_tcp("localhost", 0, insecure=False)
    monkeypatch.undo()
    for host in ("localhost", "127.0.0.1", "127.8.9.1", "::1"):
        try:
            made = listen_tcp(host, 0, insecure=False)
        except OptionError as error:
            assert host == "::1", error  # noqa: PT017  a machine without IPv6
            continue
        assert not made.public
        made.remove()


def test_insecure_is_warned_of(disk: Path, tls: Tls) -> None:
    with served(disk, "--port", 0, "--bind", "0.0.0.0", "--insecure") as (uri, process):
        assert uri.startswith("nbd://localhost:")
        assert size_of(uri)[0] == 0
    assert "anyone who can reach" in process.said  # type: ignore[attr-defined]
    with served(disk, "--port", 0, "--bind", "0.0.0.0", "--tls-psk", tls.psk) as (uri, process):
        assert size_of(knowing(uri, tls.psk))[0] == 0
    assert process.said == ""  # type: ignore[attr-defined]


def test_a_name_is_what_a_certificate_is_for(disk: Path, tls: Tls) -> None:
    words = ("--bind", "localhost", "--tls-certificates", tls.server)
    with served(disk, "--port", 0, *words) as (uri, _):
        assert uri.startswith("nbds://localhost:")
        assert size_of(trusting(uri, tls.trusting))[0] == 0


def test_a_limit_of_connections(disk: Path) -> None:
    with served(disk, "--max-connections", 2) as (uri, _):
        for _ in range(3):  # those that went make room
            one, two, three = nbd.NBD(), nbd.NBD(), nbd.NBD()
            one.connect_uri(uri)
            two.connect_uri(uri)
            with pytest.raises(nbd.Error):
                three.connect_uri(uri)
            assert one.pread(512, 0) == bytes(512)
            for each in (one, two):
                each.shutdown()
            del one, two, three
            end = time.monotonic() + 5
            while size_of(uri)[0] != 0:
                assert time.monotonic() < end


def test_a_socket_for_a_group(disk: Path, tmp_path: Path) -> None:
    group = next(each for each in grp.getgrall() if each.gr_gid in (os.getgroups() or [os.getgid()]))
    path = tmp_path / "s"
    with served(disk, "--socket", path, "--socket-mode", "0620", "--socket-group", group.gr_name):
        there = path.stat()
        assert stat.S_IMODE(there.st_mode) == 0o620
        assert there.st_gid == group.gr_gid
    assert not path.exists()


def test_a_socket_that_can_not_be_given_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(StorageError, match="not permitted"):
        listen_unix(tmp_path / "s", group=12345)
    assert not (tmp_path / "s").exists()


def has_vsock() -> bool:
    try:
        socket.socket(socket.AF_VSOCK).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_vsock(), reason="this kernel has no vsock")
def test_vsock(disk: Path, tls: Tls) -> None:
    assert "others can reach vsock" in vmdk("serve", disk, "--vsock", 7809, code=2).stderr
    with served(disk, "--vsock", 7809, "--insecure") as (uri, _):
        assert uri == "nbd+vsock://2:7809"
        done = vmdk("serve", disk, "-r", "--vsock", 7809, "--insecure", code=5)
        assert "in use" in done.stderr
        # A machine can seldom call itself; where it can (vsock_loopback), it gets the disk.
        calling = socket.socket(socket.AF_VSOCK)
        calling.settimeout(0.2)
        try:
            calling.connect((1, 7809))
        except OSError:
            return
        finally:
            calling.close()
        client = nbd.NBD()
        client.connect_vsock(1, 7809)
        assert client.get_size() == 4 * MIB


def test_no_vsock(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(listener_module.socket, "socket", none)
    with pytest.raises(OptionError, match="no vsock") as told:
        listener_module.listen_vsock(1, insecure=True)
    assert "modprobe" in str(told.value.hint)


def test_the_user_of_a_key_is_quoted(tmp_path: Path) -> None:
    assert ServerTls(psk=keys(tmp_path / "psk", "a b", "c")).user() == "a%20b"
