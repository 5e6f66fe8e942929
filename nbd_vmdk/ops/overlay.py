"""Overlays: child links that take the writes, so that a disk of whatever kind can be written to and stays.

The disk may be any that can be read: a compressed one, a member of an archive, one on a file system that is
read-only.  A kept overlay names it as VMware's children name their parents, by its content ID and by the way
there where there is one, so that it can be opened by itself; in an archive there is no such way, and the
overlay has to be opened with the disk named beside it.  A disk without a content ID gets no kept overlay,
because nothing would tell a reader of the overlay that its holes are somebody else's bytes.
"""

import os
from dataclasses import replace

from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import OptionError, Unsupported
from nbd_vmdk.look import read_descriptor
from nbd_vmdk.ondisk.descriptor import NO_PARENT
from nbd_vmdk.opening import open_found
from nbd_vmdk.ops.create import CreateOptions, create_planned
from nbd_vmdk.ops.create.child import is_elsewhere, parent_hint
from nbd_vmdk.ops.create.parent import Parent, parent_in, refuse_written
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.vm import FoundDisk, locate

#: What no name in a descriptor has; one in an archive is only for people to read.
_UNFIT = ('"', "\n", "\r", "\0")


def make_scratch(path: str, found: FoundDisk, options: OpenOptions) -> None:
    """Make ``path`` an overlay that is only ever opened together with its disk; raises what opening does."""
    with open_found(found, replace(options, writable=False)) as disk:
        # Tables that can say "zeros" take a trim without a byte written.
        made = CreateOptions(kind="monolithicSparse", zeroed_grain=True)
        create_planned(path, disk.size, made, _scratch_parent(disk))


def make_overlay(path: str, found: FoundDisk, options: OpenOptions) -> list[str]:
    """Make ``path`` an overlay to keep; warnings.

    Raises what opening the disk and making an image raise, Unsupported for a disk without a content ID, and
    InUse while somebody writes it.
    """
    with open_found(found, replace(options, writable=False)) as disk:
        top = disk.links[0]
        if top.cid is None or top.cid == NO_PARENT:
            raise Unsupported(
                found.path,
                what="it has no content ID that an overlay could hold on to",
                hint="--scratch writes to one that is thrown away; or convert the disk",
            )
        refuse_written(top, hint="an overlay needs a disk that nobody changes any more")
        warnings = []
        if isinstance(top.folder, LocalFolder):
            way = parent_hint(found.path, os.path.dirname(path))
            if is_elsewhere(way):
                where = os.path.dirname(os.path.realpath(found.path))
                warnings.append(f"{path}: opening it by itself takes --allow-dir {where}")
        else:
            way = found.alone or found.path
            warnings.append(f"{path}: opening it by itself takes --parent {way}")
            way = parent_hint(way, os.path.dirname(path))
            way = "".join("_" if letter in _UNFIT else letter for letter in way)
        made = create_planned(path, None, CreateOptions(kind="monolithicSparse"), parent_in(disk, way))
        return warnings + list(made.warnings)


def check_overlay(path: str) -> None:
    """Refuse what is there by this name if it is no child link: writes would go into somebody's disk.

    Raises OptionError, and what finding it raises.  Whose child it is comes to light when it is opened.
    """
    found = locate(path)
    descriptor = read_descriptor(found.folder, found.file)
    if descriptor is None or not descriptor.has_parent:
        hint = "name a new file, or an overlay that was made before"
        raise OptionError(path, why="is there already, and is no overlay: it has no parent", hint=hint)


def _scratch_parent(disk: Disk) -> Parent | None:
    """Its disk as an overlay names it; None where that has no content ID to check."""
    top = disk.links[0]
    if top.cid is None or top.cid == NO_PARENT:
        return None
    return parent_in(disk, "scratch")
