"""Making a link larger: its last extent grows, others are made, and its descriptor says so last."""

from contextlib import ExitStack

from nbd_vmdk.errors import WriteRefused
from nbd_vmdk.extents.cowd import CowdExtent
from nbd_vmdk.extents.flat import FlatExtent, ZeroExtent
from nbd_vmdk.extents.hosted import HostedExtent
from nbd_vmdk.link import Link
from nbd_vmdk.ondisk.descriptor_build import geometry_for
from nbd_vmdk.ops.resize.changes import Change, grow_file, is_zero
from nbd_vmdk.ops.resize.description import describe
from nbd_vmdk.ops.resize.extents import grown_lines, make_extents
from nbd_vmdk.ops.resize.tables import grow_cowd, grow_hosted
from nbd_vmdk.ops.rewrite import real_path
from nbd_vmdk.units import SECTOR, format_size


def grow_link(
    held: ExitStack,
    link: Link,
    size: int,
    *,
    below: int,
    name: str,
    reserve: bool,
    keep_cid: bool = False,
) -> list[Change]:
    """The steps that make ``link``, which is open for writing, ``size`` bytes large.

    below     how large its parent is, 0 for a base
    name      what new extents are called after, where the last one has no number
    reserve   extents without tables take the space of what is added
    keep_cid  the content ID stays: what a child shows of the link is the same before and after

    What is added reads as zeros.  The descriptor stays locked until ``held`` is left.  Raises WriteRefused
    for what can't grow, OptionError for too large a size, FileExists if the name of a new extent is taken;
    then nothing has changed.
    """
    if below > link.size:
        raise WriteRefused(link.name, why="its parent is larger, and would show through what is added")
    assert link.descriptor is not None
    old = [line for line in link.descriptor.extents if line.sectors]
    lines = grown_lines(old, link.descriptor.create_type or "", name, (size - link.size) // SECTOR)
    count = len(old)
    changes = []
    if lines[count - 1] != old[-1]:
        changes += _grow_last(link, lines[count - 1].sectors, size, reserve=reserve)
    if len(lines) > count:
        changes += make_extents(link, lines[count:], reserve=reserve)
    return [*changes, describe(held, link, lines, size, keep_cid=keep_cid)]


def _grow_last(link: Link, sectors: int, size: int, *, reserve: bool) -> list[Change]:
    entry = link.extents[-1]
    extent = entry.extent
    if isinstance(extent, ZeroExtent):
        return []
    if entry.writable is None or entry.access != "RW":
        raise WriteRefused(link.name, why=f"its last extent can't be written ({extent.type_word})")
    if isinstance(extent, HostedExtent):
        return grow_hosted(extent.storage, extent.header, extent.size, sectors)
    if isinstance(extent, CowdExtent):
        assert link.descriptor is not None
        geometry = geometry_for(size // SECTOR, link.descriptor.get("ddb.adapterType") or "lsilogic")
        return grow_cowd(extent.storage, extent.header, extent.size, sectors, geometry)
    if not isinstance(extent, FlatExtent):
        raise WriteRefused(
            link.name,
            why=f"a {link.create_type} file can't be made larger",
            hint="nbd-vmdk convert makes a copy of another --type, which can",
        )
    return [_grow_flat(link, extent, extent.start + sectors * SECTOR, reserve=reserve)]


def _grow_flat(link: Link, extent: FlatExtent, end: int, *, reserve: bool) -> Change:
    storage, behind = extent.storage, extent.start + extent.size
    real_path(storage)  # only a regular file can grow
    users = [entry for entry in link.extents if entry.extent.storage is storage]
    if len(users) > 1 or not is_zero(storage, behind, max(storage.size - behind, 0)):
        raise WriteRefused(link.name, why=f"{storage.name} goes on behind its extent, with something else")
    text = f"{storage.name}: {format_size(end)} long"
    return Change(text, lambda: grow_file(storage, end, reserve=reserve))
