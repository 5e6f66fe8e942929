"""Descriptors: the text that says what a link is made of.

A descriptor is a file of its own, or lies inside a hosted sparse extent.  It holds header keys
(``CID=...``), extent lines (``RW 300 FLAT "disk-flat.vmdk" 0``) and the disk database (``ddb.*`` keys).

Reading is tolerant in form: a byte order mark, any line ends, blanks anywhere, keys and words in any
case, trailing NULs.  It is strict in meaning: an access word or extent type that is not known, a line that
is neither key nor extent (above the disk database) and a number that can't be are errors, because a line
that is skipped shifts all data after it.  Unknown keys are nobody's business and are kept.

A :class:`Descriptor` holds the bytes and where each value lies in them, so that what nobody changed is
written back as it was, and a content ID can be overwritten in the file.

Format facts: VMware's Virtual Disk Format technical note, and what QEMU, VirtualBox and VMware's own
products were seen to write and to refuse.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from nbd_vmdk.errors import NEWER, BadDescriptor, NotVmdk, Unsupported
from nbd_vmdk.ondisk.descriptor_text import (
    BOM,
    EMBEDDED_LIMIT,
    FRESH_CID,
    HEX32,
    KEY,
    MAX_SECTORS,
    NO_PARENT,
    TITLE,
    ExtentLine,
    Line,
    Value,
    build_descriptor,
    encode_text,
    is_absolute,
    last_component,
    random_cid,
    read_value,
    shown,
    split_lines,
    text_codec,
    windows_to_posix,
    writable,
)

__all__ = [
    "EMBEDDED_LIMIT",
    "FRESH_CID",
    "MAX_DESCRIPTOR",
    "NO_PARENT",
    "Descriptor",
    "ExtentLine",
    "build_descriptor",
    "is_absolute",
    "last_component",
    "looks_like_descriptor",
    "random_cid",
    "windows_to_posix",
]

#: The longest text taken for a descriptor, about QEMU's limit.
MAX_DESCRIPTOR: Final = 1 << 20

# 64 TiB in extents of 2047 MiB are 32785 lines.
_MAX_LINES: Final = 1 << 16
_PROBE: Final = 8192
# 1 is plain, 2 came with Workstation's encryption, 3 with change tracking; ESXi gives plain disks 4, too.
_MAX_VERSION: Final = 4
_CTK_VERSION: Final = 3

_LINE_END: Final = re.compile(rb"\r\n?|\n")
_CTK_TITLE: Final = re.compile(rb"#\s*change tracking file", re.IGNORECASE)
_DDB_TITLE: Final = re.compile(rb"#\s*(?:ddb|the disk data ?base)", re.IGNORECASE)
_DDB_KEY: Final = re.compile(rb"ddb\.", re.IGNORECASE)
_VERSION: Final = re.compile(r"[0-9]{1,9}(?![0-9])")
_HEX: Final = re.compile(r"[0-9a-fA-F]+")

_EVIDENCE: Final = frozenset({"cid", "parentcid", "createtype"})
_ENCRYPTION: Final = ("encrypt", "keysafe", "keyid", "ddb.encrypt")
_UNQUOTED: Final = frozenset({"version", "cid", "parentcid"})


def looks_like_descriptor(data: bytes) -> bool:
    """Tell whether the file that begins with ``data`` (8 KiB are enough) is a descriptor, however odd.

    The first line that says something must be a key or an extent line; a web page that shows a
    descriptor, or a program, never gets so far.  Also True for encrypted descriptors.
    """
    head = data[:_PROBE].partition(b"\0")[0]
    first, version = True, False
    for line in split_lines(head):
        if line.kind == "extent" or (
            first and line.kind == "comment" and TITLE.match(head, line.at, line.to)
        ):
            return True
        if line.kind == "junk":
            return version and line.end == _PROBE  # A line that was cut off is odd for no fault of its own.
        if line.kind != "key":
            continue
        value = read_value(head, line, "latin-1")
        key = value.key.lower()
        if first and key.startswith("."):
            return False  # A .vmx or .vmsd file: ".encoding" comes first.
        if key in _EVIDENCE or key.startswith(_ENCRYPTION):
            return True
        # Many texts have a version; a descriptor begins with it and has nothing strange after it.
        version = version or (first and key == "version" and value.text[:1].isdigit())
        first = False
    return version


@dataclass(frozen=True, slots=True, eq=False)
class Descriptor:
    """A descriptor that was read.  It never changes: what edits it returns another one.

    file        where it came from, for messages
    encoding    Python's name of the codec that it is written in
    version     1 plain, 2 encryption came in, 3 change tracking, 4 newer ESXi
    cid         content ID, None if the text has none; ffffffff, though never valid, is left to the caller
    parent_cid  content ID that the parent must have, None if the text has none
    extents     the extent lines in guest order; none at all is left to the caller, too
    ddb         the disk database; keys whole and as written (``ddb.adapterType``), values without quotes
    """

    file: str
    encoding: str
    version: int
    cid: int | None
    parent_cid: int | None
    extents: tuple[ExtentLine, ...]
    ddb: Mapping[str, str]
    _raw: bytes = field(repr=False)
    _values: Mapping[str, Value] = field(repr=False)

    @classmethod
    def parse(cls, data: bytes, file: str) -> "Descriptor":
        """The descriptor at the start of ``data``, up to the first NUL; ``file`` is for messages.

        Raises NotVmdk (no descriptor, or longer than any), BadDescriptor (a line that can't be
        understood) or Unsupported (a version that nobody has seen).
        """
        raw = bytes(data).partition(b"\0")[0]
        if len(raw) > MAX_DESCRIPTOR:
            raise NotVmdk(file, what=f"a text of more than {MAX_DESCRIPTOR} bytes is no disk descriptor")
        if not looks_like_descriptor(raw):
            raise NotVmdk(file, what="not a disk descriptor")
        lines = _checked(raw, file)
        codec = text_codec(raw, lines)
        values: dict[str, Value] = {}
        for line in lines:
            if line.kind == "key":
                value = read_value(raw, line, codec)
                values.setdefault(value.key.lower(), value)  # All readers take the first of several.
        made = cls(
            file=file,
            encoding=codec,
            version=_version(values.get("version"), file),
            cid=_content_id(values.get("cid"), file),
            parent_cid=_content_id(values.get("parentcid"), file),
            extents=_extents(raw, lines, codec, file),
            ddb=MappingProxyType(
                {v.key: v.text for folded, v in values.items() if folded.startswith("ddb.")}
            ),
            _raw=raw,
            _values=values,
        )
        for key in ("parentfilenamehint", "changetrackpath"):
            if '"' in (made.get(key) or ""):
                raise BadDescriptor(
                    file, line=values[key].line.number, why="a file name can't contain quotes"
                )
        if not (made.extents or made.cid is not None or made.create_type or made.encrypted):
            raise BadDescriptor(file, line=1, why="no CID, createType or extent line follows")
        return made

    def get(self, key: str, default: str | None = None) -> str | None:
        """The value of a header or ``ddb.`` key, in whatever case either is written."""
        value = self._values.get(key.lower())
        return default if value is None else value.text

    @property
    def total_sectors(self) -> int:
        """The size of the disk: what all extent lines cover, in sectors."""
        return sum(extent.sectors for extent in self.extents)

    def may_stand_on(self, parent: "Descriptor") -> bool:
        """Whether ``parent`` looks like the parent of this link, for who is not led there by its name.

        It has the content ID that this link expects; and as all fresh disks have the same one, the size, too.
        """
        if not self.has_parent or self.parent_cid != parent.cid:
            return False
        return parent.cid != FRESH_CID or parent.total_sectors == self.total_sectors

    @property
    def has_parent(self) -> bool:
        """Whether this is a child link."""
        return self.parent_cid not in (None, NO_PARENT)

    @property
    def create_type(self) -> str | None:
        """What kind of disk this was made as: a hint only, the extents decide."""
        return self.get("createType") or None

    @property
    def parent_hint(self) -> str | None:
        """Where the parent was when this link was made: a path with either slash, untrusted."""
        return self.get("parentFileNameHint") or None

    @property
    def change_track_path(self) -> str | None:
        """The change-tracking file, which writing would turn into a lie."""
        return self.get("changeTrackPath") or None

    @property
    def native_snapshot(self) -> bool:
        """Whether the storage array made this snapshot, and alone can resolve it."""
        return (self.get("isNativeSnapshot") or "").lower() in ("yes", "true", "1")

    @property
    def encrypted(self) -> bool:
        """Whether the data is encrypted.  Version 2 alone does not say so."""
        filters = self.get("ddb.iofilters") or ""
        return "vmcrypt" in filters.lower() or any(key.startswith(_ENCRYPTION) for key in self._values)

    @property
    def long_content_id(self) -> str | None:
        """The content ID in 32 digits, as written; the last 8 of them should be :attr:`cid`."""
        return self.get("ddb.longContentID") or None

    @property
    def cid_digits(self) -> int:
        """How many digits the CID field has (QEMU writes no leading zeros); 0 if there is none."""
        return len(self.get("CID") or "")

    def cid_patches(self, new_cid: int) -> list[tuple[int, bytes]]:
        """What to overwrite, from which byte of the parsed data on, to change the content ID in place.

        No length changes.  Raises ValueError if ``new_cid`` needs more digits than are there.
        """
        digits = f"{new_cid:0{self.cid_digits}x}".encode()
        if not 0 <= new_cid <= NO_PARENT or len(digits) > self.cid_digits:
            raise ValueError(f"content ID {new_cid:x} does not fit a field of {self.cid_digits} digits")
        patches = [(self._values["cid"].start, digits)]
        if HEX32.fullmatch(self.long_content_id or ""):
            patches.append((self._values["ddb.longcontentid"].end - 8, b"%08x" % new_cid))
        return patches

    def to_bytes(self) -> bytes:
        """The text as it is stored, byte order mark and all."""
        return self._raw

    def set(self, key: str, value: str) -> "Descriptor":
        """Give a header or ``ddb.`` key a value: on its line in its style, or on a new line where it belongs.

        Raises ValueError if it can't be written, or would change the encoding that all the text is in, and
        BadDescriptor if it is not what this key can have.
        """
        if value:
            writable(value)
        folded = key.lower()
        if folded in ("encoding", "ddb.encoding"):
            raise ValueError("the encoding of a descriptor can't be changed by a key alone")
        old = self._values.get(folded)
        if old is not None:
            quoted = old.first < old.start or value != value.strip()
            return self._splice([(old.first, old.last, f'"{value}"' if quoted else value)])
        if not re.fullmatch(KEY, key) or key.startswith("#"):
            raise ValueError(f"{shown(key)} is no key of a descriptor")
        in_ddb = folded.startswith("ddb.")
        between = " = " if in_ddb else "="
        for name, peer in self._values.items():
            if name.startswith("ddb.") == in_ddb:
                between = self._raw[peer.line.at : peer.first].decode(self.encoding)[len(peer.key) :]
        at, title = self._end_of_ddb() if in_ddb else (self._end_of_header(folded), "")
        text = value if folded in _UNQUOTED else f'"{value}"'
        return self._splice([(at, at, f"{title}{key}{between}{text}{self._line_end}")])

    def remove(self, key: str) -> "Descriptor":
        """Take away every line of a key; nothing happens if there is none."""
        return self._without(self._starts_of(key))

    def set_extent_name(self, index: int, name: str) -> "Descriptor":
        """Rename the file of one extent; ValueError if it names none, or ``name`` can't be written."""
        if self.extents[index].name is None:
            raise ValueError("this extent has no file")
        line = [line for line in _checked(self._raw, self.file) if line.kind == "extent"][index]
        first = self._raw.index(b'"', line.at) + 1
        return self._splice([(first, self._raw.index(b'"', first), writable(name))])

    def replace_extents(self, extents: Sequence[ExtentLine]) -> "Descriptor":
        """Put other extents in the place of those that are there.  ValueError if one can't be written."""
        new = "".join(extent.to_text() + self._line_end for extent in extents)
        old = [line for line in _checked(self._raw, self.file) if line.kind == "extent"]
        if not old:
            at = self._end_of_header("")
            return self._splice([(at, at, f"# Extent description{self._line_end}{new}")])
        return self._splice(
            [(old[0].start, old[0].end, new), *((line.start, line.end, "") for line in old[1:])]
        )

    def without_ctk(self) -> "Descriptor":
        """The same without change tracking: its lines are gone and version 3 is 1.  Never a longer text."""
        titles = [
            line.start
            for line in _checked(self._raw, self.file)
            if line.kind == "comment" and _CTK_TITLE.match(self._raw, line.at, line.to)
        ]
        plain = self._without([*titles, *self._starts_of("changeTrackPath")])
        return plain.set("version", "1") if self.version == _CTK_VERSION else plain

    def _starts_of(self, key: str) -> list[int]:
        """Where the lines of a key start."""
        return [
            line.start
            for line in _checked(self._raw, self.file)
            if line.kind == "key" and read_value(self._raw, line, self.encoding).key.lower() == key.lower()
        ]

    def _end_of_header(self, key: str) -> int:
        """Where a new header line belongs: after the title, and the header lines above extents and ddb.

        ``version`` is first, and ``CID`` before ``parentCID``: QEMU takes the first place where "CID" occurs.
        """
        at = len(BOM) if self._raw.startswith(BOM) else 0
        before_parent = self._starts_of("parentCID")[:1]
        for line in _checked(self._raw, self.file):
            is_header = line.kind == "key" and not _DDB_KEY.match(self._raw, line.at)
            if is_header and (key == "version" or (key == "cid" and line.start in before_parent)):
                return line.start
            if is_header or (line.kind == "comment" and line.number == 1):
                at = line.end
            elif line.kind != "comment":
                break
        return at

    def _end_of_ddb(self) -> tuple[int, str]:
        """Where a new line of the disk database belongs, and the title to put before it if there is none."""
        lines = _checked(self._raw, self.file)
        titles = [
            line for line in lines if line.kind == "comment" and _DDB_TITLE.match(self._raw, line.at, line.to)
        ]
        keys = [line for line in lines if line.kind == "key" and _DDB_KEY.match(self._raw, line.at)]
        if keys or titles:
            return (keys or titles)[-1].end, ""
        return lines[-1].end, self._line_end.join(("", "# The Disk Data Base", "#DDB", "", ""))

    @property
    def _line_end(self) -> str:
        match = _LINE_END.search(self._raw)
        return match[0].decode() if match else "\n"

    def _splice(self, edits: Sequence[tuple[int, int, str]]) -> "Descriptor":
        """Replace the bytes [start, end) by a text, for each of ``edits``, which are in order."""
        pieces, done = [], 0
        for start, end, text in edits:
            before = self._raw[done:start]
            pieces.append(before)
            if start == end and before and before != BOM and not before.endswith((b"\n", b"\r")):
                pieces.append(self._line_end.encode())  # A new line comes after one that has no end.
            pieces.append(encode_text(text, self.encoding))
            done = end
        made = Descriptor.parse(b"".join([*pieces, self._raw[done:]]), self.file)
        if made.encoding != self.encoding and not made.to_bytes().isascii():
            raise ValueError(
                f"the descriptor does not tell its encoding, and would be taken for {made.encoding}"
            )
        return made

    def _without(self, doomed: Sequence[int]) -> "Descriptor":
        """Take away the lines that start there, and a blank line that would then be one too many."""
        starts = frozenset(doomed)
        kept: list[Line] = []
        cut = False
        for line in split_lines(self._raw):
            if line.start in starts:
                cut = True
                continue
            if cut and line.kind == "blank" and (not kept or kept[-1].kind == "blank"):
                cut = False
                continue
            while cut and line.kind == "extent" and kept and kept[-1].kind == "blank":
                kept.pop()  # QEMU counts an extent twice that comes right after a blank line.
            cut = False
            kept.append(line)
        text = b"".join(self._raw[line.start : line.end] for line in kept)
        mark = BOM if self._raw.startswith(BOM) else b""
        return Descriptor.parse(mark + text, self.file) if starts else self


def _checked(raw: bytes, file: str) -> list[Line]:
    """All lines but the blank ones, up to a second descriptor if there is one.

    Raises BadDescriptor for a line that is neither key nor extent.  After the disk database began, or if
    there is encryption, such a line is passed over.
    """
    found: list[Line] = []
    junk = None
    extents = in_ddb = encrypted = False
    for line in split_lines(raw):
        if line.number > _MAX_LINES:
            raise BadDescriptor(file, line=line.number, why="no descriptor has so many lines")
        if line.kind == "junk":
            junk = junk or (None if in_ddb else line)
        elif line.kind == "comment":
            if extents and TITLE.match(raw, line.at, line.to):
                break  # Some image builders append another descriptor; only the first counts.
            in_ddb = in_ddb or _DDB_TITLE.match(raw, line.at, line.to) is not None
        elif line.kind == "key":
            in_ddb = in_ddb or _DDB_KEY.match(raw, line.at) is not None
            encrypted = encrypted or read_value(raw, line, "latin-1").key.lower().startswith(_ENCRYPTION)
        extents = extents or line.kind == "extent"
        if line.kind not in ("blank", "junk"):
            found.append(line)
    if junk and not encrypted:
        raise BadDescriptor(file, line=junk.number, why="neither a comment, a key with a value nor an extent")
    return found


def _version(value: Value | None, file: str) -> int:
    """The version, 1 if the text does not say.  What follows the digit is of no interest to any reader."""
    if value is None:
        return 1
    match = _VERSION.match(value.text)
    if not match or int(match[0]) < 1:
        raise BadDescriptor(file, line=value.line.number, why=f"{shown(value.text)} is no version")
    if int(match[0]) > _MAX_VERSION:
        raise Unsupported(file, what=f"a descriptor of version {match[0]}", hint=NEWER)
    return int(match[0])


def _content_id(value: Value | None, file: str) -> int | None:
    if value is None:
        return None
    if not _HEX.fullmatch(value.text) or int(value.text, 16) > NO_PARENT:
        why = f"{value.key} is {shown(value.text)}, and should be up to 8 hex digits"
        raise BadDescriptor(file, line=value.line.number, why=why)
    return int(value.text, 16)


def _extents(raw: bytes, lines: Sequence[Line], codec: str, file: str) -> tuple[ExtentLine, ...]:
    found, total = [], 0
    for line in lines:
        if line.kind != "extent":
            continue
        try:
            extent = ExtentLine.parse(raw[line.at : line.to].decode(codec), line.number)
        except ValueError as error:
            raise BadDescriptor(file, line=line.number, why=str(error)) from None
        total += extent.sectors
        if total > MAX_SECTORS:
            raise BadDescriptor(
                file, line=line.number, why="the extents together are more than a disk can hold"
            )
        found.append(extent)
    return tuple(found)
