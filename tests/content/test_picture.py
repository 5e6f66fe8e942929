"""The picture of a disk: numbers that are right, and a page that no hostile name can get at."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pty
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_vmdk import open_disk
from nbd_vmdk.extents.base import Kind
from nbd_vmdk.ops.picture.bins import Bins, bin_width
from nbd_vmdk.ops.picture.page import page
from nbd_vmdk.ops.picture.strips import heights, outlines
from nbd_vmdk.ops.picture.survey import survey
from tests.content import GRAIN, KINDS, MIB, ROOT, SECTOR, Content, answer, command
from tests.images import desc


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 999), st.integers(1, 999)), max_size=8))
def test_bins_count_right(width: int, ranges: list[tuple[int, int]]) -> None:
    count = -(-2000 // width)
    bins = Bins(width, count)
    wanted = [0] * count
    for offset, length in ranges:
        bins.add(offset, length)
        for at in range(offset, offset + length):
            wanted[at // width] += 1
    assert bins.counts() == wanted
    assert bins.total == sum(wanted)


def test_bins_are_few_and_whole() -> None:
    for size in (SECTOR, MIB, 20 << 30, 64 << 40):
        width = bin_width(size, 1024)
        assert width & (width - 1) == 0
        assert width == SECTOR or size / width > 512
        assert size / width <= 1024


@given(st.lists(st.lists(st.integers(0, 100), min_size=7, max_size=7), min_size=1, max_size=4))
def test_outlines_cover_just_what_they_should(parts: list[list[int]]) -> None:
    """The area inside each path is the sum of its heights."""
    scaled = [[value // len(parts) for value in row] for row in parts]
    rows = heights(scaled, 100, 700)
    for row, path in zip(rows, outlines(rows, 100), strict=True):
        assert abs(_area(path) - 100 * sum(row)) < 0.5
    assert all(sum(column) <= 1.0001 for column in zip(*rows, strict=True))
    assert all((value > 0) == (share > 0) for each, row in zip(scaled, rows, strict=True)
               for value, share in zip(each, row, strict=True))  # fmt: skip


def _area(path: str) -> float:
    """The area of closed outlines of level and upright lines, by the shoelace formula."""
    area = 0.0
    points: list[tuple[float, float]] = []
    for letter, numbers in re.findall(r"([MHVz])([-\d. ]*)", path):
        if letter == "z":
            pairs = zip(points, points[1:] + points[:1], strict=True)
            area += abs(sum(x * y2 - x2 * y for (x, y), (x2, y2) in pairs)) / 2
            points = []
        elif letter == "M":
            x, y = map(float, numbers.split())
            points.append((x, y))
        elif letter == "H":
            points.append((float(numbers), points[-1][1]))
        else:
            points.append((points[-1][0], float(numbers)))
    return area


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from([300, 512, 700]))
def test_the_survey_agrees_with_the_runs(seed: int, sectors: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        base = desc.monolithic_flat(folder, "base", Content.random(sectors * SECTOR, seed))
        top = desc.split_sparse(
            folder,
            "top",
            Content.random(600 * SECTOR, seed + 1, density=0.3),
            extent_sectors=256,
            parent=base,
        )
        with open_disk(top.path) as disk:
            found = survey(disk, 16 * SECTOR)
            bins: dict[object, list[int]] = {}
            for run in disk.runs():
                key = (run.kind, run.depth)
                for at in range(run.offset, run.offset + run.length, SECTOR):
                    bins.setdefault(key, [0] * found.count)[at // found.width] += SECTOR
            nothing = [0] * found.count
            for depth, link in enumerate(found.links):
                assert link.seen.counts() == bins.get((Kind.DATA, depth), nothing)
                assert link.seen_zero.counts() == bins.get((Kind.ZERO, depth), nothing)
                kinds = [(mapping[0], mapping[1]) for mapping in link.link.runs(0, link.link.size)]
                assert link.held.total == sum(length for kind, length in kinds if kind is Kind.DATA)
                assert all(
                    held >= seen for held, seen in zip(link.held.counts(), link.seen.counts(), strict=True)
                )
            assert found.hole.counts() == bins.get((Kind.HOLE, None), nothing)
            assert found.links[0].held.total == found.links[0].seen.total


def test_order_in_the_file(tmp_path: Path) -> None:
    """Data written backwards is in as many pieces as there are grains, each before the last."""
    path = str(tmp_path / "x.vmdk")
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", path, "4M"], check=True)
    words = [word for grain in (9, 7, 6, 5) for word in ("-c", f"write -P 1 {grain * 64}k 64k")]
    subprocess.run(["qemu-io", *words, path], check=True, stdout=subprocess.DEVNULL)
    with open_disk(path) as disk:
        link = survey(disk, GRAIN).links[0]
        starts = {run.offset // GRAIN: run.at for run in disk.runs() if run.kind is Kind.DATA}
    assert len(starts) == 4
    assert (link.pieces, link.backwards) == (4, 3)
    assert {index: at for index, at in enumerate(link.places) if at is not None} == starts


# the page


class _Page(HTMLParser):
    """What a browser would make of a page: elements, attributes, scripts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.values: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.policy = ""
        self._in: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.values += [value or "" for _, value in attrs]
        facts = dict(attrs)
        if "http-equiv" in facts:
            self.policy = facts["content"] or ""
        if tag not in ("meta", "rect", "path"):
            self._in.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._in and self._in[-1] == tag:
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in:
            self.text.setdefault(self._in[-1], []).append(data)


_TAGS = set(
    """html head meta title style body main header h1 h2 h3 p dl div dt dd small section svg path rect ul li
    span code b details summary table tr th td script footer""".split()  # noqa: SIM905
)
_ATTRIBUTES = set(
    """lang charset http-equiv content name class viewbox width height rx x d role aria-label aria-hidden
    tabindex preserveaspectratio data-strip id type hidden""".split()  # noqa: SIM905
)

HOSTILE = [
    "<script>alert(1)<&script>",
    "'\"><img src=x onerror=alert(1)>",
    "a' onmouseover='alert(1)",
    "&lt;b&gt; --> ]]> {{7*7}} ${7}",
    "\u202emdp.exe \x1b[31m \u2028 \x07",
]


def parsed(text: str) -> _Page:
    found = _Page()
    found.feed(text)
    found.close()
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_only_text(tmp_path: Path, name: str) -> None:
    plain = desc.monolithic_sparse(str(tmp_path), "base", Content.random(MIB, 1))
    base = str(tmp_path / f"{name}.vmdk")
    os.rename(plain.path, base)
    plain.path = base
    top = desc.monolithic_sparse(
        str(tmp_path), "top", Content.random(MIB, 2), create_type="custom", extent_name="top.vmdk",
        text={"parent_cid": plain.cid},
    )  # fmt: skip
    named = str(tmp_path / f"top {name}.vmdk")
    os.rename(top.path, named)
    with open_disk(named, parent=base) as disk:
        text = page(disk, made=name)
    found = parsed(text)
    assert found.tags <= _TAGS
    assert found.attributes <= _ATTRIBUTES
    scripts = found.text["script"]
    assert len(scripts) == 2
    assert not re.search("[<>&]", scripts[0])
    facts = json.loads(scripts[0])
    assert any("vmdk" in row["name"] for row in facts["strips"][0]["rows"])
    for source, word in ((scripts[1], "script-src"), (found.text["style"][0], "style-src")):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{word} 'sha256-{digest}'" in found.policy
    assert found.policy.startswith("default-src 'none'")
    shown = "".join(found.text["h1"])
    if name.isprintable():
        assert shown == f"top {name}.vmdk"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u2028\u202e]", text)


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    with open_disk(KINDS["split"](str(tmp_path), "x", Content.random(MIB, 1))) as disk:
        text = page(disk)
    for word in ("http:", "https:", "src=", "href=", "url(", "@import", "//"):
        assert word not in text.replace("http://www.w3.org/2000/svg", "").replace("// Tells", ""), word


def test_a_huge_disk_makes_a_small_page(tmp_path: Path) -> None:
    content = Content(2000 << 30).put(1000 << 30, b"x").put((2000 << 30) - 1, b"y")
    with open_disk(KINDS["sparse"](str(tmp_path), "x", content)) as disk:
        text = page(disk)
    assert len(text) < 60_000
    assert "1.95 TiB" in text


def test_a_parent_that_is_much_larger_takes_no_memory(tmp_path: Path) -> None:
    """The size of a parent is as untrusted as its name."""
    base = desc.se_sparse(str(tmp_path), "base", Content(64 << 40))
    top = desc.monolithic_sparse(str(tmp_path), "top", Content(MIB).put(0, b"x"), parent=base)
    with open_disk(top.path) as disk:
        assert len(page(disk)) < 100_000
    assert "1 base.vmdk" in _on_terminal(top.path, 40)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"raw"}))
def test_every_kind_has_a_picture(tmp_path: Path, kind: str) -> None:
    with open_disk(KINDS[kind](str(tmp_path), "x", Content.random(2 * MIB, 3))) as disk:
        found = parsed(page(disk))
    assert found.tags <= _TAGS
    assert any(value for value in found.values if value.startswith("M"))


def test_the_command_writes_a_whole_page_or_none(tmp_path: Path) -> None:
    path = KINDS["sparse"](str(tmp_path), "x", Content.random(MIB, 1))
    made = tmp_path / "map.html"
    made.write_text("<!DOCTYPE html> by somebody else")
    assert command("map", "--html", made, path).returncode == 1
    made.unlink()
    os.mkfifo(made)
    assert command("map", "--html", made, path).returncode == 1  # at once: nobody writes to it
    made.unlink()
    for _ in range(2):
        assert command("map", "--html", made, path).returncode == 0
    first = made.read_text()
    assert first.startswith("<!DOCTYPE html>")
    assert first.endswith("</html>\n")
    assert answer(command("map", "--json", "--html", made, path))["html"] == str(made)
    assert command("map", "--html", tmp_path / "none" / "map.html", path).returncode == 1
    assert command("map", "--html", made, tmp_path / "none.vmdk").returncode == 1
    assert command("map", "--html", path, path).returncode == 1  # an image is never replaced
    assert command("map", path).returncode == 0
    assert made.read_text()[:15] == "<!DOCTYPE html>"
    assert sorted(os.listdir(tmp_path)) == ["map.html", "x.vmdk"]


# the strip


def _on_terminal(path: str, columns: int, **env: str) -> str:
    """What `map` shows on a terminal of that width."""
    import fcntl
    import struct
    import termios

    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
    words = [sys.executable, "-m", "nbd_vmdk", "map", path]
    with subprocess.Popen(
        words, stdout=terminal, stderr=subprocess.DEVNULL, cwd=ROOT, env=clean | {"TERM": "xterm"} | env
    ) as running:
        os.close(terminal)
        shown = b""
        try:
            while piece := os.read(controller, 65536):
                shown += piece
        except OSError:  # the terminal's other end is gone
            pass
        assert running.wait() == 0
    os.close(controller)
    return shown.decode()


def test_the_strip_shows_who_holds_what(tmp_path: Path) -> None:
    base = desc.monolithic_sparse(str(tmp_path), "base", Content(40 * GRAIN).put(0, b"b" * 20 * GRAIN))
    top = desc.monolithic_sparse(
        str(tmp_path), "top", Content(40 * GRAIN).put(10 * GRAIN, b"t" * 20 * GRAIN), parent=base
    )
    plain = _on_terminal(top.path, 40, NO_COLOR="1").replace("\r", "").splitlines()
    assert plain[0] == "1" * 10 + "0" * 20 + "." * 10
    assert plain[1] == "0" + " " * 32 + "2.5 MiB"
    assert plain[2:5] == [
        "0 0 top.vmdk  1.25 MiB, 50%",
        "1 1 base.vmdk  640 KiB, 25%",
        ". holes  640 KiB, 25%",
    ]
    assert plain[6].split() == ["start", "length", "kind", "link", "offset", "file"]
    coloured = _on_terminal(top.path, 40, LANG="C.UTF-8", PYTHONIOENCODING="utf-8").splitlines()[0]
    bare = re.sub("\x1b\\[[0-9;]*m", "", coloured).rstrip("\r")
    assert bare == "█" * 30 + " " * 10
    assert len(set(re.findall("\x1b\\[0;(\\d+)", coloured))) == 2
    assert "█" not in _on_terminal(top.path, 40, PYTHONIOENCODING="ascii")
    assert not command("map", top.path).stdout.startswith((b"1", b"\x1b"))
