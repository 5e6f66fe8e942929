"""New files appear together or not at all, and never in the place of others."""

import errno
import os
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from nbd_vmdk.errors import FileExists, FileMissing, InUse, StorageError, WriteRefused
from nbd_vmdk.storage import moving, newfiles
from nbd_vmdk.storage.local import LocalFile
from nbd_vmdk.storage.newfiles import NewFiles


def fill(new: NewFiles, **files: str) -> None:
    for stem, text in files.items():
        Path(new.path(f"{stem}.vmdk")).write_text(text)


def listing(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(params=["renameat2", "link", "neither"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a file system moves a file without replacing one."""
    if request.param != "renameat2":
        monkeypatch.setattr(moving, "_rename_noreplace", lambda *_: False)
    if request.param == "neither":

        def link(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", link)
    return request.param


def test_all_appear_and_nothing_else_stays(tmp_path: Path, way: str) -> None:
    with NewFiles(tmp_path / "disk.vmdk") as new:
        folder = Path(new.folder)
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
        fill(new, disk="text", flat="data")
        published = new.publish("disk.vmdk")
    assert published == (str(tmp_path / "flat.vmdk"), str(tmp_path / "disk.vmdk"))
    assert listing(tmp_path) == {"disk.vmdk": "text", "flat.vmdk": "data"}


def test_leaving_without_publish_removes_all(tmp_path: Path) -> None:
    with NewFiles(tmp_path / "disk.vmdk") as new:
        fill(new, disk="text")
    assert listing(tmp_path) == {}


def test_an_interrupt_removes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newfiles.NewFiles, "_sync_folder", interrupt)
    with NewFiles(tmp_path / "disk.vmdk") as new:
        fill(new, disk="text")
        with pytest.raises(KeyboardInterrupt):
            new.publish("disk.vmdk")
    assert listing(tmp_path) == {}


def test_relative_and_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain.vmdk", "with space ü.vmdk", "ü" * 125 + ".vmdk", "-x"):
        with NewFiles(name) as new:
            Path(new.path(name)).write_text(name)
            assert new.publish(name) == (name,)
    assert len(list(tmp_path.iterdir())) == 4


def test_what_exists_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "disk.vmdk").symlink_to("nowhere")
    with (
        pytest.raises(FileExists, match=r"disk\.vmdk: it is there already"),
        NewFiles(tmp_path / "disk.vmdk"),
    ):
        pass
    with pytest.raises(FileMissing, match="absent"), NewFiles(tmp_path / "absent" / "disk.vmdk"):
        pass
    with pytest.raises(StorageError), NewFiles(str(tmp_path) + "/"):
        pass


def test_a_companion_that_exists_stops_all(tmp_path: Path) -> None:
    (tmp_path / "flat.vmdk").write_text("theirs")
    with NewFiles(tmp_path / "disk.vmdk") as new:
        fill(new, disk="text", flat="data", a="more")
        with pytest.raises(FileExists, match=r"flat\.vmdk"):
            new.publish("disk.vmdk")
    assert listing(tmp_path) == {"flat.vmdk": "theirs"}


def test_a_name_taken_meanwhile_takes_all_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    real = newfiles.NewFiles._move

    def late(self: NewFiles, move: newfiles._Move) -> None:
        if move.name == "flat.vmdk":
            (tmp_path / "flat.vmdk").write_text("theirs")
        real(self, move)

    monkeypatch.setattr(newfiles.NewFiles, "_move", late)
    with NewFiles(tmp_path / "disk.vmdk") as new:
        fill(new, disk="text", flat="data", a="more")
        with pytest.raises(FileExists, match=r"flat\.vmdk"):
            new.publish("disk.vmdk")
    assert listing(tmp_path) == {"flat.vmdk": "theirs"}


def test_replacing_keeps_permissions_and_other_files(tmp_path: Path, way: str) -> None:
    for name in ("disk.vmdk", "flat.vmdk", "other.vmdk"):
        (tmp_path / name).write_text("old")
    (tmp_path / "disk.vmdk").chmod(0o640)
    (tmp_path / "link.vmdk").symlink_to("disk.vmdk")
    with NewFiles(tmp_path / "link.vmdk", replace=True) as new:
        fill(new, disk="text", flat="data", more="new")
        new.publish("disk.vmdk")
    (tmp_path / "link.vmdk").unlink()
    assert listing(tmp_path) == {
        "disk.vmdk": "text",
        "flat.vmdk": "data",
        "more.vmdk": "new",
        "other.vmdk": "old",
    }
    assert (tmp_path / "disk.vmdk").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("at", range(1, 7))
def test_a_failure_while_replacing_puts_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, at: int
) -> None:
    old = {"disk.vmdk": "old", "flat.vmdk": "old too"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    with NewFiles(tmp_path / "disk.vmdk", replace=True) as new:
        fill(new, disk="text", flat="data", more="new")
        calls = 0

        def counted(real: object) -> object:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == at:
                    raise OSError(errno.EIO, "the disk died")
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("_keep_old", "_sync_folder", "_move"):
                patch.setattr(newfiles.NewFiles, name, counted(getattr(newfiles.NewFiles, name)))
            with pytest.raises(OSError, match="died"):
                new.publish("disk.vmdk")
    assert listing(tmp_path) == old


def test_only_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk.vmdk").write_text("old")
    (tmp_path / "flat.vmdk").mkdir()
    with NewFiles(tmp_path / "disk.vmdk", replace=True) as new:
        fill(new, disk="text", flat="data")
        with pytest.raises(WriteRefused, match="no regular file"):
            new.publish("disk.vmdk")
    assert (tmp_path / "disk.vmdk").read_text() == "old"


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o555)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(StorageError, match=r"new files.*Permission denied"), NewFiles("disk.vmdk"):
            pass
    finally:
        os.seteuid(before)
        tmp_path.chmod(0o700)


def test_everything_is_synced_before_the_last_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    move = newfiles.NewFiles._move
    monkeypatch.setattr(
        newfiles.NewFiles, "_move", lambda self, one: (events.append(one.name), move(self, one))[1]
    )
    with NewFiles(tmp_path / "disk.vmdk") as new:
        fill(new, disk="text", flat="data")
        new.publish("disk.vmdk")
        synced = [new.path("flat.vmdk"), new.path("disk.vmdk")]
    here = str(tmp_path)
    assert events == [*synced, "flat.vmdk", here, "disk.vmdk", here]


def test_made_files_are_free_of_others_and_have_their_final_labels(tmp_path: Path) -> None:
    (tmp_path / "flat.vmdk").write_text("theirs")
    with NewFiles(tmp_path / "disk.vmdk") as new:
        with closing(new.create("disk.vmdk")) as storage:
            assert storage.name == str(tmp_path / "disk.vmdk")
            storage.write(b"text", 0)
        with pytest.raises(FileExists, match=r"disk\.vmdk"):
            new.create("disk.vmdk")
        new.check_free("other.vmdk")
        with pytest.raises(FileExists, match=r"flat\.vmdk"):
            new.check_free("flat.vmdk")
        new.publish("disk.vmdk")
    assert listing(tmp_path) == {"disk.vmdk": "text", "flat.vmdk": "theirs"}


def test_reserving(tmp_path: Path) -> None:
    with NewFiles(tmp_path / "disk.vmdk") as new:
        new.create("disk.vmdk").close()
        new.reserve("disk.vmdk", 1 << 20)
        assert os.stat(new.path("disk.vmdk")).st_blocks >= 2048
        with pytest.raises(StorageError, match=r"disk\.vmdk: reserve .* No space left"):
            new.reserve("disk.vmdk", 1 << 60)
        assert os.stat(new.path("disk.vmdk")).st_size == 1 << 20


def test_what_was_left_before_it_had_its_name_is_removed(tmp_path: Path) -> None:
    old, young, full, other = (
        tmp_path / f".{name}.vmdk.tmp-{name}" for name in ("disk", "disk", "disk", "no")
    )
    old, young, full = (old.with_name(old.name + letter) for letter in "abc")
    for path in (old, young, full, other):
        path.mkdir()
    (full / "disk.vmdk").write_text("of a maker on a file system without locks")
    for path in (old, full, other):
        os.utime(path, (1, 1))
    odd = odd_ones(tmp_path, ".disk.vmdk.tmp-")
    with NewFiles(tmp_path / "disk.vmdk"):
        pass
    assert set(tmp_path.iterdir()) == {young, full, other, *odd}


def odd_ones(folder: Path, prefix: str) -> list[Path]:
    """What can't be opened as a folder, as those of other users can't: names enough to be met first."""
    made = [folder / f"{prefix}odd{number}" for number in range(20)]
    for path in made:
        path.write_text("")
    return made


def test_what_a_killed_run_left_is_removed_and_what_others_make_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = tmp_path / ".disk.vmdk.new-dead"
    dead.mkdir()
    (dead / "disk.vmdk").write_text("half done")
    other = tmp_path / ".disk2.vmdk.new-dead"
    other.mkdir()
    odd = {path.name for path in odd_ones(tmp_path, ".disk.vmdk.new-")}
    with NewFiles(tmp_path / "disk.vmdk") as first:
        assert not dead.exists()
        fill(first, disk="first")
        with NewFiles(tmp_path / "disk.vmdk") as second:
            assert first.folder != second.folder
            fill(second, disk="second")
            second.publish("disk.vmdk")
        with pytest.raises(FileExists):
            first.publish("disk.vmdk")
    assert {path.name for path in tmp_path.iterdir()} == {"disk.vmdk", other.name} | odd
    # Where folders can't be locked, nobody takes one for a dead run's.
    monkeypatch.setattr(newfiles, "lock_folder", lambda _: False)
    with NewFiles(tmp_path / "disk3.vmdk") as new:
        assert ".tmp-" in new.folder
        with NewFiles(tmp_path / "disk3.vmdk"):
            assert os.path.isdir(new.folder)
    assert other.exists()


def test_many_files(tmp_path: Path) -> None:
    names = [f"disk-s{number:03}" for number in range(1, 31)]
    for theirs in (True, False):
        (tmp_path / "disk-s017.vmdk").write_text("theirs")
        with NewFiles(tmp_path / "disk.vmdk", replace=not theirs) as new:
            fill(new, disk="text", **dict.fromkeys(names, "data"))
            if theirs:
                with pytest.raises(FileExists, match="disk-s017"):
                    new.publish("disk.vmdk")
                assert len(list(tmp_path.iterdir())) == 2
            else:
                assert len(new.publish("disk.vmdk")) == 31
    assert set(listing(tmp_path).values()) == {"text", "data"}
    assert len(listing(tmp_path)) == 31


def killed_at(at: int, target: Path, *, replace: bool, **files: str) -> int:
    """The exit code of a process that is killed before its step number ``at`` of publishing ``files``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn where there are threads
        pid = os.fork()
    if pid == 0:
        left = at

        def counted(real: Callable[..., None]) -> Callable[..., None]:
            def call(*args: object) -> None:
                nonlocal left
                if left == 0:
                    os._exit(9)
                left -= 1
                real(*args)

            return call

        try:
            for name in ("_keep_old", "_sync_folder", "_move"):
                setattr(NewFiles, name, counted(getattr(NewFiles, name)))
            with NewFiles(target, replace=replace) as new:
                fill(new, **files)
                new.publish(target.name)
                counted(lambda: None)()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("stem", ["disk", "long" * 60])
@pytest.mark.parametrize("at", range(8))
def test_a_kill_while_naming_is_no_obstacle(tmp_path: Path, way: str, at: int, stem: str) -> None:
    target = tmp_path / f"{stem}.vmdk"
    made = {stem: "text", "flat": "data", "more": "data"}
    assert killed_at(at, target, replace=False, **made) == (9 if at < 7 else 0)
    whole = {f"{name}.vmdk": text for name, text in made.items()}
    there = {path.name for path in tmp_path.glob("*.vmdk")}
    if at > 4:
        assert there == set(whole)
        assert {(tmp_path / name).stat().st_nlink for name in there} == {1}
        (tmp_path / "kept").mkdir()
        os.rename(target, tmp_path / "kept" / target.name)
        with NewFiles(target):  # what was whole once is the user's, wherever he has put its parts
            assert listing(tmp_path / "kept") == {target.name: "text"}
        assert {path.name for path in tmp_path.iterdir()} == {"kept", "flat.vmdk", "more.vmdk"}
        return
    assert target.name not in there
    if at > 1:
        assert there
    if way == "neither":
        for name in there:  # they can't be told from others here
            (tmp_path / name).unlink()
    with NewFiles(target) as new:
        fill(new, **made)
        new.publish(target.name)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == whole


def test_what_got_another_name_after_a_kill_stays(tmp_path: Path) -> None:
    assert killed_at(3, tmp_path / "disk.vmdk", replace=False, disk="text", flat="data", more="data") == 9
    os.link(tmp_path / "flat.vmdk", tmp_path / "mine.vmdk")
    (tmp_path / "more.vmdk").unlink()
    (tmp_path / "more.vmdk").write_text("theirs")
    with NewFiles(tmp_path / "disk.vmdk"):
        pass
    assert listing(tmp_path) == {"flat.vmdk": "data", "mine.vmdk": "data", "more.vmdk": "theirs"}


@pytest.mark.parametrize("at", range(8))
def test_a_kill_while_replacing_keeps_what_is_needed(tmp_path: Path, way: str, at: int) -> None:
    old = {"disk.vmdk": "old", "flat.vmdk": "old too"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    code = killed_at(at, tmp_path / "disk.vmdk", replace=True, disk="text", flat="data", more="new")
    assert code == (9 if at < 7 else 0)
    left_over = list(tmp_path.glob(".disk.vmdk.new-*"))
    assert len(left_over) == (at < 7)
    there = {name: (tmp_path / name).read_text() for name in ("disk.vmdk", "flat.vmdk")}
    if there["disk.vmdk"] != "text" and there["flat.vmdk"] == "data":
        with pytest.raises(WriteRefused, match="earlier run"), NewFiles(tmp_path / "disk.vmdk", replace=True):
            pass
        for name, text in old.items():
            if there[name] != text:
                assert (left_over[0] / ".old" / name).read_text() == text
        assert (left_over[0] / "disk.vmdk").read_text() == "text"
    else:
        assert list(there.values()) in (list(old.values()), ["text", "data"])
        with NewFiles(tmp_path / "disk.vmdk", replace=True):
            assert not any(path.exists() for path in left_over)


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("used", ["disk.vmdk", "flat.vmdk"])
def test_what_somebody_uses_is_not_replaced(tmp_path: Path, used: str, writable: bool) -> None:
    old = dict.fromkeys(("disk.vmdk", "flat.vmdk"), "old")
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    fd = os.open(tmp_path / used, os.O_RDWR if writable else os.O_RDONLY)
    with closing(LocalFile(fd, used, writable=writable)) as user:
        assert user.lock(writable=writable) is None
        if used == "disk.vmdk":  # it is looked at before any work is done
            with pytest.raises(InUse), NewFiles(tmp_path / "disk.vmdk", replace=True):
                pass
        else:
            with NewFiles(tmp_path / "disk.vmdk", replace=True) as new:
                fill(new, disk="new", flat="new")
                with pytest.raises(InUse):
                    new.publish("disk.vmdk")
    assert listing(tmp_path) == old
    with NewFiles(tmp_path / "disk.vmdk", replace=True) as new:
        fill(new, disk="new", flat="new")
        new.publish("disk.vmdk")
    assert listing(tmp_path) == dict.fromkeys(old, "new")


def test_what_vmware_uses_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk.vmdk").write_text("old")
    (tmp_path / "disk.vmdk.lck").mkdir()
    (tmp_path / "disk.vmdk.lck" / "M1.lck").touch()
    with pytest.raises(InUse, match="VMware"), NewFiles(tmp_path / "disk.vmdk", replace=True):
        pass
