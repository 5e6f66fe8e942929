"""Asking a running server for its numbers (see stats.py): where it tells them, and how to show them.

A server that was started with ``--stats`` tells its numbers on a socket whose name is the server's own with
``.stats`` at its end, or one in a private folder where the server has no socket of its own.  The process
that serves names it on its command line, so its process ID will do, or that of the ``nbd-vmdk serve`` above.

Where several workers serve, each tells its own numbers: the first one there, the others beside it, with
``.stats-1`` at the end and so on.  Who asks the server gets their sums; who names a worker, that one's.
"""

import glob
import json
import os
import re
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

from nbd_vmdk.errors import OptionError, ServerError, StorageError

#: What a server's socket is called beside what it serves on.
SUFFIX = ".stats"

#: What the socket of another worker than the first is called.
_WORKER = re.compile(re.escape(SUFFIX) + r"-[0-9]+\Z")

_PATIENCE = 10.0
_NOT_COUNTED = "start it with --stats, and it counts"
_HOW_NAMED = "a server is named by its socket, its URI or its process ID"


def sockets_of_workers(path: str, count: int) -> list[str]:
    """Where ``count`` workers tell their numbers, the first one at ``path``."""
    return [path, *(f"{path}-{number}" for number in range(1, count))]


def ask(where: str) -> dict[str, Any]:
    """The numbers of the server that ``where`` means: its socket, its URI or its process ID.

    Raises OptionError if that means no server that counts, StorageError, and ServerError for nonsense.
    """
    by_process = where.isascii() and where.isdigit()
    paths = _sockets_of_process(int(where)) if by_process else _sockets_of(where)
    told = []
    failed: StorageError | None = None
    for path in paths:
        try:
            told.append(_ask(path))
        except OSError as error:
            # A worker that has died and is being started again has nothing to tell.
            failed = failed or StorageError.of(error, path, "ask")
    if (found := merged(told)) is None:
        assert failed is not None
        raise failed
    return found


def _ask(path: str) -> dict[str, Any]:
    told = bytearray()
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(_PATIENCE)
        asking.connect(path)
        while piece := asking.recv(1 << 16):
            told += piece
    try:
        found = json.loads(told)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "exports" not in found:
        raise ServerError(path, why="what answers there tells no numbers", hint=_NOT_COUNTED)
    return found


def merged(told: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The numbers of several workers as those of one server; ``workers`` tells who they are.

    Those of a single one are left as they are; of none there are none.
    """
    if len(told) < 2:
        return told[0] if told else None
    names = dict.fromkeys(name for each in told for name in each["exports"])
    return {
        "pid": told[0]["pid"],
        "started": min(each["started"] for each in told),
        "uptime": max(each["uptime"] for each in told),
        "connections": _sums([each["connections"] for each in told]),
        "cache": _sums([each["cache"] for each in told]),
        "exports": {
            name: _merged_exports([each["exports"][name] for each in told if name in each["exports"]])
            for name in names
        },
        "workers": [{"pid": each["pid"], "connections": each["connections"]} for each in told],
    }


def _merged_exports(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One export of several workers; a worker that was started again may have left a broken disk out."""
    return {
        "size": parts[0]["size"],
        "commits": sum(part["commits"] for part in parts),
        "requests": _merged_requests([part["requests"] for part in parts]),
    }


def _sums(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(part[key] for part in parts) for key in parts[0]}


def _merged_requests(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Requests of the same export to several workers, by kind; a worker tells only of those that it had."""
    merged: dict[str, Any] = {}
    for kind in dict.fromkeys(kind for part in parts for kind in part):
        found = [part[kind] for part in parts if kind in part]
        merged[kind] = {
            **{key: sum(each[key] for each in found) for key in ("count", "bytes", "errors", "seconds")},
            "longest": max(each["longest"] for each in found),
            "histogram": [sum(steps) for steps in zip(*(each["histogram"] for each in found), strict=True)],
        }
    return merged


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


def _sockets_of(where: str) -> list[str]:
    """The numbers' sockets of a server's socket or URI; they may be named themselves."""
    path = where
    if "://" in where:
        path = parse_qs(urlsplit(where).query).get("socket", [""])[0]
        if not path:
            hint = "a server on a port is asked by its process ID"
            raise OptionError(where, why="names no socket", hint=hint)
    _check_socket(path)
    if _WORKER.search(path):
        return [path]
    told = path if path.endswith(SUFFIX) else path + SUFFIX
    if path.endswith(SUFFIX) or os.path.exists(told):
        others = [each for each in glob.glob(glob.escape(told) + "-*") if _WORKER.search(each)]
        return [told, *sorted(others, key=lambda each: (len(each), each))]
    if os.path.exists(path):
        raise OptionError(path, why="its server does not count", hint=_NOT_COUNTED)
    raise OptionError(path, why="there is no such socket", hint=_HOW_NAMED)


def _check_socket(path: str) -> None:
    """Raise OptionError for what is there and is no socket: an image, numbers that were saved in a file."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # what follows says what is wrong
    if not stat.S_ISSOCK(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a file"
        raise OptionError(path, why=f"is {what}, and no server's socket", hint=_HOW_NAMED)


def _sockets_of_process(pid: int) -> list[str]:
    """The numbers' sockets of a process that serves, or of those that it is the parent of."""
    found = []
    for each in _family(pid):
        try:
            with open(f"/proc/{each}/cmdline", "rb") as file:
                words = [os.fsdecode(word) for word in file.read().split(b"\0")]
        except OSError:
            continue
        found += [word.removeprefix("stats=") for word in words if word.startswith("stats=")]
    if found:
        return found
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
