"""``nbd-vmdk convert``: a disk from anything that is one to anything that can be one."""

from typing import TYPE_CHECKING, Any

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import ImagePath, Number, json_option, open_options
from nbd_vmdk.cli.progress import progress
from nbd_vmdk.cli.shaping import SHAPE, shape_options
from nbd_vmdk.errors import OptionError
from nbd_vmdk.units import format_size

if TYPE_CHECKING:
    from nbd_vmdk.converting.conversion import Converted


@click.command(short_help="Copy a disk to a new image of another kind, a raw file or an NBD export.")
@click.option(
    "--type",
    "kind",
    metavar="TYPE",
    help="What DST is to be: raw, ova, or a kind of VMDK as its createType names it, such as "
    "monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, streamOptimized or vmfs.  "
    "Without it the name of DST tells.",
)
@click.option("--ova", is_flag=True, help="Wrap the disk as an appliance: the same as --type ova.")
@click.option(
    "--for",
    "product",
    metavar="PRODUCT",
    help="Make what workstation, esxi, ova, qemu or virtualbox takes.",
)
@shape_options("that of SRC, or lsilogic")
@click.option(
    "--from",
    "source_format",
    type=click.Choice(("vmdk", "raw")),
    help="Take SRC as that, whatever its name and its first bytes say.",
)
@click.option(
    "--since",
    metavar="LINK",
    help="Copy only what may differ from LINK, a snapshot of SRC, by its name or number in the chain.",
)
@click.option(
    "--base",
    type=click.Path(readable=False),
    metavar="FILE",
    help="With --since: make DST a child of FILE, which holds what LINK does: a full copy or the increment "
    "before.",
)
@click.option(
    "--onto",
    is_flag=True,
    help="With --since: write the changes over DST, a raw file, device or NBD URI that holds what LINK does.",
)
@click.option("--threads", type=Number(1, 64), metavar="N", help="Threads; by default as fit.")
@click.option(
    "--compress-level",
    "level",
    type=Number(1, 12),
    metavar="N",
    help="Of streamOptimized: 1 is fastest, 12 smallest.  [default: 6]",
)
@click.option(
    "--reflink",
    is_flag=True,
    help="Let a raw or flat DST share blocks with SRC where the file system can (XFS, btrfs): that takes no "
    "time and no space, and zeros are not looked for.",
)
@click.option("--verify", is_flag=True, help="Read DST back and compare it with SRC.")
@click.option("--force", is_flag=True, help="Replace DST if it is there; needed for a block device.")
@open_options
@json_option
@click.argument("source", metavar="SRC", type=ImagePath(exports=True))
@click.argument("target", metavar="DST", type=ImagePath(exports=True))
def convert(
    source: str,
    target: str,
    *,
    as_json: bool,
    kind: str | None,
    ova: bool,
    threads: int | None,
    level: int | None,
    reflink: bool,
    verify: bool,
    force: bool,
    **options: Any,
) -> int:
    """Copy the disk SRC, its whole chain made one, to DST, which is made new.

    SRC is a VMDK, an appliance or a machine with one disk (app.ova:disk1.vmdk is one of several), a raw file,
    a block device or an NBD URI; DST a new VMDK, OVA or raw file, a block device or an NBD URI.  Zeros stay
    unallocated.  DST appears when it is whole, or not at all; a device or an export is written in place, and
    what is on it behind the end of SRC stays.

    What SRC is its name tells, not its content, which may be a guest's: a file is opened as a VMDK only if it
    is called .vmdk, or leads to one, as a folder, a .vmx, .vmsd, .ovf or .ova does; a device or an export is
    raw, and so is any other file, unless it looks like something else: then --from must say what it is.
    --parent is for SRC.

    With --since DST is an incremental copy.  Either DST is a new VMDK, a child of the --base, and shows all
    of SRC together with it; the base is known by its content ID, or with --verify by comparing.  Or DST is
    raw and brought up to date in place (--onto); if that is stopped, do it again.  With --verify what has
    to be there already is compared before anything is written.
    """
    from nbd_vmdk.codec import DEFAULT_LEVEL, MAX_LEVEL
    from nbd_vmdk.converting.conversion import convert as run
    from nbd_vmdk.ops.convert import Work

    if level is not None and level > MAX_LEVEL:
        raise OptionError(None, why=f"--compress-level goes up to {MAX_LEVEL} here: libdeflate is missing")
    if ova:
        if kind not in (None, "ova"):
            raise OptionError(None, why=f"--ova holds a streamOptimized disk, not --type {kind}")
        kind = "ova"
    create = {name: value for name in ("product", *SHAPE) if (value := options.pop(name))}
    with progress("converting") as told:
        work = Work(
            threads=threads,
            level=level or DEFAULT_LEVEL,
            verify=verify,
            replace=force,
            share=reflink,
            progress=told,
        )
        made = run(source, target, kind=kind, create=create, work=work, **options)
    for note in made.notes:
        output.message("note", note)
    if reflink and made.data and not made.shared:
        output.message(
            "note", "no blocks could be shared: it takes a raw or flat DST on XFS, btrfs or the like"
        )
    for warning in made.warnings:
        output.log.warning("%s", warning)
    if as_json:
        output.json_object(made.as_dict())
    else:
        output.line(_summary(made))
    return 0


def _summary(made: "Converted") -> str:
    text = f"{output.clean(made.target)}: {made.kind}, {format_size(made.size)}"
    text += f", {format_size(made.data)} of them data"
    if made.shared:
        text += f" ({format_size(made.shared)} shared with the source)"
    if made.occupied is not None:
        text += f", in a file of {format_size(made.occupied)}"
    return text + (", verified" if made.verified else "")
