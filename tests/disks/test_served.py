"""Many disks on one real server: the list, the names, the contents, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.errors import Closed, FileMissing, OptionError, VmdkError
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.plugin.exports import open_exports
from nbd_vmdk.serving.server import serve
from tests.disks import content, dictionary, plugged, shown, sparse, stream
from tests.images import desc, ova
from tests.images.content import MIB
from tests.plugin import PLUGIN, ROOT, Nbdkit, errno_of, nbd, refusal


def vmdk(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "nbd_vmdk", *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def exports_of(server: Nbdkit) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["nbdinfo", "--list", "--json", server.uri], capture_output=True, text=True, check=True
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)["exports"]
    return found


@pytest.fixture
def appliance(tmp_path: Path) -> str:
    """Two disks, one of them compressed once more."""
    disks = [ova.Disk(stream(tmp_path / "in", name).path, MIB, gzip=name == "two") for name in ("one", "two")]
    return ova.write_ova(str(tmp_path / "app.ova"), disks).path


def test_an_appliance_and_a_machine(nbdkit: Any, tmp_path: Path, appliance: str) -> None:
    base = sparse(tmp_path / "vm", "disk")
    desc.monolithic_sparse(str(tmp_path / "vm"), "disk-000001", content("child"), parent=base)
    vmx = dictionary(tmp_path / "vm" / "vm.vmx", plugged(scsi0_0="disk-000001.vmdk"))
    server: Nbdkit = nbdkit(appliance, f"file={vmx}")
    found = exports_of(server)
    assert [(each["export-name"], each["export-size"], each["is_read_only"]) for each in found] == [
        ("one.vmdk", MIB, True),
        ("two.vmdk", MIB, True),
        ("disk-000001.vmdk", MIB, False),
    ]
    assert [each["description"] for each in found] == [
        "VMware disk, streamOptimized",
        "VMware disk, streamOptimized",
        "VMware disk, monolithicSparse, 2 links",
    ]
    for name, words in (("", "one"), ("one.vmdk", "one"), ("two.vmdk", "two"), ("disk-000001.vmdk", "child")):
        connection = server.connect(name)
        assert bytes(connection.pread(MIB, 0)) == content(words).read()
    connection.pwrite(b"written", 4096)
    assert errno_of(lambda: server.connect("one.vmdk").pwrite(b"x", 0)) == "EPERM"
    for name in ("three.vmdk", "app.ova", "../in/one.vmdk", "/etc/passwd", appliance, "one.vmdk\0"):
        with pytest.raises((nbd.Error, ValueError)):
            server.connect(name)
    assert server.stop() == 0
    with open_disk(vmx) as disk:
        assert disk.pread(7, 4096) == b"written"


def test_names_that_clash_and_the_table(tmp_path: Path) -> None:
    images = [sparse(tmp_path / folder, "disk", folder).path for folder in ("a", "b")]
    command = 'for u in $uris; do nbdcopy "$u" - | sha256sum; done; test "$uri" = "${uris%% *}" && echo yes'
    done = vmdk("serve", "-r", *images, "--run", command)
    digests = [hashlib.sha256(content(name).read()).hexdigest() for name in ("a", "b")]
    assert done.stdout.split() == [digests[0], "-", digests[1], "-", "yes"]
    done = vmdk("serve", "-r", *images, "--snapshot", "x", code=2)
    assert "only of a machine" in done.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "nbd_vmdk", "serve", "-r", *images], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    rows = [process.stdout.readline().split() for _ in range(3)]
    process.terminate()
    assert process.wait(20) == 0
    process.stdout.close()
    assert rows[0] == ["NAME", "SIZE", "KIND", "MODE", "URI"]
    assert [row[:5] for row in rows[1:]] == [
        [f"{name}/disk.vmdk", "1", "MiB", "monolithicSparse", "ro"] for name in ("a", "b")
    ]
    assert rows[1][5].startswith("nbd+unix:///a%2Fdisk.vmdk?socket=")


def test_from_python(tmp_path: Path, appliance: str) -> None:
    import asyncio

    async def main() -> None:
        async with serve([appliance, tmp_path / "in" / "one.vmdk"], read_only=True) as server:
            assert [(each.name, each.size, each.kind) for each in server.exports] == [
                (name, MIB, "streamOptimized") for name in ("app.ova/one.vmdk", "two.vmdk", "in/one.vmdk")
            ]
            assert {each.description for each in server.exports} == {"VMware disk, streamOptimized"}
            assert server.uri == server.uris[0]
            assert "/two.vmdk?" in server.uris[1]

    asyncio.run(main())


def test_a_disk_with_a_smallest_write_says_so(nbdkit: Any, tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    site = f"import os, sys; sys.path[:0] = [{ROOT!r}, os.environ.get('NBD_VMDK_SITE', '')]"
    patch = "from nbd_vmdk.extents.base import WritableExtent; WritableExtent.minimum_block = 4096"
    plugin.write_text(f"{site}\n{patch}\nfrom nbd_vmdk.plugin.callbacks import *\n")
    image = sparse(tmp_path, "disk").path
    for options, smallest in (((), 4096), (("-r",), 1)):
        server: Nbdkit = nbdkit(image, plugin=str(plugin), options=options)
        assert server.connect().get_block_size(nbd.SIZE_MINIMUM) == smallest
        assert server.stop() == 0


def test_a_snapshot_is_read_only(tmp_path: Path) -> None:
    base = sparse(tmp_path, "disk")
    desc.monolithic_sparse(str(tmp_path), "disk-000001", content("child"), parent=base)
    vmx = dictionary(tmp_path / "vm.vmx", plugged(scsi0_0="disk-000001.vmdk"))
    said = {"uid": "1", "displayName": "before", "disk0.fileName": "disk.vmdk"}
    dictionary(tmp_path / "vm.vmsd", {f"snapshot0.{key}": value for key, value in said.items()})
    done = vmdk("serve", vmx, "--snapshot", "before", "--run", 'nbdinfo --json "$uri"')
    (found,) = json.loads(done.stdout)["exports"]
    assert (found["export-name"], found["is_read_only"]) == ("disk.vmdk", True)
    assert "snapshot's disk is served read-only" in done.stderr
    done = vmdk("serve", vmx, "--snapshot", "before", "--write-parent", "--run", 'nbdinfo --json "$uri"')
    assert json.loads(done.stdout)["exports"][0]["is_read_only"] is False


# What can't be opened


def test_no_half_start(tmp_path: Path) -> None:
    good = sparse(tmp_path, "good").path
    (tmp_path / "bad.vmdk").write_bytes(b"KDMV" + bytes(1000))
    done = vmdk("serve", str(tmp_path), "--run", "touch " + str(tmp_path / "ran"), code=1)
    assert done.stderr.startswith(f"error: {tmp_path}/bad.vmdk: ")
    assert "bad.vmdk" in refusal("python", PLUGIN, f"file={good}", f"file={tmp_path}/bad.vmdk")
    assert not (tmp_path / "ran").exists()
    # Nothing is held: the good one can be written.
    with open_disk(good, writable=True) as disk:
        assert disk.writable
    done = vmdk("serve", str(tmp_path), "--skip-broken", "--run", 'nbdinfo --size "$uri"')
    assert done.stdout == f"{MIB}\n"
    assert f"warning: left out: {tmp_path}/bad.vmdk: " in done.stderr
    os.unlink(good)
    assert "bad.vmdk" in vmdk("serve", str(tmp_path), "--skip-broken", "--run", "true", code=1).stderr


def test_opening_is_all_or_nothing(tmp_path: Path) -> None:
    good = sparse(tmp_path, "good").path
    with pytest.raises(FileMissing):
        open_exports([good, tmp_path / "gone.vmdk"], OpenOptions(writable=True))
    sparse(tmp_path, "other")
    with pytest.raises(OptionError, match="one parent for 2 disks"):
        open_exports([tmp_path], OpenOptions(parent=good))
    exports = open_exports([tmp_path], OpenOptions(writable=True))
    assert list(exports.disks) == ["good.vmdk", "other.vmdk"]
    assert exports.get("") is exports.get("good.vmdk")
    assert exports.get("/good.vmdk") is None
    assert exports.get(good) is None
    caches = {id(disk._cache) for disk in exports.disks.values()}
    assert len(caches) == 1
    assert exports.close() == []


def test_closing_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        sparse(tmp_path, name)
    exports = open_exports([tmp_path], OpenOptions(writable=True))
    disks = list(exports.disks.values())

    def fail() -> None:
        type(disks[0]).close(disks[0])
        raise VmdkError("a.vmdk", why="no space")

    monkeypatch.setattr(disks[0], "close", fail)
    assert [str(error) for error in exports.close()] == ["a.vmdk: no space"]
    for disk in disks:
        with pytest.raises(Closed):
            disk.flush()


def test_many_disks_read_at_once(tmp_path: Path, appliance: str) -> None:
    """Disks of one archive share nothing but the cache."""
    exports = open_exports([appliance], OpenOptions())
    wrong: list[str] = []

    def read(name: str) -> None:
        wanted = content(name).read()
        wrong.extend(name for _ in range(20) if exports.disks[f"{name}.vmdk"].pread(MIB, 0) != wanted)

    threads = [threading.Thread(target=read, args=(name,)) for name in ("one", "two") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert exports.close() == []
    assert shown(f"{appliance}:two.vmdk") == "two"
