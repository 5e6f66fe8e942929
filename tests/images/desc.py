"""
Descriptor texts, and whole images of every kind put together from them and the extents' builders.

Each image helper writes into a folder, takes the guest's content, and returns an Image. With `parent` the
image is a child: parentCID and parentFileNameHint are filled in, and what it shows is its content over the
parent's. `text` overrides arguments of descriptor(); further options go to the extents' builder.
"""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.images.content import SECTOR, Content
from tests.images.cowd import CowdExtent, write_cowd
from tests.images.hosted import Header, HostedExtent, write_hosted
from tests.images.sesparse import SeSparseExtent, write_sesparse
from tests.images.stream import StreamExtent, write_stream

NO_PARENT = "ffffffff"
CODECS = {"UTF-8": "utf-8", "windows-1252": "cp1252", "GBK": "gbk", "Big5": "cp950", "Shift_JIS": "cp932"}

ExtentLine = str | tuple[str, int, str] | tuple[str, int, str, str] | tuple[str, int, str, str, int]
Extent = HostedExtent | StreamExtent | CowdExtent | SeSparseExtent | str  # str: the path of a flat file


def extent_line(line: ExtentLine) -> str:
    """ACCESS SECTORS TYPE "NAME" OFFSET, the last two as far as they are given."""
    if isinstance(line, str):
        return line
    words = [line[0], str(line[1]), line[2]]
    if len(line) > 3:
        words.append(f'"{line[3]}"')
    if len(line) > 4:
        words.append(str(line[4]))
    return " ".join(words)


def default_ddb(sectors: int, cid: str) -> dict[str, str]:
    """The disk database that VMware's products write for a SCSI disk."""
    return {
        "ddb.adapterType": "lsilogic",
        "ddb.geometry.cylinders": str(sectors // (255 * 63)),
        "ddb.geometry.heads": "255",
        "ddb.geometry.sectors": "63",
        "ddb.longContentID": "0123456789abcdef01234567" + cid[-8:].rjust(8, "0"),
        "ddb.toolsVersion": "2147483647",
        "ddb.uuid": "60 00 C2 91 12 34 56 78-9a bc de f0 12 34 56 78",
        "ddb.virtualHWVersion": "14",
    }


def descriptor(
    create_type: str,
    extents: Iterable[ExtentLine] = (),
    *,
    cid: str = "12345678",
    parent_cid: str = NO_PARENT,
    hint: str | None = None,
    ddb: Mapping[str, str] | None = None,
    version: int = 1,
    newline: str = "\n",
    encoding: str = "UTF-8",
    state_encoding: bool = True,
    bom: bool = False,
    first_line: str = "# Disk DescriptorFile",
    extra: Sequence[str] = (),
) -> bytes:
    """
    A descriptor's text, in the order and spacing that all readers take unless the arguments say otherwise.

    encoding is the name as it stands in the text; extra are lines behind the header's keys.
    """
    lines = list(extents)
    if ddb is None:
        ddb = default_ddb(sum(line[1] for line in lines if not isinstance(line, str)), cid)
    rows = [first_line, f"version={version}"]
    rows += [f'encoding="{encoding}"'] if state_encoding else []
    rows += [f"CID={cid}", f"parentCID={parent_cid}", f'createType="{create_type}"']
    rows += [f'parentFileNameHint="{hint}"'] if hint is not None else []
    rows += [*extra, "", "# Extent description", *map(extent_line, lines), ""]
    rows += ["# The Disk Data Base", "#DDB", "", *(f'{key} = "{value}"' for key, value in ddb.items()), ""]
    return (b"\xef\xbb\xbf" if bom else b"") + newline.join(rows).encode(CODECS[encoding])


@dataclass
class Image:
    """A link that was written: `path` is what one opens, `content` what the link alone shows."""

    path: str
    content: Content
    cid: str
    extents: list[Extent]
    parent: Image | None = None
    text: bytes = b""
    unreadable: list[tuple[int, int]] = field(default_factory=list)  # (offset, length) of NOACCESS, in bytes

    @property
    def visible(self) -> Content:
        """What must be read through the whole chain."""
        return self.content if self.parent is None else self.content.over(self.parent.visible)

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        return self.content.size

    @property
    def files(self) -> list[str]:
        """The paths of all files of this link."""
        paths = [extent if isinstance(extent, str) else extent.path for extent in self.extents]
        return list(dict.fromkeys([self.path, *paths]))

    def hosted(self, index: int = 0) -> HostedExtent:
        """An extent known to be a plain hosted sparse one."""
        extent = self.extents[index]
        assert isinstance(extent, HostedExtent)
        return extent

    def stream(self) -> StreamExtent:
        """The extent of a streamOptimized image."""
        extent = self.extents[0]
        assert isinstance(extent, StreamExtent)
        return extent

    def cowd(self) -> CowdExtent:
        """The extent of a vmfsSparse image."""
        extent = self.extents[0]
        assert isinstance(extent, CowdExtent)
        return extent

    def sesparse(self) -> SeSparseExtent:
        """The extent of a seSparse image."""
        extent = self.extents[0]
        assert isinstance(extent, SeSparseExtent)
        return extent


class Row(NamedTuple):
    """One extent line of custom(). A ZERO row needs a size alone: pass Content(size)."""

    access: str
    type: str
    content: Content
    name: str = ""  # default: made from the image's name; several FLAT rows may share one
    offset: int | None = None  # sectors; None leaves it out, as for VMFS and SPARSE
    builder: str = ""  # default by type; "cowd" and "stream" put those behind the word SPARSE
    options: Mapping[str, Any] = {}


def write_flat(path: str, content: Content, offset: int = 0) -> None:
    """Put the content into a flat file at a byte offset; holes stay holes of the file."""
    with open(path, "r+b" if os.path.exists(path) else "wb") as file:
        file.truncate(max(os.path.getsize(path), offset + content.size))
        for segment in content.segments():
            if segment.data:
                file.seek(offset + segment.start)
                file.write(segment.data)


def _texts(
    folder: str, name: str, parent: Image | None, cid: str | None, text: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The arguments of descriptor() that say which link this is; `text` has the last word."""
    result: dict[str, Any] = {"cid": cid or f"{zlib.crc32(name.encode()) % 0x7FFFFFFF:08x}"}
    if parent is not None:
        result |= {"parent_cid": parent.cid, "hint": os.path.relpath(parent.path, folder)}
    return result | dict(text or {})


def custom(
    folder: str,
    name: str,
    rows: Sequence[Row],
    *,
    create_type: str = "custom",
    parent: Image | None = None,
    cid: str | None = None,
    text: Mapping[str, Any] | None = None,
) -> Image:
    """An image with its descriptor in a file of its own and any mix of extents."""
    lines: list[ExtentLine] = []
    extents: list[Extent] = []
    shown: list[Content] = []
    unreadable = []
    at = 0
    for number, row in enumerate(rows, 1):
        file_name = row.name or f"{name}-e{number:03}.vmdk"
        path = os.path.join(folder, file_name)
        base = (row.access, row.content.sectors, row.type)
        match row.builder or row.type:
            case "ZERO":
                lines.append(base)
                shown.append(Content(row.content.size).zero(0, row.content.size))
            case "FLAT" | "VMFS":
                lines.append((*base, file_name) if row.offset is None else (*base, file_name, row.offset))
                write_flat(path, row.content, (row.offset or 0) * SECTOR)
                extents.append(path)
                shown.append(row.content.solid())
            case kind:
                lines.append((*base, file_name))
                extent = _BUILDERS[kind](path, row.content, **row.options)
                extents.append(extent)
                shown.append(extent.content)
        if row.access == "NOACCESS" and row.type != "ZERO":
            unreadable.append((at, row.content.size))
        at += row.content.size
    texts = _texts(folder, name, parent, cid, text)
    written = descriptor(create_type, lines, **texts)
    path = os.path.join(folder, f"{name}.vmdk")
    with open(path, "wb") as file:
        file.write(written)
    return Image(path, Content.joined(shown), texts["cid"], extents, parent, written, unreadable)


_BUILDERS: Mapping[str, Any] = {
    "SPARSE": write_hosted,
    "VMFSSPARSE": write_cowd,
    "SESPARSE": write_sesparse,
    "stream": write_stream,
    "cowd": write_cowd,
}


def monolithic_sparse(
    folder: str,
    name: str,
    content: Content,
    *,
    create_type: str = "monolithicSparse",
    extent_name: str | None = None,
    access: str = "RW",
    parent: Image | None = None,
    cid: str | None = None,
    text: Mapping[str, Any] | None = None,
    **options: Any,
) -> Image:
    """One hosted sparse file with the descriptor inside. extent_name: the name its extent line states."""
    path = os.path.join(folder, f"{name}.vmdk")
    texts = _texts(folder, name, parent, cid, text)
    line = (access, content.sectors, "SPARSE", extent_name or f"{name}.vmdk")
    written = descriptor(create_type, [line], **texts)
    builder = write_stream if create_type == "streamOptimized" else write_hosted
    extent = builder(path, content, descriptor=written, **options)
    return Image(path, extent.content, texts["cid"], [extent], parent, written)


def stream_optimized(folder: str, name: str, content: Content, **options: Any) -> Image:
    """One streamOptimized file, its extent line naming the place-holder that exports write there."""
    return monolithic_sparse(
        folder,
        name,
        content,
        **{"create_type": "streamOptimized", "extent_name": "generated-stream.vmdk"} | options,
    )


def monolithic_flat(folder: str, name: str, content: Content, **options: Any) -> Image:
    """A descriptor and one flat file."""
    rows = [Row("RW", "FLAT", content, f"{name}-flat.vmdk", 0)]
    return custom(folder, name, rows, create_type="monolithicFlat", **options)


def _parted(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of custom(), and those of the extents' builder."""
    link = {key: value for key, value in options.items() if key in {"parent", "cid", "text"}}
    return link, {key: value for key, value in options.items() if key not in link}


def _pieces(content: Content, extent_sectors: int) -> list[Content]:
    step = extent_sectors * SECTOR
    return [content.sliced(at, min(step, content.size - at)) for at in range(0, content.size, step)]


def split_sparse(
    folder: str, name: str, content: Content, extent_sectors: int = 4192256, **options: Any
) -> Image:
    """
    A descriptor and hosted sparse extents name-s001.vmdk...; descriptor=b"" among the options is QEMU's form.

    The default size of an extent is that of VMware's products, 2047 MiB.
    """
    link, rest = _parted(options)
    rows = [
        Row("RW", "SPARSE", piece, f"{name}-s{number:03}.vmdk", options=rest)
        for number, piece in enumerate(_pieces(content, extent_sectors), 1)
    ]
    return custom(folder, name, rows, create_type="twoGbMaxExtentSparse", **link)


def split_flat(
    folder: str, name: str, content: Content, extent_sectors: int = 4192256, **options: Any
) -> Image:
    """A descriptor and flat extents name-f001.vmdk..."""
    rows = [
        Row("RW", "FLAT", piece, f"{name}-f{number:03}.vmdk", 0)
        for number, piece in enumerate(_pieces(content, extent_sectors), 1)
    ]
    return custom(folder, name, rows, create_type="twoGbMaxExtentFlat", **options)


def vmfs(folder: str, name: str, content: Content, **options: Any) -> Image:
    """A descriptor and one VMFS extent, as a disk copied from a datastore has."""
    rows = [Row("RW", "VMFS", content, f"{name}-flat.vmdk")]
    return custom(folder, name, rows, create_type="vmfs", **options)


def vmfs_sparse(folder: str, name: str, content: Content, **options: Any) -> Image:
    """A descriptor and one COWD extent: a delta of older ESX hosts."""
    link, rest = _parted(options)
    rows = [Row("RW", "VMFSSPARSE", content, f"{name}-delta.vmdk", options=rest)]
    return custom(folder, name, rows, create_type="vmfsSparse", **link)


def se_sparse(folder: str, name: str, content: Content, **options: Any) -> Image:
    """A descriptor and one seSparse extent: a delta of newer ESXi hosts."""
    link, rest = _parted(options)
    rows = [Row("RW", "SESPARSE", content, f"{name}-sesparse.vmdk", options=rest)]
    return custom(folder, name, rows, create_type="seSparse", **link)


def device_descriptor(kind: str = "fullDevice", device: str = "/dev/sdz", sectors: int = 204800) -> bytes:
    """The text of a raw disk: all of a device, or its partitions between a copied table and hidden areas."""
    if kind == "fullDevice":
        return descriptor(kind, [("RW", sectors, "FLAT", device, 0)])
    third = (sectors - 2048) // 3
    lines: list[ExtentLine] = [
        ("RW", 63, "FLAT", "raw-pt.vmdk", 0),
        ("RW", 1985, "ZERO"),
        ("RW", third, "FLAT", device, 2048),
        ("NOACCESS", third, "ZERO"),
        ("RW", sectors - 2048 - 2 * third, "FLAT", device, 2048 + 2 * third),
    ]
    return descriptor("partitionedDevice", lines)


def encrypted_descriptor(style: str = "esx", sectors: int = 204800) -> bytes:
    """
    The text of an encrypted disk, in the style of "esx" (a crypto filter over a -flat file) or "workstation".

    The keys are no keys: the text is only good for being recognised and refused.
    """
    if style == "esx":
        keys = 'encryptionKeys="vmware:key/list/(pair/(fqid/<VMWARE-NULL>/KMS/1111,HMAC-SHA-256,AAAA))"'
        ddb = {"ddb.adapterType": "lsilogic", "ddb.iofilters": "vmwarevmcrypt"}
        lines: list[ExtentLine] = [("RW", sectors, "VMFS", "secret-flat.vmdk")]
        return descriptor("vmfs", lines, extra=['keyID="1111"', keys], ddb=ddb, version=1)
    safe = "vmware:key/list/(pair/(phrase/AAAA/pass2key=PBKDF2-HMAC-SHA-1:cipher=AES-256,HMAC-SHA-1,AAAA))"
    extra = [f'encryption.keySafe = "{safe}"', 'encryption.data = "AAAA"']
    return descriptor("monolithicSparse", [], extra=extra, ddb={}, version=2)


def wrapped_descriptor(path: str, text: bytes, sectors: int = 20) -> None:
    """A hosted sparse header of capacity 0 around a text that describes other files, an old form."""
    head = Header(descriptor_offset=1, descriptor_size=sectors, overhead=1 + sectors)
    with open(path, "wb") as file:
        file.write(head.pack() + text.ljust(sectors * SECTOR, b"\0"))


def ctk_file(path: str, capacity_sectors: int = 204800) -> None:
    """A change-tracking side file: its magic, and a plausible rest that nobody reads."""
    with open(path, "wb") as file:
        file.write(struct.pack("<4sIQQ", b"\xa2\x72\x19\xf6", 1, capacity_sectors, 128).ljust(4096, b"\0"))


def gzip_image(path: str, target: str | None = None) -> str:
    """Pack a file as gzip; return where."""
    target = target or path + ".gz"
    with open(path, "rb") as source, gzip.GzipFile(target, "wb", 6, mtime=0) as packed:
        shutil.copyfileobj(source, packed)
    return target
