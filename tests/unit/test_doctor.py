"""The checks of ``doctor``, on this system and on systems that lack this or that."""

import json
import sys
from pathlib import Path

import pytest

from nbd_vmdk import doctor
from nbd_vmdk.cli import main
from nbd_vmdk.doctor import Check, checks, exit_code


def fake(path: Path, script: str) -> Path:
    """A program of that text."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def found() -> dict[str, Check]:
    return {check.name: check for check in checks()}


def test_this_system_can_serve() -> None:
    here = found()
    for name in ("nbdkit", "nbdkit's Python plugin", "Python", "nbd-vmdk's plugin"):
        assert here[name].ok, here[name]
        assert here[name].required
        assert here[name].mend is None
    assert exit_code(list(here.values())) in (0, 4)


def test_no_nbdkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDKIT", "/nowhere/nbdkit")
    here = found()
    assert not here["nbdkit"].ok
    assert here["nbdkit"].mend == "apt-get install nbdkit nbdkit-plugin-python"
    # What can't be asked without nbdkit is not asked.
    assert "Python" not in here
    assert exit_code(list(here.values())) == 1


@pytest.mark.parametrize(
    ("script", "name", "what"),
    [
        ("echo nbdkit 1.20.4", "nbdkit", "older than 1.32"),
        ("exit 3", "nbdkit", "does not tell its version"),
        ('[ "$1" = --version ] && echo nbdkit 1.40.1', "nbdkit's Python plugin", "not installed"),
        (
            'if [ "$1" = --version ]; then echo nbdkit 1.40.1; else echo python_version=3.99.1; fi',
            "Python",
            "embeds 3.99",
        ),
    ],
)
def test_an_nbdkit_that_will_not_do(
    script: str, name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDKIT", str(fake(tmp_path / "nbdkit", script)))
    here = found()
    assert not here[name].ok
    assert here[name].required
    assert what in here[name].found
    assert here[name].mend
    assert exit_code(list(here.values())) == 1


def test_a_plugin_that_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "plugin.py"
    broken.write_text("import no_such_module_at_all\n")
    monkeypatch.setattr(doctor, "plugin_path", lambda: str(broken))
    check = found()["nbd-vmdk's plugin"]
    assert not check.ok
    assert check.found == "ModuleNotFoundError: No module named 'no_such_module_at_all'"


def test_what_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version_of", lambda _: None)
    monkeypatch.setattr("nbd_vmdk.doctor.shutil.which", lambda name, **_: name if name == "nbdkit" else None)
    here = found()
    assert here["numpy"].required
    for name in ("deflate", "nbdcopy", "nbdinfo", "nbdfuse", "nbd-client", "qemu-img"):
        assert not here[name].ok
        assert not here[name].required
    assert here["deflate"].mend == f"{sys.executable} -m pip install deflate"
    assert here["qemu-img"].mend == "apt-get install qemu-utils"


def test_libnbd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A notebook tool on PyPI has the same name, so an import that works proves nothing.
    (tmp_path / "nbd.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nbd", raising=False)
    check = found()["libnbd"]
    assert not check.ok
    assert not check.required
    assert str(check.mend).startswith("apt-get install python3-libnbd")
    monkeypatch.delitem(sys.modules, "nbd", raising=False)


def test_exit_codes() -> None:
    fine, lacks = Check("a", True, True, ""), Check("b", False, False, "")
    assert exit_code([fine]) == 0
    assert exit_code([fine, lacks]) == 4
    assert exit_code([fine, lacks, Check("c", False, True, "")]) == 1


def test_the_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [
        Check("nbdkit", True, True, "1.32.5"),
        Check("deflate", False, False, "not installed", "pip install deflate"),
    ]
    monkeypatch.setattr(doctor, "checks", lambda: iter(answers))
    assert main(["doctor"]) == 4
    assert capsys.readouterr().out.splitlines() == [
        "ok       nbdkit                  1.32.5",
        "warning  deflate                 not installed",
        "                                 pip install deflate",
    ]
    assert main(["doctor", "--json"]) == 4
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == 1
    assert answer["checks"] == [check.as_dict() for check in answers]
