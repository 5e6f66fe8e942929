"""From a path to an open disk: what it leads to is found, its chain opened, and a disk made of the links."""

import os
from dataclasses import replace
from typing import Any

from nbd_vmdk.cache import Cache
from nbd_vmdk.chain import open_chain
from nbd_vmdk.disk import Disk
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.vm import FoundDisk, locate


def open_disk(path: str | os.PathLike[str], **options: Any) -> Disk:
    """Open the VMDK ``path`` and its whole chain.

    ``path`` may also be that of a folder, a machine or an appliance with one disk, or ``app.ova:disk1.vmdk``
    for one of several.  Keywords are the fields of :class:`~nbd_vmdk.options.OpenOptions`; a disk is opened
    for reading unless ``writable=True``.  Raises VmdkError: ``str(error)`` says what is wrong, ``error.hint``
    what to do.
    """
    chosen = OpenOptions.of(**options)
    found = locate(path, allow_dirs=chosen.allow_dirs, allow_devices=chosen.allow_devices)
    return open_found(found, chosen)


def open_found(found: FoundDisk, options: OpenOptions, cache: Cache | None = None) -> Disk:
    """Open a disk that was found behind a path; its fault, if it has one, is raised."""
    if found.fault is not None:
        raise found.fault
    warnings, asked = list(found.warnings), options.writable
    if found.frozen and options.writable and not options.write_parent:
        options = replace(options, writable=False)
        warnings.append(f"{found.path}: a snapshot's disk is served read-only, for later ones stand on it")
    disk = open_in(found.folder, found.file, options, cache)
    disk.links[0].warnings[:0] = warnings
    disk.writing_asked = asked
    return disk


def open_in(
    folder: Folder,
    name: str,
    options: OpenOptions,
    cache: Cache | None = None,
    *,
    overlaid: FoundDisk | None = None,
) -> Disk:
    """Open the VMDK ``name`` of ``folder`` and its whole chain, with a cache of its own or a shared one.

    For ``overlaid`` see open_chain.
    """
    cache = cache or Cache(options.cache_size)
    links = open_chain(folder, name, options, cache, overlaid)
    return Disk(links, cache, writable=options.writable)
