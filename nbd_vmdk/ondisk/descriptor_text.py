"""The text of a descriptor: its lines, where values lie in them, and how they are written.

The lower half of :mod:`nbd_vmdk.ondisk.descriptor`, which says what the lines mean.  Lines and quotes are
found in the bytes, before anything is decoded; that works because only encodings are known (see
:func:`codec_of`) in which the bytes of line ends, blanks, ``"``, ``#`` and ``=`` never mean anything else.

What a caller wants written and a descriptor can't hold is a ValueError with a sentence for the user.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from nbd_vmdk.units import MAX_OFFSET, SECTOR

#: parentCID of a link without a parent.  Never valid as a link's own content ID.
NO_PARENT: Final = 0xFFFFFFFF
#: The content ID of a disk that was never written to; products replace it, none draws it.
FRESH_CID: Final = 0xFFFFFFFE
#: Readers look for CID, parentCID and the parent's name in so many bytes (20 sectors), and no further.
EMBEDDED_LIMIT: Final = 20 * SECTOR

MAX_SECTORS: Final = MAX_OFFSET // SECTOR
ACCESS_WORDS: Final = frozenset({"RW", "RDONLY", "NOACCESS"})
EXTENT_TYPES: Final = frozenset(
    {"FLAT", "SPARSE", "ZERO", "VMFS", "VMFSSPARSE", "SESPARSE", "VMFSRDM", "VMFSRAW", "VSANSPARSE"}
)
_RAW_TYPES: Final = frozenset({"FLAT", "VMFS", "VMFSRAW"})

BOM: Final = b"\xef\xbb\xbf"
TITLE: Final = re.compile(rb"#\s*disk\s*descriptor\s*file", re.IGNORECASE)
HEX32: Final = re.compile(r"[0-9a-fA-F]{32}")
# No blanks or control characters: the key would end there.  No angle brackets: that is markup.
KEY: Final = r'[^\x00-\x20"<=>\x7f]+'

# Control-Z ended text files once, and some editors still put it there.
_BLANKS: Final = b" \t\v\f\x1a"
_LINE: Final = re.compile(rb"[^\r\n]*+(?:\r\n?|\n)|[^\r\n]+")
# With a word of access, or any word before a number: an unknown access must not pass for anything else.
_EXTENT: Final = re.compile(
    rb"(?:RW|RDONLY|NOACCESS)(?:[ \t\v\f]++(?!=)|$)|[A-Z]+[ \t\v\f]+[0-9]+[ \t\v\f]+[A-Z]", re.IGNORECASE
)
_KEY: Final = re.compile(rb"(%b)[ \t\v\f]*+=[ \t\v\f]*+" % KEY.encode())
_FILE_NAME: Final = re.compile(r'"([^"]+)"(|\s.*)', re.DOTALL)
# 2**63 bytes in sectors are 17 digits; the rest is room for leading zeros.
_DECIMAL: Final = re.compile(r"[0-9]{1,40}")
_UNWRITABLE: Final = re.compile(r'["\x00-\x1f\x7f]')

_CODECS: Final = {
    **dict.fromkeys(("utf-8", "utf8"), "utf-8"),
    **dict.fromkeys(("us-ascii", "ascii"), "ascii"),
    **dict.fromkeys(("gbk", "gb2312", "windows-936"), "gbk"),
    "gb18030": "gb18030",
    **dict.fromkeys(("big5", "windows-950"), "cp950"),
    "big5-hkscs": "big5hkscs",
    **dict.fromkeys(("shift-jis", "sjis", "windows-31j", "windows-932"), "cp932"),
    "euc-jp": "euc_jp",
    **dict.fromkeys(("euc-kr", "windows-949"), "cp949"),
    "koi8-r": "koi8_r",
    "koi8-u": "koi8_u",
    "windows-874": "cp874",
    **{f"windows-{page}": f"cp{page}" for page in range(1250, 1259)},
    **{f"iso-8859-{part}": f"iso8859_{part}" for part in (*range(1, 12), *range(13, 17))},
}


class Line(NamedTuple):
    """A line and where it is: [start, end) with its line end, [at, to) without blanks around it."""

    kind: Literal["key", "extent", "comment", "blank", "junk"]
    number: int
    start: int
    end: int
    at: int
    to: int


class Value(NamedTuple):
    """A key with its value and where that is: [start, end) inside the quotes, [first, last) with them."""

    line: Line
    key: str
    text: str
    start: int
    end: int
    first: int
    last: int


def split_lines(raw: bytes) -> Iterator[Line]:
    """All lines after a byte order mark, numbered from 1; LF, CRLF and CR end one."""
    for number, match in enumerate(_LINE.finditer(raw, len(BOM) if raw.startswith(BOM) else 0), 1):
        text = match[0].rstrip(b"\r\n" + _BLANKS)
        to = match.start() + len(text)
        at = to - len(text.lstrip(_BLANKS))
        kind: Literal["key", "extent", "comment", "blank", "junk"] = "junk"
        if at == to:
            kind = "blank"
        elif raw.startswith(b"#", at):
            kind = "comment"
        elif _EXTENT.match(raw, at, to):
            kind = "extent"
        elif _KEY.match(raw, at, to):
            kind = "key"
        yield Line(kind, number, match.start(), match.end(), at, to)


def read_value(raw: bytes, line: Line, codec: str) -> Value:
    """Key and value of a line of kind "key".

    A quoted value ends with the last quote if that ends the line, else at the next one: VirtualBox's comments
    hold quotes, and some lines have something behind them.
    """
    match = _KEY.match(raw, line.at, line.to)
    assert match
    start = first = match.end()
    end = last = line.to
    if raw.startswith(b'"', first):
        start += 1
        if last > start and raw[last - 1 : last] == b'"':
            end -= 1
        elif (close := raw.find(b'"', start, last)) >= 0:
            end, last = close, close + 1
    return Value(line, match[1].decode(codec), raw[start:end].decode(codec), start, end, first, last)


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """One extent line: ``RW 300 FLAT "disk-flat.vmdk" 0``.

    access          RW, RDONLY or NOACCESS
    sectors         guest sectors this line covers; 0 occurs (skeletons) and means nothing is there
    type            FLAT, SPARSE, ZERO ...: what the file is said to be; the file's own magic decides
    name            the file as the descriptor names it, untrusted; None for ZERO
    offset_sectors  where in that file the extent begins
    extras          what follows, such as a partition's UUID: of no use for finding data
    line            number of the line, from 1, for messages; 0 when it is in no text
    """

    access: str
    sectors: int
    type: str
    name: str | None = None
    offset_sectors: int = 0
    extras: tuple[str, ...] = ()
    line: int = 0

    @property
    def is_raw(self) -> bool:
        """Whether its file, or a part of that, is a row of guest bytes, without any tables."""
        return self.type in _RAW_TYPES

    @classmethod
    def parse(cls, text: str, line: int = 0) -> "ExtentLine":
        """Read a decoded line of kind "extent"; ValueError says what is wrong with it."""
        access, *rest = text.split(None, 3)
        if access.upper() not in ACCESS_WORDS:
            raise ValueError(f"{shown(access)} is no known access to an extent")
        if len(rest) < 2:
            raise ValueError("an extent line needs a size and a type")
        sectors, kind, tail = _sectors(rest[0]), rest[1].upper(), "".join(rest[2:])
        if kind not in EXTENT_TYPES:
            raise ValueError(f"{shown(rest[1])} is no known type of extent")
        name, offset, words = None, 0, tail.split()
        if match := _FILE_NAME.fullmatch(tail):
            name, words = match[1], match[2].split()
            if words and words[0].lower() != "partitionuuid":
                offset = _sectors(words.pop(0))
        elif kind != "ZERO":
            raise ValueError("the type must be followed by a file name in quotes, with none inside")
        if sectors + offset > MAX_SECTORS:
            raise ValueError(f"{sectors} sectors from sector {offset} on are more than a file can hold")
        return cls(access.upper(), sectors, kind, name, offset, tuple(words), line)

    def to_text(self) -> str:
        """The line as every reader takes it, without a line end; ValueError if it can't be written."""
        if self.access not in ACCESS_WORDS or self.type not in EXTENT_TYPES:
            raise ValueError(f"{self.access} and {self.type} are no access and type of an extent")
        if min(self.sectors, self.offset_sectors) < 0 or self.sectors + self.offset_sectors > MAX_SECTORS:
            raise ValueError(f"an extent of {self.sectors} sectors at {self.offset_sectors} can't be")
        if (self.name is None) != (self.type == "ZERO"):
            raise ValueError("every extent but a ZERO one names a file")
        words = [self.access, str(self.sectors), self.type]
        if self.name is not None:
            words.append(f'"{writable(self.name)}"')
            # QEMU wants the offset of a FLAT extent, and refuses one that a VMFS extent has.
            if self.type == "FLAT" or self.offset_sectors or self.extras:
                words.append(str(self.offset_sectors))
        return " ".join([*words, *map(writable, self.extras)])


def _sectors(word: str) -> int:
    if not _DECIMAL.fullmatch(word):
        raise ValueError(f"{shown(word)} is no number of sectors")
    return int(word)


def shown(text: str) -> str:
    """Untrusted ``text`` for a message: on one line, and not all of it if it is long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def writable(value: str) -> str:
    """``value`` itself, or ValueError if it is empty or quotes can't hold it; nothing is ever escaped."""
    if not value or _UNWRITABLE.search(value):
        raise ValueError(
            f"{shown(value)} can't be in a descriptor: it is empty or has quotes or control characters"
        )
    return value


def codec_of(label: str) -> str | None:
    """Python's codec for an encoding as a descriptor names it (``windows-1252``), None for one not known.

    No others: what an image names is never looked up among all codecs, where some are slow or no text at all.
    """
    folded = label.strip().lower().replace("_", "-")
    return _CODECS.get(re.sub(r"^(?:cp|ms|ibm)-?(?=[0-9])", "windows-", folded))


def fitting_codec(raw: bytes, label: str) -> str:
    """The codec that a text is in: the one that it names if that is true, else UTF-8, else a Windows one."""
    # A byte order mark was put there by an editor that saved the file as UTF-8, whatever it says inside.
    for codec in ("utf-8" if raw.startswith(BOM) else codec_of(label), "utf-8", "cp1252"):
        try:
            if codec is not None:
                raw.decode(codec)
                return codec
        except UnicodeDecodeError:
            pass
    return "latin-1"  # Has a character for every byte, so that nothing is lost.


def text_codec(raw: bytes, lines: Sequence[Line]) -> str:
    """The codec that a descriptor is in."""
    declared: dict[str, str] = {}
    for line in lines:
        if line.kind == "key":
            value = read_value(raw, line, "latin-1")
            declared.setdefault(value.key.lower(), value.text)
    return fitting_codec(raw, declared.get("encoding") or declared.get("ddb.encoding") or "")


def encode_text(text: str, codec: str) -> bytes:
    """``text`` in ``codec``; ValueError with a sentence if that has no such character."""
    try:
        return text.encode(codec)
    except UnicodeEncodeError as error:
        lost = text[error.start : error.end]
        raise ValueError(f"the descriptor is written in {codec}, which has no {shown(lost)}") from error


def build_descriptor(
    *,
    create_type: str,
    extents: Sequence[ExtentLine],
    cid: int,
    parent_cid: int = NO_PARENT,
    parent_hint: str | None = None,
    ddb: Mapping[str, str] | None = None,
    encoding: str | None = None,
    embedded: bool = False,
) -> bytes:
    """A new descriptor that VMware, QEMU and VirtualBox read alike.

    The keys of ``ddb`` are whole (``ddb.adapterType``) and written in their order.  ``encoding`` is the label
    to write, ``UTF-8`` or another that :func:`codec_of` knows; without one the text is plain ASCII, or
    UTF-8 and says so.  With ``embedded``, a text that does not fit 20 sectors is refused.  ValueError tells
    what can't be written.
    """
    if not 0 <= cid < NO_PARENT:
        raise ValueError(f"{cid:x} is no content ID of a disk")
    if not 0 <= parent_cid <= NO_PARENT or (parent_cid != NO_PARENT) != (parent_hint is not None):
        raise ValueError("a parent needs both its content ID and its name")
    if not extents or any(extent.sectors < 1 for extent in extents):
        raise ValueError("a disk needs extents, and each of them at least one sector")
    if sum(extent.sectors for extent in extents) > MAX_SECTORS:
        raise ValueError("the extents together are larger than a file can be")
    # CID stands before parentCID: QEMU takes the first place where "CID" occurs.
    body = [f"CID={cid:08x}", f"parentCID={parent_cid:08x}", f'createType="{writable(create_type)}"']
    if parent_hint is not None:
        body.append(f'parentFileNameHint="{writable(parent_hint)}"')
    # No blank line directly before an extent line: QEMU would count that extent twice.
    body += ["", "# Extent description", *(extent.to_text() for extent in extents)]
    body += ["", "# The Disk Data Base", "#DDB", ""]
    body += [_ddb_line(key, value, cid) for key, value in (ddb or {}).items()]
    if encoding is None and not all(line.isascii() for line in body):
        encoding = "UTF-8"
    head = ["# Disk DescriptorFile", "version=1"]
    if encoding is not None:
        head.append(f'encoding="{writable(encoding)}"')
    codec = codec_of(encoding or "UTF-8")
    if codec is None:
        raise ValueError(f"{shown(encoding or '')} is no encoding of descriptors")
    raw = encode_text("\n".join([*head, *body, ""]), codec)
    if embedded and len(raw) >= EMBEDDED_LIMIT:
        raise ValueError(
            f"a descriptor of {len(raw)} bytes does not fit the {EMBEDDED_LIMIT} that all readers see"
        )
    return raw


def _ddb_line(key: str, value: str, cid: int) -> str:
    if not re.fullmatch(rf"ddb\.{KEY}", key):
        raise ValueError(f"{shown(key)} is no key of the disk database")
    if key == "ddb.longContentID" and not (HEX32.fullmatch(value) and int(value[24:], 16) == cid):
        raise ValueError(f"ddb.longContentID must be 32 hex digits and end in the content ID {cid:08x}")
    # Empty values are known here: VirtualBox's ddb.comment.
    return f'{key} = "{value and writable(value)}"'


def random_cid(digits: int = 8, avoid: int | None = None) -> int:
    """A new content ID of at most ``digits`` hex digits: never 0, fffffffe, ffffffff or ``avoid``.

    QEMU writes content IDs without leading zeros, so a field to overwrite in place may be short.
    """
    if digits < 1:
        raise ValueError("a content ID needs at least one digit")
    while True:
        cid = random.randrange(1, 1 << 4 * min(digits, 8))
        if cid not in (NO_PARENT, FRESH_CID, avoid):
            return cid


def windows_to_posix(name: str) -> str:
    """``name`` with its backslashes turned into slashes."""
    return name.replace("\\", "/")


def last_component(name: str) -> str:
    """What follows the last separator of either kind, without a drive letter; empty if nothing does."""
    return re.sub(r"^[A-Za-z]:", "", name).replace("\\", "/").rstrip("/").rpartition("/")[2]


def is_absolute(name: str) -> bool:
    r"""Tell whether ``name`` starts at a root: ``/``, ``\``, ``X:\``, ``\\server`` or ``\\.\`` (a device)."""
    return name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name) is not None
