"""docs/RECIPES.md and docs/EXAMPLES.md, run; and the manual pages that are made of the latter."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest

from scripts.manual import EXAMPLES, Block, blocks, main, page_name, verbs
from tests.guest import Guest, find_guest
from tests.recipes import ROOT, make_disk, missing, run, search_path

RECIPES = ROOT / "docs" / "RECIPES.md"


def sections(document: Path) -> dict[str, list[Block]]:
    found: dict[str, list[Block]] = {}
    for block in blocks(document):
        found.setdefault(block.heading, []).append(block)
    return found


def script_of(section: list[Block], name: str = "") -> str:
    return "".join(block.text for block in section if block.language == "sh" and block.name == name)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_disk(tmp_path_factory.mktemp("recipes"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(made, tmp_path / "disk.vmdk")
    return tmp_path


def try_it(section: list[Block], script: str, folder: Path) -> str:
    absent = missing(script)
    if absent:
        pytest.skip(f"not installed: {' '.join(absent)}")
    return run(script, folder, [block for block in section if block.name and block.language != "sh"])


_RECIPES = sections(RECIPES)
_EXAMPLES = sections(EXAMPLES)


@pytest.mark.parametrize("heading", [heading for heading in _RECIPES if script_of(_RECIPES[heading])])
def test_recipe(heading: str, folder: Path) -> None:
    said = try_it(_RECIPES[heading], script_of(_RECIPES[heading]), folder)
    if "QEMU machine" in heading:
        assert len(re.findall(r"disk\.sock.*\((raw|nbd)\)", said)) == 2, said  # a disk, both ways


def test_recipe_with_certificates(folder: Path) -> None:
    section = _RECIPES["Encrypted, to other machines"]
    try_it(section, script_of(section, "tls"), folder)


@pytest.mark.parametrize("verb", list(_EXAMPLES))
def test_example(verb: str, folder: Path) -> None:
    section = _EXAMPLES[verb]
    fuse = script_of(section, "fuse")
    if fuse and (missing("nbdfuse fusermount3") or not os.access("/dev/fuse", os.W_OK)):
        pytest.skip("no nbdfuse, or no /dev/fuse")
    try_it(section, script_of(section) + fuse, folder)


@pytest.mark.skipif(
    "NBD_VMDK_GUESTFS" not in os.environ, reason="NBD_VMDK_GUESTFS is not set: it takes a minute"
)
def test_libguestfs_looks_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBGUESTFS_BACKEND", "direct")
    monkeypatch.setenv("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
    section = _RECIPES["Look inside with libguestfs"]
    assert try_it(section, script_of(section, "guestfs"), folder).strip() == "hello"


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextmanager
def guest_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", search_path(None))
        yield


def test_the_kernels_client(made: Path, tmp_path: Path) -> None:
    """What needs root and a kernel with nbd is run by a guest, to which the host's 127.0.0.1 is 10.0.2.2."""
    place = find_guest()
    if isinstance(place, str):
        pytest.skip(place)
    section = _RECIPES["A block device of this kernel"]
    table = next(block.text for block in section if block.name == "nbdtab")
    by_hand = script_of(section, "guest")
    assert {"mount", "cat", "umount", "nbd-client"} <= set(by_hand.split())
    script = f"""
        ip addr add 10.0.2.15/24 dev eth0
        ip link set eth0 up
        mkdir -p /etc
        modprobe() {{ :; }}  # what it would load is there
        partition() {{
            for i in 1 2 3 4 5 6 7 8 9 10; do
                [ -b /dev/nbd0p1 ] && return
                partprobe /dev/nbd0 || true
                sleep 0.2
            done
        }}
        mount() {{ partition; busybox mount -t ext4 "$@"; }}
        cat() {{ echo "@@ said$turn $(busybox cat "$@")"; }}
        turn=1
        {by_hand}
        """
    port = 10809 if is_free(10809) else 0
    if port:  # nbd-client looks nowhere else when it goes by its table
        script += f"""
            echo '{table.strip()}' > /etc/nbdtab
            turn=2
            nbd-client nbd0
            mount /dev/nbd0p1 /mnt
            cat /mnt/hello
            umount /mnt
            nbd-client -d /dev/nbd0
            """
    shutil.copy(made, tmp_path / "disk.vmdk")
    words = [sys.executable, "-m", "nbd_vmdk", "serve", "--json", "--port", str(port), "disk.vmdk"]
    with subprocess.Popen(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          stdout=subprocess.PIPE, text=True) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            said = ""
            for line in server.stdout:
                said += line
                if line == "}\n":
                    break
            uri = json.loads(said)["exports"][0]["uri"]
            script = script.replace("127.0.0.1", "10.0.2.2").replace("10809", str(urlsplit(uri).port))
            network = ("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile=")
            with guest_path():
                told = Guest(place, tmp_path).run(script, *network)
        finally:
            server.terminate()
    assert server.returncode == 0
    assert told["said1"] == told.get("said2", "hello") == "hello"


def test_the_line_of_fstab(tmp_path: Path) -> None:
    (tmp_path / "fstab").write_text(
        next(block.text for block in _RECIPES["A block device of this kernel"] if block.name == "fstab")
    )
    words = ["findmnt", "--tab-file", str(tmp_path / "fstab"), "-n", "-o", "SOURCE,TARGET,FSTYPE"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["/dev/nbd0p1", "/srv/disk", "ext4"]


def test_every_verb_has_examples() -> None:
    ours = {context.command_path.removeprefix("nbd-vmdk").strip() for context in verbs()
            if not isinstance(context.command, click.Group)}  # fmt: skip
    assert set(_EXAMPLES) == ours, "docs/EXAMPLES.md has one section for each verb, and no other"


def test_manual_pages_are_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    main(tmp_path)
    pages = sorted(tmp_path.iterdir())
    assert {page.stem for page in pages} == {page_name(context.command_path) for context in verbs()}
    whole = (tmp_path / "nbd-vmdk.1").read_text()
    for context in verbs():
        if context.parent is not None and context.parent.parent is None:
            assert f"\\fBnbd\\-vmdk\\-{context.info_name}\\fP(1)" in whole.partition(".SH COMMANDS")[2]
    for page in pages:
        text = page.read_text()
        for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"):
            assert f".SH {section}\n" in text
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    words = ["groff", "-ww", "-man", "-Tutf8", *map(str, pages)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert ".vmx (its disks" in " ".join(done.stdout.split())  # no line of help was taken for a macro
    if shutil.which("mandoc"):
        words = ["mandoc", "-T", "lint", "-W", "warning", *map(str, pages)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.stdout == ""


def test_the_script_writes_the_pages(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "manual.py"), str(tmp_path)], check=True, cwd="/")
    assert (tmp_path / "nbd-vmdk.1").is_file()
