"""
The states that a power cut can leave an image's files in, built from a log of all that was done to them.

What a file was told before its last sync is there. Of what came after it, any part may be there, in any
order; a write or a punched range may be there in part, cut at sectors or at pages. Files know nothing of each
other: all are cut at the same moment, and each one's undecided operations are drawn for themselves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, permutations
from typing import NamedTuple

from tests.recording import Event, Log, apply

#: Undecided operations up to which every subset is built; in every order where order matters.
FEW = 5
FEW_IN_ORDER = 4
TEARS = (512, 4096)


class State(NamedTuple):
    """The files after a power cut before event `cut`; `kept` is what came through of what was undecided."""

    cut: int
    kept: tuple[Event, ...]
    files: dict[str, bytes]

    def __str__(self) -> str:
        kept = ", ".join(f"{e.number}:{e.op} {e.file} {e.at}+{e.length}" for e in self.kept)
        return f"power cut before event {self.cut}, kept: {kept or 'nothing'}"


def states(log: Log, rng: random.Random, samples: int, others: int) -> Iterator[State]:
    """
    States for every cut at a sync and `others` in between: where little is undecided all of them, and at
    most `samples` drawn at random. No two with equal files follow from one cut.
    """
    durable = {name: bytes(data) for name, data in log.initial.items()}
    undecided: dict[str, list[Event]] = {name: [] for name in durable}
    cuts = {event.number + late for event in log.events if event.op == "sync" for late in (0, 1)}
    total = len(log.events)
    cuts |= {0, total, *rng.sample(range(total), min(others, total))}
    for cut in range(total + 1):
        if cut in cuts:
            yield from _at_cut(cut, durable, undecided, rng, samples)
        if cut == total:
            break
        event = log.events[cut]
        if event.op == "sync":
            if undecided[event.file]:
                durable[event.file] = _applied(durable[event.file], undecided[event.file])
                undecided[event.file] = []
        elif event.op != "mark":
            undecided[event.file].append(event)


def _at_cut(
    cut: int,
    durable: dict[str, bytes],
    undecided: dict[str, list[Event]],
    rng: random.Random,
    samples: int,
) -> Iterator[State]:
    events = sorted((event for row in undecided.values() for event in row), key=lambda event: event.number)
    seen: set[tuple[int, ...]] = set()
    for kept in [*_all_choices(events), *(_drawn(events, rng) for _ in range(samples if events else 0))]:
        files = dict(durable)
        for name in dict.fromkeys(event.file for event in kept):
            files[name] = _applied(durable[name], [event for event in kept if event.file == name])
        mark = tuple(hash(data) for data in files.values())
        if mark not in seen:
            seen.add(mark)
            yield State(cut, tuple(kept), files)


def _applied(data: bytes, events: Sequence[Event]) -> bytes:
    result = bytearray(data)
    for event in events:
        apply(result, event)
    return bytes(result)


def _all_choices(events: Sequence[Event]) -> Iterator[Sequence[Event]]:
    """Every subset of few events, in every order where that matters; of many, nothing and everything."""
    if _order_matters(events) and len(events) <= FEW_IN_ORDER:
        for count in range(len(events) + 1):
            yield from permutations(events, count)
    elif len(events) <= FEW:
        for count in range(len(events) + 1):
            yield from combinations(events, count)
    else:
        yield ()
        yield events


def _order_matters(events: Sequence[Event]) -> bool:
    """Whether some of the events touch the same bytes or change the size."""
    for name in {event.file for event in events}:
        row = sorted((event for event in events if event.file == name), key=lambda event: event.at)
        if any(event.op == "truncate" for event in row) or any(a.end > b.at for a, b in pairwise(row)):
            return True
    return False


def _drawn(events: Sequence[Event], rng: random.Random) -> list[Event]:
    """Some of the events, some of them torn, in their order or in another."""
    kept: list[Event]
    match rng.randrange(5):
        case 0:  # what a disk does that writes in order and stops in the middle
            at = rng.randrange(len(events))
            kept = [*events[:at], *_torn(events[at], rng)]
        case 1:
            left_out = rng.randrange(len(events))
            kept = [event for i, event in enumerate(events) if i != left_out]
        case 2:
            kept = [rng.choice(events)]
        case _:
            share = rng.choice((0.15, 0.5, 0.5, 0.85))
            kept = [event for event in events if rng.random() < share]
    if rng.random() < 0.5:
        kept = [piece for event in kept for piece in (_torn(event, rng) if rng.random() < 0.6 else [event])]
    if rng.random() < 0.4:
        rng.shuffle(kept)
    return kept


def _torn(event: Event, rng: random.Random) -> list[Event]:
    """Some of the pieces that an event falls into, by sectors or by pages of the file."""
    if event.op == "truncate":
        return [event]
    unit = rng.choice(TEARS)
    edges = [event.at, *range((event.at // unit + 1) * unit, event.end, unit), event.end]
    pieces = [
        event._replace(at=begin, length=end - begin, data=event.data[begin - event.at : end - event.at])
        for begin, end in pairwise(edges)
    ]
    if rng.random() < 0.3:
        return pieces[: rng.randrange(len(pieces) + 1)]
    return [piece for piece in pieces if rng.random() < 0.5]
