"""Checking an image: its links one after the other, and what makes a chain of them."""

import os
import shlex
from dataclasses import dataclass, field
from typing import Any, Final

from nbd_vmdk.cache import Cache
from nbd_vmdk.chain import MAX_LINKS, open_chain, parent_candidates, plain_name
from nbd_vmdk.errors import FileMissing, FormatError, StorageError, TrustError, VmdkError
from nbd_vmdk.look import descriptors_in, read_descriptor
from nbd_vmdk.ondisk.descriptor import Descriptor, last_component
from nbd_vmdk.ops.check.context import Context, Progress
from nbd_vmdk.ops.check.findings import Finding, ImageFile, Repair, Severity
from nbd_vmdk.ops.check.link import LinkCheck, LinkFacts
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.locks import vmware_lock
from nbd_vmdk.units import MIB
from nbd_vmdk.vm import locate

_UNREADABLE: Final = "what the snapshot does not hold itself can't be read"


@dataclass(slots=True)
class Report:
    """What a check found.

    filename  the image, as the user named it
    findings  in the order they were made
    links     the files of the chain, top first
    files     all files of the image itself, the parents' not among them
    in_use    who writes it meanwhile; if anybody does, findings may mislead
    data      whether compressed grains were inflated
    sealed    why nothing here can be mended where it is, if that is so: it is in an archive
    """

    filename: str
    findings: list[Finding] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    files: list[ImageFile] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    data: bool = False
    sealed: str | None = None

    @property
    def count_errors(self) -> int:
        """How many errors there are, those included that are not listed one by one."""
        return self._count(Severity.ERROR)

    @property
    def count_warnings(self) -> int:
        """How many warnings there are."""
        return self._count(Severity.WARNING)

    def _count(self, severity: Severity) -> int:
        return sum(max(finding.more, 1) for finding in self.findings if finding.severity is severity)

    def as_dict(self) -> dict[str, Any]:
        """The report for ``--json``."""
        return {
            "filename": self.filename,
            "links": self.links,
            "data": self.data,
            "in-use": self.in_use,
            "errors": self.count_errors,
            "warnings": self.count_warnings,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def check_image(
    path: str | os.PathLike[str],
    *,
    parent: str | os.PathLike[str] | None = None,
    allow_dirs: tuple[str | os.PathLike[str], ...] = (),
    allow_devices: bool = False,
    data: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Check the image ``path`` and its whole chain; nothing is changed and nothing is locked.

    With ``data`` every compressed grain is inflated.  Raises VmdkError only for what is no VMDK at all, can't
    be had, or is of a sort that is not supported; whatever else is wrong is a finding.
    """
    found = locate(path, allow_dirs=allow_dirs, allow_devices=allow_devices)
    options = OpenOptions(
        parent=parent, allow_dirs=allow_dirs, allow_devices=allow_devices, locks=False, cache_size=MIB
    )
    return check_in(found.folder, found.file, options, data=data, progress=progress)


def check_in(
    folder: Folder,
    name: str,
    options: OpenOptions,
    *,
    data: bool = False,
    progress: Progress | None = None,
    probe: bool = True,
) -> Report:
    """Check the image ``name`` of ``folder``; without ``probe`` nobody looks who else has it open."""
    context = Context(data=data, progress=progress)
    report = Report(folder.label(name), data=data, sealed=folder.read_only)
    _Chain(context, report, folder, name, options, probe=probe).run()
    if not context.findings.errors:
        _open_all(context, folder, name, options)
    report.findings = context.findings.all()
    return report


def _open_all(context: Context, folder: Folder, name: str, options: OpenOptions) -> None:
    """What the check let through must open: if it does not, that is a finding as well.

    What the operating system refuses says nothing of the image, and is raised.
    """
    try:
        for link in open_chain(folder, name, options, Cache(MIB)):
            link.close()
    except VmdkError as error:
        if isinstance(error, StorageError) and not isinstance(error, FileMissing):
            raise
        context.findings.add(
            Finding(
                severity=Severity.ERROR,
                slug=error.slug,
                file=error.file or folder.label(name),
                what=error.message,
                effect="the image can't be opened",
                # A hint that sends its reader to a check would lead back here.
                repair="none is known" if isinstance(error, FormatError) else error.hint or "none is known",
            )
        )


class _Chain:
    """The links of an image, checked from the top down."""

    def __init__(
        self,
        context: Context,
        report: Report,
        folder: Folder,
        name: str,
        options: OpenOptions,
        *,
        probe: bool,
    ) -> None:
        self._context = context
        self._report = report
        self._folder = folder
        self._name = name
        self._options = options
        self._probe = probe

    def run(self) -> None:
        """Check every link."""
        if self._probe and (held := vmware_lock(self._folder, last_component(self._name))):
            self._report.in_use.append(f"{self._folder.label(self._name)}: {held}")
        child: LinkFacts | None = None
        here: tuple[Folder, str] | None = (self._folder, self._name)
        seen: set[tuple[int, ...]] = set()
        for depth in range(MAX_LINKS + 1):
            if here is None:
                return
            facts = self._link(*here, depth)
            if child is not None:
                self._compare(child, facts, depth - 1)
            if facts.file.identity in seen or depth == MAX_LINKS:
                assert child is not None
                loops = facts.file.identity in seen
                what = (
                    f"the chain of parents leads back to {facts.file.label}"
                    if loops
                    else (f"the chain has more than {MAX_LINKS} links")
                )
                self._tell(
                    child,
                    depth - 1,
                    "chain-too-deep",
                    what,
                    "the image can't be opened",
                    "the parents' names must be mended",
                )
                return
            seen.add(facts.file.identity)
            child = facts
            here = self._parent(facts, depth)

    def _link(self, folder: Folder, name: str, depth: int) -> LinkFacts:
        has_parent = depth == 0 and self._options.parent is not None
        check = LinkCheck(self._context, folder, name, depth, probe=self._probe, has_parent=has_parent)
        facts = check.run()
        self._report.links.append(facts.file.label)
        self._report.in_use += check.in_use
        if depth == 0:
            self._report.files = list(facts.files.values())
        return facts

    def _tell(
        self,
        link: LinkFacts,
        depth: int,
        slug: str,
        what: str,
        effect: str,
        repair: Repair | str,
        severity: Severity = Severity.ERROR,
    ) -> None:
        self._context.findings.add(
            Finding(
                severity=severity,
                slug=slug,
                file=link.file.label,
                what=what,
                effect=effect,
                repair=repair,
                depth=depth,
            )
        )

    def _parent(self, link: LinkFacts, depth: int) -> tuple[Folder, str] | None:
        """Where the parent of a link is, None if it has none or it is nowhere."""
        descriptor = None if link.text is None else link.text.descriptor
        if depth == 0 and self._options.parent is not None:
            found = locate(
                self._options.parent,
                allow_dirs=self._options.allow_dirs,
                allow_devices=self._options.allow_devices,
            )
            return found.folder, found.file
        if descriptor is None:
            return None
        if not descriptor.has_parent:
            if descriptor.parent_hint:
                what = f"it names a parent, {descriptor.parent_hint}, but its parentCID says that it has none"
                why = "the descriptor was edited or damaged: which of the two is right is not known"
                self._tell(link, depth, "parent-contradicted", what, "the image can't be opened", why)
            return None
        refused: TrustError | None = None
        for name, is_guess in parent_candidates(descriptor.parent_hint) if descriptor.parent_hint else ():
            try:
                folder, plain = link.folder.folder_of(name), plain_name(name)
                folder.open(plain).close()
            except FileMissing:
                continue
            except TrustError as error:
                if not is_guess:  # nobody asked for what is a guess
                    refused = refused or error
                continue
            except VmdkError as error:
                self._tell(link, depth, error.slug, str(error), _UNREADABLE, error.hint or "")
                return None
            if is_guess and not _fits(descriptor, folder, plain):
                continue
            return folder, plain
        self._report_missing(link, depth, refused)
        return None

    def _report_missing(self, link: LinkFacts, depth: int, refused: TrustError | None) -> None:
        assert link.text is not None
        descriptor = link.text.descriptor
        cid = descriptor.parent_cid
        others = ((name, other) for name, other in descriptors_in(link.folder) if name != link.file.name)
        fitting = [name for name, other in others if descriptor.may_stand_on(other)]
        if refused is not None and not fitting:
            what = f"its parent {refused.fields['name']}: {refused.fields['why']}"
            self._tell(link, depth, refused.slug, what, _UNREADABLE, refused.hint or "")
            return
        repair: Repair | str = "put the parent beside it, or name it with --parent FILE"
        if len(fitting) == 1:
            asks = "content IDs are drawn at random: two disks may have the same"
            repair = link.text.repair(
                f"name {fitting[0]}, which has that content ID",
                lambda old: old.set("parentFileNameHint", fitting[0]),
                asks,
            )
        what = (
            f"its parent {descriptor.parent_hint or '(no name given)'} (content ID {cid:08x}) was not found"
        )
        self._tell(link, depth, "parent-not-found", what, _UNREADABLE, repair)

    def _compare(self, child: LinkFacts, parent: LinkFacts, depth: int) -> None:
        """Content IDs and sizes of a link and its parent."""
        if child.text is not None and child.text.descriptor.has_parent:
            expected = child.text.descriptor.parent_cid
            found = None if parent.text is None else parent.text.descriptor.cid
            if expected != found:
                self._report_mismatch(child, parent, expected, found, depth)
        if child.sectors and parent.sectors and child.sectors != parent.sectors:
            larger = child.sectors > parent.sectors
            what = f"it has {child.sectors} sectors, and its parent {parent.sectors}"
            effect = (
                "what lies behind the parent's end reads as zeros"
                if larger
                else ("the parent's tail is not visible")
            )
            why = "which of the sizes is right is not known"
            if larger:
                merged = f"nbd-vmdk snapshot commit {shlex.quote(child.file.label)}"
                why += f"; if it was made larger, {merged} makes the parent as large and merges it into that"
                why += ", rebase --flatten makes it a disk of its own"
            self._tell(child, depth, "chain-size", what, effect, why, Severity.WARNING)

    def _report_mismatch(
        self, child: LinkFacts, parent: LinkFacts, expected: int | None, found: int | None, depth: int
    ) -> None:
        assert child.text is not None
        label = parent.file.label
        has = "none" if found is None else f"{found:08x}"
        what = f"it expects parent content ID {expected:08x}, but {label} has {has}"
        repair: Repair | str = "the parent's descriptor tells no content ID"
        if found is not None:
            asks = f"it is right only if {label} has not been written since the snapshot was taken"
            repair = child.text.repair(
                "believe that the parent is unchanged", lambda old: old.set("parentCID", has), asks
            )
        effect = "what the snapshot does not hold itself may be other data than it was"
        self._tell(child, depth, "cid-mismatch", what, effect, repair)


def _fits(descriptor: Descriptor, folder: Folder, name: str) -> bool:
    parent = read_descriptor(folder, name)
    return parent is not None and descriptor.may_stand_on(parent)
