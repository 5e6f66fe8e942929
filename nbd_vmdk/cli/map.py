"""``nbd-vmdk map``: what lies where, run by run, and as a picture."""

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from nbd_vmdk import __version__
from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import ImagePath, image_argument, json_option, open_options
from nbd_vmdk.cli.progress import progress
from nbd_vmdk.errors import FileExists, OptionError, StorageError

if TYPE_CHECKING:
    from nbd_vmdk.disk import Disk

DAMAGED = 3
#: How a page of ours begins, and nobody else's.
BEGINNING = b'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta name="generator" content="nbd-vmdk">\n'


@click.command("map", short_help="Show every run of an image and where its bytes are.")
@click.option("--since", metavar="LINK", help="Show only what may differ from LINK, a snapshot of IMAGE.")
@click.option("--compare", is_flag=True, help="With --since: read both, and show only what does differ.")
@click.option("--html", type=ImagePath(), metavar="FILE", help="Draw a page for a browser, and no more.")
@open_options
@json_option
@image_argument
def map_(
    image: str, since: str | None, compare: bool, html: str | None, as_json: bool, **options: Any
) -> int:
    """Show every run of IMAGE: where it starts, how long and what it is, and where its bytes are.

    Link counts from the top of the chain, 0 being IMAGE itself.  With --json: one array, as
    'qemu-img map --output=json' prints it, with the file name and the kind added.  On a terminal a strip
    shows the whole disk at a glance.  The exit code is 3 if some of it can't be read.

    With --since only ranges that were written since the snapshot LINK, a link of the chain by its name or
    number: copied over a copy of LINK's disk they give IMAGE's.

    With --html a page is written that shows the chain, its extents and who holds what; it needs no other
    file and no network.  A page that was drawn so is replaced, any other file is not.
    """
    if compare and since is None:
        raise OptionError(None, why="--compare needs --since")
    if html is not None and since is not None:
        raise OptionError(None, why="--html and --since exclude each other")
    from nbd_vmdk.opening import open_disk
    from nbd_vmdk.ops.mapping import map_rows

    with open_disk(image, locks=False, **options) as disk:
        for warning in disk.warnings:
            output.log.warning("%s", warning)
        if html is not None:
            return _page(disk, html, as_json=as_json)
        if since is not None:
            from nbd_vmdk.ops.since import changed_since, find_link

            depth = find_link(disk, since)
            # Rows that run over a terminal are progress enough, and a bar would be in their way.
            quiet = not compare or sys.stdout.isatty()
            with nullcontext() if quiet else progress("comparing") as told:
                rows = map_rows(disk, changed_since(disk, depth, compare=compare, progress=told))
                lost = _print(rows, disk, as_json=as_json)
        else:
            if not as_json and sys.stdout.isatty():
                from nbd_vmdk.cli import strip

                strip.show(disk)
            lost = _print(map_rows(disk), disk, as_json=as_json)
    return DAMAGED if lost else 0


def _page(disk: "Disk", path: str, *, as_json: bool) -> int:
    """Write the page, which appears when it is whole.  Only another page is replaced, never an image."""
    from nbd_vmdk.ops.picture.page import page
    from nbd_vmdk.storage.newfiles import NewFiles

    if os.path.lexists(path) and not _is_page(path):
        raise FileExists(path)
    made = f"Drawn by nbd-vmdk {__version__} on {time.strftime('%Y-%m-%d %H:%M')}."
    with progress("drawing") as told:
        content = page(disk, made=made, progress=told)
    name = os.path.basename(os.path.realpath(path))
    with NewFiles(path, replace=True) as new:
        try:
            with open(new.path(name), "x", encoding="utf-8") as file:
                file.write(content)
        except OSError as error:
            raise StorageError.of(error, path, "write") from error
        new.publish(main=name)
    if as_json:
        output.json_object({"filename": disk.links[0].name, "html": path})
    else:
        output.line(f"{output.clean(path)}: open it in a browser")
    return 0


def _is_page(path: str) -> bool:
    try:
        # Nobody may ever write to what is a pipe.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            return file.read(len(BEGINNING)) == BEGINNING
    except OSError:
        return False


def _print(rows: Iterable[Mapping[str, Any]], disk: "Disk", *, as_json: bool) -> bool:
    return _print_json(rows) if as_json else _print_table(rows, disk.size)


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
