"""What is gathered while one link is opened: its files, each opened once, and what is worth a warning."""

from dataclasses import dataclass, field

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import NotVmdk
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder


@dataclass(slots=True)
class Opening:
    """A link that is being opened; closed as a whole if that fails."""

    folder: Folder
    options: OpenOptions
    cache: Cache
    writable: bool
    warnings: list[str] = field(default_factory=list)
    storages: dict[str, Storage] = field(default_factory=dict)
    #: Identities of what lines with access RW mean: opened for writing before any extent holds it.
    written: frozenset[tuple[int, ...]] = frozenset()
    #: The disk is one file without a parent, which may be appended to if it is compressed and empty.
    whole: bool = False
    #: Files with tables that an extent holds.
    tabled: set[tuple[int, ...]] = field(default_factory=set)
    #: By which of its names each file is in ``storages``, and which one that is for its other names.
    _names: dict[tuple[int, ...], str] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)

    def open(self, name: str) -> Storage:
        """Open a file of the link through the gate, once whatever names it has.

        Opened twice, its second lock would meet the first as if it were somebody else's.
        """
        name = self._first.get(name, name)
        if name not in self.storages:
            # The first is the file that was named, which every writer of the link locks.
            storage = self.folder.open(name, extent=bool(self.storages))
            first = self._names.setdefault(storage.identity, name)
            if first == name:
                self.storages[name] = storage
            else:
                self._first[name] = first
                storage.close()
                name = first
        return self.storages[name]

    def open_for_writing(self, name: str) -> Storage:
        """Open a file again, for writing, in the place of the first opening that served to look at it."""
        there = self.open(name)
        if there.writable:
            return there
        name = self._first.get(name, name)
        storage = self.folder.open(name, writable=True)
        self.storages[name] = storage
        there.close()
        if there.identity != storage.identity:
            raise NotVmdk(there.name, what="it was replaced while it was being opened", hint="do it again")
        return storage

    def is_written(self, name: str) -> bool:
        """Whether the file ``name`` is to be opened for writing, because some line writes to it."""
        return self.open(name).identity in self.written

    def lock(self) -> list[str]:
        """Lock every file as it was opened, or only look for writers; what is worth a warning."""
        warnings = []
        for storage in self.storages.values():
            if self.options.locks:
                warning = storage.lock(storage.writable)
            else:
                writer = storage.writer()
                warning = writer and f"another process is {writer}; what is shown may be changing"
            if warning:
                warnings.append(f"{storage.name}: {warning}")
        return warnings

    def close(self) -> None:
        """Let go of all that was opened."""
        for storage in self.storages.values():
            storage.close()
