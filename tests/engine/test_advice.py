"""Errors that an open disk raises say what to do with the disk by its name, as it was opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbd_vmdk import Disk, VmdkError, convert, open_disk
from nbd_vmdk.ops.snapshot.create import create_child
from tests.breaking import BREAKS, Break

#: Breaks that only reading meets.
READING = (
    "gde-both",
    "gte-past-end",
    "gte-low",
    "stream-gte-past-end",
    "stream-gte-other",
    "record-bits",
    "cowd-gde",
    "cowd-gte-low",
    "se-gde",
    "se-state",
)

CALLS: dict[str, Callable[[Disk], object]] = {
    "pread": lambda disk: disk.pread(disk.size, 0),
    "pread_into": lambda disk: disk.pread_into(bytearray(disk.size), 0),
    "runs": lambda disk: list(disk.runs()),
    "cache": lambda disk: disk.cache(disk.size, 0),
}
WRITES: dict[str, Callable[[Disk], object]] = {
    "pwrite": lambda disk: disk.pwrite(b"new" * (disk.size // 3), 0),
    "zero": lambda disk: disk.zero(disk.size - 1, 1),
    "fast": lambda disk: disk.zero(disk.size - 1, 1, fast=True),
    "trim": lambda disk: disk.trim(disk.size, 0),
}


def one(name: str) -> Break:
    return next(each for each in BREAKS if each.name == name)


def met(call: Callable[[Disk], object], disk: Disk) -> VmdkError | None:
    try:
        call(disk)
    except VmdkError as error:
        return error
    return None


def same_but_named(error: VmdkError, plain: VmdkError, name: str) -> None:
    assert type(error) is type(plain)
    assert (str(error), error.errno) == (str(plain), plain.errno)
    assert plain.hint is not None
    assert "IMAGE" in plain.hint
    assert error.hint == plain.hint.replace("IMAGE", name)


@pytest.mark.parametrize("name", READING)
def test_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    image = one(name).build(str(tmp_path))
    one(name).damage(image)
    there = os.path.basename(image.path)
    for path in (there, os.path.relpath(image.path, tmp_path.parent), image.path):
        monkeypatch.chdir(tmp_path.parent if path.endswith(f"/{there}") else tmp_path)
        with open_disk(path) as disk, open_disk(path) as other:
            plain = met(lambda disk: disk.read_into(memoryview(bytearray(disk.size)), 0), other)
            assert plain is not None
            found = {call: met(CALLS[call], disk) for call in CALLS}
            assert found["pread"] is not None
            assert found["pread_into"] is not None
            for error in found.values():
                if error is not None:
                    same_but_named(error, plain, path)
    with pytest.raises(VmdkError) as told:
        convert(image.path, tmp_path / "new.vmdk")
    same_but_named(told.value, plain, image.path)


@pytest.mark.parametrize("call", WRITES)
@pytest.mark.parametrize("name", ["gde-both", "cowd-gde"])
def test_writing(tmp_path: Path, name: str, call: str) -> None:
    """What is damaged while it is open is met by who writes."""
    image = one(name).build(str(tmp_path))
    disk = open_disk(image.path, writable=True)
    one(name).damage(image)
    error = met(WRITES[call], disk)
    assert error is not None
    assert error.hint is not None
    assert f"nbd-vmdk repair {image.path} shows" in error.hint
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Disk, "advise", lambda *_: False)
        plain = met(WRITES[call], disk)
    assert plain is not None
    same_but_named(error, plain, image.path)
    disk.close()


def test_the_link_is_named_that_is_damaged(tmp_path: Path) -> None:
    parent = one("gde-both").build(str(tmp_path))
    child = create_child(parent.path, f"{tmp_path}/the child.vmdk").path
    one("gde-both").damage(parent)
    with open_disk(child) as disk:
        error = met(CALLS["pread"], disk)
    assert error is not None
    assert f"nbd-vmdk repair {parent.path} shows" in str(error.hint)
