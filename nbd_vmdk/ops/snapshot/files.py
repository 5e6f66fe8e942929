"""Opening, pointing and removing links: what merging, moving and deleting have in common."""

import errno
import logging
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from nbd_vmdk.cache import Cache
from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import FileMissing, InUse, NotVmdk, StorageError, Unsupported, VmdkError, WriteRefused
from nbd_vmdk.link import Link, occupied
from nbd_vmdk.ondisk import hosted
from nbd_vmdk.ondisk.descriptor import NO_PARENT, Descriptor
from nbd_vmdk.opener import open_link
from nbd_vmdk.opening import open_in
from nbd_vmdk.ops.create.child import parent_hint
from nbd_vmdk.ops.rewrite import DescriptorFile, mend_folder, real_path, remove_leftovers, sync_folder
from nbd_vmdk.ops.snapshot.tree import LinkFile, link_file, links_of, names_beside
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.storage.locks import check_vmware_lock
from nbd_vmdk.units import MIB
from nbd_vmdk.vm import container_of, leads_to_disks, locate

log = logging.getLogger("nbd_vmdk")

#: How the engine's warnings of kinds that can't be written end.
_READ_ONLY: Final = ", so it is served read-only"

#: What holds disks that are never changed.
_PACKED: Final = (".ova", ".ovf")

#: Memory for tables and inflated grains of each chain that is open meanwhile.
CACHE = 32 * MIB


class Place:
    """Where an operation works: the link that the user named, and the folders that may hold its relatives.

    A machine (.vmx) or a folder stands for its disk, if it has one alone.

    link     the link
    options  how its relatives are opened
    folders  its own folder and those that the user allows besides
    recorded folders with the .vmx and .vmsd files that may name it: the same, and that of the machine
    """

    def __init__(self, path: str | os.PathLike[str], options: OpenOptions, *, mend: bool = False) -> None:
        """``mend`` first finishes what a power cut interrupted in the descriptors there.

        Raises as opening a link does, if there is none.
        """
        warnings: list[str] = []
        named = image_in(path, options, warnings)
        for warning in warnings:
            log.warning("%s", warning)
        if os.path.islink(named):
            # Names are changed and files are replaced here: only the real ones will do.
            named = os.path.realpath(named)
        self.options = options
        folder, name = LocalFolder.for_image(named, options.allow_dirs, options.allow_devices)
        self.folders: list[Folder] = [folder]
        # What is in them may stand on the link itself: the folder that the user named is theirs, too.
        allowed = (*options.allow_dirs, os.path.dirname(named) or os.curdir)
        for other in options.allow_dirs:
            beside = os.path.join(os.fspath(other), name)
            self.folders.append(LocalFolder.for_image(beside, allowed, options.allow_devices)[0])
        self.recorded = [*self.folders, *_machine_folder(os.fspath(path), named, options)]
        if mend:
            for each in self.folders:
                mend_folder(each)
        self.link = self._load(name)

    def _load(self, name: str) -> LinkFile:
        folder = self.folders[0]
        link = link_file(folder, name)
        if link is None:
            # Opening it says what it is instead, unless it is one of the odd things that can be opened.
            open_link(folder, name, self.options, Cache(MIB), writable=False).close()
            what = "it has no descriptor of its own, so it is no link of a chain"
            raise NotVmdk(folder.label(name), what=what)
        return link

    def links(self, *others: LinkFile | None) -> list[LinkFile]:
        """All links in the folders, and in those of ``others``."""
        return links_of([*self.folders, *(other.folder for other in others if other is not None)])


def image_in(path: str | os.PathLike[str], options: OpenOptions, warnings: list[str] | None = None) -> str:
    """The path of the image that a user named, or of the only disk of the machine or the folder that he did.

    What is odd about it goes into ``warnings``.
    Raises NotVmdk with the words for each disk where there are several, Unsupported for one in an appliance,
    and what is wrong with a machine.
    """
    named = os.fspath(path)
    if not leads_to_disks(named):
        return named
    container = container_of(named)
    if os.path.islink(container):
        named = (
            os.path.realpath(container) + named[len(container) :]
        )  # what it names lies beside the real one
    found = locate(named, allow_dirs=options.allow_dirs, allow_devices=options.allow_devices)
    if not isinstance(found.folder, LocalFolder) or container.lower().endswith(_PACKED):
        raise Unsupported(
            found.path,
            what="a disk in an appliance, which stays as it is",
            hint="nbd-vmdk convert makes an image of it",
        )
    if warnings is not None:
        warnings += found.warnings
    return found.path


def whole_image_in(path: str | os.PathLike[str], options: OpenOptions, *command: str) -> str:
    """As image_in(), for what is done to whole files; ``command`` is what does it to an appliance in one."""
    try:
        return image_in(path, options)
    except Unsupported as error:
        named = os.fspath(path)
        if named.lower().endswith(".ova") and container_of(named) == named:
            error.hint = f"the appliance is a file like any other: {shlex.join(command)}"
        raise


def _machine_folder(path: str, image: str, options: OpenOptions) -> Iterator[Folder]:
    """The folder of the machine by which the user named the image, if that is another one."""
    container = os.path.realpath(container_of(path))
    if path == image or os.path.isdir(container):
        return
    beside = os.path.realpath(os.path.dirname(image))
    if os.path.dirname(container) != beside:
        yield LocalFolder.for_folder(os.path.dirname(container), (*options.allow_dirs, beside))


def opening(options: dict[str, Any], **more: Any) -> OpenOptions:
    """The options of one operation, for opening what belongs to its image."""
    return OpenOptions.of(**{"cache_size": CACHE, **options, **more})


def hold(held: ExitStack, link: LinkFile) -> DescriptorFile:
    """Open and lock the descriptor of ``link`` for replacing it, until ``held`` is left.

    Raises InUse, also if it is no longer what it was when it was looked at.
    """
    with writable_wanted():
        check_vmware_lock(link.folder, link.name, link.label)
        file = held.enter_context(DescriptorFile.open(link.folder, link.name))
    if file.descriptor.to_bytes() != link.descriptor.to_bytes():
        raise InUse(link.label, how="it has just been changed", hint="try again")
    return file


def hold_link(held: ExitStack, link: LinkFile, options: OpenOptions, file: DescriptorFile) -> Link:
    """Open ``link`` alone for reading, and keep all others from using its files, until ``held`` is left.

    ``file`` is its descriptor, which is held already.
    """
    opened = open_link(link.folder, link.name, unlocked(options), Cache(options.cache_size), writable=False)
    held.callback(opened.close)
    for storage in opened.storages:
        if storage.identity != file.storage.identity:
            # Shared locks can be taken on what is open for reading, too.
            with writable_wanted():
                warning = storage.lock(writable=True)
            if warning:
                log.warning("%s: %s", storage.name, warning)
    return opened


def open_for_reading(held: ExitStack, link: LinkFile, options: OpenOptions) -> Disk:
    """Open ``link`` with its chain, until ``held`` is left; raises what is wrong with it."""
    return held.enter_context(open_in(link.folder, link.name, unlocked(options)))


def unlocked(options: OpenOptions) -> OpenOptions:
    """The options for reading what is locked already."""
    return OpenOptions(
        allow_dirs=options.allow_dirs,
        allow_devices=options.allow_devices,
        locks=False,
        cache_size=options.cache_size,
    )


def why_read_only(link: Link) -> str:
    """Why a link that was opened for writing can't be written."""
    for text in link.warnings:
        if text.endswith(_READ_ONLY):
            return text.removeprefix(f"{link.name}: ").removesuffix(_READ_ONLY)
    return "it can't be written"


@contextmanager
def writable_wanted() -> Iterator[None]:
    """Say what to do about files that can't be opened for writing."""
    try:
        yield
    except InUse as error:
        error.hint = "stop the other user first: what he reads and writes must stay where it is"
        raise
    except StorageError as error:
        if error.hint is not None and error.hint.endswith("add -r"):
            if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EROFS:
                error.hint = "its file system is there for reading only: nbd-vmdk clone copies elsewhere"
            else:
                error.hint = f"if it was protected on purpose, leave it; else: chmod u+w {error.file}"
        raise


def pointed(descriptor: Descriptor, hint: str | None, cid: int) -> Descriptor:
    """The descriptor with another parent: the name to find it by (None for no parent), and its content ID."""
    try:
        changed = descriptor.set("parentCID", f"{cid:08x}")
        if hint is None:
            return changed.remove("parentFileNameHint")
        return changed.set("parentFileNameHint", hint)
    except ValueError as error:
        raise WriteRefused(descriptor.file, why=f"its parent can't be named: {error}") from None


def point(file: DescriptorFile, parent: str | None, cid: int = NO_PARENT) -> None:
    """Make ``parent`` (a path) with the content ID ``cid`` the parent of the link in ``file``, durably."""
    folder = os.path.dirname(real_path(file.storage))
    hint = None if parent is None else parent_hint(parent, folder)
    file.replace(pointed(file.descriptor, hint, cid))


def own_files(link: LinkFile, storages: Sequence[Storage], others: Iterable[LinkFile]) -> list[str]:
    """The paths of all files that are this link's alone, its descriptor last.

    A descriptor is untrusted: WriteRefused if it names a file outside its folder, one that is called
    something else than .vmdk, or one that another of the links has too.
    """
    names = {
        (other.folder.name, name): other
        for other in others
        if other.identity != link.identity
        for name in names_beside(other)
    }
    taken = {other.identity: other for other in others if other.identity != link.identity}
    tracked = {(other.folder.name, other.descriptor.change_track_path): other for other in taken.values()}
    home = os.path.realpath(link.folder.name)
    last: list[str] = []
    paths: list[str] = []
    for storage in storages:
        path = real_path(storage)
        folder, name = os.path.split(path)
        user = taken.get(storage.identity) or names.get((link.folder.name, name))
        if user is not None:
            raise _belongs(link, name, user)
        if folder != home:
            raise WriteRefused(
                link.label,
                why=f"one of its files, {path}, is in another folder",
                hint="nothing is removed that might be something else: remove it by hand",
            )
        if not name.lower().endswith(".vmdk"):
            raise WriteRefused(
                link.label,
                why=f"one of its files is called {name}",
                hint="nothing is removed that might be something else: remove it by hand",
            )
        (last if storage.identity == link.identity else paths).append(path)
    tracking = link.descriptor.change_track_path
    if tracking is not None and tracking.endswith("-ctk.vmdk") and tracking in link.folder.names():
        key = (link.folder.name, tracking)
        if user := tracked.get(key) or names.get(key):
            raise _belongs(link, tracking, user)
        paths.append(os.path.join(home, tracking))
    return paths + last


def _belongs(link: LinkFile, name: str, user: LinkFile) -> WriteRefused:
    return WriteRefused(
        link.label,
        why=f"{name}, one of its files, belongs to {user.label} as well",
        hint=f"if {user.label} is nothing but a copy of a description, move it to another folder first",
    )


def remove_files(paths: Sequence[str]) -> None:
    """Remove files, in this order; one that is gone is no error."""
    for path in paths:
        try:
            remove_leftovers(path)
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError.of(error, path, "remove") from error
    for folder in dict.fromkeys(os.path.dirname(path) for path in paths):
        sync_folder(folder)


def existing_files(link: LinkFile, others: Iterable[LinkFile]) -> list[str]:
    """As own_files, for a link of which some files may be gone already."""
    with _there(link, FileMissing) as storages:
        unique = {storage.identity: storage for storage in storages}
        return own_files(link, list(unique.values()), others)


def occupied_by(link: LinkFile) -> int:
    """Bytes that its files occupy, as far as they are there."""
    with _there(link, VmdkError) as storages:
        return occupied(storages)


@contextmanager
def _there(link: LinkFile, passed_over: type[VmdkError]) -> Iterator[list[Storage]]:
    """Those of the link's files that can be opened, for looking at what they are."""
    storages: list[Storage] = []
    try:
        storages.append(link.folder.open(link.name))
        names = [line.name for line in link.descriptor.extents if line.name is not None]
        if len(names) == 1 and storages[0].read(0, 4) == hosted.MAGIC:
            names = []  # it is its own extent, whatever the line calls it
        for name in names:
            try:
                storages.append(link.folder.open(name))
            except passed_over:
                continue
        yield storages
    finally:
        for storage in storages:
            storage.close()
