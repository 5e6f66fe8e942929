"""docs/API.md: every example runs, and prints what it is said to print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOC = Path(__file__).parents[2] / "docs" / "API.md"

EXAMPLES = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", DOC.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number: int, tmp_path: Path) -> None:
    code, printed = EXAMPLES[number]
    (tmp_path / "raw").write_bytes(b"hello" + bytes((8 << 20) - 5))
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "raw", "disk.vmdk"]
    subprocess.run(convert, cwd=tmp_path, check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", "other.vmdk", "8M"], cwd=tmp_path, check=True)
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    # A server that is killed on purpose is told of in the log, and that is all.
    assert "Traceback" not in done.stderr
    if printed:
        assert done.stdout == printed


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6
