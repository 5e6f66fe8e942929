"""Serving an image from Python: ``async with serve(path) as server``.

The image is opened here first, so that what is wrong with it is raised as the error it is; then it is closed,
which releases its locks, and nbdkit (see supervisor.py) opens it again with the plugin.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any

from nbd_vmdk.errors import OptionError, ServerError
from nbd_vmdk.listener import listen_private, listen_tcp, listen_unix
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.supervisor import Server, log

#: Requests of one connection that nbdkit takes at once.  Hosted sparse image in the page cache, 2 cores, fio:
#: 4 KiB random reads at depth 16: 155 K/s with 1 or 2 threads, 225 K/s with 4, 215 K/s with 8, 135 K/s with
#: 16; 1 MiB reads: 7.5, 9.5, 9.3, 7.6 and 6.3 GiB/s.  4 would do for the cache; a disk that waits gains from
#: each thread more.  nbdkit's own default is 16.
DEFAULT_THREADS = 8

__all__ = ["Server", "log", "plugin_config", "plugin_path", "serve"]


@asynccontextmanager
async def serve(
    path: str | os.PathLike[str],
    *,
    read_only: bool = False,
    socket: str | os.PathLike[str] | None = None,
    port: int | None = None,
    bind: str | None = None,
    threads: int | None = None,
    pidfile: str | os.PathLike[str] | None = None,
    **options: Any,
) -> AsyncIterator[Server]:
    """Serve the image at ``path`` over NBD for as long as the block runs.

    By default on a private unix socket; ``socket`` names another, ``port`` (0: any) and ``bind`` (default
    127.0.0.1) ask for TCP instead.  ``threads`` is how many requests of one connection nbdkit takes at once.
    The other ``options`` are those of :class:`~nbd_vmdk.options.OpenOptions`, without ``writable`` and
    ``locks``: a server always locks.

    Raises what :func:`~nbd_vmdk.open_disk` raises, InUse if the address is taken, and ServerError.
    """
    wanted = OpenOptions(writable=not read_only, locks=True, **options)
    if socket is not None and port is not None:
        raise OptionError(None, why="a server listens on a socket or on a port, not on both")
    if bind is not None and port is None:
        raise OptionError(None, why="an address to bind to needs a port as well")
    if threads is not None and threads < 1:
        raise OptionError(None, why="threads must be at least 1")
    warnings = await asyncio.to_thread(_check, os.fspath(path), wanted)
    if port is not None:
        listener = listen_tcp(bind or "127.0.0.1", port)
    else:
        listener = listen_private() if socket is None else listen_unix(socket)
    server = Server(
        listener,
        plugin_path(),
        plugin_config(path, wanted),
        read_only=read_only,
        threads=threads or DEFAULT_THREADS,
        pidfile=pidfile,
        warnings=warnings,
    )
    await server.start()
    try:
        yield server
    except Exception:
        # The first error is the one to raise; being cancelled is none, and must not hide a failed close.
        try:
            await server.stop()
        except ServerError as error:
            log.error("%s", error)
        raise
    except BaseException:
        await server.stop()
        raise
    else:
        await server.stop()


def plugin_path() -> str:
    """The file that nbdkit loads: ``nbdkit python FILE file=disk.vmdk`` serves without this module."""
    folder = os.path.dirname(os.path.abspath(__file__))
    link = os.path.join(os.path.dirname(folder), "plugin.py")
    shim = os.path.join(folder, "nbdkit_shim.py")
    return link if os.path.islink(link) and os.path.samefile(link, shim) else shim


def plugin_config(path: str | os.PathLike[str], options: OpenOptions) -> list[tuple[str, str]]:
    """The plugin's parameters that open ``path`` with ``options``; only what differs from the default."""
    config = [("file", os.path.abspath(path))]
    default = OpenOptions()
    for field in fields(OpenOptions):
        value = getattr(options, field.name)
        if field.name == "writable" or value == getattr(default, field.name):
            continue
        key = field.name.replace("_", "-")
        if field.name == "parent":
            config.append((key, os.path.abspath(value)))
        elif field.name == "allow_dirs":
            config += [("allow-dir", os.path.abspath(folder)) for folder in value]
        else:
            config.append((key, str(value).lower()))
    return config


def _check(path: str, options: OpenOptions) -> tuple[str, ...]:
    """Open and close the image; its warnings."""
    from nbd_vmdk.disk import open_disk

    chosen: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(options)}
    with open_disk(path, **chosen) as disk:
        return disk.warnings
