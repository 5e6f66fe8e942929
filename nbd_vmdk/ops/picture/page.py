"""A disk as one HTML page that needs nothing else: no network, no other file.

Drawings and tables are in the page as SVG and HTML, so it can be read, searched and printed without running
anything; a small script adds what lies under the pointer.

Names of files, links and kinds come from images, which are untrusted.  They are made printable and escaped
wherever they stand, the script sets them as text only, and a content security policy lets run, and style,
nothing but what this package wrote, by its hash.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import groupby
from typing import Final

from nbd_vmdk.disk import Disk
from nbd_vmdk.ops.copy import Progress
from nbd_vmdk.ops.picture.bins import bin_width
from nbd_vmdk.ops.picture.links import chain, link_parts
from nbd_vmdk.ops.picture.markup import Part, colour, percent, plain, short, strip, swatch, text
from nbd_vmdk.ops.picture.survey import Survey, survey
from nbd_vmdk.units import format_size

#: Bins at most of the largest link; a strip is about as many points wide.
_BINS: Final = 1024


def page(disk: Disk, *, made: str = "", progress: Progress = lambda _done, _all: None) -> str:
    """The page for ``disk``; ``made`` is what its foot says.  Raises what mapping raises."""
    largest = max(link.size for link in disk.links)
    found = survey(disk, bin_width(largest, _BINS), progress=progress)
    parts = [_header(found), *_facts(found), *_map(found), *chain(found), *_totals(found), *_warnings(disk)]
    parts.append(f"<footer>{text(made)}</footer>" if made else "")
    return _document(text(os.path.basename(found.name)), "\n".join(parts), _data(found))


def _document(title: str, body: str, data: str) -> str:
    files = resources.files(__package__)
    style, script = (files.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta name="generator" content="nbd-vmdk">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<div id="tip" hidden></div>
<script id="facts" type="application/json">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(source: str) -> str:
    """A style or script in the words of a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


# What the script knows.


def _data(found: Survey) -> str:
    """The bins of every strip as JSON, without anything that could end the element it stands in."""
    strips: list[dict[str, object]]
    strips = [{"size": found.size, "rows": [_row(part) for part in _parts(found)]}]
    for depth, link in enumerate(found.links):
        rows = [_row(part) for part in link_parts(depth, link)]
        strips.append({"size": link.link.size, "rows": rows})
    facts = json.dumps({"width": found.width, "count": found.count, "strips": strips}, separators=(",", ":"))
    for character in "<>&":
        facts = facts.replace(character, f"\\u{ord(character):04x}")
    return facts


def _row(part: Part) -> dict[str, object]:
    """One sort of bytes; equal neighbours as (first bin, how many bins, bytes in each)."""
    runs = []
    at = 0
    for value, group in groupby(part.counts):
        length = sum(1 for _ in group)
        if value:
            runs.append([at, length, value])
        at += length
    return {"name": plain(part.name), "class": part.css, "runs": runs}


def _parts(found: Survey) -> Iterator[Part]:
    """What the whole disk's strip is made of, from the bottom up: the base first."""
    for depth, link in reversed(list(enumerate(found.links))):
        yield Part(short(link), colour(depth), link.seen.counts())
    zeros = (link.seen_zero.counts() for link in found.links)
    yield Part("zeros", "zero", [sum(column) for column in zip(*zeros, strict=True)])
    yield Part("can't be read", "lost", found.lost.counts())


# What stands in the page.


def _header(found: Survey) -> str:
    top = found.links[0].link
    parts = len(found.links)
    lead = f"{top.create_type} disk of {format_size(found.size)}"
    lead += f", a chain of {parts} links" if parts > 1 else ", without a parent"
    return f"<header><h1>{text(os.path.basename(found.name))}</h1><p class='lead'>{text(lead)}</p></header>"


def _facts(found: Survey) -> Iterator[str]:
    data = sum(link.seen.total for link in found.links)
    zeros = sum(link.seen_zero.total for link in found.links)
    occupied = sum(link.link.actual_size for link in found.links)
    hidden = sum(
        link.held.total + link.zero.total - link.seen.total - link.seen_zero.total for link in found.links
    )
    yield "<dl class='facts'>"
    yield _fact("Size the guest sees", format_size(found.size), f"{found.size:,} bytes")
    yield _fact("Data in it", format_size(data), f"{percent(data, found.size)} of the disk")
    nothing = zeros + found.hole.total
    yield _fact(
        "Zeros", format_size(nothing), f"{format_size(zeros)} of them recorded" if zeros else "all in holes"
    )
    yield _fact("Files occupy", format_size(occupied), f"{percent(occupied, found.size)} of the disk")
    if len(found.links) > 1:
        yield _fact("Hidden by newer links", format_size(hidden), "what merging links would free")
    if found.lost.total:
        yield _fact("Can't be read", format_size(found.lost.total), "reading it is an error")
    yield "</dl>"


def _fact(name: str, value: str, note: str) -> str:
    return f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(note)}</small></dd></div>"


def _map(found: Survey) -> Iterator[str]:
    title = "What the guest sees, and which link has it" if len(found.links) > 1 else "Where the data is"
    yield f"<section><h2>{title}</h2>"
    yield strip(0, "tall", list(_parts(found)), found.size, found, "The whole disk")
    yield _axis(found.count * found.width, found.size)
    yield "<ul class='legend'>"
    for depth, link in enumerate(found.links):
        yield _legend(colour(depth), short(link), link.seen.total, found.size)
    if zeros := sum(link.seen_zero.total for link in found.links):
        yield _legend("zero", "zeros", zeros, found.size)
    if found.lost.total:
        yield _legend("lost", "can't be read", found.lost.total, found.size)
    yield _legend("hole", "holes, held by no link", found.hole.total, found.size)
    yield "</ul></section>"


def _legend(css: str, name: str, count: int, size: int) -> str:
    amount = f"{format_size(count)}, {percent(count, size)}"
    return f"<li>{swatch(css)}<span>{text(name)} <span class='soft'>{amount}</span></span></li>"


def _axis(drawn: int, size: int) -> str:
    """Five marks at equal distances; the last one is the end."""
    marks = [format_size(drawn * step // 4) if step else "0" for step in range(5)]
    if drawn - size < drawn // 100:
        marks[4] = format_size(size)
    return "<div class='axis'>" + "".join(f"<span>{mark}</span>" for mark in marks) + "</div>"


def _totals(found: Survey) -> Iterator[str]:
    names = "Size", "Data held", "Seen", "Hidden", "Zeros", "Files occupy"
    heads = "".join(f"<th class='n'>{name}</th>" for name in names)
    yield f"<section><h2>Totals</h2><div class='scroll'><table><tr><th>Link</th>{heads}</tr>"
    rows = []
    for depth, link in enumerate(found.links):
        cells = (
            link.link.size,
            link.held.total,
            link.seen.total,
            link.held.total - link.seen.total,
            link.zero.total,
            link.link.actual_size,
        )
        yield f"<tr><td class='name'>{swatch(colour(depth))}{text(short(link))}</td>{_cells(cells)}</tr>"
        rows.append(cells)
    if len(rows) > 1:
        sums = (found.size, *map(sum, list(zip(*rows, strict=True))[1:]))
        yield f"<tr class='sum'><td class='name'>The disk</td>{_cells(sums)}</tr>"
    yield "</table></div></section>"


def _cells(sizes: Iterable[int]) -> str:
    return "".join(f"<td class='n'>{format_size(size)}</td>" for size in sizes)


def _warnings(disk: Disk) -> Iterator[str]:
    if disk.warnings:
        rows = "".join(f"<li>{text(warning)}</li>" for warning in disk.warnings)
        yield f"<section><h2>Warnings</h2><ul class='warnings'>{rows}</ul></section>"
