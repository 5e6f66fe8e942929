"""What is made of an entry of a grain table and of the same entry of the redundant twin: the table of cases.

Writers change the table first and the twin second, so after a crash either may be the newer one, and both are
sound.  After damage usually one is sound.  The rule for all cases: a repair that nobody asked for never turns
what can't be read into other bytes than it held, and never changes what can be read but where the twin names
a grain that nobody else has.  So:

*   a place that nobody else has is believed before everything that can't be right, or is odd.  Chance does
    not make such places;
*   of two entries that can be right the table's stays, as the newer one and the one that readers go by.  But
    in a file that was closed cleanly a difference is damage, and then a 0 may be what is left of a wiped
    sector.  The twin's grain is taken if that is what it looks like, or if the file is all accounted for
    with it: in a file with much that nobody names, damage of the twin may well name some of that;
*   where the table's entry can't be right and the twin's says that there is no grain, a grain may be lost all
    the same, by damage of both.  The twin is believed only if nothing else in the file speaks for a lost
    grain (evidence.py): then all room in it is accounted for, and the entry never named a grain.  Else the
    entry stays unreadable, and becomes what the twin says if the user asks for it;
*   where the entry may have named a grain that was cut off together with the end of the file, nothing in the
    file can speak for or against it: that is always asked;
*   what is in doubt is never copied over the other copy: both stay, as what is left to judge by.

The copies of the table itself: a table whose place can't be read (its directory entry is 0 or leads nowhere)
is looked at through its twin, which then has no twin itself: column NONE.  That copy is made anew by
directories.py.  Where neither can be read the directory is all that is told about, and nothing is changed.
"""

from enum import IntEnum, StrEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt


class State(IntEnum):
    """What an entry is by itself.

    HOLE     0: there is no grain
    ZEROS    1, in a file that declares it to mean zeros
    STRAY    1, in a file that does not
    GRAIN    names a place that no other grain has
    SKEWED   the same, but is not aligned, as nearly all others are, in a file that was closed cleanly
    SHARED   names a place that another grain has as well, or that can't be told to be free
    CUT      names a place of which the end of the file left a part
    PAST     names a place behind the end of the file, where a grain may have been that was cut off
    NOWHERE  names a place where no grain ever was: among the tables, or far behind the end, or askew there
    NONE     this copy of the table can't be read
    """

    HOLE = 0
    ZEROS = 1
    STRAY = 2
    GRAIN = 3
    SKEWED = 4
    SHARED = 5
    CUT = 6
    PAST = 7
    NOWHERE = 8
    NONE = 9


class Verdict(StrEnum):
    """What a repair does.

    KEEP   the table's entry is right: the twin gets it
    TWIN   the twin's is right: the table gets it
    CLEAN  TWIN in a file that was closed cleanly, else KEEP
    BASE   TWIN where there is no parent, so that both read the same, else KEEP
    WIPED  in a file that was closed cleanly: TWIN if the entry's sector of the table is all zeros and that of
           the twin names several grains, or if all of the file is accounted for with the twin's grain; else
           LEAVE.  In a file that was not: KEEP
    DOUBT  LEAVE over a parent, in a file that was closed cleanly; else KEEP
    SURE   TWIN if nothing in the file speaks for a lost grain; else ASK if the table's entry can't be right,
           LEAVE if it can
    ASK    both stay; on request the table gets the twin's
    CUT    both stay; on request the file is lengthened, so that the rest of the grain is zeros
    LOST   both stay; on request both become a hole
    LEAVE  both stay, and it is told
    """

    KEEP = "keep"
    TWIN = "twin"
    CLEAN = "clean"
    BASE = "base"
    WIPED = "wiped"
    DOUBT = "doubt"
    SURE = "sure"
    ASK = "ask"
    CUT = "cut"
    LOST = "lost"
    LEAVE = "leave"


#: A row for each state of the table's entry, a column for each of the twin's.
_CASES: Final = """
         HOLE   ZEROS  STRAY  GRAIN  SKEWED SHARED CUT    PAST   NOWHERE NONE
HOLE     keep   doubt  keep   wiped  keep   keep   leave  keep   keep    keep
ZEROS    keep   keep   keep   keep   keep   keep   keep   keep   keep    keep
STRAY    base   keep   keep   clean  keep   keep   keep   keep   keep    keep
GRAIN    keep   keep   keep   keep   keep   keep   keep   keep   keep    keep
SKEWED   keep   keep   keep   twin   keep   keep   keep   keep   keep    keep
SHARED   sure   sure   leave  twin   leave  leave  leave  leave  leave   keep
CUT      cut    cut    cut    twin   cut    cut    cut    cut    cut     cut
PAST     ask    ask    ask    twin   lost   lost   cut    lost   lost    lost
NOWHERE  sure   sure   ask    twin   lost   lost   cut    lost   lost    lost
"""

#: Verdicts as numbers, for whole tables at once.
NUMBERS: Final = {verdict: number for number, verdict in enumerate(Verdict)}


def _read() -> npt.NDArray[np.uint8]:
    columns, *rows = (line.split() for line in _CASES.strip().splitlines())
    table = np.zeros((len(State), len(State)), np.uint8)
    for name, *words in rows:
        for column, word in zip(columns, words, strict=True):
            table[State[name], State[column]] = NUMBERS[Verdict(word)]
    return table


CASES: Final = _read()


def verdicts(
    states: npt.NDArray[Any], twins: npt.NDArray[Any], *, unclean: bool, child: bool
) -> npt.NDArray[Any]:
    """The verdicts, as NUMBERS, for entries of these states; CLEAN, BASE and DOUBT are settled."""
    found: npt.NDArray[Any] = CASES[states, twins]
    keep, twin = NUMBERS[Verdict.KEEP], NUMBERS[Verdict.TWIN]
    found[found == NUMBERS[Verdict.CLEAN]] = keep if unclean else twin
    found[found == NUMBERS[Verdict.BASE]] = keep if child else twin
    if unclean:
        found[found == NUMBERS[Verdict.WIPED]] = keep
    found[found == NUMBERS[Verdict.DOUBT]] = NUMBERS[Verdict.LEAVE] if child and not unclean else keep
    return found
