"""Images as files: nbdfuse shows the disk as ``DIR/nbd``, raw, with no need to be root.

nbdfuse is the command of a ``serve --run``, so the server lasts exactly as long as the mount.  Loop devices,
guestfish and whatever else takes a raw disk take that file.
"""

import errno
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from nbd_vmdk.attaching.jobs import alone, find_job, run_folder, serve_command, start_job, wait_for
from nbd_vmdk.errors import DeviceError, InUse, OptionError, StorageError

#: The name of the file; nbdfuse's own choice.
FILE = "nbd"

#: What the kernel says of a mount whose server is gone, and of one whose server fails.
_DEAD = frozenset({errno.ENOTCONN, errno.EIO, errno.ECONNABORTED})
#: Seconds until the mount must be gone.
_PATIENCE = 30.0


def mount(image: str, folder: str, *, read_only: bool = False, options: Sequence[str] = ()) -> str:
    """Show an image, or what an NBD URI names, as a file in ``folder``; its path.

    ``options`` are those of ``serve`` that say how to open the image.  Raises DeviceError, InUse, NbdError if
    there is nothing where the URI says, or nothing that can be trusted, and ServerError with the words of
    what failed.
    """
    from nbd_vmdk.client.binding import refuse_unverified  # slow to import

    path = os.path.abspath(folder)
    _need_fuse()
    if _mounted(path):
        raise InUse(folder, how="something is mounted there", hint=f"nbd-vmdk umount {shlex.quote(folder)}")
    if not os.path.isdir(path):
        raise OptionError(folder, why="is no folder", hint=f"make it first: mkdir {shlex.quote(folder)}")
    if os.listdir(path):
        raise OptionError(folder, why="is not empty", hint="what is in it would not be seen: make a new one")
    fuse = ["nbdfuse", *(["-r"] if read_only else []), path]
    uri = image if "://" in image else None
    if uri is not None:
        refuse_unverified(uri, None)
        command = [*fuse, uri]
    else:
        command = serve_command(image, ["-r", *options] if read_only else options, [*fuse, "$uri"])
    facts = {"image": uri or os.path.abspath(image), "folder": path}
    with alone(run_folder()):
        start_job(_name(path), command, lambda: _mounted(path), facts, uri)
    return os.path.join(path, FILE)


def umount(folder: str) -> list[str]:
    """Write out what was written to the file, take the mount away, wait for its server to end; warnings.

    Raises InUse while the file is open, DeviceError if nothing is mounted, and ServerError if the image was
    not cleanly closed.
    """
    path = os.path.abspath(folder)
    with alone(run_folder()):
        job = find_job(_name(path))
        if not _mounted(path):
            if job is None:
                hint = "'findmnt -t fuse' shows where something is"
                raise DeviceError(folder, why="nothing is mounted there", hint=hint)
            return job.finish()  # somebody else unmounted it
        if job is None and not os.path.lexists(os.path.join(path, FILE)):
            raise DeviceError(folder, why="what is mounted there is no disk of ours")
        _flush(os.path.join(path, FILE))
        tool = shutil.which("fusermount3") or shutil.which("fusermount")
        command = [tool, "-u", path] if tool else ["umount", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["it failed"])[-1]
            if "busy" in said:
                disk = shlex.quote(os.path.join(folder, FILE))
                hint = f"close it first: fuser {disk} shows who has it, losetup -j {disk} a loop device on it"
                raise InUse(folder, how="the file is open", hint=hint)
            raise DeviceError(folder, why=f"can't be unmounted: {said}")
        if not wait_for(lambda: not _mounted(path), _PATIENCE):
            raise DeviceError(folder, why=f"is still mounted after {_PATIENCE:g} s")
        return [] if job is None else job.finish()


def next_commands(file: str, *, read_only: bool) -> list[tuple[str, str]]:
    """What to do with the file: ``(what for, the command)``."""
    import shlex

    name = shlex.quote(file)
    loop, fish = (" -r", " --ro") if read_only else ("", "")
    return [
        ("as root, its partitions as devices", f"losetup -f -P --show{loop} {name}"),
        ("without root, its file systems", f"guestfish{fish} --format=raw -a {name} -i"),
    ]


def _name(path: str) -> str:
    """The name of the job behind a mount."""
    return "mount-" + hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]


def _mounted(path: str) -> bool:
    """Whether something is mounted there; a mount whose server died counts, and answers nothing."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno in _DEAD  # ismount() takes any error for "no"
    return os.path.ismount(path)


def _need_fuse() -> None:
    if shutil.which("nbdfuse") is None:
        raise DeviceError(None, why="nbdfuse is not installed", hint="apt-get install libnbd-bin")
    if not os.path.exists("/dev/fuse"):
        raise DeviceError(None, why="there is no /dev/fuse here", hint="load its module: modprobe fuse")
    if os.geteuid() != 0 and not (shutil.which("fusermount3") or shutil.which("fusermount")):
        raise DeviceError(None, why="fusermount3 is not installed", hint="apt-get install fuse3")


def _flush(file: str) -> None:
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # its server is gone: unmounting is all that is left to do
    try:
        os.fsync(handle)
    except OSError as error:
        raise StorageError.of(error, file, "flush") from error
    finally:
        os.close(handle)
