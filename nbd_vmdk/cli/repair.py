"""``nbd-vmdk repair``: what would mend an image, mending it, and taking that back."""

import sys
from typing import TYPE_CHECKING, Any

import click

from nbd_vmdk.cli import findings, output
from nbd_vmdk.cli.opening import image_argument, json_option
from nbd_vmdk.cli.progress import progress
from nbd_vmdk.errors import OptionError

if TYPE_CHECKING:
    from nbd_vmdk.ops.check.findings import Finding
    from nbd_vmdk.ops.repair import Plan


@click.command(short_help="Show what would mend an image; with --apply, mend it.")
@click.option("--apply", is_flag=True, help="Mend it, after saving all that is changed to IMAGE.undo.")
@click.option("--undo", is_flag=True, help="Take back the last repair, from IMAGE.undo.")
@click.option(
    "--also",
    metavar="FINDING",
    multiple=True,
    help="Mend findings of this name too, although that may cost data.  May be repeated.",
)
@findings.check_options
@json_option
@image_argument
def repair(image: str, apply: bool, undo: bool, as_json: bool, **options: Any) -> int:
    """Show what would mend IMAGE.  With --apply, mend it; with --undo, take the last repair back.

    Only what needs no guess about the guest's data is mended; what does need one must be asked for by its
    name with --also.  Before the first change everything that will be changed is saved to IMAGE.undo.
    Parents are never changed: repair them by their own names.

    Exit code: that of 'nbd-vmdk check' for the image as it is left; 5 if another process uses it.
    """
    if apply and undo:
        raise OptionError(None, why="--apply and --undo exclude each other")
    if undo:
        return _undo(image, options, as_json=as_json)
    from nbd_vmdk.ops.repair import apply_repair, make_plan, plan_repair
    from nbd_vmdk.ops.undo import undo_path

    with progress("checking") as told:
        if apply:
            plan, left = apply_repair(image, progress=told, **options)
        else:
            plan = plan_repair(image, progress=told, **options)
            left = plan.report
    if as_json:
        undo_file = undo_path(image) if apply and plan.chosen else None
        facts = {"applied": apply, "undo-file": undo_file, "before": plan.as_dict(), "after": left.as_dict()}
        output.json_object(facts if apply else {"applied": False, "before": plan.as_dict()})
        return findings.exit_code(left)
    name = output.clean(plan.report.filename)
    findings.show(plan.report, lambda finding: _fate(finding, plan, done=apply))
    if apply and plan.chosen:
        output.line(f"{name}: repaired; what was changed is in {output.clean(undo_path(image))}")
        findings.show(left)
        output.line(f"{name}: {findings.summary(left)}")
        if make_plan(left).chosen:
            what = "more can be mended now: move the undo file away, and repair again"
            output.message("hint", what)
    else:
        output.line(f"{name}: {findings.summary(left)}, {_plans(plan)}")
    sys.stdout.flush()
    return findings.exit_code(left)


def _undo(image: str, options: dict[str, Any], *, as_json: bool) -> int:
    from nbd_vmdk.ops.repair import undo_repair

    wanted = {key: value for key, value in options.items() if key in ("allow_dirs", "allow_devices")}
    taken_back = undo_repair(image, **wanted)
    if as_json:
        output.json_object({"undone": taken_back})
    else:
        output.line(f"{output.clean(image)}: all files are again what they were before the repair")
    return 0


def _fate(finding: "Finding", plan: "Plan", *, done: bool) -> str:
    """What becomes of a finding."""
    repair = finding.repair
    if plan.is_chosen(finding):
        assert not isinstance(repair, str)
        return f"{'done' if done else 'planned'}: {repair.text}"
    if isinstance(repair, str):
        return findings.mending(finding, plan.report)
    if finding.depth:
        return f"not here: repair {plan.report.links[finding.depth]} by its own name"
    return f"only with --also {finding.slug}: {repair.text} ({repair.asks})"


def _plans(plan: "Plan") -> str:
    count = len(plan.chosen)
    if not count:
        return "nothing is to be mended"
    return f"{count} repair{'' if count == 1 else 's'} planned: --apply makes them"
