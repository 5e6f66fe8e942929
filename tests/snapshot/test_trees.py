"""
Random trees of links and random work on them: every link goes on showing what it should.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbd_vmdk import open_disk
from nbd_vmdk.errors import ChainError, WriteRefused
from nbd_vmdk.ops.resize import resize
from nbd_vmdk.ops.snapshot.commit import commit
from nbd_vmdk.ops.snapshot.delete import delete_link
from nbd_vmdk.ops.snapshot.rebase import rebase
from nbd_vmdk.units import KIB, SECTOR
from tests.snapshot import make_base, make_child, names_in, scribble, shows

SIZE = 200 * KIB + 512

BASES = st.sampled_from(["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "vmfs"])
CHILDREN = st.sampled_from([None, "twoGbMaxExtentSparse", "vmfsSparse"])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["child", "child", "write", "commit", "rebase", "flatten", "delete", "grow"]),
        st.integers(0, 99),
        st.integers(0, 99),
        CHILDREN,
    ),
    min_size=4,
    max_size=14,
)


class Tree:
    """A folder of links with what each shows, and on which it stands."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        base = make_base(folder, kind, size=SIZE)
        scribble(base, 1, pieces=5)
        self.content = {base: shows(base)}
        self.parent: dict[Path, Path | None] = {base: None}

    def children(self, link: Path) -> list[Path]:
        return [child for child, parent in self.parent.items() if parent == link]

    def below(self, link: Path) -> set[Path]:
        found = {link}
        for child in self.children(link):
            found |= self.below(child)
        return found

    def above(self, link: Path) -> list[Path]:
        parent = self.parent[link]
        return [] if parent is None else [parent, *self.above(parent)]

    def size(self, link: Path) -> int:
        return len(self.content[link])

    def child(self, link: Path, seed: int, kind: str | None) -> None:
        made = make_child(link, kind=kind)
        scribble(made, seed, pieces=4)
        self.parent[made] = link
        self.content[made] = shows(made)

    def write(self, link: Path, seed: int, _kind: str | None) -> None:
        if not self.children(link):
            scribble(link, seed, pieces=3)
            self.content[link] = shows(link)

    def grow(self, link: Path, seed: int, _kind: str | None) -> None:
        if not self.children(link):
            resize(link, by=seed * 5 * SECTOR)
            scribble(link, seed, pieces=3)
            shown = shows(link)
            assert len(shown) == self.size(link) + seed * 5 * SECTOR
            self.content[link] = shown

    def commit(self, link: Path, _other: int, _kind: str | None) -> None:
        parent = self.parent[link]
        try:
            commit(link)
        except WriteRefused:
            assert parent is None or len(self.children(parent)) > 1
            return
        assert parent is not None
        self.content[parent] = self.content.pop(link)
        for child in self.children(link):
            self.parent[child] = parent
        del self.parent[link]

    def rebase(self, link: Path, other: int, _kind: str | None) -> None:
        others = sorted(self.content.keys() - self.below(link))
        if not others:
            return
        parent = others[other % len(others)]
        fits = self.size(link) == self.size(parent) or (
            self.size(link) > self.size(parent)
            and self.size(link) > min((self.size(each) for each in self.above(link)), default=self.size(link))
        )
        try:
            rebase(link, parent)
        except ChainError:
            assert not fits
        except WriteRefused:
            with open_disk(link) as disk:
                assert disk.links[0].create_type in ("monolithicFlat", "vmfs")
        else:
            assert fits
            self.parent[link] = parent

    def flatten(self, link: Path, _other: int, _kind: str | None) -> None:
        rebase(link, None)
        self.parent[link] = None

    def delete(self, link: Path, _other: int, _kind: str | None) -> None:
        try:
            delete_link(link, apply=True)
        except WriteRefused:
            assert self.parent[link] is None
            assert self.children(link)
            return
        for child in self.children(link):
            self.parent[child] = self.parent[link]
        del self.parent[link], self.content[link]

    def is_right(self) -> None:
        assert {link: shows(link) for link in self.content} == self.content
        for link, parent in self.parent.items():
            with open_disk(link) as disk:
                chain = [Path(each.name) for each in disk.links]
            assert chain[1:2] == ([parent] if parent else [])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=BASES, steps=STEPS)
def test_every_link_goes_on_showing_what_it_should(
    quick_path: Path, kind: str, steps: list[tuple[str, int, int, str | None]]
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="tree-", dir=quick_path))
    try:
        tree = Tree(folder, kind)
        for name, which, seed, child_kind in steps:
            if not tree.content:
                break
            link = sorted(tree.content)[which % len(tree.content)]
            getattr(tree, name)(link, seed, child_kind)
        tree.is_right()
        assert not any(name.startswith(".") or "merging" in name for name in names_in(folder))
    finally:
        shutil.rmtree(folder)
