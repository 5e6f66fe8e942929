"""Making images: every kind that VMware's public formats allow, empty, all files of one at once or none."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from nbd_vmdk.errors import OptionError
from nbd_vmdk.ops.create.options import KINDS, PREALLOCATIONS, CreateOptions
from nbd_vmdk.ops.create.parent import Parent, held_parent
from nbd_vmdk.ops.create.plan import Plan, make_plan
from nbd_vmdk.storage.newfiles import NewFiles

__all__ = [
    "KINDS",
    "PREALLOCATIONS",
    "CreateOptions",
    "Created",
    "MadeFile",
    "create_image",
    "create_planned",
]

_OPTION_NAMES = frozenset(option.name for option in fields(CreateOptions))


@dataclass(frozen=True, slots=True)
class MadeFile:
    """A file that was made: its path, what it is to the image, what it holds, its length in bytes."""

    path: str
    role: str
    what: str
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """An image that was made.

    files     its new files, the one to open last; ``adopted`` names those that were there before
    notes     what was chosen, and why;  warnings: what somebody will not like
    """

    path: str
    create_type: str
    size: int
    cid: int
    parent_cid: int | None
    parent: str | None
    files: tuple[MadeFile, ...]
    adopted: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The image for ``--json``; keys are those of ``info`` where the fact is the same."""
        facts: dict[str, Any] = {
            "filename": self.path,
            "create-type": self.create_type,
            "virtual-size": self.size,
            "cid": self.cid,
        }
        if self.parent is not None:
            facts |= {"parent-cid": self.parent_cid, "backing-filename": self.parent}
        facts["files"] = [
            {"filename": file.path, "role": file.role, "length": file.length} for file in self.files
        ]
        facts["adopted"] = list(self.adopted)
        return facts | {"notes": list(self.notes), "warnings": list(self.warnings)}


def create_image(
    path: str | os.PathLike[str],
    size: int | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    durable: bool = True,
    **options: Any,
) -> Created:
    """Make the empty image ``path`` of ``size`` bytes; a child or a custom disk knows its size by itself.

    Keywords are the fields of :class:`~nbd_vmdk.ops.create.options.CreateOptions`.  ``progress`` is told the
    bytes done and of how many, where everything is written out.  All files appear at once, and none in the
    place of another; when anything fails there are none.  Without ``durable`` they are not synced: the caller
    will do that.

    Raises OptionError for what makes no sense or can't be, FileExists, StorageError, and for a parent or an
    extent that is there all that opening one raises.
    """
    if unknown := options.keys() - _OPTION_NAMES:
        raise OptionError(None, why=f"{', '.join(sorted(unknown))}: no such option of a new image")
    chosen = CreateOptions(**options)
    target = os.fspath(path)
    if not os.path.basename(target) or "\0" in target:
        raise OptionError(None, why=f"{target!r} is no file name")
    with held_parent(target, chosen) as parent:
        return create_planned(target, size, chosen, parent, progress, durable=durable)


def create_planned(
    target: str,
    size: int | None,
    options: CreateOptions,
    parent: Parent | None,
    progress: Callable[[int, int], None] | None = None,
    *,
    durable: bool = True,
) -> Created:
    """Make an image whose parent, if it has one, has been looked at."""
    plan = make_plan(target, size, options, parent)
    files = _make(plan, target, progress, durable=durable)
    if not target.lower().endswith(".vmdk"):
        plan.notes.append(
            "its name does not end in .vmdk: convert, compare, checksum and read will not take it for one"
        )
    return Created(
        path=target,
        create_type=plan.kind.name,
        size=plan.size,
        cid=plan.cid,
        parent_cid=None if parent is None else parent.cid,
        parent=None if parent is None else parent.hint,
        files=files,
        adopted=tuple(plan.adopted),
        notes=tuple(plan.notes),
        warnings=tuple(plan.warnings),
    )


def _make(
    plan: Plan, target: str, progress: Callable[[int, int], None] | None, *, durable: bool
) -> tuple[MadeFile, ...]:
    total = sum(file.slow for file in plan.files)
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with NewFiles(target, durable=durable) as new:
        for file in plan.files:
            new.check_free(file.name)
        lengths = {file.name: file.make(new, plan.text, told) for file in plan.files}
        new.publish(main=plan.files[-1].name)
    folder = os.path.dirname(target)
    return tuple(
        MadeFile(os.path.join(folder, file.name), file.role, file.what, lengths[file.name])
        for file in plan.files
    )
