"""What each product takes, and why: the knowledge behind ``--for``.

For each product: the kind it is given when nothing else was asked for, kinds and features that it refuses,
and some that it takes but does not like.  Reasons are sentences for the user.

Sources: VMware's documentation of disk kinds, the readers of QEMU and VirtualBox, and what their users met.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from nbd_vmdk.errors import OptionError
from nbd_vmdk.ops.create.options import Kind
from nbd_vmdk.units import KIB, TIB, format_size

#: Called with a reason: a note of what was chosen, or a warning of what will not be liked.
Tell = Callable[[str], None]

#: Taken by all products of the last ten years: Workstation 10, ESXi 5.5, and all that came later.
DEFAULT_HWVERSION: Final = 10
_MAX_VMWARE_GRAIN: Final = 64 * KIB
_VMWARE_SNAPSHOTS: Final = 32
_SPLIT_CHILD: Final = "twoGbMaxExtentSparse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product.  The mappings are from kinds to reasons.

    kind, why        what a new disk is made as, and why
    child, child_why the same for a child link; None says that it can't have one, and why
    splits_children  a child of a split disk is split
    most             the largest disk in bytes that it runs, None if that is no matter
    words            the types of extents that it reads, None if it reads all that are made
    most_extents     how many of them, None if that is no matter
    zeroed_grain     it reads the header version 2, in which tables may say "zeros"
    long_content_id  it keeps ddb.longContentID in step with the content ID
    """

    title: str
    kind: str
    why: str
    child: str | None
    child_why: str
    splits_children: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    disliked: Mapping[str, str] = field(default_factory=dict)
    most: int | None = None
    words: tuple[str, ...] | None = None
    most_extents: int | None = None
    zeroed_grain: bool = True
    long_content_id: bool = True
    is_vmware: bool = True


_NO_HOSTED: Final = "ESXi runs no disk of this kind before vmkfstools -i has imported it"
_VIRTUALBOX_WORDS: Final = ("SPARSE", "FLAT", "VMFS", "ZERO")
_VIRTUALBOX_READS: Final = f"it reads {', '.join(_VIRTUALBOX_WORDS)} and nothing else"
#: Tried with QEMU 7.2.  A write where an ESXi delta has no table yet, and a new one has none, goes over the
#: beginning of the file.  A new grain's bytes that a write leaves alone are copied from the parent, but from
#: as far into that as the grain is into its extent.
_SERVED: Final = "; what it writes through nbd-vmdk serve is right"
_QEMU_COWD: Final = f"QEMU (7.2 at least) destroys a delta of this kind when it writes to it{_SERVED}"
_QEMU_SPLIT: Final = (
    "QEMU (7.2 at least) mixes up the parent's data when it writes to a child in several extents" + _SERVED
)
_NO_OTHER_OVA: Final = "appliances carry streamOptimized disks; importers take no other kind"

PRODUCTS: Final = {
    "workstation": Product(
        title="Workstation",
        kind="monolithicSparse",
        why="Workstation, Fusion and Player run it in place, and the file grows with its content",
        child="monolithicSparse",
        child_why="it is what Workstation makes as a snapshot of a disk in one file",
        splits_children=True,
        disliked={
            "streamOptimized": "Workstation imports a compressed disk, and runs no machine on it",
            "vmfs": "Workstation opens this kind, and makes none: it is ESXi's",
            "vmfsSparse": "Workstation opens this kind, and makes none: it is ESXi's",
        },
        most=8 * TIB,
    ),
    "esxi": Product(
        title="ESXi",
        kind="vmfs",
        why="ESXi runs machines on this kind alone; the file is the disk, byte by byte",
        child="vmfsSparse",
        child_why="it is ESXi's delta on VMFS 5 and NFS",
        refused={
            "monolithicSparse": _NO_HOSTED,
            "twoGbMaxExtentSparse": _NO_HOSTED,
            "twoGbMaxExtentFlat": _NO_HOSTED,
            "streamOptimized": "ESXi imports a compressed disk, and runs no machine on it",
            "custom": "ESXi knows no disk that is put together from files",
        },
        disliked={"monolithicFlat": "ESXi's own name of this kind is vmfs: its tools may ask for an import"},
        most=62 * TIB,
    ),
    "ova": Product(
        title="an appliance",
        kind="streamOptimized",
        why=_NO_OTHER_OVA,
        child=None,
        child_why="importers take whole disks only",
        refused=dict.fromkeys(
            ("monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "vmfs", "vmfsSparse", "custom"),
            _NO_OTHER_OVA,
        ),
        disliked={"monolithicSparse": "some importers take streamOptimized disks only"},
    ),
    "qemu": Product(
        title="QEMU",
        kind="monolithicSparse",
        why="it is what QEMU itself makes",
        child="monolithicSparse",
        child_why="it is what QEMU itself makes",
        refused={"custom": "QEMU opens no disk with createType custom"},
        disliked={
            "streamOptimized": "QEMU writes each grain of a compressed disk once, and fails the second time",
            "vmfsSparse": _QEMU_COWD,
        },
        long_content_id=False,
        is_vmware=False,
    ),
    "virtualbox": Product(
        title="VirtualBox",
        kind="monolithicSparse",
        why="VirtualBox runs it in place, and the file grows with its content",
        child=None,
        child_why="it finds parents by UUIDs that it gives out itself, and heeds no other link",
        refused={"vmfsSparse": _VIRTUALBOX_READS},
        disliked={"streamOptimized": "VirtualBox opens a compressed disk for reading only"},
        words=_VIRTUALBOX_WORDS,
        most_extents=1000,
        zeroed_grain=False,
        is_vmware=False,
    ),
}


def find_product(name: str) -> Product:
    """The product of this name; OptionError names those there are."""
    found = PRODUCTS.get(name.lower())
    if found is None:
        why = f"{name!r} is no product that is known"
        raise OptionError(None, why=why, hint=f"choose one of {', '.join(PRODUCTS)}")
    return found


def choose_kind(product: Product, *, note: Tell) -> str:
    """The kind of a new disk that a product is given."""
    note(f"made as {product.kind}: {product.why}")
    return product.kind


def choose_child(product: Product, *, split: bool, note: Tell) -> str:
    """The kind of child link that it is given, of a ``split`` disk or not; OptionError if it takes none."""
    _need_child(product)
    assert product.child is not None
    if split and product.splits_children:
        note(f"made as {_SPLIT_CHILD}: {product.title} makes snapshots of a split disk so")
        return _SPLIT_CHILD
    note(f"made as {product.child}: {product.child_why}")
    return product.child


def check_kind(product: Product, kind: Kind, *, parent: str | None, warn: Tell) -> None:
    """Hold a kind, and that of its parent if it has one, against what a product takes.

    OptionError if it does not take it.
    """
    if parent is not None:
        _need_child(product)
        if parent in product.refused:
            warn(f"its parent is {parent}: {product.refused[parent]}")
    if kind.name in product.refused:
        other = product.kind if parent is None else product.child
        raise OptionError(
            None,
            why=f"{kind.name} is not for {product.title}: {product.refused[kind.name]}",
            hint=f"leave --type out, or make it {other}",
        )
    if kind.name in product.disliked:
        warn(product.disliked[kind.name])


def tell_of_qemu(
    product: Product | None, kind: Kind, *, extents: int, is_child: bool, note: Tell, warn: Tell
) -> None:
    """Tell of what QEMU spoils when it writes to it, where the disk is not for another product.

    What check_kind() warns of is only noted where it is for none.
    """
    if product is None and kind.word == "VMFSSPARSE":
        note(_QEMU_COWD)
    elif is_child and kind.word == "SPARSE" and extents > 1:
        if product is None:
            note(_QEMU_SPLIT)
        elif product is PRODUCTS["qemu"]:
            warn(_QEMU_SPLIT)


def _need_child(product: Product) -> None:
    if product.child is None:
        why = f"{product.title} takes no child link: {product.child_why}"
        raise OptionError(None, why=why, hint="leave --for or --parent out")


def check_features(
    product: Product,
    kind: Kind,
    *,
    size: int,
    grain: int,
    zeroed: bool,
    words: Sequence[str],
    depth: int,
    warn: Tell,
) -> None:
    """Hold what a disk will be against what a product takes.

    ``words`` are the types of all its extents; ``depth`` counts the links below.  OptionError tells what is
    not taken.
    """
    title = product.title
    if zeroed and not product.zeroed_grain:
        why = f"--zeroed-grain is not for {title}: it refuses the header version 2 that comes with it"
        raise OptionError(None, why=why, hint="leave --zeroed-grain out")
    if product.most_extents is not None and len(words) > product.most_extents:
        why = f"{len(words)} extents are more than {title} reads from a descriptor"
        hint = "make them larger with --extent-size, or choose another --type"
        raise OptionError(None, why=why, hint=hint)
    for word in words:
        if product.words is not None and word not in product.words:
            why = f"{word} extents are not for {title}: it reads {', '.join(product.words)} and nothing else"
            raise OptionError(None, why=why)
    if product.is_vmware and kind.word == "SPARSE" and grain > _MAX_VMWARE_GRAIN:
        warn(
            f"VMware's open tools take grains of up to {format_size(_MAX_VMWARE_GRAIN)}, "
            f"and this one is {format_size(grain)}"
        )
    if product.most is not None and size > product.most:
        warn(f"the largest disk of {title} is {format_size(product.most)}")
    if product.is_vmware and depth >= _VMWARE_SNAPSHOTS:
        warn(f"{depth} links stand below it, and VMware's products take {_VMWARE_SNAPSHOTS}")
