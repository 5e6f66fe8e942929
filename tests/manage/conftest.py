"""Everything here syncs a lot: its folders are in memory, where that costs nothing."""

from pathlib import Path

import pytest

from tests.snapshot.conftest import quick_path as quick_path


@pytest.fixture
def tmp_path(quick_path: Path) -> Path:
    return quick_path
