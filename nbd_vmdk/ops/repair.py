"""Repairing an image: choosing what to mend, writing an undo file, and making the changes in order.

What is mended, and how, the check has worked out (ops/check): here its changes are put together for each
file, logged in an undo file with the bytes that they replace, and only then made.  All of a stage is durable
before the next begins: new tables and copies of grains first, then table entries, then what points at tables,
then the marks that say that all is well.

Only the image itself is changed, never a parent: a parent may have other children, and is repaired by its
own name.  No bytes of the guest are ever invented; what can't be mended without is left, and said so.
"""

import os
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from nbd_vmdk.errors import InUse, OptionError, StorageError, WriteRefused
from nbd_vmdk.ondisk.descriptor import last_component
from nbd_vmdk.ops.changes import FileWork, Log, MemoryLog, Step, carry_out
from nbd_vmdk.ops.check.context import Progress
from nbd_vmdk.ops.check.findings import Edit, Finding, ImageFile, Repair, Text
from nbd_vmdk.ops.check.runner import Report, check_in
from nbd_vmdk.ops.undo import Undo, undo_path, write_undo
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.storage.locks import check_vmware_lock
from nbd_vmdk.units import MIB
from nbd_vmdk.vm import locate


@dataclass(slots=True)
class Plan:
    """What a repair would do.

    report   what the check found
    chosen   the repairs to be made, safe ones first, with the findings that each mends
    """

    report: Report
    chosen: list[tuple[Repair, list[Finding]]] = field(default_factory=list)

    def is_chosen(self, finding: Finding) -> bool:
        """Whether a finding is mended."""
        return any(finding.repair is repair for repair, _findings in self.chosen)

    def as_dict(self) -> dict[str, Any]:
        """The plan for ``--json``."""
        findings = [
            finding.as_dict() | {"planned": self.is_chosen(finding)} for finding in self.report.findings
        ]
        return self.report.as_dict() | {"findings": findings}


def make_plan(report: Report, also: Collection[str] = ()) -> Plan:
    """Choose what to mend: all that is safe, and what the user asks for by the slugs of findings.

    Raises OptionError for a slug that no finding with such a repair has.
    """
    own = [
        finding for finding in report.findings if finding.depth == 0 and isinstance(finding.repair, Repair)
    ]
    on_request = {finding.slug for finding in own if _asks(finding)}
    for slug in also:
        if slug not in on_request:
            known = ", ".join(sorted(on_request)) or "nothing here"
            raise OptionError(None, why=f"--also {slug}: {known} can be asked for")
    groups: dict[int, tuple[Repair, list[Finding]]] = {}
    for asked in (False, True):
        for finding in own:
            repair = finding.repair
            if isinstance(repair, Repair) and _asks(finding) is asked and (not asked or finding.slug in also):
                groups.setdefault(id(repair), (repair, []))[1].append(finding)
    return Plan(report, list(groups.values()))


def _asks(finding: Finding) -> bool:
    return isinstance(finding.repair, Repair) and finding.repair.asks is not None


def plan_repair(
    path: str | os.PathLike[str],
    *,
    also: Collection[str] = (),
    data: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """Check the image ``path`` and say what a repair would do; nothing is changed.

    ``options`` are parent, allow_dirs and allow_devices of OpenOptions.  Raises as check_image does, and
    OptionError for an unknown slug in ``also``.
    """
    folder, name, chosen = _opened(path, options)
    report = check_in(folder, name, chosen, data=data, progress=progress)
    if report.in_use:
        raise InUse(
            None, how=report.in_use[0], hint="stop the other user first: what he has changed is not all here"
        )
    return make_plan(report, also)


def apply_repair(
    path: str | os.PathLike[str],
    *,
    also: Collection[str] = (),
    data: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Plan, Report]:
    """Repair the image ``path``; what was done, and what a check finds after it.

    While it runs nobody else can write the image.  Raises InUse if somebody does, WriteRefused if the undo
    file of an earlier repair is there, and what planning raises.  If it fails half-way the undo file is
    there, and undo_repair puts everything back.
    """
    folder, name, chosen = _opened(path, options)
    return apply_in(folder, name, chosen, also=also, data=data, progress=progress, undo=undo_path(path))


def apply_in(
    folder: Folder,
    name: str,
    options: OpenOptions,
    *,
    also: Collection[str] = (),
    data: bool = False,
    progress: Progress | None = None,
    undo: str | None,
) -> tuple[Plan, Report]:
    """Repair the image ``name`` of ``folder``; ``undo`` None keeps no undo file, for what is in memory."""
    with ExitStack() as held:
        storages = _lock(held, folder, name, check_in(folder, name, options).files)
        plan = make_plan(check_in(folder, name, options, data=data, progress=progress, probe=False), also)
        if not plan.chosen:
            return plan, plan.report
        work = [FileWork(file, storages[file], steps) for file, steps in _by_file(plan, storages).items()]
        log: Log
        if undo is None:
            log = MemoryLog(work)
        else:
            texts = [repair.text for repair, _findings in plan.chosen]
            contents = (data for each in work for data in each.contents())
            write_undo(undo, name, texts, [each.change for each in work], contents)
            log = held.enter_context(Undo(undo))
            for each, logged in zip(work, log.files, strict=True):
                each.change = logged
        try:
            carry_out(work, log)
        except StorageError as error:
            error.hint = "what was changed is taken back by --undo"
            raise
        return plan, check_in(folder, name, options, data=data, progress=progress, probe=False)


def undo_repair(path: str | os.PathLike[str], **options: Any) -> list[str]:
    """Take back what apply_repair did to the image ``path``: all files become what they were, byte for byte.

    Returns what had been repaired.  Raises FileMissing without an undo file, WriteRefused if a file has been
    changed since (then nothing is touched), InUse if somebody writes it.
    """
    folder, name, _chosen = _opened(path, options)
    with Undo(undo_path(path)) as log, ExitStack() as held:
        names = [ImageFile((), folder, file.name, folder.label(file.name)) for file in log.files]
        storages = [_lock_one(held, folder, name, file) for file in names]
        for file, storage in zip(log.files, storages, strict=True):
            log.check(file, storage)
        for file, storage in zip(log.files, storages, strict=True):
            log.restore(file, storage)
        log.remove()
        return log.repairs


def _opened(path: str | os.PathLike[str], options: dict[str, Any]) -> tuple[Folder, str, OpenOptions]:
    chosen = OpenOptions.of(**options, locks=False, cache_size=MIB)
    found = locate(path, allow_dirs=chosen.allow_dirs, allow_devices=chosen.allow_devices)
    return found.folder, found.file, chosen


def _lock(held: ExitStack, folder: Folder, name: str, files: Sequence[ImageFile]) -> dict[ImageFile, Storage]:
    """Open all files of the image for writing, and keep everybody else from that."""
    check_vmware_lock(folder, last_component(name), folder.label(name))
    return {file: _lock_one(held, file.folder, name, file) for file in files}


def _lock_one(held: ExitStack, folder: Folder, image: str, file: ImageFile) -> Storage:
    try:
        storage = folder.open(file.name, writable=True)
    except StorageError as error:
        error.hint = "all files of the image must be open to writing for a repair"
        raise
    held.callback(storage.close)
    try:
        storage.lock(writable=True)
    except InUse as error:
        error.hint = "stop the other user first: an image is not repaired while it is in use"
        raise
    if file.identity and storage.identity != file.identity:
        raise InUse(file.label, how=f"it was replaced while {image} was being checked")
    return storage


def _by_file(plan: Plan, storages: dict[ImageFile, Storage]) -> dict[ImageFile, list[Step]]:
    """The changes of all chosen repairs, by file; edits of one text are made one after the other."""
    steps: dict[ImageFile, list[Step]] = {}
    edits: dict[int, list[Edit]] = {}
    for repair, _findings in plan.chosen:
        for change in repair.changes:
            if change.file not in storages:
                raise WriteRefused(change.file.label, why="it is no file of the image itself")
            if isinstance(change, Edit):
                edits.setdefault(id(change.text), []).append(change)
            else:
                steps.setdefault(change.file, []).append(change)
    for group in edits.values():
        text: Text = group[0].text
        descriptor = text.descriptor
        for edit in group:
            descriptor = edit.edit(descriptor)
        changes = text.changes(descriptor)
        if changes is None:
            raise WriteRefused(text.file.label, why="its area has no room for the mended descriptor")
        for step in changes:
            assert not isinstance(step, Edit), "a text's changes are bytes"
            steps.setdefault(text.file, []).append(step)
    return steps
