"""``nbd-vmdk info``: what an image is, even where it can't be opened."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import image_argument, json_option, open_options
from nbd_vmdk.units import format_size

FAILED, DAMAGED, IN_USE = 1, 3, 5

#: Faults that are no damage of the image: it is something else, or we can't or may not read it.
_NO_DAMAGE = ("not-vmdk", "unsupported", "not-trusted", "storage", "usage")

#: What the text calls a fact whose JSON key is qemu-img's word for it.
_LABELS = {
    "filename": "file",
    "create-type": "kind",
    "cluster-size": "grain size",
    "backing-filename": "parent",
    "full-backing-filename": "parent file",
    "dirty-flag": "dirty",
    "format-specific": "",  # qemu-img's envelopes
    "data": "",
}
#: What VMware writes as the version of tools that it has not seen: the largest number.
_NO_TOOLS = "2147483647"
#: Facts that are told elsewhere, or that say nothing to a person.
_UNTOLD = ("schema", "error", "warnings", "type", "backing-filename-format")


@click.command(short_help="Show what an image is: kind, sizes, extents, chain.")
@open_options
@json_option
@image_argument
def info(image: str, as_json: bool, **options: Any) -> int:
    """Show what IMAGE is: kind, sizes, extents, and the chain of its parents.

    What can't be opened is described as far as it can be, with the fault; the exit code is then 3 if the
    image is damaged, and 1 otherwise.  Of a machine, an appliance or a folder with several disks, these are
    listed.
    """
    from nbd_vmdk.ops.info import image_info

    facts = image_info(image, **options)
    fault = facts.get("error")
    if as_json:
        output.json_object({key: value for key, value in facts.items() if key != "schema"})
    elif facts.keys() - {"schema", "filename", "error"}:
        _show(facts)
    for warning in facts.get("warnings", ()):
        output.log.warning("%s", warning)
    if not fault:
        return 0
    file = f"{fault['file']}: " if fault.get("file") else ""
    output.message("error", f"{file}{fault['message']}")
    if fault.get("hint"):
        output.message("hint", fault["hint"])
    return _exit_code(fault, recognised=facts.get("format") == "vmdk")


def _exit_code(fault: Mapping[str, Any], *, recognised: bool) -> int:
    if fault["error"] == "in-use":
        return IN_USE
    return DAMAGED if recognised and fault["error"] not in _NO_DAMAGE else FAILED


def _show(facts: Mapping[str, Any]) -> None:
    """Single facts first, then a table for each list of things."""
    single = list(_singles(facts))
    folder = os.path.join(os.path.dirname(facts["filename"]), "")
    tables = [(title, _table(rows, folder)) for title, rows in _lists(facts)]
    if output.colourful(sys.stdout):
        _show_rich(single, tables)
    else:
        _show_plain(single, tables)
    sys.stdout.flush()


def _show_plain(single: Sequence[tuple[str, str]], tables: Sequence[tuple[str, list[list[str]]]]) -> None:
    width = max((len(label) for label, _ in single), default=0)
    for label, value in single:
        output.line(f"{label:<{width}}  {value}".rstrip())
    for title, rows in tables:
        output.line(f"\n{title}")
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (f"{cell:<{wide}}" for cell, wide in zip(row, widths, strict=True))
            output.line(f"  {'  '.join(cells)}".rstrip())


def _show_rich(single: Sequence[tuple[str, str]], tables: Sequence[tuple[str, list[list[str]]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in single:
        grid.add_row(label, Text(value))
    console.print(grid)
    for title, (head, *rows) in tables:
        table = Table(
            box=None, padding=(0, 2, 0, 0), header_style="cyan", title_justify="left", title_style="bold"
        )
        table.title = title
        for name in head:
            # Only names of files are long enough to be folded.
            table.add_column(name, overflow="fold", no_wrap=name != _label("filename"))
        for row in rows:
            table.add_row(*(Text(cell, style="red" if cell == "no" else "") for cell in row))
        console.print()
        console.print(table)


def _singles(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Label and text of the facts that are one value each, those of nested objects after their name."""
    for key, value in facts.items():
        label = f"{prefix} {_label(key)}".strip()
        if key in _UNTOLD or _is_rows(value):
            continue
        if key == "geometry":
            yield label, ", ".join(f"{count} {what}" for what, count in value.items())
        elif isinstance(value, Mapping):
            yield from _singles(value, label)
        elif isinstance(value, int) and key.endswith("-size"):
            exact = f" ({value} bytes)" if value >= 1024 else ""
            yield label, format_size(value) + exact
        else:
            yield label, _text(key, value)


def _lists(facts: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Title and rows of the facts that are lists of things with facts of their own."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _lists(value)
        elif _is_rows(value) and not (key == "chain" and len(value) == 1):  # a chain of one tells nothing new
            yield _label(key), value


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _table(rows: Sequence[Mapping[str, Any]], folder: str) -> list[list[str]]:
    """A head and a row for each thing; a column for each fact that any of them has.

    The file's name comes last, and without the image's own ``folder``: rows stay short that way.
    """
    rows = [
        row | {"filename": str(row["filename"]).removeprefix(folder)} if "filename" in row else row
        for row in map(dict, rows)
    ]
    keys = dict.fromkeys(key for row in rows for key in row if key != "filename")
    columns = [*keys, "filename"]
    body = ([str(number), *(_text(key, row.get(key)) for key in columns)] for number, row in enumerate(rows))
    return [["", *map(_label, columns)], *body]


def _label(key: str) -> str:
    return _LABELS.get(key, output.clean(key.replace("-", " ")))


def _text(key: str, value: object) -> str:
    if value is None:
        return "-"
    if key == "tools-version" and value == _NO_TOOLS:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and key.endswith("-size"):
        return format_size(value)
    if isinstance(value, int) and key.endswith("cid"):
        return f"{value:08x}"
    if isinstance(value, list):
        return ", ".join(output.clean(str(each)) for each in value) or "-"
    return output.clean(str(value))
