"""A real Linux guest as a client: Debian's cloud kernel under QEMU, on an initramfs of busybox.

``scripts/guest-setup`` fetches the kernel and builds the initramfs; here a shell script is added to it, which
is all that the guest runs.  Without KVM a boot takes about three seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

#: What the guest can take at most: it does nothing that lasts, but two slow cores may be shared with others.
_TIMEOUT = 150


class Guest:
    """A machine that can be booted again and again; nothing in it survives but its disks."""

    def __init__(self, place: Path, folder: Path) -> None:
        """``place`` holds vmlinuz and initrd.gz; ``folder`` is for what is made on the way."""
        self._place = place
        self._folder = folder
        self._boots = 0

    def run(self, script: str, *options: str) -> dict[str, str]:
        """Boot, run ``script`` by the guest's shell (every error ends it), power off.

        What the script prints as ``@@ key value`` comes back.  ``options`` are more of QEMU's.
        """
        self._boots += 1
        command = [
            "qemu-system-x86_64",
            *("-accel", "tcg", "-cpu", "max", "-m", "256", "-display", "none", "-serial", "stdio"),
            *("-no-reboot", "-nodefaults", "-kernel", str(self._place / "vmlinuz")),
            *("-initrd", str(self._initrd(script)), "-append", "console=ttyS0 panic=-1 quiet"),
            *options,
        ]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT, check=False
        )
        console = done.stdout.decode(errors="replace")
        lines = [line.strip() for line in console.splitlines()]
        assert "@@ done" in lines, f"{console}\n{done.stderr.decode(errors='replace')}"
        told = [line.split(maxsplit=2)[1:] for line in lines if line.startswith("@@ ")]
        return {words[0]: words[1] if len(words) > 1 else "" for words in told}

    def _initrd(self, script: str) -> Path:
        """The initramfs with the script in it: archives may stand one behind the other."""
        folder = self._folder / f"boot{self._boots}"
        folder.mkdir()
        (folder / "script").write_text(script)
        words = ["cpio", "-o", "-H", "newc", "--quiet"]
        addition = subprocess.run(words, input=b"script\n", cwd=folder, capture_output=True, check=True)
        made = folder / "initrd"
        first = (self._place / "initrd.gz").read_bytes()
        # One that is not compressed is only seen where it begins at a multiple of four.
        made.write_bytes(first + bytes(-len(first) % 4) + addition.stdout)
        return made


def find_guest() -> Path | str:
    """Where ``scripts/guest-setup`` has put the guest; or why there is none."""
    missing = [name for name in ("qemu-system-x86_64", "cpio", "e2fsck") if _which(name) is None]
    if missing:
        return f"not installed: {' '.join(missing)} (make test installs them)"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbd-vmdk" / "guest"
    kernels = sorted(cache.glob("*/vmlinuz"), key=lambda file: file.stat().st_mtime)
    return kernels[-1].parent if kernels else "no kernel for a guest (scripts/guest-setup fetches one)"


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
