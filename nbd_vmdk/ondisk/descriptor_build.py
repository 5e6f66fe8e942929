"""What a new descriptor says: the disk database, the geometry, and the names of extents.

The text itself is written by :func:`~nbd_vmdk.ondisk.descriptor.build_descriptor`; here is what VMware's
products put into it.  Keys stand in the order of the alphabet, as newer products write them.

Sources: descriptors made by Workstation, ESXi and vSphere.
"""

import random
from typing import Final, NamedTuple

from nbd_vmdk.units import GIB, SECTOR

#: What ddb.adapterType may be.
ADAPTERS: Final = ("ide", "buslogic", "lsilogic", "legacyESX")
#: Controllers that came later; the disks behind them are called lsilogic.
LATER_ADAPTERS: Final = ("pvscsi", "lsisas1068", "nvme")
#: "Tools of an unknown version": without any, vSphere refuses to customize the guest.
TOOLS_UNKNOWN: Final = "2147483647"
#: What VMware writes after "encoding=" on every system but Windows.
ENCODING: Final = "UTF-8"

_UUID_START: Final = 0x6000C29
_SUFFIX: Final = ".vmdk"
#: What is behind the disk's own name in that of an extent; a number takes the place of {}.
_TAILS: Final = {
    "FLAT": "-flat",
    "VMFS": "-flat",
    "VMFSSPARSE": "-delta",
    "split FLAT": "-f{:03}",
    "split SPARSE": "-s{:03}",
}


class Geometry(NamedTuple):
    """Cylinders, heads and sectors of a track, as a BIOS wants to hear them; no size comes from them."""

    cylinders: int
    heads: int
    sectors: int


def geometry_for(total_sectors: int, adapter: str) -> Geometry:
    """The geometry that VMware gives a disk of this size behind this adapter; at least one cylinder."""
    size = total_sectors * SECTOR
    if adapter == "ide":
        return Geometry(min(max(total_sectors // (16 * 63), 1), 16383), 16, 63)
    if size < GIB:
        heads, sectors = 64, 32
    elif size < 2 * GIB:
        heads, sectors = 128, 32
    else:
        heads, sectors = 255, 63
    return Geometry(max(total_sectors // (heads * sectors), 1), heads, sectors)


def disk_database(
    *, total_sectors: int, adapter: str, hwversion: int, cid: int, thin: bool = False
) -> dict[str, str]:
    """The disk database of a new disk; ``thin`` is how ESXi tells thin disks of kind vmfs."""
    geometry = geometry_for(total_sectors, adapter)
    keys = {
        "ddb.adapterType": adapter,
        "ddb.geometry.cylinders": str(geometry.cylinders),
        "ddb.geometry.heads": str(geometry.heads),
        "ddb.geometry.sectors": str(geometry.sectors),
        **child_database(cid),
        "ddb.toolsVersion": TOOLS_UNKNOWN,
        "ddb.uuid": random_uuid(),
        "ddb.virtualHWVersion": str(hwversion),
    }
    if thin:
        keys["ddb.thinProvisioned"] = "1"
    return dict(sorted(keys.items()))


def child_database(cid: int) -> dict[str, str]:
    """The disk database of a new child link: all else it takes from its parents."""
    return {"ddb.longContentID": f"{random.getrandbits(96):024x}{cid:08x}"}


def random_uuid() -> str:
    """A new UUID of a disk, written as VMware does: ``60 00 C2 9x xx xx xx xx-xx xx xx xx xx xx xx xx``."""
    digits = f"{_UUID_START:07X}{random.getrandbits(100):025x}"
    pairs = [digits[at : at + 2] for at in range(0, 32, 2)]
    return " ".join(pairs[:8]) + "-" + " ".join(pairs[8:])


def extent_name(main: str, type_word: str, number: int | None = None) -> str:
    """The name of an extent's file, made from that of the descriptor's; ``number`` counts from 1.

    Without a number it is the only one of its kind; a SPARSE one has its descriptor inside then.
    """
    if type_word == "SPARSE" and number is None:
        return main
    stem = main[: -len(_SUFFIX)] if main.lower().endswith(_SUFFIX) and len(main) > len(_SUFFIX) else main
    tail = _TAILS[type_word] if number is None else _TAILS[f"split {type_word}"].format(number)
    return f"{stem}{tail}{_SUFFIX}"
