"""Copying a disk from anything that is one to anything that can be one.

What a source is, nobody may decide but the user: a raw disk's first bytes are its guest's, who can put a
VMDK descriptor there that names other people's files.  So a file is opened as a VMDK only if its name is that
of one (or of a machine or an appliance, and not that of a raw extent), or on the user's word; a device or an
NBD export never is, except on the user's word for a device; and any other file is raw, but only if it does
not look like anything else.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

from nbd_vmdk.disk import Disk, open_disk
from nbd_vmdk.errors import FileExists, FileMissing, NotVmdk, OptionError, StorageError, WriteRefused
from nbd_vmdk.ondisk.probe import PROBE_LENGTH, FileKind, describe_other, identify
from nbd_vmdk.ops.convert import HOLE_GRAIN, Made, Work, compare, write_device, write_image, write_raw
from nbd_vmdk.ops.copy import Copied, Source, copy
from nbd_vmdk.ops.sides import DiskSource, StorageSource
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.units import SECTOR, align_up

#: What a source or target begins with that is an NBD export.
_URI: Final = re.compile(r"nbds?(?:\+unix|\+vsock)?://", re.IGNORECASE)
#: What a user may say a source is.
FORMATS: Final = ("vmdk", "raw")
RAW: Final = "raw"
#: What is called so is opened to find a VMDK; ``app.ova:disk1.vmdk`` is one of several.
_VMDK_NAME: Final = re.compile(r".*\.(?:vmdk|(?:ova|ovf|vmx|vmtx)(?::.*)?)", re.IGNORECASE | re.DOTALL)
#: A name that VMware gives to the raw data of a disk.
_RAW_EXTENT: Final = re.compile(r"-(?:flat|f\d{3,}|rdmp?|pt)\.vmdk$", re.IGNORECASE)
_RAW_NAMES: Final = (".raw", ".img", ".bin", ".dd")
_ADAPTERS: Final = ("ide", "buslogic", "lsilogic", "legacyESX")
#: What of a disk database belongs to the guest's view of the disk, and is kept.
_KEPT: Final = re.compile(
    r"ddb\.(?:geometry\..+|toolsVersion|toolsInstallType|(?:logical|physical)SectorSize)"
)


@dataclass(frozen=True, slots=True)
class Converted:
    """What was made.

    target    as the user named it
    kind      createType of a VMDK, ``raw``, ``device``, ``nbd`` or ``ova``
    size      bytes of the disk
    data      bytes of it that were written as data; the rest is zeros
    occupied  bytes that the target's files really occupy, None where it is no file
    verified  it was read back and compared with its source
    notes     what was chosen for a new VMDK, and why
    warnings  what was odd but harmless
    """

    target: str
    kind: str
    size: int
    data: int
    occupied: int | None
    verified: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """For ``--json``."""
        return asdict(self)


class _Opened(NamedTuple):
    """An open source: its bytes, whose they are, and what of its descriptor is worth keeping."""

    source: Source
    files: tuple[Storage, ...]
    warnings: tuple[str, ...]
    disk: Disk | None


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    kind: str | None = None,
    source_format: str | None = None,
    create: Mapping[str, Any] | None = None,
    work: Work | None = None,
    **options: Any,
) -> Converted:
    """Copy the disk ``source`` to ``target``, which is made new.

    Either is a path or an NBD URI; a target may be a block device.  ``kind`` is that of the target: a
    createType, ``raw`` or ``ova``; None takes what its name says.  ``source_format`` says what the source is,
    ``vmdk`` or ``raw`` (see the module).  ``create`` are more fields of CreateOptions, ``options`` those of
    OpenOptions.  Raises VmdkError; then the target is as it was, unless it is a device or an export.
    """
    wanted, here = os.fspath(target), os.fspath(source)
    work = work or Work()
    chosen = _target_kind(wanted, kind)
    with _open_source(here, source_format, options) as opened:
        for file in opened.files:
            _refuse_itself(file, wanted)
        try:
            made = _write(opened, wanted, chosen, work, dict(create or {}))
        except FileExists as error:
            error.hint = "choose another name, or add --force to replace it"
            raise
    created = made.created
    is_vmdk = created is not None and chosen != "ova"
    return Converted(
        target=wanted,
        kind=created.create_type if created is not None and is_vmdk else chosen or "vmdk",
        size=opened.source.size,
        data=made.copied.data,
        occupied=_occupied(made.files) if made.files else None,
        verified=work.verify,
        notes=() if created is None else created.notes,
        warnings=opened.warnings + (() if created is None else created.warnings),
    )


def _write(opened: _Opened, target: str, chosen: str | None, work: Work, create: dict[str, Any]) -> Made:
    source = opened.source
    if chosen in (RAW, "device", "nbd") and create:
        options = ", ".join(sorted(create))
        raise OptionError(target, why=f"{options}: only a VMDK has that, and this is to be {chosen}")
    match chosen:
        case "nbd":
            return Made(_write_nbd(source, target, work))
        case "device":
            return Made(_write_to_device(source, target, work))
        case "raw":
            return write_raw(source, target, work)
    create = _described(opened.disk, create)
    if chosen == "ova":
        from nbd_vmdk.ops.ova import write_ova

        return write_ova(source, target, work, create)
    return write_image(source, target, work, {**create, "kind": chosen})


def _described(disk: Disk | None, create: dict[str, Any]) -> dict[str, Any]:
    """``create`` with what the source's descriptors tell of the disk as its guest sees it."""
    if disk is None or create.get("adapter"):
        return create
    found: dict[str, str] = {}
    for link in reversed(disk.links):  # the top link has the last word
        if link.descriptor is not None:
            found.update(link.descriptor.ddb)
    made = dict(create)
    if found.get("ddb.adapterType") in _ADAPTERS:
        made["adapter"] = found["ddb.adapterType"]
        kept = {key: value for key, value in found.items() if _KEPT.fullmatch(key)}
        made["ddb"] = kept | dict(create.get("ddb") or {})
    return made


# Sources.


@contextmanager
def _open_source(source: str, given: str | None, options: Mapping[str, Any]) -> Iterator[_Opened]:
    if given not in (None, *FORMATS):
        raise OptionError(None, why=f"{given!r} is no format of a source", hint="choose vmdk or raw")
    if _URI.match(source):
        if given == "vmdk":
            raise OptionError(source, why="an NBD export is always taken as it is")
        from nbd_vmdk.endpoints import NbdEnd  # slow to import, and libnbd may not be there

        with NbdEnd(source) as end:
            yield _Opened(end, (), (), None)
        return
    if (given or _guess(source)) == RAW:
        folder, name = LocalFolder.for_image(source, allow_devices=True)
        with closing(folder.open(name)) as storage:
            warning = storage.lock(writable=False)
            warnings = (f"{storage.name}: {warning}",) if warning else ()
            yield _Opened(StorageSource(storage), (storage,), warnings, None)
        return
    with open_disk(source, **options) as disk:
        files = tuple(storage for link in disk.links for storage in link.storages)
        yield _Opened(DiskSource(disk), files, disk.warnings, disk)


def _guess(source: str) -> str:
    """What a file or device is, as far as that may be told from its name; see the module.

    Raises NotVmdk where only the user can tell.
    """
    if _RAW_EXTENT.search(source):
        what = "the raw data of a disk, which has a descriptor"
        hint = f"name {_RAW_EXTENT.sub('.vmdk', source)} instead, or add --from raw"
        raise NotVmdk(source, what=what, hint=hint)
    if _VMDK_NAME.fullmatch(source) or os.path.isdir(source):
        return "vmdk"
    folder, name = LocalFolder.for_image(source, allow_devices=True)
    with closing(folder.open(name)) as storage:
        if storage.is_device:
            return RAW
        head = storage.read(0, min(PROBE_LENGTH, storage.size))
    kind = identify(head)
    if kind is FileKind.EMPTY:
        raise NotVmdk(source, what=kind.value)
    what, known = (kind.value, "known") if kind is not FileKind.OTHER else describe_other(head)
    if known is None:
        return RAW
    hint = "add --from raw to take its bytes as the disk's"
    if kind is not FileKind.OTHER:
        hint += ", or --from vmdk to open it as what it looks like"
    raise NotVmdk(
        source,
        what=f"its content looks like something else ({what}), and its name tells no format",
        hint=hint,
    )


# Targets.


def _target_kind(target: str, kind: str | None) -> str | None:
    """``nbd``, ``device``, ``raw``, ``ova``, a createType, or None where creating decides."""
    if _URI.match(target) or _is_device(target):
        found = "nbd" if _URI.match(target) else "device"
        if kind not in (None, RAW):
            raise OptionError(target, why="it gets the disk's bytes as they are, and no other --type")
        return found
    if kind is not None:
        return kind.lower() if kind.lower() in (RAW, "ova") else kind
    lower = target.lower()
    if lower.endswith(".ova"):
        return "ova"
    if lower.endswith(_RAW_NAMES):
        return RAW
    if lower.endswith(".vmdk"):
        return None
    raise OptionError(target, why="its name tells no format", hint="add --type raw, or a kind of VMDK")


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _refuse_itself(file: Storage, target: str) -> None:
    """Raise WriteRefused if ``target`` is a file of the source."""
    try:
        found = os.stat(target)
    except OSError:
        return
    same = (found.st_rdev,) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)
    if file.identity[: len(same)] == same:
        raise WriteRefused(target, why="it is a part of the source", hint="choose another target")


def _write_to_device(source: Source, target: str, work: Work) -> Copied:
    if not work.replace:
        why = "a device is overwritten in place, with all that is on it"
        raise WriteRefused(target, why=why, hint="add --force if you mean it")
    folder, name = LocalFolder.for_image(target, allow_devices=True)
    with closing(folder.open(name, writable=True)) as storage:
        if not storage.is_device:  # replaced since it was looked at
            raise FileMissing(target)
        storage.lock(writable=True)
        return write_device(source, storage, work)


def _write_nbd(source: Source, target: str, work: Work) -> Copied:
    from nbd_vmdk.endpoints import NbdSink

    with NbdSink(target) as sink:
        if sink.size < source.size:
            why = f"it has {sink.size} bytes, and {source.size} are needed"
            raise StorageError(target, doing="write to the export", why=why)
        grain = sink.export.minimum_block
        copied = copy(
            source,
            sink,
            grain=grain,
            zero_grain=align_up(HOLE_GRAIN, grain),
            threads=work.threads,
            progress=work.progress,
        )
        sink.flush()
        if work.verify:
            compare(source, sink, target, work)
    return copied


def _occupied(files: Iterable[str]) -> int:
    return sum(os.stat(file).st_blocks for file in files) * SECTOR  # whatever the file system's block is
