"""The gate: what a hostile name may not reach, and what an honest one must.

Each test gives the gate a name as a descriptor would and looks at what is opened.  The layout:

    tmp/secret.vmdk          outside, what an attacker is after
    tmp/vm/disk.vmdk         the image that the user named
    tmp/vm/sub/part.vmdk
    tmp/other/base.vmdk      outside, unless allowed
"""

import errno
import gc
import os
import random
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbd_vmdk.errors import FileMissing, OptionError, StorageError, TrustError, VmdkError
from nbd_vmdk.storage import gate
from nbd_vmdk.storage.local import LocalFile
from nbd_vmdk.storage.localfolder import LocalFolder

OUTSIDE = "outside the image's folder"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("vm/sub", "other/deep"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("secret.vmdk", "vm/disk.vmdk", "vm/part.vmdk", "vm/sub/part.vmdk", "other/base.vmdk"):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.fixture
def folder(tree: Path) -> LocalFolder:
    return LocalFolder.for_image(tree / "vm/disk.vmdk")[0]


def text(folder: LocalFolder, name: str) -> str:
    file = folder.open(name)
    try:
        return file.read(0, file.size).decode()
    finally:
        file.close()


def refused(folder: LocalFolder, name: str) -> TrustError:
    """The refusal of ``name``, the same for reading and for writing."""
    with pytest.raises(TrustError) as caught:
        folder.open(name)
    with pytest.raises(TrustError) as writing:
        folder.open(name, writable=True)
    assert str(caught.value) == str(writing.value)
    assert caught.value.errno == errno.EPERM
    return caught.value


def opened(image: Path) -> LocalFile:
    folder, name = LocalFolder.for_image(image)
    return folder.open(name)


def test_from_a_folder_that_is_gone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "gone").mkdir()
    monkeypatch.chdir(tree / "gone")
    (tree / "gone").rmdir()
    with pytest.raises(FileMissing):
        LocalFolder.for_image("disk.vmdk")


def open_files() -> int:
    gc.collect()  # an error that a test has caught keeps its gate for a while
    return len(os.listdir("/proc/self/fd"))


# What must work


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("disk.vmdk", "vm/disk.vmdk"),
        ("part.vmdk", "vm/part.vmdk"),
        ("./part.vmdk", "vm/part.vmdk"),
        ("sub/part.vmdk", "vm/sub/part.vmdk"),
        ("sub//./part.vmdk", "vm/sub/part.vmdk"),
        ("sub/../part.vmdk", "vm/part.vmdk"),
        ("../vm/part.vmdk", "vm/part.vmdk"),
        ("../vm/sub/../part.vmdk", "vm/part.vmdk"),
    ],
)
def test_files_of_the_image(folder: LocalFolder, name: str, content: str) -> None:
    assert text(folder, name) == content


def test_the_plain_name_of_the_image(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "vm")
    for path, label in [
        ("disk.vmdk", "disk.vmdk"),
        ("./disk.vmdk", "disk.vmdk"),
        ("../vm/disk.vmdk", "../vm/disk.vmdk"),
        (tree / "vm/disk.vmdk", f"{tree}/vm/disk.vmdk"),
    ]:
        folder, name = LocalFolder.for_image(path)
        assert name == "disk.vmdk"
        assert folder.label(name) == label
        with_open = folder.open(name)
        assert with_open.name == label
        assert not with_open.writable
        with_open.close()


def test_absolute_names_inside(tree: Path, folder: LocalFolder) -> None:
    assert text(folder, str(tree / "vm/part.vmdk")) == "vm/part.vmdk"
    assert text(folder, f"{tree}/vm/../vm/./sub/part.vmdk") == "vm/sub/part.vmdk"


def test_writing(folder: LocalFolder) -> None:
    file = folder.open("part.vmdk", writable=True)
    file.write(b"VM", 0)
    assert file.writable
    file.close()
    assert text(folder, "part.vmdk") == "VM/part.vmdk"


def test_an_opened_file_blocks_as_usual_and_is_not_inherited(folder: LocalFolder) -> None:
    file = folder.open("part.vmdk")
    assert os.get_blocking(file.fd)
    assert not os.get_inheritable(file.fd)
    file.close()


def test_links_within_the_folder(tree: Path, folder: LocalFolder) -> None:
    (tree / "vm/link.vmdk").symlink_to("sub/part.vmdk")
    (tree / "vm/absolute.vmdk").symlink_to(tree / "vm/part.vmdk")
    (tree / "vm/folder").symlink_to("sub/../sub")
    (tree / "vm/sub/up").symlink_to("..")
    (tree / "vm/around.vmdk").symlink_to("../vm/part.vmdk")
    assert text(folder, "link.vmdk") == "vm/sub/part.vmdk"
    assert text(folder, "absolute.vmdk") == "vm/part.vmdk"
    assert text(folder, "folder/part.vmdk") == "vm/sub/part.vmdk"
    assert text(folder, "folder/up/part.vmdk") == "vm/part.vmdk"
    assert text(folder, "around.vmdk") == "vm/part.vmdk"
    # As the kernel has it, `..` goes up from where the link leads to.
    (tree / "vm/sub/deeper").mkdir()
    (tree / "vm/short").symlink_to("sub/deeper")
    assert text(folder, "short/../part.vmdk") == "vm/sub/part.vmdk"


def test_forty_links_and_no_more(tree: Path, folder: LocalFolder) -> None:
    target = "part.vmdk"
    for number in range(41):
        (tree / f"vm/link{number}").symlink_to(target)
        target = f"link{number}"
    assert text(folder, "link39") == "vm/part.vmdk"
    with pytest.raises(StorageError, match="symbolic links"):
        folder.open("link40")


def test_names(tree: Path, folder: LocalFolder) -> None:
    assert folder.names() == ["disk.vmdk", "part.vmdk", "sub"]
    assert folder.folder_of("sub/x").names() == ["part.vmdk"]


def test_folder_of_keeps_the_permissions(tree: Path, folder: LocalFolder) -> None:
    sub = folder.folder_of("sub/part.vmdk")
    assert text(sub, "part.vmdk") == "vm/sub/part.vmdk"
    assert text(sub, "../part.vmdk") == "vm/part.vmdk"
    assert sub.label("part.vmdk") == f"{tree}/vm/sub/part.vmdk"
    assert OUTSIDE in str(refused(sub, "../../secret.vmdk"))
    assert text(folder.folder_of("part.vmdk"), "part.vmdk") == "vm/part.vmdk"
    assert text(folder.folder_of("../vm/x"), "part.vmdk") == "vm/part.vmdk"
    with pytest.raises(FileMissing):
        folder.folder_of("nowhere/part.vmdk")
    with pytest.raises(StorageError, match="Not a directory"):
        folder.folder_of("part.vmdk/x")
    with pytest.raises(TrustError) as caught:
        folder.folder_of("../other/base.vmdk")
    assert caught.value.hint == f"to let the image use it, add --allow-dir {tree}/other"
    with pytest.raises(TrustError) as caught:
        folder.folder_of("../secret.vmdk")
    assert caught.value.hint == f"to let the image use it, add --allow-dir {tree}"


# What the user allows


def test_allowed_folders(tree: Path) -> None:
    folder, _ = LocalFolder.for_image(tree / "vm/disk.vmdk", allow_dirs=[tree / "other"])
    assert text(folder, "../other/base.vmdk") == "other/base.vmdk"
    assert text(folder, str(tree / "other/base.vmdk")) == "other/base.vmdk"
    (tree / "vm/link.vmdk").symlink_to(tree / "other/base.vmdk")
    assert text(folder, "link.vmdk") == "other/base.vmdk"
    assert text(folder.folder_of("../other/base.vmdk"), "../vm/part.vmdk") == "vm/part.vmdk"
    assert OUTSIDE in str(refused(folder, "../secret.vmdk"))
    assert OUTSIDE in str(refused(folder, "../other/../secret.vmdk"))


def test_the_hint_names_the_folder_that_mends_it(tree: Path) -> None:
    (tree / "vm/link").symlink_to(tree / "other")
    (tree / "vm/file").symlink_to("../other/base.vmdk")
    for name in ("../other/base.vmdk", f"{tree}/other/base.vmdk", "link/base.vmdk", "file"):
        folder, _ = LocalFolder.for_image(tree / "vm/disk.vmdk")
        hint = refused(folder, name).hint
        assert hint == f"to let the image use it, add --allow-dir {tree}/other"
        folder, _ = LocalFolder.for_image(tree / "vm/disk.vmdk", allow_dirs=[f"{tree}/other"])
        assert text(folder, name) == "other/base.vmdk"


def test_an_allowed_folder_as_it_is_written(tree: Path) -> None:
    (tree / "way").symlink_to("other")
    folder, _ = LocalFolder.for_image(tree / "vm/disk.vmdk", allow_dirs=[tree / "way"])
    for name in (
        "../way/base.vmdk",
        f"{tree}/way/base.vmdk",
        "../other/base.vmdk",
        f"{tree}/other/base.vmdk",
    ):
        assert text(folder, name) == "other/base.vmdk"


def test_the_image_folder_as_it_is_written(tree: Path) -> None:
    (tree / "way").symlink_to("vm")
    folder, _ = LocalFolder.for_image(tree / "way/disk.vmdk")
    assert text(folder, f"{tree}/way/part.vmdk") == "vm/part.vmdk"
    assert text(folder, f"{tree}/vm/part.vmdk") == "vm/part.vmdk"
    assert text(folder, "../vm/part.vmdk") == "vm/part.vmdk"


def test_nested_allowed_folders(tree: Path) -> None:
    for image, allowed in [
        ("vm/disk.vmdk", tree),
        ("vm/sub/part.vmdk", tree / "vm"),
        ("vm/disk.vmdk", tree / "vm/sub"),
    ]:
        folder, name = LocalFolder.for_image(tree / image, allow_dirs=[allowed])
        assert text(folder, name) == image
        assert text(folder, f"{tree}/vm/sub/part.vmdk") == "vm/sub/part.vmdk"
        assert text(folder, f"{tree}/vm/sub/../part.vmdk") == "vm/part.vmdk"


def test_everything_allowed(tree: Path) -> None:
    folder, _ = LocalFolder.for_image(tree / "vm/disk.vmdk", allow_dirs=["/"])
    assert text(folder, "../secret.vmdk") == "secret.vmdk"
    assert text(folder, f"{'../' * 50}{tree}/secret.vmdk") == "secret.vmdk"
    (tree / "vm/link").symlink_to(tree / "secret.vmdk")
    assert text(folder, "link") == "secret.vmdk"


def test_an_allowed_folder_that_is_not_there(tree: Path) -> None:
    with pytest.raises(FileMissing) as caught:
        LocalFolder.for_image(tree / "vm/disk.vmdk", allow_dirs=[tree / "nowhere"])
    assert caught.value.file == str(tree / "nowhere")
    with pytest.raises(StorageError, match="Not a directory"):
        LocalFolder.for_image(tree / "vm/disk.vmdk", allow_dirs=[tree / "secret.vmdk"])


# The image itself is trusted


def test_the_image_may_be_a_link(tree: Path) -> None:
    (tree / "disk.vmdk").symlink_to("middle.vmdk")
    (tree / "middle.vmdk").symlink_to("vm/disk.vmdk")
    folder, name = LocalFolder.for_image(tree / "disk.vmdk")
    assert text(folder, name) == "vm/disk.vmdk"
    # Its companions may lie beside the link (first) or beside the file.
    assert text(folder, "secret.vmdk") == "secret.vmdk"
    assert text(folder, "part.vmdk") == "vm/part.vmdk"
    (tree / "part.vmdk").write_text("beside the link")
    assert text(folder, "part.vmdk") == "beside the link"
    assert {"secret.vmdk", "part.vmdk", "sub"} <= set(folder.names())
    same = folder.folder_of(name)
    assert text(same, "sub/part.vmdk") == "vm/sub/part.vmdk"


def test_a_parent_may_be_a_link_within(tree: Path) -> None:
    (tree / "vm/base.vmdk").symlink_to("sub/part.vmdk")
    (tree / "vm/sub/extent").write_text("extent")
    folder, _ = LocalFolder.for_image(tree / "vm/disk.vmdk")
    assert text(folder.folder_of("base.vmdk"), "extent") == "extent"
    (tree / "vm/evil.vmdk").symlink_to(tree / "other/base.vmdk")
    assert OUTSIDE in str(refused(folder.folder_of("evil.vmdk"), "../other/base.vmdk"))


def test_a_link_to_nothing_is_a_missing_image(tree: Path) -> None:
    for target in ("nothing.vmdk", "nowhere/nothing.vmdk"):
        link = tree / "vm/link.vmdk"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(FileMissing) as caught:
            opened(link)
        assert caught.value.file == str(link)


@pytest.mark.parametrize("what", ["folder", "pipe", "character device"])
def test_a_link_to_what_is_no_file(tree: Path, what: str) -> None:
    """It is there, and told as what it is: in the folder that it leads to nothing has the link's name."""
    os.mkfifo(tree / "other/pipe")
    places = {"folder": tree / "other", "pipe": tree / "other/pipe", "character device": Path("/dev/null")}
    (tree / "vm/link.vmdk").symlink_to(places[what])
    with pytest.raises(TrustError, match=f"link.vmdk: a {what}, not a file") as caught:
        opened(tree / "vm/link.vmdk")
    assert "name a file that holds a disk" in (caught.value.hint or "")


def test_images_that_can_not_be(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    for path in ("", "a\0b", "\ud800"):
        with pytest.raises(OptionError):
            LocalFolder.for_image(path)
    for path in ("/", ".", "..", "vm", "vm/", str(tree / "vm")):
        folder, name = LocalFolder.for_image(path)
        with pytest.raises(TrustError, match="a folder, not a file"):
            folder.open(name)
    with pytest.raises(FileMissing, match=r"^nowhere: no such file"):
        LocalFolder.for_image("nowhere/disk.vmdk")
    folder, name = LocalFolder.for_image("vm/nothing.vmdk")
    with pytest.raises(FileMissing, match=r"^vm/nothing.vmdk: no such file"):
        folder.open(name)


# Attacks


@pytest.mark.parametrize(
    "name",
    [
        "../secret.vmdk",
        "../../../../../../../../../../etc/passwd",
        "/etc/passwd",
        "//etc//passwd",
        "/./etc/../etc/passwd",
        "sub/../../secret.vmdk",
        "../vm/../secret.vmdk",
        "../vmx/disk.vmdk",
        "/proc/self/environ",
        "/proc/self/cwd/x",
        "/dev/zero",
        "../disk.vmdk",
    ],
)
def test_names_that_lead_out(folder: LocalFolder, name: str) -> None:
    error = refused(folder, name)
    assert OUTSIDE in str(error)
    assert error.hint is not None
    assert "--allow-dir /" in error.hint


def test_exact_words_of_a_refusal(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    folder, _ = LocalFolder.for_image("vm/disk.vmdk")
    error = refused(folder, "/etc/my disks/passwd")
    assert str(error) == "vm/disk.vmdk: /etc/my disks/passwd: outside the image's folder"
    assert error.hint == "to let the image use it, add --allow-dir '/etc/my disks'"


def test_links_that_lead_out(tree: Path, folder: LocalFolder) -> None:
    (tree / "vm/file").symlink_to("../secret.vmdk")
    (tree / "vm/absolute").symlink_to(tree / "secret.vmdk")
    (tree / "vm/folder").symlink_to("../other")
    (tree / "vm/two").symlink_to("folder/base.vmdk")
    (tree / "vm/up").symlink_to("..")
    (tree / "vm/root").symlink_to("/")
    for name in ("file", "absolute", "folder/base.vmdk", "two", "up/secret.vmdk", "root/etc/passwd", "up"):
        assert OUTSIDE in str(refused(folder, name))


def test_a_loop_of_links(tree: Path, folder: LocalFolder) -> None:
    (tree / "vm/a").symlink_to("b")
    (tree / "vm/b").symlink_to("./a")
    (tree / "vm/self").symlink_to("self/self")
    for name in ("a", "a/x", "self", "self/x"):
        with pytest.raises(StorageError, match="symbolic links"):
            folder.open(name)


def test_nothing_is_told_of_what_lies_outside(tree: Path, folder: LocalFolder) -> None:
    (tree / "hidden").mkdir(mode=0)
    (tree / "link").symlink_to("vm")
    there = ["../secret.vmdk", "../other/base.vmdk", "../other/deep/../base.vmdk", "../link/disk.vmdk"]
    not_there = ["../secreu.vmdk", "../othes/base.vmdk", "../othes/deep/../base.vmdk", "../linl/disk.vmdk"]
    for one, other in zip(there, not_there, strict=True):
        first, second = refused(folder, one), refused(folder, other)
        assert first.fields["why"] == second.fields["why"] == OUTSIDE
        assert (first.hint or "").replace("other", "othes").replace("link", "linl") == second.hint
    # In by a way outside: the same whether that way exists or not.
    for name in ("../other/../vm/part.vmdk", "../othes/../vm/part.vmdk", "../hidden/x/../../vm/part.vmdk"):
        assert OUTSIDE in str(refused(folder, name))


def test_nothing_outside_is_even_looked_at(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **_: object) -> None:
        pytest.fail(f"looked at {arguments}")

    for call in ("open", "stat", "readlink", "listdir"):
        monkeypatch.setattr(os, call, never)
    for name in ("/etc/passwd", "/net/evil.example/x", "../secret.vmdk", "/dev/watchdog"):
        with pytest.raises(TrustError):
            folder.open(name)


@pytest.mark.parametrize("writable", [False, True])
def test_what_is_no_file(tree: Path, folder: LocalFolder, writable: bool) -> None:
    os.mkfifo(tree / "vm/pipe")
    (tree / "vm/pipelink").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(tree / "vm", os.O_PATH)
        listener.bind(f"/proc/self/fd/{here}/socket")  # the path itself may be too long for a socket
        os.close(here)
        for name, why in [
            ("pipe", "a pipe, not a file"),
            ("pipelink", "a pipe, not a file"),
            ("socket", "a socket, not a file"),
            ("sub", "a folder, not a file"),
            ("sub/", "a folder, not a file"),
            ("sub/.", "a folder, not a file"),
            ("sub/..", "a folder, not a file"),
            ("../vm", "a folder, not a file"),
            (".", "a folder, not a file"),
            ("..", "a folder, not a file"),
            ("/", "a folder, not a file"),
            ("", "a folder, not a file"),
        ]:
            with pytest.raises(TrustError) as caught:
                folder.open(name, writable=writable)
            assert caught.value.fields["why"] == why, name


def make_node(path: Path, kind: int, device: int) -> None:
    try:
        os.mknod(path, kind | 0o600, device)
    except PermissionError:
        pytest.skip("may not make device nodes")


def test_devices(tree: Path, folder: LocalFolder) -> None:
    make_node(tree / "vm/zero", stat.S_IFCHR, os.makedev(1, 5))
    make_node(tree / "vm/disk", stat.S_IFBLK, os.makedev(7, 0))
    assert refused(folder, "zero").fields["why"] == "a character device, not a file"
    error = refused(folder, "disk")
    assert error.fields["why"] == "a block device"
    assert error.hint == "to let images use devices in allowed folders, add --allow-devices"
    bold, _ = LocalFolder.for_image(tree / "vm/disk.vmdk", allow_devices=True)
    assert refused(bold, "zero").fields["why"] == "a character device, not a file"
    assert OUTSIDE in str(refused(bold, "/dev/sda"))
    try:
        device = bold.open("disk")
    except StorageError:
        pytest.skip("there is no such device here")
    assert device.is_device
    assert device.identity == (os.makedev(7, 0),)
    assert device.size % 512 == 0
    device.close()


@pytest.mark.parametrize(
    "name", ["a\0b", "\ud800.vmdk", "x" * 5000, "a/" * 3000 + "b"], ids=lambda n: ascii(n[:8])
)
def test_names_that_are_none(folder: LocalFolder, name: str) -> None:
    assert refused(folder, name).fields["why"] == "not a file name"
    with pytest.raises(TrustError):
        folder.folder_of(name)


def test_long_names_and_odd_ones(tree: Path, folder: LocalFolder) -> None:
    with pytest.raises(StorageError, match="File name too long"):
        folder.open("x" * 256)
    with pytest.raises(StorageError, match="Not a directory"):
        folder.open("part.vmdk/x")
    raw = os.fsdecode(b"gr\xfc\xdfe \xff.vmdk")
    (tree / "vm" / raw).write_text("odd")
    assert text(folder, raw) == "odd"
    assert raw in folder.names()
    with pytest.raises(TrustError) as caught:
        folder.open("/etc/\x1b[31m\nx/y")
    assert str(caught.value).isprintable()
    assert caught.value.hint is not None
    assert caught.value.hint.isprintable()


def test_a_missing_file(tree: Path, folder: LocalFolder) -> None:
    for name in ("nothing.vmdk", "nowhere/nothing.vmdk"):
        with pytest.raises(FileMissing) as caught:
            folder.open(name)
        assert caught.value.file == f"{tree}/vm/{name}"


def test_a_file_that_may_not_be_written(
    tree: Path, folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.open

    def as_nobody(path: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return whole(path, flags, *rest, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", as_nobody)
    with pytest.raises(StorageError, match="open for writing: Permission denied") as caught:
        folder.open("part.vmdk", writable=True)
    assert caught.value.errno == errno.EPERM
    assert caught.value.hint == "to serve it without writing, add -r"
    assert text(folder, "part.vmdk") == "vm/part.vmdk"


def test_whatever_opens_is_inside_and_what_the_kernel_finds(tree: Path, folder: LocalFolder) -> None:
    links = {
        "up": "..", "root": "/", "here": ".", "sub/back": "../sub", "out": "../other", "in": "../vm/sub",
        "far": f"{tree}/vm", "file": "sub/part.vmdk", "gone": "nowhere", "sub/loop": "loop",
        "sub/evil": "../../secret.vmdk",
    }  # fmt: skip
    for link, target in links.items():
        (tree / "vm" / link).symlink_to(target)
    (tree / "other/vm").symlink_to("../vm")
    words = [
        *links,
        "..",
        ".",
        "",
        "sub",
        "vm",
        "other",
        "part.vmdk",
        "disk.vmdk",
        "base.vmdk",
        "secret.vmdk",
    ]
    chance = random.Random(11)
    inside = refused = 0
    for _ in range(5000):
        name = "/".join(chance.choices(words, k=chance.randint(1, 6)))
        if chance.random() < 0.2:
            name = f"{tree}/{name}"
        full = os.path.realpath(tree / "vm" / name)
        try:
            file = folder.open(name)
        except TrustError:
            refused += 1
            continue
        except StorageError:
            # Honest about what is inside, and nothing else: the kernel can't open it either.
            assert not os.path.isfile(tree / "vm" / name), name
            continue
        inside += 1
        stat_ = os.stat(tree / "vm" / name)
        assert file.identity == (stat_.st_dev, stat_.st_ino), name
        assert full.startswith(f"{tree}/vm/"), name
        file.close()
    assert inside > 100
    assert refused > 1000


# Races


def swapping(monkeypatch: pytest.MonkeyPatch, name: str, swap: Callable[[], None]) -> None:
    """Call ``swap`` once, right before the next os.open of ``name``."""
    whole = os.open
    done: list[bool] = []

    def swapped(path: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        if path == name and not done:
            done.append(True)
            swap()
        return whole(path, flags, *rest, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", swapped)


def test_a_file_swapped_for_a_link_meanwhile(
    tree: Path, folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap() -> None:
        (tree / "vm/part.vmdk").unlink()
        (tree / "vm/part.vmdk").symlink_to("../secret.vmdk")

    swapping(monkeypatch, "part.vmdk", swap)
    with pytest.raises(TrustError, match=OUTSIDE):
        folder.open("part.vmdk")


@pytest.mark.parametrize("writable", [False, True])
def test_a_file_swapped_for_a_pipe_meanwhile(
    tree: Path, folder: LocalFolder, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    def swap() -> None:
        (tree / "vm/part.vmdk").unlink()
        os.mkfifo(tree / "vm/part.vmdk")

    swapping(monkeypatch, "part.vmdk", swap)
    before = open_files()
    with pytest.raises(TrustError, match="a pipe"):
        folder.open("part.vmdk", writable=writable)
    assert open_files() == before


def test_a_folder_swapped_for_a_link_meanwhile(
    tree: Path, folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap() -> None:
        (tree / "vm/sub").rename(tree / "vm/old")
        (tree / "vm/sub").symlink_to("../other")

    swapping(monkeypatch, "sub", swap)
    with pytest.raises(TrustError, match=OUTSIDE):
        folder.open("sub/part.vmdk")


def test_the_image_folder_swapped_for_a_link_later(tree: Path, folder: LocalFolder) -> None:
    (tree / "vm").rename(tree / "moved")
    (tree / "vm").symlink_to("other")
    assert text(folder, "part.vmdk") == "vm/part.vmdk"
    with pytest.raises(FileMissing):
        folder.open("base.vmdk")


def test_a_link_that_flickers_never_gets_through(tree: Path, folder: LocalFolder) -> None:
    stop = threading.Event()
    (tree / "vm/evil").symlink_to("../secret.vmdk")
    (tree / "vm/good").symlink_to("part.vmdk")

    def flicker() -> None:
        while not stop.is_set():
            for source in ("evil", "good"):
                os.symlink(os.readlink(tree / "vm" / source), tree / "vm/new")
                os.rename(tree / "vm/new", tree / "vm/target")

    (tree / "vm/target").symlink_to("part.vmdk")
    thread = threading.Thread(target=flicker)
    thread.start()
    try:
        seen = set()
        for _ in range(500):
            try:
                seen.add(text(folder, "target"))
            except TrustError as error:
                seen.add(error.fields["why"])
        assert seen <= {"vm/part.vmdk", OUTSIDE}
    finally:
        stop.set()
        thread.join()


def test_no_descriptor_is_left_behind(tree: Path) -> None:
    (tree / "vm/link").symlink_to("sub/../sub/../../secret.vmdk")
    (tree / "vm/loop").symlink_to("sub/../loop")
    before = open_files()
    folder, name = LocalFolder.for_image(tree / "vm/disk.vmdk", allow_dirs=[tree / "other"])
    for wanted in (
        name,
        "sub/part.vmdk",
        "link",
        "loop",
        "sub",
        "sub/nothing",
        "/etc/passwd",
        "sub/part.vmdk/x",
    ):
        try:
            folder.open(wanted).close()
        except VmdkError:
            pass
        try:
            folder.folder_of(wanted).names()
        except VmdkError:
            pass
    del folder
    assert open_files() == before


def test_an_interrupt_while_a_folder_is_pinned_says_nothing() -> None:
    # All that there is of it when Ctrl-C comes before its first line.  What it raises when it goes is printed
    # as a traceback, and pytest makes that an error.
    pin = gate._Pin.__new__(gate._Pin)
    del pin


def test_images_of_one_folder_share_its_descriptor(tree: Path) -> None:
    """As long as it is the same folder: one that was made anew has only the name of the old one."""
    before = open_files()
    folders = [LocalFolder.for_image(tree / "vm/disk.vmdk")[0] for _ in range(20)]
    assert open_files() == before + 1
    (tree / "vm").rename(tree / "old")
    (tree / "vm").mkdir()
    (tree / "vm/disk.vmdk").write_text("new")
    anew = LocalFolder.for_image(tree / "vm/disk.vmdk")[0]
    assert open_files() == before + 2
    assert text(anew, "disk.vmdk") == "new"
    assert text(folders[0], "disk.vmdk") == "vm/disk.vmdk"
    del folders, anew
    assert open_files() == before
