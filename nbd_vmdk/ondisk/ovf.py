"""The envelope of an appliance (.ovf): which of its files are disks, and in which order a machine has them.

Three lists refer to each other: References (files, with how each is stored), DiskSection (disks, each in a
file) and a VirtualHardwareSection for each machine (devices, which name disks).  Namespaces and prefixes
differ between versions and makers, so elements are known by their local names.  Source: the OVF
specification (DMTF DSP0243), envelopes 0.9 to 2.

The XML is untrusted.  Expat parses it; a document type is refused, and with it entities and all that they can
do; the document's length, depth and number of elements are bounded.
"""

import re
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

from nbd_vmdk.errors import FormatError
from nbd_vmdk.ondisk.descriptor_text import codec_of, shown
from nbd_vmdk.units import MIB

#: An envelope of a hundred machines, with their licences in twenty languages, stays below this.
MAX_ENVELOPE: Final = 8 * MIB
_NO_OVF: Final = "get the appliance again, or name one of its disks, a .vmdk, itself"
_MAX_ELEMENTS: Final = 200_000
_MAX_DEPTH: Final = 64
_MAX_DISKS: Final = 1000

_DECLARATION: Final = re.compile(rb"""<\?xml[^>]{0,200}?\bencoding\s*=\s*["']([\w.:-]{1,40})["']""")
_MARKS: Final = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_HOST_RESOURCE: Final = re.compile(r"(?:ovf:)?/*(disk|file)/(.+)")
_UNITS: Final = re.compile(r"bytes?\s*\*\s*(\d{1,4})\s*\^\s*(\d{1,2})")
_OLD_UNITS: Final = {"byte": 1, "bytes": 1, "kilobytes": 1 << 10, "megabytes": 1 << 20, "gigabytes": 1 << 30}
#: CIM's number of a disk drive among the types of devices.
_DISK_DRIVE: Final = "17"


@dataclass(frozen=True, slots=True)
class PackageDisk:
    """A disk of an appliance.

    id          its name in the envelope, empty for a file that no disk refers to
    href        its file, relative to the envelope: untrusted
    capacity    the disk's size in bytes, None if it is not told as a number
    """

    id: str
    href: str
    capacity: int | None = None


@dataclass(slots=True)
class _Content:
    """What the document says that matters here, in its order."""

    files: dict[str, str] = field(default_factory=dict)
    disks: dict[str, dict[str, str]] = field(default_factory=dict)
    resources: list[tuple[str, str]] = field(default_factory=list)


class _Refused(Exception):
    """What is wrong with the document."""


def parse_envelope(raw: bytes, file: str) -> list[PackageDisk]:
    """The disks of an appliance that have files: in the order of its hardware, then those that it leaves out.

    A disk on which another one stands (a delta's parent) is listed only if the hardware names it.  An
    envelope without disks gives its files that are called .vmdk.  Raises FormatError.
    """
    if len(raw) > MAX_ENVELOPE:
        raise FormatError(file, why=f"an envelope of {len(raw)} bytes, which none needs", hint=_NO_OVF)
    parser = _Parser()
    try:
        parser.parse(_decode(raw))
        return _disks(parser.content)
    except _Refused as error:
        raise FormatError(file, why=str(error), hint=_NO_OVF) from None


def _decode(raw: bytes) -> bytes:
    """The document in UTF-8, whatever it was in; only encodings of descriptors, and UTF-16, are known."""
    codec: str | None = next((codec for mark, codec in _MARKS if raw.startswith(mark)), None)
    if codec is None:
        match = _DECLARATION.match(raw.lstrip())
        label = "utf-8" if match is None else match[1].decode("latin-1")
        codec = codec_of(label)
        if codec is None:
            raise _Refused(f"it is written in {shown(label)}, which is not known")
    try:
        return raw.decode(codec).removeprefix("\ufeff").encode()
    except UnicodeError:
        raise _Refused(f"it is not in {codec}, as it says") from None


class _Parser:
    """Walks through a document and keeps what matters."""

    def __init__(self) -> None:
        self.content = _Content()
        self._open: list[str] = []
        self._count = 0
        self._item: dict[str, str] | None = None
        self._text: list[str] = []

    def parse(self, document: bytes) -> None:
        parser = expat.ParserCreate("utf-8", " ")
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text.append
        try:
            parser.Parse(document, True)
        except expat.ExpatError as error:
            raise _Refused(f"line {error.lineno} is no XML: {expat.ErrorString(error.code)}") from None

    def _doctype(self, *_: object) -> None:
        raise _Refused("it has a document type, which no appliance needs and which may do harm")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > _MAX_ELEMENTS or len(self._open) >= _MAX_DEPTH:
            raise _Refused("far too many elements, or elements far too deep")
        name = _local(tag)
        if not self._open and name != "Envelope":
            raise _Refused(f"not an OVF: its outermost element is {shown(name)}")
        self._open.append(name)
        self._text.clear()
        if name == "File":
            self._add_file(_attributes(attributes))
        elif name == "Disk":
            self._add_disk(_attributes(attributes))
        elif name in ("Item", "StorageItem"):
            self._item = {}

    def _end(self, _tag: str) -> None:
        name = self._open.pop()
        if self._item is not None and name in ("HostResource", "ResourceType"):
            self._item.setdefault(name, "".join(self._text).strip())
        elif name in ("Item", "StorageItem"):
            self._add_item(self._item or {})
            self._item = None
        self._text.clear()

    def _add_file(self, said: dict[str, str]) -> None:
        identity, href = said.get("id"), said.get("href")
        if identity and href and self.content.files.setdefault(identity, href) != href:
            raise _Refused(f"two files with the id {shown(identity)}")

    def _add_disk(self, said: dict[str, str]) -> None:
        identity = said.get("diskId")
        if identity and self.content.disks.setdefault(identity, said) != said:
            raise _Refused(f"two disks with the id {shown(identity)}")

    def _add_item(self, item: dict[str, str]) -> None:
        match = _HOST_RESOURCE.fullmatch(item.get("HostResource", ""))
        if match and (match[1] == "disk" or item.get("ResourceType") == _DISK_DRIVE):
            self.content.resources.append((match[1], match[2]))


def _local(name: str) -> str:
    return name.rpartition(" ")[2]


def _attributes(given: dict[str, str]) -> dict[str, str]:
    """By their local names; those of OVF's own namespace, or of none."""
    plain = {name: value for name, value in given.items() if " " not in name}
    own = {_local(name): value for name, value in given.items() if " " in name and "/ovf/" in name}
    return plain | own


def _disks(content: _Content) -> list[PackageDisk]:
    chosen: list[PackageDisk] = []
    for kind, identity in content.resources:
        if kind == "disk":
            chosen += _disk(content, identity)
        elif identity in content.files:
            chosen.append(PackageDisk(identity, content.files[identity]))
        else:
            raise _Refused(f"its hardware names a file {shown(identity)} that it does not list")
    parents = {said["parentRef"] for said in content.disks.values() if "parentRef" in said}
    for identity in content.disks:
        if identity not in parents:
            chosen += _disk(content, identity)
    if not content.disks and not chosen:
        named = [href for href in content.files.values() if re.search(r"\.vmdk(\.gz)?$", href, re.IGNORECASE)]
        chosen = [PackageDisk("", href) for href in named]
    unique: dict[str, PackageDisk] = {}
    for disk in chosen:
        unique.setdefault(disk.href, disk)
    if len(unique) > _MAX_DISKS:
        raise _Refused(f"{len(unique)} disks are more than any appliance has")
    return list(unique.values())


def _disk(content: _Content, identity: str) -> list[PackageDisk]:
    """The disk of that id, if it has a file: a blank one is made when the appliance is deployed."""
    said = content.disks.get(identity)
    if said is None:
        raise _Refused(f"its hardware names a disk {shown(identity)} that it does not list")
    reference = said.get("fileRef")
    if not reference:
        return []
    if reference not in content.files:
        raise _Refused(f"disk {shown(identity)} is in a file {shown(reference)} that is not listed")
    return [PackageDisk(identity, content.files[reference], _capacity(said))]


def _capacity(said: dict[str, str]) -> int | None:
    """In bytes; None where it is a property to be filled in, or in units that are not known."""
    number, units = said.get("capacity", ""), said.get("capacityAllocationUnits", "byte").strip().lower()
    if not re.fullmatch(r"[0-9]{1,19}", number):
        return None
    match = _UNITS.fullmatch(units)
    factor = int(match[1]) ** int(match[2]) if match else _OLD_UNITS.get(units)
    return None if factor is None else int(number) * factor
