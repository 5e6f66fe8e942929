"""
The inputs fuzzing starts from: small images of every kind, made by the builders of tests/images.

Content is a few sectors, in extents whose geometry is as small as the format allows, and in some as large as
writers make it. For the target "files" they are cases (case.py), so that megabytes of zeros cost nothing.
"""

from __future__ import annotations

import io
import os
import random
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

from tests.fuzz import case, seeds_machines
from tests.images import cut, desc, ova, poke, stream
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image, Row
from tests.images.hosted import Header

Files = dict[str, list[str]]  # name of the seed -> paths, the one to open first
Make = Callable[[str], list[str]]


def _content(sectors: int = 40, seed: int = 1, unit: int = SECTOR) -> Content:
    """A few words, zeros or nothing in each unit, a long hole, and noise in the first sector alone."""
    rng = random.Random(seed)
    content = Content(sectors * SECTOR)
    for start in range(0, content.size, unit):
        match rng.randrange(5):
            case 0:
                content.zero(start, min(unit, content.size - start))
            case 1 | 2:
                content.put(start, b"%d bytes from %d" % (unit, start))
    hole = min(7 * unit, content.size)
    return content.punch(hole, min(14 * unit, content.size - hole)).put(0, rng.randbytes(SECTOR))


def _chain(image: Image) -> list[str]:
    """All files of an image and its parents, the file to open first."""
    paths: list[str] = []
    link: Image | None = image
    while link is not None:
        paths += [path for path in link.files if path not in paths]
        link = link.parent
    return paths


SMALL: dict[str, Any] = {"grain_sectors": 1, "gtes": 8}
SPARSE: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "missing-tables": {**SMALL, "preallocate_tables": False},
    "no-redundant": {**SMALL, "rgd": False},
    "tables-last": {**SMALL, "tables_last": True},
    "zeroed": {**SMALL, "zero_gte": True},
    "undeclared-zeroed": {**SMALL, "zero_gte": True, "flags": 3, "version": 1},
    "misaligned": {"grain_sectors": 8, "gtes": 4, "misalign": 3, "gap_sectors": 1},
    "shuffled": {**SMALL, "shuffle_grains": 5},
    "unclean": {**SMALL, "unclean": True},
    "version-3": {**SMALL, "version": 3},
    "wide-tables": {"grain_sectors": 2, "gtes": 1024, "shuffle_grains": 7},
    "usual": {},
}
HINTS = {
    "of-windows": "C:\\vms\\base.vmdk",
    "of-elsewhere": "/vms/other/base.vmdk",
    "of-above": "../base/base.vmdk",
    "lost": "gone.vmdk",
}
STREAMS: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {"layout": "B"},
    "c": {"layout": "C"},
    "mixed": {"layout": "mixed"},
    "no-footer": {"footer": "none"},
    "lost-footer": {"footer": "lost"},
    "padded": {"trailing": 2048},
    "unordered": {"order": 3},
    "progress": {"progress_every": 2, "metadata_val": False},
    "lengths": {"layout": "B", "record": "length"},
    "bare": {"layout": "B", "record": "bare", "raw_deflate": True},
    "broken": {"broken": {0: "bits", 1: "lba", 2: "adler", 3: "truncated", 4: "huge", 5: "short", 6: "bomb"}},
}


def _single() -> dict[str, Make]:
    """Images that are one file."""
    made: dict[str, Make] = {}
    for name, options in SPARSE.items():
        made[f"sparse-{name}"] = lambda folder, o=options: (
            desc.monolithic_sparse(folder, "fuzz", _content(), **{"descriptor_sectors": 2, **o}).files
        )
    for name, options in STREAMS.items():
        small = {"grain_sectors": 8, "gtes": 4, "descriptor_sectors": 2}
        made[f"stream-{name}"] = lambda folder, o=small | options: (
            desc.stream_optimized(folder, "fuzz", _content(160, unit=4 * KIB), **o).files
        )
    made["stream-usual"] = lambda folder: (
        desc.stream_optimized(folder, "fuzz", _content(400, unit=64 * KIB), order=None).files
    )
    made["stream-cut"] = _cut_stream
    made["stream-holed"] = _holed_stream
    return made


def _cut_stream(folder: str) -> list[str]:
    image = desc.stream_optimized(folder, "fuzz", _content(160, unit=4 * KIB), grain_sectors=8, gtes=4)
    cut(image.path, os.path.getsize(image.path) * 2 // 3)
    return image.files


def _holed_stream(folder: str) -> list[str]:
    image = desc.stream_optimized(folder, "fuzz", _content(160, unit=4 * KIB), grain_sectors=8, gtes=4)
    grain = list(image.stream().records)[1]
    poke(image.path, image.stream().grain_at(grain), bytes(SECTOR))
    return image.files


def _several() -> dict[str, Make]:
    """Images of several files, and those whose one file is too long to be a seed by itself."""
    made = _single()
    for name, options in SPARSE.items():
        made[f"split-{name}"] = lambda folder, o=options: (
            desc.split_sparse(folder, "fuzz", _content(), 16, **o).files
        )
    made["split-qemu"] = lambda folder: (
        desc.split_sparse(folder, "fuzz", _content(), 16, descriptor=b"", **SMALL).files
    )
    made["split-alone"] = lambda folder: desc.split_sparse(folder, "fuzz", _content(), 16, **SMALL).files[
        :0:-1
    ]
    made["flat"] = lambda folder: desc.monolithic_flat(folder, "fuzz", _content()).files
    made["split-flat"] = lambda folder: desc.split_flat(folder, "fuzz", _content(), 16).files
    made["vmfs"] = lambda folder: desc.vmfs(folder, "fuzz", _content()).files
    made["cowd"] = lambda folder: desc.vmfs_sparse(folder, "fuzz", _content()).files
    made["cowd-alone"] = lambda folder: desc.vmfs_sparse(folder, "fuzz", _content()).files[:0:-1]
    made["sesparse"] = lambda folder: (
        desc.se_sparse(folder, "fuzz", _content(unit=4 * KIB), zero_style="mixed", shuffle_grains=2).files
    )
    made["sesparse-rotated"] = _rotated
    made["sesparse-alone"] = lambda folder: desc.se_sparse(folder, "fuzz", _content()).files[:0:-1]
    made["custom"] = _custom
    made["wrapper"] = _wrapper
    made["child"] = lambda folder: _chain(_child(folder, **SMALL))
    made["child-zeroed"] = lambda folder: _chain(_child(folder, zero_gte=True, **SMALL))
    made["child-wrong-cid"] = lambda folder: _chain(_child(folder, text={"parent_cid": "0badc1d0"}, **SMALL))
    made["child-larger"] = lambda folder: _chain(_child(folder, sectors=77, **SMALL))
    made["child-huge-grain"] = _huge_grain
    for name, hint in HINTS.items():
        made[f"child-{name}"] = lambda folder, hint=hint: _chain(_child(folder, text={"hint": hint}, **SMALL))
    made["parent-incomplete"] = lambda folder: _chain(_child(folder, **SMALL))[:2]
    made["parent-itself"] = lambda folder: _chain(_child(folder, **SMALL))[1:]
    made["chain"] = _mixed_chain
    made["loop"] = _loop
    made["ova"] = lambda folder: [_ova(folder)]
    made["ova-flat"] = lambda folder: [_ova(folder, flat=True)]
    made["tar-in-tar"] = _nested
    made["windows-names"] = _windows
    made["flat-alone"] = lambda folder: desc.monolithic_flat(folder, "fuzz", _content()).files[::-1]
    made["unfinished"] = lambda folder: (
        desc.monolithic_sparse(folder, "fuzz", _content(), header={"magic": b"kdmv"}, **SMALL).files
    )
    made["ctk"] = lambda folder: (
        desc.monolithic_flat(
            folder,
            "fuzz",
            _content(),
            text={"version": 3, "extra": ["# Change Tracking File", 'changeTrackPath="x"']},
        ).files
    )
    return made


def _rotated(folder: str) -> list[str]:
    """The second grain is the first whose index has bits in both parts of an entry."""
    content = _content(unit=4 * KIB).resized(32 * MIB)
    return desc.se_sparse(folder, "fuzz", content, first_index=4095).files


def _custom(folder: str) -> list[str]:
    piece = _content(16)
    rows = [
        Row("RW", "SPARSE", piece, options=SMALL),
        Row("RDONLY", "FLAT", piece, "both-flat.vmdk", 0),
        Row("RW", "ZERO", Content(8 * SECTOR)),
        Row("RW", "FLAT", piece, "both-flat.vmdk", 16),
        Row("NOACCESS", "FLAT", piece, "both-flat.vmdk", 32),
        Row("RW", "VMFSSPARSE", piece, builder="cowd"),
        Row("RW", "SPARSE", piece, builder="stream", options={"grain_sectors": 8, "descriptor_sectors": 0}),
        Row("RW", "VMFS", piece),
    ]
    return desc.custom(folder, "fuzz", rows).files


def _wrapper(folder: str) -> list[str]:
    image = desc.monolithic_flat(folder, "inner", _content())
    path = os.path.join(folder, "fuzz.vmdk")
    desc.wrapped_descriptor(path, image.text)
    return [path, *image.files[1:]]


def _child(folder: str, *, sectors: int = 40, **options: Any) -> Image:
    base = desc.monolithic_flat(folder, "base", _content(40, 2))
    return desc.monolithic_sparse(folder, "fuzz", _content(sectors, 3), parent=base, **options)


def _huge_grain(folder: str) -> list[str]:
    base = desc.monolithic_flat(folder, "base", _content())
    content = Content(5 * MIB).put(4 * MIB, b"in the last grain")
    return _chain(desc.monolithic_sparse(folder, "fuzz", content, parent=base, grain_sectors=4096, gtes=8))


def _windows(folder: str) -> list[str]:
    path = os.path.join(folder, "fuzz.vmdk")
    lines: list[desc.ExtentLine] = [("RW", 40, "FLAT", "C:\\vms\\fuzz-flat.vmdk", 0)]
    with open(path, "wb") as file:
        file.write(desc.descriptor("monolithicFlat", lines))
    desc.write_flat(os.path.join(folder, "fuzz-flat.vmdk"), _content())
    return [path, os.path.join(folder, "fuzz-flat.vmdk")]


def _mixed_chain(folder: str) -> list[str]:
    link = desc.stream_optimized(folder, "base", _content(40, 2), grain_sectors=8)
    link = desc.vmfs_sparse(folder, "second", _content(40, 3), parent=link)
    link = desc.split_sparse(folder, "third", _content(50, 4), 20, parent=link, **SMALL)
    return _chain(desc.monolithic_sparse(folder, "fuzz", _content(30, 5), parent=link, **SMALL))


def _loop(folder: str) -> list[str]:
    base = desc.monolithic_sparse(folder, "base", _content(), cid="00000002", **SMALL)
    image = desc.monolithic_sparse(folder, "fuzz", _content(), cid="00000001", parent=base, **SMALL)
    desc.monolithic_sparse(folder, "base", _content(), cid="00000002", parent=image, **SMALL)
    return _chain(image)


def _ova(folder: str, *, flat: bool = False, sizes: ova.Sizes = "octal") -> str:
    """An appliance named as a disk is, so that the same targets open it."""
    path = os.path.join(folder, "fuzz.vmdk")
    if flat:
        image = desc.custom(folder, "disk", [Row("RW", "FLAT", _content(), "disk.bin", 0)])
        ova.write_tar(path, [(os.path.basename(name), _bytes(name)) for name in image.files[::-1]], sizes)
    else:
        image = desc.stream_optimized(folder, "disk", _content(), grain_sectors=8, descriptor_sectors=2)
        ova.write_ova(path, [ova.Disk(image.path, image.size)], sizes=sizes)
    return path


def _nested(folder: str) -> list[str]:
    """An archive whose disk is an archive, three times, under the name of the file itself."""
    path = _ova(folder)
    for _ in range(3):
        ova.write_tar(path, [("fuzz.vmdk", _bytes(path))])
    return [path]


def _bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def descriptors() -> dict[str, bytes]:
    """Texts of every flavour."""
    flat: list[desc.ExtentLine] = [("RW", 100, "FLAT", "a-flat.vmdk", 0)]
    many: list[desc.ExtentLine] = [("RW", 4192256, "SPARSE", f"a-s{n:03}.vmdk") for n in range(1, 9)]
    extra = ["# Change Tracking File", 'changeTrackPath="a-ctk.vmdk"', "unknown=kept"]
    physical = r'RW 1 FLAT "\\.\PhysicalDrive0" 0 partitionUUID \\.\PhysicalDrive0'
    return {
        "flat": desc.descriptor("monolithicFlat", flat),
        "crlf": desc.descriptor("monolithicFlat", flat, newline="\r\n", bom=True),
        "cr": desc.descriptor("monolithicFlat", flat, newline="\r", first_line="#Disk Descriptor File"),
        "split": desc.descriptor("twoGbMaxExtentSparse", many),
        "child": desc.descriptor("vmfsSparse", flat, parent_cid="0000beef", hint="..\\base\\b.vmdk"),
        "ctk": desc.descriptor("vmfs", flat, version=3, extra=extra),
        "gbk": desc.descriptor("vmfs", [("RW", 9, "FLAT", "磁盘.vmdk", 0)], encoding="GBK"),
        "sjis": desc.descriptor("vmfs", [("RW", 9, "FLAT", "ディスク表.vmdk", 0)], encoding="Shift_JIS"),
        "cp1252": desc.descriptor("vmfs", [("RW", 9, "VMFS", "dü.vmdk")], encoding="windows-1252"),
        "undeclared": desc.descriptor(
            "vmfs", [("RW", 9, "VMFS", "dü.vmdk")], encoding="windows-1252", state_encoding=False
        ),
        "device": desc.device_descriptor(),
        "partitions": desc.device_descriptor("partitionedDevice"),
        "windows": desc.descriptor("fullDevice", [physical]),
        "esx-encrypted": desc.encrypted_descriptor(),
        "encrypted": desc.encrypted_descriptor("workstation"),
        "two": desc.descriptor("monolithicFlat", flat) + desc.descriptor("monolithicFlat", flat),
        "short-cid": desc.descriptor("monolithicFlat", flat, cid="7", ddb={}),
        "odd": b'version = 2\r\n\n  cid = ABCDEF\nRDONLY 0 ZERO \nNOACCESS 5 zero\nrw 3 vmfsrdm "x"\n\0tail',
        "page": b"<!DOCTYPE html><pre>\n# Disk DescriptorFile\nversion=1\n",
    }


def headers() -> dict[str, bytes]:
    """The beginnings of all files of all images."""
    found = {"kdmv": Header(capacity=100, gd_offset=3, rgd_offset=1).pack()}
    for name, files in _built(_several()).items():
        for number, (_, data) in enumerate(files):
            found[f"{name}-{number}"] = data[:8192].rstrip(b"\0").ljust(512, b"\0")
    found |= {f"text-{name}": data for name, data in descriptors().items()}
    for word in (b"\x1f\x8b", b"PK\x03\x04", b"QFI\xfb", b"conectix", b"<html", b"\xa2\x72\x19\xf6", b"kdmv"):
        found[f"magic-{word.hex()}"] = word.ljust(40, b".")
    return found


def streams() -> dict[str, bytes]:
    """Records, footers and packed grains."""
    rng = random.Random(6)
    plain = b"words and words " * 256
    packed = {
        "zlib": stream.deflated(plain),
        "stored": stream.deflated(rng.randbytes(600), 0),
        "raw": stream.deflated(plain, raw=True),
        "empty": stream.deflated(b""),
        "fixed": zlib.compress(b"abc"),
    }
    record = struct.pack("<QI", 16, len(packed["zlib"])) + packed["zlib"]
    footer = stream.marker(stream.FOOTER, 1) + Header(capacity=4096, gd_offset=9).pack() + bytes(SECTOR)
    return packed | {
        "record": record.ljust(-(-len(record) // SECTOR) * SECTOR, b"\0") + stream.marker(stream.EOS),
        "markers": b"".join(stream.marker(kind, 1) for kind in range(5)),
        "footer": footer,
        "padded": record + bytes(300) + footer + bytes(1024),
    }


def archives() -> dict[str, bytes]:
    """Archives with sizes in each coding, long names, links and what is no plain file."""
    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for sizes in ("octal", "base256", "pax"):
            found[sizes] = _bytes(_ova(folder, sizes=sizes))
    for name, form in (("gnu", tarfile.GNU_FORMAT), ("pax-long", tarfile.PAX_FORMAT)):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for kind, what in (
                (tarfile.REGTYPE, "a" * 150),
                (tarfile.SYMTYPE, "b"),
                (tarfile.DIRTYPE, "d/é"),
            ):
                info = tarfile.TarInfo(what)
                info.type, info.linkname = kind, "c" * 120 if kind == tarfile.SYMTYPE else ""
                info.size = 5 if kind == tarfile.REGTYPE else 0
                tar.addfile(info, io.BytesIO(b"bytes"))
        found[name] = file.getvalue()
    return {
        name: data[: -(-len(data.rstrip(b"\0")) // SECTOR) * SECTOR + 1024] for name, data in found.items()
    }


def _built(makers: dict[str, Make]) -> dict[str, list[tuple[str, bytes]]]:
    """Each image as (name, bytes) of its files."""
    made = {}
    for name, make in makers.items():
        with tempfile.TemporaryDirectory() as folder:
            made[name] = [(os.path.basename(path), _bytes(path)) for path in make(folder)]
    return made


def images() -> dict[str, bytes]:
    """Images of one file that is short enough as it is."""
    found = {name: files[0][1] for name, files in _built(_single()).items()}
    found |= {f"text-{name}": data for name, data in descriptors().items()}
    found["ova"] = archives()["octal"]
    return {name: data for name, data in found.items() if len(data) <= 64 * KIB}


def cases() -> dict[str, bytes]:
    """All images, as cases."""
    return {
        name: case.encode([case.File.of(file, data) for file, data in files])
        for name, files in _built(_several()).items()
    }


SEEDS: dict[str, Callable[[], dict[str, bytes]]] = {
    "descriptor": descriptors,
    "header": headers,
    "stream": streams,
    "tar": archives,
    "image": images,
    "files": cases,
    "check": cases,
    "dictionary": seeds_machines.dictionaries,
    "envelope": seeds_machines.envelopes,
    "gunzip": seeds_machines.gzips,
    "machine": seeds_machines.machines,
}
