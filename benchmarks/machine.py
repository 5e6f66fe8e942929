"""The machine: having it to oneself, and what it is, in words for the report."""

import fcntl
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nbd_vmdk import __version__

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
#: Where images are kept and runs write: nothing here is worth keeping.
FOLDER = os.path.join(ROOT, "build", "bench")

#: Where Pythons that are measured keep compiled modules; an installed package has them beside its own.
_COMPILED = os.path.join(FOLDER, "pycache")

_TOOLS = {
    "nbdkit": ("nbdkit", "--version"),
    "qemu-nbd": ("qemu-nbd", "--version"),
    "fio": ("fio", "--version"),
    "libnbd (nbdcopy, nbdinfo)": ("nbdcopy", "--version"),
}


@contextmanager
def alone() -> Iterator[None]:
    """Hold the lock that keeps two measurements apart; SystemExit if another one runs."""
    path = os.path.join(tempfile.gettempdir(), "nbd-vmdk-bench.lock")
    with open(path, "a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            sys.exit(f"error: another measurement is running (process {file.read().strip()})")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def as_installed(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` with compiled modules for Python, which whoever installs a package has, too."""
    changed = {key: value for key, value in environment.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return changed | {"PYTHONPYCACHEPREFIX": _COMPILED}


def machine(folder: str) -> dict[str, str]:
    """The machine, and the file system that holds the images."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return {
        "processor": f"{_processor()}, {os.cpu_count()} CPUs",
        "memory": f"{memory:.0f} GiB",
        "system": f"{_distribution()}, Linux {platform.release()}",
        "file system": _file_system(folder),
        "load before the run": f"{os.getloadavg()[0]:.2f}",
    }


def versions() -> dict[str, str]:
    """Our own version and those of all tools."""
    found = {"nbd-vmdk": __version__}
    commit = _output(
        "git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"
    )
    if commit:
        found["nbd-vmdk"] += f" ({commit})"
    for name, command in _TOOLS.items():
        match = re.search(r"\d+\.\d+(\.\d+)?", _output(*command))
        found[name] = match[0] if match else "?"
    found["Python"] = platform.python_version()
    return found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "?")


def _distribution() -> str:
    return platform.freedesktop_os_release().get("PRETTY_NAME", "?")


def _file_system(folder: str) -> str:
    """Kind and options of the mount that holds a folder."""
    device = os.stat(folder).st_dev
    best = "?"
    with open("/proc/self/mounts", encoding="utf-8") as file:
        for line in file:
            _what, where, kind, options, *_ = line.split()
            try:
                if os.stat(where).st_dev == device:
                    best = f"{kind} ({options})"
            except OSError:
                continue
    return best
