"""Copying a disk from anything that is one to anything that can be one.

What a source is, nobody may decide but the user, see formats.py: a raw disk's first bytes are its guest's.  A
device is opened as a VMDK only on the user's word, and an NBD export never.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nbd_vmdk.chain import find_child
from nbd_vmdk.converting.targets import IN_PLACE, is_uri, open_place, target_kind
from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import FileExists, NotVmdk, OptionError, VmdkError, WriteRefused
from nbd_vmdk.look import read_descriptor
from nbd_vmdk.ondisk.probe import FileKind
from nbd_vmdk.opening import open_disk
from nbd_vmdk.ops.convert import Made, Work, known_cid, overwrite, refuse_itself, write_image, write_raw
from nbd_vmdk.ops.copy import Source
from nbd_vmdk.ops.formats import RAW, VMDK, guess_format
from nbd_vmdk.ops.sides import DiskSource, StorageSource
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.units import SECTOR

if TYPE_CHECKING:
    from nbd_vmdk.ops.linkset.replaced import Replaced

#: What a user may say a source is.
FORMATS: Final = (VMDK, RAW)
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
    data      bytes of it that were written as data; the rest is zeros, or was there before
    shared    bytes of those that were not written: they are in blocks that the source has as well
    occupied  bytes that the target's files really occupy, None where it is no file, or is gone already
    verified  it was read back and compared with its source
    notes     what was chosen for a new VMDK, and why
    warnings  what was odd but harmless
    """

    target: str
    kind: str
    size: int
    data: int
    shared: int
    occupied: int | None
    verified: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """For ``--json``."""
        return asdict(self)


class _Opened(NamedTuple):
    """An open source: its bytes, whose they are, and what of its descriptor is worth keeping.

    ``cids_hold`` says that the content IDs of its chain tell what is in it.
    """

    source: Source
    files: tuple[Storage, ...]
    warnings: tuple[str, ...]
    disk: Disk | None
    cids_hold: bool = False


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    kind: str | None = None,
    source_format: str | None = None,
    create: Mapping[str, Any] | None = None,
    work: Work | None = None,
    since: str | int | None = None,
    base: str | os.PathLike[str] | None = None,
    onto: bool = False,
    **options: Any,
) -> Converted:
    """Copy the disk ``source`` to ``target``, which is made new.

    Either is a path or an NBD URI; a target may be a block device.  ``kind`` is that of the target: a
    createType, ``raw`` or ``ova``; None takes what its name says.  ``source_format`` says what the source is,
    ``vmdk`` or ``raw`` (see the module).  ``create`` are more fields of CreateOptions, ``options`` those of
    OpenOptions.  Raises VmdkError; then the target is as it was, unless it is a device or an export.

    With ``since``, a link of the source's chain by name or depth, only what may differ from it is copied: to
    a new VMDK that is a child of ``base``, which holds that link's disk; or ``onto`` a raw file, device or
    export that holds it.  See ops/increment.py.
    """
    wanted, here = os.fspath(target), os.fspath(source)
    work = work or Work()
    chosen = target_kind(wanted, kind)
    fields = dict(create or {})
    if chosen in (RAW, *IN_PLACE) and fields:
        names = ", ".join(sorted(fields))
        raise OptionError(wanted, why=f"{names}: only a VMDK has that, and this is to be {chosen}")
    if work.share and fields.get("preallocation") not in (None, "off"):
        why = "--preallocation takes space for this image alone, and --reflink shares that of another"
        raise OptionError(wanted, why=why)
    earlier = _earlier(since, base, onto=onto, target=wanted, kind=chosen)
    with _open_source(here, source_format, options) as opened:
        refuse_itself(opened.files, wanted)
        replaced: Replaced | None = None
        if work.replace and chosen not in IN_PLACE and os.path.lexists(wanted):
            from nbd_vmdk.ops.linkset import replaced as old_image  # seldom needed, and slow to import

            _keep_parents(wanted)
            replaced = old_image.Replaced.look(wanted, opened.files)
        try:
            if earlier is None:
                made = _write(opened, wanted, chosen, work, fields)
            else:
                allowed = tuple(options.get("allow_dirs", ()))
                made = _write_since(opened, earlier, wanted, chosen, work, fields, allowed)
        except FileExists as error:
            error.hint = "choose another name, or add --force to replace it"
            raise
        except VmdkError as error:
            if opened.disk is not None:
                opened.disk.advise(error)
            raise
    created = made.created
    is_vmdk = created is not None and chosen != "ova"
    size = opened.source.size if created is None else created.size
    notes = () if created is None else created.notes
    if size != opened.source.size:
        notes += (f"the size is rounded up to whole sectors: {size} bytes",)
    warnings = opened.warnings + (() if created is None else created.warnings)
    if replaced is not None:
        if gone := replaced.remove(made.files):
            notes += (f"removed with the image that was replaced: {', '.join(map(os.path.basename, gone))}",)
        warnings += tuple(replaced.warnings)
    return Converted(
        target=wanted,
        kind=created.create_type if created is not None and is_vmdk else chosen or "vmdk",
        size=size,
        data=made.copied.data,
        shared=made.copied.shared,
        occupied=_occupied(made.files) if made.files else None,
        verified=work.verify,
        notes=notes,
        warnings=warnings,
    )


def _keep_parents(target: str) -> None:
    """Refuse to replace a link that others stand on: their grains mean nothing over another disk."""
    folder, name = LocalFolder.for_image(target)
    there = read_descriptor(folder, name)
    if there is None or there.cid is None:
        return
    child = find_child(folder, name, there.cid)
    if child is not None:
        raise WriteRefused(
            target,
            why=f"it is the parent of {child}, which replacing it would make invalid",
            hint="choose another name, or delete the child first",
        )


def _write(opened: _Opened, target: str, chosen: str | None, work: Work, create: dict[str, Any]) -> Made:
    source = opened.source
    match chosen:
        case "nbd" | "device":
            with open_place(target, chosen, work) as place:
                return Made(overwrite(source, place, work))
        case "raw":
            return write_raw(source, target, work)
    create = _described(opened.disk, create)
    if chosen == "ova":
        from nbd_vmdk.ops.ova import write_ova

        return write_ova(source, target, work, create)
    # What has the same content has the same content ID: increments know their base by that.
    cid = known_cid(opened.disk.links[0]) if opened.disk is not None and opened.cids_hold else None
    return write_image(source, target, work, {**create, "kind": chosen}, cid=cid)


class _Earlier(NamedTuple):
    """An earlier state of the source, and the copy of it that is there: ``base``, or the target itself."""

    link: str | int
    base: str | None


def _earlier(
    since: str | int | None,
    base: str | os.PathLike[str] | None,
    *,
    onto: bool,
    target: str,
    kind: str | None,
) -> _Earlier | None:
    """What an incremental copy begins with, None for a full one; OptionError for what makes no sense."""
    if since is None:
        if base is not None or onto:
            given = "--onto" if base is None else "--base"
            raise OptionError(None, why=f"{given} needs --since: the snapshot that the copy holds already")
        return None
    in_place = kind in (RAW, *IN_PLACE)
    if onto and base is None and in_place:
        return _Earlier(since, None)
    if base is not None and not onto and not in_place and kind != "ova":
        return _Earlier(since, os.fspath(base))
    if in_place:
        hint = "add --onto, and no --base, to write the changes over it, which holds the snapshot's state now"
    else:
        hint = "add --base, and no --onto, with the full copy or the increment before, to make its child"
    if kind == "ova":
        hint = "make it a VMDK"
    raise OptionError(target, why="it can't be made an incremental copy like this", hint=hint)


def _write_since(
    opened: _Opened,
    earlier: _Earlier,
    target: str,
    kind: str | None,
    work: Work,
    create: dict[str, Any],
    allow_dirs: tuple[str | os.PathLike[str], ...],
) -> Made:
    from nbd_vmdk.ops.increment import update, write_increment
    from nbd_vmdk.ops.since import find_link

    disk = opened.disk
    if disk is None:
        raise OptionError(None, why="--since is for a VMDK: nothing else has snapshots")
    depth = find_link(disk, earlier.link)
    if depth == 0:
        why = f"{disk.links[0].name} is the disk itself, and no earlier state of it"
        raise OptionError(None, why=why, hint="name one of the links below it")
    if earlier.base is not None:
        fields = {**create, "kind": kind}
        return write_increment(
            disk,
            depth,
            target,
            earlier.base,
            work,
            fields,
            cids_hold=opened.cids_hold,
            allow_dirs=allow_dirs,
        )
    assert kind is not None
    with open_place(target, kind, work, onto=True) as place:
        copied = update(disk, depth, place, work)
    return Made(copied, (target,) if kind == RAW else ())


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
    if is_uri(source):
        if given == VMDK:
            raise OptionError(source, why="an NBD export is always taken as it is")
        _refuse_options(source, options)
        from nbd_vmdk.converting.endpoints import NbdEnd  # slow to import, and libnbd may not be there

        with NbdEnd(source) as end:
            yield _Opened(end, (), (), None)
        return
    if (given or guess_format(source, raw_option="--from raw", vmdk_option="--from vmdk")) == RAW:
        _refuse_options(source, options)
        folder, name = LocalFolder.for_image(source, allow_devices=True)
        with closing(folder.open(name)) as storage:
            if not storage.size:
                raise NotVmdk(source, what=FileKind.EMPTY.value)
            warning = storage.lock(writable=False)
            warnings = (f"{storage.name}: {warning}",) if warning else ()
            yield _Opened(StorageSource(storage), (storage,), warnings, None)
        return
    with open_disk(source, **options) as disk:
        files = tuple(storage for link in disk.links for storage in link.storages)
        yield _Opened(DiskSource(disk), files, disk.warnings, disk, _cids_hold(disk, options))


def _refuse_options(source: str, options: Mapping[str, Any]) -> None:
    """What says how a VMDK is to be opened means nothing for a row of bytes."""
    given = [name for name in ("parent", "allow_dirs", "ignore_cid", "salvage") if options.get(name)]
    if given:
        option = "--" + given[0].replace("_", "-").removesuffix("s")
        raise OptionError(source, why=f"{option} is for a VMDK, and this is taken as raw bytes")


def _cids_hold(disk: Disk, options: Mapping[str, Any]) -> bool:
    """Whether nobody went on where they did not agree, and nothing was made a parent that is none."""
    if options.get("ignore_cid") or options.get("salvage"):
        return False
    return all(link.descriptor is not None and link.descriptor.has_parent for link in disk.links[:-1])


def _occupied(files: Iterable[str]) -> int | None:
    """Bytes that the files made occupy; None if somebody has taken one of them away already."""
    try:
        return sum(os.stat(file).st_blocks for file in files) * SECTOR  # whatever the file system's block is
    except OSError:
        return None
