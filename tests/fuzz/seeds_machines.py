"""
The inputs fuzzing of machines and appliances starts from.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tempfile

from tests.fuzz import case
from tests.images import desc, ova
from tests.images.content import SECTOR, Content

VMX = """#!/usr/bin/vmware
.encoding = "UTF-8"
config.version = "8"
displayName = "a |22machine|22"
scsi0.present = "TRUE"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "top.vmdk"
scsi0:1.present = "TRUE"
scsi0:1.fileName = "/vmfs/volumes/x/base.vmdk"
ide1:0.present = "TRUE"
ide1:0.deviceType = "cdrom-image"
ide1:0.fileName = "linux.iso"
"""
VMSD = """.encoding = "windows-1252"
snapshot.numSnapshots = "1"
snapshot0.uid = "1"
snapshot0.displayName = "before"
snapshot0.disk0.fileName = "base.vmdk"
snapshot0.disk0.node = "scsi0:0"
"""
_OTHERS = {
    "gbk": '.encoding = "GBK"\nide0:0.present="1"\nide0:0.fileName = "磁盘.vmdk"\n'.encode("gbk"),
    "crlf": b'\xef\xbb\xbfnvme0:0.present = "TRUE"\r\nnvme0:0.fileName = "..\\x.vmdk"\r\n',
    "empty": b"",
}


def _envelopes() -> dict[str, bytes]:
    two = [(ova.Disk("disk.vmdk", 1 << 20), 9), (ova.Disk("b.vmdk", 1 << 30, chunk_size=7), 9)]
    plain = ova.envelope(two)
    return {
        "two": plain,
        "utf16": plain.decode().replace("UTF-8", "UTF-16").encode("utf-16"),
        "old": plain.replace(
            b"http://schemas.dmtf.org/ovf/envelope/1", b"http://www.vmware.com/schema/ovf/1/envelope"
        ),
        "doctype": b'<!DOCTYPE a [<!ENTITY e "x">]><Envelope>&e;</Envelope>',
    }


def dictionaries() -> dict[str, bytes]:
    """Configurations and snapshot lists."""
    return {"vmx": VMX.encode(), "vmsd": VMSD.encode(), **_OTHERS}


def envelopes() -> dict[str, bytes]:
    """Envelopes."""
    return _envelopes()


def gzips() -> dict[str, bytes]:
    """One member, several, padded, stored, and more than a block of output."""
    words = gzip.compress(b"words " * 500, mtime=0)
    return {
        "words": words,
        "members": words + gzip.compress(b"", mtime=0) + gzip.compress(b"x", mtime=0) + bytes(20),
        "stored": gzip.compress(bytes(range(256)) * 3, 0, mtime=0),
        "zeros": gzip.compress(bytes(1 << 20), mtime=0),
    }


def machines() -> dict[str, bytes]:
    """Machines, folders and appliances, as cases."""
    with tempfile.TemporaryDirectory() as folder:
        content = Content(40 * SECTOR).put(0, b"words")
        base = desc.monolithic_sparse(folder, "base", content, grain_sectors=1, gtes=8, descriptor_sectors=2)
        top = desc.monolithic_sparse(
            folder, "top", content, parent=base, grain_sectors=1, gtes=8, descriptor_sectors=2
        )
        packed = desc.stream_optimized(folder, "disk", content, grain_sectors=8, descriptor_sectors=2)
        links = [case.File.load(path) for path in (top.path, base.path)]
        with open(packed.path, "rb") as file:
            data = file.read()
        archive = ova.write_ova(
            os.path.join(folder, "vm.ova"), [ova.Disk(packed.path, content.size, gzip=True)], digest=None
        )
        whole = case.File.load(archive.path)
    vmx, vmsd = case.File.of("vm.vmx", VMX.encode()), case.File.of("vm.vmsd", VMSD.encode())
    chunked = ova.envelope([(ova.Disk("disk.vmdk", content.size, chunk_size=1000), len(data))])
    pieces = [
        case.File.of(f"disk.vmdk.{number:09}", data[at : at + 1000])
        for number, at in enumerate(range(0, len(data), 1000))
    ]
    return {
        "vmx": case.encode([vmx, *links, vmsd]),
        "vmsd": case.encode([vmsd, *links]),
        "folder": case.encode(links),
        "ovf": case.encode([case.File.of("vm.ovf", chunked), *pieces]),
        "ova": case.encode([whole]),
        "tar": case.encode(
            [case.File.of("vm.tar", _tar({"a/disk.vmdk": data, "b/disk.vmdk.gz": gzip.compress(data)}))]
        ),
    }


def _tar(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue().rstrip(b"\0") + bytes(1024)
