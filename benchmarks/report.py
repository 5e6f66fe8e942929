"""From samples to a report: medians, ratios, verdicts, and the tables that people read.

The arithmetic works on the plain dict that is written as JSON, so an old result can be reported again:
``python -m benchmarks --report FILE.json``.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.targets import MEASURES, OURS, PEER_LABELS, Cell, Cells, Target, others
from benchmarks.workloads import GROUPS, WORKLOADS, Workload
from nbd_vmdk.units import MIB

Samples = Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]

_SERVER_TITLES = {
    "ours": "ours",
    "qemu-threads": "qemu-nbd threads",
    "qemu-uring": "qemu-nbd io_uring",
    "raw": "raw limit",
    "least": "least Python",
    "empty": "empty plugin",
}
#: Those that ours is put in relation to.
_PEERS = ("qemu", "raw", "least")
#: Those that are held to our bars in our place, as they are called in the list of missed ones and before it.
_OTHERS = {
    "raw": ("nbdkit file", "`nbdkit file` on raw"),
    "least": ("least Python", "the least Python plugin"),
}
#: Memory that may be in use after any workload, beside the cache.
_MEMORY = 40


@dataclass(frozen=True)
class Verdict:
    """One target and what became of it; ``met`` is None where it could not be judged.

    ``others`` tells whether the peers without a VMDK would have met it, as far as that can be told.
    """

    text: str
    met: bool | None
    others: Mapping[str, bool] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """met, missed, or not measured."""
        return {True: "met", False: "missed", None: "not measured"}[self.met]


@dataclass(frozen=True)
class Row:
    """One measure of one workload, judged."""

    workload: Workload
    cell: Cell
    verdicts: tuple[Verdict, ...]

    @property
    def title(self) -> str:
        """The workload's name, and the measure's where it is not what the workload is about."""
        label = self.cell.measure.label
        return f"{self.workload.title}: {label}" if label else self.workload.title


def cells_of(samples: Samples) -> dict[tuple[str, str], Cell]:
    """All measures of all workloads."""
    found = {}
    for workload, servers in samples.items():
        for name, measure in MEASURES.items():
            rounds = {
                server: values
                for server, runs in servers.items()
                if (
                    values := {
                        _round(sample, at): sample[name] for at, sample in enumerate(runs) if name in sample
                    }
                )
            }
            if rounds:
                medians = {server: median(values.values()) for server, values in rounds.items()}
                found[workload, name] = Cell(measure, medians, rounds)
    return found


def _round(sample: Mapping[str, float], place: int) -> int:
    """The round that a sample is of; older results only have them in order."""
    return int(sample.get("round", place + 1))


def rows_of(cells: Cells, workloads: Iterable[Workload] = WORKLOADS) -> list[Row]:
    """A row for each measure that a workload is about or held to, for all workloads with samples."""
    rows = []
    for workload in workloads:
        for name, targets in workload.targets.items():
            cell = cells.get((workload.name, name))
            if cell is not None:
                rows.append(Row(workload, cell, judge(targets, cell, cells)))
    return rows


def judge(targets: Iterable[Target], cell: Cell, cells: Cells) -> tuple[Verdict, ...]:
    """Hold a cell to its targets."""
    return tuple(
        Verdict(target.text, target.met(cell, cells), others(target, cell, cells)) for target in targets
    )


def highest_memory(cells: Cells) -> tuple[float, str] | None:
    """The most memory that we had in any workload, in MiB, and in which."""
    found = [
        (cell.medians[OURS], workload)
        for (workload, name), cell in cells.items()
        if name == "peak_mib" and OURS in cell.medians
    ]
    return max(found) if found else None


def memory_verdict(cells: Cells, cache_size: int) -> Verdict:
    """Whether memory stayed within its bound in all workloads."""
    bound = _MEMORY + cache_size // MIB
    highest = highest_memory(cells)
    text = f"≤ {bound} MiB ({_MEMORY} + --cache-size) after any workload"
    return Verdict(text, None if highest is None else highest[0] <= bound)


# Numbers as people read them.


def quantity(value: float | None, unit: str = "") -> str:
    """Three digits and the unit, which is a larger or smaller one where that reads better."""
    if value is None:
        return "-"
    if unit == "/s" and value >= 9999.5:
        return f"{_digits(value / 1000)} K/s"
    if unit == "MiB/s" and value >= 1023.5:
        return f"{_digits(value / 1024)} GiB/s"
    if unit == "s" and value < 0.9995:
        return f"{_digits(value * 1000)} ms"
    return f"{_digits(value)} {unit}".rstrip() if unit != "/s" else f"{_digits(value)}/s"


def _digits(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def times(ratio: float | None) -> str:
    """A ratio as people read it."""
    return "-" if ratio is None else f"{_digits(ratio)}x"


# The report.


def markdown(result: Mapping[str, Any]) -> str:
    """The whole report."""
    cells = cells_of(result["samples"])
    rows = rows_of(cells)
    memory = memory_verdict(cells, result["cache_size"])
    verdicts = [verdict for row in rows for verdict in row.verdicts] + [memory]
    parts = [_opening(result), _summary(rows, memory, verdicts), _chart(result)]
    for group in GROUPS:
        chosen = [row for row in rows if row.workload.group == group]
        if chosen:
            parts.append(f"## {group}\n\n{_table(chosen)}")
    parts += [_memory(cells, memory), _cpu(cells), _failures(result["failures"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(result: Mapping[str, Any]) -> str:
    facts = {"date": result["date"], "command": f"`{result['command']}`"}
    facts |= {"rounds": f"{result['rounds']}; the numbers are medians"}
    facts |= {"our settings": f"{result['threads']} threads, {result['cache_size'] // MIB} MiB of cache"}
    facts |= result["machine"]
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = "\n".join(f"| {name} | {text} |" for name, text in facts.items())
    note = "\n\n**A quick run: a few short rounds, good for trends only.**" if result["quick"] else ""
    return (
        "# Benchmarks\n\n"
        "Ours, qemu-nbd and nbdkit's own file plugin on a raw file with the same bytes (the limit of what an "
        "nbdkit plugin can do), over a unix socket, with the same clients, in one run. "
        "The least Python plugin, one process, does one system call a request on that raw file: what "
        "separates it from the limit is Python's part of the distance, and what separates ours from it is "
        "our own. "
        "A ratio says how many times better ours is, for rates and for costs alike; it is the median of the "
        "ratios of single rounds, in which the servers ran one after the other, and so may differ from that "
        "of the medians beside it. Against qemu-nbd, the better of its two settings counts."
        f"{note}\n\n| | |\n|---|---|\n{lines}"
    )


def _summary(rows: Sequence[Row], memory: Verdict, verdicts: Sequence[Verdict]) -> str:
    met = sum(verdict.met is True for verdict in verdicts)
    missed = [
        f"- `{row.workload.name}`, {row.title}: {verdict.text} (it is {_standing(row)}{_company(verdict)})"
        for row in rows
        for verdict in row.verdicts
        if verdict.met is False
    ]
    if memory.met is False:
        missed.append(f"- memory: {memory.text}")
    unjudged = sum(verdict.met is None for verdict in verdicts)
    text = f"**{met} of {len(verdicts) - unjudged} targets met.**"
    if unjudged:
        text += f" {unjudged} could not be judged, as a number is missing."
    text += _shared([verdict for verdict in verdicts if verdict.met is False])
    return text + ("\n\nMissed:\n\n" + "\n".join(missed) if missed else "")


def _standing(row: Row) -> str:
    """What a row reached, in all the ratios that it has."""
    found = [
        f"{times(row.cell.ratio(peer))} {PEER_LABELS[peer]}"
        for peer in _PEERS
        if row.cell.ratio(peer) is not None
    ]
    return ", ".join([quantity(row.cell.own, row.cell.measure.unit), *found])


def _company(verdict: Verdict) -> str:
    """Who else misses a bar that we miss, and who does not."""
    found = []
    for met, one, several in ((True, "meets it", "meet it"), (False, "misses it too", "miss it too")):
        names = [name for peer, (name, _) in _OTHERS.items() if verdict.others.get(peer) is met]
        if names:
            found.append(f"{' and '.join(names)} {several if len(names) > 1 else one}")
    return "; " + ", ".join(found) if found else ""


def _shared(missed: Sequence[Verdict]) -> str:
    """How many of the bars that we miss the others miss too."""
    found = []
    for peer, (_, name) in _OTHERS.items():
        held = [verdict.others[peer] for verdict in missed if peer in verdict.others]
        if held:
            found.append(f"{name} misses {held.count(False)} of the {len(held)} that it can be held to")
    return f" Of the {len(missed)} missed, {', and '.join(found)}." if found else ""


def _chart(result: Mapping[str, Any]) -> str:
    return f"![How many times as fast as qemu-nbd]({result['chart']})" if result.get("chart") else ""


def _table(rows: Sequence[Row]) -> str:
    servers = [name for name in _SERVER_TITLES if any(name in row.cell.medians for row in rows)]
    peers = [peer for peer in _PEERS if any(row.cell.ratio(peer) is not None for row in rows)]
    head = ["workload", *(_SERVER_TITLES[name] for name in servers)]
    head += [f"ours / {PEER_LABELS[peer]}" for peer in peers]
    head += ["target", ""]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(servers) + len(peers)) + "---|---|"]
    for row in rows:
        words = [row.title]
        words += [quantity(row.cell.medians.get(name), row.cell.measure.unit) for name in servers]
        words += [times(row.cell.ratio(peer)) for peer in peers]
        words += ["; ".join(verdict.text for verdict in row.verdicts)]
        words += ["; ".join(verdict.word for verdict in row.verdicts)]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


def _memory(cells: Cells, verdict: Verdict) -> str:
    highest = highest_memory(cells)
    if highest is None:
        return ""
    return (
        "## Memory\n\n"
        f"The most that our server had resident in any workload: {highest[0]:.0f} MiB (in `{highest[1]}`). "
        f"Target: {verdict.text}: {verdict.word}."
    )


def _cpu(cells: Cells) -> str:
    """What each workload costs each server: CPU time a request, and peak memory."""
    costs = [
        (workload.name, cells[workload.name, "cpu_us"].medians, cells[workload.name, "peak_mib"].medians)
        for workload in WORKLOADS
        if (workload.name, "cpu_us") in cells and (workload.name, "peak_mib") in cells
    ]
    servers = [name for name in _SERVER_TITLES if any(name in cpu for _, cpu, _ in costs)]
    lines = [
        "| workload | " + " | ".join(_SERVER_TITLES[server] for server in servers) + " |",
        "|---|" + "--:|" * len(servers),
    ]
    for workload, cpu, memory in costs:
        words = [
            f"{quantity(cpu[server], 'µs')}, {memory[server]:.0f} MiB" if server in cpu else "-"
            for server in servers
        ]
        lines.append(f"| `{workload}` | " + " | ".join(words) + " |")
    head = (
        "## Server CPU time a request, and peak memory\n\n"
        "A request is one of fio's; for nbdcopy 256 KiB, for `nbdinfo --map` an extent.\n\n"
    )
    return head + "\n".join(lines) if costs else ""


def _failures(failures: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    lines = [
        f"- `{workload}`, {_SERVER_TITLES[server]}: {reasons[-1]}"
        for workload, servers in failures.items()
        for server, reasons in servers.items()
        if reasons
    ]
    return "## Failures\n\n" + "\n".join(lines) if lines else ""


def save(result: Mapping[str, Any], path: str) -> None:
    """Write the result as JSON, with the computed rows beside the samples."""
    cells = cells_of(result["samples"])
    rows = [
        {
            "workload": row.workload.name,
            "measure": row.cell.measure.name,
            "unit": row.cell.measure.unit,
            "medians": dict(row.cell.medians),
            **{f"ratio-{peer}": row.cell.ratio(peer) for peer in _PEERS},
            "targets": [
                {"target": verdict.text, "met": verdict.met, "others": dict(verdict.others)}
                for verdict in row.verdicts
            ],
        }
        for row in rows_of(cells)
    ]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"schema": 1, **result, "rows": rows}, file, indent=1)
        file.write("\n")
