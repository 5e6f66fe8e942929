"""The links in folders and how they hang together.

Only descriptors are read here, no extents: a tree can be shown although data is missing, and looking costs
one small read a file.  A link's parent is the file that its hint leads to, by the rules of opening a chain;
whether it is still the parent is said by the content IDs.
"""

import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nbd_vmdk.chain import MAX_LINKS, parent_candidates
from nbd_vmdk.errors import FileMissing, TrustError, VmdkError
from nbd_vmdk.look import head_of, read_descriptor, vmdk_names
from nbd_vmdk.ondisk import hosted
from nbd_vmdk.ondisk.descriptor import Descriptor, last_component
from nbd_vmdk.opener import own_line
from nbd_vmdk.storage.folder import Folder


@dataclass(frozen=True, slots=True, eq=False)
class LinkFile:
    """A link by its descriptor: the folder that holds it, its plain name there, which file it is."""

    folder: Folder
    name: str
    identity: tuple[int, ...]
    descriptor: Descriptor

    @property
    def label(self) -> str:
        """The path, as the user would write it."""
        return os.path.normpath(self.folder.label(self.name))

    @property
    def word(self) -> str:
        """The same as a word of a command, for hints."""
        return shlex.quote(self.label)

    @property
    def path(self) -> str:
        """The path, for what is done by name."""
        return self.folder.label(self.name)

    @property
    def cid(self) -> int | None:
        """Its content ID."""
        return self.descriptor.cid

    def expects(self, parent: "LinkFile") -> bool:
        """Whether ``parent`` still has the content ID that this link was made on."""
        return self.descriptor.has_parent and self.descriptor.parent_cid == parent.cid


def link_file(folder: Folder, name: str) -> LinkFile | None:
    """The link in the file ``name`` of ``folder``, None if it has no descriptor that can be read.

    Raises as Folder.open does.
    """
    storage = folder.open(name)
    try:
        identity = storage.identity
    finally:
        storage.close()
    descriptor = read_descriptor(folder, name)
    if descriptor is None:
        return None
    return LinkFile(folder.folder_of(name), name.rpartition("/")[2], identity, descriptor)


def links_in(folder: Folder) -> list[LinkFile]:
    """The links in a folder, by name; what can't be read is passed over.

    However many they are: what is removed or merged must have no child that was not seen.
    """
    found = []
    for name in sorted(vmdk_names(folder)):
        try:
            link = link_file(folder, name)
        except VmdkError:
            continue
        if link is not None:
            found.append(link)
    return found


def links_of(folders: Iterable[Folder]) -> list[LinkFile]:
    """The links in several folders, each file once."""
    found: dict[tuple[int, ...], LinkFile] = {}
    for folder in folders:
        for link in links_in(folder):
            found.setdefault(link.identity, link)
    return list(found.values())


def names_beside(link: LinkFile) -> set[str]:
    """The plain names of the files that its descriptor names besides the one that it is in.

    Where a file with tables holds the descriptor, the line that means this file may call it anything, as it
    keeps the name that it was made with in every copy.  A file that can't be read is taken at its word.
    """
    lines = list(link.descriptor.extents)
    try:
        storage = link.folder.open(link.name)
        try:
            head = head_of(storage)
        finally:
            storage.close()
        used = [line for line in lines if line.sectors]
        if head.startswith(hosted.MAGIC) and used:
            header = hosted.parse_header(head, storage.name)
            if not header.is_wrapper:
                lines.remove(own_line(link.name, used, header))
    except VmdkError:
        pass
    return {last_component(line.name) for line in lines if line.name is not None}


def parent_of(link: LinkFile) -> LinkFile | None:
    """The link that the hint of ``link`` leads to, None if there is none or it can't be read.

    What is only a guess of where it might be is taken if it has the expected content ID, as in a chain.
    """
    descriptor = link.descriptor
    hint = descriptor.parent_hint
    if not descriptor.has_parent or hint is None:
        return None
    for name, is_guess in parent_candidates(hint):
        try:
            parent = link_file(link.folder, name)
        except (FileMissing, TrustError):
            continue
        except VmdkError:
            return None
        if parent is None and not is_guess:
            return None
        if parent is not None and (not is_guess or descriptor.may_stand_on(parent.descriptor)):
            return parent
    return None


def children_of(parent: LinkFile, links: Sequence[LinkFile]) -> list[LinkFile]:
    """Those of ``links`` whose hints lead to ``parent``, whether or not it is still what they expect."""
    found = []
    for link in links:
        if link.identity != parent.identity:
            other = parent_of(link)
            if other is not None and other.identity == parent.identity:
                found.append(link)
    return found


def ancestors_of(link: LinkFile) -> Iterator[LinkFile]:
    """Its parent, that one's parent and so on, as far as they can be read; ends where it goes round."""
    seen = {link.identity}
    while (parent := parent_of(link)) is not None and parent.identity not in seen and len(seen) < MAX_LINKS:
        seen.add(parent.identity)
        yield parent
        link = parent


@dataclass(frozen=True, slots=True)
class Branch:
    """A link in its tree.

    parent  the link it hangs on, None for a root
    state   "base", "good", "old" (the parent was changed since), or "lost" (no parent where the hint says)
    """

    link: LinkFile
    parent: LinkFile | None
    state: str
    children: "list[Branch]"


def forest(links: Sequence[LinkFile]) -> list[Branch]:
    """All of ``links`` as trees, in the order of their names; a link in a loop is a root."""
    branches: dict[tuple[int, ...], Branch] = {}
    for link in links:
        parent = parent_of(link)
        if not link.descriptor.has_parent:
            state = "base"
        elif parent is None:
            state = "lost"
        else:
            state = "good" if link.expects(parent) else "old"
        branches[link.identity] = Branch(link, parent, state, [])
    roots = []
    for branch in branches.values():
        above = branches.get(branch.parent.identity) if branch.parent is not None else None
        if above is None or _is_below(above, branch, branches):
            roots.append(branch)
        else:
            above.children.append(branch)
    return roots


def _is_below(branch: Branch, other: Branch, branches: dict[tuple[int, ...], Branch]) -> bool:
    """Whether ``branch`` hangs on ``other``: then hanging that one on it would close a loop."""
    at: Branch | None = branch
    for _ in range(len(branches)):
        if at is other:
            return True
        if at is None or at.parent is None:
            return False
        at = branches.get(at.parent.identity)
    return at is not None and at is other
