"""
The arithmetic of the benchmarks' report, with made-up numbers, and that the list of workloads is sound.

Nothing is measured here.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.clients import ClientFailedError, read_fio
from benchmarks.images import _KINDS as IMAGES
from benchmarks.profile_read import place_of, read_stacks, shares
from benchmarks.servers import EMPTY, KINDS, LEAST, OURS, RAW, THREADS, URING
from benchmarks.targets import MEASURES, AtMost, Cell, Either, OfOwn, Target, Times, others
from benchmarks.workloads import GROUPS, WORKLOADS, Fio

RATE = MEASURES["iops"]
COST = MEASURES["seconds"]


def cell(ours: float | None, measure: Any = RATE, **peers: float) -> Cell:
    names = {"threads": THREADS, "uring": URING, "raw": RAW, "least": LEAST, "empty": EMPTY}
    medians = {names[name]: value for name, value in peers.items()}
    return Cell(measure, medians | ({} if ours is None else {OURS: ours}))


# Medians and ratios


def test_median_of_each_server_and_measure() -> None:
    samples = {
        "sparse/r4k-d1": {
            OURS: [{"iops": 10.0, "cpu_us": 3.0}, {"iops": 30.0, "cpu_us": 1.0}, {"iops": 11.0}],
            RAW: [{"iops": 7.0}, {"iops": 9.0}],
        }
    }
    cells = report.cells_of(samples)
    assert cells["sparse/r4k-d1", "iops"].medians == {OURS: 11.0, RAW: 8.0}
    assert cells["sparse/r4k-d1", "cpu_us"].medians == {OURS: 2.0}
    assert ("sparse/r4k-d1", "p99_us") not in cells


def test_ratio_is_that_of_rounds_in_which_both_were() -> None:
    """The machine is slow in the first round and fast in the last; the raw server failed in one."""
    samples = {
        "sparse/r4k-d1": {
            OURS: [{"iops": value, "round": at} for at, value in enumerate((10.0, 40.0, 110.0, 45.0), 1)],
            RAW: [{"iops": 20.0, "round": 1}, {"iops": 100.0, "round": 3}, {"iops": 90.0, "round": 4}],
        }
    }
    cells = report.cells_of(samples)
    found = cells["sparse/r4k-d1", "iops"]
    assert found.medians == {OURS: 42.5, RAW: 90.0}
    assert found.ratio("raw") == 0.5
    assert found.instead("raw").ratio("raw") == 1
    for runs in samples["sparse/r4k-d1"].values():
        for run in runs:
            del run["round"]  # older results: in order
    assert report.cells_of(samples)["sparse/r4k-d1", "iops"].ratio("raw") == 0.5


def test_the_better_setting_of_qemu_counts() -> None:
    assert cell(100, threads=40, uring=50).ratio("qemu") == 2
    assert cell(1.0, COST, threads=4.0, uring=2.0).ratio("qemu") == 2


def test_ratio_says_how_many_times_better_for_costs_too() -> None:
    assert cell(100, raw=50).ratio("raw") == 2
    assert cell(50, COST, raw=100).ratio("raw") == 2


@pytest.mark.parametrize("missing", [cell(None, raw=1), cell(1), cell(0, COST, raw=1), cell(1, raw=0)])
def test_no_ratio_where_a_number_is_missing_or_nothing(missing: Cell) -> None:
    assert missing.ratio("raw") is None


# Targets


def test_times() -> None:
    assert Times("qemu", 1.3).met(cell(130, uring=100), {})
    assert Times("qemu", 1.3).met(cell(129, uring=100), {}) is False
    assert Times("qemu", 1.3).met(cell(130), {}) is None


def test_either_is_met_by_one_and_missed_by_both() -> None:
    target = Either(Times("qemu", 5), Times("raw", 0.8))
    assert target.met(cell(90, uring=50, raw=100), {})
    assert target.met(cell(300, uring=50, raw=1000), {})
    assert target.met(cell(70, uring=50, raw=100), {}) is False
    assert target.met(cell(70, uring=50), {}) is None
    assert target.text == "≥ 5x qemu-nbd or ≥ 0.8x raw"


def test_of_own_looks_at_another_workload() -> None:
    target = OfOwn("sparse/r4k-d16", 0.8)
    cells = {("sparse/r4k-d16", "iops"): cell(100)}
    assert target.met(cell(80), cells)
    assert target.met(cell(79), cells) is False
    assert target.met(cell(80), {}) is None


def test_at_most_alone_and_above_a_peer() -> None:
    first_byte = MEASURES["first_byte_ms"]
    assert AtMost(2, "µs").met(cell(2), {})
    assert AtMost(50, "ms", above="empty").met(cell(99, first_byte, empty=50), {})
    assert AtMost(50, "ms", above="empty").met(cell(101, first_byte, empty=50), {}) is False
    assert AtMost(50, "ms", above="empty").met(cell(101, first_byte), {}) is None


# Others held to our bars


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (Times("qemu", 5), {"raw": False, "least": False}),
        (Times("qemu", 3), {"raw": True, "least": False}),
        (Times("qemu", 2), {"raw": True, "least": True}),
        # raw is the measure here, and would be held to itself.
        (Times("raw", 0.9), {"least": False}),
        (Times("raw", 0.5), {"least": True}),
        (Either(Times("qemu", 5), Times("raw", 0.8)), {"least": False}),
        (Either(Times("qemu", 2), Times("raw", 0.8)), {"least": True}),
        # Another workload of ours says nothing of theirs.
        (OfOwn("sparse/r4k-d16", 0.8), {}),
    ],
)
def test_others_are_held_to_the_bar_in_our_place(target: Target, found: dict[str, bool]) -> None:
    cells = {("sparse/r4k-d16", "iops"): cell(1000)}
    rates = cell(10, threads=50, uring=100, raw=400, least=250)
    costs = cell(1000, COST, threads=20, uring=10, raw=2.5, least=4)
    assert others(target, rates, cells) == found
    assert others(target, costs, cells) == found


def test_others_under_a_limit() -> None:
    costs = cell(9, COST, raw=1, least=3)
    assert others(AtMost(2, "s"), costs, {}) == {"raw": True, "least": False}
    assert others(AtMost(1, "s", above="raw"), costs, {}) == {"least": False}


def test_others_are_not_judged_where_a_number_is_missing() -> None:
    assert others(Times("qemu", 2), cell(1, raw=5, least=5), {}) == {}
    assert others(Times("qemu", 2), cell(1, uring=1), {}) == {}
    assert others(Times("raw", 0.9), cell(1, least=5), {}) == {}
    # They are judged without ours.
    assert others(Times("qemu", 2), cell(None, uring=1, raw=5), {}) == {"raw": True}


# Words


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "/s", "-"),
        (9999, "/s", "9999/s"),
        (104_321, "/s", "104 K/s"),
        (12_345, "/s", "12.3 K/s"),
        (2.5, "MiB/s", "2.50 MiB/s"),
        (2048, "MiB/s", "2.00 GiB/s"),
        (0.0308, "s", "30.8 ms"),
        (6.4, "s", "6.40 s"),
        (4.19, "µs", "4.19 µs"),
    ],
)
def test_quantity(value: float | None, unit: str, text: str) -> None:
    assert report.quantity(value, unit) == text


def test_times_in_words() -> None:
    assert [report.times(value) for value in (None, 0.854, 1.3, 12.34, 312.3)] == [
        "-",
        "0.85x",
        "1.30x",
        "12.3x",
        "312x",
    ]


# The report


@pytest.fixture
def result() -> dict[str, Any]:
    def runs(*values: float, memory: float = 30) -> list[dict[str, float]]:
        return [{"iops": value, "cpu_us": 5.0, "peak_mib": memory} for value in values]

    return {
        "date": "2026-01-02 03:04 UTC",
        "command": "make bench",
        "quick": False,
        "rounds": 3,
        "threads": 8,
        "cache_size": 64 << 20,
        "chart": "benchmarks.png",
        "machine": {"processor": "an abacus, 2 CPUs"},
        "versions": {"nbdkit": "1.32.5"},
        "samples": {
            "sparse/r4k-d1": {
                OURS: runs(117, 130, 143, memory=90),
                THREADS: runs(50, 60, 70),
                URING: runs(90, 100, 110),
                RAW: runs(200, 150, 150),
            },
            "tmpfs/fua": {OURS: runs(12_000)},
        },
        "failures": {"tmpfs/fua": {URING: ["no answer in 20 s"]}},
    }


def test_rows_carry_verdicts(result: dict[str, Any]) -> None:
    rows = report.rows_of(report.cells_of(result["samples"]))
    found = [(row.workload.name, [verdict.word for verdict in row.verdicts]) for row in rows]
    assert found == [("sparse/r4k-d1", ["met", "missed"]), ("tmpfs/fua", ["not measured"])]


def test_table_and_summary(result: dict[str, Any]) -> None:
    text = report.markdown(result)
    row = "| hosted sparse: 4 KiB random, depth 1 | 130/s | 60.0/s | 100/s | 150/s | 1.30x | 0.87x |"
    assert f"{row} ≥ 1.3x qemu-nbd; ≥ 0.9x raw | met; missed |" in text
    # Two of the first workload, one of memory; that of FUA writes has nothing to compare with.
    assert "**2 of 3 targets met.** 1 could not be judged" in text
    assert "- `sparse/r4k-d1`, hosted sparse: 4 KiB random, depth 1: ≥ 0.9x raw (it is 130/s" in text
    assert "- `tmpfs/fua`, qemu-nbd io_uring: no answer in 20 s" in text
    assert "| `sparse/r4k-d1` | 5.00 µs, 90 MiB | 5.00 µs, 30 MiB |" in text
    assert "had resident in any workload: 90 MiB (in `sparse/r4k-d1`). Target: ≤ 104 MiB" in text
    for line in ("2026-01-02 03:04 UTC", "`make bench`", "an abacus", "nbdkit 1.32.5", "(benchmarks.png)"):
        assert line in text


def test_missed_targets_tell_who_else_misses_them(result: dict[str, Any]) -> None:
    def runs(value: float) -> list[dict[str, float]]:
        return [{"iops": value, "cpu_us": 1e6 / value, "peak_mib": 20, "p99_us": 1e8 / value}]

    del result["samples"]["sparse/r4k-d1"], result["samples"]["tmpfs/fua"]
    rates = {THREADS: 80.0, URING: 100.0}
    for name, ours, raw, least in (
        ("flat/r4k-d1", 50, 120, 60),  # asked for: 130 and 108
        ("sparse/r4k-d1", 50, 200, 150),  # 130 and 180
        ("split/r4k-d1", 50, 100, 95),  # 130 and 90
        ("stream-noise/r4k-d16-cached", 499, 500, 499),  # 500
    ):
        served = {OURS: ours, **rates, RAW: raw, LEAST: least}
        result["samples"][name] = {server: runs(value) for server, value in served.items()}
    result["samples"]["stream-text/r4k-d1"] = {OURS: runs(150), URING: runs(100)}
    text = report.markdown(result)
    assert (
        "**1 of 9 targets met.** Of the 8 missed, `nbdkit file` on raw misses 2 of the 4 that it can be held "
        "to, and the least Python plugin misses 5 of the 7 that it can be held to." in text
    )
    standing = [line.partition("(it is ")[2] for line in text.splitlines() if "(it is " in line]
    assert standing[0].startswith("50.0/s, 0.50x qemu-nbd, 0.42x raw, 0.83x least Python; nbdkit file")
    assert [words.rstrip(")").rpartition("; ")[2] for words in standing] == [
        "nbdkit file and least Python miss it too",
        "least Python misses it too",
        "nbdkit file and least Python meet it",
        "least Python misses it too",
        "nbdkit file and least Python miss it too",
        "least Python meets it",
        "nbdkit file meets it, least Python misses it too",
        "150/s, 1.50x qemu-nbd",
    ]
    # A row without them has dashes in their columns.
    assert "| stream of text: 4 KiB random, depth 1 | 150/s | - | 100/s | - | - | 1.50x | - | - |" in text


def test_every_line_of_a_table_has_its_columns(result: dict[str, Any]) -> None:
    tables = [block.splitlines() for block in report.markdown(result).split("\n\n") if block.startswith("|")]
    assert len(tables) == 4  # the facts, two groups of workloads, the costs
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1


def test_memory_is_held_to_the_cache(result: dict[str, Any]) -> None:
    cells = report.cells_of(result["samples"])
    assert report.memory_verdict(cells, 64 << 20).met
    assert report.memory_verdict(cells, 32 << 20).met is False
    assert report.memory_verdict({}, 0).met is None


def test_saved_result_can_be_reported_again(result: dict[str, Any], tmp_path: Path) -> None:
    result["samples"]["sparse/r4k-d1"][LEAST] = [{"iops": value} for value in (93.6, 104.0, 114.4)]
    path = tmp_path / "result.json"
    report.save(result, str(path))
    loaded = json.loads(path.read_text())
    assert loaded["schema"] == 1
    assert loaded["rows"][0]["ratio-qemu"] == pytest.approx(1.3)
    assert loaded["rows"][0]["ratio-least"] == pytest.approx(1.25)
    assert loaded["rows"][0]["targets"] == [
        {"target": "≥ 1.3x qemu-nbd", "met": True, "others": {"raw": True, "least": False}},
        {"target": "≥ 0.9x raw", "met": False, "others": {"least": False}},
    ]
    assert report.markdown(loaded) == report.markdown(result)


# What the tools print


def fio_report(error: int = 0) -> dict[str, Any]:
    side = {"bw_bytes": 4096 * 1000, "total_ios": 500, "clat_ns": {"percentile": {"99.000000": 250_000}}}
    return {"jobs": [{"error": error, "read": side, "write": {"bw_bytes": 4096 * 500, "total_ios": 250}}]}


def test_fio_adds_reads_and_writes() -> None:
    assert read_fio(fio_report(), 4096) == {
        "iops": 1500,
        "mibps": 1500 / 256,
        "requests": 750,
        "p99_us": 250,
    }


def test_fio_error_is_one() -> None:
    with pytest.raises(ClientFailedError, match="No space left"):
        read_fio(fio_report(error=28), 4096)


PERF = """\
nbdkit 
\tffffffff816b8ceb _copy_to_iter+0x1b ([kernel.kallsyms])
\tffffffff821ecc51 do_syscall_64 ([kernel.kallsyms])
\t           f8350 __libc_preadv64v2 (/usr/lib/x86_64-linux-gnu/libc.so.6)

nbdkit 
\tffffffff816b8ceb futex_wait ([kernel.kallsyms])
\t           f8350 __GI___lll_lock_wake (/usr/lib/x86_64-linux-gnu/libc.so.6)

nbdkit 
\t          1f8350 _PyEval_EvalFrameDefault+0x4 (/usr/lib/x86_64-linux-gnu/libpython3.11.so.1.0)
"""  # noqa: W291


def test_samples_of_perf_are_sorted_by_what_was_called() -> None:
    stacks = list(read_stacks(PERF))
    assert stacks[0][0] == ("_copy_to_iter", "kernel")
    assert [place_of(stack) for stack in stacks] == [
        "kernel: preadv, the image's bytes",
        "kernel: futex, locks and the GIL",
        "libpython3.11.so.1.0",
    ]


def test_shares_add_up() -> None:
    table = shares("where", Counter({"a": 750, "b": 249, "dust": 1}), 8.0)
    assert table == [
        ["where", "share", "µs a request"],
        ["a", "75.0%", "6.00"],
        ["b", "24.9%", "1.99"],
        ["all", "100.0%", "8.00"],
    ]


# The list of workloads


def test_workloads_name_what_there_is() -> None:
    names = Counter(workload.name for workload in WORKLOADS)
    assert set(names.values()) == {1}
    for workload in WORKLOADS:
        assert workload.image in IMAGES
        assert workload.group in GROUPS
        assert set(workload.servers) <= set(KINDS)
        assert workload.servers[0] == OURS
        assert workload.targets
        assert set(workload.targets) <= set(MEASURES)
        if any(KINDS[server].raw for server in workload.servers):
            assert IMAGES[workload.image][1] is not None, "the image has no raw twin"
        for bar in (bar for bars in workload.targets.values() for bar in bars):
            if isinstance(bar, OfOwn):
                assert bar.workload in names


def test_bars_beside_the_raw_limit_can_be_held_against_the_least_of_python() -> None:
    for workload in WORKLOADS:
        # It is one process, which says nothing of what several can do.
        judged = RAW in workload.servers and any(workload.targets.values()) and workload.workers == 1
        assert (LEAST in workload.servers) == judged, workload.name


def test_writes_end_by_amount_so_that_all_do_the_same() -> None:
    for workload in WORKLOADS:
        if isinstance(workload.client, Fio) and workload.client.writes:
            assert workload.client.amount is not None
