"""The wheel, in an environment of its own as pipx makes one, serves a disk."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nbd_vmdk

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment, made by the system's Python, with the wheel in it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    made = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "No matching distribution found" in made.stderr or "Failed to establish" in made.stderr:
        pytest.skip("no network to get the build tools from")
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"nbd_vmdk-{nbd_vmdk.__version__}-py3-none-any.whl"
    # Without pip in it, which would cost as much as all the rest.
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = str(folder / "env" / "bin" / "python")
    words = [*pip, "--python", python, "install", "--only-binary", ":all:", str(wheel)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if "No matching distribution found" in done.stderr or "Failed to establish" in done.stderr:
        pytest.skip("no network to get what the wheel needs from")
    assert done.returncode == 0, done.stderr
    return folder / "env" / "bin"


def run(*words: str | Path, cwd: Path) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env={**kept, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_serves(installed: Path, tmp_path: Path) -> None:
    program = installed / "nbd-vmdk"
    run(program, "create", "disk.vmdk", "8M", cwd=tmp_path)
    (tmp_path / "content").write_bytes(os.urandom(1 << 20))
    run(program, "write", "--input", "content", "disk.vmdk", cwd=tmp_path)
    run(program, "serve", "-r", "disk.vmdk", "--run", 'nbdcopy "$uri" copy.raw', cwd=tmp_path)
    run("qemu-img", "compare", "disk.vmdk", "copy.raw", cwd=tmp_path)
    assert (tmp_path / "copy.raw").read_bytes()[: 1 << 20] == (tmp_path / "content").read_bytes()
    # nbdkit alone finds the environment by the plugin's own path, and its compiled modules load there.
    path = run(program, "--plugin-path", cwd=tmp_path).strip()
    assert Path(path).is_relative_to(installed.parent)
    said = run("nbdkit", "python", path, "--dump-plugin", cwd=tmp_path)
    assert "nbd_vmdk_inflate=libdeflate" in said


def test_versions_agree() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == nbd_vmdk.__version__
    changelog = (ROOT / "debian" / "changelog").read_text()
    assert changelog.startswith(f"nbd-vmdk ({nbd_vmdk.__version__}) ")
