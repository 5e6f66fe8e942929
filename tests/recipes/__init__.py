"""The commands of the documents, run as they stand there.

``sh`` blocks of a section are one shell script, run in a folder that holds ``disk.vmdk``; a block with a name
behind its language is a file of that name there.  A recipe is skipped where a program that it needs is not
installed.  The port 10809 is any that is free, and ``qemu-system-x86_64`` gets a monitor that lists its disks
and quits, instead of a window.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from scripts.manual import Block

ROOT = Path(__file__).parents[2]

#: Programs that recipes may use; those of every Linux system are not among them.
_PROGRAMS = (
    *("nbdkit", "nbdcopy", "nbdinfo", "nbdfuse", "fusermount3", "qemu-img", "qemu-nbd", "qemu-system-x86_64"),
    *("e2fsck", "guestfish", "openssl", "virt-xml-validate", "systemd-socket-activate"),
)

#: Seconds that a section may take.
_PATIENCE = 120

_PROLOGUE = "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n"
_QEMU = "#!/bin/sh\nprintf 'info block\\nquit\\n' | exec {} -S -display none -monitor stdio \"$@\"\n"


def missing(script: str) -> list[str]:
    """The programs that the script names and that are not here."""
    words = set(re.findall(r"[\w-]+", script))
    path = search_path(None)
    return [name for name in _PROGRAMS if name in words and shutil.which(name, path=path) is None]


def search_path(first: Path | None) -> str:
    """PATH with our own program, and what root finds."""
    folders = [str(first)] if first else []
    own = [os.path.dirname(sys.executable)]
    return os.pathsep.join([*folders, *own, os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def make_disk(folder: Path) -> Path:
    """A disk of 64 MiB whose one partition holds an ext4 file system with a file in it."""
    tree, raw, disk = folder / "tree", folder / "raw", folder / "disk.vmdk"
    tree.mkdir()
    (tree / "hello").write_text("hello\n")
    with raw.open("wb") as file:
        file.truncate(64 << 20)
        # One entry: Linux, from sector 2048 to the end.
        file.seek(446)
        file.write(bytes([0, 0, 2, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little"))
        file.write(((64 << 11) - 2048).to_bytes(4, "little"))
        file.seek(510)
        file.write(b"\x55\xaa")
    options = "root_owner,offset=1048576"
    words = [
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-E",
        options,
        "-d",
        str(tree),
        str(raw),
        "16128",
    ]
    environment = {**os.environ, "PATH": search_path(None)}
    subprocess.run(words, check=True, env=environment, capture_output=True)
    subprocess.run(["qemu-img", "convert", "-O", "vmdk", str(raw), str(disk)], check=True)
    return disk


def run(script: str, folder: Path, files: list[Block]) -> str:
    """Run a section's script; what it printed.  Any command that fails is an error."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        script = script.replace("10809", str(any_port.getsockname()[1]))
    for block in files:
        (folder / block.name).write_text(block.text)
    programs = folder / ".programs"
    programs.mkdir()
    qemu = shutil.which("qemu-system-x86_64")
    if qemu:
        (programs / "qemu-system-x86_64").write_text(_QEMU.format(qemu))
        (programs / "qemu-system-x86_64").chmod(0o755)
    environment = {**os.environ, "PATH": search_path(programs), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", _PROLOGUE + script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            said, errors = shell.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)  # its children, too: they hold the pipes
            said, errors = shell.communicate()
    assert shell.returncode == 0, f"{script}\n{said}\n{errors}"
    assert "Traceback" not in errors, errors
    return said
