"""What is said of a file that can't be opened: what it is, which one is meant, and what can be done."""

import os
import re
import shlex
from typing import Final

from nbd_vmdk.errors import FileMissing, FormatError, NotVmdk, VmdkError, printable
from nbd_vmdk.extents.stream import has_footer
from nbd_vmdk.look import EXTENT_SUFFIX, find_owner, read_descriptor
from nbd_vmdk.ondisk import hosted
from nbd_vmdk.ondisk.probe import FileKind, describe_other
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.units import SECTOR

_SIZE_HINT: Final = "serve it with the descriptor that belongs to it"
_FROM_RAW: Final = "of a raw disk a VMDK is made by: nbd-vmdk convert --from raw FILE new.vmdk"
#: How much alike two names must be for the one to be a slip of the other.
_ALIKE: Final = 0.8
#: What ends the first sector of a disk that a PC boots from, or that has partitions.
_BOOT_AT: Final = 510
_BOOT: Final = b"\x55\xaa"
#: Where a hint leaves room for the disk's name.
_IMAGE: Final = re.compile(
    r"(?:(?<=nbd-vmdk check )|(?<=nbd-vmdk check --data )|(?<=nbd-vmdk repair ))IMAGE(?=[ ;,]|$)"
)


def refusal(folder: Folder, name: str, storage: Storage, kind: FileKind, head: bytes) -> VmdkError:
    """Why a file that is no VMDK is refused, and which one to open instead."""
    hint: str | None = None
    if kind is FileKind.UNFINISHED:
        try:
            hosted.parse_header(head, storage.name)
        except FormatError as error:
            return error
    if kind is FileKind.CHANGE_TRACKING:
        what = "a change-tracking file, which holds no disk data"
        hint = f"name the disk it belongs to: {re.sub(r'-ctk(?=[.]vmdk$)', '', name)}"
    elif kind is FileKind.EMPTY:
        what, hint = "an empty file", "the copy or the export that made it was not finished: make it again"
    elif owner := find_owner(folder, name):
        return not_the_disk(folder, storage, owner)
    else:
        what, hint = describe_other(head)
        if EXTENT_SUFFIX.search(name):
            what = f"raw data without a descriptor ({what})"
            hint = f"it needs {EXTENT_SUFFIX.sub('', name)} beside it: {_SIZE_HINT}"
        elif hint is None and has_footer(storage):
            what = "a compressed disk whose header is damaged, but repeated at its end"
            hint = "nbd-vmdk repair IMAGE shows how it is made anew"
        elif hint is None and not any(head):
            hint = f"a copy that was not finished looks so: get it again; {_FROM_RAW}"
        elif hint is None and storage.size % SECTOR == 0 and head[_BOOT_AT : _BOOT_AT + 2] == _BOOT:
            what, hint = "a raw disk, by its boot sector", _FROM_RAW
        elif hint is None:
            hint = "is it the right file? the command 'file' may tell what it is"
    return NotVmdk(storage.name, what=what, hint=hint and hint.replace("FILE", shlex.quote(storage.name)))


def not_the_disk(folder: Folder, storage: Storage, owner: str) -> NotVmdk:
    """That a file is an extent of the disk ``owner`` beside it."""
    return NotVmdk(
        storage.name,
        what=f"an extent of {owner}, not a disk by itself",
        hint=f"open {folder.label(owner)} instead",
    )


def advise(error: VmdkError, folder: Folder, name: str) -> None:
    """Put the name of the disk that was to be opened into the hint; the error may be of an extent."""
    if error.hint is None:
        return
    if folder.read_only is None:
        error.hint = printable(_IMAGE.sub(lambda _: shlex.quote(folder.label(name)), error.hint))
    else:
        _unmendable(error)


def advise_late(error: VmdkError) -> None:
    """As advise(), for an error that a read met, of which nobody knows more than the file."""
    if error.file is None or error.hint is None or not _IMAGE.search(error.hint):
        return
    if not os.path.lexists(error.file):
        _unmendable(error)  # it is in an archive, or gone
        return
    try:
        folder, name = LocalFolder.for_image(error.file)
    except VmdkError:
        return
    if read_descriptor(folder, name) is None:
        name = find_owner(folder, name) or name
    advise(error, folder, name)


def suggest(error: FileMissing) -> None:
    """Say what is there instead of a file that somebody named, if nothing else was said."""
    if error.hint is not None or not error.file:
        return
    from difflib import get_close_matches  # seldom needed

    folder, name = os.path.split(error.file.rstrip("/"))
    shown = shlex.quote(folder or os.curdir)
    hint = f"is the name right? 'ls {shown}' shows what is there"
    try:
        if os.path.islink(error.file):
            hint = f"it is a symbolic link to {os.readlink(error.file)}, and nothing is there"
        elif close := get_close_matches(name, os.listdir(folder or os.curdir), 1, _ALIKE):
            hint = f"there is {shlex.quote(os.path.join(folder, close[0]))}: is that meant?"
    except (OSError, ValueError):
        return  # the folder is not there either, may not be listed, or is an archive
    error.hint = printable(hint)


def _unmendable(error: VmdkError) -> None:
    """Leave out of the hint what looks at the disk or mends it: in an archive it stays as it is."""
    if error.hint is not None and _IMAGE.search(error.hint):
        kept = [part for part in error.hint.split("; ") if not _IMAGE.search(part)]
        error.hint = "; ".join(kept) or "the file is damaged, or was cut off: get it again"
