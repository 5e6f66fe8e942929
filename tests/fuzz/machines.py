"""
Machines and appliances: their texts, gzip data at any place, and all of it as files that name other files.
"""

from __future__ import annotations

import os
import random
import re
from contextlib import ExitStack

from nbd_vmdk.disk import Disk
from nbd_vmdk.errors import VmdkError
from nbd_vmdk.ondisk.ovf import parse_envelope
from nbd_vmdk.ondisk.vmsd import parse_snapshots
from nbd_vmdk.ondisk.vmx import disks_of, node_order, parse_dictionary
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.plugin.exports import open_exports
from nbd_vmdk.vm import find_disks
from nbd_vmdk.vm.gunzipped import Gunzipped, Points
from tests.fuzz import case
from tests.fuzz.answers import checked, our_errors
from tests.fuzz.images import folder_for_images
from tests.fuzz.parsers import Plain
from tests.memory import MemoryStorage

KIB = 1 << 10
MOST = 4 << 20

WORDS = (
    *("scsi0:0", "scsi1:15", "ide0:1", "nvme0:0", "sata3:2", ".present", ".fileName", ".deviceType", ".redo"),
    *(' = "TRUE"', ' = "disk.vmdk"', ' = "../x.vmdk"', ' = "/etc/passwd"', '.encoding = "GBK"', "|22", "#"),
    *("snapshot0.uid", "snapshot0.displayName", "snapshot0.disk0.fileName", "snapshot0.disk0.node"),
)
XML_WORDS = (
    *("<!DOCTYPE a [", '<!ENTITY e "x">', "&e;", "<![CDATA[", "]]>", '<?xml version="1.0" encoding="GBK"?>'),
    *(
        "<Disk ",
        "<File ",
        "<Item>",
        "</Item>",
        'ovf:id="file0"',
        'ovf:diskId="vmdisk0"',
        'ovf:fileRef="file0"',
    ),
    *('ovf:href="disk.vmdk"', "<rasd:HostResource>ovf:/disk/vmdisk0</rasd:HostResource>", "byte * 2^30"),
)


def fuzz_dictionary(data: bytes) -> None:
    """Configurations and snapshot lists."""
    with our_errors():
        values = parse_dictionary(data, "vm.vmx")
        assert all(key == key.lower() for key in values)
        orders = [node_order(disk.node) for disk in disks_of(values)]
        assert None not in orders
        assert len(set(orders)) == len(orders)
    with our_errors():
        for snapshot in parse_snapshots(data, "vm.vmsd"):
            assert snapshot.uid is not None
            assert all(disk.file for disk in snapshot.disks)


def fuzz_envelope(data: bytes) -> None:
    """Envelopes."""
    with our_errors():
        disks = parse_envelope(data, "vm.ovf")
        assert b"<!DOCTYPE" not in data.partition(b"<Envelope")[0] or b"<!--" in data or b"<?" in data
        assert len({disk.href for disk in disks}) == len(disks)
        assert all(disk.href for disk in disks)
        assert all(disk.capacity is None or disk.capacity >= 0 for disk in disks)


def fuzz_gunzip(data: bytes) -> None:
    """Gzip data: what is read at any place is what is read from front to back."""
    points = Points(MOST)
    points.distance = 64 * KIB
    with our_errors():
        front = Gunzipped(MemoryStorage(data, "x.gz", writable=False), points)
        size = front.size
        assert size <= MOST
        plain = front.read(0, size)
        other = Gunzipped(MemoryStorage(data, "x.gz", writable=False), points)
        rng = random.Random(data)
        for _ in range(8 if size else 0):
            at = rng.randrange(size)
            length = min(rng.choice((1, 512, 300 * KIB)), size - at)
            assert other.read(at, length) == plain[at : at + length]


def fuzz_machine(data: bytes) -> None:
    """Several files (case.py), the first of which leads to the others."""
    files = case.decode(data)
    with folder_for_images() as folder:
        paths = [file.write(folder) for file in files]
        for path in (paths[0] if paths else None, folder):
            if path is not None:
                _find(path, None)
                _find(path, "1")


def _find(path: str, snapshot: str | None) -> None:
    with our_errors():
        found = find_disks(path, snapshot=snapshot)
        assert len({disk.name for disk in found}) == len(found)
        for disk in found:
            disk.name.encode()
            if disk.fault is not None:
                checked(disk.fault)
    with our_errors(), ExitStack() as closing:
        exports = open_exports([path], OpenOptions(), snapshot=snapshot, skip_broken=True)
        closing.callback(exports.close)
        assert exports.get("") is exports.disks[exports.first]
        for disk_ in exports.disks.values():
            _read(disk_)


def _read(disk: Disk) -> None:
    for offset in (0, disk.size // 2, disk.size - 1):
        try:
            assert len(disk.pread(min(512, disk.size - offset), offset)) > 0
        except VmdkError as error:
            checked(error)


def mutate_text(data: bytes, max_size: int, seed: int, plain: Plain) -> bytes:
    """By lines and tags, by the words of these texts, or as the fuzzer likes."""
    rng = random.Random(seed)
    if not data or rng.random() < 0.4:
        return plain(data, max_size)
    pieces = re.split(rb"(?<=[>\n])", data)
    words = XML_WORDS if b"<" in data else WORDS
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, other = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        match rng.randrange(5):
            case 0:
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case 1:
                pieces.insert(at, pieces[other])
            case 2 if len(pieces) > 1:
                del pieces[at]
            case 3:
                cut = rng.randrange(len(pieces[at]) + 1)
                pieces[at] = pieces[at][:cut] + rng.choice(words).encode() + pieces[at][cut:]
            case _:
                pieces.insert(at, rng.choice(words).encode() + b"\n")
    return b"".join(pieces)[:max_size]


def mutate_machine(data: bytes, max_size: int, seed: int, plain: Plain) -> bytes:
    """A text among the files, or whatever files can suffer."""
    rng = random.Random(seed)
    files = case.decode(data)
    texts = [file for file in files if os.path.splitext(file.name)[1] in (".vmx", ".vmsd", ".ovf")]
    if not texts or rng.random() < 0.4:
        return case.mutate(data, max_size, seed, plain)
    file = rng.choice(texts)
    if file.pieces:
        piece = rng.choice(file.pieces)
        piece.data = mutate_text(piece.data, 8 * KIB, seed, plain)
        file.size = max(file.size, piece.offset + len(piece.data))
    made = case.encode(files)
    return made if len(made) <= max_size else data
