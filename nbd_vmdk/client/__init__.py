"""An NBD client for asyncio, on libnbd; copying and comparing disks with it.  See docs/API.md.

::

    from nbd_vmdk import client

    async with client.connect("nbd://localhost", connections=4) as disk:
        boot_sector = await disk.pread(512, 0)
    await client.copy("nbd://localhost", "nbd+unix:///?socket=/run/other.sock")
"""

from nbd_vmdk.client.binding import Export, Tls
from nbd_vmdk.client.client import Client, Run, connect, export_uri, list_exports
from nbd_vmdk.client.copying import Copied, copy
from nbd_vmdk.client.verifying import Range, verify

__all__ = [
    "Client",
    "Copied",
    "Export",
    "Range",
    "Run",
    "Tls",
    "connect",
    "copy",
    "export_uri",
    "list_exports",
    "verify",
]
