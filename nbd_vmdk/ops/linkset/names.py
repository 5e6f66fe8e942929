"""What the files of a link are called when the link is called something else, and what its descriptor says.

An extent that is named after its link (``disk-s001.vmdk``) keeps what is behind that; any other gets the name
that a new image's would have.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from nbd_vmdk.errors import FileMissing, OptionError, StorageError, WriteRefused
from nbd_vmdk.extents.base import Extent
from nbd_vmdk.link import Link
from nbd_vmdk.ondisk.descriptor import Descriptor
from nbd_vmdk.ondisk.descriptor_build import extent_name
from nbd_vmdk.ops.rewrite import real_path
from nbd_vmdk.ops.snapshot.names import bare, stem_of

_SUFFIX: Final = ".vmdk"


def target_path(wanted: str | os.PathLike[str], name: str) -> str:
    """Where a link called ``name`` goes that is to be ``wanted``: a folder, or a new name.

    Raises OptionError for what is no name of an image, and FileMissing for a place in no folder.
    """
    path = os.fspath(wanted)
    if path.endswith("/") or os.path.isdir(path):
        path = os.path.join(path, name)
    elif not path.lower().endswith(_SUFFIX) or len(os.path.basename(path)) <= len(_SUFFIX):
        hint = "it should end in .vmdk, or be a folder that is there"
        raise OptionError(None, why=f"{path} is no name of an image", hint=hint)
    folder = os.path.dirname(path) or os.curdir
    try:
        os.stat(folder)
    except FileNotFoundError as error:
        raise FileMissing(folder, hint="make that folder first") from error
    except OSError as error:
        raise StorageError.of(error, folder, "look at") from error
    return path


def new_names(link: Link, paths: Iterable[str], old: str, new: str) -> dict[str, str]:
    """The new plain names of the files ``paths`` of a link whose main file ``old`` will be called ``new``.

    Raises OptionError where two would be the same.
    """
    found: dict[str, str] = {}
    stem, new_stem = bare(old), bare(new)
    numbers = {
        os.path.basename(real_path(entry.extent.storage)): (number, entry.extent)
        for number, entry in enumerate(link.extents, 1)
        if entry.extent.storage is not None
    }
    for path in paths:
        name = os.path.basename(path)
        if name == old:
            found[name] = new
        elif name.startswith(stem) and name[len(stem) : len(stem) + 1] in ("-", "."):
            found[name] = new_stem + name[len(stem) :]
        elif old == new:
            found[name] = name
        else:
            number, extent = numbers[name]
            found[name] = extent_name(new, _word(extent), number if len(numbers) > 1 else None)
    if len(set(found.values())) != len(found):
        raise OptionError(None, why=f"{', '.join(sorted(found))} can't all be named after {new}")
    return found


def _word(extent: Extent) -> str:
    word = extent.type_word
    return word if word in ("SPARSE", "VMFSSPARSE") else "FLAT"


def with_names(
    descriptor: Descriptor, link: Link, names: Mapping[str, str], *, hint: str | None = None
) -> Descriptor:
    """The descriptor with the new ``names`` of the link's files, and with another ``hint`` to its parent.

    Raises WriteRefused for a name that it can't hold.
    """
    try:
        entries = iter(link.extents)
        for index, line in enumerate(descriptor.extents):
            if not line.sectors:
                continue
            storage = next(entries).extent.storage
            if storage is not None and line.name is not None:
                new = names[os.path.basename(real_path(storage))]
                if new != line.name:
                    descriptor = descriptor.set_extent_name(index, new)
        tracking = descriptor.change_track_path
        if tracking is not None and names.get(tracking, tracking) != tracking:
            descriptor = descriptor.set("changeTrackPath", names[tracking])
        if hint is not None:
            descriptor = descriptor.set("parentFileNameHint", hint)
    except ValueError as error:
        raise WriteRefused(descriptor.file, why=str(error), hint="choose another name") from None
    return descriptor


def chain_names(names: Sequence[str], new: str, there: Iterable[str]) -> list[str]:
    """New names for the links of a chain, top first, the top being called ``new``.

    No two are alike, and none but the top's is among those that are ``there``.
    """
    stem, new_stem = stem_of(names[0]), stem_of(new)
    found = [new]
    for depth, name in enumerate(names[1:], 1):
        chosen = new_stem + name[len(stem) :] if stem_of(name) == stem else name
        if chosen.lower() in {each.lower() for each in (*found, *there)}:
            chosen = f"{new_stem}-parent{depth}{_SUFFIX}"
        found.append(chosen)
    return found
