"""Where a copy goes: what a target is, and those that are overwritten in place, devices and NBD exports.

A new file gets its kind from the user's word or from its name.  A device, an export, or for an incremental
copy a raw file that is there, is open while it is written, and is what it was before wherever nothing was
written yet.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Final

from nbd_vmdk.errors import FileMissing, OptionError, WriteRefused
from nbd_vmdk.ops.convert import Place, Work
from nbd_vmdk.ops.formats import RAW
from nbd_vmdk.ops.sides import StorageSink, StorageSource
from nbd_vmdk.storage.localfolder import LocalFolder

#: What a source or target begins with that is an NBD export.
_URI: Final = re.compile(r"nbds?(?:\+unix|\+vsock)?://", re.IGNORECASE)
_RAW_NAMES: Final = (".raw", ".img", ".bin", ".dd")
#: Kinds of targets that are written in place.
IN_PLACE: Final = ("device", "nbd")


def is_uri(text: str) -> bool:
    """Whether that names an NBD export."""
    return _URI.match(text) is not None


def target_kind(target: str, kind: str | None) -> str | None:
    """``nbd``, ``device``, ``raw``, ``ova``, a createType, or None where creating decides.

    Raises OptionError for what can't be, and where neither ``kind`` nor the name tells.
    """
    if is_uri(target) or _is_device(target):
        found = "nbd" if is_uri(target) else "device"
        if kind not in (None, RAW):
            raise OptionError(target, why="it gets the disk's bytes as they are, and no other --type")
        return found
    if kind is not None:
        return kind.lower() if kind.lower() in (RAW, "ova") else kind
    lower = target.lower()
    if lower.endswith(".ova"):
        return "ova"
    if lower.endswith(_RAW_NAMES):
        return RAW
    if lower.endswith(".vmdk"):
        return None
    raise OptionError(target, why="its name tells no format", hint="add --type raw, or a kind of VMDK")


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


@contextmanager
def open_place(target: str, kind: str, work: Work, *, onto: bool = False) -> Iterator[Place]:
    """Open a target that is overwritten in place: a device, an export, or ``onto`` it a raw file.

    ``onto`` says that the user knows what is there.  Raises WriteRefused for a device unless so, or unless
    ``work`` is to replace things; InUse, NbdError, StorageError.
    """
    if kind == "nbd":
        from nbd_vmdk.converting.endpoints import NbdSink  # slow to import, and libnbd may not be there

        with NbdSink(target) as sink:
            sink.fresh = sink.fresh and not onto
            yield Place(target, sink.size, sink, sink, sink.export.minimum_block, sink.flush)
        return
    if kind == "device" and not (work.replace or onto):
        why = "a device is overwritten in place, with all that is on it"
        raise WriteRefused(target, why=why, hint="add --force if you mean it")
    folder, name = LocalFolder.for_image(target, allow_devices=True)
    with closing(folder.open(name, writable=True)) as storage:
        if storage.is_device != (kind == "device"):  # replaced since it was looked at
            raise FileMissing(target)
        storage.lock(writable=True)
        storage.write_behind = True
        to = StorageSink(storage, fresh=False, punch=not storage.is_device)
        resize = None if storage.is_device else storage.truncate
        yield Place(target, storage.size, to, StorageSource(storage), 1, storage.sync, resize)
