"""What a check finds, and what a repair would change.

A finding names a broken invariant, its place, what it means for the guest's data, and either a repair or
the reason why there is none.  A repair is a list of changes to bytes of files, worked out by the check;
repair.py only carries them out.  So the plan that a user reads is what is done.

A repair is *safe* if it needs no knowledge of the guest's data: what the guest could read before, it reads
the same after.  One that is not (lost bytes become zeros, a snapshot is declared to fit) is made only if the
user asks for it by the finding's slug; its `asks` says why.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import Any, Final

from nbd_vmdk.ondisk.descriptor import Descriptor
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder

#: Findings of one sort in one file that are listed one by one; the rest are told as one with a count.
LISTED: Final = 20
#: Bytes of changes that one check holds in memory; damage beyond that is mended by the next repair.
_MAX_CHANGES: Final = 64 << 20
#: What a change costs in memory besides its bytes, roughly.
_CHANGE_COST: Final = 200


class Severity(StrEnum):
    """ERROR: guest data is lost, wrong or in danger.  WARNING: odd, and harmless as it is."""

    ERROR = "error"
    WARNING = "warning"


class Stage(IntEnum):
    """When a change is made: all of a stage is durable before the next begins.

    So nothing durable ever points at what is not there yet, and a flag that says "all is well" comes last.
    """

    CONTENT = 0
    TABLES = 1
    POINTERS = 2
    FLAGS = 3


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file of the image: what it is, and the gate by which it is opened again for writing."""

    identity: tuple[int, ...]
    folder: Folder = field(compare=False)
    name: str = field(compare=False)
    label: str = field(compare=False)

    @classmethod
    def of(cls, storage: Storage, folder: Folder, name: str) -> "ImageFile":
        """The file that ``storage`` is, opened as ``name`` of ``folder``."""
        return cls(storage.identity, folder, name, storage.name)


@dataclass(frozen=True, slots=True)
class Write:
    """Put ``data`` at byte ``at``."""

    file: ImageFile
    stage: Stage
    at: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Copy:
    """Put at byte ``at`` the ``length`` bytes that the file had at ``source`` before the repair."""

    file: ImageFile
    stage: Stage
    at: int
    source: int
    length: int


@dataclass(frozen=True, slots=True)
class Resize:
    """Make the file at least ``size`` bytes long, or with ``exact`` just so long."""

    file: ImageFile
    size: int
    exact: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A descriptor in its place: byte ``at`` of a file, with ``room`` for it, None if the file is its own."""

    file: ImageFile
    descriptor: Descriptor
    at: int
    room: int | None

    def changes(self, new: Descriptor) -> "tuple[Change, ...] | None":
        """What puts ``new`` in its place; None if there is no room."""
        before, after = self.descriptor.to_bytes(), new.to_bytes()
        changes: list[Change] = []
        if self.room is None:
            changes.append(Resize(self.file, len(after), exact=True))
        elif len(after) > self.room:
            return None
        else:
            after = after.ljust(len(before), b"\0")
        differ = (at for at, (one, two) in enumerate(zip(before, after, strict=False)) if one != two)
        first = next(differ, min(len(before), len(after)))
        if after[first:]:
            changes.insert(0, Write(self.file, Stage.POINTERS, self.at + first, after[first:]))
        return tuple(changes)

    def repair(
        self, what: str, edit: Callable[[Descriptor], Descriptor], asks: str | None = None
    ) -> "Repair | str":
        """A repair that makes the descriptor what ``edit`` returns."""
        if self.changes(edit(self.descriptor)) is None:
            return "the descriptor's area has no room for it"
        return Repair(what, (Edit(self, edit),), asks)


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """Change a descriptor's text.  Several edits of one text are made one after the other."""

    text: Text
    edit: Callable[[Descriptor], Descriptor]

    @property
    def file(self) -> ImageFile:
        """The file that holds the text."""
        return self.text.file


Change = Write | Copy | Resize | Edit


@dataclass(frozen=True, slots=True, eq=False)
class Repair:
    """What mends a finding.  ``asks`` is None for a safe repair, else why the user must ask for it."""

    text: str
    changes: tuple[Change, ...]
    asks: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One broken invariant.

    slug      its stable name
    file      the file that is wrong, as the user would write it
    what      what is wrong
    effect    what that means for the guest's data
    repair    what mends it, or why nothing does
    table, entry   place in the tables, counting from 0
    guest     byte of the disk that is concerned
    at        byte of the file
    depth     the link, 0 being the image itself
    more      findings of this sort that are not listed: then this one stands for them
    """

    severity: Severity
    slug: str
    file: str
    what: str
    effect: str
    repair: Repair | str
    table: int | None = None
    entry: int | None = None
    guest: int | None = None
    at: int | None = None
    depth: int = 0
    more: int = 0

    @property
    def place(self) -> str:
        """Where it is, for people: table, entry, guest and file offset as far as they make sense."""
        words = [
            f"{word} {value}"
            for word, value in (("table", self.table), ("entry", self.entry), ("guest offset", self.guest))
            if value is not None
        ]
        if self.at is not None and not words:
            words.append(f"byte {self.at}")
        return ", ".join(words)

    def as_dict(self) -> dict[str, Any]:
        """The finding for ``--json``."""
        facts: dict[str, Any] = {
            "severity": self.severity.value,
            "finding": self.slug,
            "file": self.file,
            "depth": self.depth,
        }
        places = {"table": self.table, "entry": self.entry, "guest-offset": self.guest, "offset": self.at}
        facts |= {key: value for key, value in places.items() if value is not None}
        if self.more:
            facts["more"] = self.more
        facts |= {"what": self.what, "effect": self.effect}
        if isinstance(self.repair, str):
            return facts | {"repair": None, "why-not": self.repair}
        facts["repair"] = self.repair.text
        if self.repair.asks is not None:
            facts["asks"] = self.repair.asks
        return facts


@dataclass(slots=True)
class _Rest:
    """Findings of one sort beyond those that are listed."""

    first: Finding
    count: int = 0
    repairs: dict[int, Repair] = field(default_factory=dict)


class Findings:
    """Gathers findings; thousands of one sort in one file become a list of the first and a count."""

    def __init__(self) -> None:
        self._found: list[Finding] = []
        self._counts: dict[tuple[str, ...], int] = {}
        self._rest: dict[tuple[str, ...], _Rest] = {}
        self._room = _MAX_CHANGES
        self._known: dict[int, Repair] = {}
        self._unmendable: set[str] = set()
        self.errors = 0

    def add(self, finding: Finding) -> None:
        """Take one finding."""
        finding = self._bounded(finding)
        if finding.severity is Severity.ERROR:
            self.errors += 1
            if _way(finding) != "safe":
                self._unmendable.add(finding.file)
        key = (finding.file, finding.slug, _way(finding))
        count = self._counts[key] = self._counts.get(key, 0) + 1
        if count <= LISTED:
            self._found.append(finding)
            return
        rest = self._rest.setdefault(key, _Rest(finding))
        rest.count += 1
        if isinstance(finding.repair, Repair):
            rest.repairs[id(finding.repair)] = finding.repair

    def _bounded(self, finding: Finding) -> Finding:
        """The finding, its repair left out if all of them together would take too much memory."""
        repair = finding.repair
        if isinstance(repair, str) or id(repair) in self._known:
            return finding
        cost = sum(
            _CHANGE_COST + (len(change.data) if isinstance(change, Write) else 0) for change in repair.changes
        )
        if cost > self._room:
            return replace(finding, repair="too much is damaged for one repair: repair again after it")
        self._room -= cost
        self._known[id(repair)] = repair
        return finding

    def unmendable(self, file: str) -> bool:
        """Whether ``file`` has an error that no safe repair mends."""
        return file in self._unmendable

    def all(self) -> list[Finding]:
        """All findings in the order they were made, sorts with too many of them ending in a count."""
        summaries = []
        for rest in self._rest.values():
            repair = rest.first.repair
            if isinstance(repair, Repair):
                changes = tuple(change for each in rest.repairs.values() for change in each.changes)
                repair = Repair(repair.text, changes, repair.asks)
            what = f"and {rest.count} more like these, the first: {rest.first.what}"
            summaries.append(replace(rest.first, what=what, repair=repair, more=rest.count))
        return [*self._found, *summaries]


def _way(finding: Finding) -> str:
    """How a finding is mended: by a safe repair, on request, or not at all."""
    if isinstance(finding.repair, str):
        return "none"
    return "safe" if finding.repair.asks is None else "asks"
