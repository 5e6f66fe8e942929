"""Names: what a new child is called, and what a link is called during a merge.

VMware calls the links of ``disk.vmdk`` ``disk-000001.vmdk`` and so on and uses free numbers again; a linked
clone is ``disk-cl1.vmdk``.
"""

import re
from collections.abc import Collection
from typing import Final

_NUMBERED: Final = re.compile(r"-\d{6}$")
_CLONE: Final = re.compile(r"-cl\d+$")
_SUFFIX: Final = ".vmdk"
_MAX_NUMBER: Final = 999_999
#: What stands before ``.vmdk`` in the name of a link that another one is being merged into.
_MERGING: Final = re.compile(r"\.merging-([0-9a-f]{8})(?=\.vmdk$)")


def bare(name: str) -> str:
    """The name without ``.vmdk``, however that is written."""
    return name[: -len(_SUFFIX)] if name.lower().endswith(_SUFFIX) else name


def stem_of(name: str) -> str:
    """What the names of all links of a disk begin with: ``disk`` for ``disk-000002.vmdk``."""
    stem = bare(name)
    return _NUMBERED.sub("", stem) or stem


def next_child(parent: str, taken: Collection[str]) -> str:
    """The name of the next child link of ``parent`` in a folder that holds the names ``taken``."""
    return _first_free(stem_of(parent), "-{:06d}", taken)


def next_clone(parent: str, taken: Collection[str]) -> str:
    """The name of the next linked clone of ``parent`` in a folder that holds the names ``taken``."""
    return _first_free(_CLONE.sub("", stem_of(parent)), "-cl{}", taken)


def _first_free(stem: str, pattern: str, taken: Collection[str]) -> str:
    # Some file systems take names in any case for the same.
    begun = [name.lower() for name in taken]
    for number in range(1, _MAX_NUMBER + 1):
        start = stem + pattern.format(number)
        low = start.lower()
        if not any(name.startswith((f"{low}.", f"{low}-")) for name in begun):
            return start + _SUFFIX
    raise ValueError(f"all names like {stem}{pattern.format(1)}{_SUFFIX} are taken")


def merging_name(parent: str, cid: int) -> str:
    """What ``parent`` is called while the child with the content ID ``cid`` is merged into it."""
    return f"{bare(parent)}.merging-{cid:08x}{_SUFFIX}"


def final_name(name: str) -> str | None:
    """The name that a link will have again after the merge, None if none is under way into it."""
    return _MERGING.sub("", name) if _MERGING.search(name) else None
