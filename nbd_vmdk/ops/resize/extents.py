"""The extents of a disk in another size: which lines its descriptor has, and the files of new ones."""

import os
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Final

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import FileExists, FileMissing, OptionError, VmdkError, WriteRefused
from nbd_vmdk.extents.base import NOTHING, Extent
from nbd_vmdk.extents.flat import FlatExtent
from nbd_vmdk.extents.hosted import HostedExtent
from nbd_vmdk.link import Link
from nbd_vmdk.look import find_owner
from nbd_vmdk.ondisk import hosted, hosted_build
from nbd_vmdk.ondisk.descriptor import ExtentLine
from nbd_vmdk.ondisk.descriptor_build import extent_name
from nbd_vmdk.ops.create.plan import SPLIT_SECTORS
from nbd_vmdk.ops.resize.changes import Change, is_zero
from nbd_vmdk.ops.rewrite import real_path
from nbd_vmdk.ops.snapshot.files import remove_files
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.newfiles import NewFiles
from nbd_vmdk.units import MIB, SECTOR, format_size

_NUMBERED: Final = re.compile(r"(.*-[sf])(\d{3,})(\.vmdk)", re.IGNORECASE)
#: Extents that nothing names any more are looked for under so many further numbers.
_MAX_LEFT: Final = 4096


def grown_lines(lines: Sequence[ExtentLine], create_type: str, main: str, sectors: int) -> list[ExtentLine]:
    """The extent lines of a disk that is larger by so many sectors.

    The last extent grows, that of a split disk to the size that its others have.  OptionError if there would
    be too many.
    """
    last = lines[-1]
    made = list(lines[:-1])
    if not create_type.lower().startswith("twogbmaxextent"):
        return [*made, replace(last, sectors=last.sectors + sectors)]
    step = max(lines[0].sectors, last.sectors) if made else max(last.sectors, SPLIT_SECTORS)
    taken = min(sectors, step - last.sectors)
    made.append(replace(last, sectors=last.sectors + taken))
    sectors -= taken
    if len(made) + sectors // step > _MAX_LEFT:
        raise OptionError(
            None,
            why=f"it would have more than {_MAX_LEFT} extents of {format_size(step * SECTOR)}",
            hint="nbd-vmdk convert makes a copy with a larger --extent-size",
        )
    while sectors:
        taken = min(sectors, step)
        name = _next_name(made[-1].name or "", main, last.type, len(made) + 1)
        made.append(ExtentLine("RW", taken, last.type, name))
        sectors -= taken
    return made


def kept_lines(lines: Sequence[ExtentLine], sectors: int) -> list[ExtentLine]:
    """The extent lines of a disk that is cut to so many sectors."""
    kept = []
    for line in lines:
        if sectors:
            kept.append(replace(line, sectors=min(line.sectors, sectors)))
            sectors -= kept[-1].sectors
    return kept


def _next_name(name: str, main: str, type_word: str, number: int) -> str:
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return extent_name(main, type_word, number)
    return f"{match[1]}{int(match[2]) + 1:0{len(match[2])}}{match[3]}"


def make_extents(link: Link, lines: Sequence[ExtentLine], *, reserve: bool) -> list[Change]:
    """The step that makes the files of new extents like the last one of ``link``.

    With ``reserve`` the space of files without tables is taken at once.  Raises FileExists if one is there,
    but for an empty one that no descriptor names: an earlier attempt left it.
    """
    like = link.extents[-1].extent
    if not isinstance(like, (HostedExtent, FlatExtent)):
        raise WriteRefused(link.name, why=f"extents of type {like.type_word} are not made by the split kinds")
    home = os.path.dirname(real_path(link.storages[0]))
    if os.path.dirname(real_path(like.storage)) != home:
        raise WriteRefused(link.name, why="its extents are in another folder than its descriptor")
    names = [line.name for line in lines if line.name is not None]
    for name in names:
        if "/" in name:
            raise WriteRefused(link.name, why=f"{name} would be outside its folder")
        if name in link.folder.names() and not is_leftover(link, name):
            raise FileExists(link.folder.label(name))

    def apply() -> None:
        remove_files([os.path.join(home, name) for name in names if name in link.folder.names()])
        with NewFiles(os.path.join(home, names[-1])) as new:
            for line, name in zip(lines, names, strict=True):
                with closing(new.create(name)) as storage:
                    _fill(storage, like, line)
                if reserve and isinstance(like, FlatExtent):
                    new.reserve(name, line.sectors * SECTOR)
            new.publish(main=names[-1])

    span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return [Change(f"{len(names)} new extents: {span}" if len(names) > 1 else f"a new extent: {span}", apply)]


def _fill(storage: Storage, like: Extent, line: ExtentLine) -> None:
    if not isinstance(like, HostedExtent):
        storage.truncate(line.sectors * SECTOR)
        return
    header = hosted_build.new_extent(
        line.sectors,
        grain_sectors=like.header.grain_sectors,
        zeroed_grains=like.header.zeroed_grains,
    )
    storage.truncate(header.overhead_sectors * SECTOR)
    for at, content in hosted_build.metadata(header):
        storage.write(content, at)


def leftovers(link: Link, lines: Sequence[ExtentLine]) -> list[str]:
    """The paths of empty extents that follow in number on the last of ``lines`` and that nothing names."""
    found: list[str] = []
    name = lines[-1].name or ""
    match = _NUMBERED.fullmatch(name)
    while match is not None and "/" not in name and len(found) < _MAX_LEFT:
        name = _next_name(name, "", "", 0)
        if name not in link.folder.names() or not is_leftover(link, name):
            break
        found.append(os.path.join(os.path.dirname(real_path(link.storages[0])), name))
    return found


def is_leftover(link: Link, name: str) -> bool:
    """Whether the file ``name`` is an extent without any data that no descriptor in the folder names."""
    if find_owner(link.folder, name) is not None:
        return False
    try:
        storage = link.folder.open(name)
    except FileMissing:
        return False
    try:
        if storage.read(0, min(storage.size, 4)) != hosted.MAGIC:
            return is_zero(storage, 0, storage.size)
        header = hosted.parse_header(storage.read(0, SECTOR), storage.name)
        if header.descriptor_sector or header.compressed:
            return False
        extent = HostedExtent(storage, header, Cache(MIB), size=header.capacity)
        return all(run[0] in NOTHING for run in extent.runs(0, extent.size))
    except VmdkError:
        return False
    finally:
        storage.close()
