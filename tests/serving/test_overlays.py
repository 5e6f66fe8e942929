"""Disks that stay as they are while they are written to: --scratch and --overlay, by real servers."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.errors import ContentIdMismatch, OptionError, ParentNotFound
from nbd_vmdk.ops.overlay import make_scratch
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.plugin.exports import open_exports
from nbd_vmdk.serving.scratch import ScratchFolder, scratch_place
from nbd_vmdk.serving.server import serve
from nbd_vmdk.vm import locate
from tests.disks import content, dictionary, plugged, shown, sparse, stream
from tests.images import desc, ova
from tests.images.content import MIB
from tests.plugin import errno_of, nbd
from tests.serving import command, served, vmdk

Make = Callable[[Path], str]


def _member(folder: Path) -> str:
    disks = [ova.Disk(stream(folder / "in", name).path, MIB) for name in ("one", "two")]
    return ova.write_ova(str(folder / "app.ova"), disks).path + ":two.vmdk"


def _child(folder: Path) -> str:
    base = sparse(folder, "base")
    return desc.monolithic_sparse(str(folder), "child", content("two"), parent=base).path


MAKERS: dict[str, Make] = {
    "stream": lambda folder: stream(folder, "two").path,
    "member": _member,
    "child": _child,
    "sesparse": lambda folder: desc.se_sparse(str(folder), "two", content("two")).path,
    "flat": lambda folder: desc.monolithic_flat(str(folder), "two", content("two")).path,
}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def connect(uri: str) -> nbd.NBD:
    client = nbd.NBD()
    client.connect_uri(uri)
    return client


def write_to(uri: str) -> None:
    """What must be read again, all over a small disk: parts of grains, zeros, holes."""
    client = connect(uri)
    assert not client.is_read_only()
    client.pwrite(b"new!", 512)
    client.pwrite(b"n" * 4096, MIB - 4096)
    client.zero(65536, MIB // 2)
    client.trim(65536, MIB // 4)
    client.flush()
    check(client)
    client.shutdown()


def check(client: nbd.NBD) -> None:
    expected = bytearray(content("two").read(0, MIB))
    expected[512:516] = b"new!"
    expected[MIB - 4096 :] = b"n" * 4096
    expected[MIB // 2 : MIB // 2 + 65536] = bytes(65536)
    expected[MIB // 4 : MIB // 4 + 65536] = bytes(65536)
    assert client.pread(MIB, 0) == expected


@pytest.mark.parametrize("kind", ["member", "child", "sesparse", "flat"])
def test_scratch(tmp_path: Path, kind: str) -> None:
    (tmp_path / "images").mkdir()
    image = MAKERS[kind](tmp_path / "images")
    before = everything(tmp_path / "images")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with served(image, "--scratch", "--scratch-dir", scratch) as (uri, process):
        write_to(uri)
        check(connect(uri))
        (folder,) = scratch.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(list(folder.iterdir())) == 1
    assert process.said == ""  # type: ignore[attr-defined]
    assert list(scratch.iterdir()) == []
    assert everything(tmp_path / "images") == before
    assert shown(image) == "two"


@pytest.mark.parametrize("kind", ["member", "child", "stream"])
def test_a_kept_overlay(tmp_path: Path, kind: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    image = MAKERS[kind](images)
    before = everything(images)
    for path in (*images.rglob("*"), images):
        path.chmod(path.stat().st_mode & ~0o222)
    child = tmp_path / "child.vmdk"
    with served(image, "--overlay", child) as (uri, _):
        write_to(uri)
    assert child.exists()
    # Later it is served again, whatever it stands on.
    with served(image, "--overlay", child) as (uri, process):
        check(connect(uri))
    assert process.said == ""  # type: ignore[attr-defined]
    assert everything(images) == before
    # By itself it is never taken for a whole disk.
    if kind == "member":
        with pytest.raises(ParentNotFound):
            open_disk(child, allow_dirs=[images])
        how: dict[str, object] = {"parent": image}
    else:
        how = {"allow_dirs": [images]}
    with open_disk(child, **how) as disk:
        assert disk.pread(4, 512) == b"new!"
        assert disk.pread(3, 0) == b"two"
    vmdk("check", child, *(("--parent", image) if kind == "member" else ("--allow-dir", images)))
    for path in (images, *images.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)


def test_an_overlay_beside_its_image_needs_nothing_more(tmp_path: Path) -> None:
    image = sparse(tmp_path, "two").path
    with served(image, "--overlay", tmp_path / "child.vmdk") as (uri, process):
        write_to(uri)
    assert process.said == ""  # type: ignore[attr-defined]
    with open_disk(tmp_path / "child.vmdk") as disk:
        assert disk.pread(4, 512) == b"new!"
    # It is a child like any other: its parent is protected from then on.
    assert "parent of child.vmdk" in vmdk("serve", image, code=1).stderr
    done = subprocess.run(["qemu-img", "compare", image, tmp_path / "child.vmdk"], check=False)
    assert done.returncode == 1


def test_an_image_that_changed_is_not_the_overlays_any_more(tmp_path: Path) -> None:
    image = sparse(tmp_path, "two").path
    child = tmp_path / "elsewhere" / "child.vmdk"
    child.parent.mkdir()
    with served(image, "--overlay", child):
        pass
    with open_disk(image, writable=True) as disk:
        disk.pwrite(b"x", 0)

    async def main() -> None:
        async with serve(image, overlay=child):
            pass

    with pytest.raises(ContentIdMismatch):
        asyncio.run(main())


def test_only_what_is_kept_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, top = sparse(tmp_path, "two").path, str(tmp_path / "top.vmdk")
    make_scratch(top, locate(image), OpenOptions())
    synced: list[int] = []
    really = os.fdatasync

    def watched(fd: int) -> None:
        synced.append(fd)
        really(fd)

    monkeypatch.setattr(os, "fdatasync", watched)
    for scratch in (True, False):
        exports = open_exports([image], OpenOptions(writable=True), overlays=[top], scratch=scratch)
        disk = exports.get("two.vmdk")
        assert disk is not None
        disk.pwrite(b"x" * 65536, 0)
        disk.flush()
        assert exports.close() == []
        assert bool(synced) is not scratch


def test_every_disk_has_its_own(tmp_path: Path) -> None:
    """A machine, with its snapshot's disk among them, and an appliance that can't be written at all."""
    base = sparse(tmp_path / "vm", "base")
    desc.monolithic_sparse(str(tmp_path / "vm"), "top", content("top"), parent=base)
    vmx = dictionary(tmp_path / "vm" / "vm.vmx", plugged(scsi0_0="top.vmdk"))
    appliance = _member(tmp_path).removesuffix(":two.vmdk")
    before = everything(tmp_path)
    words = [vmx, appliance, base.path, "--scratch", "--json"]
    process = subprocess.Popen(command("serve", *words), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        text = ""
        while not text.endswith("\n}\n"):
            text += process.stdout.readline()
        exports = json.loads(text)["exports"]
        assert [each["name"] for each in exports] == ["top.vmdk", "one.vmdk", "two.vmdk", "base.vmdk"]
        assert not any(each["read-only"] for each in exports)
        assert [each["kind"] for each in exports][1:3] == ["streamOptimized"] * 2
        clients = [connect(each["uri"]) for each in exports]
        for number, client in enumerate(clients):
            client.pwrite(bytes([number]) * 4096, 4096)
        assert [client.pread(4096, 4096)[:1] for client in clients] == [b"\0", b"\1", b"\2", b"\3"]
        assert clients[0].pread(4, 0).startswith(b"top")
        assert clients[3].pread(4, 0) == b"base"
        clients.clear()
    finally:
        process.terminate()
        assert process.wait(20) == 0
        process.stdout.close()
    assert everything(tmp_path) == before


def test_broken_ones_are_left_out(tmp_path: Path) -> None:
    good = sparse(tmp_path, "two").path
    bad = tmp_path / "bad.vmdk"
    bad.write_bytes(b"KDMV" + bytes(60))
    with served(bad, good, "--scratch", "--skip-broken") as (uri, process):
        write_to(uri)
    said: str = process.said  # type: ignore[attr-defined]
    assert said.startswith(f"warning: left out: {bad}: ")
    assert len(said.splitlines()) == 1
    assert "bad.vmdk" in vmdk("serve", bad, good, "--scratch", code=1).stderr


def test_without_a_content_id(tmp_path: Path) -> None:
    """Such a disk has nothing that a kept overlay could hold on to; a scratch one needs nothing."""
    path = Path(sparse(tmp_path, "two", cid="ffffffff").path)
    before = path.read_bytes()
    with served(path, "--scratch") as (uri, process):
        write_to(uri)
    assert process.said == ""  # type: ignore[attr-defined]
    done = vmdk("serve", path, "--overlay", tmp_path / "child.vmdk", code=1)
    assert "content ID" in done.stderr
    assert not (tmp_path / "child.vmdk").exists()
    assert path.read_bytes() == before


def test_an_image_that_somebody_writes(tmp_path: Path) -> None:
    image = sparse(tmp_path, "two").path
    with open_disk(image, writable=True, locks=True):
        done = vmdk("serve", image, "--overlay", tmp_path / "c" / ".." / "child.vmdk", code=5)
    assert "nobody changes" in done.stderr


def test_a_read_only_reader_is_no_hindrance(tmp_path: Path) -> None:
    image = sparse(tmp_path, "two").path
    with served(image, "-r"), served(image, "--scratch") as (uri, _):
        write_to(uri)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--scratch", "--overlay", "c.vmdk"], "not both"),
        (["--scratch", "-r"], "takes writes"),
        (["--overlay", "c.vmdk", "-r"], "takes writes"),
        (["--scratch-dir", "/tmp"], "needs --scratch"),
        (["--scratch", "--parent", "p.vmdk"], "--parent"),
        (["--scratch", "--scratch-dir", "/no such folder"], "no folder"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, words: list[str], why: str) -> None:
    assert why in vmdk("serve", sparse(tmp_path, "two").path, *words, code=2).stderr


def test_a_whole_disk_is_no_overlay(tmp_path: Path) -> None:
    image, precious = sparse(tmp_path, "two").path, Path(sparse(tmp_path, "precious").path)
    before = precious.read_bytes()
    assert "is no overlay" in vmdk("serve", image, "--overlay", precious, code=2).stderr
    assert "is no overlay" in vmdk("serve", image, "--overlay", image, code=2).stderr
    (tmp_path / "text").write_text("something else")
    vmdk("serve", image, "--overlay", tmp_path / "text", code=2)
    assert precious.read_bytes() == before
    # Nor is a child of another disk an overlay of this one.
    base = sparse(tmp_path, "base", cid="12345678")
    child = desc.monolithic_sparse(str(tmp_path), "child", content("child"), parent=base)
    assert "content ID" in vmdk("serve", image, "--overlay", child.path, code=1).stderr


def test_one_overlay_for_one_disk(tmp_path: Path) -> None:
    one, two = sparse(tmp_path, "one").path, sparse(tmp_path, "two").path
    done = vmdk("serve", one, two, "--overlay", tmp_path / "child.vmdk", code=2)
    assert "one overlay for 2 disks" in done.stderr


def test_a_client_learns_that_the_place_is_full(tmp_path: Path) -> None:
    """ENOSPC of the scratch folder's file system reaches the client; its limit on file size stands for it."""
    image = tmp_path / "big.vmdk"
    vmdk("create", image, "64M")

    def limited() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))

    with served(image, "--scratch", preexec_fn=limited) as (uri, _):
        client = connect(uri)
        written = [errno_of(lambda at=at: client.pwrite(b"x" * MIB, at * MIB)) for at in range(8)]
        assert written[0] is None
        assert written[-1] == "ENOSPC"
        client = connect(uri)
        assert client.pread(4, 0) == b"xxxx"


def test_what_a_crash_leaves_the_next_one_removes(tmp_path: Path) -> None:
    image = sparse(tmp_path / "images", "two").path
    place = tmp_path / "scratch"
    place.mkdir()
    (place / "nbd-vmdk-scratch-mine").write_text("a file of the user's is none of ours")
    with served(image, "--scratch", "--scratch-dir", place, code=-9) as (_, process):
        process.kill()
        process.wait()
    (left,) = [path for path in place.iterdir() if path.is_dir()]
    assert (left / "0.vmdk").exists()
    with ScratchFolder(place) as folder:
        assert not left.exists()
        # One that is held stays.
        with ScratchFolder(place):
            assert os.path.isdir(folder.path)
    assert [path.name for path in place.iterdir()] == ["nbd-vmdk-scratch-mine"]


def test_somebody_elses_and_links_are_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "nbd-vmdk-scratch-link").symlink_to("precious")
    other = tmp_path / "nbd-vmdk-scratch-other"
    other.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: 12345)
        ScratchFolder(tmp_path).remove()
    assert other.exists()
    held = os.open(other, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    ScratchFolder(tmp_path).remove()
    assert other.exists()
    os.close(held)
    ScratchFolder(tmp_path).remove()
    assert not other.exists()
    assert (tmp_path / "precious" / "file").exists()


def test_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert scratch_place() == str(tmp_path)
    monkeypatch.delenv("TMPDIR")
    assert scratch_place() == "/var/tmp"
    with pytest.raises(OptionError, match="no folder"):
        ScratchFolder(tmp_path / "nowhere")
