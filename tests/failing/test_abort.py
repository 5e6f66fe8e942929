"""nbdkit fails by its own assertion: what was acknowledged is there, flushed or not; see also test_vanish."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from nbd_vmdk import open_disk
from tests.images import desc
from tests.images.content import MIB, Content
from tests.plugin import ROOT, nbd
from tests.plugin.conftest import Serve, serve
from tests.sound import check_tables, read_tables

__all__ = ["serve"]

#: Fails when it is asked to cache something, as if a worker of nbdkit had failed by itself.
PLUGIN = """
import ctypes, os, sys
sys.path[:0] = [{root!r}, os.environ.get("NBD_VMDK_SITE", "")]
from nbd_vmdk.plugin.callbacks import *
def cache(h, count, offset, flags):
    ctypes.CDLL(None).__assert_fail(b"sock >= 0", b"connections.c", 402, {function!r})
"""


@pytest.mark.parametrize(
    ("function", "kept"), [(b"raw_send_socket", True), (b"elsewhere", False)], ids=["its own", "another"]
)
@pytest.mark.parametrize("more", [(), ("stats=numbers",)], ids=["", "counted"])
def test_what_was_written_is_there(
    tmp_path: Path, serve: Serve, function: bytes, kept: bool, more: tuple[str, ...]
) -> None:
    """After another assertion nothing is written: nobody knows what is in memory."""
    image = desc.monolithic_sparse(str(tmp_path), "disk", Content(64 * MIB).put(0, b"old " * 1000))
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN.format(root=ROOT, function=function))
    server = serve(image.path, *more, plugin=str(plugin), cwd=tmp_path)
    client, other = nbd.NBD(), nbd.NBD()
    for each in (client, other):
        each.connect_uri(server.uri)
    client.pwrite(b"acknowledged" * 1000, 20 * MIB)
    with pytest.raises(nbd.Error):
        other.cache(512, 0)
    assert server.wait() == -signal.SIGABRT
    server.process.returncode = 0
    assert ("all that was written is flushed" in server.errors) is kept
    with open_disk(image.path) as disk:
        assert (disk.pread(12_000, 20 * MIB) == b"acknowledged" * 1000) is kept
        assert disk.pread(4000, 0) == b"old " * 1000
    check_tables(read_tables(image.path), clean=False)
