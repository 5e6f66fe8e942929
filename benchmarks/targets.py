"""What a workload is held to, and whether it is met.

A :class:`Cell` is one measure of one workload: what each server did in each round, and its median.  Ratios
are always "how many times better ours is", for rates and for costs alike, so a target is met when the ratio
is large enough.  A ratio is the median of those of single rounds: what a machine can do may change from
minute to minute by a factor of two, and two servers run one after the other mostly meet the same machine.

A bar that we miss may be too high for anybody on this machine.  So the servers of a raw file are held to it
in our place (:func:`others`): where they miss it as well, a VMDK is not the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

OURS = "ours"
#: What a target may name as a peer, and the servers that stand behind it; the best one counts.
PEERS: dict[str, tuple[str, ...]] = {
    "qemu": ("qemu-threads", "qemu-uring"),
    "raw": ("raw",),
    "least": ("least",),
    "empty": ("empty",),
}
PEER_LABELS = {"qemu": "qemu-nbd", "raw": "raw", "least": "least Python", "empty": "an empty plugin"}
#: The peers that have no VMDK to look anything up in.
WITHOUT_VMDK = ("raw", "least")


@dataclass(frozen=True)
class Measure:
    """What a number is: its unit, how it is called beside a workload's name, and which way is better."""

    name: str
    unit: str
    higher: bool
    label: str = ""

    def better(self, values: Sequence[float]) -> float:
        """The best of some values."""
        return max(values) if self.higher else min(values)

    def ratio(self, own: float, other: float) -> float | None:
        """How many times better ``own`` is; None where one of them is too small to be measured."""
        up, down = (own, other) if self.higher else (other, own)
        return up / down if down > 0 else None


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("iops", "/s", True),
        Measure("mibps", "MiB/s", True),
        Measure("seconds", "s", False),
        Measure("p99_us", "µs", False, "p99 latency"),
        Measure("cpu_us", "µs", False, "server CPU a request"),
        Measure("us_per_extent", "µs", False, "time an extent"),
        Measure("first_byte_ms", "ms", False, "start to first byte"),
        Measure("resident_mib", "MiB", False, "memory after open"),
        Measure("peak_mib", "MiB", False, "peak memory"),
    )
}


@dataclass(frozen=True)
class Cell:
    """One measure of one workload: the median of each server that has one, and its values by rounds."""

    measure: Measure
    medians: Mapping[str, float]
    rounds: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    @property
    def own(self) -> float | None:
        """Our median."""
        return self.medians.get(OURS)

    def best(self, peer: str) -> float | None:
        """The best median among the servers of a peer."""
        values = [self.medians[server] for server in PEERS[peer] if server in self.medians]
        return self.measure.better(values) if values else None

    def ratio(self, peer: str) -> float | None:
        """How many times better than the peer we are: the median of the rounds that both were in."""
        own, best, rival = self.own, self.best(peer), self._best_server(peer)
        if own is None or best is None or rival is None:
            return None
        ours, theirs = self.rounds.get(OURS, {}), self.rounds.get(rival, {})
        ratios = [
            self.measure.ratio(value, theirs[number]) for number, value in ours.items() if number in theirs
        ]
        found = [ratio for ratio in ratios if ratio is not None]
        return median(found) if found else self.measure.ratio(own, best)

    def _best_server(self, peer: str) -> str | None:
        best = self.best(peer)
        return next((server for server in PEERS[peer] if self.medians.get(server) == best), None)

    def instead(self, peer: str) -> "Cell":
        """The cell as it would be if ours had done what the peer did."""
        server = self._best_server(peer)
        assert server is not None
        rounds = {**self.rounds, OURS: self.rounds.get(server, {})}
        return Cell(self.measure, {**self.medians, OURS: self.medians[server]}, rounds)


#: The cell of a workload's measure, for targets that look at another workload.
Cells = Mapping[tuple[str, str], Cell]


class Target(Protocol):
    """A bar.  ``met`` is None where a number it needs is missing."""

    @property
    def text(self) -> str:
        """The bar in words."""

    def met(self, cell: Cell, cells: Cells) -> bool | None:
        """Whether the medians clear it."""

    def fits(self, peer: str) -> bool:
        """Whether it says something of a peer in our place; not where that peer is the measure itself."""


def others(target: Target, cell: Cell, cells: Cells) -> dict[str, bool]:
    """Whether those without a VMDK would meet the bar in our place, where that can be told."""
    found = {}
    for peer in WITHOUT_VMDK:
        if cell.best(peer) is not None and target.fits(peer):
            met = target.met(cell.instead(peer), cells)
            if met is not None:
                found[peer] = met
    return found


@dataclass(frozen=True)
class Times:
    """At least so many times as good as a peer."""

    peer: str
    least: float

    @property
    def text(self) -> str:
        """See Target."""
        return f"≥ {self.least:g}x {PEER_LABELS[self.peer]}"

    def met(self, cell: Cell, cells: Cells) -> bool | None:  # noqa: ARG002
        """See Target."""
        ratio = cell.ratio(self.peer)
        return None if ratio is None else ratio >= self.least

    def fits(self, peer: str) -> bool:
        """See Target."""
        return peer != self.peer


@dataclass(frozen=True)
class Either:
    """One of two bars: the second is for machines on which the first is beyond the hardware."""

    first: Target
    second: Target

    @property
    def text(self) -> str:
        """See Target."""
        return f"{self.first.text} or {self.second.text}"

    def met(self, cell: Cell, cells: Cells) -> bool | None:
        """See Target."""
        found = [target.met(cell, cells) for target in (self.first, self.second)]
        if True in found:
            return True
        return None if None in found else False

    def fits(self, peer: str) -> bool:
        """See Target."""
        return self.first.fits(peer) and self.second.fits(peer)


@dataclass(frozen=True)
class OfOwn:
    """At least so many times what we ourselves do in another workload."""

    workload: str
    least: float

    @property
    def text(self) -> str:
        """See Target."""
        return f"≥ {self.least:g}x our {self.workload}"

    def met(self, cell: Cell, cells: Cells) -> bool | None:
        """See Target."""
        other = cells.get((self.workload, cell.measure.name))
        if cell.own is None or other is None or other.own is None:
            return None
        ratio = cell.measure.ratio(cell.own, other.own)
        return None if ratio is None else ratio >= self.least

    def fits(self, peer: str) -> bool:  # noqa: ARG002
        """See Target; it is about our other workload."""
        return False


@dataclass(frozen=True)
class AtMost:
    """No more than so much; with ``above``, so much more than that peer."""

    value: float
    unit: str
    above: str | None = None

    @property
    def text(self) -> str:
        """See Target."""
        more = f" over {PEER_LABELS[self.above]}" if self.above else ""
        return f"≤ {self.value:g} {self.unit}{more}"

    def met(self, cell: Cell, cells: Cells) -> bool | None:  # noqa: ARG002
        """See Target."""
        base = cell.best(self.above) if self.above else 0.0
        return None if cell.own is None or base is None else cell.own <= self.value + base

    def fits(self, peer: str) -> bool:
        """See Target."""
        return peer != self.above
