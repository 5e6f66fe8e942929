"""``nbd-vmdk create`` as a user meets it: words, streams, exit codes, a full disk, a kill."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbd_vmdk.cli import main
from nbd_vmdk.units import MIB
from tests.create.tools import names, sound

COMMAND = [sys.executable, "-m", "nbd_vmdk", "create"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.getcwd())
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["create", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_line_for_each_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "d.vmdk", "3M", "--type", "VMFS") == (
        0,
        "d-flat.vmdk: raw\nd.vmdk: vmfs, 3 MiB\n",
        "",
    )
    sound("d.vmdk")


def test_reasons_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "d.vmdk", "1000", "--for", "esxi", "--type", "monolithicFlat")
    assert code == 0
    assert out.splitlines()[-1] == "d.vmdk: monolithicFlat, 1 KiB"
    assert err.startswith("warning: ESXi's own name of this kind is vmfs")
    assert "note: the size is rounded up" in err


def test_a_name_that_tells_no_image(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "disk", "1M")
    assert code == 0
    assert err.startswith("note: its name does not end in .vmdk")
    assert run(capsys, "disk.VMDK", "1M")[2] == ""


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "base.vmdk", "2M", "--for", "qemu", "--json")
    found: dict[str, Any] = json.loads(out)
    assert code == 0
    assert found["schema"] == 1
    assert found["create-type"] == "monolithicSparse"
    assert found["virtual-size"] == 2 * MIB
    assert found["cid"] == 0xFFFFFFFE
    assert found["files"] == [{"filename": "base.vmdk", "role": "disk", "length": 65536}]
    assert len(found["notes"]) == 2
    assert found["warnings"] == []
    _, out, _ = run(capsys, "child.vmdk", "--parent", "base.vmdk", "--json")
    found = json.loads(out)
    assert (found["parent-cid"], found["backing-filename"]) == (0xFFFFFFFE, "base.vmdk")


def test_a_custom_disk(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.img").write_bytes(b"a" * 4096)
    words = [
        "--extent",
        'RW 8 FLAT "a.img" 0',
        "--extent",
        "RW 8 ZERO",
        "--extent",
        'RW 2048 SPARSE "b.vmdk"',
    ]
    code, out, _ = run(capsys, "d.vmdk", *words)
    assert (code, out) == (0, "b.vmdk: sparse\nd.vmdk: custom, 1.01 MiB\n")


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["d.vmdk"], 2, "error: a size is needed"),
        (["d.vmdk", "much"], 2, "error: Invalid value for '[SIZE]'"),
        (["d.vmdk", "1M", "--grain-size", "x"], 2, "error: Invalid value for '--grain-size'"),
        (["d.vmdk", "1M", "--type", "seSparse"], 2, "error: a disk of kind seSparse can't be made"),
        (["no/d.vmdk", "1M"], 1, "error: no: no such file"),
        (["d.vmdk", "--parent", "none.vmdk"], 1, "error: none.vmdk: no such file"),
    ],
)
def test_what_goes_wrong(capsys: pytest.CaptureFixture[str], words: list[str], code: int, error: str) -> None:
    done, out, err = run(capsys, *words)
    assert (done, out) == (code, "")
    assert err.startswith(error)
    assert names(".") == []


def test_an_existing_file_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("d.vmdk").write_text("mine")
    code, _, err = run(capsys, "d.vmdk", "1M")
    assert code == 1
    assert err.startswith("error: d.vmdk: it is there already")
    assert Path("d.vmdk").read_text() == "mine"


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_a_file_that_may_not_grow_so_large(preallocation: str) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    words = ["d.vmdk", "8M", "--type", "vmfs", "--preallocation", preallocation]
    done = subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, check=False, preexec_fn=limit, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: d-flat.vmdk: ")
    assert "File too large" in done.stderr
    assert names(".") == []


def test_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    free = os.statvfs(".")
    size = free.f_blocks * free.f_frsize
    # More than there is at all: it must be refused without trying, which would fill the disk for a moment.
    code, _, err = run(capsys, "d.vmdk", str(size), "--type", "vmfs", "--preallocation", "falloc")
    assert code == 1
    assert "No space left on device" in err
    assert "hint: --preallocation off" in err
    assert names(".") == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_image(how: signal.Signals) -> None:
    words = ["d.vmdk", "3G", "--type", "monolithicFlat", "--preallocation", "full"]
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        deadline = time.monotonic() + 20
        while not any(path.stat().st_size for path in Path().glob(".d.vmdk.new-*/*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(how)
        run.communicate(timeout=60)
    assert not Path("d.vmdk").exists()
    assert not Path("d-flat.vmdk").exists()
    if how == signal.SIGINT:
        assert run.returncode == 130
        assert names(".") == []
    assert main(["create", "d.vmdk", "1M"]) == 0
    assert names(".") == ["d.vmdk"]  # the killed run's folder is gone
