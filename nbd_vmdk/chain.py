"""From a link to its chain: finding parents, and refusing what is not one disk.

Where a parent is looked for: the file that the user named; the hint as written, relative to the child's
folder; the hint's last component beside the child; the same in a sibling folder named as the hint's last
folder.  The last two are guesses: they are taken only if the content ID is the expected one (see
Descriptor.may_stand_on), and a warning tells it.  QEMU follows the hint alone; VMware and we check that the
parent still has the content ID that the child saw.
"""

import shlex
from collections.abc import Iterator
from contextlib import closing

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import (
    ChainError,
    ChainTooDeep,
    ContentIdMismatch,
    FileMissing,
    ParentNotFound,
    TrustError,
    VmdkError,
    WriteRefused,
)
from nbd_vmdk.link import Link
from nbd_vmdk.look import descriptors_in, read_descriptor
from nbd_vmdk.ondisk.descriptor import (
    NO_PARENT,
    Descriptor,
    is_absolute,
    last_component,
    windows_to_posix,
)
from nbd_vmdk.opener import open_link
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.vm import FoundDisk, locate

#: VMware allows 32 snapshots; linked clones of clones add to that.
MAX_LINKS = 128


def open_chain(
    folder: Folder, name: str, options: OpenOptions, cache: Cache, overlaid: FoundDisk | None = None
) -> list[Link]:
    """Open the link ``name`` and all its parents, top first; parents are only ever opened for reading.

    ``overlaid`` is the disk that the link is an overlay of: its parent, found already, whatever its kind.
    Raises VmdkError of every sort; then nothing stays open.
    """
    links: list[Link] = []
    try:
        links.extend(follow_chain(folder, name, options, cache, overlaid))
    except BaseException:
        for link in links:
            link.close()
        raise
    return links


def follow_chain(
    folder: Folder, name: str, options: OpenOptions, cache: Cache, overlaid: FoundDisk | None = None
) -> Iterator[Link]:
    """Open one link after the other, top first, until the base or an error; the caller closes them."""
    link = top = open_link(folder, name, options, cache, writable=options.writable)
    yield top
    if options.writable and top.writable:
        _protect(folder, name, top, options)
    seen = {top.storages[0].identity}
    while (parent := _open_parent(link, options, cache, overlaid, is_top=link is top)) is not None:
        yield parent
        identity = parent.storages[0].identity
        if identity in seen:
            raise ChainTooDeep(top.name, why=f"the chain of parents leads back to {parent.name}")
        if len(seen) == MAX_LINKS:
            hint = "let the product that made the snapshots delete some of them"
            raise ChainTooDeep(top.name, why=f"more than {MAX_LINKS} links", hint=hint)
        seen.add(identity)
        _compare_sizes(link, parent)
        link = parent
        if options.writable:
            _refuse_shared(top, parent)
    if options.writable and top.writable and options.drop_ctk:
        top.drop_change_tracking()  # only now, when nothing can refuse the image any more


def _refuse_shared(top: Link, parent: Link) -> None:
    """Raise WriteRefused if what the top writes is a file of a parent."""
    written = {storage.identity for storage in top.storages if storage.writable}
    for storage in parent.storages:
        if storage.identity in written:
            why = f"{storage.name} is a file of its parent {parent.name} as well, which is never written"
            raise WriteRefused(top.name, why=why, hint="to read it, add -r")


def _compare_sizes(child: Link, parent: Link) -> None:
    if child.size > parent.size:
        child.warnings.append(f"{child.name}: larger than its parent; what lies beyond reads as zeros")
    elif child.size < parent.size:
        child.warnings.append(f"{child.name}: smaller than its parent, whose tail is not visible")


def _open_parent(
    child: Link, options: OpenOptions, cache: Cache, overlaid: FoundDisk | None, *, is_top: bool
) -> Link | None:
    """The parent of a link, None for a base."""
    descriptor = child.descriptor
    found = overlaid if is_top else None
    if is_top and options.parent is not None:
        found = locate(options.parent, allow_dirs=options.allow_dirs, allow_devices=options.allow_devices)
    if found is not None:
        parent = open_link(found.folder, found.file, options, cache, writable=False)
        if descriptor is not None and descriptor.has_parent:
            _check_cid(child, descriptor, parent, options)
        elif descriptor is not None and found is not overlaid:
            child.warnings.append(
                f"{child.name}: has no parent by itself; {parent.name} shows through its holes"
            )
        return parent
    if descriptor is None:
        return None
    if not descriptor.has_parent:
        if descriptor.parent_hint and not options.ignore_cid:
            raise ChainError(
                child.name,
                why=f"names a parent, {descriptor.parent_hint}, but its parentCID says that it has none",
                hint="the descriptor was edited or damaged; to read it without a parent, add --ignore-cid",
            )
        return None
    return _find_parent(child, descriptor, options, cache)


def _find_parent(child: Link, descriptor: Descriptor, options: OpenOptions, cache: Cache) -> Link:
    assert descriptor.parent_cid is not None
    hint = descriptor.parent_hint
    refused: VmdkError | None = None
    for name, is_guess in parent_candidates(hint) if hint else ():
        try:
            folder = child.folder.folder_of(name)
            if is_guess and not _fits(descriptor, child.folder, name):
                continue
            parent = open_link(folder, plain_name(name), options, cache, writable=False)
        except FileMissing as error:
            if error.file is not None and last_component(error.file) != last_component(name):
                raise  # the parent is there, but a file of its own is not
            continue
        except TrustError as error:
            if last_component(str(error.fields.get("name"))) != last_component(name):
                raise
            if not is_guess:  # nobody asked for what is a guess
                refused = refused or error.kept()
            continue
        _check_cid(child, descriptor, parent, options)
        if is_guess:
            child.warnings.append(f"{child.name}: {parent.name} is taken for its parent {hint}")
        return parent
    cid = f"{descriptor.parent_cid:08x}"
    found = [sibling for sibling, other in descriptors_in(child.folder) if descriptor.may_stand_on(other)]
    if found:
        where = child.folder.label(found[0])
        raise ParentNotFound(
            child.name,
            parent=hint or "(no name given)",
            cid=cid,
            hint=f"{where} has this content ID: --parent {shlex.quote(where)}",
        )
    if refused is not None:
        raise refused
    raise ParentNotFound(child.name, parent=hint or "(no name given)", cid=cid)


def plain_name(name: str) -> str:
    """The name in its folder; a backslash is a part of it, where it turns out to be no separator."""
    return name.rpartition("/")[2]


def parent_candidates(hint: str) -> Iterator[tuple[str, bool]]:
    """(name relative to the child's folder, is it a guess) in the order to try."""
    posix = windows_to_posix(hint)
    if not is_absolute(hint) or hint.startswith("/"):
        yield hint, False
        if posix != hint and not posix.startswith("/"):
            yield posix, False
    last = last_component(hint)
    if last not in (hint, posix):
        yield last, True
        folders = [part for part in posix.split("/")[:-1] if part not in ("", ".", "..")]
        if folders:
            yield f"../{folders[-1]}/{last}", True


def _fits(descriptor: Descriptor, folder: Folder, name: str) -> bool:
    parent = read_descriptor(folder, name)
    return parent is not None and descriptor.may_stand_on(parent)


def _check_cid(child: Link, descriptor: Descriptor, parent: Link, options: OpenOptions) -> None:
    expected, found = descriptor.parent_cid, parent.cid
    if expected == found and expected != NO_PARENT:
        return
    mismatch = ContentIdMismatch(
        child.name,
        parent=parent.name,
        expected=f"{expected:08x}",
        found="none" if found is None else f"{found:08x}",
    )
    if not options.ignore_cid:
        parent.close()
        raise mismatch
    child.warnings.append(str(mismatch))


def _protect(folder: Folder, name: str, top: Link, options: OpenOptions) -> None:
    """Refuse to write where that would make something else wrong."""
    descriptor = top.descriptor
    assert descriptor is not None
    if descriptor.change_track_path is not None and not options.drop_ctk:
        raise WriteRefused(
            top.name,
            why="its changes are tracked in a file that writing would make wrong "
            f"({descriptor.change_track_path})",
            hint="read it with -r, or give up the tracking with --drop-ctk",
        )
    if options.write_parent or descriptor.cid is None:
        return
    child = find_child(top.folder, name, descriptor.cid)
    if child is not None:
        raise WriteRefused(
            top.name,
            why=f"it is the parent of {child}, which writing to it would make invalid",
            hint=f"open {folder.label(child)}, read this one with -r, or give up the child with "
            "--write-parent",
        )


def find_child(folder: Folder, name: str, cid: int) -> str | None:
    """A link in ``folder`` whose parent is the link ``name`` with this content ID, None if there is none."""
    own = last_component(name)
    for sibling, other in descriptors_in(folder):
        if sibling != own and other.has_parent and other.parent_cid == cid:
            hint = other.parent_hint
            if hint is None or last_component(hint) == own or _is_same(folder, last_component(hint), own):
                return sibling
    return None


def _is_same(folder: Folder, one: str, other: str) -> bool:
    """Whether two names are of one file: one may be a link to the other."""
    try:
        with closing(folder.open(one)) as first, closing(folder.open(other)) as second:
            return first.identity == second.identity
    except VmdkError:
        return False
