"""The clients that no public tool offers, on libnbd: a process of its own, so that a server can't hang us.

    python -m benchmarks.nbd_client first-byte SOCKET
    python -m benchmarks.nbd_client fua SOCKET SECONDS REGION COUNT
    python -m benchmarks.nbd_client digest SOCKET REGION

Each prints one JSON object.  Times are of CLOCK_MONOTONIC, which all processes of a machine share.
"""

import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import nbd

BLOCK = 4096
#: Pieces compared by ``digest``: 4 KiB and 100 KiB ones, so that some cross the borders of grains.
_PIECES = 200


def pieces(region: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the pieces whose bytes ``digest`` hashes, the same for everybody."""
    rng = random.Random(f"pieces of {region}")
    for number in range(_PIECES):
        length = min(region, BLOCK if number % 2 else 100 * 1024)
        yield rng.randrange((region - length) // 512 + 1) * 512, length


def _handle() -> "nbd.NBD":
    # Others need the pieces alone, and libnbd is not everywhere.
    import nbd

    return nbd.NBD()


def _first_byte(socket: str) -> dict[str, float]:
    handle = _handle()
    print("ready", flush=True)
    handle.connect_unix(socket)  # it listens already, and answers once the server is up
    handle.pread(512, 0)
    return {"at": time.monotonic()}


def _fua(socket: str, seconds: float, region: int, count: int) -> dict[str, float]:
    """Write blocks at random places, each durable before the next, until the time or the count is up."""
    from nbd import CMD_FLAG_FUA

    handle = _handle()
    handle.connect_unix(socket)
    rng = random.Random("fua")
    data = rng.randbytes(BLOCK)
    places = [rng.randrange(region // BLOCK) * BLOCK for _ in range(count)]
    done = 0
    start = time.monotonic()
    for place in places:
        handle.pwrite(data, place, CMD_FLAG_FUA)
        done += 1
        if time.monotonic() - start > seconds:
            break
    taken = time.monotonic() - start
    handle.shutdown()
    return {"requests": done, "seconds": taken}


def _digest(socket: str, region: int) -> dict[str, str]:
    handle = _handle()
    handle.connect_unix(socket)
    digest = hashlib.sha256()
    for offset, length in pieces(region):
        digest.update(handle.pread(length, offset))
    handle.shutdown()
    return {"sha256": digest.hexdigest()}


def main(what: str, socket: str, *numbers: str) -> None:
    """Be the client that is asked for."""
    result: dict[str, float] | dict[str, str]
    if what == "first-byte":
        result = _first_byte(socket)
    elif what == "fua":
        result = _fua(socket, float(numbers[0]), int(numbers[1]), int(numbers[2]))
    else:
        result = _digest(socket, int(numbers[0]))
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
