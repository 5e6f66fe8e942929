"""Bins as the outlines of a stacked bar chart, in SVG's path language."""

from collections.abc import Sequence

#: What there is little of is drawn at least this high, of 1: a single grain of a large disk is to be seen.
LEAST = 0.14


def heights(parts: Sequence[Sequence[int]], width: int, size: int) -> list[list[float]]:
    """How high each part of each bin is drawn, parts on top of each other never being more than 1.

    ``parts`` are the bytes of each sort in each bin; the last bin is as wide as ``size`` leaves it.
    """
    count = -(-size // width)
    rows = [[0.0] * count for _ in parts]
    for index in range(count):
        room = min(width, size - index * width)
        column = [part[index] / room for part in parts]
        if not any(column):
            continue
        column = [max(share, LEAST) if share else 0.0 for share in column]
        above = max(sum(column), 1.0)
        for row, share in zip(rows, column, strict=True):
            row[index] = share / above
    return rows


def outlines(rows: Sequence[Sequence[float]], height: int) -> list[str]:
    """The rows stacked from the bottom up: a path for each, a unit a bin wide and ``height`` high in all."""
    paths = []
    base = [0.0] * len(rows[0]) if rows else []
    for row in rows:
        top = [low + share for low, share in zip(base, row, strict=True)]
        paths.append(_path(base, top, height))
        base = top
    return paths


def _path(base: Sequence[float], top: Sequence[float], height: int) -> str:
    """Every stretch of bins that has any height, as one closed outline."""
    path = []
    index, count = 0, len(base)
    while index < count:
        if top[index] <= base[index]:
            index += 1
            continue
        first = index
        while index < count and top[index] > base[index]:
            index += 1
        path.append(f"M{first} {_at(base[first], height)}")
        path += _steps(top, range(first, index), height, 1)
        path += _steps(base, range(index - 1, first - 1, -1), height, 0)
        path.append("z")
    return "".join(path)


def _steps(levels: Sequence[float], indices: range, height: int, ahead: int) -> list[str]:
    """The stairs along ``levels``: up or down at a bin's near edge, then to its far one."""
    steps: list[str] = []
    last = None
    for index in indices:
        level = _at(levels[index], height)
        if level == last:
            steps.pop()
        else:
            steps.append(f"V{level}")
        steps.append(f"H{index + ahead}")
        last = level
    return steps


def _at(share: float, height: int) -> str:
    """SVG counts from the top."""
    return f"{height * (1 - share):.2f}".rstrip("0").rstrip(".")
