"""From a file name to a link: probing, the descriptor, and an extent object for each of its lines.

The order of evidence is: magic of the opened file first, type word of the extent line second, createType
last.  A file that is not the one to open (an extent of a split disk, a -flat) is refused with the name of the
one that is.  Every file that a descriptor names is opened through the folder's gate.
"""

import re
from dataclasses import dataclass, field

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import (
    BadDescriptor,
    BadField,
    FileMissing,
    FormatError,
    InUse,
    NotVmdk,
    Truncated,
    TrustError,
    Unsupported,
    VmdkError,
)
from nbd_vmdk.extents.base import Extent
from nbd_vmdk.extents.cowd import CowdExtent
from nbd_vmdk.extents.flat import FlatExtent, LostExtent, ZeroExtent, refuse_shared
from nbd_vmdk.extents.hosted import HostedExtent, check_grain_area
from nbd_vmdk.extents.newstream import NewStreamExtent, is_new
from nbd_vmdk.extents.sesparse import SeSparseExtent
from nbd_vmdk.extents.stream import StreamExtent
from nbd_vmdk.extents.vetting import quick_check, quick_check_cowd
from nbd_vmdk.link import DescriptorPlace, Link, LinkExtent
from nbd_vmdk.look import EXTENT_SUFFIX, embedded_text, find_owner, head_of, spellings
from nbd_vmdk.ondisk import cowd, hosted, sesparse
from nbd_vmdk.ondisk.descriptor import (
    MAX_DESCRIPTOR,
    Descriptor,
    ExtentLine,
    is_absolute,
    last_component,
)
from nbd_vmdk.ondisk.probe import FileKind, describe_other, identify
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.locks import vmware_lock
from nbd_vmdk.units import SECTOR, align_up

_SPARSE_KINDS = (FileKind.HOSTED, FileKind.COWD, FileKind.SESPARSE)
_RAW_TYPES = ("FLAT", "VMFS", "VMFSRAW")
_DELTA_NAME = re.compile(r"-\d{6}(?:-s\d{3,}|-delta|-sesparse)?\.vmdk$", re.IGNORECASE)
#: An extent with at most so many grains in its file (64 GiB, as everybody makes hosted ones; half a one in
#: COWD) is vetted whenever it is opened for writing, in 50 ms; a larger one if it was not closed cleanly.
#: Grains that there are tables for count for less, because tables of nothing are looked at faster.
_VETTED_GRAINS = 1 << 20
_GRAINS_OF_NOTHING = 16
_SIZE_HINT = "serve it with the descriptor that belongs to it"
_UNCLEAN = "{}: it was not closed cleanly the last time it was written"


@dataclass(slots=True)
class _Opening:
    """What is gathered while one link is opened; closed as a whole if that fails."""

    folder: Folder
    options: OpenOptions
    cache: Cache
    writable: bool
    warnings: list[str] = field(default_factory=list)
    storages: dict[str, Storage] = field(default_factory=dict)
    #: Names that lines with access RW use: such a file is opened for writing before any extent holds it.
    written: frozenset[str] = frozenset()
    #: The disk is one file without a parent, which may be appended to if it is compressed and empty.
    whole: bool = False
    #: Files with tables that an extent holds.
    tabled: set[tuple[int, ...]] = field(default_factory=set)

    def open(self, name: str) -> Storage:
        """Open a file of the link through the gate, once."""
        if name not in self.storages:
            self.storages[name] = self.folder.open(name)
        return self.storages[name]

    def open_for_writing(self, name: str) -> Storage:
        """Open a file again, for writing, in the place of the first opening that served to look at it."""
        there = self.open(name)
        if there.writable:
            return there
        storage = self.folder.open(name, writable=True)
        self.storages[name] = storage
        there.close()
        if there.identity != storage.identity:
            raise NotVmdk(there.name, what="it was replaced while it was being opened")
        return storage

    def is_written(self, name: str, line: ExtentLine | None) -> bool:
        """Whether the file ``name`` is to be opened for writing, being that of an extent line."""
        return line is not None and not self.written.isdisjoint((name, line.name))

    def lock(self) -> list[str]:
        """Lock every file as it was opened, or only look for writers; what is worth a warning."""
        warnings = []
        for storage in self.storages.values():
            if self.options.locks:
                warning = storage.lock(storage.writable)
            else:
                writer = storage.writer()
                warning = writer and f"another process is {writer}; what is shown may be changing"
            if warning:
                warnings.append(f"{storage.name}: {warning}")
        return warnings

    def close(self) -> None:
        for storage in self.storages.values():
            storage.close()


def open_link(folder: Folder, name: str, options: OpenOptions, cache: Cache, *, writable: bool) -> Link:
    """Open the VMDK ``name`` of ``folder``, without its parent.

    With ``writable`` its files are opened and locked for writing where its kind can be written; where it
    can't, a warning says so.  Raises VmdkError of every sort.
    """
    opening = _Opening(folder, options, cache, writable and folder.read_only is None)
    if writable and folder.read_only is not None:
        opening.warnings.append(f"{folder.label(name)}: {folder.read_only}")
    try:
        if opening.writable and (held := vmware_lock(folder, last_component(name))):
            raise InUse(folder.label(name), how=held)
        link = _open(opening, name)
        link.warnings.extend(opening.lock())
    except BaseException:
        opening.close()
        raise
    return link


def _open(opening: _Opening, name: str) -> Link:
    storage = opening.open(name)
    head = head_of(storage)
    kind = identify(head)
    match kind:
        case FileKind.DESCRIPTOR:
            # One byte more than any descriptor may have, so that parsing sees what is too long.
            text = storage.read(0, min(storage.size, MAX_DESCRIPTOR + 1))
            descriptor = Descriptor.parse(text, storage.name)
            return _open_described(opening, name, descriptor, at=0)
        case FileKind.HOSTED:
            header = hosted.parse_header(head, storage.name)
            text = embedded_text(storage, header)
            if text:
                descriptor = Descriptor.parse(text, storage.name)
                at = header.descriptor_sector * SECTOR
                return _open_described(opening, name, descriptor, at=at, header=header)
            return _open_bare(opening, name, kind)
        case FileKind.COWD | FileKind.SESPARSE:
            return _open_bare(opening, name, kind)
        case FileKind.TAR:
            return _open_archive(opening, name)
        case _:
            raise _refusal(opening, name, storage, kind, head)


def _refusal(opening: _Opening, name: str, storage: Storage, kind: FileKind, head: bytes) -> VmdkError:
    """Why a file that is no VMDK is refused, and which one to open instead."""
    hint: str | None = None
    if kind is FileKind.UNFINISHED:
        try:
            hosted.parse_header(head, storage.name)
        except FormatError as error:
            return error
    if kind is FileKind.CHANGE_TRACKING:
        what = "a change-tracking file, which holds no disk data"
        hint = f"name the disk it belongs to: {re.sub(r'-ctk(?=[.]vmdk$)', '', name)}"
    elif kind is FileKind.EMPTY:
        what = "an empty file"
    elif owner := find_owner(opening.folder, name):
        what = f"an extent of {owner}, not a disk by itself"
        hint = f"open {opening.folder.label(owner)} instead"
    else:
        what, hint = describe_other(head)
        if EXTENT_SUFFIX.search(name):
            what = f"raw data without a descriptor ({what})"
            hint = f"it needs {EXTENT_SUFFIX.sub('', name)} beside it: {_SIZE_HINT}"
    return NotVmdk(storage.name, what=what, hint=hint and hint.replace("FILE", storage.name))


def _open_archive(opening: _Opening, name: str) -> Link:
    """The only disk of an OVA, read inside the archive."""
    from nbd_vmdk.vm.found import only_disk
    from nbd_vmdk.vm.package import disks_in_archive  # seldom needed, and slow to import

    storage = opening.storages.pop(name)
    storage.close()
    if opening.folder.read_only is not None:
        raise NotVmdk(storage.name, what="an archive inside an archive", hint="unpack the outer one first")
    disk = only_disk(disks_in_archive(opening.folder, name), storage.name, "an archive")
    inner = _Opening(disk.folder, opening.options, opening.cache, False, opening.warnings, opening.storages)
    if opening.writable:
        inner.warnings.append(f"{storage.name}: {disk.folder.read_only}")
    return _open(inner, disk.file)


def _open_bare(opening: _Opening, name: str, kind: FileKind) -> Link:
    """An extent that was handed over without its descriptor, where none beside it names it."""
    storage = opening.storages[name]
    owner = find_owner(opening.folder, name)
    if owner is not None:
        raise NotVmdk(
            storage.name,
            what=f"an extent of {owner}, not a disk by itself",
            hint=f"open {opening.folder.label(owner)} instead",
        )
    # ESX kinds are only ever deltas; a hosted extent shows it by its name alone.
    is_delta = kind is not FileKind.HOSTED or _DELTA_NAME.search(name) is not None
    opening.warnings.append(
        f"{storage.name}: an extent without its descriptor, served read-only as it is"
        + ("; what it does not hold is in a parent that is not known (--parent FILE)" if is_delta else "")
    )
    extent = _open_sparse(opening, name, size=None, line=None)
    return Link(
        name=storage.name,
        folder=opening.folder,
        extents=[LinkExtent(0, extent, "RDONLY")],
        storages=list(opening.storages.values()),
        descriptor=None,
        place=None,
        warnings=opening.warnings,
        incomplete=is_delta,
    )


def _open_described(
    opening: _Opening,
    name: str,
    descriptor: Descriptor,
    *,
    at: int,
    header: hosted.HostedHeader | None = None,
) -> Link:
    """A link by its descriptor, which lies at byte ``at`` of the file ``name``."""
    file = opening.storages[name].name
    if descriptor.encrypted:
        raise Unsupported(
            file, what="the disk is encrypted", hint="decrypt it with the VMware product that made it"
        )
    if descriptor.native_snapshot and descriptor.has_parent:
        raise Unsupported(file, what="a snapshot made by the storage array, which alone can resolve it")
    lines = [line for line in descriptor.extents if line.sectors]
    if not lines:
        raise BadDescriptor(file, line=1, why="the descriptor names no extents")
    own = None if header is None or header.is_wrapper else own_line(name, lines, header)
    if opening.writable:
        written = {line.name for line in lines if line.access == "RW" and line.name}
        # This file is written if anything is: its descriptor gets a new content ID.
        opening.written = frozenset(written | {name} if written else ())
    has_parent = descriptor.has_parent or opening.options.parent is not None
    opening.whole = own is not None and len(lines) == 1 and not has_parent
    extents: list[LinkExtent] = []
    start = 0
    for line in lines:
        extent = _open_extent(opening, line, name if line is own else None, descriptor, file)
        extents.append(LinkExtent(start, extent, line.access))
        start += extent.size
    writable = any(entry.writable for entry in extents)
    if opening.writable and not writable:
        opening.warnings.append(f"{file}: {_why_read_only(extents)}, so it is served read-only")
    if opening.writable and writable:
        _refuse_shared(opening.open_for_writing(name), extents)
    return Link(
        name=file,
        folder=opening.folder.folder_of(name),
        extents=extents,
        storages=list(opening.storages.values()),
        descriptor=descriptor,
        place=DescriptorPlace(opening.storages[name], at),
        warnings=opening.warnings,
    )


def _refuse_shared(text: Storage, extents: list[LinkExtent]) -> None:
    """Raise WriteRefused if raw extents share bytes with each other, with tables or with the descriptor."""
    flat = [(entry.extent, entry.access == "RW") for entry in extents if isinstance(entry.extent, FlatExtent)]
    others = {text.identity}
    for entry in extents:
        if entry.extent.storage is not None and not isinstance(entry.extent, FlatExtent):
            others.add(entry.extent.storage.identity)
    refuse_shared(flat, others)


def _why_read_only(extents: list[LinkExtent]) -> str:
    if all(entry.access != "RW" for entry in extents):
        return "its descriptor allows no writing"
    kinds = {
        "a streamOptimized disk that holds data can't be changed in place": StreamExtent,
        "a seSparse delta can't be written": SeSparseExtent,
        "version 3 of a sparse extent is written by nobody but its maker": HostedExtent,
        "a COWD extent of a version before 1 is written by nobody": CowdExtent,
    }
    for why, kind in kinds.items():
        if any(isinstance(entry.extent, kind) for entry in extents if entry.access == "RW"):
            return why
    return "none of its extents can be written"


def own_line(name: str, lines: list[ExtentLine], header: hosted.HostedHeader) -> ExtentLine:
    """The extent line that means the file it stands in.

    A monolithic file is its own extent whatever the line calls it: files are renamed, and exporters write
    names that mean nothing.
    """
    sparse = [line for line in lines if line.type == "SPARSE"]
    named = [line for line in sparse if line.name is not None and last_component(line.name) == name]
    fitting = [line for line in sparse if line.sectors == header.capacity_sectors]
    for candidates in (named, sparse if len(sparse) == 1 else [], fitting):
        if candidates:
            return candidates[0]
    return lines[0]


def _open_extent(
    opening: _Opening, line: ExtentLine, own_name: str | None, descriptor: Descriptor, file: str
) -> Extent:
    size = line.sectors * SECTOR
    if line.access == "NOACCESS" and line.type != "ZERO":
        return LostExtent(file, size=size, why="the descriptor gives no access to this extent")
    if own_name is not None:
        return _open_sparse(opening, own_name, size=size, line=line)
    if line.type == "ZERO":
        return ZeroExtent(size=size)
    if line.name is None:
        raise BadDescriptor(file, line=line.line, why=f"a {line.type} extent needs a file name")
    if line.type in ("VMFSRDM", "VSANSPARSE"):
        where = "on a LUN" if line.type == "VMFSRDM" else "in a vSAN object"
        raise Unsupported(file, what=f"the data of {line.name} lies {where}, not in a file")
    name = _resolve(opening, line, file)
    if line.type not in _RAW_TYPES:
        return _open_sparse(opening, name, size=size, line=line)
    storage = opening.open_for_writing(name) if line.name in opening.written else opening.open(name)
    start = line.offset_sectors * SECTOR
    if start + size > storage.size:
        raise Truncated(
            storage.name,
            what=f"the extent on line {line.line} of {last_component(descriptor.file)}",
            need=start + size,
            have=storage.size,
        )
    return FlatExtent(storage, start=start, size=size)


def _resolve(opening: _Opening, line: ExtentLine, file: str) -> str:
    """The name under which an extent's file is there: as written, with slashes turned, or beside.

    A file from another machine keeps its absolute name; what lies beside the descriptor is then taken.
    Raises FileMissing or TrustError for the name as written.
    """
    assert line.name is not None
    first: VmdkError | None = None
    for name in spellings(line.name):
        try:
            opening.open(name)
        except (FileMissing, TrustError) as error:
            first = first or error
            continue
        if is_absolute(line.name) and not is_absolute(name):
            opening.warnings.append(f"{file}: {name} beside it is taken for {line.name}")
        return name
    assert first is not None
    if isinstance(first, FileMissing) and first.hint is None:
        first.hint = (
            f"{file} is only the description of a disk: it needs all {len(opening.storages)} and more files "
            "that it names beside it"
            if len(opening.storages) > 1
            else f"{file} only describes the disk; copy the files that it names beside it"
        )
    raise first


def _open_sparse(opening: _Opening, name: str, *, size: int | None, line: ExtentLine | None) -> Extent:
    """An extent with tables; its kind is what its magic says.  ``size`` None takes the whole capacity."""
    storage = opening.open(name)
    if storage.identity in opening.tabled:
        # Two writers of one file's tables would overwrite each other; and a short text could ask for many.
        raise FormatError(storage.name, why="two extents of the disk name it, and a file with tables is one")
    opening.tabled.add(storage.identity)
    head = head_of(storage)
    kind = identify(head)
    if kind not in _SPARSE_KINDS:
        if kind is FileKind.UNFINISHED:
            hosted.parse_header(head, storage.name)
        raise BadField(
            storage.name,
            field="its magic",
            value=head[:4].hex(" ") or "missing",
            why=f"not a {line.type if line else 'sparse'} extent",
        )
    if kind is FileKind.COWD:
        return _open_cowd(opening, name, storage, cowd.parse_header(head, storage.name), size, line)
    if kind is FileKind.SESPARSE:
        constant = sesparse.parse_header(head, storage.name)
        volatile = storage.read(constant.volatile.at, SECTOR)
        sesparse.check_volatile(volatile, storage.name)
        size = _effective_size(storage, size, constant.capacity_sectors, constant.grain // SECTOR)
        return SeSparseExtent(storage, constant, opening.cache, size=size)
    return _open_hosted(opening, name, storage, hosted.parse_header(head, storage.name), size, line)


def _open_hosted(
    opening: _Opening,
    name: str,
    storage: Storage,
    header: hosted.HostedHeader,
    size: int | None,
    line: ExtentLine | None,
) -> Extent:
    size = _effective_size(storage, size, header.capacity_sectors, header.grain_sectors)
    if header.compressed:
        if opening.options.salvage:
            from nbd_vmdk.extents.salvage import SalvagedExtent  # seldom needed, and slow to import

            return SalvagedExtent(storage, header, opening.cache, size=size)
        if opening.whole and opening.is_written(name, line) and is_new(storage, header):
            storage = opening.open_for_writing(name)
            return NewStreamExtent(storage, header, opening.cache, size=size)
        return StreamExtent(storage, header, opening.cache, size=size)
    if header.directory_at_end:
        raise BadField(
            storage.name, field="gdOffset", value="in a footer", why="only compressed extents have a footer"
        )
    check_grain_area(header, storage)
    # Version 3 without compression is some tool's way to say that changes are tracked elsewhere.
    if opening.is_written(name, line) and header.version < 3:
        storage = opening.open_for_writing(name)
        grains = storage.size // header.grain + header.capacity // header.grain // _GRAINS_OF_NOTHING
        if header.unclean or grains <= _VETTED_GRAINS:
            quick_check(storage, header)
    extent = HostedExtent(storage, header, opening.cache, size=size)
    if header.unclean:
        opening.warnings.append(_UNCLEAN.format(storage.name))
    if header.entries_per_table != 512:
        opening.warnings.append(
            f"{storage.name}: grain tables of {header.entries_per_table} entries are unusual"
        )
    return extent


def _open_cowd(
    opening: _Opening,
    name: str,
    storage: Storage,
    header: cowd.CowdHeader,
    size: int | None,
    line: ExtentLine | None,
) -> Extent:
    size = _effective_size(storage, size, header.capacity_sectors, header.grain_sectors)
    if opening.is_written(name, line) and header.version >= 1:
        storage = opening.open_for_writing(name)
        if header.suspect or storage.size <= _VETTED_GRAINS * header.grain_sectors * SECTOR:
            quick_check_cowd(storage, header)
    if header.unclean:
        opening.warnings.append(_UNCLEAN.format(storage.name))
    elif header.suspect:
        opening.warnings.append(f"{storage.name}: its last writer marked it as inconsistent")
    return CowdExtent(storage, header, opening.cache, size=size)


def _effective_size(storage: Storage, size: int | None, capacity_sectors: int, grain_sectors: int) -> int:
    """The bytes of an extent: what its line says, which the tables must be able to map."""
    if size is None:
        size = capacity_sectors * SECTOR
    if not size:
        raise BadField(storage.name, field="capacity", value=capacity_sectors, why="an empty extent")
    if size > align_up(capacity_sectors, grain_sectors) * SECTOR:
        raise BadField(
            storage.name,
            field="capacity",
            value=capacity_sectors,
            why=f"the descriptor says {size // SECTOR} sectors",
        )
    return size
