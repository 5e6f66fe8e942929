"""The chain in the page: a strip, facts and extents for each link."""

import os
from collections.abc import Iterator
from typing import Final

from nbd_vmdk.ops.picture.markup import HEIGHT, Part, colour, short, strip, swatch, text
from nbd_vmdk.ops.picture.survey import LinkSurvey, Survey
from nbd_vmdk.units import format_size

#: Extents listed for each link.
_MAX_EXTENTS: Final = 500
#: Room above and below a drawing's points.
_MARGIN: Final = 4


def chain(found: Survey) -> Iterator[str]:
    """All links, newest first."""
    explained = False
    yield f"<section><h2>{'The chain, newest first' if len(found.links) > 1 else 'The image'}</h2>"
    for depth, link in enumerate(found.links):
        yield "<div class='link'>"
        yield (
            f"<div class='head'><h3>{swatch(colour(depth))}{text(short(link))}</h3>"
            f"<span class='ids'>{_identity(found, depth)}</span></div>"
        )
        parts = list(link_parts(depth, link))
        yield strip(depth + 1, "low", parts, link.link.size, found, f"What {short(link)} holds")
        yield f"<p class='numbers'>{_numbers(depth, link)}</p>"
        yield from _details(found, depth, explain=not explained)
        explained = explained or bool(link.pieces)
        yield "</div>"
    yield "</section>"


def link_parts(depth: int, link: LinkSurvey) -> Iterator[Part]:
    """What a link's own strip is made of, from the bottom up."""
    held, seen = link.held.counts(), link.seen.counts()
    yield Part("data", colour(depth), seen)
    hidden = [has - shows for has, shows in zip(held, seen, strict=True)]
    yield Part("data that newer links hide", f"{colour(depth)} under", hidden)
    yield Part("zeros", "zero", link.zero.counts())
    yield Part("can't be read", "lost", link.lost.counts())


def _identity(found: Survey, depth: int) -> str:
    """Kind, content ID, and whether the parent is the one that the link was made on."""
    link = found.links[depth].link
    words = [text(link.create_type)]
    if link.cid is not None:
        words.append(f"CID <code>{link.cid:08x}</code>")
    descriptor = link.descriptor
    if descriptor is not None and descriptor.has_parent and descriptor.parent_cid is not None:
        below = found.links[depth + 1].link if depth + 1 < len(found.links) else None
        agrees = below is not None and below.cid == descriptor.parent_cid
        mark = "<span class='good'>✓ agrees</span>" if agrees else "<span class='bad'>✗ does not agree</span>"
        words.append(f"made on <code>{descriptor.parent_cid:08x}</code> {mark}")
    return " · ".join(words)


def _numbers(depth: int, link: LinkSurvey) -> str:
    """How much there is, and how it lies in the file."""
    held = link.held.total
    words = [f"<b>{format_size(held)}</b> of data"]
    hidden = held - link.seen.total
    if depth and held:
        words.append(f"<b>{format_size(hidden)}</b> of it hidden by newer links")
    if link.zero.total:
        words.append(f"<b>{format_size(link.zero.total)}</b> of zeros")
    words.append(f"files occupy <b>{format_size(link.link.actual_size)}</b>")
    if link.pieces is None:
        words.append("compressed")
    elif link.pieces:
        pieces = "1 piece" if link.pieces == 1 else f"{link.pieces:,} pieces"
        words.append(f"in <b>{pieces}</b>, {format_size(held // link.pieces)} each on average")
        if link.backwards:
            words.append(f"<b>{link.backwards:,}</b> of them out of order")
    return " · ".join(words)


def _details(found: Survey, depth: int, *, explain: bool) -> Iterator[str]:
    """What is folded away: the extents, and how the guest's order and the file's agree."""
    link = found.links[depth]
    extents = link.link.extents
    summary = "1 extent" if len(extents) == 1 else f"{len(extents)} extents"
    order = ", and the order of the data in its files" if link.pieces else ""
    yield f"<details><summary>{summary}{order}</summary>"
    yield "<div class='scroll'><table><tr><th>File</th><th>Type</th><th>Access</th><th class='n'>From</th>"
    yield "<th class='n'>Size</th><th class='n'>Grain</th><th class='n'>Occupies</th></tr>"
    for entry in extents[:_MAX_EXTENTS]:
        extent, storage = entry.extent, entry.extent.storage
        yield (
            f"<tr><td class='name'>{text(os.path.basename(storage.name)) if storage else '-'}</td>"
            f"<td>{text(extent.type_word)}</td><td>{text(entry.access)}</td>"
            f"<td class='n'>{format_size(entry.start)}</td><td class='n'>{format_size(extent.size)}</td>"
            f"<td class='n'>{format_size(extent.grain) if extent.grain else '-'}</td>"
            f"<td class='n'>{format_size(storage.allocated) if storage else '-'}</td></tr>"
        )
    yield "</table></div>"
    if len(extents) > _MAX_EXTENTS:
        yield f"<p class='soft'>and {len(extents) - _MAX_EXTENTS} more</p>"
    if link.pieces:
        yield _order(found, depth)
        if explain:
            yield "<p class='soft'>Left to right: place in the disk. Bottom to top: place in the file. One "
            yield "rising line is a file that is read from front to back; scattered points are seeks.</p>"
    yield "</details>"


def _order(found: Survey, depth: int) -> str:
    """Where in the files the first data of each bin is, as points."""
    link = found.links[depth]
    whole = max(link.file_size, 1)
    points = "".join(
        f"M{index + 0.5} {_MARGIN + (HEIGHT - 2 * _MARGIN) * (1 - place / whole):.1f}h.01"
        for index, place in enumerate(link.places)
        if place is not None
    )
    return (
        f"<svg class='order' viewBox='0 0 {found.count} {HEIGHT}' preserveAspectRatio='none' role='img' "
        f"aria-label='Order in the file'><path class='{colour(depth)} dots' d='{points}'/></svg>"
    )
