"""What a child link is like: its kind, and how it names its parent.

Both are as VMware's products have them.  A snapshot is of its parent's family.  A child names a parent in its
own folder plainly; a linked clone names one that is far by its absolute path, so the clone can be moved
alone.  Where both stand in one folder of machines the way from one to the other is told instead, and that
folder can be moved as a whole.
"""

import os
from collections.abc import Collection
from typing import Final

from nbd_vmdk.errors import OptionError
from nbd_vmdk.ondisk.descriptor import is_absolute
from nbd_vmdk.ops.create import products
from nbd_vmdk.ops.create.products import Product, Tell

#: Types of extents that ESX and ESXi alone have.
_ESX_TYPES: Final = frozenset({"VMFS", "VMFSSPARSE", "SESPARSE", "VMFSRDM", "VMFSRAW"})


def child_kind(parent: str, words: Collection[str], product: Product | None, *, note: Tell) -> str:
    """The kind of child that fits a parent with the createType ``parent`` and the extent types ``words``.

    OptionError if it is to be for a product that takes no child.
    """
    if product is not None:
        return products.choose_child(product, split=is_split(parent), note=note)
    # The extents decide: createType is what somebody wrote about them.
    if _ESX_TYPES.intersection(words) or parent.lower().startswith(("vmfs", "sesparse")):
        return "vmfsSparse"
    return hosted_child_kind(parent)


def hosted_child_kind(parent: str) -> str:
    """The same of a child that is no ESXi delta whatever its parent is: split, if that is."""
    return "twoGbMaxExtentSparse" if is_split(parent) else "monolithicSparse"


def is_split(create_type: str) -> bool:
    """Whether disks of this createType are in pieces, by any of the names that VMware has given those."""
    return "gbmaxextent" in create_type.lower()


def parent_hint(parent: str | bytes, child_folder: str) -> str:
    """How a child in ``child_folder`` names the parent whose path is ``parent``, symbolic links resolved.

    The plain name in the same folder; a relative path where parent and child stand in one folder or in
    folders side by side, so that both can be moved together; else an absolute one.  Raises OptionError for a
    name that nobody could follow.
    """
    real = os.fsdecode(os.path.realpath(parent))
    folder = os.path.dirname(real)
    here = os.path.realpath(child_folder or os.curdir)
    above = os.path.commonpath((folder, here))
    if folder != here and (above == "/" or above not in (folder, here, os.path.dirname(here))):
        return real
    way = os.path.relpath(real, here)
    if is_absolute(way):
        why = "a name that begins with a backslash is taken for a path of Windows"
        raise OptionError(real, why=why, hint="rename the parent first")
    return way


def is_elsewhere(hint: str) -> bool:
    """Whether a hint of parent_hint() leads out of the child's folder: then opening it takes --allow-dir."""
    return hint.startswith(("../", "/"))
