"""The whole disk at a glance, for a terminal: a strip as wide as the window, and what its colours mean.

Each column is an equal part of the disk.  Its bar is as high as the share of it that is data, in the colour
of the link that holds most of that; the ground is shaded where most of the rest is recorded as zeros.
Colours are the terminal's own eight, which fit its ground.  Without colour (NO_COLOR) a column is
the number of the link instead, and so it is where the terminal knows no block characters.
"""

import os
import shutil
import sys
from typing import TYPE_CHECKING, Final

from nbd_vmdk.cli import output
from nbd_vmdk.cli.progress import progress
from nbd_vmdk.units import format_size

if TYPE_CHECKING:
    from nbd_vmdk.disk import Disk
    from nbd_vmdk.ops.picture.survey import Survey

_BARS: Final = "▁▂▃▄▅▆▇█"
#: Green, blue, yellow, magenta, cyan, then their bright forms; red is kept for what is lost.
_COLOURS: Final = (32, 34, 33, 35, 36, 92, 94, 93, 95, 96)
_LOST: Final = 31
_ZERO_GROUND: Final = 100
_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_MIN_WIDTH: Final = 20
_MAX_WIDTH: Final = 240
#: Links that the legend names.
_MAX_LEGEND: Final = 16


def show(disk: "Disk") -> None:
    """Print the strip of ``disk``, its scale and its legend, and an empty line."""
    from nbd_vmdk.ops.picture.survey import survey

    columns = min(max(shutil.get_terminal_size().columns, _MIN_WIDTH), _MAX_WIDTH)
    width = max(-(-disk.size // columns), 1)
    with progress("drawing") as told:
        found = survey(disk, width, whole=False, progress=told)
    coloured = output.colourful(sys.stdout) and _can_draw()
    for line in _lines(found, -(-disk.size // width), coloured=coloured):
        output.line(line)
    output.line("")


def _can_draw() -> bool:
    try:
        _BARS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _lines(found: "Survey", columns: int, *, coloured: bool) -> list[str]:
    strip = _coloured(found, columns) if coloured else _plain(found, columns)
    end = format_size(found.size)
    lines = [strip, f"0{end:>{max(columns - 1, len(end) + 1)}}"]
    legend = []
    links = list(enumerate(found.links))
    for depth, link in links[:_MAX_LEGEND]:
        mark = _paint("█", _colour(depth)) if coloured else _digit(depth)
        name = output.clean(os.path.basename(link.link.name))
        legend.append(f"{mark} {depth} {name}  {_amount(link.seen.total, found.size)}")
    if left := links[_MAX_LEGEND:]:
        rest = sum(link.seen.total for _, link in left)
        legend.append(f"  {len(left)} more links  {_amount(rest, found.size)}")
    zeros = sum(link.seen_zero.total for link in found.links)
    if zeros:
        mark = _paint(" ", _ZERO_GROUND) if coloured else "-"
        legend.append(f"{mark} zeros  {_amount(zeros, found.size)}")
    if found.hole.total:
        legend.append(f"{' ' if coloured else '.'} holes  {_amount(found.hole.total, found.size)}")
    if found.lost.total:
        mark = _paint("█", _LOST) if coloured else "!"
        legend.append(f"{mark} can't be read  {_amount(found.lost.total, found.size)}")
    return lines + legend


def _coloured(found: "Survey", columns: int) -> str:
    """The strip in colours; codes are written where they change."""
    holders = [link.seen.counts() for link in found.links]
    zeros = [sum(column) for column in zip(*(link.seen_zero.counts() for link in found.links), strict=True)]
    lost, holes = found.lost.counts(), found.hole.counts()
    painted, last = [], ""
    for index in range(columns):
        data = [counts[index] for counts in holders]
        room = min(found.width, found.size - index * found.width)
        held = sum(data) + lost[index]
        bar = _BARS[min(held * len(_BARS) // room, len(_BARS) - 1)] if held else " "
        colour = _LOST if lost[index] else _colour(data.index(max(data)))
        code = f"\x1b[0;{colour}{f';{_ZERO_GROUND}' if zeros[index] > holes[index] else ''}m"
        painted.append(bar if code == last else code + bar)
        last = code
    return "".join(painted) + "\x1b[0m"


def _plain(found: "Survey", columns: int) -> str:
    """The strip as numbers of links, ``-`` for zeros, ``.`` for holes and ``!`` for what is lost."""
    holders = [link.seen.counts() for link in found.links]
    zeros = [sum(column) for column in zip(*(link.seen_zero.counts() for link in found.links), strict=True)]
    lost, holes = found.lost.counts(), found.hole.counts()
    marks = []
    for index in range(columns):
        data = [counts[index] for counts in holders]
        if lost[index]:
            marks.append("!")
        elif any(data):
            marks.append(_digit(data.index(max(data))))
        else:
            marks.append("-" if zeros[index] > holes[index] else ".")
    return "".join(marks)


def _paint(text: str, code: int) -> str:
    return f"\x1b[{code}m{text}\x1b[0m"


def _colour(depth: int) -> int:
    return _COLOURS[depth % len(_COLOURS)]


def _digit(depth: int) -> str:
    return _DIGITS[depth] if depth < len(_DIGITS) else "+"


def _amount(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0
    return f"{format_size(part)}, {'<1' if 0 < share < 1 else f'{share:.0f}'}%"
