"""What a user may ask for when an image is opened: one set of names for all doors.

The Python API takes them as keywords, the command line as ``--option-name`` and the nbdkit plugin as
``option-name=value``; of ``allow_dirs`` both take one at a time, ``allow-dir``.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from nbd_vmdk.errors import OptionError
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

    Raises OptionError for a keyword that is none of these.
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

    @classmethod
    def of(cls, **options: Any) -> Self:
        """What a caller has named; OptionError, in words for people, for what is no option."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise no_option(name, known)
        return cls(**options)


def no_option(name: str, known: Sequence[str], hint: str | None = None) -> OptionError:
    """That there is no option ``name``; where no hint is given it is those like it, or all there are."""
    from difflib import get_close_matches  # seldom needed

    if hint is None:
        near = get_close_matches(name, known, 3)
        hint = f"is it {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    return OptionError(None, why=f"no option {name!r}", hint=hint)
