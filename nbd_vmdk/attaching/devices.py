"""Images as block devices of this machine: the kernel's NBD client, driven by nbd-client.

Attaching finds a device that is free, connects it several times over, and waits until its partitions are
there.  nbd-client stays in front, as the command of a ``serve --run``: so the server lasts exactly as long as
the device is attached, whoever detaches it.

Detaching flushes, and then makes sure: the kernel takes a device away in its own time, and what is told to be
free while it still has a server is what leaves stuck devices and half-written disks behind.

What the kernel knows is read in ``/sys/block/nbdN``: ``pid`` is there while the device is attached, ``size``
(in sectors) is 0 when it is not.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from nbd_vmdk.attaching.jobs import alone, find_job, run_folder, serve_command, start_job, wait_for
from nbd_vmdk.attaching.places import Place, place_of
from nbd_vmdk.errors import DeviceError, InUse, OptionError, ServerError, StorageError
from nbd_vmdk.units import SECTOR

#: Connections by which the kernel talks to the server, each with a queue of its own.
DEFAULT_CONNECTIONS = 4
#: Seconds until a device that was told to go must be free, and until partitions must be there.
_PATIENCE = 30.0

_BLKRRPART, _BLKFLSBUF = 0x125F, 0x1261
_NAME = re.compile(r"nbd\d+")


@dataclass(frozen=True, slots=True)
class Attached:
    """A device that is attached, its size in bytes, and its partitions' devices."""

    device: str
    size: int
    partitions: tuple[str, ...]
    warnings: tuple[str, ...] = ()


class Kernel:
    """What the kernel says of NBD devices, in its folders."""

    def __init__(self, sys: str = "/sys", dev: str = "/dev", proc: str = "/proc") -> None:
        self.sys, self.dev, self.proc = sys, dev, proc

    def names(self) -> list[str]:
        """All NBD devices; DeviceError if this kernel has none."""
        try:
            names = [name for name in os.listdir(os.path.join(self.sys, "block")) if _NAME.fullmatch(name)]
        except OSError:
            names = []
        if not names:
            hint = "load its module: modprobe nbd max_part=16"
            raise DeviceError(None, why="this kernel has no NBD devices", hint=hint)
        return sorted(names, key=lambda name: int(name[3:]))

    def name_of(self, device: str) -> str:
        """The kernel's name of a device as the user gives it: ``/dev/nbd0``, or ``nbd0``."""
        name = os.path.basename(os.path.realpath(device)) if "/" in device else device
        if not _NAME.fullmatch(name):
            raise OptionError(device, why="is no NBD device", hint="name one like /dev/nbd0")
        if name not in self.names():
            raise DeviceError(device, why="there is no such device", hint=f"there is {self.names()[0]} ...")
        return name

    def path(self, name: str) -> str:
        """The device file."""
        return os.path.join(self.dev, name)

    def size(self, name: str) -> int:
        """Bytes of a device; 0 if it has gone."""
        return int(self._read("block", name, "size") or "0") * SECTOR

    def attached(self, name: str) -> bool:
        """Whether somebody serves it."""
        return self._read("block", name, "pid") is not None

    def free(self, name: str) -> bool:
        """Whether it can be attached."""
        return not self.attached(name) and self.size(name) == 0

    def partitions(self, name: str) -> list[str]:
        """The kernel's names of its partitions, in order."""
        try:
            inside = os.listdir(os.path.join(self.sys, "block", name))
        except OSError:
            return []
        found = [each for each in inside if re.fullmatch(rf"{name}p\d+", each)]
        return sorted(found, key=lambda each: int(each.rpartition("p")[2]))

    @property
    def without_partitions(self) -> bool:
        """Whether the module was loaded so that partitions do not show."""
        return self._read("module", "nbd", "parameters", "max_part") == "0"

    def users(self, name: str) -> list[str]:
        """Where the device or a partition of it is mounted, is swapped to, or is built upon."""
        found = []
        for each in (name, *self.partitions(name)):
            number = self._read("class/block", each, "dev")
            for line in self._lines("self/mountinfo"):
                words = line.split()
                if number and len(words) > 4 and words[2] == number:
                    found.append(f"{each} is mounted at {_unescaped(words[4])}")
            swaps = [os.path.basename(line.split()[0]) for line in self._lines("swaps")[1:] if line.strip()]
            if each in swaps:
                found.append(f"{each} is swapped to")
            holders = os.path.join(self.sys, "class/block", each, "holders")
            above = sorted(os.listdir(holders)) if os.path.isdir(holders) else []
            found += [f"{each} is part of {holder}" for holder in above]
        return found

    def _read(self, *parts: str) -> str | None:
        try:
            with open(os.path.join(self.sys, *parts)) as file:
                return file.read().strip()
        except OSError:
            return None

    def _lines(self, name: str) -> list[str]:
        try:
            with open(os.path.join(self.proc, name)) as file:
                return file.read().splitlines()
        except OSError:
            return []


def client_command(device: str, place: Place, *, connections: int, read_only: bool = False) -> list[str]:
    """The words that attach ``device`` and stay until it is detached.

    Only by ioctls (-L) does nbd-client stay as long as the device is attached; by netlink it is gone at once.
    """
    words = ["nbd-client", *place.where, device, "-L", "-n", "-C", str(connections), "-N", place.export]
    words += place.tls
    return [*words, "-R"] if read_only else words


def attach(
    image: str,
    device: str | None = None,
    *,
    read_only: bool = False,
    connections: int = DEFAULT_CONNECTIONS,
    options: Sequence[str] = (),
    kernel: Kernel | None = None,
) -> Attached:
    """Attach an image, or what an NBD URI names, to ``device`` or to the first one that is free.

    ``options`` are those of ``serve`` that say how to open the image.  Raises DeviceError, InUse, NbdError if
    there is nothing where the URI says, and ServerError with the words of what failed.
    """
    kernel = kernel or Kernel()
    names = kernel.names()
    _need_tools()
    with alone(run_folder()):
        if device is None:
            free = [name for name in names if kernel.free(name)]
            if not free:
                hint = "detach one, or have more: modprobe -r nbd; modprobe nbd nbds_max=64 max_part=16"
                raise DeviceError(None, why=f"all {len(names)} NBD devices are in use", hint=hint)
            name = free[0]
        else:
            name = kernel.name_of(device)
            if not kernel.free(name):
                hint = "choose another one, or let the first free one be taken"
                raise InUse(kernel.path(name), how="something is attached to it", hint=hint)
        command = _command(kernel.path(name), image, read_only, connections, options)
        uri = image if "://" in image else None
        facts = {"image": uri or os.path.abspath(image), "device": kernel.path(name)}

        def ready() -> bool:
            return kernel.attached(name) and kernel.size(name) > 0

        try:
            job = start_job(name, command, ready, facts, uri)
        except ServerError as error:
            if not image.startswith("nbds:") or error.hint is not None or "ioctl" in error.message.lower():
                raise
            # nbd-client tells of a refused handshake only that nobody talks to it.
            hint = "is the server's certificate for that host, and ca-cert.pem of who vouches for it?"
            raise ServerError(None, why=error.message, hint=hint) from error
    warnings = [line.removeprefix("warning: ") for line in job.said() if line.startswith("warning: ")]
    warnings += _scan(kernel, name)
    partitions = tuple(map(kernel.path, kernel.partitions(name)))
    return Attached(kernel.path(name), kernel.size(name), partitions, tuple(warnings))


def detach(device: str, *, kernel: Kernel | None = None) -> list[str]:
    """Flush a device, take its server away, and see to it that both are gone; warnings.

    Raises InUse while it is mounted or used otherwise, DeviceError if nothing is attached or the kernel does
    not let go, and ServerError if its image was not cleanly closed.
    """
    kernel = kernel or Kernel()
    name = kernel.name_of(device)
    path = kernel.path(name)
    _need_tools()
    with alone(run_folder()):
        job = find_job(name)
        if kernel.free(name):
            if job is None:
                raise DeviceError(path, why="nothing is attached to it")
            return job.finish()  # somebody else detached it
        if users := kernel.users(name):
            shown = ", ".join(users)
            raise InUse(path, how=shown, hint="unmount it first: what is not written out would be lost")
        _flush(path)
        _run_disconnect(path)
        if not wait_for(lambda: kernel.free(name), _PATIENCE):
            hint = "something still has it open: 'fuser' or 'lsof' with its name tells what"
            why = f"the kernel has not let go of it in {_PATIENCE:g} s"
            raise DeviceError(path, why=why, hint=hint)
        return [] if job is None else job.finish()


def _command(device: str, image: str, read_only: bool, connections: int, options: Sequence[str]) -> list[str]:
    local = "://" not in image
    # The first disk of several is the default export, which the empty name means.
    place = Place(("-unix", "$unixsocket")) if local else place_of(image)
    words = client_command(device, place, connections=connections, read_only=read_only)
    words[0] = _client() or words[0]  # it may not be on the PATH of who asks
    if not local:
        return words
    return serve_command(image, ["-r", *options] if read_only else options, words)


def _need_tools() -> None:
    if os.geteuid() != 0:
        hint = "use sudo; or 'nbd-vmdk mount', which every user can"
        raise DeviceError(None, why="only root can attach and detach devices", hint=hint)
    if _client() is None:
        raise DeviceError(None, why="nbd-client is not installed", hint="apt-get install nbd-client")


def _client() -> str | None:
    return shutil.which("nbd-client", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def _run_disconnect(path: str) -> None:
    import subprocess

    client = _client()
    assert client is not None
    done = subprocess.run([client, "-d", path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [*done.stdout.split("\n"), *done.stderr.split("\n")]
        told = next((line for line in reversed(said) if line.strip()), "")
        raise DeviceError(path, why=f"nbd-client did not detach it: {told or done.returncode}")


def _flush(path: str) -> None:
    """Write out what the kernel holds of a device."""
    try:
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # a read-only one has nothing to be written
    try:
        os.fsync(device)
        fcntl.ioctl(device, _BLKFLSBUF, 0)
    except OSError as error:
        raise StorageError.of(error, path, "flush") from error
    finally:
        os.close(device)


def _scan(kernel: Kernel, name: str) -> list[str]:
    """Let the kernel read the partition table, and wait until each partition has its device; warnings."""
    path = kernel.path(name)
    try:
        device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _BLKRRPART, 0)
        finally:
            os.close(device)
    except OSError:
        if not kernel.partitions(name) and kernel.without_partitions:
            return ["the nbd module was loaded with max_part=0: partitions do not show"]
    expected = [kernel.path(each) for each in kernel.partitions(name)]
    if wait_for(lambda: all(map(os.path.exists, expected)), _PATIENCE):
        return []
    return [f"not there yet: {', '.join(each for each in expected if not os.path.exists(each))}"]


def _unescaped(text: str) -> str:
    r"""A path of /proc's tables, in which blanks are ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
