"""From what is asked for to what will be made: every question is settled here, before the first file.

What contradicts itself or can't be is an OptionError.  What was chosen for a product is noted with its
reason, what it will take but not like is a warning.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from nbd_vmdk.errors import OptionError
from nbd_vmdk.ondisk import cowd_build, hosted_build, stream_build
from nbd_vmdk.ondisk.descriptor import (
    FRESH_CID,
    NO_PARENT,
    ExtentLine,
    build_descriptor,
    random_cid,
)
from nbd_vmdk.ondisk.descriptor_build import (
    ADAPTERS,
    ENCODING,
    LATER_ADAPTERS,
    child_database,
    disk_database,
    extent_name,
    geometry_for,
)
from nbd_vmdk.ondisk.descriptor_text import HEX32
from nbd_vmdk.ops.create import products
from nbd_vmdk.ops.create.child import child_kind
from nbd_vmdk.ops.create.custom import Parts, read_parts
from nbd_vmdk.ops.create.files import NewFile, cowd_file, flat_file, sparse_file, stream_file, text_file
from nbd_vmdk.ops.create.options import CUSTOM, KINDS, PREALLOCATIONS, CreateOptions, Kind, find_kind
from nbd_vmdk.ops.create.parent import Parent
from nbd_vmdk.ops.create.products import Product
from nbd_vmdk.units import MAX_OFFSET, MIB, SECTOR, TIB, align_up, format_size

#: Extents of split disks, in sectors: 2047 MiB, which any file system takes, in whole grains of any size.
SPLIT_SECTORS: Final = 4192256
_MIN_SPLIT: Final = MIB
#: More files than this no product has ever put a disk together from, nor may a process open many more.
_MAX_EXTENTS: Final = 4096
_MAX_VMFS: Final = 62 * TIB
#: What to do about disks that are too large for kinds with their tables in one file.
_TAKES_MORE: Final = {
    "monolithicSparse": "--type twoGbMaxExtentSparse takes more",
    "streamOptimized": "--type twoGbMaxExtentSparse takes more",
    "vmfsSparse": "ESXi's own deltas of such disks are seSparse, which can't be made; "
    "for other products, --type twoGbMaxExtentSparse takes more",
}
_ROOM: Final = "a file with tables has room for a little less than 2 TiB"
_HWVERSIONS: Final = range(3, 100)


@dataclass(slots=True, kw_only=True)
class Plan:
    """What will be made: ``files`` in the order to make them, the one with the descriptor last."""

    kind: Kind
    size: int
    adapter: str | None = None
    hwversion: int | None = None
    cid: int = FRESH_CID
    text: bytes = b""
    lines: list[ExtentLine] = field(default_factory=list)
    files: list[NewFile] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def make_plan(path: str, size: int | None, options: CreateOptions, parent: Parent | None) -> Plan:
    """Settle everything; OptionError tells what can't be."""
    product = None if options.product is None else products.find_product(options.product)
    notes: list[str] = []
    warnings = [] if parent is None else list(parent.warnings)
    kind = _choose_kind(options, product, parent, notes.append)
    _check_options(kind, options)
    if product is not None:
        below = None if parent is None else parent.create_type
        products.check_kind(product, kind, parent=below, warn=warnings.append)
        if kind.name == "vmfs" and options.preallocation is None:
            notes.append("thin: space is taken as it is written; --preallocation full makes it thick")
    parts = read_parts(path, options) if kind is CUSTOM else None
    size = _choose_size(size, kind, parent, parts, notes)
    plan = Plan(kind=kind, size=size, notes=notes, warnings=warnings)
    _choose_hardware(plan, options, is_child=parent is not None)
    _plan_extents(plan, os.path.basename(path), options, parts)
    products.tell_of_qemu(
        product,
        kind,
        extents=len(plan.lines),
        is_child=parent is not None,
        note=notes.append,
        warn=warnings.append,
    )
    if product is not None:
        products.check_features(
            product,
            kind,
            size=size,
            grain=options.grain_size or hosted_build.DEFAULT_GRAIN * SECTOR,
            zeroed=options.zeroed_grain,
            words=[line.type for line in plan.lines],
            depth=0 if parent is None else parent.depth,
            warn=warnings.append,
        )
        if not product.long_content_id:
            notes.append(f"without ddb.longContentID, which {product.title} would not keep right")
    _write_text(plan, path, options, parent, with_long_id=product is None or product.long_content_id)
    return plan


def _choose_kind(
    options: CreateOptions, product: Product | None, parent: Parent | None, note: products.Tell
) -> Kind:
    if options.kind is not None:
        return find_kind(options.kind)
    if options.extents:
        return CUSTOM
    if parent is not None:
        return KINDS[child_kind(parent.create_type, parent.words, product, note=note)]
    return KINDS["monolithicSparse" if product is None else products.choose_kind(product, note=note)]


def _check_options(kind: Kind, options: CreateOptions) -> None:
    """Refuse options that mean nothing for this kind."""
    has_tables = not kind.flat
    uncompressed = kind.word == "SPARSE" and kind.name != "streamOptimized"
    given = (
        ("--grain-size", options.grain_size, has_tables, "its files have no grains"),
        ("--extent-size", options.extent_size, kind.split, "it is in one piece"),
        ("--zeroed-grain", options.zeroed_grain, uncompressed or kind is CUSTOM, "its tables know no zeros"),
        (
            "--preallocation",
            options.preallocation not in (None, "off"),
            kind.flat or kind is CUSTOM,
            "its files grow with their content",
        ),
        ("--extent", options.extents, kind is CUSTOM, "only --type custom is put together from extents"),
    )
    if options.parent and not kind.child:
        why = f"a child can't be {kind.name}: no parent shows through a disk of that kind"
        hint = "leave --parent out" if kind is CUSTOM else "leave --type out, and it gets the kind that fits"
        raise OptionError(None, why=why, hint=hint)
    for name, value, fits, why in given:
        if value and not fits:
            raise OptionError(None, why=f"{name} is not for a disk of kind {kind.name}: {why}")
    if kind is CUSTOM and not options.extents:
        hint = "--extent 'RW 2048 FLAT \"data.img\" 0' for each, sizes in sectors"
        raise OptionError(
            None, why="a custom disk is put together from extents, and none is given", hint=hint
        )
    if options.preallocation not in (None, *PREALLOCATIONS):
        why = f"{options.preallocation!r} is no way to preallocate"
        raise OptionError(None, why=why, hint=f"choose one of {', '.join(PREALLOCATIONS)}")


def _choose_size(
    size: int | None, kind: Kind, parent: Parent | None, parts: Parts | None, notes: list[str]
) -> int:
    """The size of the disk in bytes, in whole sectors."""
    given = None if size is None else align_up(size, SECTOR)
    if given is not None and given != size:
        notes.append(f"the size is rounded up to whole sectors: {given} bytes")
    if parent is not None:
        _agree(given, parent.size, f"a child is as large as its parent, {parent.name}")
        return parent.size
    if parts is not None:
        whole = sum(line.sectors for line in parts.lines) * SECTOR
        _agree(given, whole, "a custom disk is as large as its extents")
        return whole
    if given is None:
        raise OptionError(None, why="a size is needed", hint="such as 20G, 512M, or a number of bytes")
    if given <= 0:
        raise OptionError(None, why="a disk needs at least one sector")
    most = _MAX_VMFS if kind.name == "vmfs" else MAX_OFFSET
    if given > most:
        why = _ROOM if kind.name in _TAKES_MORE else f"the largest is {format_size(most)}"
        raise _too_large(given, kind, why)
    return given


def _agree(given: int | None, must: int, why: str) -> None:
    if given is not None and given != must:
        raise OptionError(None, why=f"{why}: {must} bytes, not {given}", hint="leave the size out")


def _too_large(size: int, kind: Kind, why: str) -> OptionError:
    why = f"{format_size(size)} is too much for {kind.name}: {why}"
    return OptionError(None, why=why, hint=_TAKES_MORE.get(kind.name))


def _choose_hardware(plan: Plan, options: CreateOptions, *, is_child: bool) -> None:
    """Adapter and hardware version; a child takes what it is not told from its parents."""
    adapter, hwversion = options.adapter, options.hwversion
    if adapter is not None:
        known = {name.lower(): name for name in ADAPTERS}
        if adapter.lower() in LATER_ADAPTERS:
            plan.notes.append(f"the adapter is written as lsilogic: that is how disks on {adapter} call it")
            adapter = "lsilogic"
        elif adapter.lower() not in known:
            choice = ", ".join((*ADAPTERS, *LATER_ADAPTERS))
            raise OptionError(None, why=f"{adapter!r} is no known adapter", hint=f"choose one of {choice}")
        else:
            adapter = known[adapter.lower()]
    elif not is_child:
        adapter = "lsilogic"
    if hwversion is None and not is_child:
        hwversion = products.DEFAULT_HWVERSION
    elif hwversion is not None and hwversion not in _HWVERSIONS:
        what = f"{_HWVERSIONS.start} to {_HWVERSIONS.stop - 1}"
        raise OptionError(None, why=f"{hwversion} is no virtual hardware version: they are {what}")
    plan.adapter, plan.hwversion = adapter, hwversion


def _plan_extents(plan: Plan, main: str, options: CreateOptions, parts: Parts | None) -> None:
    kind, sectors = plan.kind, plan.size // SECTOR
    if parts is not None:
        plan.lines = parts.lines
        plan.adopted = parts.adopted
        plan.warnings += parts.warnings
        for name, lines in parts.wanted.items():
            length = max(line.offset_sectors + line.sectors for line in lines)
            plan.files.append(_file(plan, lines[0].type, name, length, options))
    elif kind.split:
        step = _split_size(kind, options)
        count = -(-sectors // step)
        if count > _MAX_EXTENTS:
            why = f"it would take {count} extents, and {_MAX_EXTENTS} are the most"
            raise OptionError(None, why=why, hint="make them larger with --extent-size")
        for number in range(count):
            length = min(step, sectors - number * step)
            name = extent_name(main, kind.word, number + 1)
            plan.lines.append(ExtentLine("RW", length, kind.word, name))
            plan.files.append(_file(plan, kind.word, name, length, options))
    else:
        name = extent_name(main, kind.word)
        plan.lines.append(ExtentLine("RW", sectors, kind.word, name))
        plan.files.append(_file(plan, kind.word, name, sectors, options, is_main=name == main))
    if not any(file.name == main for file in plan.files):
        plan.files.append(text_file(main))


def _split_size(kind: Kind, options: CreateOptions) -> int:
    """Sectors of each extent but the last of a split disk."""
    size = options.extent_size
    if size is None:
        size = SPLIT_SECTORS * SECTOR
        if options.grain_size and kind.word == "SPARSE":
            size = max(size // options.grain_size, 1) * options.grain_size
    unit = (options.grain_size or hosted_build.DEFAULT_GRAIN * SECTOR) if kind.word == "SPARSE" else SECTOR
    if size < _MIN_SPLIT or size % unit:
        least = format_size(_MIN_SPLIT)
        why = f"extents of {size} bytes can't be: they take at least {least}, in steps of {format_size(unit)}"
        raise OptionError(None, why=why)
    return size // SECTOR


def _file(
    plan: Plan, word: str, name: str, sectors: int, options: CreateOptions, *, is_main: bool = False
) -> NewFile:
    """The file of one extent."""
    if word in ("FLAT", "VMFS"):
        return flat_file(name, sectors * SECTOR, options.preallocation or "off")
    if word == "VMFSSPARSE":
        grain = _grain(options, cowd_build.DEFAULT_GRAIN, cowd_build.MIN_GRAIN, cowd_build.MAX_GRAIN)
        if not cowd_build.can_fill(sectors, grain_sectors=grain):
            raise _too_large(sectors * SECTOR, plan.kind, _ROOM)
        geometry = geometry_for(sectors, plan.adapter or "lsilogic")
        return cowd_file(name, cowd_build.new_extent(sectors, grain_sectors=grain, geometry=geometry))
    grain = _grain(options, hosted_build.DEFAULT_GRAIN, hosted_build.MIN_GRAIN, hosted_build.MAX_GRAIN)
    header = hosted_build.new_extent(
        sectors, grain_sectors=grain, zeroed_grains=options.zeroed_grain, descriptor=is_main
    )
    if not hosted_build.can_fill(header):
        raise _too_large(sectors * SECTOR, plan.kind, _ROOM)
    if plan.kind.name == "streamOptimized":
        return stream_file(name, stream_build.stream_header(sectors, grain_sectors=grain))
    return sparse_file(name, header)


def _grain(options: CreateOptions, default: int, least: int, most: int) -> int:
    """Sectors of a grain."""
    if options.grain_size is None:
        return default
    sectors, rest = divmod(options.grain_size, SECTOR)
    if rest or not least <= sectors <= most or sectors & (sectors - 1):
        bounds = f"a power of two from {format_size(least * SECTOR)} to {format_size(most * SECTOR)}"
        raise OptionError(None, why=f"a grain can't have {options.grain_size} bytes: it must be {bounds}")
    return sectors


def _write_text(
    plan: Plan, path: str, options: CreateOptions, parent: Parent | None, *, with_long_id: bool
) -> None:
    """The content ID and the descriptor."""
    if parent is not None or plan.adopted:
        # A fresh disk has the content ID of all fresh disks; one that has content needs its own.
        plan.cid = random_cid(avoid=None if parent is None else parent.cid)
    keys = child_database(plan.cid)
    if plan.adapter is not None and plan.hwversion is not None:
        keys = disk_database(
            total_sectors=plan.size // SECTOR,
            adapter=plan.adapter,
            hwversion=plan.hwversion,
            cid=plan.cid,
            thin=plan.kind.name == "vmfs" and options.preallocation in (None, "off"),
        )
    elif plan.adapter is not None:
        keys["ddb.adapterType"] = plan.adapter
    elif plan.hwversion is not None:
        keys["ddb.virtualHWVersion"] = str(plan.hwversion)
    if not with_long_id:
        del keys["ddb.longContentID"]
    keys = dict(sorted((keys | _own_keys(options.ddb.items(), plan.cid)).items()))
    try:
        plan.text = build_descriptor(
            create_type=plan.kind.name,
            extents=plan.lines,
            cid=plan.cid,
            parent_cid=NO_PARENT if parent is None else parent.cid,
            parent_hint=None if parent is None else parent.hint,
            ddb=keys,
            encoding=ENCODING,
            embedded=plan.files[-1].role == "disk",
        )
    except ValueError as error:
        raise OptionError(path, why=str(error), hint="choose another name") from None


def _own_keys(items: Iterable[tuple[str, str]], cid: int) -> dict[str, str]:
    """The caller's keys of the disk database; the content ID in one of them is ours to say."""
    keys = dict(items)
    long_id = keys.get("ddb.longContentID", "")
    if HEX32.fullmatch(long_id):
        keys["ddb.longContentID"] = f"{long_id[:24]}{cid:08x}"
    return keys
