"""How much may be on its way to a client that does not read yet."""

from __future__ import annotations

import fcntl
import struct
import termios
import time
from collections.abc import Callable
from typing import Any

import nbd
import pytest

from tests.images import desc
from tests.images.content import KIB, MIB, Content
from tests.plugin import Nbdkit

Serve = Callable[..., Nbdkit]

#: What a unix socket takes by default, whatever the host: net.core.wmem_default.
USUAL = 208 * KIB


def waiting(connection: nbd.NBD) -> int:
    """Bytes that the server has sent and the client has not read."""
    answer = fcntl.ioctl(connection.aio_get_fd(), termios.FIONREAD, bytes(4))
    return int(struct.unpack("i", answer)[0])


@pytest.mark.parametrize("number", [1, 3])
def test_replies_do_not_wait_for_the_client(serve: Serve, tmp_path: Any, number: int) -> None:
    """The last of several connections, too, is sent more than usual before it reads anything."""
    image = desc.monolithic_sparse(str(tmp_path), "top", Content(4 * MIB).put(0, bytes(range(256)) * 8192))
    server = serve(image.path)
    connection = [server.connect(context=False) for _ in range(number)][-1]
    buffers = [nbd.Buffer(64 * KIB) for _ in range(16)]
    cookies = [connection.aio_pread(buffer, 64 * KIB * turn) for turn, buffer in enumerate(buffers)]
    end = time.monotonic() + 10
    while waiting(connection) <= USUAL * 5 // 4:
        assert time.monotonic() < end, f"{waiting(connection)} bytes and no more"
        time.sleep(0.01)
    while cookies:
        connection.poll(-1)
        cookies = [cookie for cookie in cookies if not connection.aio_command_completed(cookie)]
    assert all(buffer.to_bytearray() == bytes(range(256)) * 256 for buffer in buffers)
