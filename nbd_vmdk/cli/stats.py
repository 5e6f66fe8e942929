"""``nbd-vmdk stats``: what a running server has done, in numbers."""

from collections.abc import Mapping
from typing import Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import json_option
from nbd_vmdk.errors import OptionError
from nbd_vmdk.units import format_size


@click.command(short_help="Show what a server that was started with --stats has done.")
@click.option("--prometheus", "as_text", is_flag=True, help="Print the text format of Prometheus.")
@json_option
@click.argument("server", metavar="SOCKET|URI|PID")
def stats(server: str, as_json: bool, as_text: bool) -> int:
    """Show the requests, times, cache hits and commits of a running server since its start.

    The server is named by its unix socket, its URI, or the process ID of nbd-vmdk or of nbdkit; it must have
    been started with --stats.
    """
    if as_json and as_text:
        raise OptionError(None, why="--json and --prometheus are two formats: choose one")
    from nbd_vmdk.serving import asking

    told = asking.ask(server)
    if as_json:
        output.json_object(told)
    elif as_text:
        for line in asking.prometheus(told):
            output.line(line)
    else:
        for line in table(told):
            output.line(line)
    return 0


def table(told: Mapping[str, Any]) -> list[str]:
    """The numbers for people: a row for each kind of request to each export, and a line for the rest."""
    from nbd_vmdk.serving.asking import quantile

    head = ("EXPORT", "REQUEST", "COUNT", "BYTES", "MEAN", "HALF", "99%", "LONGEST", "ERRORS")
    rows = [head]
    for name, export in told["exports"].items():
        for kind, each in export["requests"].items():
            rows.append(
                (
                    output.clean(name),
                    kind,
                    str(each["count"]),
                    format_size(each["bytes"]),
                    _time(each["seconds"] / each["count"]),
                    f"<{_time(quantile(each, 0.5))}",
                    f"<{_time(quantile(each, 0.99))}",
                    _time(each["longest"]),
                    str(each["errors"]),
                )
            )
    lines = []
    if len(rows) > 1:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            names = [f"{cell:<{width}}" for cell, width in zip(row[:2], widths[:2], strict=True)]
            numbers = [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join([*names, *numbers]))
    else:
        lines.append("no requests yet")
    hits, misses = told["cache"]["hits"], told["cache"]["misses"]
    share = f" ({100 * hits / (hits + misses):.1f} % found)" if hits + misses else ""
    commits = sum(export["commits"] for export in told["exports"].values())
    connections = told["connections"]
    lines.append(
        f"cache: {hits} hits, {misses} misses{share}; commits: {commits}; "
        f"connections: {connections['open']} open, {connections['total']} in all; up {_time(told['uptime'])}"
    )
    if "workers" in told:
        each = ", ".join(f"{one['pid']} ({one['connections']['open']} open)" for one in told["workers"])
        lines.append(f"workers: {each}")
    return lines


def _time(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f}us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f}ms"
    if seconds < 120:
        return f"{seconds:.1f}s"
    if seconds < 7200:
        return f"{seconds / 60:.0f}min"
    return f"{seconds / 3600:.0f}h"
