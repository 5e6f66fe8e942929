"""docs/API.md and README.md: every example in Python runs, and prints what it is said to print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def examples(document: Path) -> list[tuple[str, str]]:
    return re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", document.read_text(), re.DOTALL)


API = examples(ROOT / "docs" / "API.md")
README = examples(ROOT / "README.md")


def try_it(code: str, printed: str, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"hello" + bytes((8 << 20) - 5))
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "raw", "disk.vmdk"]
    subprocess.run(convert, cwd=tmp_path, check=True)
    for name in ("other.vmdk", "copy.vmdk"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", name, "8M"], cwd=tmp_path, check=True)
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    # A server that is killed on purpose is told of in the log, and that is all.
    assert "Traceback" not in done.stderr
    if printed:
        assert done.stdout == printed


@pytest.mark.parametrize("number", range(len(API)))
def test_example(number: int, tmp_path: Path) -> None:
    try_it(*API[number], tmp_path)


@pytest.mark.parametrize("number", range(len(README)))
def test_example_of_the_readme(number: int, tmp_path: Path) -> None:
    try_it(*README[number], tmp_path)


def test_there_are_examples() -> None:
    assert len(API) >= 6
    assert len(README) == 2
