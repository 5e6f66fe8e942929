"""A server: one nbdkit process or several on one address, started, watched, and ended cleanly.

::

    server = Server(listen_private(), plugin, [("file", "/disks/disk.vmdk")])
    await server.start()
    print(server.uri)
    await server.wait()         # until somebody else ends it
    await server.stop()

nbdkit inherits a socket that already listens (see listener.py), so readiness is an event, not a poll: the
server is ready when it has greeted us on that socket and told what it exports.

A server that died is started again only if the caller asks for that (see restarts.py): its clients have lost
writes that were not flushed.  They notice, because their connections are gone; the address stays, because
the listening socket is kept for the next process, and who connects meanwhile waits.

Several workers are for reading only: each process has tables and a cache of its own, and would not see what
another one writes.  They inherit the same socket and take turns at its clients, see plugin/sharing.py, so
that connections spread evenly.  Nothing of ours is between a client and its worker.  What is not done: a
socket for each worker (SO_REUSEPORT), which is for ports only and spreads by a hash; a new process for each
client (nbdkit -s), which takes 40 ms to start and has a cache for itself.
"""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from nbd_vmdk.errors import OptionError
from nbd_vmdk.serving.asking import merged, sockets_of_workers
from nbd_vmdk.serving.events import EventLog, Ready
from nbd_vmdk.serving.handshake import Export
from nbd_vmdk.serving.listener import Listener
from nbd_vmdk.serving.restarts import Restart
from nbd_vmdk.serving.tls import ServerTls
from nbd_vmdk.serving.worker import Work, Worker, log

#: Seconds until a server that says nothing is given up.  Opening takes milliseconds on a disk of one's own.
START_TIMEOUT = 60.0

#: Seconds between the request to end and the kill.  A clean close writes all that a client has not flushed:
#: at most a cache full of tables, which even a slow network disk takes in this time.
STOP_TIMEOUT = 120.0


class Server:
    """One or more nbdkit processes that serve one or more images on one listener.

    ``plugin`` is the file that nbdkit loads, ``config`` its parameters, in order.  The server owns
    the listener from here on and removes it at the end, as it does ``pidfile``, which is written when the
    server answers and holds nbdkit's process ID, that of the first worker.

    ``workers`` is how many processes there are; more than one need ``read_only``, and a plugin that knows
    what to do with ``share=PATH``.  If one ends and is not started again, the others are ended as well.

    ``warnings`` are what is known already to be odd about the images; if it is given, what nbdkit warns of
    while it starts is not logged again.  ``opening`` is how many seconds opening them is known to take.

    With ``tls`` it talks only to clients that encrypt; ``max_connections`` is how many may be there at once,
    of a single worker.  ``known`` is what it is known to serve, where it can't be asked itself: with TLS, or
    on vsock.  ``stats_path`` is the socket where the plugin is asked for its numbers, if it is to count.

    ``exports`` tells what is served, once it is: name, size in bytes, kind; and ``uris`` where.  ``events``
    tells what happens, and with ``restart`` a server that fails is started again.
    """

    def __init__(
        self,
        listener: Listener,
        plugin: str | os.PathLike[str],
        config: Sequence[tuple[str, str]],
        *,
        read_only: bool = False,
        threads: int | None = None,
        workers: int = 1,
        pidfile: str | os.PathLike[str] | None = None,
        warnings: Sequence[str] | None = None,
        opening: float = 0.0,
        restart: Restart | None = None,
        tls: ServerTls | None = None,
        max_connections: int | None = None,
        known: Sequence[Export] = (),
        stats_path: str | None = None,
    ) -> None:
        if workers > 1 and (not read_only or max_connections is not None):
            raise OptionError(None, why="several workers only read, and count no connections")
        self.listener = listener
        listener.tls = tls
        self.exports: list[Export] = []
        self.stats_path = stats_path
        self.warnings = tuple(warnings or ())
        self.events = EventLog()
        options = ["-r"] if read_only else []
        parameters = [f"{key}={value}" for key, value in config]
        if threads is not None:
            options += ["-t", str(threads)]
        if tls is not None:
            options += tls.options()
        if max_connections is not None:
            options.append("--filter=limit")
            parameters.append(f"limit={max_connections}")
        work = Work(
            listener=listener,
            plugin=os.path.abspath(plugin),
            options=options,
            config=parameters,
            count=workers,
            # Compressed images are read from end to end; the second time should not take much longer, and
            # the workers do it at once.
            patience=START_TIMEOUT + 3 * workers * opening,
            known=known,
            read_only=read_only,
            warned=warnings is not None,
            restart=restart,
            events=self.events,
        )
        path = None if pidfile is None else os.path.abspath(pidfile)
        self._stats_paths = [] if stats_path is None else sockets_of_workers(stats_path, workers)
        self._workers = [
            Worker(work, number, stats=stats, pidfile=path if number == 0 else None)
            for number, stats in enumerate(self._stats_paths or [None] * workers)
        ]
        self._keep_listening = restart is not None
        self._watching: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._stopping = False

    @property
    def uri(self) -> str:
        """The NBD URI of the first export, which is the default and the only one of a single image."""
        return self.uris[0]

    @property
    def uris(self) -> list[str]:
        """The NBD URI of each export, in the order of ``exports``; a single one needs no name."""
        if len(self.exports) < 2:
            return [self.listener.uri()]
        return [self.listener.uri(export.name) for export in self.exports]

    @property
    def local_uris(self) -> list[str]:
        """As ``uris``, for clients on this machine: with TLS, they say where its files are."""
        if len(self.exports) < 2:
            return [self.listener.uri(local=True)]
        return [self.listener.uri(export.name, local=True) for export in self.exports]

    @property
    def pid(self) -> int:
        """The process ID of nbdkit, of the first worker if there are several."""
        return self.pids[0]

    @property
    def pids(self) -> list[int]:
        """The process IDs of all workers."""
        return [worker.nbdkit.pid for worker in self._workers if worker.nbdkit is not None]

    @property
    def restarted(self) -> int:
        """How often a worker had ended unasked and came back."""
        return sum(worker.restarted for worker in self._workers)

    @property
    def stats(self) -> dict[str, Any] | None:
        """The last numbers, of all workers together, once they have ended, if the plugin counts."""
        told = [worker.nbdkit.stats for worker in self._workers if worker.nbdkit is not None]
        return merged([each for each in told if each is not None])

    async def start(self) -> None:
        """Start nbdkit; return when it answers, each worker if there are several.

        Raises ServerError with nbdkit's own words if it does not, and then leaves nothing behind.
        """
        try:
            if len(self._workers) > 1:
                # Who waits for the next client must sleep, and a socket that we were given might not let him.
                self.listener.socket.setblocking(True)
            await self._begin()
        except BaseException:
            self._stopping = True
            self._remove()
            self.events.close()
            raise
        if not self._keep_listening:
            self.listener.release()
        self.exports = self._workers[0].exports
        self.events.emit(Ready(self.pid, self.uris))
        self._watching = asyncio.create_task(self._watch([worker.live() for worker in self._workers]))

    async def wait(self) -> None:
        """Return when the server has been told to end by somebody else; ServerError if it died.

        One that is started again when it fails died when it failed too often.
        """
        await self._over.wait()
        if self._stopping:
            return
        for worker in self._workers:
            if (error := worker.death()) is not None:
                raise error

    async def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """End the server cleanly: requests in flight are answered, tables written, flags cleared.

        Raises ServerError if that failed, or if it took more than ``timeout`` seconds and nbdkit was killed:
        the image may then not be cleanly closed.  An end that wait() has told of is not told again.
        """
        self._stopping = True
        try:
            ends = (worker.stop(timeout) for worker in self._workers)
            ended = await asyncio.gather(*ends, return_exceptions=True)
        finally:
            self._remove()
            if self._watching is not None:
                await asyncio.wait((self._watching,))
            self.events.close()
        failed = [each for each in ended if isinstance(each, BaseException)]
        for error in failed[1:]:
            log.error("%s", error)
        if failed:
            raise failed[0]

    async def _begin(self) -> None:
        """Start all workers, or none."""
        beginning = [asyncio.create_task(worker.begin()) for worker in self._workers]
        try:
            await asyncio.gather(*beginning)
        except BaseException:
            for task in beginning:
                task.cancel()
            await asyncio.gather(*beginning, return_exceptions=True)
            begun = [
                worker for worker, task in zip(self._workers, beginning, strict=True) if not _failed(task)
            ]
            await asyncio.gather(*(worker.stop(STOP_TIMEOUT) for worker in begun), return_exceptions=True)
            raise

    async def _watch(self, lives: Sequence[asyncio.Task[None]]) -> None:
        """Wait until a worker ends for good, and see to it that all others do."""
        await asyncio.wait(lives, return_when=asyncio.FIRST_COMPLETED)
        if any(worker.gave_up for worker in self._workers):
            # From here on clients are refused, and need not wait for nobody.
            self._remove()
        self._over.set()
        if not self._stopping:
            for worker in self._workers:
                worker.let_go()
        await asyncio.wait(lives)
        if not self._stopping:
            self.events.close()

    def _remove(self) -> None:
        self.listener.remove()
        for worker in self._workers:
            worker.remove()
        for path in self._stats_paths:
            try:
                os.unlink(path)  # a killed one has left it
            except OSError:
                pass


def _failed(task: asyncio.Task[None]) -> bool:
    return task.cancelled() or task.exception() is not None
