"""The descriptor of a disk in another size, and putting it in the place of the old one."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from nbd_vmdk.errors import WriteRefused
from nbd_vmdk.link import Link
from nbd_vmdk.ondisk.descriptor import Descriptor, ExtentLine, random_cid
from nbd_vmdk.ondisk.descriptor_text import HEX32
from nbd_vmdk.ops.resize.changes import Change
from nbd_vmdk.ops.rewrite import DescriptorFile
from nbd_vmdk.units import SECTOR

_MAX_IDE: Final = 16383


def describe(
    held: ExitStack, link: Link, lines: Sequence[ExtentLine], size: int, *, keep_cid: bool = False
) -> Change:
    """The step that gives ``link`` a descriptor with these extent lines; it is locked until ``held`` is left.

    It says that the disk is another one, but with ``keep_cid``.
    """

    def apply() -> None:
        file = held.enter_context(DescriptorFile(link.storages[0]))
        file.replace(_described(file.descriptor, lines, size, keep_cid=keep_cid))

    def rehearse() -> None:
        with DescriptorFile(link.storages[0]) as file:
            file.rehearse(_described(file.descriptor, lines, size, keep_cid=keep_cid))

    return Change(f"{link.name}: its descriptor says the new size", apply, rehearse)


def _described(old: Descriptor, lines: Sequence[ExtentLine], size: int, *, keep_cid: bool) -> Descriptor:
    """The descriptor of the disk in its new size."""
    try:
        new = old.replace_extents(lines)
        if old.cid is not None and not keep_cid:
            cid = random_cid(avoid=old.cid)
            new = new.set("CID", f"{cid:08x}")
            long_id = old.long_content_id
            if long_id is not None and HEX32.fullmatch(long_id):
                new = new.set("ddb.longContentID", f"{long_id[:24]}{cid:08x}")
        return _with_geometry(new, size // SECTOR)
    except ValueError as error:
        raise WriteRefused(old.file, why=str(error)) from None


def _with_geometry(descriptor: Descriptor, sectors: int) -> Descriptor:
    """The descriptor with as many cylinders as the disk has now.

    Heads and sectors of a track stay: the addresses in a partition table were made with them.
    """
    words = [descriptor.get(f"ddb.geometry.{part}") or "" for part in ("heads", "sectors")]
    if descriptor.get("ddb.geometry.cylinders") is None or not all(word.isdecimal() for word in words):
        return descriptor
    track = int(words[0]) * int(words[1])
    if not track:
        return descriptor
    cylinders = max(sectors // track, 1)
    if descriptor.get("ddb.adapterType") == "ide":
        cylinders = min(cylinders, _MAX_IDE)
    return descriptor.set("ddb.geometry.cylinders", str(cylinders))
