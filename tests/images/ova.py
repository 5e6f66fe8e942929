"""
Builder of OVA files: a tar with an .ovf envelope first, disks, and a manifest of their digests.

The disks are files that other builders wrote. Sizes in the tar can stand in octal, in base 256 or in a pax
record (with the octal field 0), as they do for members of 8 GiB and more; here the members may be small.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from xml.sax.saxutils import quoteattr

from tests.images import peek, poke

_OVF = "http://schemas.dmtf.org/ovf/envelope/1"
_RASD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
_FORMAT = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"

Sizes = Literal["octal", "base256", "pax"]


class Disk(NamedTuple):
    """A disk to pack: its file, virtual size in bytes, name in the package, and how it is stored."""

    path: str
    capacity: int
    href: str = ""  # default: the file's own name
    gzip: bool = False
    chunk_size: int = 0  # split into href.000000000, .000000001 ...


@dataclass
class Ova:
    """What write_ova() wrote; members: name to (offset, size) of the bytes, in the order of the file."""

    path: str
    members: dict[str, tuple[int, int]]
    ovf: bytes


def envelope(disks: Sequence[tuple[Disk, int]], name: str = "vm") -> bytes:
    """The OVF text of one machine; each disk comes with the size its package states."""
    files, table, items = [], [], []
    for number, (disk, size) in enumerate(disks):
        href = disk.href or os.path.basename(disk.path)
        packed = ' ovf:compression="gzip"' if disk.gzip else ""
        chunks = f' ovf:chunkSize="{disk.chunk_size}"' if disk.chunk_size else ""
        files.append(
            f'    <File ovf:id="file{number}" ovf:href={quoteattr(href)} ovf:size="{size}"{packed}{chunks}/>'
        )
        table.append(
            f'    <Disk ovf:diskId="vmdisk{number}" ovf:fileRef="file{number}" ovf:capacity="{disk.capacity}"'
            f' ovf:capacityAllocationUnits="byte" ovf:format="{_FORMAT}"/>'
        )
        items.append(
            f"      <Item>\n        <rasd:AddressOnParent>{number}</rasd:AddressOnParent>\n"
            f"        <rasd:ElementName>Hard disk {number + 1}</rasd:ElementName>\n"
            f"        <rasd:HostResource>ovf:/disk/vmdisk{number}</rasd:HostResource>\n"
            f"        <rasd:InstanceID>{number + 10}</rasd:InstanceID>\n"
            "        <rasd:Parent>3</rasd:Parent>\n"
            "        <rasd:ResourceType>17</rasd:ResourceType>\n      </Item>"
        )
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f'<Envelope xmlns="{_OVF}" xmlns:ovf="{_OVF}" xmlns:rasd="{_RASD}">',
            "  <References>",
            *files,
            "  </References>",
            "  <DiskSection>\n    <Info>Virtual disks</Info>",
            *table,
            "  </DiskSection>",
            f"  <VirtualSystem ovf:id={quoteattr(name)}>\n    <Info>A machine</Info>",
            "    <VirtualHardwareSection>\n      <Info>Hardware</Info>\n      <Item>",
            "        <rasd:ElementName>SCSI controller 0</rasd:ElementName>",
            "        <rasd:InstanceID>3</rasd:InstanceID>",
            "        <rasd:ResourceSubType>lsilogic</rasd:ResourceSubType>",
            "        <rasd:ResourceType>6</rasd:ResourceType>\n      </Item>",
            *items,
            "    </VirtualHardwareSection>\n  </VirtualSystem>\n</Envelope>\n",
        ]
    ).encode()


def write_ova(
    path: str,
    disks: Sequence[Disk],
    *,
    name: str = "vm",
    digest: Literal["sha1", "sha256", "sha512"] | None = "sha256",
    wrong_digest: bool = False,
    manifest_last: bool = False,
    ovf_last: bool = False,
    stated_size: int | None = None,
    sizes: Sizes = "octal",
    extra: Sequence[tuple[str, bytes]] = (),
) -> Ova:
    """
    Pack disks to an appliance.

    stated_size: what the envelope says of each file instead of the truth. ovf_last and manifest_last move
    those members behind the disks. extra: further members at the end, which no envelope names.
    """
    stored: list[tuple[str, bytes]] = []
    listed: list[tuple[Disk, int]] = []
    for disk in disks:
        href = disk.href or os.path.basename(disk.path)
        data = peek(disk.path, 0, os.path.getsize(disk.path))
        if disk.gzip:
            data = gzip.compress(data, 6, mtime=0)
        listed.append((disk, len(data) if stated_size is None else stated_size))
        if disk.chunk_size:
            starts = range(0, len(data), disk.chunk_size)
            for number, start in enumerate(starts):
                stored.append((f"{href}.{number:09}", data[start : start + disk.chunk_size]))
        else:
            stored.append((href, data))
    ovf = (f"{name}.ovf", envelope(listed, name))
    members = [*stored, ovf] if ovf_last else [ovf, *stored]
    if digest is not None:
        rows = [
            f"{digest.upper()}({key})= {hashlib.new(digest, data).hexdigest()}\n" for key, data in members
        ]
        if wrong_digest:
            rows[-1] = rows[-1][:-2] + ("0" if rows[-1][-2] != "0" else "1") + "\n"
        members.insert(
            len(members) if manifest_last or ovf_last else 1, (f"{name}.mf", "".join(rows).encode())
        )
    members += extra
    return Ova(path, write_tar(path, members, sizes), ovf[1])


def write_tar(
    path: str, members: Sequence[tuple[str, bytes]], sizes: Sizes = "octal"
) -> dict[str, tuple[int, int]]:
    """A tar of plain files; returns the place and length of each member's bytes."""
    form = tarfile.PAX_FORMAT if sizes == "pax" else tarfile.USTAR_FORMAT
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o644
            if sizes == "pax":
                info.pax_headers = {"size": str(len(data))}
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        places = {info.name: (info.offset_data, info.size) for info in tar}
    for offset, size in places.values():
        if sizes == "base256":
            _set_size(path, offset, b"\x80" + size.to_bytes(11, "big"))
        elif sizes == "pax":
            _set_size(path, offset, b"00000000000\0")
    return places


def _set_size(path: str, offset: int, size: bytes) -> None:
    """Rewrite the size field of the header before a member's bytes, and its checksum."""
    header = bytearray(peek(path, offset - 512, 512))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    poke(path, offset - 512, bytes(header))
