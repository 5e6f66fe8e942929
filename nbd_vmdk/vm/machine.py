"""The disks of a machine: those that its .vmx plugs in, or that one of its snapshots froze.

Names in both are untrusted, and go through the gate as an image's own do.  They are often absolute, as the
host that made them saw them; what lies beside the configuration is then taken, and said.
"""

from collections.abc import Sequence

from nbd_vmdk.errors import FileMissing, FormatError, NotVmdk, OptionError, TrustError, VmdkError
from nbd_vmdk.look import spellings
from nbd_vmdk.ondisk.descriptor import is_absolute
from nbd_vmdk.ondisk.vmsd import Snapshot, parse_snapshots
from nbd_vmdk.ondisk.vmx import MAX_DICTIONARY, MAX_DISKS, AttachedDisk, disks_of, parse_dictionary
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.vm.found import FoundDisk

#: Snapshots, or lists of them, that an error lists.
_LISTED = 32


def disks_of_machine(folder: Folder, name: str, snapshot: str | None) -> list[FoundDisk]:
    """The disks of the configuration ``name`` of ``folder``, in bus order: as they are, or in a snapshot.

    Raises OptionError for a snapshot that is not there, FormatError for a text that is none, NotVmdk for a
    machine without disks.
    """
    if snapshot is not None:
        return disks_of_snapshot(folder, _snapshots_of(folder, name), snapshot)
    disks = disks_of(parse_dictionary(read_text(folder, name, MAX_DICTIONARY), folder.label(name)))
    if not disks:
        raise NotVmdk(folder.label(name), what="a machine without disks")
    return _find(folder, name, disks, frozen=False)


def disks_of_snapshot(folder: Folder, name: str, wanted: str | None) -> list[FoundDisk]:
    """The disks in the snapshot ``wanted`` (name or number) of the list ``name``; errors as above."""
    label = folder.label(name)
    snapshots = parse_snapshots(read_text(folder, name, MAX_DICTIONARY), label)
    chosen = _choose(snapshots, wanted, label)
    if not chosen.disks:
        raise NotVmdk(label, what=f"snapshot {chosen.name!r} has no disks")
    return _find(folder, name, chosen.disks, frozen=True)


def _snapshots_of(folder: Folder, name: str) -> str:
    """The snapshot list that belongs to a configuration: called like it, or else the only one beside it."""
    stem = name.rpartition(".")[0]
    lists = [other for other in folder.names() if other.lower().endswith(".vmsd")]
    for other in lists:
        if other[: -len(".vmsd")] == stem:
            return other
    if not lists:
        raise OptionError(
            folder.label(name),
            why=f"it has no snapshots: there is no {stem}.vmsd beside it",
            hint="without --snapshot its disks are served as they are now",
        )
    if len(lists) > 1:
        there = ", ".join(map(folder.label, lists[:_LISTED])) + (" ..." if len(lists) > _LISTED else "")
        raise OptionError(
            folder.label(name),
            why=f"{len(lists)} snapshot lists beside it, and none is called {stem}.vmsd",
            hint=f"name the one that is meant instead of {name}: {there}",
        )
    return lists[0]


def _choose(snapshots: Sequence[Snapshot], wanted: str | None, label: str) -> Snapshot:
    if not snapshots:
        raise OptionError(label, why="the machine has no snapshots")
    shown = ", ".join(f"{each.uid} {each.name!r}" for each in snapshots[:_LISTED])
    there = f"there are (number and name): {shown}" + (" ..." if len(snapshots) > _LISTED else "")
    if wanted is None:
        raise OptionError(
            label, why="it lists snapshots: which one?", hint=f"'serve --snapshot NAME' takes one; {there}"
        )
    found = [each for each in snapshots if each.name == wanted] or [
        each for each in snapshots if each.uid == wanted
    ]
    if len(found) != 1:
        why = f"{len(found)} snapshots are called {wanted!r}" if found else f"no snapshot {wanted!r}"
        raise OptionError(label, why=why, hint=there)
    return found[0]


def _find(folder: Folder, name: str, disks: Sequence[AttachedDisk], *, frozen: bool) -> list[FoundDisk]:
    if len(disks) > MAX_DISKS:
        raise FormatError(folder.label(name), why=f"{len(disks)} disks are more than any machine has")
    return [_resolve(folder, name, disk, frozen=frozen) for disk in disks]


def _resolve(folder: Folder, name: str, disk: AttachedDisk, *, frozen: bool) -> FoundDisk:
    """The file that a disk's name leads to: as written, with slashes turned, or beside."""
    first: VmdkError | None = None
    for spelling in spellings(disk.file):
        try:
            inside = folder.folder_of(spelling)
            plain = spelling.rpartition("/")[2]
            inside.open(plain).close()
        except (FileMissing, TrustError) as error:
            first = first or error.kept()
            continue
        except VmdkError as error:
            first = error.kept()
            break
        warnings = []
        if is_absolute(disk.file) and not is_absolute(spelling):
            warnings.append(f"{folder.label(name)}: {spelling} beside it is taken for {disk.file}")
        if disk.redo:
            warnings.append(f"{inside.label(plain)}: changes that are still in {disk.redo} are left out")
        return FoundDisk(
            inside, plain, inside.label(plain), disk.node, frozen=frozen, warnings=tuple(warnings)
        )
    assert first is not None
    return FoundDisk(folder, disk.file, folder.label(disk.file), disk.node, frozen=frozen, fault=first)


def read_text(folder: Folder, name: str, limit: int) -> bytes:
    """A small file, whole; FormatError for one of more than ``limit`` bytes."""
    storage = folder.open(name)
    try:
        if storage.size > limit:
            raise FormatError(storage.name, why=f"{storage.size} bytes are too many for a text of this sort")
        return storage.read(0, storage.size)
    finally:
        storage.close()
