"""Running a client against a server, and what it measured.

A *sample* is a dict of measures (targets.MEASURES names them) and ``requests``, by which the server's CPU
time is divided.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.images import Image
from benchmarks.nbd_client import BLOCK
from benchmarks.servers import START_TIMEOUT, Server
from benchmarks.workloads import CopyIn, CopyOut, Fio, FirstByte, Fua, Map, Workload
from nbd_vmdk.units import KIB, MIB

Sample = dict[str, float]

#: nbdcopy's default request, which its CPU time is counted by.
_COPY_REQUEST = 256 * 1024
#: Runs of a fixed amount are cut off after so many times the length of timed runs, for servers that are slow.
_PATIENCE = 4
#: FUA writes at most; where a sync costs nothing the time ends a run, elsewhere this does.
_FUA_WRITES = 20000
#: Seconds beyond its own time limit until a client is taken to hang.
_GRACE = 20.0


class ClientFailedError(Exception):
    """A client reported an error, or hung."""


def run(workload: Workload, server: Server, image: Image, source: str, seconds: float) -> Sample:
    """Run the workload's client once; ``source`` is the file that nbdcopy copies in."""
    match workload.client:
        case Fio() as fio:
            return run_fio(fio, server, image, seconds)
        case Fua():
            return _fua(server, image, seconds)
        case CopyOut():
            return _copy(["nbdcopy", server.uri, "null:"], image)
        case CopyIn():
            return _copy(["nbdcopy", "--flush", source, server.uri], image)
        case Map():
            return _map(server)
        case FirstByte():
            raise AssertionError("the server is started by first_byte()")


def warm_up(workload: Workload, server: Server, image: Image) -> None:
    """Read the region of a workload that stays in one, so that what a server keeps of it is there."""
    match workload.client:
        case Fio(region=int() as region):
            # By grains: larger requests are not kept, see extents/stream.py.
            run_fio(Fio("read", 64 * KIB, 1, region=region, amount=region), server, image, _GRACE)


def _execute(command: list[str], limit: float, stdout: int | None = None) -> bytes:
    """Run a command, all of its processes killed after ``limit`` seconds; what it printed."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise ClientFailedError(f"{command[0]} did not end in {limit:g} s") from None
            raise
    if process.returncode:
        words = (err or out or b"").decode(errors="replace").strip().splitlines()
        raise ClientFailedError(f"{command[0]}: {words[-1] if words else 'failed'}")
    return out or b""


def run_fio(fio: Fio, server: Server, image: Image, seconds: float) -> Sample:
    """Run fio against a server that serves the image."""
    command = [
        "fio",
        "--name=bench",
        "--ioengine=nbd",
        f"--uri={server.uri}",
        f"--rw={fio.rw}",
        f"--bs={fio.block}",
        f"--iodepth={fio.depth}",
        f"--numjobs={fio.connections}",
        f"--size={min(fio.region or image.size, image.size)}",
        "--group_reporting",
        "--output-format=json",
    ]
    limit = seconds
    if fio.amount is None:
        command += ["--time_based", f"--runtime={seconds * 1000:.0f}ms", "--norandommap"]
    else:
        limit = _PATIENCE * seconds
        command += [f"--io_size={fio.amount}", f"--runtime={limit * 1000:.0f}ms"]
    if fio.writes:
        # The flush at the end is inside the time that fio reports.
        command.append("--end_fsync=1")
    if fio.flush_every:
        command.append(f"--fsync={fio.flush_every}")
    if fio.rw == "randrw":
        command.append("--rwmixread=70")
    printed = _execute(command, limit + _GRACE).decode()
    return read_fio(json.loads(printed[printed.index("{") :]), fio.block)


def read_fio(report: dict[str, Any], block: int) -> Sample:
    """A sample from what fio printed."""
    (job,) = report["jobs"]
    if job["error"]:
        raise ClientFailedError(f"fio: {os.strerror(job['error'])}")
    both = (job["read"], job["write"])
    speed = sum(side["bw_bytes"] for side in both)
    sample = {
        "iops": speed / block,
        "mibps": speed / MIB,
        "requests": sum(side["total_ios"] for side in both),
    }
    latency = job["read"].get("clat_ns", {}).get("percentile")
    if latency:
        sample["p99_us"] = latency["99.000000"] / 1000
    return sample


def _helper(*words: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.nbd_client", *words]


def _fua(server: Server, image: Image, seconds: float) -> Sample:
    words = ("fua", server.socket, str(seconds), str(image.size), str(_FUA_WRITES))
    result = json.loads(_execute(_helper(*words), seconds + _GRACE))
    rate = result["requests"] / result["seconds"]
    return {"iops": rate, "mibps": rate * BLOCK / MIB, "requests": result["requests"]}


def _copy(command: list[str], image: Image) -> Sample:
    start = time.monotonic()
    _execute(command, 3 * _GRACE)
    taken = time.monotonic() - start
    return {"seconds": taken, "mibps": image.size / MIB / taken, "requests": image.size / _COPY_REQUEST}


def _map(server: Server) -> Sample:
    with tempfile.TemporaryFile() as out:
        start = time.monotonic()
        _execute(["nbdinfo", "--map", server.uri], 3 * _GRACE, out.fileno())
        taken = time.monotonic() - start
        out.seek(0)
        extents = sum(1 for _ in out)
    return {"seconds": taken, "us_per_extent": taken / extents * 1e6, "requests": extents}


def first_byte(server: Server) -> Sample:
    """Start a server, read its first sector, stop it: the time that takes, and the memory it then has.

    The client is ready and waiting on the socket before the server is started.
    """
    process = subprocess.Popen(
        _helper("first-byte", server.socket), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        with server:
            try:
                out, err = process.communicate(timeout=START_TIMEOUT)
            except subprocess.TimeoutExpired:
                why = f"no first byte in {START_TIMEOUT:g} s {server.last_words()}".strip()
                raise ClientFailedError(why) from None
            if process.returncode:
                raise ClientFailedError(server.last_words() or err.decode(errors="replace").strip())
            taken = json.loads(out)["at"] - server.started
            return {
                "first_byte_ms": taken * 1000,
                "resident_mib": server.memory("VmRSS"),
                "peak_mib": server.memory(),
            }
    finally:
        process.kill()
        process.wait()


def digest(server: Server, region: int) -> str:
    """A digest of pieces of the disk as this server shows them."""
    result: dict[str, str] = json.loads(_execute(_helper("digest", server.socket, str(region)), _GRACE))
    return result["sha256"]
