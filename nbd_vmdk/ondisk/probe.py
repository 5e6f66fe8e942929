"""What a file is, by its first bytes: magic first, then text; names and type words come later."""

from enum import Enum
from typing import Final

from nbd_vmdk.ondisk import cowd, hosted, sesparse
from nbd_vmdk.ondisk.descriptor import looks_like_descriptor

#: Bytes from the start of a file that :func:`identify` wants to see.
PROBE_LENGTH: Final = 8192

_TAR_MAGIC_AT: Final = 257
_VDI_MAGIC: Final = b"\x7f\x10\xda\xbe"
_VDI_MAGIC_AT: Final = 64
_BY_QEMU: Final = (
    'make a VMDK of it: qemu-nbd --fork -r -k "$PWD/s" FILE && '
    "nbd-vmdk convert 'nbd+unix:///?socket=s' new.vmdk"
)
_OTHERS: Final = (
    (b"\x1f\x8b", "gzip-compressed data", "decompress it first: gunzip -k FILE"),
    (b"PK\x03\x04", "a zip archive", "unpack it first and serve the .vmdk inside"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", "unpack it first and serve the .vmdk inside"),
    (b"BZh", "bzip2-compressed data", "decompress it first: bunzip2 -k FILE"),
    (b"\xfd7zXZ\x00", "xz-compressed data", "decompress it first: unxz -k FILE"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed data", "decompress it first: unzstd FILE"),
    (b"QFI\xfb", "a qcow2 image", _BY_QEMU),
    (b"vhdxfile", "a VHDX image", _BY_QEMU),
    (b"conectix", "a VHD image", _BY_QEMU),
    (b"\x7fELF", "a program", None),
    (b"<!DOCTYPE", "a web page", "the download gave a page instead of the disk: get the file again"),
    (b"<!doctype", "a web page", "the download gave a page instead of the disk: get the file again"),
    (b"<html", "a web page", "the download gave a page instead of the disk: get the file again"),
    (b"<HTML", "a web page", "the download gave a page instead of the disk: get the file again"),
    (b"<?xml", "an XML file, perhaps an OVF", "name the .vmdk beside it"),
)
_CTK_MAGIC: Final = b"\xa2\x72\x19\xf6"


class FileKind(Enum):
    """The kinds of file that take part in a VMDK, and the ways not to."""

    HOSTED = "hosted sparse extent"
    UNFINISHED = "hosted sparse extent whose writing never finished"
    COWD = "COWD extent"
    SESPARSE = "seSparse extent"
    DESCRIPTOR = "descriptor"
    CHANGE_TRACKING = "change-tracking file"
    TAR = "tar archive (OVA)"
    EMPTY = "empty file"
    OTHER = "something else"


def identify(head: bytes) -> FileKind:
    """The kind of a file whose first :data:`PROBE_LENGTH` bytes (or all, if fewer) are ``head``."""
    for magic, kind in (
        (hosted.MAGIC, FileKind.HOSTED),
        (hosted.MAGIC_UNFINISHED, FileKind.UNFINISHED),
        (cowd.MAGIC, FileKind.COWD),
        (sesparse.MAGIC, FileKind.SESPARSE),
        (_CTK_MAGIC, FileKind.CHANGE_TRACKING),
    ):
        if head.startswith(magic):
            return kind
    if not head:
        return FileKind.EMPTY
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return FileKind.TAR
    if looks_like_descriptor(head):
        return FileKind.DESCRIPTOR
    return FileKind.OTHER


def describe_other(head: bytes) -> tuple[str, str | None]:
    """What a file of kind OTHER seems to be, and a hint, for a message; FILE in it is the file's name."""
    for magic, what, hint in _OTHERS:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(magic):
            return what, hint
    if head[_VDI_MAGIC_AT : _VDI_MAGIC_AT + 4] == _VDI_MAGIC:
        return "a VDI image", _BY_QEMU
    if not any(head):
        return "zeros where a header should be", None
    return "not a VMDK, nor anything else that is known", None
