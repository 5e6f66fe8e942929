"""What a machine's files say of its links: the .vmx which one is written to, the .vmsd their snapshots."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from nbd_vmdk.errors import VmdkError
from nbd_vmdk.ondisk.vmsd import Snapshot, parse_snapshots
from nbd_vmdk.ondisk.vmx import disks_of, parse_dictionary
from nbd_vmdk.ops.snapshot.machines import MAX_FILES, read_dictionary, which_file
from nbd_vmdk.storage.folder import Folder

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Named:
    """A snapshot that froze a link: its name, what the user wrote about it, when it was taken (or None)."""

    name: str
    description: str
    taken: datetime | None
    file: str


@dataclass(slots=True)
class Records:
    """What is recorded, by the identity of the link's file.

    current    where a machine has the link as its disk: ``vm.vmx scsi0:0``
    snapshots  the snapshots that froze it
    warnings   what could not be read
    """

    current: dict[tuple[int, ...], list[str]] = field(default_factory=dict)
    snapshots: dict[tuple[int, ...], list[Named]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def records_in(folders: Iterable[Folder]) -> Records:
    """All that the .vmx and .vmsd files in some folders say."""
    found = Records()
    for folder in folders:
        names = [name for name in folder.names() if name.lower().endswith((".vmx", ".vmsd"))]
        for name in names[:MAX_FILES]:
            try:
                _read(folder, name, found)
            except VmdkError as error:
                found.warnings.append(str(error))
    return found


def _read(folder: Folder, name: str, found: Records) -> None:
    raw = read_dictionary(folder, name)
    label = folder.label(name)
    values = parse_dictionary(raw, label)
    if name.lower().endswith(".vmx"):
        for disk in disks_of(values):
            _note(folder, disk.file, found.current, f"{name} {disk.node}")
        return
    numbers = {values[key]: key.removesuffix(".uid") for key in values if key.endswith(".uid")}
    for snapshot in parse_snapshots(raw, label):
        named = _named(snapshot, values, numbers.get(snapshot.uid, ""), name)
        for disk in snapshot.disks:
            _note(folder, disk.file, found.snapshots, named)


def _named(snapshot: Snapshot, values: dict[str, str], prefix: str, file: str) -> Named:
    return Named(
        snapshot.name,
        values.get(f"{prefix}.description", ""),
        _time(values.get(f"{prefix}.createtimehigh", ""), values.get(f"{prefix}.createtimelow", "")),
        file,
    )


def _time(high: str, low: str) -> datetime | None:
    """Microseconds since 1970 in two halves of 32 bits, the lower one written with a sign."""
    try:
        micros = (int(high[:12]) << 32) + (int(low[:12]) & 0xFFFFFFFF)
        return datetime.fromtimestamp(micros / 1_000_000, UTC) if micros > 0 else None
    except (ValueError, OverflowError, OSError):
        return None


def _note(folder: Folder, file: str, table: dict[tuple[int, ...], list[T]], what: T) -> None:
    identity = which_file(folder, file)
    if identity is not None:
        table.setdefault(identity, []).append(what)
