"""The images that are served, made on first use and kept for the next run.

What qemu-img can make, it makes.  The rest comes from the builders of the tests, which are written from the
format's description and share no code with the engine.  Images that hold data hold 512 MiB of noise or, for
one of the compressed ones, of text; a raw file with the same bytes is the twin of them all.

512 MiB is eight times the default cache of inflated grains, and small enough that image and twin stay in
the page cache of a small machine.  COWD, seSparse and what is overwritten hold 128 MiB: their builders go
grain by grain, and copies of them are made often.
"""

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from nbd_vmdk.units import GIB, KIB, MIB, SECTOR, TIB
from tests.images import desc, hosted
from tests.images.content import Content, Part, Segment

#: Goes up when what a builder makes changes, so that images of an older one are made anew.
_EDITION = 1

SIZE = 512 * MIB
SMALL = 128 * MIB
_GRAIN = 64 * KIB
_GTES = 512

#: Words a text image is made of; with so many deflate at level 6 makes a third of it.
_WORDS = 600


@dataclass(frozen=True)
class Image:
    """A made image: ``path`` is what one opens, ``raw`` its twin if it has one, ``size`` the disk's bytes."""

    folder: str
    path: str
    raw: str | None
    size: int

    @property
    def files(self) -> list[str]:
        """All files of the image, parents and extents with it."""
        return [entry.path for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name)]


class Images:
    """Images by name, in one folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._made: dict[str, Image] = {}

    def get(self, name: str) -> Image:
        """The image of that name, made if it is not there."""
        if name not in self._made:
            self._made[name] = self._get(name)
        return self._made[name]

    def _get(self, name: str) -> Image:
        maker, twin, size = _KINDS[name]
        raw = self.get(twin).path if twin else None
        folder = os.path.join(self._folder, f"{name}-{_EDITION}")
        path = os.path.join(folder, f"{name}.{'raw' if name.startswith('raw-') else 'vmdk'}")
        if not os.path.isdir(folder):
            unfinished = folder + ".new"
            shutil.rmtree(unfinished, ignore_errors=True)
            os.makedirs(unfinished)
            maker(unfinished, name, raw)
            os.rename(unfinished, folder)
        return Image(folder, path, raw, size)


# Data.


def _noise() -> Iterator[bytes]:
    rng = random.Random("noise")
    while True:
        yield rng.randbytes(MIB)


def _text() -> Iterator[bytes]:
    """Lines of words.  Grains are compressed one by one, so a page may come again in another grain."""
    rng = random.Random("text")
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9))) for _ in range(_WORDS)]
    weights = [1 / rank for rank in range(1, _WORDS + 1)]
    pages = [
        "".join(
            f"{rng.randrange(1 << 32)} {' '.join(rng.choices(words, weights, k=12))}\n" for _ in range(90)
        ).encode()[:4096]
        for _ in range(512)
    ]
    while True:
        yield b"".join(rng.choices(pages, k=MIB // 4096)).ljust(MIB, b" ")


def _raw(size: int, blocks: Callable[[], Iterator[bytes]] | None = None) -> "Maker":
    """A raw file of ``size`` bytes; without blocks it is all hole."""

    def make(folder: str, name: str, _raw: str | None) -> None:
        with open(os.path.join(folder, f"{name}.raw"), "wb") as file:
            if blocks is not None:
                file.writelines(islice(blocks(), size // MIB))
            file.truncate(size)

    return make


def _content(raw: str | None) -> Content:
    assert raw is not None
    with open(raw, "rb") as file:
        return Content.of(file.read())


# Makers.  Each leaves NAME.vmdk, and what belongs to it, in the folder.

Maker = Callable[[str, str, str | None], None]


def _qemu_img(*words: str) -> None:
    subprocess.run(["qemu-img", *words], check=True, stdout=subprocess.DEVNULL, timeout=600)


def _converted(subformat: str) -> Maker:
    def make(folder: str, name: str, raw: str | None) -> None:
        assert raw is not None
        target = os.path.join(folder, f"{name}.vmdk")
        _qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", "-W", raw, target)

    return make


def _created(size: int, subformat: str = "monolithicSparse") -> Maker:
    def make(folder: str, name: str, _raw: str | None) -> None:
        target = os.path.join(folder, f"{name}.vmdk")
        _qemu_img("create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", target, str(size))

    return make


def _split(folder: str, name: str, raw: str | None) -> None:
    """Four extents; VMware's 2 GiB ones would hold all the data in the first."""
    desc.split_sparse(folder, name, _content(raw), extent_sectors=SIZE // 4 // SECTOR)


def _cowd(folder: str, name: str, raw: str | None) -> None:
    desc.vmfs_sparse(folder, name, _content(raw))


def _sesparse(folder: str, name: str, raw: str | None) -> None:
    desc.se_sparse(folder, name, _content(raw))


def _chain(links: int) -> Maker:
    """Links that share the grains by lot, so that a read goes down half of the chain on average."""

    def make(folder: str, name: str, raw: str | None) -> None:
        data = _content(raw)
        rng = random.Random("owners")
        held: list[list[Segment]] = [[] for _ in range(links)]
        for start in range(0, SIZE, _GRAIN):
            grain = Segment(start, start + _GRAIN, Part.DATA, data.read(start, _GRAIN))
            held[rng.randrange(links)].append(grain)
        parent = None
        for number, segments in enumerate(held, 1):
            # The top link is the one that is opened.
            own = name if number == links else f"{name}-{number:02}"
            parent = desc.monolithic_sparse(folder, own, Content(SIZE, segments), parent=parent)

    return make


def _child(folder: str, name: str, raw: str | None) -> None:
    """An empty child of a full base, which it finds in its own folder."""
    _converted("monolithicSparse")(folder, "base", raw)
    path = os.path.join(folder, f"{name}.vmdk")
    _qemu_img("create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", "base.vmdk", path)


def _one_grain(size: int) -> Maker:
    """A sparse disk whose first grain alone is there."""

    def make(folder: str, name: str, _raw: str | None) -> None:
        first = random.Random("grain").randbytes(_GRAIN)
        desc.monolithic_sparse(folder, name, Content(size).put(0, first))

    return make


#: Of the fragmented disk: every 64th table has grains, every second grain of those is there.
_EVERY = 64


def _fragmented(folder: str, name: str, _raw: str | None) -> None:
    """A 2000 GiB disk in half a million pieces: the file's grains are holes, but the tables name them."""
    size = 2000 * GIB
    tables = range(0, size // (_GTES * _GRAIN), _EVERY)
    step = _GRAIN // SECTOR
    first = hosted.layout(size // SECTOR, step, _GTES, 21).overhead
    half = _GTES // 2

    def fill(_directory: list[int], copy: dict[int, list[int]]) -> None:
        for place, table in enumerate(tables):
            begin = first + place * half * step
            copy[table] = [0 if i % 2 else begin + i // 2 * step for i in range(_GTES)]

    desc.monolithic_sparse(folder, name, Content(size), edit_tables=fill, edit_redundant=fill)
    os.truncate(os.path.join(folder, f"{name}.vmdk"), (first + len(tables) * half * step) * SECTOR)


def _huge_sesparse(folder: str, name: str, _raw: str | None) -> None:
    desc.se_sparse(folder, name, Content(64 * TIB).put(0, random.Random("grain").randbytes(_GRAIN)))


#: What there is: its maker, its raw twin, and the disk's size.
_KINDS: dict[str, tuple[Maker, str | None, int]] = {
    "raw-noise": (_raw(SIZE, _noise), None, SIZE),
    "raw-noise-small": (_raw(SMALL, _noise), None, SMALL),
    "raw-text": (_raw(SIZE, _text), None, SIZE),
    "raw-empty-512m": (_raw(SIZE), None, SIZE),
    "raw-empty-16g": (_raw(16 * GIB), None, 16 * GIB),
    "flat": (_converted("monolithicFlat"), "raw-noise", SIZE),
    "sparse": (_converted("monolithicSparse"), "raw-noise", SIZE),
    "split": (_split, "raw-noise", SIZE),
    "stream-noise": (_converted("streamOptimized"), "raw-noise", SIZE),
    "stream-text": (_converted("streamOptimized"), "raw-text", SIZE),
    "cowd": (_cowd, "raw-noise-small", SMALL),
    "sesparse": (_sesparse, "raw-noise-small", SMALL),
    "chain8": (_chain(8), "raw-noise", SIZE),
    "chain32": (_chain(32), "raw-noise", SIZE),
    "full": (_converted("monolithicSparse"), "raw-noise-small", SMALL),
    "child": (_child, "raw-noise", SIZE),
    "empty-512m": (_created(SIZE), "raw-empty-512m", SIZE),
    "empty-16g": (_created(16 * GIB), "raw-empty-16g", 16 * GIB),
    "1g": (_one_grain(GIB), None, GIB),
    "2000g": (_one_grain(2000 * GIB), None, 2000 * GIB),
    "2000g-empty": (_created(2000 * GIB), None, 2000 * GIB),
    "2000g-files": (_created(2000 * GIB, "twoGbMaxExtentSparse"), None, 2000 * GIB),
    "2000g-fragmented": (_fragmented, None, 2000 * GIB),
    "64t-sesparse": (_huge_sesparse, None, 64 * TIB),
}
