"""How findings are shown, and which exit code they make: the same for check and repair."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import all_of, place_options

if TYPE_CHECKING:
    from nbd_vmdk.ops.check.findings import Finding
    from nbd_vmdk.ops.check.runner import Report

#: What is checked, and which files the image may name.
check_options = all_of(
    place_options,
    click.option("--data", is_flag=True, help="Inflate every compressed grain as well."),
)

CLEAN, DAMAGED, HARMLESS, IN_USE = 0, 3, 4, 5
_COLOURS: Final = {"error": "red", "warning": "yellow"}


def exit_code(report: "Report") -> int:
    """The exit code that a report makes."""
    if report.findings and report.in_use:
        return IN_USE
    if any(finding.severity == "error" for finding in report.findings):
        return DAMAGED
    return HARMLESS if report.findings else CLEAN


def mending(finding: "Finding", report: "Report") -> str:
    """What mends a finding, or why nothing does."""
    repair = finding.repair
    if isinstance(repair, str):
        return f"none: {repair}" if repair else "none"
    if finding.depth:
        return f"{repair.text} (repair {report.links[finding.depth]} by its own name)"
    return repair.text if repair.asks is None else f"only on request: {repair.text} ({repair.asks})"


def mendable(report: "Report") -> list[str]:
    """What ``repair`` is to be told to mend what was found: the image if it mends that, else its parents."""
    depths = {finding.depth for finding in report.findings if not isinstance(finding.repair, str)}
    return [report.filename] if 0 in depths else [report.links[depth] for depth in sorted(depths)]


def show(report: "Report", mended: Callable[["Finding"], str] | None = None) -> None:
    """Print findings: a table on a terminal, blocks of lines elsewhere."""
    told = mended if mended is not None else partial(mending, report=report)
    (_show_table if output.colourful(sys.stdout) else _show_lines)(report.findings, told)


def _show_lines(findings: Sequence["Finding"], mended: Callable[["Finding"], str]) -> None:
    for finding in findings:
        place = f" ({finding.place})" if finding.place else ""
        output.line(f"{finding.severity.value}: {output.clean(finding.file)}{place}: {finding.slug}")
        for word, text in (("what", finding.what), ("effect", finding.effect), ("repair", mended(finding))):
            output.line(f"    {word + ':':<8}{output.clean(text)}")


def _show_table(findings: Sequence["Finding"], mended: Callable[["Finding"], str]) -> None:
    if not findings:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="cyan", show_lines=True)
    for name in ("finding", "place", "what", "effect", "repair"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        head = Text(f"{finding.severity.value}\n", style=_COLOURS[finding.severity.value])
        head.append(finding.slug, style="default")
        place = "\n".join((output.clean(finding.file), *finding.place.split(", ")))
        cells = (place, finding.what, finding.effect, mended(finding))
        table.add_row(head, *(Text(cell if cell is place else output.clean(cell)) for cell in cells))
    Console(highlight=False).print(table)


def summary(report: "Report") -> str:
    """One line that says how an image is."""
    errors, warnings = report.count_errors, report.count_warnings
    if not report.findings:
        return "no errors were found"
    words = [
        f"{count} {word}{'' if count == 1 else 's'}"
        for count, word in ((errors, "error"), (warnings, "warning"))
        if count
    ]
    return " and ".join(words) + (" were found" if errors + warnings > 1 else " was found")


def warn_of_users(report: "Report") -> None:
    """Say who else has the image open, which may mislead."""
    for user in report.in_use:
        output.log.warning("%s: what is found may be what it has not written yet", user)
