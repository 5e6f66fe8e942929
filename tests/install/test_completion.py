"""What shells ask for while one types, and the scripts that make them ask."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nbd_vmdk.cli import main

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "nbd_vmdk"]


def asked(words: str, shell: str = "bash") -> list[str]:
    """The answer to somebody who has typed ``words`` and presses Tab at their end."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_NBD_VMDK_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(PROGRAM, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("nbd-vmdk ser", ["plain,serve"]),
        ("nbd-vmdk serve --read", ["plain,--read-only"]),
        ("nbd-vmdk snapshot com", ["plain,commit"]),
        ("nbd-vmdk checksum --algorithm bl", ["plain,blake2b"]),
        ("nbd-vmdk info ", ["file,"]),
        ("nbd-vmdk info dis", ["file,dis"]),
        ("nbd-vmdk serve -r --socket ", ["file,"]),
        ("nbd-vmdk completion z", ["plain,zsh"]),
        ("nbd-vmdk nonsense x", []),
    ],
)
def test_answers(words: str, answer: list[str]) -> None:
    assert [line for line in asked(words) if line] == answer


def test_all_verbs_are_offered() -> None:
    from click import Context

    from nbd_vmdk.cli import root

    assert set(asked("nbd-vmdk ")) == {f"plain,{name}" for name in root.list_commands(Context(root))}


def test_it_is_quick() -> None:
    """In time of the processor, which others that run beside it do not lengthen."""
    best = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        asked("nbd-vmdk serve --")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < 0.15


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_takes_the_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", str(script)], check=True)


def test_bash_completes(tmp_path: Path) -> None:
    said = in_shell(
        tmp_path,
        ["bash", "--norc", "-c"],
        """
        eval "$(nbd-vmdk completion bash)"
        COMP_WORDS=(nbd-vmdk snapshot c) COMP_CWORD=2
        $(complete -p nbd-vmdk | sed 's/.*-F \\([^ ]*\\) .*/\\1/') nbd-vmdk
        echo "${COMPREPLY[@]}"
        """,
    )
    assert said.split() == ["commit", "create"]


def test_fish_completes(tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (tmp_path / "disk.vmdk").touch()
    said = in_shell(
        tmp_path,
        ["fish", "--no-config", "-c"],
        """
        nbd-vmdk completion fish | source
        complete -C "nbd-vmdk snapshot com"
        complete -C "nbd-vmdk info di"
        """,
    )
    assert [line.split("\t")[0] for line in said.splitlines()] == ["commit", "disk.vmdk"]


def in_shell(folder: Path, shell: list[str], script: str) -> str:
    program = folder / "nbd-vmdk"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m nbd_vmdk "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{folder}:{os.environ['PATH']}"}
    environment["HOME"] = str(folder)
    done = subprocess.run(
        [*shell, script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
