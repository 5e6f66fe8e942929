"""The Debian package: built, looked at, and (if asked for) installed in a fresh Debian."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_documents_of_the_package_are_there() -> None:
    for line in (ROOT / "debian" / "docs").read_text().split():
        assert (ROOT / line).is_file()


@pytest.mark.skipif(
    "NBD_VMDK_DEB" not in os.environ, reason="NBD_VMDK_DEB is not set: it takes two minutes, as root"
)
def test_the_package_serves_in_a_fresh_debian() -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "deb"), "--check"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all is well\n")


def test_the_script_is_sound() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "--severity=warning", str(ROOT / "scripts" / "deb")], check=True)
