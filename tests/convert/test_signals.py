"""A signal that asks to end takes back what was half made, for every verb that makes files."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nbd_vmdk import convert
from nbd_vmdk.cli.signals import AskedToEnd, orderly_end
from tests.convert import leftovers
from tests.images.content import MIB


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk whose conversion at the highest level takes some seconds."""
    raw = tmp_path_factory.mktemp("big") / "a.raw"
    rng = random.Random(1)
    words = [rng.randbytes(rng.randrange(2, 9)) for _ in range(2000)]
    raw.write_bytes(b"".join(rng.choices(words, k=MIB // 2))[:MIB] * 72)
    return raw


def run(folder: Path, *words: str, ignored: signal.Signals | None = None) -> subprocess.Popen[str]:
    """The program, with its temporary folder there already."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nbd_vmdk", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=None if ignored is None else lambda: _ignore(ignored),
    )
    deadline = time.monotonic() + 20
    while process.poll() is None and not leftovers(folder) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
    return process


def _ignore(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)


SLOW = ["--type", "streamOptimized", "--compress-level", "9", "--threads", "1"]


@pytest.mark.parametrize(
    ("number", "code", "delay"),
    [
        (signal.SIGTERM, 143, 0),
        (signal.SIGTERM, 143, 0.2),
        (signal.SIGHUP, 129, 0.1),
        (signal.SIGINT, 130, 0.1),
    ],
)
def test_convert(tmp_path: Path, big: Path, number: signal.Signals, code: int, delay: float) -> None:
    process = run(tmp_path, "convert", str(big), str(tmp_path / "b.vmdk"), *SLOW)
    time.sleep(delay)
    process.send_signal(number)
    if number is not signal.SIGINT:
        process.send_signal(number)  # once more changes nothing
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (code, "", "")
    assert os.listdir(tmp_path) == []


def test_full_preallocation(tmp_path: Path) -> None:
    """Another verb, another way to write."""
    words = ["create", str(tmp_path / "a.vmdk"), "3G", "--type", "monolithicFlat", "--preallocation", "full"]
    process = run(tmp_path, *words)
    process.terminate()
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 143
    assert os.listdir(tmp_path) == []


def test_nohup(tmp_path: Path, big: Path) -> None:
    """What the caller ignores stays ignored."""
    words = ["convert", str(big), str(tmp_path / "b.vmdk"), "--type", "streamOptimized"]
    process = run(tmp_path, *words, "--compress-level", "1", ignored=signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    _out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    convert(tmp_path / "b.vmdk", tmp_path / "c.raw")
    assert (tmp_path / "c.raw").read_bytes() == big.read_bytes()


def test_handlers_come_and_go() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(AskedToEnd) as caught, orderly_end():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_only_the_first_one_counts() -> None:
    done = []

    def asked() -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGTERM)
            done.append(True)

    with pytest.raises(AskedToEnd), orderly_end():
        asked()
    assert done


def test_in_another_thread() -> None:
    """Only the main thread may say what signals do; any other goes without."""
    entered = []

    def work() -> None:
        with orderly_end():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [signal.SIG_DFL]


def test_a_signal_in_a_finalizer_is_not_lost() -> None:
    class Late:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)  # its handler runs here, where Python drops what is raised
            ended.append(True)

    def work(seconds: float) -> None:
        late = Late()
        del late
        assert ended
        time.sleep(seconds)

    ended: list[bool] = []
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(AskedToEnd) as caught, orderly_end():
        work(5)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGALRM) is before
    with orderly_end():
        work(0)
    assert len(ended) == 2
    time.sleep(0.05)  # nothing is left that would come after the end
