"""The command line as a user meets it: words, streams, exit codes, signals, terminals.

The engine is replaced by what each test needs; that it is called rightly is tested here, what it does is not.
"""

import errno
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import click
import pytest

from nbd_vmdk.cli import main, output, root
from nbd_vmdk.cli.opening import ImagePath
from nbd_vmdk.errors import BadField, InUse, NotVmdk, ParentNotFound, StorageError
from nbd_vmdk.ops.snapshot.files import writable_wanted

ROOT = Path(__file__).parents[2]

ROWS = [
    {"start": 0, "length": 65536, "depth": 0, "present": True, "zero": False, "data": True, "kind": "data",
     "offset": 131072, "filename": "a b.vmdk"},
    {"start": 65536, "length": 983040, "depth": 0, "present": False, "zero": True, "data": False,
     "kind": "hole"},
]  # fmt: skip


class FakeDisk:
    size = 1 << 20
    warnings = ("x.vmdk: odd",)

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    calls: list[tuple[str, dict[str, Any]]] = []

    def open_disk(path: str, **options: Any) -> FakeDisk:
        calls.append((path, options))
        return FakeDisk(**options)

    monkeypatch.setattr("nbd_vmdk.opening.open_disk", open_disk)
    return calls


def rows_are(monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    module = SimpleNamespace(map_rows=lambda _disk: iter(rows))
    monkeypatch.setitem(sys.modules, "nbd_vmdk.ops.mapping", module)


def info_is(monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any] | Exception) -> list[Any]:
    calls = []

    def image_info(path: str, **options: Any) -> dict[str, Any]:
        calls.append((path, options))
        if isinstance(facts, Exception):
            raise facts
        return facts

    monkeypatch.setitem(sys.modules, "nbd_vmdk.ops.info", SimpleNamespace(image_info=image_info))
    return calls


# words and codes


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option]) == 0
    said = capsys.readouterr().out
    for verb in ("serve", "info", "map", "doctor"):
        assert f"\n  {verb} " in said


def test_nothing_asked_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert "Commands:" in said.err
    assert said.out == ""


def test_version_and_plugin_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plugin-path"]) == 0
    path = capsys.readouterr().out.strip()
    assert os.path.isabs(path)
    assert "_bootstrap()" in Path(path).read_text()


def test_help_is_quick() -> None:
    best = 9.0
    for _ in range(3):
        begin = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "nbd_vmdk", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        best = min(best, time.monotonic() - begin)
    assert best < 0.25


def test_no_verb_imports_what_it_does_not_need() -> None:
    heavy = "{'asyncio', 'numpy', 'rich', 'deflate', 'isal', 'nbd_vmdk.disk', 'nbd_vmdk.opening', 'tarfile'}"
    code = (
        f"import sys; from nbd_vmdk.cli import main; main(['-h']); sys.exit(repr({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize(
    "line",
    [
        ["frobnicate"],
        ["serve"],
        ["serve", "--colour", "x"],
        ["serve", "--port", "70000", "x"],
        ["serve", "--cache-size", "much", "x"],
        ["serve", "--socket", "s", "--port", "1", "x"],
        ["serve", "--bind", "::1", "x"],
        ["serve", "--json", "--run", "true", "x"],
        ["map", "a", "b"],
    ],
)
def test_usage_errors(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    said = capsys.readouterr()
    first, *rest = said.err.splitlines()
    assert first.startswith("error: ")
    assert all(each.startswith("hint: ") for each in rest)
    assert "Traceback" not in said.err
    if "--json" in line:
        answer = json.loads(said.out)
        assert answer["schema"] == 1
        assert answer["error"]["error"] == "usage"
    else:
        assert said.out == ""


def test_errors_name_the_file_and_the_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_use(path: str, **_: Any) -> None:
        raise InUse(path, how="a writer holds it")

    rows_are(monkeypatch, [])
    monkeypatch.setattr("nbd_vmdk.opening.open_disk", in_use)
    assert main(["map", "--json", "x.vmdk"]) == 5
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "error: x.vmdk: in use by another process (a writer holds it)",
        "hint: stop the other user, or read it as it is with -r (-r: an option of serve, not of map)",
    ]
    answer = json.loads(said.out)
    assert answer["schema"] == 1
    assert answer["error"]["error"] == "in-use"
    assert answer["error"]["file"] == "x.vmdk"


def test_operating_system_errors_have_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(path: str, **_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    rows_are(monkeypatch, [])
    monkeypatch.setattr("nbd_vmdk.opening.open_disk", broken)
    assert main(["map", "x.vmdk"]) == 1
    assert capsys.readouterr().err.startswith("error: x.vmdk: ")


def parameters(command: click.Command) -> Iterator[click.Parameter]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            each = command.get_command(context, name)
            assert each is not None
            yield from parameters(each)
    yield from command.params


def test_whether_a_file_may_be_read_is_for_the_engine_to_say() -> None:
    """By itself click would call it wrong usage.  What serve writes or hands on is not looked at here."""
    paths = [each.type for each in parameters(root) if isinstance(each.type, ImagePath)]
    assert len(paths) > 20
    assert not any(path.readable for path in paths)


@pytest.mark.parametrize(
    ("number", "doing", "hint"),
    [
        (errno.EACCES, "open", "a user who may read it"),
        (errno.EACCES, "open for writing", "-r"),
        (errno.EACCES, "listen", "1024"),
        (errno.EACCES, "list", "a user who may read it"),
        (errno.EACCES, "make new files in its folder", "a user who may write to that folder"),
        (errno.EPERM, "create", "a user who may write to that folder"),
        (errno.EROFS, "create", "choose another folder"),
        (errno.EROFS, "open for writing", "-r"),
        (errno.ENAMETOOLONG, "create", "a shorter name"),
        (errno.ENOTDIR, "open", "is a file"),
        (errno.EISDIR, "write", "name a file"),
        (errno.ELOOP, "open", "symbolic links"),
        (errno.ENOENT, "make a socket", "folder"),
        (errno.ENOSPC, "write", "make room"),
        (errno.EMFILE, "open", "ulimit -n"),
        (
            errno.EMFILE,
            "open for writing",
            "ulimit -n, or LimitNOFILE= in a unit; to serve it without writing",
        ),
        (errno.EIO, "read", None),
    ],
)
def test_what_the_system_refuses_has_a_hint(number: int, doing: str, hint: str | None) -> None:
    found = StorageError.of(OSError(number, os.strerror(number)), "x.vmdk", doing).hint
    assert found is None if hint is None else hint in (found or "")


@pytest.mark.parametrize(
    ("named", "hint"),
    [
        ("dsk.vmdk", "there is disk.vmdk: is that meant?"),
        ("sub/dsk.vmdk", "there is sub/disk.vmdk: is that meant?"),
        ("other.vmdk", "'ls .' shows what is there"),
        ("no folder/disk.vmdk", "'ls .' shows what is there"),
        ("link.vmdk", "a symbolic link to no\\x0awhere, and nothing is there"),
    ],
)
@pytest.mark.parametrize("verb", ["info", "check", "compare", "serve"])
def test_what_is_there_instead(
    named: str, hint: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("disk.vmdk", "sub/disk.vmdk"):
        (tmp_path / name).touch()
    (tmp_path / "link.vmdk").symlink_to("no\nwhere")
    assert main([verb, named, *([named] if verb == "compare" else [])]) in (1, 2)
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("error: ")
    assert said[0].endswith(": no such file")
    assert said[1].startswith("hint: ")
    assert said[1].endswith(hint)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path: Path, closed: str) -> None:
    """What a library prints, as libnbd with LIBNBD_DEBUG=1, would go into it."""
    code = (
        "import os, sys; from nbd_vmdk.cli import output; output.prepare(); "
        "fd = os.open('file', os.O_RDWR | os.O_CREAT); "
        "os.write(fd, b'%d %r' % (fd, [os.get_inheritable(each) for each in range(3)]))"
    )
    words = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {closed}"
    subprocess.run(["sh", "-c", words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    number, inherited = (tmp_path / "file").read_text().split(" ", 1)
    assert int(number) > 2
    assert inherited == "[True, True, True]"


@pytest.mark.parametrize(("number", "hint"), [(errno.EACCES, "chmod u+w x.vmdk"), (errno.EROFS, "clone")])
def test_what_must_be_written_and_can_not_be(number: int, hint: str) -> None:
    """Nobody helps himself to a file system that is there for reading only with chmod."""
    refused = OSError(number, os.strerror(number))
    with pytest.raises(StorageError) as caught, writable_wanted():
        raise StorageError.of(refused, "x.vmdk", "open for writing") from refused
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    "line",
    [
        ["info", "https://example.com/disk.vmdk"],
        ["convert", "http://example.com/disk.vmdk", "a.vmdk"],
        ["snapshot", "list", "ssh://host/disk.vmdk"],
        ["serve", "https://example.com/disk.vmdk"],
        ["compare", "a.vmdk", "nbd://localhost/x"],
    ],
)
def test_a_url_is_no_file(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    first, hint = capsys.readouterr().err.splitlines()
    url = next(word for word in line if "://" in word)
    assert first.startswith(f"error: {url}: ")
    assert ("nbd-vmdk convert nbd://localhost/x " if "nbd://" in url else "download it") in hint


def test_an_image_is_no_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["a disk.vmdk"]) == 2
    assert "No such command" in capsys.readouterr().err
    Path("a disk.vmdk").touch()
    assert main(["a disk.vmdk"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: a disk.vmdk is a file, and no verb"
    assert "nbd-vmdk serve 'a disk.vmdk' " in hint


@pytest.mark.parametrize(
    ("word", "meant"), [("chek", "check"), ("snapshots", "snapshot"), ("unmount", "umount")]
)
def test_a_slip_in_a_verb(capsys: pytest.CaptureFixture[str], word: str, meant: str) -> None:
    assert main([word, "disk.vmdk"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: no such command '{word}'"
    assert hint == f"hint: did you mean nbd-vmdk {meant}?"


def test_what_means_nothing_for_a_verb_is_not_offered() -> None:
    def options(name: str) -> set[str | None]:
        verb = root.get_command(click.Context(root), name)
        assert verb is not None
        return {each.name for each in verb.params}

    assert "salvage" in options("read")
    assert "salvage" not in options("write")
    assert {"parent", "allow_dirs", "ignore_cid"} <= options("write")


def test_a_file_may_be_called_as_a_url_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.makedirs("http:/example.com")
    Path("http:/example.com/disk.vmdk").write_bytes(b"")
    calls = info_is(monkeypatch, {"filename": "", "format": "vmdk"})
    assert main(["info", "http://example.com/disk.vmdk"]) == 0
    assert calls[0][0] == "http://example.com/disk.vmdk"


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: str, **_: Any) -> None:
        raise KeyboardInterrupt

    rows_are(monkeypatch, [])
    monkeypatch.setattr("nbd_vmdk.opening.open_disk", interrupted)
    assert main(["map", "x.vmdk"]) == 130


@pytest.mark.parametrize("module", ["nbd_vmdk.cli", "click", "nbd_vmdk.cli.signals"])
@pytest.mark.parametrize("way", ["module", "script"])
def test_interrupted_while_it_is_imported(module: str, way: str) -> None:
    """Both as ``python -m nbd_vmdk`` and by the name that is installed."""
    if way == "module":
        start = 'import runpy; runpy.run_module("nbd_vmdk", run_name="__main__")'
    else:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        source, _, name = project["scripts"]["nbd-vmdk"].partition(":")
        start = f"from {source} import {name}; sys.exit({name}())"
    program = textwrap.dedent(
        f"""
        import os, signal, sys

        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == {module!r}:
                    os.kill(os.getpid(), signal.SIGINT)

        sys.meta_path.insert(0, Finder())
        {start}
        """
    )
    command = [sys.executable, "-c", program, "info", "missing.vmdk"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_names_from_images_never_reach_the_terminal_raw(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hostile(path: str, **_: Any) -> None:
        raise NotVmdk(path, what="\x1b[2Jfoo\nbar\u202e")

    rows_are(monkeypatch, [])
    monkeypatch.setattr("nbd_vmdk.opening.open_disk", hostile)
    assert main(["map", "x.vmdk"]) == 1
    assert capsys.readouterr().err == "error: x.vmdk: \\x1b[2Jfoo\\x0abar\\x202e\n"


# map


def test_map_options_reach_the_engine(
    opened: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_are(monkeypatch, ROWS)
    line = [
        "map",
        "--parent",
        "p",
        "--allow-dir",
        "/a",
        "--allow-dir",
        "/b",
        "--ignore-cid",
        "--salvage",
        "x.vmdk",
    ]
    assert main(line) == 0
    assert opened == [
        (
            "x.vmdk",
            {
                "parent": "p",
                "allow_dirs": ("/a", "/b"),
                "allow_devices": False,
                "ignore_cid": True,
                "salvage": True,
                "locks": False,
            },
        )
    ]
    said = capsys.readouterr()
    assert said.err == "warning: x.vmdk: odd\n"
    assert said.out.splitlines() == [
        "  start   length  kind    link   offset  file",
        "      0    65536  data       0   131072  a b.vmdk",
        "  65536   983040  hole",
    ]


def test_map_json_is_what_qemu_img_prints_and_more(
    opened: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_are(monkeypatch, ROWS)
    assert main(["map", "--json", "x.vmdk"]) == 0
    said = capsys.readouterr().out
    assert json.loads(said) == ROWS
    assert len(said.splitlines()) == len(ROWS)
    rows_are(monkeypatch, [])
    assert main(["map", "--json", "x.vmdk"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_map_of_a_damaged_image_tells_in_its_exit_code(
    opened: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_are(monkeypatch, [*ROWS, {"start": 0, "length": 1, "depth": 0, "kind": "lost"}])
    assert main(["map", "--json", "x.vmdk"]) == 3
    assert main(["map", "x.vmdk"]) == 3


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = f"""
import sys, itertools
from types import SimpleNamespace
import nbd_vmdk.opening
sys.path.insert(0, {str(ROOT)!r})
from tests.unit.test_cli import FakeDisk, ROWS
nbd_vmdk.opening.open_disk = lambda path, **_: FakeDisk()
sys.modules["nbd_vmdk.ops.mapping"] = SimpleNamespace(map_rows=lambda disk: itertools.cycle(ROWS))
from nbd_vmdk.cli import main
sys.exit(main(["map", "--json", "x.vmdk"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as endless:
        assert endless.stdout is not None
        assert endless.stderr is not None
        assert endless.stdout.readline().startswith(b"[{")
        endless.stdout.close()
        assert endless.wait(30) == 141
        assert endless.stderr.read() == b"warning: x.vmdk: odd\n"


@pytest.mark.parametrize("words", [["--help"], ["info", "--json", "nope.vmdk"], ["check", "--jsno"]])
def test_a_full_disk_is_an_error(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "nbd_vmdk", *words],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode in (1, 2)
    if "--jsno" in words:
        assert "No such option" in done.stderr
    else:
        error, hint = done.stderr.splitlines()
        assert error == "error: stdout: write: No space left on device"
        assert "make room" in hint


# info

FACTS: dict[str, Any] = {
    "filename": "/d/x.vmdk",
    "format": "vmdk",
    "virtual-size": 10485760,
    "actual-size": 512,
    "format-specific": {
        "type": "vmdk",
        "data": {
            "create-type": "monolithicSparse",
            "cid": 0xFFFFFFFE,
            "extents": [{"filename": "a\x1b.vmdk", "virtual-size": 4096}, {"format": "ZERO"}],
        },
    },
    "encrypted": False,
    "geometry": {"cylinders": 20, "heads": 16, "sectors": 63},
    "chain": [{"filename": "x.vmdk", "cid": 1, "agrees": False}, {"filename": "p.vmdk", "cid": 2}],
    "warnings": ["x.vmdk: odd"],
}


def test_info_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = info_is(monkeypatch, FACTS)
    assert main(["info", "--ignore-cid", "x.vmdk"]) == 0
    assert calls[0][1]["ignore_cid"] is True
    said, warned = capsys.readouterr()
    assert warned == "warning: x.vmdk: odd\n"
    assert said == (
        "file          /d/x.vmdk\n"
        "format        vmdk\n"
        "virtual size  10 MiB (10485760 bytes)\n"
        "actual size   512 B\n"
        "kind          monolithicSparse\n"
        "cid           fffffffe\n"
        "encrypted     no\n"
        "geometry      20 cylinders, 16 heads, 63 sectors\n"
        "\n"
        "extents\n"
        "     virtual size  format  file\n"
        "  0  4 KiB         -       a\\x1b.vmdk\n"
        "  1  -             ZERO    -\n"
        "\n"
        "chain\n"
        "     cid       agrees  file\n"
        "  0  00000001  no      x.vmdk\n"
        "  1  00000002  -       p.vmdk\n"
    )


def test_tools_that_nobody_has_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for version, told in (("2147483647", "unknown"), ("10338", "10338")):
        info_is(monkeypatch, {"filename": "x.vmdk", "format": "vmdk", "tools-version": version})
        assert main(["info", "x.vmdk"]) == 0
        assert f"tools version  {told}\n" in capsys.readouterr().out


def test_info_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    info_is(monkeypatch, FACTS)
    assert main(["info", "--json", "x.vmdk"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": 1, **FACTS}


@pytest.mark.parametrize(
    ("error", "recognised", "code"),
    [
        (BadField("x.vmdk", field="grain size", value=3, why="no power of two"), True, 3),
        (ParentNotFound("x.vmdk", parent="p.vmdk", cid="12345678"), True, 3),
        (NotVmdk("x.vmdk", what="it is a PNG"), False, 1),
        (InUse("x.vmdk", how="busy"), True, 5),
    ],
)
def test_info_of_what_does_not_open(
    error: Any,
    recognised: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    facts = {"filename": "x.vmdk", "error": error.as_dict()} | ({"format": "vmdk"} if recognised else {})
    info_is(monkeypatch, facts)
    assert main(["info", "x.vmdk"]) == code
    said = capsys.readouterr()
    assert said.out.startswith("file") == recognised  # a name alone is no answer
    assert said.err.startswith(f"error: {error}")
    assert main(["info", "--json", "x.vmdk"]) == code
    assert json.loads(capsys.readouterr().out)["error"]["error"] == error.slug


def test_info_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    info_is(monkeypatch, FACTS)
    monkeypatch.setattr(output, "colourful", lambda _stream: True)
    assert main(["info", "x.vmdk"]) == 0
    said = capsys.readouterr().out
    assert "10 MiB (10485760 bytes)" in said
    assert "\x1b.vmdk" not in said


# serve: a real process, with a small plugin in the place of ours

PLUGIN = """
import os, sys, time
API_VERSION = 2
mark = None
openfile = open
def config(key, value):
    global mark
    if key == "file": mark = value + ".closed"
    print("warning: twice told", file=sys.stderr)
def open(readonly): return 1
def get_size(h): return 1048576
def can_write(h): return True
def pread(h, buf, offset, flags): buf[:] = bytes(len(buf))
def pwrite(h, buf, offset, flags): pass
def cleanup():
    time.sleep(0.2)
    openfile(mark, "w").write("clean")
"""


class Served:
    """A `serve` that runs, to be asked, signalled and waited for."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def uri(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    file = tmp_path / "launcher.py"
    file.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from nbd_vmdk.serving import server
        from nbd_vmdk.cli import main
        from nbd_vmdk.errors import FileMissing
        def check(paths, *_):
            if "gone" in paths[0]:
                raise FileMissing(paths[0], doing="open", why="no such file")
            return server.Checked(("twice told",))
        server._check = check
        server.plugin_path = lambda: {str(plugin)!r}
        sys.exit(main())
        """)
    )
    return file


@pytest.fixture
def serving(launcher: Path, tmp_path: Path) -> Iterator[Any]:
    processes: list[subprocess.Popen[str]] = []

    def start(*options: str, **popen: Any) -> Served:
        popen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | popen
        line = [sys.executable, str(launcher), "serve", *options, str(tmp_path / "x.vmdk")]
        processes.append(subprocess.Popen(line, **popen))
        return Served(processes[-1])

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def closed(tmp_path: Path) -> bool:
    return (tmp_path / "x.vmdk.closed").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)])
def test_serve_until_a_signal(serving: Any, tmp_path: Path, number: signal.Signals, code: int) -> None:
    served = serving()
    uri = served.uri()
    socket = uri.removeprefix("nbd+unix:///?socket=")
    assert os.path.exists(socket)
    size = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, check=True)
    assert size.stdout == "1048576\n"
    served.process.send_signal(number)
    assert served.end() == (code, "", "warning: twice told\n")
    assert closed(tmp_path)
    assert not os.path.exists(os.path.dirname(socket))


def test_impatience_does_not_spoil_the_close(serving: Any, tmp_path: Path) -> None:
    served = serving()
    served.uri()
    served.process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    served.process.send_signal(signal.SIGINT)
    code, _, err = served.end()
    assert code == 130
    assert "note: the image is being closed, please wait" in err
    assert closed(tmp_path)


def test_serve_json_and_pidfile_and_port(serving: Any, tmp_path: Path) -> None:
    served = serving(
        "--json", "-r", "--port", "0", "--pidfile", str(tmp_path / "pid"), stderr=subprocess.DEVNULL
    )
    assert served.process.stdout is not None
    text = ""
    while not text.endswith("\n}\n"):
        text += served.process.stdout.readline()
    answer = json.loads(text)
    assert answer["schema"] == 1
    assert answer["warnings"] == ["twice told"]
    (export,) = answer["exports"]
    assert {key: export[key] for key in ("name", "size", "read-only")} == {
        "name": "",
        "size": 1048576,
        "read-only": True,
    }
    assert export["uri"].startswith("nbd://127.0.0.1:")
    pid = int((tmp_path / "pid").read_text())
    assert pid == answer["pid"]
    # To end the server by its pidfile is to end it in order.
    os.kill(pid, signal.SIGTERM)
    assert served.end()[0] == 0
    assert not (tmp_path / "pid").exists()


def test_the_death_of_nbdkit_is_an_error(serving: Any, tmp_path: Path) -> None:
    served = serving("--no-restart", "--pidfile", str(tmp_path / "pid"))
    served.uri()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    code, _, err = served.end()
    assert code == 1
    assert err.splitlines()[-1] == "error: nbdkit ended unasked: it was killed by SIGKILL"


def test_serve_on_a_socket_in_use(serving: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "s k")
    first = serving("--socket", path)
    assert first.uri() == f"nbd+unix:///?socket={path.replace(' ', '%20')}"
    code, out, err = serving("--socket", path).end()
    assert (code, out) == (5, "")
    assert f"error: {path}: in use by another process (a server answers there)" in err
    first.process.kill()
    first.process.wait()
    # The dead one's socket is in nobody's way.
    deadline = time.monotonic() + 10
    while (
        time.monotonic() < deadline
        and subprocess.run(
            ["nbdinfo", f"nbd+unix:///?socket={path}"], capture_output=True, check=False
        ).returncode
        == 0
    ):
        time.sleep(0.05)
    third = serving("--socket", path)
    assert third.uri().endswith("s%20k")
    third.process.terminate()
    assert third.end()[0] == 0
    assert not os.path.exists(path)


def test_serve_warns_who_opens_the_door(serving: Any) -> None:
    served = serving("--port", "0", "--bind", "0.0.0.0", "--insecure")
    assert served.uri().startswith("nbd://localhost:")
    served.process.terminate()
    assert "warning: anyone who can reach 0.0.0.0 port" in served.end()[2]


def test_run_passes_the_code_on(serving: Any, tmp_path: Path) -> None:
    code, out, err = serving("--run", 'nbdinfo --size "$uri"; test -S "$unixsocket" || exit 9; exit 7').end()
    assert (code, out) == (7, "1048576\n")
    assert err == "warning: twice told\n"
    assert closed(tmp_path)
    assert serving("--run", "true").end()[0] == 0
    assert serving("--run", "kill -9 $$").end()[0] == 137
    assert serving("--run", "no-such-command-here").end()[0] == 127
    assert serving("--port", "0", "--run", 'test "$uri" = "nbd://127.0.0.1:$port"').end()[0] == 0


def test_run_gets_our_input(serving: Any) -> None:
    served = serving("--run", "cat", stdin=subprocess.PIPE)
    out, _ = served.process.communicate("hello", timeout=30)
    assert (served.process.returncode, out) == (0, "hello")


def test_signals_are_for_the_command(serving: Any, tmp_path: Path) -> None:
    served = serving("--run", "trap 'echo told; exit 5' TERM; echo ready; while :; do sleep 0.05; done")
    assert served.uri() == "ready"
    served.process.terminate()
    assert served.end()[:2] == (5, "told\n")
    assert closed(tmp_path)
    served = serving("--run", "echo ready; exec sleep 60")
    assert served.uri() == "ready"
    served.process.send_signal(signal.SIGINT)
    assert served.end()[0] == 130


def test_a_fault_is_told_before_anything_starts(launcher: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(launcher), "serve", "gone.vmdk"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: gone.vmdk: no such file\nhint: ")


class Terminal:
    """A program on a real terminal, as its foreground job."""

    def __init__(self, *line: str) -> None:
        self.ours, theirs = pty.openpty()
        environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {
            "TERM": "xterm"
        }
        self.program = subprocess.Popen(
            ["setsid", "--ctty", *line], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        )
        os.close(theirs)

    def until(self, text: bytes) -> bytes:
        """What is shown, up to and with a text; or all there is until the program ends."""
        seen = b""
        while text not in seen:
            try:
                more = os.read(self.ours, 4096)
            except OSError:  # Linux's way to say that the other side has closed
                break
            seen += more
        return seen

    def press(self, key: bytes) -> None:
        os.write(self.ours, key)

    def end(self) -> tuple[int, bytes]:
        seen = self.until(b"\0 never shown")
        code = self.program.wait(30)
        os.close(self.ours)
        return code, seen


def test_on_a_terminal_ctrl_c_ends_it(launcher: Path, tmp_path: Path) -> None:
    """Colour, the note that tells how to end, and Ctrl-C as it is typed."""
    terminal = Terminal(sys.executable, str(launcher), "serve", str(tmp_path / "x.vmdk"))
    seen = terminal.until(b"Ctrl-C ends it")
    assert b"\x1b[33m" in seen
    assert b"nbd+unix:///?socket=" in seen
    terminal.press(b"\x03")
    assert terminal.end()[0] == 130
    assert closed(tmp_path)


def test_on_a_terminal_the_command_gets_ctrl_c_once(launcher: Path, tmp_path: Path) -> None:
    command = "trap 'n=$((n+1)); echo count=$n' INT; echo ready; sleep 1; sleep 1; echo total=$n"
    terminal = Terminal(sys.executable, str(launcher), "serve", "--run", command, str(tmp_path / "x.vmdk"))
    terminal.until(b"ready")
    terminal.press(b"\x03")
    code, seen = terminal.end()
    assert b"total=1" in seen
    assert code == 0
    assert closed(tmp_path)


# the whole of it, on an image of QEMU's


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A sparse image of 20 MiB with something in it."""
    raw, made = tmp_path / "disk.raw", tmp_path / "disk.vmdk"
    with open(raw, "wb") as file:
        file.truncate(20 << 20)
        file.seek(3 << 20)
        file.write(os.urandom(300_000))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vmdk", raw, made], check=True)
    return made


def vmdk(*line: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one command line and return what it gave."""
    command = [sys.executable, "-m", "nbd_vmdk", *map(str, line)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_ctrl_c_is_no_error_of_make(disk: Path) -> None:
    python = os.path.dirname(sys.executable)
    terminal = Terminal(
        "make", "-C", str(ROOT), "-o", ".venv/.ready", f"BIN={python}", "serve", f"IMAGE={disk}"
    )
    terminal.until(b"Ctrl-C ends it")
    terminal.press(b"\x03")
    _code, seen = terminal.end()
    assert b"***" not in seen
    assert b"Error" not in seen


def qemu_json(*line: object) -> Any:
    return json.loads(subprocess.run(["qemu-img", *map(str, line)], capture_output=True, check=True).stdout)


def test_what_is_written_is_there_afterwards(disk: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.raw"
    new.write_bytes(os.urandom(20 << 20))
    done = vmdk("serve", "--run", f'nbdcopy "{new}" "$uri"', disk)
    assert (done.returncode, done.stderr) == (0, "")
    subprocess.run(["qemu-img", "check", disk], check=True, capture_output=True)
    subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "vmdk", new, disk], check=True, capture_output=True
    )


def test_read_only_is_read_only(disk: Path, tmp_path: Path) -> None:
    before = disk.read_bytes()
    done = vmdk(
        "serve", "-r", "--run", 'nbdcopy --allocated /dev/zero "$uri"; nbdinfo --is readonly "$uri"', disk
    )
    assert done.returncode == 0
    assert disk.read_bytes() == before


def test_map_agrees_with_qemu_img(disk: Path) -> None:
    ours = json.loads(vmdk("map", "--json", disk).stdout)
    theirs = qemu_json("map", "--output=json", disk)
    keys = ("start", "length", "zero", "data", "offset")
    assert [[row.get(key) for key in keys] for row in ours] == [
        [row.get(key) for key in keys] for row in theirs
    ]
    text = vmdk("map", disk).stdout.splitlines()
    assert len(text) == len(ours) + 1


def test_info_agrees_with_qemu_img(disk: Path) -> None:
    ours = json.loads(vmdk("info", "--json", disk).stdout)
    theirs = qemu_json("info", "--output=json", disk)
    for key in ("virtual-size", "actual-size", "filename", "format", "cluster-size", "dirty-flag"):
        assert ours[key] == theirs[key], key
    assert ours["format-specific"]["data"]["create-type"] == "monolithicSparse"


def test_what_is_served_is_in_use(disk: Path) -> None:
    inner = f'"{sys.executable}" -m nbd_vmdk serve --run true "{disk}"'
    done = vmdk("serve", "--run", inner, disk)
    assert done.returncode == 5
    assert f"error: {disk}: in use by another process" in done.stderr
    # Looking is allowed all the same.
    for verb in ("info", "map"):
        done = vmdk("serve", "--run", f'"{sys.executable}" -m nbd_vmdk {verb} "{disk}"', disk)
        assert done.returncode == 0, done.stderr


def test_what_can_not_be_opened(tmp_path: Path) -> None:
    picture = tmp_path / "picture.vmdk"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    (tmp_path / "empty").mkdir()
    for verb in ("serve", "info", "map"):
        for file in (picture, tmp_path / "gone.vmdk", tmp_path / "empty"):
            done = vmdk(verb, file)
            assert done.returncode == 1, (verb, file)
            assert done.stderr.startswith(f"error: {file}: ")
            assert "Traceback" not in done.stderr
            answer = json.loads(vmdk(verb, "--json", file).stdout)
            assert answer["schema"] == 1
            assert str(file) in (answer["error"]["file"] or answer["error"]["message"])


def test_a_kind_that_can_not_be_written_says_so(disk: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.vmdk"
    convert = ["qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", str(disk), str(packed)]
    subprocess.run(convert, check=True)
    done = vmdk("serve", "--run", 'nbdinfo --is readonly "$uri"', packed)
    assert done.returncode == 0
    assert done.stderr.startswith(f"warning: {packed}: ")
    assert "read-only" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    quiet = vmdk("serve", "-r", "--run", "true", packed)
    assert (quiet.returncode, quiet.stderr) == (0, "")


@pytest.mark.parametrize(
    "line", [["info"], ["delete"], ["compare", "x.vmdk"], ["create", "c.vmdk", "--parent"]]
)
def test_a_file_is_no_folder(line: list[str], disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*line, f"{disk}//"]) == 2
    told = capsys.readouterr().err
    assert told == f"error: {disk}//: is a file, and no folder\nhint: without the slash at its end: {disk}\n"
    assert disk.exists()
    disk.with_suffix(".raw").unlink()
    assert main(["info", f"{disk.parent}/"]) == 0


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["serve", "--port", "abc", "x.vmdk"], "'--port': 'abc' is not a valid number"),
        (["convert", "--threads", "65", "x.vmdk", "y.vmdk"], "'--threads': 65 is not in the range 1<=x<=64"),
        (["snapshot", "nothing"], "No such command 'nothing'"),
        (["snapshot", __file__], "it is not said what to do with"),
        (["mount", "http://host/x.vmdk", "."], "http://host/x.vmdk: a URL, and no file"),
        (["mount", "x.vmdk", ""], "'' is no file name"),
        (["map", "--html", "", "x.vmdk"], "'' is no file name"),
        (["read", "--output", "", "x.vmdk"], "'' is no file name"),
        (["write", "--input", "", "x.vmdk"], "'' is no file name"),
        (["convert", "x.vmdk", ""], "'' is no file name"),
    ],
)
def test_wrong_words(line: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert told in error
    assert hint.startswith("hint: ")


def test_what_is_odd_about_a_file_is_told_once(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verbs that open a file more than once: two chains with one parent, a plan before the work."""
    child, other = tmp_path / "child.vmdk", tmp_path / "other.vmdk"
    for each in (child, other):
        assert main(["snapshot", "create", str(disk), str(each)]) == 0
    with open(disk, "r+b") as file:
        file.seek(72)  # uncleanShutdown
        file.write(b"\1")
    (tmp_path / "vm.vmx").write_text('scsi0:0.present = "TRUE"\nscsi0:0.fileName = "C:\\vms\\child.vmdk"\n')
    unclean = f"warning: {disk}: it was not closed cleanly the last time it was written"
    beside = f"warning: {tmp_path}/vm.vmx: child.vmdk beside it is taken for C:\\vms\\child.vmdk"
    for line, told in (
        (["compare", child, other], unclean),
        (["snapshot", "commit", "--break-children", tmp_path / "vm.vmx"], beside),
    ):
        capsys.readouterr()
        assert main([str(word) for word in line]) == 0
        assert capsys.readouterr().err.splitlines().count(told) == 1


def test_what_happens_to_a_server_is_told_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    server = output.log.getChild("serving.server")
    with output.Messages():
        for log in (output.log, output.log, server, server):
            log.warning("nbdkit was started again")
    assert capsys.readouterr().err == "warning: nbdkit was started again\n" * 3
    with output.Messages():  # of the next command line in this process
        output.log.warning("nbdkit was started again")
    assert capsys.readouterr().err == "warning: nbdkit was started again\n"
