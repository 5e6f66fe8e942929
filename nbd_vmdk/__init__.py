"""Any VMware virtual disk, read and written in place, and served over NBD.

>>> import nbd_vmdk
>>> with nbd_vmdk.open_disk("disk.vmdk") as disk:
...     boot_sector = disk.pread(512, 0)

``async with nbd_vmdk.serve("disk.vmdk") as server`` puts it on the network at ``server.uri``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nbd_vmdk.errors import VmdkError

if TYPE_CHECKING:
    from nbd_vmdk.converting.conversion import convert
    from nbd_vmdk.disk import Disk
    from nbd_vmdk.extents.base import Kind
    from nbd_vmdk.opening import open_disk
    from nbd_vmdk.ops.convert import Work
    from nbd_vmdk.ops.create import create_image
    from nbd_vmdk.options import OpenOptions
    from nbd_vmdk.runs import Run
    from nbd_vmdk.serving.server import serve

__all__ = [
    "Disk",
    "Kind",
    "OpenOptions",
    "Run",
    "VmdkError",
    "Work",
    "__version__",
    "convert",
    "create_image",
    "open_disk",
    "serve",
]

__version__ = "0.1.0"

_HOMES = {
    "Disk": "nbd_vmdk.disk",
    "Kind": "nbd_vmdk.extents.base",
    "OpenOptions": "nbd_vmdk.options",
    "Run": "nbd_vmdk.runs",
    "Work": "nbd_vmdk.ops.convert",
    "convert": "nbd_vmdk.converting.conversion",
    "create_image": "nbd_vmdk.ops.create",
    "open_disk": "nbd_vmdk.opening",
    "serve": "nbd_vmdk.serving.server",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``nbd-vmdk --help`` need not load the engine."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
