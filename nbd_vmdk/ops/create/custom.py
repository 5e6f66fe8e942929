"""The extents of a custom disk: lines as a descriptor has them, whose files are there or are to be made."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nbd_vmdk.errors import BadField, FileMissing, FormatError, OptionError, Truncated
from nbd_vmdk.look import find_owner, head_of
from nbd_vmdk.ondisk import cowd, hosted, sesparse
from nbd_vmdk.ondisk.descriptor import ExtentLine
from nbd_vmdk.ondisk.probe import FileKind, identify
from nbd_vmdk.ops.create.options import CreateOptions
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.units import SECTOR

_RAW = ("FLAT", "VMFS")
_TABLED = ("SPARSE", "VMFSSPARSE")
_MADE = (*_RAW, *_TABLED)
_NOT_MADE = {
    "SESPARSE": "the seSparse format is not public, so only a file that is there can be used",
    "VMFSRDM": "its data is on a LUN, not in a file",
    "VMFSRAW": "its data is on a device of an ESXi host",
    "VSANSPARSE": "its data is in a vSAN object, not in a file",
}


@dataclass(slots=True)
class Parts:
    """The extent lines; of which of them files must be made, by name; what was found there."""

    lines: list[ExtentLine]
    wanted: dict[str, list[ExtentLine]] = field(default_factory=dict)
    adopted: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_parts(path: str, options: CreateOptions) -> Parts:
    """Read the lines, and look at every file that is there already.

    Raises OptionError for what can't be, and what opening raises for a file that does not hold what its line
    says.
    """
    parts = Parts([_parse(number, text) for number, text in enumerate(options.extents, 1)])
    folder, main = LocalFolder.for_image(path, options.allow_dirs)
    by_name: dict[str, list[ExtentLine]] = {}
    for line in parts.lines:
        if line.name is not None:
            by_name.setdefault(line.name, []).append(line)
    for name, lines in by_name.items():
        if name == main:
            raise OptionError(path, why="an extent can't have the name of the disk's descriptor")
        if any(line.type not in _RAW for line in lines) and len(lines) > 1:
            raise OptionError(path, why=f"{len(lines)} extents name {name}, and a file with tables is one")
        try:
            storage = folder.open(name)
        except FileMissing:
            _check_new(path, name, lines)
            parts.wanted[name] = lines
            continue
        try:
            for line in lines:
                _check_there(storage, line)
        finally:
            storage.close()
        parts.adopted.append(name)
        if owner := find_owner(folder, name):
            parts.warnings.append(
                f"{name} is an extent of {owner}, too: writing to one disk changes the other"
            )
    return parts


def _parse(number: int, text: str) -> ExtentLine:
    try:
        line = ExtentLine.parse(text.strip())
        line.to_text()
    except ValueError as error:
        hint = "write it as a descriptor does: --extent 'RW 2048 FLAT \"data.img\" 0', sizes in sectors"
        raise OptionError(None, why=f"extent {number}: {error}", hint=hint) from None
    if not line.sectors:
        raise OptionError(None, why=f"extent {number} has no sectors")
    return line


def _check_new(path: str, name: str, lines: Sequence[ExtentLine]) -> None:
    kind = lines[0].type
    if kind not in _MADE:
        raise OptionError(path, why=f"{name} can't be made as {kind}: {_NOT_MADE[kind]}")
    if any(line.type in _TABLED and line.offset_sectors for line in lines):
        raise OptionError(path, why=f"{name} is a file with tables, which begins at sector 0")
    if "/" in name or name in (".", ".."):
        raise OptionError(
            path,
            why=f"{name} is not there, and files are made in the folder of the disk alone",
            hint="name it without a folder, or make it first",
        )


def _check_there(storage: Storage, line: ExtentLine) -> None:
    """Check that a file that is there holds what an extent line says of it."""
    need = (line.offset_sectors + line.sectors) * SECTOR
    if line.is_raw:
        if storage.size < need:
            raise Truncated(storage.name, what="the extent", need=need, have=storage.size)
        return
    if line.type not in (*_TABLED, "SESPARSE"):
        raise OptionError(storage.name, why=f"can't be used as {line.type}: {_NOT_MADE[line.type]}")
    capacity = _capacity(head_of(storage), storage)
    if line.sectors > capacity:
        why = f"the extent is to show {line.sectors} sectors of it"
        raise BadField(storage.name, field="capacity", value=capacity, why=why)


def _capacity(head: bytes, storage: Storage) -> int:
    match identify(head):
        case FileKind.HOSTED:
            return hosted.parse_header(head, storage.name).capacity_sectors
        case FileKind.COWD:
            return cowd.parse_header(head, storage.name).capacity_sectors
        case FileKind.SESPARSE:
            return sesparse.parse_header(head, storage.name).capacity_sectors
        case kind:
            raise FormatError(storage.name, why=f"{kind.value}, no extent with tables")
