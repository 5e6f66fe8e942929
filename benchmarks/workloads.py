"""What is measured: every workload with its image, its client, its pattern and its targets.  Only data.

Names read as image/pattern: ``sparse/r4k-d16`` is random reads of 4 KiB at depth 16 on a hosted sparse image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks.servers import EMPTY, LEAST, OURS, QEMU, RAW
from benchmarks.targets import AtMost, Either, OfOwn, Target, Times
from nbd_vmdk.units import GIB, KIB, MIB

# Clients (clients.py runs them).


@dataclass(frozen=True)
class Fio:
    """fio's nbd engine.  Without ``amount`` for a fixed time, with it until so many bytes are done."""

    rw: str
    block: int
    depth: int
    connections: int = 1
    region: int | None = None  # bytes from the start of the disk, read once before; default: all
    amount: int | None = None
    flush_every: int = 0  # requests

    @property
    def writes(self) -> bool:
        """Whether it writes; then it ends with a flush that counts."""
        return "write" in self.rw or self.rw == "randrw"


@dataclass(frozen=True)
class Fua:
    """Writes of 4 KiB, each durable before the next: libnbd, because fio's engine knows no FUA."""

    writes: bool = True


@dataclass(frozen=True)
class CopyOut:
    """nbdcopy of the whole disk to nowhere."""

    writes: bool = False


@dataclass(frozen=True)
class CopyIn:
    """nbdcopy of a raw file, by the name of its image, into the whole disk, flushed."""

    source: str
    writes: bool = True


@dataclass(frozen=True)
class Map:
    """nbdinfo --map."""

    writes: bool = False


@dataclass(frozen=True)
class FirstByte:
    """From starting the server to one sector read through libnbd."""

    writes: bool = False


Client = Fio | Fua | CopyOut | CopyIn | Map | FirstByte


@dataclass(frozen=True)
class Workload:
    """One row of the report, or several where ``targets`` names more measures than the first.

    ``targets`` maps measures to bars; the first measure is what the workload is about.  ``place`` is where
    the files are: "disk" or "tmpfs".  ``keep`` has each server keep its copy of a written image for all
    rounds instead of getting a fresh one for each.  ``workers`` is the number of processes that ours has.
    """

    name: str
    title: str
    group: str
    image: str
    client: Client
    targets: dict[str, Sequence[Target]]
    servers: tuple[str, ...] = (OURS, *QEMU, RAW)
    place: str = "disk"
    cold: bool = False
    keep: bool = False
    workers: int = 1
    quick: bool = False  # part of a QUICK run
    headline: str = field(default="")  # its name in the chart, if it is one of those shown there


DEPTH_READS = "Random and sequential reads, in the page cache"
STREAM = "streamOptimized (compressed) reads"
CHAINS = "Chains of snapshots"
COLD = "Cold reads, page cache dropped"
TMPFS = "Writes on tmpfs, each run ending with a flush"
DISK = "Writes on disk, each run ending with a flush"
COPY = "Copies of a whole 512 MiB image"
MAPS = "nbdinfo --map of 2000 GiB"
OPEN = "Opening: start to first byte, and memory"

GROUPS = (DEPTH_READS, STREAM, CHAINS, COLD, TMPFS, DISK, COPY, MAPS, OPEN)

#: Servers of a row that is held to a bar and has a raw twin.  Elsewhere the least of Python is not measured:
#: it is there to judge bars by, and each server makes the run longer.
_HELD = (OURS, *QEMU, RAW, LEAST)


#: Servers of the compressed images.  Noise is stored as it is, near enough, so that the limit of it is that
#: of the same bytes in a raw file; what text costs is inflating it, which no raw file asks for.
_STREAMS = {"stream-noise": _HELD, "stream-text": (OURS, *QEMU)}


def _servers(targets: dict[str, Sequence[Target]]) -> tuple[str, ...]:
    return _HELD if any(targets.values()) else (OURS, *QEMU, RAW)


# Patterns.

_R4K_D1 = Fio("randread", 4 * KIB, 1)
_R4K_D16 = Fio("randread", 4 * KIB, 16)
_R4K_4C = Fio("randread", 4 * KIB, 4, connections=4)
_R64K_D8 = Fio("randread", 64 * KIB, 8)
_S1M_D4 = Fio("read", MIB, 4)

_PATTERNS: dict[str, tuple[str, Fio]] = {
    "r4k-d1": ("4 KiB random, depth 1", _R4K_D1),
    "r4k-d16": ("4 KiB random, depth 16", _R4K_D16),
    "r4k-4conn": ("4 KiB random, 4 connections of depth 4", _R4K_4C),
    "r64k-d8": ("64 KiB random, depth 8", _R64K_D8),
    "s1m-d4": ("1 MiB sequential, depth 4", _S1M_D4),
}
#: The targets of plain images; the ratio of a cost is "times cheaper", so "at most 1.25 of" is "0.8 times".
_PLAIN: dict[str, dict[str, Sequence[Target]]] = {
    "r4k-d1": {"iops": (Times("qemu", 1.3), Times("raw", 0.9))},
    "r4k-d16": {
        "iops": (Times("qemu", 1.0), Times("raw", 0.9)),
        "p99_us": (Times("qemu", 1.0),),
        "cpu_us": (Times("qemu", 1.0), Times("raw", 0.8)),
    },
    "r4k-4conn": {"iops": (Times("qemu", 1.0), Times("raw", 0.9))},
    "r64k-d8": {"iops": (Times("qemu", 1.0), Times("raw", 0.85))},
    "s1m-d4": {"mibps": (Times("qemu", 2.0), Times("raw", 0.95))},
}
_KINDS = {
    "flat": "flat",
    "sparse": "hosted sparse",
    "split": "split sparse",
    "cowd": "COWD",
    "sesparse": "seSparse",
    "stream-noise": "stream of noise",
    "stream-text": "stream of text",
    "chain8": "chain of 8",
    "chain32": "chain of 32",
}
_HEADLINES = {
    "flat/r4k-d1": "4 KiB random reads, flat",
    "sparse/r4k-d1": "4 KiB random reads, sparse",
    "sparse/r4k-d16": "4 KiB random reads, sparse, 16 at once",
    "sparse/s1m-d4": "1 MiB sequential reads, sparse",
    "stream-noise/s1m-d4": "Sequential reads, compressed noise",
    "stream-text/s1m-d4": "Sequential reads, compressed text",
    "stream-text/r4k-d16": "4 KiB random reads, compressed text",
    "chain32/r4k-d16": "4 KiB random reads, chain of 32",
}
_QUICK = {"sparse/r4k-d1", "sparse/r4k-d16", "sparse/s1m-d4", "stream-text/s1m-d4", "chain32/r4k-d16"}

#: Processes in the rows of many connections that are for what several give.
_WORKERS = 2

_MAIN = {"s1m-d4": "mibps"}


def _reading(
    kind: str, pattern: str, group: str, targets: dict[str, Sequence[Target]], raw: bool = True
) -> Workload:
    name = f"{kind}/{pattern}"
    title, client = _PATTERNS[pattern]
    return Workload(
        name,
        f"{_KINDS[kind]}: {title}",
        group,
        kind,
        client,
        targets or {_MAIN.get(pattern, "iops"): ()},
        servers=_servers(targets) if raw else (OURS, *QEMU),
        quick=name in _QUICK,
        headline=_HEADLINES.get(name, ""),
    )


def _reads() -> list[Workload]:
    rows = []
    for kind in ("flat", "sparse", "split"):
        rows += [_reading(kind, p, DEPTH_READS, _PLAIN[p]) for p in _PLAIN]
        several = _reading(kind, "r4k-4conn", DEPTH_READS, _PLAIN["r4k-4conn"])
        rows.append(
            replace(
                several,
                name=f"{several.name}-workers",
                title=f"{several.title}, ours with --workers {_WORKERS}",
                # The least plugin would be one process, and say nothing of what any Python plugin can do.
                servers=(OURS, *QEMU, RAW),
                workers=_WORKERS,
            )
        )
    rows += [
        _reading(kind, p, DEPTH_READS, {})
        for kind in ("cowd", "sesparse")
        for p in _PLAIN
        if p != "r4k-4conn"
    ]
    for kind, servers in _STREAMS.items():
        raw = RAW in servers
        for pattern in ("r4k-d1", "r4k-d16", "r64k-d8"):
            rows.append(_reading(kind, pattern, STREAM, {"iops": (Times("qemu", 2.0),)}, raw))
        rows.append(_reading(kind, "s1m-d4", STREAM, {"mibps": (Times("qemu", 3.0),)}, raw))
        for pattern in ("r4k-d16", "r64k-d8"):
            title, client = _PATTERNS[pattern]
            rows.append(
                Workload(
                    f"{kind}/{pattern}-cached",
                    f"{_KINDS[kind]}: {title}, inside 32 MiB",
                    STREAM,
                    kind,
                    Fio(client.rw, client.block, client.depth, region=32 * MIB),
                    {"iops": (Times("qemu", 5.0),)},
                    servers,
                )
            )
    for kind in ("chain8", "chain32"):
        for pattern in ("r4k-d1", "r4k-d16", "r64k-d8", "s1m-d4"):
            held = kind == "chain32" and pattern != "s1m-d4"
            bars = (Times("qemu", 3.0), OfOwn(f"sparse/{pattern}", 0.8)) if held else ()
            rows.append(_reading(kind, pattern, CHAINS, {_MAIN.get(pattern, "iops"): bars}))
    return rows


def _cold() -> list[Workload]:
    whole = Fio("read", MIB, 4, amount=512 * MIB)
    return [
        Workload(
            "cold/sparse-s1m",
            "hosted sparse: 1 MiB sequential",
            COLD,
            "sparse",
            whole,
            {"mibps": ()},
            cold=True,
        ),
        Workload(
            "cold/sparse-r4k",
            "hosted sparse: 4 KiB random, depth 16",
            COLD,
            "sparse",
            Fio("randread", 4 * KIB, 16, amount=32 * MIB),
            {"iops": ()},
            cold=True,
        ),
        Workload(
            "cold/stream-text-s1m",
            "stream of text: 1 MiB sequential",
            COLD,
            "stream-text",
            whole,
            {"mibps": ()},
            servers=(OURS, *QEMU),
            cold=True,
        ),
    ]


# Writes: (name, title, image, client, targets).

_ALLOCATING = Either(Times("qemu", 5.0), Times("raw", 0.8))
_WRITES: list[tuple[str, str, str, Client, dict[str, Sequence[Target]]]] = [
    (
        "a4k",
        "4 KiB random writes to new space, depth 16",
        "empty-16g",
        Fio("randwrite", 4 * KIB, 16, amount=128 * MIB),
        {"iops": (Times("qemu", 3.5), Times("raw", 0.75))},
    ),
    (
        "a4k-flush",
        "4 KiB random writes to new space, a flush each 32",
        "empty-16g",
        Fio("randwrite", 4 * KIB, 16, amount=32 * MIB, flush_every=32),
        {"iops": (Times("qemu", 1.7), Times("raw", 0.8))},
    ),
    (
        "a64k",
        "64 KiB sequential writes to new space, depth 8",
        "empty-16g",
        Fio("write", 64 * KIB, 8, amount=512 * MIB),
        {"mibps": (_ALLOCATING,)},
    ),
    (
        "a64k-flush",
        "64 KiB sequential writes to new space, a flush each 32",
        "empty-16g",
        Fio("write", 64 * KIB, 8, amount=256 * MIB, flush_every=32),
        {"mibps": ()},
    ),
    (
        "a1m",
        "1 MiB sequential writes to new space, depth 4",
        "empty-16g",
        Fio("write", MIB, 4, amount=GIB),
        {"mibps": (_ALLOCATING,)},
    ),
    (
        "a1m-flush",
        "1 MiB sequential writes to new space, a flush each 32",
        "empty-16g",
        Fio("write", MIB, 4, amount=512 * MIB, flush_every=32),
        {"mibps": ()},
    ),
    ("fua-new", "4 KiB FUA writes to new space", "empty-16g", Fua(), {"iops": (Times("qemu", 1.5),)}),
    ("fua", "4 KiB FUA writes over data", "full", Fua(), {"iops": (Times("qemu", 1.5),)}),
    (
        "cow",
        "4 KiB random writes to an empty child of a full base",
        "child",
        Fio("randwrite", 4 * KIB, 16, amount=12 * MIB),
        {"iops": (Times("qemu", 1.5),)},
    ),
    (
        "mixed",
        "4 KiB random over data, 70 reads to 30 writes, depth 16",
        "full",
        Fio("randrw", 4 * KIB, 16, amount=256 * MIB),
        {"iops": (Times("qemu", 1.5),)},
    ),
    (
        "over4k",
        "4 KiB random writes over data, depth 16",
        "full",
        Fio("randwrite", 4 * KIB, 16, amount=128 * MIB),
        {"iops": (Times("qemu", 3.0), Times("raw", 0.85))},
    ),
]
_WRITE_HEADLINES = {
    "disk/a4k": "4 KiB random writes to new space",
    "disk/a4k-flush": "4 KiB random writes, flushed each 32",
    "disk/a64k": "64 KiB sequential writes to new space",
    "disk/a1m": "1 MiB sequential writes to new space",
    "disk/over4k": "4 KiB random writes over data",
    "disk/cow": "4 KiB writes to a new snapshot",
}
_QUICK_WRITES = {"tmpfs/a4k", "tmpfs/a4k-flush", "tmpfs/a1m"}


def _writes() -> list[Workload]:
    return [
        Workload(
            f"{place}/{name}",
            title,
            group,
            image,
            client,
            targets,
            # There is no raw twin of a child: its parent's bytes are what it copies.
            servers=(OURS, *QEMU) if image == "child" else _servers(targets),
            place=place,
            keep=image == "full" and place == "disk",
            quick=f"{place}/{name}" in _QUICK_WRITES,
            headline=_WRITE_HEADLINES.get(f"{place}/{name}", ""),
        )
        for place, group in (("tmpfs", TMPFS), ("disk", DISK))
        for name, title, image, client, targets in _WRITES
    ]


def _whole() -> list[Workload]:
    """Whole disks: copied, mapped, opened."""
    nothing_more = (OURS, *QEMU)
    opening = (OURS, *QEMU, EMPTY)

    def opened(
        name: str, title: str, image: str, limit: float, quick: bool = False, headline: str = ""
    ) -> Workload:
        targets: dict[str, Sequence[Target]] = {
            "first_byte_ms": (AtMost(limit, "ms", above="empty"),),
            "resident_mib": (AtMost(40, "MiB"),),
        }
        return Workload(
            f"open/{name}", title, OPEN, image, FirstByte(), targets, opening, quick=quick, headline=headline
        )

    return [
        Workload(
            "copy/out-sparse",
            "nbdcopy out of hosted sparse",
            COPY,
            "sparse",
            CopyOut(),
            {"seconds": (Times("qemu", 1.2),)},
            _HELD,
            quick=True,
            headline="nbdcopy out of sparse",
        ),
        *(
            Workload(
                f"copy/out-{kind}",
                f"nbdcopy out of {_KINDS[kind]}",
                COPY,
                kind,
                CopyOut(),
                {"seconds": (Times("qemu", 3.0),)},
                servers,
            )
            for kind, servers in _STREAMS.items()
        ),
        *(
            Workload(
                f"copy/in-{place}",
                f"nbdcopy into a new hosted sparse image on {place}",
                COPY,
                "empty-512m",
                CopyIn("raw-noise"),
                {"seconds": (Times("qemu", 3.0),)},
                _HELD,
                place=place,
                quick=place == "tmpfs",
                headline="nbdcopy into a new sparse image" if place == "disk" else "",
            )
            for place in ("tmpfs", "disk")
        ),
        Workload(
            "map/empty",
            "empty hosted sparse",
            MAPS,
            "2000g-empty",
            Map(),
            {"seconds": (Times("qemu", 50.0),)},
            nothing_more,
            headline="Map of an empty 2000 GiB image",
        ),
        Workload(
            "map/fragmented",
            "hosted sparse in 256 000 fragments",
            MAPS,
            "2000g-fragmented",
            Map(),
            {"seconds": (Times("qemu", 1.0),), "us_per_extent": (AtMost(2, "µs"),)},
            nothing_more,
            headline="Map of a fragmented 2000 GiB image",
        ),
        opened("1g", "1 GiB hosted sparse", "1g", 50, quick=True),
        opened("2000g", "2000 GiB hosted sparse", "2000g", 50),
        opened("2000g-files", "2000 GiB split sparse, 1000 files", "2000g-files", 150),
        opened("64t", "64 TiB seSparse", "64t-sesparse", 50),
    ]


WORKLOADS: tuple[Workload, ...] = (*_reads(), *_cold(), *_writes(), *_whole())
