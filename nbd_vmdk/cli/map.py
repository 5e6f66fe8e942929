"""``nbd-vmdk map``: what lies where, run by run."""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import image_argument, json_option, open_options

DAMAGED = 3


@click.command("map", short_help="Show every run of an image and where its bytes are.")
@open_options
@json_option
@image_argument
def map_(image: str, as_json: bool, **options: Any) -> int:
    """Show every run of IMAGE: where it starts, how long and what it is, and where its bytes are.

    Link counts from the top of the chain, 0 being IMAGE itself.  With --json: one array, as
    'qemu-img map --output=json' prints it, with the file name and the kind added.
    """
    from nbd_vmdk.disk import open_disk
    from nbd_vmdk.ops.mapping import map_rows

    with open_disk(image, locks=False, **options) as disk:
        for warning in disk.warnings:
            output.log.warning("%s", warning)
        rows = map_rows(disk)
        lost = _print_json(rows) if as_json else _print_table(rows, disk.size)
    return DAMAGED if lost else 0


def _print_json(rows: Iterable[Mapping[str, Any]]) -> bool:
    """One array, a row a line, written as it is found; whether anything is lost."""
    lost = False
    before = "["
    for row in rows:
        sys.stdout.write(before + json.dumps(row))
        before = ",\n"
        lost = lost or row["kind"] == "lost"
    sys.stdout.write("]\n" if before != "[" else "[]\n")
    return lost


def _print_table(rows: Iterable[Mapping[str, Any]], size: int) -> bool:
    """Columns of a width that is known before the first row: a map may be too long to be held."""
    lost = False
    width = max(len(str(size)), len("length"))
    output.line(f"{'start':>{width}}  {'length':>{width}}  kind    link  {'offset':>{width}}  file")
    for row in rows:
        link = row["depth"] if row.get("filename") is not None else ""
        offset, file = row.get("offset", ""), output.clean(row.get("filename") or "")
        where = f"{row['start']:>{width}}  {row['length']:>{width}}"
        output.line(f"{where}  {row['kind']:<6}  {link:>4}  {offset:>{width}}  {file}".rstrip())
        lost = lost or row["kind"] == "lost"
    return lost
