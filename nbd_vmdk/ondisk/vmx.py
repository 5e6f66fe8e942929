"""A machine's configuration (.vmx): which disks it has, in the order of its buses.

It is a dictionary in text: ``key = "value"`` lines, ``#`` comments, keys whose case does not matter.  An
``.encoding`` line says in which characters it is written: UTF-8 today, a Windows code page of the user's
language before.  A snapshot list (.vmsd, see vmsd.py) is a dictionary of the same form.

A dictionary that sets one key to two values is refused: nobody can tell which of two disks is meant.

Values can be replaced; all other bytes stay as they are.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nbd_vmdk.errors import FormatError
from nbd_vmdk.ondisk.descriptor_text import fitting_codec, shown
from nbd_vmdk.units import MIB

#: More than any dictionary has: a machine of 200 disks and as many snapshots needs a few hundred KiB.
MAX_DICTIONARY: Final = 4 * MIB
_OTHER: Final = "it is damaged, or something else under such a name: disks, *.vmdk, can be named themselves"

#: Disks of one machine; VMware's largest has 256.
MAX_DISKS: Final = 1000
#: Buses in the order in which a machine's disks are counted.
_BUSES: Final = ("scsi", "sata", "nvme", "ide")
# Numbers have no leading zeros: scsi0:0 and scsi00:0 would be two names of one place.
_NODE: Final = re.compile(r"(scsi|sata|nvme|ide)(0|[1-9]\d{0,2}):(0|[1-9]\d{0,3})")
_ENCODING: Final = re.compile(rb'^[ \t]*\.encoding[ \t]*=[ \t]*"([^"\r\n]*)"', re.IGNORECASE | re.MULTILINE)
_ASSIGNMENT: Final = re.compile(r"[ \t]*([^\s=\"#]+)[ \t]*=[ \t]*(.*)")
_BREAK: Final = re.compile(r"(\r\n|\n|\r)")
_BLANKS: Final = " \t\v\f\x1a"
#: A character that can't stand in quotes is written as its code: |22 for a quote.
_ESCAPE: Final = re.compile(r"\|([0-7][0-9A-Fa-f])")
_TO_ESCAPE: Final = re.compile(r'[\x00-\x1f"|\x7f]')
_TRUE: Final = ("true", "yes", "1")
#: Types of device whose medium is no disk of the machine's own.
_NO_DISKS: Final = ("cdrom", "passthru", "floppy")


@dataclass(frozen=True, slots=True)
class AttachedDisk:
    """A disk of a machine.

    node  where it is plugged in: ``scsi0:0`` is the first place on the first SCSI controller
    file  its top link, as the configuration names it: untrusted
    redo  a log of changes on top of that, empty if there is none (modes that can be undone have one)
    """

    node: str
    file: str
    redo: str = ""


def parse_dictionary(raw: bytes, file: str) -> dict[str, str]:
    """The values of a dictionary by their keys in lower case; FormatError names the line that is wrong."""
    if len(raw) > MAX_DICTIONARY:
        raise FormatError(
            file, why=f"longer than {MAX_DICTIONARY} bytes, as no machine's configuration is", hint=_OTHER
        )
    if b"\0" in raw:
        raise FormatError(file, why="zero bytes in what should be a text", hint=_OTHER)
    found: dict[str, str] = {}
    for number, line in enumerate(_BREAK.split(raw.decode(_codec(raw)).removeprefix("\ufeff"))[::2], 1):
        text = line.strip(_BLANKS)
        if not text or text.startswith("#"):
            continue
        match = _ASSIGNMENT.fullmatch(text)
        if match is None:
            raise FormatError(
                file, why=f'line {number} is {shown(text)}, not key = "value"', hint="mend the line by hand"
            )
        key, value = match[1].lower(), _value(match[2])
        if found.setdefault(key, value) != value:
            raise FormatError(
                file,
                why=f"line {number} sets {shown(match[1])} a second time, differently",
                hint="take the wrong one out by hand",
            )
    return found


def with_values(raw: bytes, file: str, new: Mapping[str, str]) -> bytes:
    """The dictionary with other values for keys (in lower case) that it has; every other byte stays.

    FormatError as for parse_dictionary(), and for a value that its characters can't say.
    """
    expected = {**parse_dictionary(raw, file), **new}
    codec = _codec(raw)
    pieces = _BREAK.split(raw.decode(codec))
    for index in range(0, len(pieces), 2):
        match = _ASSIGNMENT.match(pieces[index].lstrip("\ufeff" + _BLANKS).rstrip(_BLANKS))
        if match is not None and match[1].lower() in new:
            pieces[index] = _with_value(pieces[index], match[2], new[match[1].lower()])
    try:
        made = "".join(pieces).encode(codec)
        is_right = raw.decode(codec).encode(codec) == raw
    except UnicodeEncodeError as error:
        letter = error.object[error.start : error.end]
        raise FormatError(file, why=f"{shown(letter)} can't be written in its encoding, {codec}") from None
    if not is_right or parse_dictionary(made, file) != expected:
        raise FormatError(file, why="it can't be changed without changing more than was asked for")
    return made


def _with_value(line: str, old: str, new: str) -> str:
    """A line with another value; what stands behind the closing quote stays."""
    at = line.rindex(old) if old else len(line.rstrip(_BLANKS))
    end = old.rfind('"')
    behind = old[end + 1 :] if old.startswith('"') and end > 0 else ""
    quoted = '"' + _TO_ESCAPE.sub(lambda found: f"|{ord(found[0]):02X}", new) + '"'
    return line[:at] + quoted + behind + line[at + len(old) :]


def _codec(raw: bytes) -> str:
    label = _ENCODING.search(raw)
    return fitting_codec(raw, "" if label is None else label[1].decode("latin-1"))


def _value(text: str) -> str:
    if text.startswith('"'):
        end = text.rfind('"')
        # What stands behind the closing quote is a comment; a quote that is never closed ends with the line.
        text = text[1:end] if end > 0 else text[1:]
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)


def node_order(node: str) -> tuple[int, int, int] | None:
    """A key to sort nodes by: bus, controller, place on it; None for what is no node of a disk."""
    match = _NODE.fullmatch(node.lower())
    return None if match is None else (_BUSES.index(match[1]), int(match[2]), int(match[3]))


def disks_of(values: dict[str, str]) -> list[AttachedDisk]:
    """The disks that a configuration plugs in, in bus order; CD drives and empty places are none."""
    found: list[tuple[tuple[int, int, int], AttachedDisk]] = []
    for key, name in values.items():
        node, dot, what = key.partition(".")
        order = node_order(node)
        if not dot or what != "filename" or order is None or not name:
            continue
        kind = values.get(f"{node}.devicetype", "disk").lower()
        if values.get(f"{node}.present", "").lower() not in _TRUE or any(word in kind for word in _NO_DISKS):
            continue
        found.append((order, AttachedDisk(node, name, values.get(f"{node}.redo", ""))))
    return [disk for _order, disk in sorted(found, key=lambda each: each[0])]
