"""What a file is that may be a VMDK or raw: its name says so, never its content.

A raw disk's first bytes are its guest's, who can put a VMDK descriptor there that names other files of the
folder.  So a file is opened as a VMDK only if its name is that of one (or of a machine or an appliance, and
not that of a raw extent), or on the user's word; a device never is; and any other file is raw, but only if
it does not look like anything else.
"""

import os
import re
import shlex
from contextlib import closing
from typing import Final

from nbd_vmdk.errors import NotVmdk
from nbd_vmdk.look import head_of
from nbd_vmdk.ondisk.probe import FileKind, describe_other, identify
from nbd_vmdk.storage.localfolder import LocalFolder
from nbd_vmdk.vm import leads_to_disks

RAW: Final = "raw"
VMDK: Final = "vmdk"
#: A name that VMware gives to the raw data of a disk.
_RAW_EXTENT: Final = re.compile(r"-(?:flat|f\d{3,}|rdmp?|pt)\.vmdk$", re.IGNORECASE)


def guess_format(path: str | os.PathLike[str], *, raw_option: str, vmdk_option: str | None = None) -> str:
    """RAW or VMDK, as far as that may be told from a file's name; see the module.

    The options are what a user adds to say it himself.  Raises NotVmdk where only he can tell.
    """
    source = os.fspath(path)
    if _RAW_EXTENT.search(source):
        what = "the raw data of a disk, which has a descriptor"
        hint = f"name {_RAW_EXTENT.sub('.vmdk', source)} instead, or add {raw_option}"
        raise NotVmdk(source, what=what, hint=hint)
    if leads_to_disks(source) or source.lower().endswith(".vmdk"):
        return VMDK
    # Only this file is opened; that the user named a device is leave enough to look at it.
    folder, name = LocalFolder.for_image(source, allow_devices=True)
    with closing(folder.open(name)) as storage:
        if storage.is_device:
            return RAW
        head = head_of(storage)
    kind = identify(head)
    if kind is FileKind.EMPTY:
        return RAW
    what, known = (kind.value, "known") if kind is not FileKind.OTHER else describe_other(head)
    if known is None:
        return RAW
    if kind is FileKind.OTHER:
        # Who adds the option to what is no raw disk gets one that nobody can use.
        way = known.replace("FILE", shlex.quote(source))
        hint = f"{way}; {raw_option} is only for a raw disk that begins so"
    else:
        as_vmdk = f"add {vmdk_option}" if vmdk_option else "give it a name that ends in .vmdk"
        hint = (
            f"add {raw_option} to take its bytes as the disk's, or {as_vmdk} to open it as what it looks like"
        )
    raise NotVmdk(
        source,
        what=f"its content looks like something else ({what}), and its name tells no format",
        hint=hint,
    )
