"""From an extent line to an extent object: the file that it means, and the kind that its magic says."""

from nbd_vmdk.errors import (
    BadDescriptor,
    BadField,
    FileMissing,
    FormatError,
    Truncated,
    TrustError,
    Unsupported,
    VmdkError,
)
from nbd_vmdk.extents.base import Extent
from nbd_vmdk.extents.cowd import CowdExtent
from nbd_vmdk.extents.flat import FlatExtent, LostExtent, ZeroExtent
from nbd_vmdk.extents.hosted import HostedExtent, check_grain_area
from nbd_vmdk.extents.newstream import NewStreamExtent, is_new
from nbd_vmdk.extents.sesparse import SeSparseExtent
from nbd_vmdk.extents.stream import StreamExtent
from nbd_vmdk.extents.vetting import quick_check, quick_check_cowd, reaches_past_end
from nbd_vmdk.look import head_of, spellings
from nbd_vmdk.ondisk import cowd, hosted, sesparse
from nbd_vmdk.ondisk.descriptor import ExtentLine, is_absolute, last_component
from nbd_vmdk.ondisk.probe import FileKind, identify
from nbd_vmdk.opener.opening import Opening
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import SECTOR, align_up

_SPARSE_KINDS = (FileKind.HOSTED, FileKind.COWD, FileKind.SESPARSE)
#: An extent with at most so many grains in its file (64 GiB, as everybody makes hosted ones; half a one in
#: COWD) is vetted whenever it is opened for writing, in 50 ms; a larger one if it was not closed cleanly, or
#: a hosted one if something in it names a place behind the end of the file.
#: Grains that there are tables for count for less, because tables of nothing are looked at faster.
_VETTED_GRAINS = 1 << 20
_GRAINS_OF_NOTHING = 16
_UNCLEAN = "{}: it was not closed cleanly the last time it was written"


def open_extent(opening: Opening, line: ExtentLine, own_name: str | None, file: str) -> Extent:
    """The extent of a line of the descriptor in ``file``.

    ``own_name`` is the name of that file if the line means the file itself.
    """
    size = line.sectors * SECTOR
    if line.access == "NOACCESS" and line.type != "ZERO":
        return LostExtent(file, size=size, why="the descriptor gives no access to this extent")
    if own_name is not None:
        return open_sparse(opening, own_name, size=size, line=line)
    if line.type == "ZERO":
        return ZeroExtent(size=size)
    if line.name is None:
        raise BadDescriptor(file, line=line.line, why=f"a {line.type} extent needs a file name")
    if line.type in ("VMFSRDM", "VSANSPARSE"):
        where = "on a LUN" if line.type == "VMFSRDM" else "in a vSAN object"
        raise Unsupported(
            file,
            what=f"the data of {line.name} lies {where}, not in a file",
            hint="let the ESXi host clone the disk into a file: vmkfstools -i",
        )
    name = _resolve(opening, line, file)
    if not line.is_raw:
        return open_sparse(opening, name, size=size, line=line)
    storage = opening.open_for_writing(name) if opening.is_written(name) else opening.open(name)
    start = line.offset_sectors * SECTOR
    if start + size > storage.size:
        raise Truncated(
            storage.name,
            what=f"the extent on line {line.line} of {last_component(file)}",
            need=start + size,
            have=storage.size,
            hint="the file was cut off, or copied while it grew: get it again; "
            "nbd-vmdk repair IMAGE --also file-short puts zeros where data are missing",
        )
    return FlatExtent(storage, start=start, size=size)


def _resolve(opening: Opening, line: ExtentLine, file: str) -> str:
    """The name under which an extent's file is there: as written, with slashes turned, or beside.

    A file from another machine keeps its absolute name; what lies beside the descriptor is then taken.
    Raises FileMissing or TrustError.
    """
    assert line.name is not None
    first: VmdkError | None = None
    for name in spellings(line.name):
        try:
            opening.open(name)
        except (FileMissing, TrustError) as error:
            # A Windows name with its slashes turned leads out of the folder: it is not missing there.
            if first is None or (isinstance(error, TrustError) and not is_absolute(line.name)):
                first = error.kept()
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


def open_sparse(opening: Opening, name: str, *, size: int | None, line: ExtentLine | None) -> Extent:
    """An extent with tables; its kind is what its magic says.  ``size`` None takes the whole capacity."""
    storage = opening.open(name)
    if storage.identity in opening.tabled:
        # Two writers of one file's tables would overwrite each other; and a short text could ask for many.
        raise FormatError(
            storage.name,
            why="two extents of the disk name it, and a file with tables is one",
            hint="one of the names in the descriptor is wrong: mend its text by hand",
        )
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
            hint="another file lies where that extent should: put the right one there, or get it again",
        )
    if kind is FileKind.COWD:
        return _open_cowd(opening, name, storage, cowd.parse_header(head, storage.name), size)
    if kind is FileKind.SESPARSE:
        constant = sesparse.parse_header(head, storage.name)
        volatile = storage.read(constant.volatile.at, SECTOR)
        sesparse.check_volatile(volatile, storage.name)
        size = _effective_size(storage, size, constant.capacity_sectors, constant.grain // SECTOR)
        return SeSparseExtent(storage, constant, opening.cache, size=size)
    return _open_hosted(opening, name, storage, hosted.parse_header(head, storage.name), size)


def _open_hosted(
    opening: Opening,
    name: str,
    storage: Storage,
    header: hosted.HostedHeader,
    size: int | None,
) -> Extent:
    size = _effective_size(storage, size, header.capacity_sectors, header.grain_sectors)
    if header.compressed:
        if opening.options.salvage:
            from nbd_vmdk.extents.salvage import SalvagedExtent  # seldom needed, and slow to import

            return SalvagedExtent(storage, header, opening.cache, size=size)
        if opening.whole and opening.is_written(name) and is_new(storage, header):
            storage = opening.open_for_writing(name)
            return NewStreamExtent(storage, header, opening.cache, size=size)
        return StreamExtent(storage, header, opening.cache, size=size)
    if header.directory_at_end:
        raise BadField(
            storage.name, field="gdOffset", value="in a footer", why="only compressed extents have a footer"
        )
    check_grain_area(header, storage)
    # Version 3 without compression is some tool's way to say that changes are tracked elsewhere.
    if opening.is_written(name) and header.version < 3:
        storage = opening.open_for_writing(name)
        grains = storage.size // header.grain + header.capacity // header.grain // _GRAINS_OF_NOTHING
        if header.unclean or grains <= _VETTED_GRAINS or reaches_past_end(storage, header):
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
    opening: Opening,
    name: str,
    storage: Storage,
    header: cowd.CowdHeader,
    size: int | None,
) -> Extent:
    size = _effective_size(storage, size, header.capacity_sectors, header.grain_sectors)
    if opening.is_written(name) and header.version >= 1:
        storage = opening.open_for_writing(name)
        is_odd = header.suspect or header.directory_sector != cowd.USUAL_DIRECTORY
        if is_odd or storage.size <= _VETTED_GRAINS * header.grain_sectors * SECTOR:
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
