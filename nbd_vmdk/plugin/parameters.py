"""What the plugin is told, as key=value on nbdkit's command line.

Parameters are the names of :class:`~nbd_vmdk.options.OpenOptions`, with dashes, and what else ``nbd-vmdk
serve`` has to say to its server; ``file`` may be repeated, and be whatever ``serve`` takes.
"""

import os
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Final

from nbd_vmdk.errors import OptionError
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.plugin.commandline import nbdkit_is_read_only
from nbd_vmdk.units import parse_size

#: All parameters and what they are for, as ``--dump-plugin`` tells it.
HELP: Final = {
    "file": "an image, a folder, a machine (.vmx) or an appliance (.ovf, .ova); may be repeated (required)",
    "read-only": "true: nothing is changed; as nbdkit's -r",
    "snapshot": "of a .vmx or .vmsd: the disks of this snapshot, by its name or number",
    "skip-broken": "true: leave out what can't be opened, and serve the rest",
    "parent": "a file that is the parent, whatever the descriptor says",
    "overlay": "a child link that takes the writes of the disk; one for each disk, in order",
    "share": "take turns with others that have inherited the same socket; PATH is for a private one",
    "scratch": "true: the overlays are thrown away in the end, so nothing in them is made durable",
    "stats": "the path of a unix socket on which numbers are told",
    "allow-dir": "a folder, besides the image's own, whose files it may name; may be repeated",
    "cache-size": "memory for tables and inflated grains, such as 64M",
    "allow-devices": "true: an image may name block devices in an allowed folder",
    "drop-ctk": "true: write although changes are tracked, and end the tracking",
    "ignore-cid": "true: warn of content IDs that do not agree, and go on",
    "salvage": "true: read what is left of a damaged streamOptimized image; the rest is EIO",
    "write-parent": "true: write although a snapshot stands on the image, and spoil that",
}
_SWITCHES: Final = {field.name for field in fields(OpenOptions) if field.type is bool} - {"writable", "locks"}
_TRUE: Final = ("1", "true", "yes", "on")
_FALSE: Final = ("0", "false", "no", "off")


class Parameters:
    """All parameters that were given, checked one by one."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.snapshot: str | None = None
        self.skip_broken = False
        self.read_only = nbdkit_is_read_only()
        self.allow_dirs: list[str] = []
        self.overlays: list[str] = []
        self.scratch = False
        self.share: str | None = None
        self.stats: str | None = None
        self._opening: dict[str, Any] = {}

    @property
    def options(self) -> OpenOptions:
        """How the disks are to be opened."""
        return OpenOptions(writable=not self.read_only, allow_dirs=tuple(self.allow_dirs), **self._opening)

    def take(self, key: str, value: str) -> None:
        """Take a parameter.  Paths are made absolute now: nbdkit in the background runs in ``/``."""
        name = key.replace("-", "_")
        if not value and name != "overlay" and name.replace("_", "-") in HELP:
            # The absolute path of nothing is the current folder, which "file=$UNSET" would serve.
            raise OptionError(None, why=f"{key}= has no value")
        if name == "file":
            self.files.append(os.path.abspath(value))
        elif name == "read_only":
            self.read_only = self.read_only or _boolean(key, value)
        elif name == "snapshot":
            self.snapshot = value
        elif name == "skip_broken":
            self.skip_broken = _boolean(key, value)
        elif name == "allow_dir":
            self.allow_dirs.append(os.path.abspath(value))
        elif name == "parent":
            self._opening[name] = os.path.abspath(value)
        elif name == "overlay":
            self.overlays.append(value and os.path.abspath(value))
        elif name == "scratch":
            self.scratch = _boolean(key, value)
        elif name == "share":
            self.share = os.path.abspath(value)
        elif name == "stats":
            self.stats = os.path.abspath(value)
        elif name == "cache_size":
            try:
                self._opening[name] = parse_size(value)
            except ValueError as error:
                raise OptionError(None, why=f"{key}: {error}") from None
        elif name in _SWITCHES:
            self._opening[name] = _boolean(key, value)
        else:
            near = get_close_matches(key, HELP, n=1)
            hint = f"is it {near[0]}? " if near else ""
            raise OptionError(
                None, why=f"unknown parameter {key}={value}", hint=f"{hint}known are {', '.join(HELP)}"
            )


def _boolean(key: str, value: str) -> bool:
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise OptionError(None, why=f"{key} is {value!r}, not true or false")
