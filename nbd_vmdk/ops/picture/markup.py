"""Pieces of the page that several of its parts are made of."""

import html
import os
from collections.abc import Sequence
from typing import Final, NamedTuple

from nbd_vmdk.errors import printable
from nbd_vmdk.ops.picture.strips import heights, outlines
from nbd_vmdk.ops.picture.survey import LinkSurvey, Survey

#: Colours that there are for links.
_COLOURS: Final = 8
#: Units of height of every drawing.
HEIGHT: Final = 100


class Part(NamedTuple):
    """One sort of bytes in a strip: its name, its class in the style sheet, and how much is in each bin."""

    name: str
    css: str
    counts: Sequence[int]


def plain(value: object) -> str:
    """Anything as text that is valid and that nothing obeys; what is neither is shown as escapes."""
    return printable(str(value).encode("utf-8", "backslashreplace").decode())


def text(value: object) -> str:
    """Anything as it may stand in HTML, also between quotes."""
    return html.escape(plain(value))


def short(link: LinkSurvey) -> str:
    """What a link is called in the page."""
    return os.path.basename(link.link.name)


def colour(depth: int) -> str:
    """The class in the style sheet that has a link's colour."""
    return f"c{depth % _COLOURS}"


def percent(part: int, whole: int) -> str:
    """A share for people; a little is never shown as nothing."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "under 0.1%"
    return f"{share:.1f}%" if 0 < share < 10 else f"{share:.0f}%"


def swatch(css: str) -> str:
    """A small square in a colour."""
    square = f"<rect class='{css}' width='12' height='12' rx='3'/>"
    return f"<svg class='swatch' viewBox='0 0 12 12'>{square}</svg>"


def strip(number: int, css: str, parts: Sequence[Part], size: int, found: Survey, label: str) -> str:
    """A stacked bar chart, the ``number``-th that the script knows; what lies beyond ``size`` is greyed."""
    drawn = found.count
    count = -(-size // found.width)
    paths = outlines(heights([part.counts for part in parts], found.width, size), HEIGHT)
    shapes = "".join(
        f"<path class='{part.css}' d='{path}'/>" for part, path in zip(parts, paths, strict=True) if path
    )
    if count < drawn:
        shapes += f"<rect class='beyond' x='{count}' width='{drawn - count}' height='{HEIGHT}'/>"
    view = f"viewBox='0 0 {drawn} {HEIGHT}' preserveAspectRatio='none' aria-hidden='true'"
    return (
        f"<div class='strip {css}' data-strip='{number}' tabindex='0' role='img' aria-label='{text(label)}'>"
        f"<svg {view}>{shapes}</svg></div>"
    )
