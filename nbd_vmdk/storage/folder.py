"""The gate: the only way to a file that an image names.

An image is untrusted input.  A hostile descriptor names /etc/shadow or a device; so nothing that a
descriptor, a chain or an appliance says is ever opened by plain path.  It is asked of a Folder, which
knows what the user allowed.
"""

# ruff: noqa: D102  the contract is in Folder

import os
from abc import ABC, abstractmethod
from typing import NoReturn

from nbd_vmdk.errors import Closed
from nbd_vmdk.storage.base import Storage


class Folder(ABC):
    """A place whose files an image may name.

    ``name`` is its path for messages.  ``read_only`` tells why no disk here can be written, None where that
    is for the disk to say.
    """

    name: str
    read_only: str | None = None

    @abstractmethod
    def open(self, name: str, *, writable: bool = False, extent: bool = False) -> Storage:
        """Open the file ``name``: relative to this folder, or absolute; ``/`` separates.

        ``extent`` says that it is one of the files of a disk that has perhaps more than may be open at once,
        and not the one whose lock stands for them all: see lent.py.

        It is not locked: that is the caller's choice (Storage.lock).  Raises FileMissing, TrustError (outside
        what is allowed, or no regular file), WriteRefused (nothing here can be written) or StorageError.
        """

    @abstractmethod
    def folder_of(self, name: str) -> "Folder":
        """The folder that holds the file ``name``, under the same permissions as this one.

        The file need not be there.  Raises as ``open`` does.
        """

    @abstractmethod
    def names(self) -> list[str]:
        """The plain names in this folder, sorted."""

    def label(self, name: str) -> str:
        """The path of ``name`` as a user would write it."""
        return f"{self.name}/{name}"


class ClosedFolder(Folder):
    """What is left of a folder that was let go of: how its files are called."""

    def __init__(self, folder: Folder) -> None:
        self.name = folder.name
        self.read_only = folder.read_only

    def open(self, name: str, *, writable: bool = False, extent: bool = False) -> NoReturn:  # noqa: ARG002
        raise Closed(self.label(name))

    def folder_of(self, name: str) -> NoReturn:
        raise Closed(self.label(name))

    def names(self) -> NoReturn:
        raise Closed(self.name)

    def label(self, name: str) -> str:
        return name if self.name == os.curdir else os.path.join(self.name, name)
