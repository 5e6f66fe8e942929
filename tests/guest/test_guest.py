"""What people do with it: a Linux guest makes file systems on our disks, and finds its files again."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbd_vmdk.attaching.devices import client_command
from nbd_vmdk.attaching.places import place_of
from tests.guest import Guest
from tests.serving.conftest import Tls, tls

__all__ = ["tls"]

_SIZE = "128M"


@contextmanager
def served(image: Path, *options: str) -> Iterator[str]:
    """The URI of an image that ``nbd-vmdk serve`` serves; it must end cleanly."""
    command = [sys.executable, "-m", "nbd_vmdk", "serve", "--json", *options, str(image)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = ""
        try:
            for line in process.stdout:
                text += line
                if line == "}\n":
                    break
            assert text, process.communicate()[1]
            yield json.loads(text)["exports"][0]["uri"]
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


def drive(uri: str) -> tuple[str, ...]:
    """QEMU's options for a disk whose NBD client is QEMU itself."""
    return "-drive", f"file={uri},if=virtio,format=raw,discard=unmap,cache=writeback"


def run(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def occupied(*files: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in files)


def sound(image: Path) -> None:
    """Our own check finds nothing at all."""
    found: dict[str, Any] = json.loads(
        run(sys.executable, "-m", "nbd_vmdk", "check", "--data", "--json", image)
    )
    assert found["findings"] == []


def flattened(image: Path) -> Path:
    """The image as qemu-img sees it."""
    raw = image.with_suffix(".raw")
    run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", image, raw)
    return raw


def test_qemu_is_the_client_of_a_split_disk_and_of_a_child_link(guest: Guest, tmp_path: Path) -> None:
    split, base, child = (tmp_path / name for name in ("split.vmdk", "base.vmdk", "child.vmdk"))
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", split, "3G")
    run("mke2fs", "-q", "-t", "ext4", "-L", "below", tmp_path / "below.raw", _SIZE)
    run("qemu-img", "convert", "-O", "vmdk", tmp_path / "below.raw", base)
    run("qemu-img", "create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", child)
    before = base.read_bytes()

    with served(split) as one, served(child) as two:
        told = guest.run(
            """
            echo "@@ label $(dd if=/dev/vdb bs=1 skip=1144 count=5 2>/dev/null)"
            /bin/mke2fs -q -t ext4 -E nodiscard /dev/vda
            mount -t ext4 /dev/vda /mnt
            mount -t ext4 /dev/vdb /mnt2
            for place in /mnt /mnt2; do
                dd if=/dev/urandom of=$place/kept bs=1M count=4 2>/dev/null
                dd if=/dev/urandom of=$place/trimmed bs=1M count=24 2>/dev/null
            done
            sync
            rm /mnt/trimmed /mnt2/trimmed
            sync
            fstrim /mnt
            fstrim /mnt2
            echo "@@ one $(md5sum < /mnt/kept)"
            echo "@@ two $(md5sum < /mnt2/kept)"
            umount /mnt /mnt2
            """,
            *drive(one),
            *drive(two),
        )
    assert told["label"] == "below"  # the parent showed through
    extents = sorted(tmp_path.glob("split-s*.vmdk"))
    assert sum(file.stat().st_size for file in extents) > 24 << 20
    assert occupied(*extents) < 16 << 20  # what the guest trimmed is the file system's again
    assert base.read_bytes() == before
    sound(split)
    sound(child)

    # Another boot, of guest and servers: all is there, and everybody sees the same bytes.
    with served(split) as one, served(child) as two:
        again = guest.run(
            """
            mount -t ext4 -o ro /dev/vda /mnt
            mount -t ext4 -o ro /dev/vdb /mnt2
            echo "@@ one $(md5sum < /mnt/kept)"
            echo "@@ two $(md5sum < /mnt2/kept)"
            umount /mnt /mnt2
            """,
            *drive(one),
            *drive(two),
        )
    assert (again["one"], again["two"]) == (told["one"], told["two"])
    for image in (split, child):
        raw = flattened(image)
        with served(image, "-r") as uri:
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, uri)
        run("e2fsck", "-fn", raw)


def test_the_kernels_own_client_attaches_over_tcp(guest: Guest, tmp_path: Path, tls: Tls) -> None:
    image = tmp_path / "disk.vmdk"
    run("qemu-img", "create", "-q", "-f", "vmdk", image, _SIZE)
    network = ("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile=")
    attach = """
        ip addr add 10.0.2.15/24 dev eth0
        ip link set eth0 up
        {client} >/dev/null &
        client=$!
        for i in 1 2 3 4 5 6 7 8 9 10; do
            [ -e /sys/block/nbd0/pid ] && [ "$(cat /sys/block/nbd0/size)" != 0 ] && break
            sleep 0.3
        done
        detach() {{
            nbd-client -d /dev/nbd0 >/dev/null
            wait $client  # it stays as long as the device is attached
            for i in 1 2 3 4 5 6 7 8 9 10; do  # and the kernel clears up a moment later
                [ -e /sys/block/nbd0/pid ] || break
                sleep 0.3
            done
            echo "@@ left $(ls /sys/block/nbd0 | grep -c pid) $(cat /sys/block/nbd0/size)"
        }}
        see_partition() {{
            for i in 1 2 3 4 5 6 7 8 9 10; do
                [ -b /dev/nbd0p1 ] && return
                partprobe /dev/nbd0 || true
                sleep 0.2
            done
        }}
        """

    def script(uri: str, work: str, query: str = "") -> str:
        uri = uri.replace("127.0.0.1", "10.0.2.2") + query
        words = client_command("/dev/nbd0", place_of(uri), connections=4)
        return attach.format(client=shlex.join(words)) + work

    with served(image, "--port", "0") as uri:
        told = guest.run(
            script(
                uri,
                """
                printf 'n\np\n1\n2048\n\nw\n' | fdisk /dev/nbd0 >/dev/null 2>&1
                see_partition
                /bin/mke2fs -q -t ext4 /dev/nbd0p1
                mount -t ext4 /dev/nbd0p1 /mnt
                dd if=/dev/urandom of=/mnt/file bs=1M count=16 2>/dev/null
                echo "@@ sum $(md5sum < /mnt/file)"
                umount /mnt
                detach
                """,
            ),
            *network,
        )
    sound(image)
    run("e2fsck", "-fn", f"{flattened(image)}?offset={2048 * 512}")

    # The server is another one now, encrypts, and wants to know who calls.
    certificates = "".join(
        f"cat >{file} <<'end'\n{file.read_text()}end\n" for file in sorted(tls.client.glob("*.pem"))
    )
    words = ("--port", "0", "--threads", "2", "--tls-certificates", str(tls.server), "--tls-verify-peer")
    with served(image, *words) as uri:
        again = guest.run(
            f"mkdir -p {tls.client}\n{certificates}"
            + script(
                uri,
                """
                see_partition
                mount -t ext4 /dev/nbd0p1 /mnt
                echo "@@ sum $(md5sum < /mnt/file)"
                fstrim /mnt
                umount /mnt
                detach
                """,
                f"/?tls-certificates={tls.client}&tls-hostname=localhost",
            ),
            *network,
        )
    assert again["sum"] == told["sum"]
    assert told["left"] == again["left"] == "0 0"
    raw = flattened(image)
    run("e2fsck", "-fn", f"{raw}?offset={2048 * 512}")
    with served(image, "-r") as uri:
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, uri)
