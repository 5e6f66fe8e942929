"""Disks and keys that tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from nbd_vmdk.ops.create import create_image
from tests.serving.certificates import Authority, keys

MIB = 1 << 20


class Tls:
    """Two authorities that know nothing of each other, what they vouch for, and keys."""

    def __init__(self, place: Path) -> None:
        ours, theirs = Authority(place / "ours", "ours"), Authority(place / "theirs", "theirs")
        self.server = ours.vouch(place / "server", "server")
        self.trusting = ours.trusted(place / "trusting")
        self.client = ours.vouch(place / "client", "client")
        self.stranger = theirs.vouch(place / "stranger", "client")
        #: Trusts our server, and shows a certificate that ours vouches not for.
        self.impostor = theirs.vouch(place / "impostor", "client")
        ours.trusted(self.impostor)
        self.psk = keys(place / "keys.psk", "alice", "bob")
        self.wrong = keys(place / "wrong.psk", "alice")


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return Tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk of 4 MiB with something in it."""
    path = tmp_path / "disk.vmdk"
    create_image(path, 4 * MIB)
    with open_disk(path, writable=True) as opened:
        opened.pwrite(b"old " * 16384, 65536)
    return path
