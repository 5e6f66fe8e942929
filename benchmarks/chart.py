"""The picture of a report: one bar a workload, as long as ours is faster than qemu-nbd."""

from collections.abc import Sequence
from functools import partial

from benchmarks.report import Row, quantity, times

_FASTER, _SLOWER, _FAINT = "#2a7f9e", "#c4553b", "#777777"
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def draw(rows: Sequence[Row], path: str, note: str, *, every: bool = False) -> bool:
    """Write the chart as PNG; False if there is nothing to show.

    Shown are the headline workloads or, with ``every``, all there are.  ``note`` stands below.
    """
    # Of a workload's rows the first is the one it is about.
    first = {row.workload.name: row for row in reversed(rows)}
    shown = [
        row
        for row in reversed(first.values())
        if (every or row.workload.headline) and row.cell.ratio("qemu") and not row.cell.measure.label
    ]
    if not shown:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    shown.reverse()  # matplotlib counts from the bottom
    ratios = [row.cell.ratio("qemu") or 1.0 for row in shown]
    fig, axes = plt.subplots(figsize=(11, 1.7 + 0.38 * len(shown)), layout="constrained")
    bars = axes.barh(
        [row.workload.headline or row.workload.title for row in shown],
        [ratio - 1 for ratio in ratios],
        left=1,
        color=[_FASTER if ratio >= 1 else _SLOWER for ratio in ratios],
        height=0.66,
    )
    for bar, ratio, row in zip(bars, ratios, shown, strict=True):
        # A bar to the left has its words to the right of the line, where there is room.
        end = (max(ratio, 1), bar.get_y() + bar.get_height() / 2)
        beside = partial(axes.annotate, xy=end, textcoords="offset points", va="center")
        beside(times(ratio), xytext=(6, 0), fontweight="bold")
        beside(_numbers(row), xytext=(54, 0), color=_FAINT, fontsize="small")
    axes.axvline(1, color="black", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, min(ratios) / 1.2), max(10, max(ratios)) * 5)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if tick <= max(10, *ratios)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.margins(y=0.02)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    fig.suptitle("nbd-vmdk: how many times as fast as qemu-nbd", fontsize=15, fontweight="bold")
    axes.set_xlabel(f"1x = the better of qemu-nbd's two settings; the scale is logarithmic\n{note}")
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return True


def _numbers(row: Row) -> str:
    """Both numbers behind a ratio."""
    unit = row.cell.measure.unit
    return f"{quantity(row.cell.own, unit)} against {quantity(row.cell.best('qemu'), unit)}"
