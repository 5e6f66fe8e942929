"""
streamOptimized: all layouts, every broken grain, lost tails, and salvage, which must never invent zeros.
"""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nbd_vmdk import Disk, open_disk
from nbd_vmdk.errors import BadField, FormatError, Truncated, Unreadable, Unsupported
from nbd_vmdk.extents.base import Kind
from tests.engine import refused, runs, same, shows, unreadable
from tests.images import cut, desc, pad, peek, poke, stream
from tests.images.content import KIB, MIB, SECTOR, Content
from tests.images.desc import Image
from tests.images.stream import StreamExtent

GRAIN = 64 * KIB
ODD = Content.random(3 * MIB + 7 * SECTOR, seed=1)
WIDE = Content.random(40 * MIB, seed=2, grain=4 * KIB, touched=200)
PARENT = Content.random(3 * MIB, seed=3, density=1.0)
NOISE = Content.of(
    random.Random(1).randbytes(3 * GRAIN) + b"text" * 16384
)  # grains that deflate makes larger
LAYOUTS = ("A", "B", "C", "mixed")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"order": 2},
    {"descriptor_sectors": 1, "text": {"ddb": {"ddb.adapterType": "ide"}}},
    {"grain_sectors": 16, "gtes": 128, "level": 1},
    {"grain_sectors": 1, "gtes": 16},
    {"grain_sectors": 4096, "gtes": 1},
    {"last_grain": "short"},
    {"last_grain": "full"},
    {"progress_every": 2, "metadata_val": False, "all_tables": True},
    {"zeros": "write", "all_tables": False, "overhead": 512},
    {"header": {"version": 1}},
    {"header": {"compress_algorithm": 0}},
    {"header": {"overhead": 0}},
    {"level": 0},
    {"raw_deflate": True},
]


def made(folder: Path, content: Content = ODD, name: str = "disk", **options: Any) -> Image:
    return desc.stream_optimized(str(folder), name, content, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layouts(tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    shows(made(tmp_path, layout=layout, **options))
    shows(made(tmp_path, NOISE, layout=layout, **options))
    if options.get("gtes", 128) >= 128:
        shows(made(tmp_path, WIDE, layout=layout, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_salvage_of_what_is_whole(tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    """Nothing is lost, so holes are holes, and nothing is an error."""
    if layout in {"B", "C"} and options.get("header") == {"overhead": 0}:
        pytest.skip("where the first record should be is not known, so holes can't be proven")
    shows(made(tmp_path, layout=layout, **options), salvage=True)
    if options.get("gtes", 128) >= 128:
        shows(made(tmp_path, WIDE, layout=layout, **options), salvage=True)
    shows(made(tmp_path, Content(10 * MIB), layout=layout, **options), salvage=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_over_a_parent(tmp_path: Path, layout: str) -> None:
    base = made(tmp_path, PARENT, "base", layout=layout)
    shows(made(tmp_path, layout=layout, parent=base))
    shows(made(tmp_path, layout=layout, parent=base), salvage=True)


@pytest.mark.parametrize("layout", ["B", "C"])
@pytest.mark.parametrize("record", ["length", "bare"])
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("grain_sectors", [16, 128, 4096])
def test_records_without_markers(
    tmp_path: Path, layout: str, record: str, raw: bool, grain_sectors: int
) -> None:
    options = {"layout": layout, "record": record, "raw_deflate": raw, "grain_sectors": grain_sectors}
    for content in (ODD, NOISE, Content.of(b"squeeze" * 70000).resized(490 * KIB)):
        shows(made(tmp_path, content, **options))
    error = refused(made(tmp_path, **options).path, Unsupported, salvage=True)
    assert "markers" in str(error)


def test_compression_that_only_the_algorithm_tells(tmp_path: Path) -> None:
    """Neither bit 16 nor 17, but markers before the grains all the same."""
    for layout in ("B", "C"):
        shows(made(tmp_path, layout=layout, header={"flags": 1 if layout == "B" else 3}))


def test_entries_of_zeros(tmp_path: Path) -> None:
    """Value 1 is zeros, and no sign of a file that is cut off."""
    base = made(tmp_path, Content.of(b"p" * 3 * MIB), "base")
    for layout in LAYOUTS:
        content = Content(3 * MIB).put(0, b"x" * GRAIN)
        image = made(tmp_path, content, layout=layout, parent=base, header={"flags": 0x30005})
        extent = image.stream()
        poke(extent.path, extent.gte_at(2), struct.pack("<I", 1))
        shows(image, image.visible.zero(2 * GRAIN, GRAIN))
        poke(extent.path, extent.gte_at(0), struct.pack("<I", 1))
        shows(image, base.content.zero(0, GRAIN).zero(2 * GRAIN, GRAIN))
        base = made(tmp_path, Content.of(b"p" * 3 * MIB), "base")


def test_runs_of_packed_grains(tmp_path: Path) -> None:
    content = Content(3 * MIB).put(0, b"x" * 5 * GRAIN).put(2 * MIB, b"y" * MIB)
    image = made(tmp_path, content, order=4)
    with open_disk(image.path) as disk:
        found = [(run.offset, run.length, run.kind, run.at) for run in runs(disk, content)]
        assert disk.preferred_block == GRAIN
    assert found == [
        (0, 5 * GRAIN, Kind.PACKED, None),
        (5 * GRAIN, 2 * MIB - 5 * GRAIN, Kind.HOLE, None),
        (2 * MIB, MIB, Kind.PACKED, None),
    ]


# Broken grains


HARMS: list[stream.Damage] = [
    "lba",
    "bits",
    "adler",
    "header",
    "truncated",
    "huge",
    "short",
    "empty",
    "bomb",
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("harm", HARMS)
def test_a_broken_grain(tmp_path: Path, layout: str, harm: stream.Damage, raw: bool) -> None:
    """One grain can't be read, however little of it is asked for; all others can."""
    if raw and harm in {"bits", "adler", "header"}:
        pytest.skip("bare deflate has no checksum, and no header")
    whole = Content.random(MIB + 3 * SECTOR, seed=5, density=1.0).zero(0, MIB // 2)
    content = Content.of(whole.put(3 * GRAIN, b"0123456789abcdef" * 4096).read())
    image = made(tmp_path, content, layout=layout, raw_deflate=raw, zeros="write", broken={3: harm})
    for salvage in (False, True):
        with open_disk(image.path, salvage=salvage) as disk:
            for offset, length in ((3 * GRAIN, 1), (4 * GRAIN - 1, 1), (3 * GRAIN - 1, 2), (0, disk.size)):
                unreadable(disk, offset, length)
            same(disk.pread(3 * GRAIN, 0), content.read(0, 3 * GRAIN))
            same(disk.pread(disk.size - 4 * GRAIN, 4 * GRAIN), content.read(4 * GRAIN))
            assert sum(run.length for run in disk.runs()) == disk.size


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    content = Content.of(b"0123456789abcdef" * 8192)
    texts = {
        "lba": "marker is for guest sector 128",
        "adler": "incorrect data check",
        "huge": "compressed size 4294967295",
        "short": "inflates to 32768 bytes only",
        "bomb": "inflates to more than 65536",
    }
    for harm, part in texts.items():
        image = made(tmp_path, content, broken={0: harm})
        with open_disk(image.path) as disk:
            error = unreadable(disk, 0, 1)
        assert isinstance(error, Unreadable)
        assert part in str(error)
        assert "guest bytes 0+65536" in str(error)


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    image = made(tmp_path, broken=dict.fromkeys(range(49), "bomb"))
    with open_disk(image.path) as disk:
        first = next(run for run in disk.runs() if run.kind is Kind.PACKED)
        tracemalloc.start()
        try:
            unreadable(disk, first.offset, 1)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < MIB


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [2, 21, 0x7FFFFFFF, 0xFFFFFFFF])
def test_bad_entries(tmp_path: Path, layout: str, value: int) -> None:
    content = Content.of(b"0123456789abcdef" * 16384)
    image = made(tmp_path, content, layout=layout)
    extent = image.stream()
    poke(extent.path, extent.gte_at(1), struct.pack("<I", value))
    if value > 2**30 and layout in {"B", "C"}:
        # There is no telling from a file that was cut off.
        assert "--salvage" in str(refused(image.path, Truncated).hint)
    else:
        with open_disk(image.path) as disk:
            unreadable(disk, GRAIN, 1)
            unreadable(disk, 0, disk.size)
            same(disk.pread(GRAIN, 0), content.read(0, GRAIN))
            same(disk.pread(2 * GRAIN, 2 * GRAIN), content.read(2 * GRAIN))
    shows(image, salvage=True)  # the record itself is whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_directory_entries(tmp_path: Path, layout: str) -> None:
    image = made(tmp_path, WIDE, layout=layout)
    extent = image.stream()
    poke(extent.path, extent.gde_at(0), struct.pack("<I", 0xFFFFFFF0))
    if layout == "C":
        shows(image)  # which has a second directory
    else:
        with open_disk(image.path) as disk:
            unreadable(disk, 0, 1)
            same(disk.pread(8 * MIB, 32 * MIB), WIDE.read(32 * MIB))
    with open_disk(image.path, salvage=True) as disk:
        lost = check_sound(disk, WIDE)
        # Directly behind damaged tables, and named by none, its place may be damaged as well.
        doubtful = {next(iter(extent.records))} if layout == "B" else set()
        for grain in extent.records.keys() - doubtful:
            assert grain * GRAIN not in lost


# Ends


@pytest.mark.parametrize("footer", ["none", "zeroed", "lost"])
def test_a_lost_footer(tmp_path: Path, footer: stream.FooterState) -> None:
    """Refused with a hint at --salvage, which finds all there is: directory and tables are whole."""
    image = made(tmp_path, footer=footer)
    error = refused(image.path, FormatError)
    assert "footer" in str(error)
    assert error.hint is not None
    assert "--salvage" in error.hint
    shows(image, salvage=True)


def test_a_first_header_that_knows_needs_no_footer(tmp_path: Path) -> None:
    shows(made(tmp_path, layout="mixed", footer="none"))
    shows(made(tmp_path, layout="mixed", footer="none"), salvage=True)
    error = refused(made(tmp_path, layout="mixed", footer="lost").path, BadField)
    assert "--salvage" in str(error.hint)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trailing", [1, 511, SECTOR, 7 * SECTOR, 700 * KIB + 100, MIB - 3 * SECTOR])
def test_padding(tmp_path: Path, layout: str, trailing: int) -> None:
    """Slack of a tar, or zeros that an export put behind the end."""
    shows(made(tmp_path, layout=layout, trailing=trailing))
    shows(made(tmp_path, layout=layout, trailing=trailing), salvage=True)


def test_a_footer_too_far_from_the_end(tmp_path: Path) -> None:
    image = made(tmp_path, trailing=MIB)
    assert "--salvage" in str(refused(image.path, Truncated).hint)
    shows(image, salvage=True)


def test_without_the_end_of_stream(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        shows(made(tmp_path, layout=layout, eos=False))
        shows(made(tmp_path, layout=layout, eos=False), salvage=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("capacity", 12345),
        ("grain_size", 64),
        ("grain_size", 1 << 21),
        ("grain_size", 3),
        ("gtes_per_gt", 1024),
        ("version", 9),
        ("gd_offset", 2**64 - 1),
        ("gd_offset", 2**40),
        ("flags", 0xF0030001),
    ],
)
def test_a_footer_of_something_else(tmp_path: Path, field: str, value: int) -> None:
    image = made(tmp_path)
    extent = image.stream()
    assert extent.footer_sector is not None
    head = stream.Header.unpack(peek(extent.path, extent.footer_sector * SECTOR, SECTOR))
    poke(extent.path, extent.footer_sector * SECTOR, stream.replace(head, **{field: value}).pack())
    assert "--salvage" in str(refused(image.path, FormatError).hint)
    shows(image, salvage=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_directory_among_zeros(tmp_path: Path, layout: str) -> None:
    """A directory that is read from the padding of the descriptor would say that the disk is empty.

    QEMU's files have a second one.  No file with grains may be taken for a new one, to be written to.
    """
    content = Content.random(3 * MIB, seed=3)
    image = made(tmp_path, content, layout=layout)
    footer = image.stream().footer_sector
    poke(image.path, (footer or 0) * SECTOR + 56, struct.pack("<Q", 15))
    before = Path(image.path).read_bytes()
    if layout == "C":
        shows(image)
        return
    for writable in (False, True):
        with pytest.raises(BadField, match="gdOffset") as caught:
            open_disk(image.path, writable=writable)
        assert "--salvage" in str(caught.value.hint)
    assert Path(image.path).read_bytes() == before
    if layout != "B":  # without markers before its tables what no record tells of is lost
        shows(image, salvage=True)


def test_a_directory_of_zeros_is_that_of_a_new_disk_only_in_its_place(tmp_path: Path) -> None:
    """Grains that no footer bears out are cut off by a crash; what a new disk says of itself is then true."""
    image = made(tmp_path, Content(3 * MIB))
    extent = image.stream()
    with open_disk(image.path, writable=True) as disk:
        assert disk.writable
    # The first grain, of which only the beginning came to the disk, before the first flush.
    start = extent.header.overhead * SECTOR
    record = struct.pack("<QI", 0, 400) + b"x" * 400
    poke(image.path, start, record)
    with open_disk(image.path, writable=True) as disk:
        assert disk.writable
        assert not any(disk.pread(disk.size, 0))


def test_a_footer_overrides_the_first_header(tmp_path: Path) -> None:
    image = made(tmp_path, layout="mixed")
    poke(image.path, 56, struct.pack("<Q", 5))
    shows(image)


def test_surplus_tables(tmp_path: Path) -> None:
    """Some exports write one more table than the directory has, empty, before it or behind it."""
    for surplus in (1, 3):
        image = made(tmp_path, layout="A")
        extent = image.stream()
        at = (extent.gd_sector - 1) * SECTOR
        rest = peek(image.path, at, os.path.getsize(image.path))
        more = (stream.marker(stream.GT, 4) + bytes(4 * SECTOR)) * surplus
        cut(image.path, at)
        poke(image.path, at, more + rest)
        assert extent.footer_sector is not None
        moved = extent.footer_sector * SECTOR + len(more) + 56
        poke(image.path, moved, struct.pack("<Q", extent.gd_sector + len(more) // SECTOR))
        shows(image)
        shows(image, salvage=True)


def test_a_capacity_of_one_table_and_many_entries(tmp_path: Path) -> None:
    """A table for 32 MiB of a disk of one sector."""
    for layout in LAYOUTS:
        shows(made(tmp_path, Content.of(b"!" * SECTOR), layout=layout))


def test_grains_too_large_to_inflate(tmp_path: Path) -> None:
    image = made(tmp_path, Content(MIB), grain_sectors=1 << 17)
    refused(image.path, Unsupported)
    refused(image.path, Unsupported, salvage=True)


# Cut off


def kept(extent: StreamExtent, size: int) -> list[int]:
    """The grains whose records are whole in the first `size` bytes of the file."""
    return [
        grain for grain, record in extent.records.items() if record.sector * SECTOR + 12 + record.size <= size
    ]


def check_sound(disk: Disk, content: Content, step: int = GRAIN) -> list[int]:
    """Every piece is right or an error, and told as such by the runs; the starts of those that are errors."""
    lost = []
    for at in range(0, content.size, step):
        length = min(step, content.size - at)
        try:
            found = disk.pread(length, at)
        except FormatError:  # told to a client as EIO
            lost.append(at)
            continue
        same(found, content.read(at, length), at)
    runs(disk, content)
    return lost


def sound_or_refused(path: str, content: Content) -> str | None:
    """Read a damaged file without salvage; the hint if it is refused."""
    try:
        disk = open_disk(path)
    except FormatError as error:
        return error.hint or "no hint"
    with disk:
        check_sound(disk, content)
    return None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", [None, 3])
def test_cut_off(tmp_path: Path, layout: str, order: int | None) -> None:
    """Refused, or read but for the end; salvage has every grain that is whole."""
    content = Content.random(2 * MIB + SECTOR, seed=7)
    content.put(MIB, b"sector" * 10000).put(2 * MIB, b"end!" * 128)
    image = made(tmp_path, content, layout=layout, order=order, gtes=8)
    extent = image.stream()
    content = extent.content
    edges = {SECTOR * (record.sector + record.sectors) for record in extent.records.values()}
    edges |= {SECTOR * sector for sector, _kind in extent.markers}
    for size in sorted(
        {edge + more for edge in edges for more in (-SECTOR, -1, 0, 12, SECTOR)}, reverse=True
    ):
        if not 60 * SECTOR <= size < os.path.getsize(image.path):
            continue
        cut(image.path, size)
        whole = set(kept(extent, size))
        hint = sound_or_refused(image.path, content)
        assert hint is None or "--salvage" in hint
        if size <= min(record.sector for record in extent.records.values()) * SECTOR:
            continue
        with open_disk(image.path, salvage=True) as disk:
            lost = {at // GRAIN for at in check_sound(disk, content)}
        assert not lost & whole
        assert lost >= set(extent.records) - whole


def test_nothing_but_a_beginning(tmp_path: Path) -> None:
    image = made(tmp_path)
    for size in (128 * SECTOR, 21 * SECTOR, 600, 100):
        cut(image.path, size)
        refused(image.path, FormatError)
        try:
            disk = open_disk(image.path, salvage=True)
        except FormatError:
            continue
        with disk:
            assert len(check_sound(disk, image.content)) == -(-ODD.size // GRAIN)


def test_salvage_tells_what_is_lost(tmp_path: Path) -> None:
    content = Content.of(random.Random(1).randbytes(8 * GRAIN)).resized(64 * MIB).put(63 * MIB, b"last")
    image = made(tmp_path, content)
    extent = image.stream()
    cut(image.path, extent.grain_at(5))
    with open_disk(image.path, salvage=True) as disk:
        assert [(run.offset, run.kind) for run in runs(disk, extent.content)] == [
            (0, Kind.PACKED),
            (5 * GRAIN, Kind.LOST),
        ]
        error = unreadable(disk, 6 * GRAIN + 5, 10)
        assert str(6 * GRAIN + 5) in str(error)
        assert "lost" in str(error)


def test_empty_tables_between_whole_ones_are_known(tmp_path: Path) -> None:
    """Of a download that broke off, all before the last table's end is as good as ever."""
    content = Content(200 * MIB)
    for table in (0, 2, 3, 5):
        content.put(table * 32 * MIB + MIB, bytes([table + 1]) * GRAIN)
    extent = made(tmp_path, content).stream()
    path = extent.path
    cut(path, extent.markers[2][0] * SECTOR + 5 * SECTOR)  # behind the third table
    with open_disk(path, salvage=True) as disk:
        found = [(run.kind, run.offset) for run in runs(disk, extent.content) if run.kind is not Kind.PACKED]
        same(disk.pread(4 * 32 * MIB, 0), extent.content.read(0, 4 * 32 * MIB))
    assert found[-1] == (Kind.LOST, 4 * 32 * MIB)
    assert {kind for kind, _ in found[:-1]} == {Kind.HOLE}


# Salvage of anything


@st.composite
def harms(draw: st.DrawFn) -> dict[str, Any]:
    """One place of a stream that is cut off or overwritten, as fractions of what there is."""
    kind = draw(st.sampled_from(["cut", "zeros", "ones", "noise", "elsewhere", "flip", "field"]))
    return {
        "kind": kind,
        "at": draw(st.floats(0, 1)),
        "length": draw(st.sampled_from([1, 2, 7, 12, 100, 512, 513, 4096, 20000, 100000])),
        "align": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@st.composite
def streams(draw: st.DrawFn) -> tuple[Content, dict[str, Any]]:
    grain = draw(st.sampled_from([8, 16, 128]))
    grains = draw(st.integers(1, 60))
    sectors = grains * grain - draw(st.integers(0, grain - 1))
    content = Content.random(
        sectors * SECTOR,
        seed=draw(st.integers(0, 50)),
        density=draw(st.sampled_from([0.2, 0.7, 1.0])),
        grain=grain * SECTOR,
    )
    options: dict[str, Any] = {
        "layout": draw(st.sampled_from(LAYOUTS)),
        "grain_sectors": grain,
        "gtes": draw(st.sampled_from([1, 4, 16, 512])),
        "order": draw(st.sampled_from([None, None, 1])),
        "progress_every": draw(st.sampled_from([0, 0, 3])),
        "level": draw(st.sampled_from([0, 6])),
        "last_grain": draw(st.sampled_from([None, "short"])),
    }
    return content, options


def harm(path: str, first: int, what: dict[str, Any], extent: StreamExtent) -> None:
    """Damage a file behind its byte `first`."""
    size = os.path.getsize(path)
    at = first + int(what["at"] * max(size - first - 1, 0))
    if what["align"]:
        at = max(first, at // SECTOR * SECTOR)
    length = min(what["length"], size - at)
    rng = random.Random(what["seed"])
    match what["kind"]:
        case "cut":
            cut(path, at)
        case "zeros":
            poke(path, at, bytes(length))
        case "ones":
            poke(path, at, b"\xff" * length)
        case "noise":
            poke(path, at, rng.randbytes(length))
        case "elsewhere":
            source = rng.randrange(size // SECTOR) * SECTOR
            poke(path, at // SECTOR * SECTOR, peek(path, source, min(length, 4 * KIB)))
        case "flip":
            poke(path, at, bytes([peek(path, at, 1)[0] ^ 1 << rng.randrange(8)]))
        case "field" if extent.records:
            # A bit of a record's place or size: what sums can't find.
            record = rng.choice(list(extent.records.values()))
            at = record.sector * SECTOR + rng.randrange(12)
            poke(path, at, bytes([peek(path, at, 1)[0] ^ 1 << rng.randrange(8)]))


SEARCH = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@SEARCH
@given(made_of=streams(), what=harms())
@example(  # a size that leads over the next record
    made_of=(
        Content.of(b"a" * 8 * SECTOR + b"b" * 8 * SECTOR + b"c" * 8 * SECTOR),
        {"layout": "B", "grain_sectors": 8, "gtes": 4},
    ),
    what={"kind": "field", "at": 0.0, "length": 1, "align": False, "seed": 0},
)
def test_salvage_is_right_or_says_so(
    tmp_path: Path, made_of: tuple[Content, dict[str, Any]], what: dict[str, Any]
) -> None:
    """
    Whatever single place of a stream is cut or overwritten behind its header: what is read is right.

    Grains that no damage touched are all there, unless a record's own place or size was changed.
    """
    content, options = made_of
    if what["kind"] == "elsewhere":
        # Of texts that are stored as they are Adler-32 notices little; and a page may hold whole tables.
        options = options | {"level": 6, "gtes": max(options["gtes"], 4)}
    image = made(tmp_path, content, **options)
    extent = image.stream()
    before = peek(image.path, 0, os.path.getsize(image.path))
    harm(image.path, 21 * SECTOR, what, extent)
    after = peek(image.path, 0, len(before))
    step = options["grain_sectors"] * SECTOR
    try:
        disk = open_disk(image.path, salvage=True)
    except FormatError:
        assert what["kind"] == "cut" or len(extent.records) <= 1
        return
    with disk:
        lost = {at // step for at in check_sound(disk, extent.content, step)}
    if what["kind"] in {"cut", "zeros", "ones", "noise"}:
        first = min((record.sector for record in extent.records.values()), default=0) * SECTOR
        if after[:first] != before[:first] and options["layout"] in {"B", "C"}:
            return  # what damaged a table may have damaged the place of the record behind it
        for grain, record in extent.records.items():
            start, end = record.sector * SECTOR, record.sector * SECTOR + 12 + record.size
            if after[start:end] == before[start:end]:
                assert grain not in lost, f"grain {grain} is whole in the file"


@SEARCH
@given(made_of=streams(), at=st.floats(0, 1))
def test_a_cut_stream_is_refused_or_right(
    tmp_path: Path, made_of: tuple[Content, dict[str, Any]], at: float
) -> None:
    """Without --salvage, too: no cut turns data into zeros."""
    content, options = made_of
    image = made(tmp_path, content, **options)
    cut(image.path, int(at * os.path.getsize(image.path)))
    sound_or_refused(image.path, image.content)


def test_padded_images_are_whole(tmp_path: Path) -> None:
    """Rounding up to a device's blocks is no damage."""
    for layout in LAYOUTS:
        image = made(tmp_path, layout=layout)
        pad(image.path, -os.path.getsize(image.path) % (64 * KIB))
        shows(image)
        shows(image, salvage=True)


def test_which_grains_are_kept(tmp_path: Path) -> None:
    """What small requests inflate and what is asked for ahead stays; not the whole grains of a large one."""
    content = Content.random(16 * GRAIN, seed=4, density=1.0)
    with open_disk(made(tmp_path, content).path) as disk:

        def kept() -> set[int]:
            return set(disk.links[0].extents[0].extent._inflater._grains.young)

        same(disk.pread(4 * GRAIN, GRAIN + 4 * KIB), content.read(GRAIN + 4 * KIB, 4 * GRAIN))
        assert kept() == {1, 5}  # the ends, which the next request may begin or have begun with
        same(disk.pread(GRAIN, 7 * GRAIN), content.read(7 * GRAIN, GRAIN))
        same(disk.pread(4 * KIB, 9 * GRAIN), content.read(9 * GRAIN, 4 * KIB))
        assert kept() == {1, 5, 7, 9}
        disk.cache(3 * GRAIN, 11 * GRAIN)
        assert kept() == {1, 5, 7, 9, 11, 12, 13}
        same(disk.pread(16 * GRAIN, 0), content.read(0, 16 * GRAIN))
