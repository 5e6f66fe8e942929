"""The rounds: which server runs which workload when, on which files."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Self

from benchmarks import clients
from benchmarks.blocks import WornDisk, bring_into_cache, drop_from_cache
from benchmarks.clients import ClientFailedError, Sample
from benchmarks.images import Image, Images
from benchmarks.nbd_client import pieces
from benchmarks.servers import KINDS, OURS, Kind, Server, ServerFailedError, Tuning
from benchmarks.targets import MEASURES
from benchmarks.workloads import CopyIn, FirstByte, Workload
from nbd_vmdk.units import GIB

#: tmpfs rows are left out where there is less room.
TMPFS_NEEDS = 5 * GIB
#: In a quick run what takes longer is not repeated.
_SLOW = 3.0
#: A server that fails a workload so often is not asked again.
_CHANCES = 2


@dataclass
class Settings:
    """What was asked for."""

    rounds: int
    seconds: float  # of each run that is limited by time
    quick: bool
    tuning: Tuning
    folder: str  # images are kept here, and disk workloads run here
    tmpfs: str | None
    deadline: float | None = None  # CLOCK_MONOTONIC: no run starts after it


@dataclass
class Results:
    """Samples and failures, by workload and server."""

    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    failures: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    rounds: int = 0


class Runner:
    """Runs workloads in rounds.  A context manager: leaving it removes what runs have written."""

    def __init__(self, workloads: Sequence[Workload], settings: Settings) -> None:
        self._settings = settings
        self._images = Images(os.path.join(settings.folder, "images"))
        self._disk = WornDisk(settings.folder)
        self._work = {"disk": self._disk.folder}
        if settings.tmpfs is not None:
            self._work["tmpfs"] = settings.tmpfs
        self._workloads = [workload for workload in workloads if workload.place in self._work]
        self._writes_to_disk = any(w.place == "disk" and w.client.writes for w in self._workloads)
        self.results = Results()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._settings.tmpfs is not None:
                os.makedirs(self._settings.tmpfs)
                stack.callback(shutil.rmtree, self._settings.tmpfs)
            if self._writes_to_disk:
                stack.enter_context(self._disk)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def disk(self) -> str:
        """Where runs write that write to disk, in words."""
        return self._disk.words if self._writes_to_disk else "no runs write to disk"

    def prepare(self) -> None:
        """Make the images, and check that all servers show the same."""
        for workload in self._workloads:
            names = [workload.image]
            if isinstance(workload.client, CopyIn):
                names.append(workload.client.source)
            for name in names:
                self._images.get(name)
        for name, server in dict.fromkeys(
            (workload.image, server) for workload in self._workloads for server in workload.servers
        ):
            self._compare(self._images.get(name), name, KINDS[server])

    def _compare(self, image: Image, name: str, kind: Kind) -> None:
        """Leave a server out that does not show the raw file's bytes, and say so in the results."""
        if image.raw is None:
            return
        path = image.raw if kind.raw else image.path
        digest = hashlib.sha256()
        with open(image.raw, "rb", buffering=0) as file:
            for offset, length in pieces(image.size):
                digest.update(os.pread(file.fileno(), length, offset))
        try:
            with Server(kind.command(path, False, self._settings.tuning)) as server:
                server.wait_ready()
                if clients.digest(server, image.size) == digest.hexdigest():
                    return
                why = "it shows other bytes than the raw file has"
        except (ClientFailedError, ServerFailedError) as error:
            why = str(error)
        _say(f"{kind.label} is left out on {name}: {why}")
        for workload in self._workloads:
            if workload.image == name and kind.name in workload.servers:
                self.results.failures.setdefault(workload.name, {})[kind.name] = [why] * _CHANCES

    def rounds(self) -> Iterator[int]:
        """Run round after round; give its number after each, so that results can be saved."""
        for number in range(1, self._settings.rounds + 1):
            for place, workload in enumerate(self._workloads):
                turn = (number + place) % len(workload.servers)
                order = workload.servers[turn:] + workload.servers[:turn]
                for server in order:
                    if self._is_over():
                        return
                    if not self._is_settled(workload, server):
                        self._measure(workload, KINDS[server], number)
            self.results.rounds = number
            yield number

    def _is_over(self) -> bool:
        deadline = self._settings.deadline
        return deadline is not None and time.monotonic() > deadline

    def _is_settled(self, workload: Workload, server: str) -> bool:
        """No more samples are wanted: it has failed too often, or is slow and this is a quick run."""
        if len(self.results.failures.get(workload.name, {}).get(server, [])) >= _CHANCES:
            return True
        done = self.results.samples.get(workload.name, {}).get(server, [])
        return self._settings.quick and any(sample["wall_s"] > _SLOW for sample in done)

    def _measure(self, workload: Workload, kind: Kind, number: int) -> None:
        start = time.monotonic()
        try:
            sample = self._run(workload, kind)
        except (ClientFailedError, ServerFailedError) as error:
            self.results.failures.setdefault(workload.name, {}).setdefault(kind.name, []).append(str(error))
            _say(f"round {number}  {workload.name}  {kind.label}: failed: {error}")
            return
        sample["wall_s"] = time.monotonic() - start
        sample = {name: float(f"{value:.5g}") for name, value in sample.items()}
        sample["round"] = number
        self.results.samples.setdefault(workload.name, {}).setdefault(kind.name, []).append(sample)
        measure = MEASURES[next(iter(workload.targets))]
        value = f"{sample[measure.name]:.4g} {measure.unit}"
        _say(f"round {number}/{self._settings.rounds}  {workload.name:26} {kind.label:20} {value}")

    def _run(self, workload: Workload, kind: Kind) -> Sample:
        image = self._images.get(workload.image)
        path, written = self._files(workload, kind, image)
        source = ""
        if isinstance(workload.client, CopyIn):
            source = self._images.get(workload.client.source).path
            bring_into_cache(source)
        tuning = replace(self._settings.tuning, workers=workload.workers)
        command = kind.command(path, workload.client.writes, tuning)
        if isinstance(workload.client, FirstByte):
            return clients.first_byte(Server(command))
        with Server(command) as server:
            server.wait_ready()
            if kind.name == OURS and tuning.workers > 1:
                server.wait_for_all()
            clients.warm_up(workload, server, image)
            before = sum(server.cpu())
            sample = clients.run(workload, server, image, source, self._settings.seconds)
            sample["cpu_us"] = (sum(server.cpu()) - before) / sample["requests"] * 1e6
            sample["peak_mib"] = server.memory()
        if written and not workload.keep:
            os.unlink(path)
        return sample

    def _files(self, workload: Workload, kind: Kind, image: Image) -> tuple[str, bool]:
        """The file to serve, in the state the workload wants, and whether the run will write to it."""
        if not workload.client.writes:
            path = image.raw if kind.raw and image.raw is not None else image.path
            for file in [path] if kind.raw else image.files:
                (drop_from_cache if workload.cold else bring_into_cache)(file)
            return path, False
        folder = self._work[workload.place]
        if workload.keep:
            folder = os.path.join(folder, workload.name.replace("/", "-"), kind.name)
            os.makedirs(folder, exist_ok=True)
        path = self._copy(workload, kind, image, folder)
        if workload.place == "disk":
            self._disk.settle()
        return path, True

    def _copy(self, workload: Workload, kind: Kind, image: Image, folder: str) -> str:
        """A copy of the image, or of its raw twin, that may be written to."""
        original = image.raw if kind.raw else image.path
        assert original is not None
        path = os.path.join(folder, os.path.basename(original))
        if workload.keep and os.path.exists(path):
            bring_into_cache(path)
            return path
        for file in [original] if kind.raw else image.files:
            copy = os.path.join(folder, os.path.basename(file))
            if file == original or not os.path.exists(copy):  # parents stay as they are
                command = ["cp", "--sparse=always", "--reflink=never", file, copy]
                subprocess.run(command, check=True, timeout=600)
        return path


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
