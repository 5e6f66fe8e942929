"""``nbd-vmdk check``: is an image sound, and if not, where, what does it mean, what mends it."""

import shlex
import sys
from typing import Any

import click

from nbd_vmdk.cli import findings, output
from nbd_vmdk.cli.opening import image_argument, json_option
from nbd_vmdk.cli.progress import progress


@click.command(short_help="Look for damage in an image and its parents; nothing is changed.")
@findings.check_options
@json_option
@image_argument
def check(image: str, as_json: bool, **options: Any) -> int:
    """Look for damage in IMAGE and in its parents: headers, tables, descriptors, content IDs, sizes.

    With --data every compressed grain is inflated and its checksum verified.  Nothing is changed; 'nbd-vmdk
    repair' mends what can be mended.

    Exit code: 0 sound, 3 damaged, 4 only harmless findings, 1 it can't be looked at, 5 something was found
    while another process writes the image.
    """
    from nbd_vmdk.ops.check.runner import check_image

    with progress("checking") as told:
        report = check_image(image, progress=told, **options)
    findings.warn_of_users(report)
    if as_json:
        output.json_object(report.as_dict())
    else:
        findings.show(report)
        output.line(f"{output.clean(report.filename)}: {findings.summary(report)}")
        sys.stdout.flush()
        if names := findings.mendable(report):
            hint = f"nbd-vmdk repair {shlex.quote(names[0])} shows what would be mended"
            if report.sealed is not None:
                hint = "in an archive nothing is mended: take the disk out of it first"
            output.message("hint", hint)
    return findings.exit_code(report)
