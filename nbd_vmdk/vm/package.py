"""The disks of an appliance: an .ovf with its files beside it, or all of it in one archive (.ova).

The envelope says which files are disks.  A file of it may be split into numbered chunks, and may be
gzip-compressed; its own first bytes decide that, not what the envelope says.  Nothing is unpacked: a chunked
file is read as one (storage/joined.py), a compressed one through points to start from (gunzipped.py).

Everything here is read-only: an appliance has a manifest of digests, which writing would make wrong.
An archive without an envelope is taken for a folder of disks.
"""

# ruff: noqa: D102  the contract is in folder.py

import re
from collections.abc import Sequence
from urllib.parse import unquote

from nbd_vmdk.errors import FileMissing, Unsupported, VmdkError, WriteRefused
from nbd_vmdk.ondisk.ovf import MAX_ENVELOPE, PackageDisk, parse_envelope
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.joined import Joined
from nbd_vmdk.storage.tar import TarFolder, tar_in
from nbd_vmdk.units import MIB, TIB
from nbd_vmdk.vm.found import FoundDisk, alone
from nbd_vmdk.vm.gunzipped import Gunzipped, Points
from nbd_vmdk.vm.machine import read_text
from nbd_vmdk.vm.tops import find_tops

_GZIP = b"\x1f\x8b"
_CHUNK = re.compile(r"(.+)\.([0-9]{9})", re.DOTALL)
_DISK = re.compile(r".+\.vmdk(?:\.gz)?", re.IGNORECASE | re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
#: What an image may take beside its disk's bytes: tables, markers, a record around each grain.
_SLACK = 64 * MIB
#: No disk is larger, where the envelope does not tell.
_ANY = 64 * TIB


class PackageFolder(Folder):
    """A folder of an appliance in which ``disks`` are read as what they hold: joined, inflated.

    ``disks`` has the most bytes that each may inflate to.
    """

    read_only = "a disk of an appliance is served read-only"

    def __init__(self, base: Folder, disks: dict[str, int]) -> None:
        self.name = base.name
        self.read_only = base.read_only or type(self).read_only
        self._base = base
        self._points = {name: Points(limit) for name, limit in disks.items()}
        self._identities: dict[str, tuple[int, ...]] = {}

    def open(self, name: str, *, writable: bool = False, extent: bool = False) -> Storage:
        if writable:
            raise WriteRefused(
                self.label(name),
                why="a file of an appliance can't be written: its manifest would no longer fit",
                hint="to serve it without writing, add -r; to write, copy the disk out first",
            )
        if name not in self._points:
            return self._base.open(name, extent=extent)
        stored = _open_stored(self._base, name)
        try:
            if stored.size < len(_GZIP) or stored.read(0, len(_GZIP)) != _GZIP:
                return stored
            return Gunzipped(stored, self._points_of(name, stored))
        except BaseException:
            stored.close()
            raise

    def _points_of(self, name: str, stored: Storage) -> Points:
        """What is known of a compressed file, anew if it is another one by now."""
        points = self._points[name]
        if self._identities.setdefault(name, stored.identity) != stored.identity:
            self._identities[name] = stored.identity
            points = self._points[name] = Points(points.limit)
        return points

    def folder_of(self, name: str) -> Folder:
        return self if "/" not in name else self._base.folder_of(name)

    def names(self) -> list[str]:
        return sorted({*self._base.names(), *self._points})

    def label(self, name: str) -> str:
        return self._base.label(name)


def _open_stored(base: Folder, name: str) -> Storage:
    """A file as it is stored, its chunks joined."""
    try:
        return base.open(name)
    except FileMissing as error:
        missing = error.kept()
    start = f"{name.rpartition('/')[2]}."
    chunks = [other for other in base.folder_of(name).names() if other.startswith(start)]
    last = max((int(chunk[2]) for chunk in map(_CHUNK.fullmatch, chunks) if chunk), default=None)
    if last is None:
        raise missing
    pieces: list[Storage] = []
    try:
        # Up to the last one that is there: one that is missing in between is an error, and named.
        for number in range(last + 1):
            pieces.append(base.open(f"{name}.{number:09}"))  # noqa: PERF401  closed if a later one fails
        return Joined(pieces, base.label(name))
    except BaseException:
        for piece in pieces:
            piece.close()
        raise


def disks_in_archive(folder: Folder, name: str) -> list[FoundDisk]:
    """The disks of the archive ``name`` of ``folder``, by its envelope or, without one, by their names."""
    archive = tar_in(folder, name)
    envelope = next((each.name for each in archive.members if each.name.lower().endswith(".ovf")), None)
    disks = _without_envelope(archive) if envelope is None else disks_of_envelope(archive, envelope)
    return alone(disks, folder.label(name))


def disks_of_envelope(folder: Folder, name: str) -> list[FoundDisk]:
    """The disks of the envelope ``name`` of ``folder``; FormatError if that can't be understood."""
    raw = read_text(folder, name, MAX_ENVELOPE)
    disks = parse_envelope(raw, folder.label(name))
    inside = folder.folder_of(name)
    return _found(inside, [(disk, _spelling(inside, disk.href)) for disk in disks])


def _without_envelope(archive: TarFolder) -> list[FoundDisk]:
    chunks = {member.name: _CHUNK.fullmatch(member.name) for member in archive.members}
    names = dict.fromkeys(name if chunk is None else chunk[1] for name, chunk in chunks.items())
    disks = [name for name in names if _DISK.fullmatch(name)]
    tops = find_tops(PackageFolder(archive, dict.fromkeys(disks, _ANY)), disks)
    return _found(archive, [(PackageDisk("", name), name) for name in tops])


def _spelling(folder: Folder, href: str) -> str:
    """A reference is a URI, where a blank is %20; but many are file names, where it may be itself."""
    try:
        _open_stored(folder, href).close()
    except VmdkError:
        return unquote(href)
    return href


def _found(base: Folder, named: Sequence[tuple[PackageDisk, str]]) -> list[FoundDisk]:
    """Each disk in a folder that reads it, and those stored beside it, as what they hold."""
    limits: dict[str, dict[str, int]] = {}
    for disk, name in named:
        above, _, plain = name.rpartition("/")
        limit = _ANY if disk.capacity is None else disk.capacity + disk.capacity // 8 + _SLACK
        limits.setdefault(above, {})[plain] = limit
    found: list[FoundDisk] = []
    folders: dict[str, Folder] = {}
    for disk, name in named:
        above, _, plain = name.rpartition("/")
        path, fault = base.label(name), None
        try:
            if _SCHEME.match(disk.href):
                raise Unsupported(
                    disk.href,
                    what="the appliance only names this disk, and does not have it",
                    hint="get the disk from there, and name it by itself",
                )
            if above not in folders:
                folders[above] = PackageFolder(base.folder_of(name), limits[above])
            _open_stored(base, name).close()
        except VmdkError as error:
            fault = error.kept()
        found.append(FoundDisk(folders.get(above, base), plain, path, disk.id, fault=fault))
    return found
