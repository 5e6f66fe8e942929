"""The life of ``nbd-vmdk serve``: announce, wait, run the user's command, obey signals, end."""

import asyncio
import os
import signal
import sys
from typing import Any

from nbd_vmdk import server
from nbd_vmdk.cli import output
from nbd_vmdk.server import Server
from nbd_vmdk.units import format_size

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOCAL = ("127.", "::1", "localhost")


async def serve_until_told(image: str, options: dict[str, Any], *, command: str | None, as_json: bool) -> int:
    """Serve ``image`` until a signal, the end of ``command`` or that of the server; the exit code."""
    signals = _Signals()
    try:
        async with server.serve(image, **options) as serving:
            for warning in serving.warnings:
                output.log.warning("%s", warning)
            _warn_if_public(serving)
            if command is not None:
                return await _run(command, serving, signals)
            _announce(image, serving, as_json)
            await serving.wait()
    except asyncio.CancelledError:
        if signals.caught is None:
            raise
        return 128 + signal.SIGINT if signals.caught == signal.SIGINT else 0
    return 0


def _announce(image: str, serving: Server, as_json: bool) -> None:
    """Say where the disk is: the only thing that stdout gets."""
    if as_json:
        exports = [
            {"name": export.name, "uri": uri, "size": export.size, "read-only": export.read_only}
            for export, uri in zip(serving.exports, serving.uris, strict=True)
        ]
        output.json_object({"exports": exports, "pid": serving.pid, "warnings": list(serving.warnings)})
    else:
        for uri in serving.uris:
            output.line(uri)
        sys.stdout.flush()
    if sys.stderr.isatty():
        export = serving.exports[0]
        mode = "read-only" if export.read_only else "read-write"
        output.message("note", f"serving {image} ({format_size(export.size)}, {mode}); Ctrl-C ends it")


def _warn_if_public(serving: Server) -> None:
    listener = serving.listener
    if listener.path is None and not listener.host.startswith(_LOCAL):
        verb = "read" if all(export.read_only for export in serving.exports) else "read and write"
        text = f"anyone who can reach {listener.host} port {listener.port} can {verb} this disk"
        output.log.warning("%s", text)


async def _run(command: str, serving: Server, signals: "_Signals") -> int:
    """Run the user's command beside the server; its exit code, as a shell would give it."""
    environment = os.environ | serving.listener.environment()
    child = await asyncio.create_subprocess_shell(command, env=environment)
    signals.child = child
    try:
        code = await child.wait()
    finally:
        signals.child = None
    return code if code >= 0 else 128 - code


class _Signals:
    """The signals that end us: they cancel the task that serves, or are the command's own business."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self.child: asyncio.subprocess.Process | None = None
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in _ENDING:
            loop.add_signal_handler(number, self._on, number)

    def _on(self, number: signal.Signals) -> None:
        if self.child is not None:
            # What is typed at a terminal has reached the command as well: once is enough.
            if not (number == signal.SIGINT and _in_foreground()):
                try:
                    self.child.send_signal(number)
                except ProcessLookupError:
                    pass
        elif self.caught is None:
            self.caught = number
            if self._task is not None:
                self._task.cancel()
        else:
            output.message("note", "the image is being closed, please wait")


def _in_foreground() -> bool:
    """Whether we are the foreground job of a terminal, so that Ctrl-C reaches our whole process group."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
