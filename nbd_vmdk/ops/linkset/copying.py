"""Copying the files of a link one by one, holes kept, into a folder where they get their names at the end."""

import os
from collections.abc import Mapping

from nbd_vmdk.errors import StorageError
from nbd_vmdk.link import Link
from nbd_vmdk.ondisk.descriptor import Descriptor
from nbd_vmdk.ops.convert import new_file
from nbd_vmdk.ops.copy import Progress, copy
from nbd_vmdk.ops.rewrite import DescriptorFile, is_embedded, real_path
from nbd_vmdk.ops.sides import StorageSink, StorageSource, sharing
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.newfiles import NewFiles, dress


class Copier:
    """Copies files into ``new``; ``total`` bytes in all, of which ``progress`` is told."""

    def __init__(self, new: NewFiles, total: int, progress: Progress | None) -> None:
        self._new = new
        self._total = total
        self._progress = progress
        self._done = 0

    def link(self, link: Link, names: Mapping[str, str], descriptor: Descriptor) -> None:
        """Copy the files of ``link`` as ``names`` calls them, with ``descriptor`` in the place of its own."""
        main = link.storages[0]
        for storage in {storage.identity: storage for storage in link.storages}.values():
            path = real_path(storage)
            name = names[os.path.basename(path)]
            if storage is main and not is_embedded(link):
                self.text(path, name, descriptor.to_bytes())
            else:
                self._file(storage, path, name, descriptor if storage is main else None)

    def text(self, old: str, name: str, content: bytes) -> None:
        """Make the file ``name`` with this content; it gets the permissions and the owner of ``old``."""
        made = new_file(self._new.path(name), self._new.path(name))
        try:
            made.write(content, 0)
        finally:
            made.close()
        _dress(old, self._new.path(name))

    def _file(self, storage: Storage, old: str, name: str, descriptor: Descriptor | None) -> None:
        there = self._new.path(name)
        made = new_file(there, there)
        try:
            made.truncate(storage.size)
            source, sink = StorageSource(storage), StorageSink(made, fresh=True)
            copy(source, sink, share=sharing(source, sink), progress=self._told)
            self._done += storage.size
            if descriptor is not None:
                DescriptorFile(made).replace(descriptor)
        finally:
            made.close()
        _dress(old, there)

    def _told(self, done: int, _of: int) -> None:
        if self._progress is not None:
            self._progress(self._done + done, self._total)


def _dress(old: str, new: str) -> None:
    try:
        dress(new, old)
    except OSError as error:
        raise StorageError.of(error, new, "give it the permissions of the old file") from error
