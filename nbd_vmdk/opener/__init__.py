"""From a file name to a link: probing, the descriptor, and an extent object for each of its lines.

The order of evidence is: magic of the opened file first, type word of the extent line second, createType
last.  A file that is not the one to open (an extent of a split disk, a -flat) is refused with the name of the
one that is.  Every file that a descriptor names is opened through the folder's gate.
"""

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import BadDescriptor, NotVmdk, Unsupported, VmdkError
from nbd_vmdk.extents.cowd import CowdExtent
from nbd_vmdk.extents.flat import FlatExtent, refuse_shared
from nbd_vmdk.extents.hosted import HostedExtent
from nbd_vmdk.extents.sesparse import SeSparseExtent
from nbd_vmdk.extents.stream import StreamExtent
from nbd_vmdk.link import DescriptorPlace, Link, LinkExtent
from nbd_vmdk.look import DELTA_NAME, embedded_text, find_owner, head_of, spellings
from nbd_vmdk.ondisk import hosted
from nbd_vmdk.ondisk.descriptor import MAX_DESCRIPTOR, Descriptor, ExtentLine, last_component
from nbd_vmdk.ondisk.probe import FileKind, identify
from nbd_vmdk.opener.extents import open_extent, open_sparse
from nbd_vmdk.opener.opening import Opening
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.refusal import advise, not_the_disk, refusal
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.locks import check_vmware_lock
from nbd_vmdk.units import SECTOR

__all__ = ["open_link", "own_line"]


def open_link(folder: Folder, name: str, options: OpenOptions, cache: Cache, *, writable: bool) -> Link:
    """Open the VMDK ``name`` of ``folder``, without its parent.

    With ``writable`` its files are opened and locked for writing where its kind can be written; where it
    can't, a warning says so.  Raises VmdkError of every sort.
    """
    opening = Opening(folder, options, cache, writable and folder.read_only is None)
    if writable and folder.read_only is not None:
        opening.warnings.append(f"{folder.label(name)}: {folder.read_only}")
    try:
        if opening.writable:
            check_vmware_lock(folder, last_component(name), folder.label(name))
        link = _open(opening, name)
        link.warnings.extend(opening.lock())
    except VmdkError as error:
        advise(error, folder, name)
        opening.close()
        raise
    except BaseException:
        opening.close()
        raise
    return link


def _open(opening: Opening, name: str) -> Link:
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
                try:
                    descriptor = Descriptor.parse(text, storage.name)
                except (NotVmdk, BadDescriptor) as error:
                    if opening.folder.read_only is None:
                        error.hint = "nbd-vmdk repair IMAGE shows how the descriptor in it is made anew"
                    raise
                at = header.descriptor_sector * SECTOR
                return _open_described(opening, name, descriptor, at=at, header=header)
            return _open_bare(opening, name, kind)
        case FileKind.COWD | FileKind.SESPARSE:
            return _open_bare(opening, name, kind)
        case FileKind.TAR:
            return _open_archive(opening, name)
        case _:
            raise refusal(opening.folder, name, storage, kind, head)


def _open_archive(opening: Opening, name: str) -> Link:
    """The only disk of an OVA, read inside the archive."""
    from nbd_vmdk.vm.found import only_disk
    from nbd_vmdk.vm.package import disks_in_archive  # seldom needed, and slow to import

    storage = opening.storages.pop(name)
    storage.close()
    if opening.folder.read_only is not None:
        raise NotVmdk(storage.name, what="an archive inside an archive", hint="unpack the outer one first")
    disk = only_disk(disks_in_archive(opening.folder, name), storage.name, "an archive")
    inner = Opening(disk.folder, opening.options, opening.cache, False, opening.warnings, opening.storages)
    if opening.writable:
        inner.warnings.append(f"{storage.name}: {disk.folder.read_only}")
    return _open(inner, disk.file)


def _open_bare(opening: Opening, name: str, kind: FileKind) -> Link:
    """An extent that was handed over without its descriptor, where none beside it names it."""
    storage = opening.storages[name]
    owner = find_owner(opening.folder, name)
    if owner is not None:
        raise not_the_disk(opening.folder, storage, owner)
    # ESX kinds are only ever deltas; a hosted extent shows it by its name alone.
    is_delta = kind is not FileKind.HOSTED or DELTA_NAME.search(name) is not None
    opening.warnings.append(
        f"{storage.name}: an extent without its descriptor, served read-only as it is"
        + ("; what it does not hold is in a parent that is not known (--parent FILE)" if is_delta else "")
    )
    extent = open_sparse(opening, name, size=None, line=None)
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
    opening: Opening,
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
        raise Unsupported(
            file,
            what="a snapshot made by the storage array, which alone can resolve it",
            hint="clone the disk on the ESXi host, or let the host consolidate its snapshots",
        )
    lines = [line for line in descriptor.extents if line.sectors]
    if not lines:
        raise BadDescriptor(
            file,
            line=1,
            why="the descriptor names no extents",
            hint="it was cut off, or made by hand: get it again, or make one with nbd-vmdk create --extent",
        )
    own = None if header is None or header.is_wrapper else own_line(name, lines, header)
    if opening.writable:
        opening.written = _written_files(opening, name, lines, own)
    has_parent = descriptor.has_parent or opening.options.parent is not None
    opening.whole = own is not None and len(lines) == 1 and not has_parent
    extents: list[LinkExtent] = []
    start = 0
    for line in lines:
        extent = open_extent(opening, line, name if line is own else None, file)
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


def _written_files(
    opening: Opening, name: str, lines: list[ExtentLine], own: ExtentLine | None
) -> frozenset[tuple[int, ...]]:
    """The identities of the files that some line writes to, and of ``name``, in which the descriptor is.

    Two lines may name one file, each in its own way, and the one that only reads it may be the first.
    """
    written = [line for line in lines if line.access == "RW" and line.name]
    if not written:
        return frozenset()
    found = {opening.open(name).identity}  # written if anything is: it gets a new content ID
    for line in written:
        if line is own or line.type == "ZERO":
            continue
        for spelling in spellings(line.name or ""):
            try:
                found.add(opening.open(spelling).identity)
            except VmdkError:
                continue  # told when its extent is opened, unless another spelling is there
            break
    return frozenset(found)


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
