"""What every checker is handed: where findings go, how far it has come, and the file it looks at."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nbd_vmdk.ops.check.findings import Finding, Findings, ImageFile, Repair, Resize, Severity, Stage, Write
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import SECTOR, align_up

#: Told how many bytes are done, of how many; the second grows as more is found that there is to do.
Progress = Callable[[int, int], None]

NOT_INVENTED = "nothing tells what was there"


@dataclass(slots=True)
class Context:
    """One run of a check.  ``data`` asks for every compressed grain to be inflated."""

    findings: Findings = field(default_factory=Findings)
    data: bool = False
    progress: Progress | None = None
    done: int = 0
    total: int = 0

    def expect(self, count: int) -> None:
        """Say that ``count`` more bytes will be looked at."""
        self.total += count
        self.advance(0)

    def advance(self, count: int) -> None:
        """Say that ``count`` bytes have been looked at."""
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass(slots=True)
class Subject:
    """One file under check.

    start     byte of the disk at which the extent begins
    sectors   guest sectors that its line says it covers, None where there is no line
    child     it belongs to a link with a parent, so that a hole shows the parent
    depth     the link, 0 being the image itself
    """

    context: Context
    file: ImageFile
    storage: Storage
    start: int = 0
    sectors: int | None = None
    child: bool = False
    depth: int = 0

    @property
    def hole(self) -> str:
        """What a hole reads as."""
        return "the parent's data" if self.child else "zeros"

    @property
    def unmendable(self) -> bool:
        """Whether it has an error that no safe repair mends."""
        return self.context.findings.unmendable(self.file.label)

    def error(self, slug: str, what: str, effect: str, repair: Repair | str, **place: Any) -> None:
        """Add an error."""
        self._add(Severity.ERROR, slug, what, effect, repair, place)

    def warning(self, slug: str, what: str, effect: str, repair: Repair | str, **place: Any) -> None:
        """Add a warning."""
        self._add(Severity.WARNING, slug, what, effect, repair, place)

    def _add(
        self,
        severity: Severity,
        slug: str,
        what: str,
        effect: str,
        repair: Repair | str,
        place: dict[str, Any],
    ) -> None:
        self.context.findings.add(
            Finding(
                severity=severity,
                slug=slug,
                file=self.file.label,
                what=what,
                effect=effect,
                repair=repair,
                depth=self.depth,
                **place,
            )
        )

    def write(self, at: int, data: bytes, stage: Stage) -> Write:
        """A change of this file."""
        return Write(self.file, stage, at, data)

    def check_whole_sectors(self, *, tail_is_data: bool) -> None:
        """Check that the file is a whole number of sectors; ``tail_is_data`` if guest data ends it."""
        odd = self.storage.size % SECTOR
        if not odd:
            return
        end = align_up(self.storage.size, SECTOR)
        mend = Repair(f"fill the last sector with {SECTOR - odd} zero bytes", (Resize(self.file, end),))
        self.warning(
            "odd-size",
            f"the file ends {odd} bytes into a sector: something was cut off, or added",
            "none for the guest, but some readers refuse such a file",
            "the cut-off sector holds guest data"
            if tail_is_data
            else "first the errors in the file must be mended"
            if self.unmendable
            else mend,
            at=self.storage.size - odd,
        )


@dataclass(slots=True)
class Space:
    """Room behind the end of a file, for what a repair must put somewhere.

    ``blocked`` says why there is none: while a table names grains behind the end, whatever is put there would
    become theirs.  ``pointer`` is the byte of a field that holds the sector where free space begins.
    """

    subject: Subject
    align: int
    blocked: str | None = None
    pointer: int | None = None
    _next: int = 0

    def take(self, length: int) -> int:
        """A place of ``length`` bytes."""
        if not self._next:
            # One grain further than the end, which may have cut off the last one.
            self._next = align_up(self.subject.storage.size, self.align) + self.align
        at = self._next
        self._next = align_up(at + length, SECTOR)
        return at
