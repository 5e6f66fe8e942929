"""What can be made, and what a user may ask of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from nbd_vmdk.errors import OptionError

#: How the space of files without tables is come by: as it is written, reserved at once, or written at once.
PREALLOCATIONS: Final = ("off", "falloc", "full")


class Kind(NamedTuple):
    """A kind of disk as descriptors name it in createType.

    word        the type word of its extents
    split       its extents are many, of a size that can be chosen
    child       it may stand on a parent
    """

    name: str
    word: str
    split: bool = False
    child: bool = False

    @property
    def flat(self) -> bool:
        """Its extents are raw bytes, whose space can be reserved."""
        return self.word in ("FLAT", "VMFS")


CUSTOM: Final = Kind("custom", "")
KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind("monolithicSparse", "SPARSE", child=True),
        Kind("monolithicFlat", "FLAT"),
        Kind("twoGbMaxExtentSparse", "SPARSE", split=True, child=True),
        Kind("twoGbMaxExtentFlat", "FLAT", split=True),
        Kind("streamOptimized", "SPARSE"),
        Kind("vmfs", "VMFS"),
        Kind("vmfsSparse", "VMFSSPARSE", child=True),
        CUSTOM,
    )
}
_BY_FOLDED: Final = {name.lower(): kind for name, kind in KINDS.items()}

#: Kinds that exist and that are not made, and why.
_NOT_MADE: Final = {
    "sesparse": (
        "VMware has not published the seSparse format, and a file that ESXi takes for damaged helps nobody",
        "--type vmfsSparse makes a delta of less than 2 TiB that ESXi knows, --type vmfs a whole disk",
    ),
    "vmfsrdm": ("its data is on a LUN that only ESXi knows", "make it there: vmkfstools -r"),
    "vmfsrdmp": ("its data is on a LUN that only ESXi knows", "make it there: vmkfstools -z"),
    "fulldevice": (
        "it stands for a device",
        "--type custom with an --extent for what is to be seen of the device",
    ),
    "partitioneddevice": (
        "it stands for a device",
        "--type custom with an --extent for what is to be seen of the device",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """How to create an image.  None leaves the choice to the product, or to what is usual.

    kind           a name of :data:`KINDS`, in whatever case
    adapter        ide, buslogic, lsilogic, legacyESX, or a later controller, which is called lsilogic
    hwversion      virtual hardware version, ddb.virtualHWVersion
    grain_size     bytes of a grain, of kinds with tables
    extent_size    bytes of each extent but the last, of kinds that are split
    zeroed_grain   grain tables may say "zeros", at the price of header version 2
    preallocation  off, falloc or full, for files without tables
    parent         the image that this one is to be a child of; it is only read
    parent_hint    how the child names its parent, if not by the way from its own folder
    product        workstation, esxi, ova, qemu or virtualbox: what it takes is picked, what it refuses is
                   refused
    extents        extent lines of a custom disk: files that are there are used as they are, others are made
    allow_dirs     folders, besides those of the image and of its parent, whose files either may name
    ddb            keys of the disk database that take the place of those made up
    """

    kind: str | None = None
    adapter: str | None = None
    hwversion: int | None = None
    grain_size: int | None = None
    extent_size: int | None = None
    zeroed_grain: bool = False
    preallocation: str | None = None
    parent: str | os.PathLike[str] | None = None
    parent_hint: str | None = None
    product: str | None = None
    extents: tuple[str, ...] = ()
    allow_dirs: tuple[str | os.PathLike[str], ...] = ()
    ddb: Mapping[str, str] = field(default_factory=dict)


def find_kind(name: str) -> Kind:
    """The kind of this name; OptionError tells why one is not made, or which there are."""
    folded = name.lower()
    if folded in _BY_FOLDED:
        return _BY_FOLDED[folded]
    if folded in _NOT_MADE:
        why, hint = _NOT_MADE[folded]
        raise OptionError(None, why=f"a disk of kind {name} can't be made: {why}", hint=hint)
    raise OptionError(
        None, why=f"{name!r} is no kind of disk that can be made", hint=f"choose one of {', '.join(KINDS)}"
    )
