"""What is left of an image that another one takes the place of: its files that the new one does not have.

A split image that gives way to one in a single file would leave its extents behind, for which nobody has a
description any more.  They are looked for while the old descriptor still names them, and removed when the
new image stands.  A descriptor is untrusted: only files that are the old link's alone, lie beside it and are
named after it go; of others is told.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from nbd_vmdk.errors import FileMissing, StorageError, VmdkError
from nbd_vmdk.look import EXTENT_SUFFIX
from nbd_vmdk.ops.snapshot.files import existing_files, remove_files
from nbd_vmdk.ops.snapshot.names import bare
from nbd_vmdk.ops.snapshot.tree import link_file, links_in
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.localfolder import LocalFolder


@dataclass(slots=True)
class Replaced:
    """The files of an image that is going to be replaced, and what was odd about them."""

    paths: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def look(cls, target: str | os.PathLike[str], kept: Iterable[Storage]) -> "Replaced":
        """What ``target`` has, nothing if it is no image; ``kept`` are files that stay all the same."""
        found = cls()
        folder, name = LocalFolder.for_image(os.path.realpath(target))
        # What is in a raw disk or an extent, a guest may have written.
        if not name.lower().endswith(".vmdk") or EXTENT_SUFFIX.search(name):
            return found
        try:
            link = link_file(folder, name)
            paths = [] if link is None else existing_files(link, links_in(folder))
        except FileMissing:
            return found
        except VmdkError as error:
            found.warnings.append(f"files of the replaced image may be left: {error}")
            return found
        identities = {storage.identity for storage in kept}
        for path in paths:
            plain = os.path.basename(path)
            if plain == name:
                continue
            if not plain.startswith(f"{bare(name)}-") or _identity(path) in identities:
                found.warnings.append(f"{path} of the replaced image is left")
            else:
                found.paths.append(path)
        return found

    def remove(self, made: Iterable[str]) -> list[str]:
        """Remove those that are not among the files ``made`` in their place; the paths."""
        new = {os.path.realpath(path) for path in made}
        gone = [path for path in self.paths if path not in new]
        try:
            remove_files(gone)
        except StorageError as error:  # the new image stands all the same
            self.warnings.append(f"files of the replaced image may be left: {error}")
            return []
        return gone


def _identity(path: str) -> tuple[int, ...]:
    """As that of a Storage; nobody's for a file that has just gone."""
    try:
        there = os.stat(path)
    except OSError:
        return ()
    return there.st_dev, there.st_ino
