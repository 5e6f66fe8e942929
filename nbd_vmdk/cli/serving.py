"""The life of ``nbd-vmdk serve``: announce, wait, run the user's command, obey signals, end."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from nbd_vmdk.cli import output
from nbd_vmdk.serving import server
from nbd_vmdk.serving.events import Exited, Restarted, Restarting
from nbd_vmdk.serving.notify import notify
from nbd_vmdk.serving.server import Server
from nbd_vmdk.units import format_size

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def serve_until_told(
    images: Sequence[str], options: dict[str, Any], *, command: str | None, as_json: bool
) -> int:
    """Serve ``images`` until a signal, the end of ``command`` or that of the server; the exit code."""
    signals = _Signals()
    serving: Server | None = None
    try:
        async with server.serve(images, activated=True, **options) as serving:
            for warning in serving.warnings:
                output.log.warning("%s", warning)
            _warn_if_public(serving)
            notify(READY="1", STATUS=_status(serving))
            telling = asyncio.create_task(_tell_status(serving))
            try:
                if command is not None:
                    return await _run(command, serving, signals)
                _announce(images, serving, as_json)
                await serving.wait()
            finally:
                telling.cancel()
    except asyncio.CancelledError:
        if signals.caught is None:
            raise
        return 128 + signal.SIGINT if signals.caught == signal.SIGINT else 0
    finally:
        if serving is not None and serving.stats is not None:
            _show_stats(serving.stats, as_json)
    return 0


def _status(serving: Server) -> str:
    """What the service manager shows of us, in a line."""
    count = len(serving.exports)
    size = format_size(sum(export.size for export in serving.exports))
    workers = f", {len(serving.pids)} workers" if len(serving.pids) > 1 else ""
    return f"Serving {count} disk{'s' * (count != 1)} ({size}) on {serving.listener.where}{workers}"


async def _tell_status(serving: Server) -> None:
    """Tell the service manager when nbdkit has died, and when it answers again."""
    async for event in serving.events:
        match event:
            case Exited(how=how, asked=False):
                notify(STATUS=f"nbdkit {how}")
            case Restarting(attempt=attempt, delay=delay):
                notify(STATUS=f"nbdkit died; it is started again in {delay:g} s, attempt {attempt}")
            case Restarted():
                notify(STATUS=_status(serving))


def _show_stats(told: dict[str, Any], as_json: bool) -> None:
    """The last numbers: for people on stderr, because stdout may be a command's."""
    from nbd_vmdk.cli.stats import table

    if as_json:
        output.json_object({"stats": told})
    else:
        for row in table(told):
            sys.stderr.write(f"{output.priority('note')}{row}\n")
        sys.stderr.flush()


def _announce(images: Sequence[str], serving: Server, as_json: bool) -> None:
    """Say where the disks are: the only thing that stdout gets.  One disk is its URI alone."""
    if as_json:
        exports = [
            {
                "name": export.name,
                "uri": uri,
                "size": export.size,
                "kind": export.kind or None,
                "description": export.description,
                "read-only": export.read_only,
            }
            for export, uri in zip(serving.exports, serving.uris, strict=True)
        ]
        processes = {"pid": serving.pid, "workers": serving.pids}
        output.json_object({"exports": exports, **processes, "warnings": list(serving.warnings)})
    else:
        if len(serving.exports) == 1:
            output.line(serving.uri)
        else:
            _show_table(serving)
        sys.stdout.flush()
    if sys.stderr.isatty():
        size = format_size(sum(export.size for export in serving.exports))
        modes = {"read-only" if export.read_only else "read-write" for export in serving.exports}
        mode = " and ".join(sorted(modes))
        output.message("note", f"serving {', '.join(images)} ({size}, {mode}); Ctrl-C ends it")


def _show_table(serving: Server) -> None:
    """A row for each disk: aligned with blanks, the URI last, so that it is easy to cut and to grep."""
    rows = [("NAME", "SIZE", "KIND", "MODE", "URI")]
    for export, uri in zip(serving.exports, serving.uris, strict=True):
        mode = "ro" if export.read_only else "rw"
        rows.append((output.clean(export.name), format_size(export.size), export.kind or "-", mode, uri))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        output.line("  ".join(cells).rstrip())


def _warn_if_public(serving: Server) -> None:
    listener = serving.listener
    if listener.public and listener.tls is None:
        verb = "read" if all(export.read_only for export in serving.exports) else "read and write"
        what = "this disk" if len(serving.exports) == 1 else "these disks"
        text = f"anyone who can reach {listener.where} can {verb} {what}"
        output.log.warning("%s", text)


async def _run(command: str, serving: Server, signals: "_Signals") -> int:
    """Run the user's command beside the server; its exit code, as a shell would give it.

    Who wrote and did not flush may not know that the server died, so then all is not well.
    """
    uris = {"uri": serving.local_uris[0], "uris": " ".join(serving.local_uris)}
    environment = os.environ | serving.listener.environment() | uris
    child = await asyncio.create_subprocess_shell(command, env=environment)
    signals.child = child
    try:
        code = await child.wait()
    finally:
        signals.child = None
    if code == 0 and serving.restarted > 0 and not all(export.read_only for export in serving.exports):
        output.message("error", "nbdkit died while the command ran: what it wrote may not be there")
        return 1
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
            notify(STOPPING="1", STATUS="Closing the disks")
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
