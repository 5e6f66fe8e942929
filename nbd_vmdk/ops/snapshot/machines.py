"""The lines of machines' files that name a link, and giving them another name of it.

A machine writes to the link that its .vmx names, and goes back to those that its .vmsd names.  When a link
gets a child that is to take the writes, another name, or is merged away, these lines are wrong: where that is
wanted they are changed, and every other byte of the files stays.  A file is replaced as a whole, with its
permissions; it is held from before the first thing is done to the link.  While the machine is open in a
product of VMware's (``vm.vmx.lck``) its files are not changed: it would write them anew from what it
remembers.

What is not done: snapshots are not entered in a .vmsd, nor taken out of it.  An entry names the state of the
whole machine (.vmsn), which its products need to go back to it, to clone from it and to remove it; the layout
of that is not published, and an entry without one is a snapshot that can't be used.  An entry is also one of
all disks of the machine, and our verbs freeze one.  A machine without the entry is whole: its .vmx names the
child, whose descriptor names the rest.  Giving a link another parent changes no line: no name changes.
"""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from nbd_vmdk.errors import InUse, VmdkError
from nbd_vmdk.ondisk.descriptor import is_absolute, last_component, windows_to_posix
from nbd_vmdk.ondisk.vmsd import is_link_key
from nbd_vmdk.ondisk.vmx import MAX_DICTIONARY, disks_of, parse_dictionary, with_values
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.storage.newfiles import NewFiles

#: Machines looked at in one folder.
MAX_FILES = 100


@dataclass(frozen=True, slots=True)
class Mention:
    """A line of a machine's file that names a link.

    file  the path of the .vmx or .vmsd
    key   what the line sets: ``scsi0:0.fileName``
    old   the name of the link in it;  new: the one that it should have
    """

    file: str
    key: str
    old: str
    new: str

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"file": self.file, "key": self.key, "old": self.old, "new": self.new}


def find_mentions(
    folders: Iterable[Folder], identity: tuple[int, ...], new: str, *, snapshots: bool = False
) -> list[Mention]:
    """The lines in the .vmx files of ``folders`` that name a link, which is to be the file ``new`` instead.

    With ``snapshots`` also those in .vmsd files.  Files that can't be read are passed over.
    """
    endings = (".vmx", ".vmsd") if snapshots else (".vmx",)
    found = []
    for folder in folders:
        for name in [name for name in folder.names() if name.lower().endswith(endings)][:MAX_FILES]:
            try:
                named = named_links(parse_dictionary(read_dictionary(folder, name), folder.label(name)), name)
            except VmdkError:
                continue
            home = os.path.dirname(os.path.realpath(folder.label(name)))
            for key, old in named.items():
                if which_file(folder, old) == identity:
                    path = os.path.normpath(folder.label(name))
                    found.append(Mention(path, key, old, _new_value(old, home, new)))
    return found


def named_links(values: dict[str, str], name: str) -> dict[str, str]:
    """The links that the .vmx or .vmsd called ``name`` names, by keys as VMware spells them."""
    if name.lower().endswith(".vmx"):
        return {f"{disk.node}.fileName": disk.file for disk in disks_of(values)}
    return {
        key.removesuffix("filename") + "fileName": value
        for key, value in values.items()
        if is_link_key(key) and value
    }


def read_dictionary(folder: Folder, name: str) -> bytes:
    """The bytes of a machine's file, at most one more than it may have."""
    storage = folder.open(name)
    try:
        return storage.read(0, min(storage.size, MAX_DICTIONARY + 1))
    finally:
        storage.close()


def which_file(folder: Folder, name: str) -> tuple[int, ...] | None:
    """The identity of the file that a machine's file in ``folder`` names, as it is or beside; or None."""
    names = [windows_to_posix(name)]
    if is_absolute(name):
        names.append(last_component(name))
    for each in names:
        try:
            storage = folder.open(each)
        except VmdkError:
            continue
        storage.close()
        return storage.identity
    return None


def _new_value(old: str, home: str, new: str) -> str:
    """What to write for the file ``new`` into a file in ``home`` in the place of the name ``old``."""
    folder, name = os.path.split(os.path.realpath(new))
    plain = last_component(old)
    there = os.path.dirname(os.path.realpath(os.path.join(home, windows_to_posix(old))))
    if plain != old and (folder == there or (is_absolute(old) and folder == home)):
        return old[: len(old) - len(plain)] + name
    if os.path.commonpath((folder, home)) == home:
        return os.path.relpath(os.path.join(folder, name), home)
    return os.path.join(folder, name)


class MachineFiles:
    """The files of ``mentions``, held for being changed until ``held`` is left."""

    def __init__(self, held: ExitStack, mentions: Iterable[Mention]) -> None:
        """Nothing is changed before publish().

        Raises InUse while a machine is open somewhere, FormatError for a name that a file can't say.
        """
        self._new: list[tuple[NewFiles, str]] = []
        self._mentions = tuple(mentions)
        files: dict[str, list[Mention]] = {}
        for each in self._mentions:
            files.setdefault(each.file, []).append(each)
        for path, lines in files.items():
            folder, name = LocalFolder.for_image(os.path.realpath(path))
            try:
                new = held.enter_context(NewFiles(path, replace=True))
            except InUse as error:
                error.hint = "close the machine first, or change its files yourself afterwards"
                raise
            raw = read_dictionary(folder, name)
            values = parse_dictionary(raw, path)
            if any(values.get(line.key.lower()) != line.old for line in lines):
                raise InUse(path, how="it has just been changed", hint="try again")
            content = with_values(raw, path, {line.key.lower(): line.new for line in lines})
            made = new.create(name)
            try:
                made.write(content, 0)
            finally:
                made.close()
            self._new.append((new, name))

    def publish(self) -> None:
        """Put the changed files in place, each at once; raises as NewFiles.publish() does."""
        for new, name in self._new:
            new.publish(main=name)
        self._new.clear()

    def are_as_before(self) -> bool:
        """Whether all lines say what they said, as far as they can be read: after publish() was stopped."""
        try:
            for each in self._mentions:
                folder, name = LocalFolder.for_image(os.path.realpath(each.file))
                values = parse_dictionary(read_dictionary(folder, name), each.file)
                if values.get(each.key.lower()) != each.old:
                    return False
        except VmdkError:
            return False
        return True
