from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.guest import Guest, find_guest


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    place = find_guest()
    if isinstance(place, str):
        pytest.skip(place)
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/sbin")
    folder = tmp_path / "guest"
    folder.mkdir()
    return Guest(place, folder)
