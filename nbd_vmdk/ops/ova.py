"""An appliance in one file (OVA) round a new streamOptimized disk.

VMware's tools want the description first, the manifest next and the disk after them, yet description and
manifest tell the disk's size and its sum, known only when it is written.  So room is left for both: the
description is filled up with blank lines, which XML allows at its end, and a manifest is always as long.
The disk is written where it stays and summed as it passes by, so nothing is held or copied twice.
"""

import hashlib
import os
import re
import tarfile
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any, Final

from nbd_vmdk.errors import WriteRefused
from nbd_vmdk.ondisk.descriptor import Descriptor
from nbd_vmdk.ondisk.hosted import HostedHeader, parse_header
from nbd_vmdk.ondisk.ovf_build import Appliance, build_manifest, build_ovf, manifest_hash
from nbd_vmdk.opening import open_disk
from nbd_vmdk.ops.convert import Made, Padded, Work, compare, fill_stream, final_names, with_new_cid
from nbd_vmdk.ops.copy import Copied, Source
from nbd_vmdk.ops.create import Created, create_image
from nbd_vmdk.ops.create.products import DEFAULT_HWVERSION
from nbd_vmdk.ops.sides import DiskSource
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.local import LocalFile
from nbd_vmdk.storage.newfiles import NewFiles
from nbd_vmdk.units import SECTOR, align_up

#: Longest name that is used of the appliance's file: with what is put behind it, it must fit 100 bytes.
_MAX_STEM: Final = 80
#: Larger sizes do not fit the header's octal digits, and are written in base 256.
_MAX_OCTAL: Final = 8**11
#: tar writes in records of so many bytes, the last one filled up with zeros.
_RECORD: Final = 10240
#: As wide as any size of a file of 32-bit sectors.
_WIDEST: Final = 1 << 41


class SummedMember(Storage):
    """A file inside an archive that is being written: front to back only, summed as it passes by."""

    writable = True

    def __init__(self, archive: Storage, at: int, name: str, kind: str) -> None:
        self.name = name
        self.at = at
        self._archive = archive
        self._size = 0
        self._sum = hashlib.new(kind, usedforsecurity=False)

    @property
    def size(self) -> int:
        """See Storage."""
        return self._size

    @property
    def identity(self) -> tuple[int, ...]:
        """See Storage."""
        return (*self._archive.identity, self.at)

    @property
    def digest(self) -> str:
        """The sum of all that was written, in hex."""
        return self._sum.hexdigest()

    def read_into(self, buf: memoryview, at: int) -> None:
        """See Storage."""
        self._archive.read_into(buf, self.at + at)

    def write(self, buf: bytes | bytearray | memoryview, at: int) -> None:
        """See Storage; WriteRefused anywhere but at the end."""
        if at != self._size:
            raise WriteRefused(self.name, why="a disk inside an archive is written front to back")
        self._archive.write(buf, self.at + at)
        self._sum.update(buf)
        self._size += len(buf)

    def truncate(self, size: int) -> None:
        """See Storage; WriteRefused for any size but what it has."""
        if size != self._size:
            raise WriteRefused(self.name, why="a disk inside an archive is written front to back")

    def close(self) -> None:
        """The archive is its opener's."""


def write_ova(source: Source, path: str, work: Work, create: Mapping[str, Any]) -> Made:
    """Make ``path`` an OVA with the disk ``source``; ``create`` goes to create_image."""
    padded = source if source.size % SECTOR == 0 else Padded(source)
    with NewFiles(path, replace=work.replace) as new, final_names(new.folder, path):
        stem = re.sub(r"\.ova$", "", new.name, flags=re.IGNORECASE)
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", stem)[:_MAX_STEM]
        disk_name = f"{stem or 'appliance'}-disk1.vmdk"
        created, header, head = _empty_disk(new.path(disk_name), padded.size, create)
        with closing(new.create(new.name)) as archive:
            archive.write_behind = True
            copied = _write_archive(padded, archive, stem, disk_name, header, head, work)
        if work.verify:
            with open_disk(new.path(new.name), locks=False) as disk:
                compare(padded, DiskSource(disk), path, work)
        return Made(copied, new.publish(main=new.name), created)


def _empty_disk(path: str, size: int, create: Mapping[str, Any]) -> tuple[Created, HostedHeader, bytes]:
    """A new disk that was made and removed again: its header, and its bytes up to its first grain."""
    created = create_image(
        path, size, durable=False, **{"product": "ova", **create, "kind": "streamOptimized"}
    )
    with open(path, "rb") as file:
        head = file.read()
    os.unlink(path)
    header = parse_header(head, path)
    return created, header, with_new_cid(head[: header.overhead_sectors * SECTOR], header, path)


def _write_archive(
    source: Source,
    archive: LocalFile,
    stem: str,
    disk_name: str,
    header: HostedHeader,
    head: bytes,
    work: Work,
) -> Copied:
    ddb = Descriptor.parse(head[SECTOR:].partition(b"\0")[0], disk_name).ddb
    hwversion = int(ddb.get("ddb.virtualHWVersion", DEFAULT_HWVERSION))
    kind = manifest_hash(hwversion)
    names = [f"{stem}.ovf", f"{stem}.mf", disk_name]

    def described(file_size: int, populated: int) -> bytes:
        return build_ovf(
            Appliance(
                name=stem,
                disk_file=disk_name,
                file_size=file_size,
                capacity=source.size,
                populated=populated,
                adapter=ddb.get("ddb.adapterType", "lsilogic"),
                hwversion=hwversion,
            )
        )

    ovf_room = len(described(_WIDEST, source.size))
    any_sum = hashlib.new(kind, usedforsecurity=False).hexdigest()
    manifest_room = len(build_manifest(kind, {names[0]: any_sum, disk_name: any_sum}))
    manifest_at = SECTOR + align_up(ovf_room, SECTOR)
    disk_at = manifest_at + SECTOR + align_up(manifest_room, SECTOR) + SECTOR

    member = SummedMember(archive, disk_at, disk_name, kind)
    member.write(head, 0)
    copied = fill_stream(source, member, header, work)
    ovf = described(member.size, copied.data).ljust(ovf_room, b"\n")
    manifest = build_manifest(
        kind, {names[0]: hashlib.new(kind, ovf, usedforsecurity=False).hexdigest(), disk_name: member.digest}
    )
    for at, name, size in (
        (0, names[0], len(ovf)),
        (manifest_at, names[1], len(manifest)),
        (disk_at - SECTOR, names[2], member.size),
    ):
        archive.write(tar_header(name, size), at)
    archive.write(ovf, SECTOR)
    archive.write(manifest, manifest_at + SECTOR)
    archive.truncate(align_up(disk_at + align_up(member.size, SECTOR) + 2 * SECTOR, _RECORD))
    return copied


def tar_header(name: str, size: int) -> bytes:
    """A member's header: ustar, with a size of 8 GiB and more in base 256, as tar writes and reads it."""
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = 0o644, int(time.time())  # tar warns of files from 1970
    if size < _MAX_OCTAL:
        info.size = size
        return info.tobuf(tarfile.USTAR_FORMAT)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)
