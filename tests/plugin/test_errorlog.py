"""What is logged of errors that come again and again: the first, and how many there were."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest

from nbd_vmdk.errors import BadField, NotFast, OptionError, StorageError, Truncated, VmdkError
from nbd_vmdk.plugin import errorlog
from nbd_vmdk.plugin.errorlog import REPEATED, ErrorLog

Tell = Callable[[BaseException], str]


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(errorlog, "time", made)
    return made


def advise(error: VmdkError) -> None:
    error.hint = error.hint and error.hint.replace("IMAGE", "disk.vmdk")


@pytest.fixture
def log(clock: Clock) -> ErrorLog:
    return ErrorLog(advise)


@pytest.fixture
def tell(log: ErrorLog, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """What nbdkit prints for an exception."""
    monkeypatch.setattr(traceback, "format_exception", None)  # is put back
    log.install()
    return lambda error: "".join(traceback.format_exception(type(error), error, None))


def cut(need: int, file: str = "disk.vmdk") -> Truncated:
    return Truncated(file, what="a read", need=need, have=512)


def test_only_numbers_differ(log: ErrorLog, tell: Tell) -> None:
    assert tell(cut(1024)).startswith(
        "disk.vmdk: the file ends too early for a read: 1024 bytes needed, 512 there\nhint: "
    )
    second = tell(cut(2048))
    assert second.startswith("disk.vmdk: the file ends too early for a read: 2048 bytes needed, 512 there; ")
    assert "\n" not in second
    for need in range(4096, 8192, 512):
        assert tell(cut(need)) == f"truncated {REPEATED}"
    first = "disk.vmdk: the file ends too early for a read: 1024 bytes needed, 512 there"
    assert log.counted() == [f"{first} (and 8 more errors like it)"]


def test_a_refused_fast_zero_is_no_error(log: ErrorLog, tell: Tell) -> None:
    assert [tell(NotFast("disk.vmdk")) for _ in range(3)] == [f"not-fast {REPEATED}"] * 3
    assert log.counted() == []


def test_other_files_and_other_errors_are_told(log: ErrorLog, tell: Tell) -> None:
    told = [
        tell(error)
        for error in (
            cut(1024),
            cut(1024, "other.vmdk"),
            BadField("disk.vmdk", field="entry 5", value="0x3", why="too low"),
            StorageError.of(OSError(28, "No space left on device"), "disk.vmdk", "write"),
            StorageError.of(OSError(5, "Input/output error"), "disk.vmdk", "write"),
        )
    ]
    assert all("disk.vmdk: " in text or "other.vmdk: " in text for text in told)
    assert "nbd-vmdk check disk.vmdk tells" in told[0]
    assert log.counted() == []
    assert "only counted" in tell(BadField("disk.vmdk", field="entry 77", value="0xfff", why="too low"))
    assert log.counted() == []  # nothing is left untold


def test_after_a_quiet_time_it_is_new(clock: Clock, log: ErrorLog, tell: Tell) -> None:
    first = tell(cut(1024))
    for _ in range(20):
        clock.now += 500  # it never was quiet for long
        tell(cut(1024))
    clock.now += 599
    assert tell(cut(1024)) == f"truncated {REPEATED}"
    clock.now += 601
    assert tell(cut(1024)) == first
    assert tell(cut(1024)) == f"truncated {REPEATED}"
    assert log.counted()[0].endswith("(and 21 more errors like it)")


def test_what_clients_can_make_up_is_bounded(clock: Clock, log: ErrorLog, tell: Tell) -> None:
    told = [tell(OptionError(None, why=f"no export '{'x' * times}'")) for times in range(40)]
    assert [text.startswith("no export") for text in told] == [True] * 10 + [False] * 30
    assert (
        tell(OptionError(None, why="no export ''"))
        == "no export ''; more errors like this one are only counted"
    )
    for times in range(40, 3000):
        clock.now += 11
        assert tell(OptionError(None, why=f"no export '{'x' * times}'")).startswith("no export")
    assert len(log._sorts) == 1000


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traceback, "format_exception", traceback.format_exception)
    ErrorLog(advise).install()
    with pytest.raises(ZeroDivisionError) as caught:
        raise ZeroDivisionError
    for _ in range(3):
        assert traceback.format_exception(caught.value)[0].startswith("Traceback")
