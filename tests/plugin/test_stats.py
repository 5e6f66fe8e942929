"""The socket where a server's numbers are told."""

import errno
import json
import os
import socket
from pathlib import Path

from nbd_vmdk.plugin.stats import Stats


class Poor:
    """A listening socket of a process that now and then has no descriptors left."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._is_poor = False

    def accept(self) -> tuple[socket.socket, object]:
        self._is_poor = not self._is_poor
        if self._is_poor:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._listening.accept()

    def fileno(self) -> int:
        return self._listening.fileno()

    def close(self) -> None:
        self._listening.close()


def test_who_asks_is_answered_when_there_are_descriptors_again(tmp_path: Path) -> None:
    stats = Stats(str(tmp_path / "s"), 1 << 20)
    stats.listen()
    assert stats._socket is not None
    stats._socket = Poor(stats._socket)  # type: ignore[assignment]  # as much of a socket as is used
    stats.answer()
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as asker:
            asker.settimeout(5)
            asker.connect(stats.path)
            assert json.loads(asker.makefile().read())["pid"] == os.getpid()
    stats.close()
