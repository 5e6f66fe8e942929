"""What is made, byte by byte: against QEMU's files, the builders of test images and VMware's own files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk import create_image
from nbd_vmdk.ondisk import cowd, cowd_build, hosted_build
from nbd_vmdk.ondisk.descriptor import Descriptor
from nbd_vmdk.ondisk.descriptor_build import ADAPTERS, disk_database, extent_name, geometry_for, random_uuid
from nbd_vmdk.ondisk.hosted import MAX_ENTRY, parse_header
from nbd_vmdk.units import GIB, KIB, MIB, SECTOR
from tests.corpus import Entry, entries
from tests.create.tools import needs_qemu, qemu
from tests.images.content import Content
from tests.images.cowd import write_cowd
from tests.images.hosted import write_hosted
from tests.images.stream import write_stream

TEXT_END = 21 * SECTOR


def text_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[SECTOR:TEXT_END].rstrip(b"\0") if data.startswith(b"KDMV") else data


@needs_qemu
@pytest.mark.parametrize("size", [SECTOR, 8 * MIB, GIB, 40 * GIB + 5 * SECTOR])
def test_a_sparse_disk_is_what_qemu_makes_but_for_the_text(tmp_path: Path, size: int) -> None:
    create_image(tmp_path / "our.vmdk", size)
    qemu("create", "-q", "-f", "vmdk", tmp_path / "qemu.vmdk", str(size))
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("our.vmdk", "qemu.vmdk"))
    assert ours[:SECTOR] == theirs[:SECTOR]
    assert ours[TEXT_END:] == theirs[TEXT_END:]


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize(
    ("sectors", "grain"), [(1, 8), (129, 128), (4192256, 128), (200_000, 16), (7 << 20, 2048)]
)
def test_an_extent_is_what_the_builder_makes(tmp_path: Path, sectors: int, grain: int, zeroed: bool) -> None:
    options = {"grain_size": grain * SECTOR, "zeroed_grain": zeroed}
    create_image(tmp_path / "a.vmdk", sectors * SECTOR, kind="monolithicSparse", **options)
    text = text_of(tmp_path / "a.vmdk")
    theirs = tmp_path / "theirs"
    built = write_hosted(
        str(theirs), Content(sectors * SECTOR), grain_sectors=grain, zero_gte=zeroed, descriptor=text
    )
    assert built.header.version == 1 + zeroed
    assert (tmp_path / "a.vmdk").read_bytes() == theirs.read_bytes()
    create_image(
        tmp_path / "b.vmdk", sectors * SECTOR, kind="custom", extents=(f'RW {sectors} SPARSE "b"',), **options
    )
    write_hosted(str(theirs), Content(sectors * SECTOR), grain_sectors=grain, zero_gte=zeroed)
    assert (tmp_path / "b").read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("size", [SECTOR, 132 * SECTOR, 3 * GIB])
def test_a_stream_is_what_the_builder_makes(tmp_path: Path, size: int) -> None:
    create_image(tmp_path / "a.vmdk", size, kind="streamOptimized")
    write_stream(str(tmp_path / "b"), Content(size), layout="A", descriptor=text_of(tmp_path / "a.vmdk"))
    assert (tmp_path / "a.vmdk").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("sectors", [1, 81925, 4 << 20])
def test_a_delta_is_what_the_builder_makes(tmp_path: Path, sectors: int) -> None:
    create_image(tmp_path / "a.vmdk", sectors * SECTOR, kind="vmfsSparse")
    ours = bytearray((tmp_path / "a-delta.vmdk").read_bytes())
    geometry = [int.from_bytes(ours[at : at + 4], "little") for at in (32, 36, 40)]
    assert tuple(geometry) == geometry_for(sectors, "lsilogic")
    write_cowd(str(tmp_path / "b"), Content(sectors * SECTOR))
    theirs = bytearray((tmp_path / "b").read_bytes())
    ours[32:44] = theirs[32:44] = bytes(12)
    assert ours == theirs


# VMware's own files.

HOSTED = {"vmw-monosparse", "cosmos-filesystem", "cosmos-renamed", "cosmos-server-hda", "nearlands"}


@pytest.mark.parametrize("entry", entries("open"))
def test_headers_are_those_of_vmware(
    tmp_path: Path, corpus: Callable[[Entry], str], entry: Entry | None
) -> None:
    assert entry is not None
    if entry["name"] not in HOSTED:
        pytest.skip("not made by VMware, or of another kind")
    with open(corpus(entry), "rb") as file:
        theirs = file.read(SECTOR)
        directory_at = parse_header(theirs, "").directory_at
        file.seek(directory_at)
        directory = file.read(parse_header(theirs, "").directory_entries * 4)
        file.seek(0)
        text = Descriptor.parse(file.read(TEXT_END)[SECTOR:], "")
    adapter = text.get("ddb.adapterType")
    create_image(tmp_path / "a.vmdk", entry["virtual_size"], adapter=adapter)
    with open(tmp_path / "a.vmdk", "rb") as file:
        assert file.read(SECTOR) == theirs
        file.seek(directory_at)
        assert file.read(len(directory)) == directory
    ours = Descriptor.parse(text_of(tmp_path / "a.vmdk"), "")
    assert ours.create_type == text.create_type
    # That one stores heads and sectors which no rule of any product gives.
    if entry["name"] != "vmw-monosparse":
        for key in ("cylinders", "heads", "sectors"):
            assert ours.get(f"ddb.geometry.{key}") == text.get(f"ddb.geometry.{key}")
    ignored = {"ddb.encoding", "ddb.deletable"}
    assert {key for key in text.ddb if key not in ignored} <= set(ours.ddb)


def test_a_split_descriptor_reads_as_workstation_writes_it(tmp_path: Path) -> None:
    """Line by line, with the larger extents of newer versions, but for what is random."""
    create_image(
        tmp_path / "disk.vmdk",
        60 * GIB,
        kind="twoGbMaxExtentSparse",
        extent_size=8323072 * SECTOR,
        hwversion=13,
        ddb={"ddb.toolsInstallType": "1", "ddb.toolsVersion": "10240"},
    )
    lines = (tmp_path / "disk.vmdk").read_text().splitlines()
    random_values = re.compile(r'(ddb\.(?:longContentID|uuid) = )".*"')
    shape = [random_values.sub(r"\1", line) for line in lines]
    extents = [f'RW 8323072 SPARSE "disk-s{number:03}.vmdk"' for number in range(1, 16)]
    assert shape == [
        "# Disk DescriptorFile",
        "version=1",
        'encoding="UTF-8"',
        "CID=fffffffe",
        "parentCID=ffffffff",
        'createType="twoGbMaxExtentSparse"',
        "",
        "# Extent description",
        *extents,
        'RW 983040 SPARSE "disk-s016.vmdk"',
        "",
        "# The Disk Data Base",
        "#DDB",
        "",
        'ddb.adapterType = "lsilogic"',
        'ddb.geometry.cylinders = "7832"',
        'ddb.geometry.heads = "255"',
        'ddb.geometry.sectors = "63"',
        "ddb.longContentID = ",
        'ddb.toolsInstallType = "1"',
        'ddb.toolsVersion = "10240"',
        "ddb.uuid = ",
        'ddb.virtualHWVersion = "13"',
    ]
    header = parse_header((tmp_path / "disk-s001.vmdk").read_bytes()[:SECTOR], "")
    assert (header.descriptor_sector, header.redundant_sector, header.directory_sector) == (0, 1, 510)


def test_split_sizes(tmp_path: Path) -> None:
    for kind, letter in (("twoGbMaxExtentSparse", "s"), ("twoGbMaxExtentFlat", "f")):
        made = create_image(tmp_path / f"{letter}.vmdk", 5 * GIB, kind=kind)
        sizes = [line.sectors for line in Descriptor.parse(text_of(tmp_path / f"{letter}.vmdk"), "").extents]
        assert sizes == [4192256, 4192256, 2101248]
        assert [os.path.basename(file.path) for file in made.files] == [
            *(f"{letter}-{letter}{number:03}.vmdk" for number in (1, 2, 3)),
            f"{letter}.vmdk",
        ]


# The parts.


@settings(deadline=None)
@given(
    st.integers(1, 1 << 40),
    st.integers(3, 21).map(lambda power: 1 << power),
    st.booleans(),
    st.booleans(),
)
def test_hosted_headers_are_read_as_they_were_built(
    sectors: int, grain: int, zeroed: bool, descriptor: bool
) -> None:
    header = hosted_build.new_extent(
        sectors, grain_sectors=grain, zeroed_grains=zeroed, descriptor=descriptor
    )
    if header.directory_entries > 1 << 25:
        return
    assert parse_header(header.to_bytes(), "") == header
    last = header.overhead_sectors + (-(-sectors // grain) - 1) * grain
    assert hosted_build.can_fill(header) == (last <= MAX_ENTRY)


@settings(deadline=None)
@given(st.integers(1, 0xFFFFFFFF), st.integers(0, 11).map(lambda power: 1 << power))
def test_delta_headers_are_read_as_they_were_built(sectors: int, grain: int) -> None:
    if sectors // grain > 1 << 28 or not cowd_build.can_fill(sectors, grain_sectors=grain):
        return
    data = cowd_build.new_extent(sectors, grain_sectors=grain)
    header = cowd.parse_header(data, "")
    assert (header.capacity_sectors, header.grain_sectors) == (sectors, grain)
    assert header.free_sector * SECTOR == len(data) >= header.overhead
    assert not header.unclean


def test_limits_of_a_delta() -> None:
    """freeSector, 32 bits wide, must be able to name the end of the file."""
    for grain in (1, 128, 2048):
        most = max(
            sectors
            for sectors in range(0xFFFFFFFF - (1 << 26), 0xFFFFFFFF, 1 << 12)
            if cowd_build.can_fill(sectors, grain_sectors=grain)
        )
        tables = -(-most // (4096 * grain))
        end = 4 + -(-tables * 4 // SECTOR) + tables * 32 + -(-most // grain) * grain
        assert end <= 0xFFFFFFFF
        assert not cowd_build.can_fill(0xFFFFFFFF, grain_sectors=grain)
    with pytest.raises(ValueError, match="less than 2 TiB"):
        cowd_build.new_extent(0xFFFFFFFF)


@pytest.mark.parametrize(
    ("sectors", "adapter", "geometry"),
    [
        (1, "lsilogic", (1, 64, 32)),
        (2048, "buslogic", (1, 64, 32)),  # vSphere, hardware version 7
        (4096, "lsilogic", (2, 64, 32)),
        (22528, "lsilogic", (11, 64, 32)),  # vSphere 6.5
        (2097152, "lsilogic", (512, 128, 32)),
        (67108864, "lsilogic", (4177, 255, 63)),
        (83886080, "lsilogic", (5221, 255, 63)),
        (208896, "ide", (207, 16, 63)),  # Workstation 6
        (1048576, "ide", (1040, 16, 63)),  # Workstation 9
        (18432000, "ide", (16383, 16, 63)),
        (1, "ide", (1, 16, 63)),
    ],
)
def test_geometries(sectors: int, adapter: str, geometry: tuple[int, int, int]) -> None:
    assert geometry_for(sectors, adapter) == geometry


@settings(deadline=None)
@given(st.integers(1, 1 << 40), st.sampled_from(ADAPTERS), st.integers(3, 99), st.integers(0, 0xFFFFFFFE))
def test_the_disk_database(sectors: int, adapter: str, hwversion: int, cid: int) -> None:
    keys = disk_database(total_sectors=sectors, adapter=adapter, hwversion=hwversion, cid=cid, thin=True)
    assert list(keys) == sorted(keys)
    assert re.fullmatch(r"[0-9a-f]{24}" + f"{cid:08x}", keys["ddb.longContentID"])
    assert re.fullmatch(r"60 00 C2 9[0-9a-f]( [0-9a-f]{2}){4}-[0-9a-f]{2}( [0-9a-f]{2}){7}", keys["ddb.uuid"])
    cylinders, heads, tracks = (int(keys[f"ddb.geometry.{key}"]) for key in ("cylinders", "heads", "sectors"))
    assert cylinders == 1 or cylinders * heads * tracks <= sectors
    assert keys["ddb.uuid"] != random_uuid()


@pytest.mark.parametrize(
    ("main", "word", "number", "name"),
    [
        ("a.vmdk", "FLAT", None, "a-flat.vmdk"),
        ("a.VMDK", "VMFS", None, "a-flat.vmdk"),
        ("a b.vmdk", "VMFSSPARSE", None, "a b-delta.vmdk"),
        ("a.vmdk", "SPARSE", None, "a.vmdk"),
        ("a.vmdk", "SPARSE", 1, "a-s001.vmdk"),
        ("a.vmdk", "FLAT", 1000, "a-f1000.vmdk"),
        ("a.b.img", "FLAT", None, "a.b.img-flat.vmdk"),
        (".vmdk", "FLAT", None, ".vmdk-flat.vmdk"),
    ],
)
def test_names(main: str, word: str, number: int | None, name: str) -> None:
    assert extent_name(main, word, number) == name


def test_sizes_in_memory_are_small() -> None:
    """The metadata of the largest extent are its directories, not its tables."""
    header = hosted_build.new_extent(2000 * GIB // SECTOR, descriptor=True)
    assert sum(len(content) for _, content in hosted_build.metadata(header)) < 600 * KIB
