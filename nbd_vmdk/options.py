"""What a user may ask for when an image is opened: one set of names for all doors.

The Python API takes them as keywords, the command line as ``--option-name`` and the nbdkit plugin as
``option-name=value``; of ``allow_dirs`` both take one at a time, ``allow-dir``.
"""

import os
from dataclasses import dataclass

from nbd_vmdk.units import MIB

DEFAULT_CACHE_SIZE = 64 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """How to open an image.

    writable      open for writing; a kind that can't be written is opened read-only, with a warning
    parent        use this file as parent of the top link, whatever its descriptor says
    allow_dirs    folders, besides the image's own, whose files the image may name
    allow_devices let a descriptor name block devices (inside ``allow_dirs``)
    ignore_cid    warn of a content ID that does not match instead of refusing
    salvage       read a damaged streamOptimized file by walking its markers; what was lost gives EIO
    write_parent  write although another link in the folder names this one as its parent
    drop_ctk      remove the change-tracking lines that writing would turn into a lie
    locks         keep other processes from writing it meanwhile; without, they are only looked for
    cache_size    bytes for tables and inflated grains, shared by all that is opened together
    """

    writable: bool = False
    parent: str | os.PathLike[str] | None = None
    allow_dirs: tuple[str | os.PathLike[str], ...] = ()
    allow_devices: bool = False
    ignore_cid: bool = False
    salvage: bool = False
    write_parent: bool = False
    drop_ctk: bool = False
    cache_size: int = DEFAULT_CACHE_SIZE
    locks: bool = True
