"""Giving a link another name or another place, with all its files, and telling its children.

Within a file system every file first gets its new name beside the old one (a hard link):

    1. name      all extents, and a main file that has the descriptor inside, get their new names as well
    2. describe  the descriptor under the new name says the new names; where it is a text of its own, it is
                 a new file, and the old one stays as it is
    3. point     the children name the link by its new name
    4. remove    the old names go: the descriptor's first, then those of the extents

From 2 on the link is whole under its new name, and until 4 under its old one too (both are the same data); a
child finds it at any moment.  Stopped anywhere, the same command goes on.  To another file system the files
are copied, all getting their names at once, before the children are pointed there and the old ones go.

A link's own parent stays where it is; the way to it is told anew where the link moves to another folder.
A .vmx or .vmsd that names the link is told of, and changed on request, before the old names go.

What is not done: on a file system without hard links a file has only one name at any moment, and the link
can't be opened until the command has ended.
"""

import filecmp
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import FileExists, FileMissing, OptionError, StorageError, WriteRefused
from nbd_vmdk.link import Link
from nbd_vmdk.look import find_owner, read_descriptor
from nbd_vmdk.ondisk.descriptor import Descriptor, last_component
from nbd_vmdk.opener import open_link
from nbd_vmdk.ops.convert import final_names
from nbd_vmdk.ops.copy import Progress
from nbd_vmdk.ops.create.child import is_elsewhere, parent_hint
from nbd_vmdk.ops.linkset.copying import Copier
from nbd_vmdk.ops.linkset.names import new_names, target_path, with_names
from nbd_vmdk.ops.linkset.removing import left_of, remove_set
from nbd_vmdk.ops.rewrite import DescriptorFile, is_embedded, mend_folder
from nbd_vmdk.ops.snapshot import files
from nbd_vmdk.ops.snapshot.machines import MachineFiles, Mention, find_mentions
from nbd_vmdk.ops.snapshot.names import bare, final_name
from nbd_vmdk.ops.snapshot.records import records_in
from nbd_vmdk.ops.snapshot.secondname import add_name, drop_name
from nbd_vmdk.ops.snapshot.tree import LinkFile, children_of, link_file, links_of, parent_of
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.storage.newfiles import NewFiles


@dataclass(slots=True)
class Renamed:
    """What renaming does, or did.

    files     (old, new) path of every file, the one with the descriptor last
    children  links that are told the new name
    copied    bytes that are copied, as the new place is in another file system
    users     machines and snapshots whose files name the link by its old name
    machines  the lines in them that do
    hints     links that from now on need another folder to be allowed
    """

    old: str
    new: str
    files: list[tuple[str, str]] = field(default_factory=list)
    children: list[str] = field(default_factory=list)
    copied: int = 0
    users: list[str] = field(default_factory=list)
    machines: list[Mention] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "old": self.old,
            "new": self.new,
            "files": [{"from": old, "to": new} for old, new in self.files],
            "children": self.children,
            "copied": self.copied,
            "users": self.users,
            "machines": [each.as_dict() for each in self.machines],
            "hints": self.hints,
        }


def rename(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    edit_vm: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Renamed:
    """Call the link ``old`` ``new``, which may be in another folder, or be a folder to move it to.

    Children are looked for in its folder, in the new one and in allow_dirs.  With ``edit_vm`` the machines'
    files that name it are changed.  ``options`` are those of OpenOptions.  Raises FileExists, InUse, and
    WriteRefused for files that are not the link's alone or in another folder than its own; then nothing has
    changed.  After a later error, or a kill, the same call goes on.
    """
    chosen = files.opening(options, locks=not dry_run)
    source = files.whole_image_in(old, chosen, "mv", os.fspath(old), os.fspath(new))
    path = target_path(new, os.path.basename(source))
    if not os.path.lexists(source) and os.path.lexists(path):
        return _finish(source, path, dry_run=dry_run)
    place = files.Place(old, chosen, mend=not dry_run)
    link = place.link
    if final_name(link.name) is not None:
        raise WriteRefused(link.label, why="another link is being merged into it", hint="finish that first")
    target, name = LocalFolder.for_image(path, options.get("allow_dirs", ()))
    if not dry_run:
        mend_folder(target)
    if link.name == name and _is_same(
        os.path.dirname(link.path) or os.curdir, os.path.dirname(path) or os.curdir
    ):
        raise OptionError(path, why="that is its name already")
    with ExitStack() as held:
        work = _Renaming(held, place, path, target, name)
        if not dry_run:
            work.run(progress, MachineFiles(held, work.found.machines if edit_vm else ()))
    return work.found


class _Renaming:
    """One renaming, with everything that it concerns held."""

    def __init__(
        self, held: ExitStack, place: files.Place, path: str, target: LocalFolder, name: str
    ) -> None:
        link = self._link = place.link
        self._held = held
        self._path = path
        self._target, self._name = target, name
        links = [each for each in links_of([*place.folders, target]) if each.identity != link.identity]
        if place.options.locks:
            self._file = files.hold(held, link)
            self._opened = files.hold_link(held, link, place.options, self._file)
        else:
            options = files.unlocked(place.options)
            self._opened = open_link(link.folder, link.name, options, Cache(files.CACHE), writable=False)
            held.callback(self._opened.close)
        # Another name of it may be there already, with the same files: an earlier attempt was stopped.
        others = [each for each in links if not (each.cid == link.cid and _is_same(each.path, path))]
        paths = _own_files(link, self._opened, others)
        self._names = new_names(self._opened, paths, link.name, name)
        home = os.path.dirname(os.path.realpath(path))
        self._moves = [(each, os.path.join(home, self._names[os.path.basename(each)])) for each in paths]
        self._is_near = os.stat(home).st_dev == os.stat(paths[-1]).st_dev
        self._descriptor = self._describe(home)
        self._children = children_of(link, [each for each in links if not _is_same(each.path, path)])
        if place.options.locks:
            self._child_files = [files.hold(held, child) for child in self._children]
        records = records_in(place.recorded)
        users = records.current.get(link.identity, [])
        named = records.snapshots.get(link.identity, ())
        self.found = Renamed(
            link.label,
            path,
            self._moves,
            [child.label for child in self._children],
            0 if self._is_near else sum(storage.size for storage in self._opened.storages),
            [*users, *(f'{each.file}, snapshot "{each.name}"' for each in named)],
            find_mentions(place.recorded, link.identity, path, snapshots=True),
        )
        self._tell_folders(home)
        #: Copies of extents that an earlier attempt made.
        self._left: list[str] = []
        self._check_free()

    def _describe(self, home: str) -> Descriptor:
        link = self._link
        hint = None
        if link.descriptor.has_parent and home != os.path.realpath(link.folder.name):
            parent = parent_of(link)
            if parent is None and os.path.lexists(self._path):
                there = link_file(self._target, self._name)
                parent = None if there is None else parent_of(there)
            if parent is None:
                raise WriteRefused(
                    link.label,
                    why="its parent was not found, so the new place can't be told where it is",
                    hint="put the parent where its descriptor says, or name its folder with --allow-dir",
                )
            hint = parent_hint(parent.path, home)
        return with_names(link.descriptor, self._opened, self._names, hint=hint)

    def _tell_folders(self, home: str) -> None:
        """Say which links stand in another folder than their parent now."""
        hint = self._descriptor.parent_hint
        if hint is not None and is_elsewhere(hint):
            folder = os.path.dirname(os.path.normpath(os.path.join(home, hint)))
            self.found.hints.append(f"its parent is in another folder: opening it takes --allow-dir {folder}")
        for child in self._children:
            if is_elsewhere(parent_hint(self._moves[-1][1], child.folder.name)):
                self.found.hints.append(f"opening {child.label} takes --allow-dir {home}")

    def _check_free(self) -> None:
        """Raise FileExists for a name that something else has."""
        for old, new in self._moves:
            if not os.path.lexists(new) or _is_same(old, new):
                continue
            if new == self._moves[-1][1] and self._is_described():
                continue
            if not self._is_near and (self._is_described() or self._is_left(old, new)):
                continue
            raise FileExists(os.path.join(os.path.dirname(self._path), os.path.basename(new)))

    def _is_left(self, old: str, new: str) -> bool:
        """Whether ``new`` is a copy of the extent ``old`` that nothing names: an earlier attempt's."""
        name = os.path.basename(new)
        is_left = name != self._name and find_owner(self._target, name) is None and _is_equal(old, new)
        if is_left:
            self._left.append(new)
        return is_left

    def _is_described(self) -> bool:
        """Whether the new descriptor is there already, made by an earlier attempt."""
        there = read_descriptor(self._target, self._name) if os.path.lexists(self._path) else None
        return there is not None and there.to_bytes() == self._descriptor.to_bytes()

    def run(self, progress: Progress | None, machines: MachineFiles) -> None:
        """Do it."""
        main, new_main = self._moves[-1]
        if self._is_near:
            self._give_names()
        elif not self._is_described():
            files.remove_files(self._left)
            with NewFiles(new_main) as new, final_names(new.folder, new_main):
                copier = Copier(new, self.found.copied, progress)
                copier.link(self._opened, self._names, self._descriptor)
                for old, path in self._moves[:-1]:
                    if not os.path.lexists(new.path(os.path.basename(path))):
                        # Some kilobytes that no extent line names: those of change tracking.
                        copier.text(old, os.path.basename(path), _content(old))
                new.publish(main=self._name)
        for child, file in zip(self._children, self._child_files, strict=True):
            cid = child.descriptor.parent_cid
            assert cid is not None
            files.point(file, new_main, cid)
        machines.publish()
        if not self._is_near:
            remove_set([old for old, _new in self._moves])
            return
        if is_embedded(self._opened):
            drop_name(main, new_main)
        elif main != new_main:
            files.remove_files([main])
        for old, path in self._moves[:-1]:
            drop_name(old, path)

    def _give_names(self) -> None:
        main, new_main = self._moves[-1]
        embedded = is_embedded(self._opened)
        for old, path in self._moves if embedded else self._moves[:-1]:
            if os.path.lexists(old) or not os.path.lexists(path):
                add_name(old, path)
        if embedded:
            file = self._file
            if not os.path.lexists(main):  # there are no hard links here: the file was renamed
                file.close()
                file = self._held.enter_context(DescriptorFile.open(self._target, self._name))
            file.replace(self._descriptor)
        elif not self._is_described():
            with NewFiles(new_main) as new, final_names(new.folder, new_main):
                Copier(new, 0, None).text(main, self._name, self._descriptor.to_bytes())
                new.publish(main=self._name)


def _own_files(link: LinkFile, opened: Link, others: Iterable[LinkFile]) -> list[str]:
    """As files.own_files, with another word about what to do."""
    try:
        return files.own_files(link, opened.storages, others)
    except WriteRefused as error:
        if error.hint is not None:
            error.hint = "nothing is renamed that might be something else: nbd-vmdk clone makes a copy"
        raise


def _finish(source: str, path: str, *, dry_run: bool) -> Renamed:
    """Take away what is left of the old link when all else was done; FileMissing if that can't be meant."""
    found = Renamed(source, path)
    left = left_of(source)
    target, name = LocalFolder.for_image(path)
    there = link_file(target, name)
    if there is None:
        raise FileMissing(source)
    home, old_name = os.path.split(os.path.realpath(source))
    new_home = os.path.dirname(os.path.realpath(path))
    stem = bare(old_name)
    for line in there.descriptor.extents:
        new = os.path.join(new_home, last_component(line.name or ""))
        for each in () if left else LocalFolder.for_folder(home).names():
            old = os.path.join(home, each)
            if old != new and each.startswith((f"{stem}-", f"{stem}.")) and _is_same(old, new):
                found.files.append((old, new))
    if not found.files and not left:
        raise FileMissing(source)
    if not dry_run:
        for old, new in found.files:
            drop_name(old, new)
        files.remove_files(left)
    return found


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise StorageError.of(error, path, "read") from error


def _is_equal(one: str, two: str) -> bool:
    """Whether both files can be read, and hold the same."""
    try:
        return filecmp.cmp(one, two, shallow=False)
    except OSError:
        return False


def _is_same(one: str, two: str) -> bool:
    """Whether both names lead to one file."""
    try:
        return os.path.samefile(one, two)
    except OSError:
        return False
