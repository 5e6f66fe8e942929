"""Is everything there that this installation needs?  One check a question, each with what mends it.

The checks look and change nothing.  They are data: the command line shows them, and the tests feed them
systems that lack this or that.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from nbd_vmdk.errors import ServerError
from nbd_vmdk.serving.launch import find_nbdkit, nbdkit_environment
from nbd_vmdk.serving.server import plugin_path

#: The oldest nbdkit that is tested: Debian 12's.
OLDEST_NBDKIT = (1, 32)

#: Seconds that a program asked for its version may take.
_PATIENCE = 20

_PIP = f"{sys.executable} -m pip install"
#: Not a name, which pip would look for among what anybody publishes.
_WHEEL = "nbd_vmdk-*.whl, the file that it was installed from"


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found.

    ``found`` describes what is there, or what is wrong; ``mend`` is the command that makes it right, or None
    where nothing is to be done; ``required`` tells whether serving works without it.
    """

    name: str
    ok: bool
    required: bool
    found: str
    mend: str | None = None

    def as_dict(self) -> dict[str, object]:
        """The check for ``--json``."""
        return {
            "name": self.name,
            "ok": self.ok,
            "required": self.required,
            "found": self.found,
            "mend": self.mend,
        }


def checks() -> Iterator[Check]:
    """Look at one thing after the other, in the order in which they need each other."""
    nbdkit, program = _nbdkit()
    yield nbdkit
    if program is not None:
        plugin, embedded = _python_plugin(program)
        yield plugin
        if embedded is not None:
            same = _python(embedded)
            yield same
            if same.ok:
                yield _our_plugin(program)
    yield _numpy()
    yield _codec("deflate", "inflates compressed grains, 2-3 times as fast as zlib")
    yield _libnbd()
    yield _program("nbdcopy", "libnbd-bin", "copies disks to and from a server")
    yield _program("nbdinfo", "libnbd-bin", "tells what a server offers")
    yield _program("file", "file", "tells nbdinfo what a disk holds; without it nbdinfo prints rubbish")
    yield _program("nbdfuse", "libnbd-bin", "shows a disk as a file, for 'nbd-vmdk mount'")
    yield _program("fusermount3", "fuse3", "lets users do so, for 'nbd-vmdk mount' and 'umount'")
    yield _program("nbd-client", "nbd-client", "makes a disk a device, for 'nbd-vmdk attach'")
    yield _program("qemu-img", "qemu-utils", "reads and converts what is served")


def exit_code(found: list[Check]) -> int:
    """0 if all is there, 1 if something required is not, 4 if only something optional is not."""
    if any(not check.ok and check.required for check in found):
        return 1
    return 0 if all(check.ok for check in found) else 4


def _nbdkit() -> tuple[Check, str | None]:
    install = "apt-get install nbdkit nbdkit-plugin-python"
    try:
        program = find_nbdkit()
    except ServerError:
        return Check("nbdkit", False, True, "not installed", install), None
    said = _output([program, "--version"])
    version = re.match(r"nbdkit (\d+)\.(\d+)\S*", said or "")
    if version is None:
        return Check("nbdkit", False, True, f"{program} does not tell its version", install), None
    found = f"{version[0].removeprefix('nbdkit ')}, {program}"
    if (int(version[1]), int(version[2])) < OLDEST_NBDKIT:
        oldest = ".".join(map(str, OLDEST_NBDKIT))
        return Check("nbdkit", False, True, f"{found}: older than {oldest}", install), program
    return Check("nbdkit", True, True, found), program


def _python_plugin(program: str) -> tuple[Check, str | None]:
    """Nbdkit's Python plugin, and the version of Python in it, such as 3.11."""
    name = "nbdkit's Python plugin"
    said = _output([program, "python", "--dump-plugin"])
    version = re.search(r"^python_version=(\d+\.\d+)", said or "", re.MULTILINE)
    if version is None:
        mend = "apt-get install nbdkit-plugin-python"
        return Check(name, False, True, "not installed, or it does not start", mend), None
    return Check(name, True, True, f"embeds Python {version[1]}"), version[1]


def _python(embedded: str) -> Check:
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if own == embedded:
        return Check("Python", True, True, f"{own}, as in nbdkit, {sys.prefix}")
    found = f"this installation is for Python {own}, nbdkit embeds {embedded}"
    if os.path.basename(plugin_path()) == "plugin.py":  # only a checkout has that
        return Check("Python", False, True, found, "make clean setup")
    mend = f"python{embedded} -m venv ~/nbd-vmdk && ~/nbd-vmdk/bin/pip install {_WHEEL}"
    return Check("Python", False, True, found, mend)


def _our_plugin(program: str) -> Check:
    """Whether nbdkit can load our plugin, from here, with all it imports."""
    path = plugin_path()
    command = [program, "python", path, "--dump-plugin"]
    try:
        done = subprocess.run(
            command,
            env=nbdkit_environment(program),
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("nbd-vmdk's plugin", False, True, str(error), f"{_PIP} --force-reinstall {_WHEEL}")
    if done.returncode == 0:
        return Check("nbd-vmdk's plugin", True, True, path)
    # Python's own last line says more than nbdkit's, which comes after it.
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("nbdkit: ")]
    what = lines[-1] if lines else f"nbdkit does not load it (exit code {done.returncode})"
    return Check("nbd-vmdk's plugin", False, True, what, f"{_PIP} --force-reinstall {_WHEEL}")


def _numpy() -> Check:
    version = _version_of("numpy")
    if version is None:
        return Check("numpy", False, True, "not installed: check and repair need it", f"{_PIP} numpy")
    return Check("numpy", True, True, f"{version}, for check and repair")


def _codec(name: str, what: str) -> Check:
    version = _version_of(name)
    if version is None:
        mend = None if _is_the_systems() else f"{_PIP} {name}"
        return Check(name, False, False, f"not installed; zlib takes its place: {what}", mend)
    return Check(name, True, False, f"{version}, {what}")


def _is_the_systems() -> bool:
    """Whether we run in the Python of a distribution, where pip is not to install anything (PEP 668)."""
    marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    return sys.prefix == sys.base_prefix and os.path.exists(marker)


def _libnbd() -> Check:
    try:
        module = importlib.import_module("nbd")
        version: str = module.NBD().get_version()
    except (ImportError, AttributeError):
        # A package of that name on PyPI is something else, so an nbd without NBD counts as none.
        found = "not to be imported here: NBD clients in Python need it"
        mend = "apt-get install python3-libnbd"
        if sys.prefix != sys.base_prefix:
            # A virtual environment does not see the distribution's modules by itself.
            link = os.path.join(sysconfig.get_path("purelib"), "system-libnbd.pth")
            mend += f" && echo /usr/lib/python3/dist-packages >{link}"
        return Check("libnbd", False, False, found, mend)
    return Check("libnbd", True, False, version)


def _program(name: str, package: str, what: str) -> Check:
    # What is for root alone is not on everybody's PATH.
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        return Check(name, False, False, f"not installed: {what}", f"apt-get install {package}")
    said = re.search(r"\d+\.\d+\S*", _output([path, "--version"]) or "")
    return Check(name, True, False, f"{said[0]}, {path}" if said else path)


def _version_of(package: str) -> str | None:
    """The version of a package that imports; None if it does not."""
    try:
        importlib.import_module(package)
        return metadata.version(package)
    except (ImportError, OSError):
        return None


def _output(command: list[str]) -> str | None:
    """What a program prints; None if it can't be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
