"""A folder in memory, for tests that start again and again."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED_MEMORY = "/dev/shm"


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """Like tmp_path, but where syncing costs nothing, if there is such a place."""
    if not os.access(SHARED_MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="nbd-vmdk-", dir=SHARED_MEMORY) as folder:
        yield Path(folder)
