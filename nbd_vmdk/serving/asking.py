"""Asking a running server for its numbers (see stats.py): where it tells them, and how to show them.

A server that was started with ``--stats`` tells its numbers on a socket whose name is the server's own with
``.stats`` at its end, or one in a private folder where the server has no socket of its own.  The process
that serves names it on its command line, so its process ID will do, or that of the ``nbd-vmdk serve`` above.
"""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from nbd_vmdk.errors import OptionError, ServerError, StorageError

#: What a server's socket is called beside what it serves on.
SUFFIX = ".stats"

_PATIENCE = 10.0
_NOT_COUNTED = "start it with --stats, and it counts"


def ask(where: str) -> dict[str, Any]:
    """The numbers of the server that ``where`` means: its socket, its URI or its process ID.

    Raises OptionError if that means no server that counts, StorageError, and ServerError for nonsense.
    """
    path = _socket_of_process(int(where)) if where.isascii() and where.isdigit() else _socket_of(where)
    told = bytearray()
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(_PATIENCE)
            asking.connect(path)
            while piece := asking.recv(1 << 16):
                told += piece
    except OSError as error:
        raise StorageError.of(error, path, "ask") from error
    try:
        found = json.loads(told)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "exports" not in found:
        raise ServerError(path, why="what answers there tells no numbers", hint=_NOT_COUNTED)
    return found


def prometheus(told: Mapping[str, Any]) -> Iterator[str]:
    """The numbers in Prometheus' text format, line by line."""
    yield from _metric("uptime_seconds", "gauge", "Seconds since the server was started.")
    yield f"nbd_vmdk_uptime_seconds {told['uptime']:.3f}"
    yield from _metric("connections", "gauge", "Connections that are open.")
    yield f"nbd_vmdk_connections {told['connections']['open']}"
    yield from _metric("connections_total", "counter", "Connections since the start.")
    yield f"nbd_vmdk_connections_total {told['connections']['total']}"
    for what in ("hits", "misses"):
        yield from _metric(f"cache_{what}_total", "counter", f"Cache {what}.")
        yield f"nbd_vmdk_cache_{what}_total {told['cache'][what]}"
    yield from _metric("commits_total", "counter", "Times that written data was made durable.")
    for name, export in told["exports"].items():
        yield f"nbd_vmdk_commits_total{{{_label('export', name)}}} {export['commits']}"
    for what, text in (("bytes", "Bytes of requests."), ("errors", "Requests that failed.")):
        yield from _metric(f"request_{what}_total", "counter", text)
        for labels, each in _requests(told):
            yield f"nbd_vmdk_request_{what}_total{{{labels}}} {each[what]}"
    yield from _metric("request_duration_seconds", "histogram", "How long requests took.")
    for labels, each in _requests(told):
        name = "nbd_vmdk_request_duration_seconds"
        sofar = 0
        *steps, _longer = each["histogram"]
        for power, count in enumerate(steps):
            sofar += count
            yield f'{name}_bucket{{{labels},le="{2**power / 1e6:g}"}} {sofar}'
        yield f'{name}_bucket{{{labels},le="+Inf"}} {each["count"]}'
        yield f"{name}_sum{{{labels}}} {each['seconds']:.9f}"
        yield f"{name}_count{{{labels}}} {each['count']}"


def quantile(request: Mapping[str, Any], share: float) -> float:
    """Seconds within which that share of the requests was done: at most twice as much as is true."""
    wanted = share * request["count"]
    sofar = 0
    for power, count in enumerate(request["histogram"]):
        sofar += count
        if sofar >= wanted:
            return float(min(2**power / 1e6, request["longest"]))
    return float(request["longest"])


def _metric(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP nbd_vmdk_{name} {text}"
    yield f"# TYPE nbd_vmdk_{name} {kind}"


def _requests(told: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, export in told["exports"].items():
        for kind, each in export["requests"].items():
            yield f"{_label('export', name)},{_label('request', kind)}", each


def _label(name: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{name}="{escaped}"'


def _socket_of(where: str) -> str:
    """The numbers' socket of a server's socket or URI; it may be named itself."""
    path = where
    if "://" in where:
        path = parse_qs(urlsplit(where).query).get("socket", [""])[0]
        if not path:
            hint = "a server on a port is asked by its process ID"
            raise OptionError(where, why="names no socket", hint=hint)
    if path.endswith(SUFFIX):
        return path
    if os.path.exists(path + SUFFIX):
        return path + SUFFIX
    if os.path.exists(path):
        raise OptionError(path, why="its server does not count", hint=_NOT_COUNTED)
    raise OptionError(path, why="there is no such socket", hint="name the socket or process of a server")


def _socket_of_process(pid: int) -> str:
    """The numbers' socket of a process that serves, or of one that such a process is the child of."""
    for each in _family(pid):
        try:
            with open(f"/proc/{each}/cmdline", "rb") as file:
                words = [os.fsdecode(word) for word in file.read().split(b"\0")]
        except OSError:
            continue
        for word in words:
            if word.startswith("stats="):
                return word.removeprefix("stats=")
    if not os.path.exists(f"/proc/{pid}"):
        raise OptionError(None, why=f"there is no process {pid}")
    raise OptionError(None, why=f"process {pid} is no server that counts", hint=_NOT_COUNTED)


def _family(pid: int) -> Iterator[int]:
    """A process and its descendants, parents first."""
    waiting = [pid]
    while waiting:
        each = waiting.pop(0)
        yield each
        try:
            threads = os.listdir(f"/proc/{each}/task")
        except OSError:
            continue
        for thread in threads:
            try:
                with open(f"/proc/{each}/task/{thread}/children") as file:
                    waiting += map(int, file.read().split())
            except OSError:
                pass  # it ended meanwhile
