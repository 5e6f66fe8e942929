"""One link: its descriptor, and each of its extents by what its file really is."""

from dataclasses import dataclass, field
from typing import Final

from nbd_vmdk.cache import Cache
from nbd_vmdk.errors import FileMissing, FormatError, TrustError, Unsupported, VmdkError
from nbd_vmdk.look import embedded_text, head_of, spellings
from nbd_vmdk.ondisk.descriptor import (
    MAX_DESCRIPTOR,
    Descriptor,
    ExtentLine,
)
from nbd_vmdk.ondisk.hosted import HostedHeader, parse_header
from nbd_vmdk.ondisk.probe import FileKind, identify
from nbd_vmdk.opener import open_link, own_line
from nbd_vmdk.ops.check.context import Context, Subject
from nbd_vmdk.ops.check.descriptor import check_descriptor, report_lost
from nbd_vmdk.ops.check.findings import ImageFile, Repair, Resize, Text
from nbd_vmdk.ops.check.lines import NOT_OPEN, SPARSE_KINDS, check_size, report_missing
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.storage.folder import Folder
from nbd_vmdk.units import MIB, SECTOR

_ELSEWHERE: Final = {"VMFSRDM": "on a LUN", "VSANSPARSE": "in a vSAN object"}
_BY_HAND: Final = "the text must be mended by hand"


@dataclass(slots=True)
class LinkFacts:
    """What is known of a link once it has been checked.

    file      the file that was opened
    folder    where the files that its descriptor names are looked for
    text      its descriptor, None if there is none to go by
    sectors   its size
    files     identities of all its files -> (storage of the check, file)
    """

    file: ImageFile
    folder: Folder
    text: Text | None = None
    sectors: int = 0
    files: dict[tuple[int, ...], ImageFile] = field(default_factory=dict)


class LinkCheck:
    """The check of one link.  ``probe`` says to look for other processes that write its files."""

    def __init__(
        self, context: Context, folder: Folder, name: str, depth: int, *, probe: bool, has_parent: bool
    ) -> None:
        self._context = context
        self._folder = folder
        self._name = name
        self._depth = depth
        self._probe = probe
        self._has_parent = has_parent
        #: Parts of files that something lies in: (begin, end, are they raw data).
        self._ranges: dict[tuple[int, ...], list[tuple[int, int, bool]]] = {}
        self.in_use: list[str] = []

    def run(self) -> LinkFacts:
        """Check the link; what is wrong becomes findings.

        Raises what opening it raises, if the file is no VMDK, or none that is supported.
        """
        storage = self._folder.open(self._name)
        try:
            file = ImageFile.of(storage, self._folder, self._name)
            self.facts = LinkFacts(file, self._folder.folder_of(self._name))
            self._note(storage, file)
            self._run(storage, file)
        finally:
            storage.close()
        return self.facts

    def _note(self, storage: Storage, file: ImageFile) -> None:
        """Remember a file of the link, and whether somebody writes it."""
        if file.identity in self.facts.files:
            return
        self.facts.files[file.identity] = file
        writer = storage.writer() if self._probe else None
        if writer is not None:
            self.in_use.append(f"{storage.name}: another process is {writer}")

    def _subject(
        self, file: ImageFile, storage: Storage, start: int = 0, sectors: int | None = None
    ) -> Subject:
        return Subject(self._context, file, storage, start, sectors, self._has_parent, self._depth)

    def _run(self, storage: Storage, file: ImageFile) -> None:
        head = head_of(storage)
        kind = identify(head)
        subject = self._subject(file, storage)
        if kind is FileKind.DESCRIPTOR:
            text = storage.read(0, min(storage.size, MAX_DESCRIPTOR + 1))
            self._described(subject, text, None)
        elif kind is FileKind.HOSTED:
            self._hosted(subject, head)
        elif kind in SPARSE_KINDS:
            self._refuse_extents()
            subject.warning(
                "no-descriptor",
                "an extent without its descriptor",
                "it can only be read, as it is; what its holes show is in a parent that is not known",
                "the descriptor must be found",
            )
            self._sparse(subject, kind, None)
        else:
            self._unknown(subject)

    def _refuse_extents(self) -> None:
        """Raise what opening raises for a file that is only a part of a disk, if it is that."""
        options = OpenOptions(locks=False, ignore_cid=True)
        try:
            open_link(self._folder, self._name, options, Cache(MIB), writable=False).close()
        except (FormatError, Unsupported) as error:
            if error.slug in ("not-vmdk", "unsupported"):
                raise

    def _unknown(self, subject: Subject) -> None:
        """A file that looks like nothing: a compressed extent whose header is gone still has its footer."""
        from nbd_vmdk.ops.check.hosted import check_hosted, find_footer

        if find_footer(subject.storage) is None:
            self._refuse_extents()
            raise Unsupported(subject.file.label, what="nothing here that could be checked")
        header = check_hosted(subject)
        if header is not None:
            self.facts.sectors = header.capacity_sectors

    def _hosted(self, subject: Subject, head: bytes) -> None:
        """A hosted extent that was named itself: with a descriptor inside, or without one."""
        header = _tolerant_header(head, subject.file.label)
        if header is None:
            self._sparse(subject, FileKind.HOSTED, None)
            return
        # Imported here because it needs numpy.
        from nbd_vmdk.ops.check.places import with_text

        there = with_text(subject.storage, header)
        text = b"" if there is None else embedded_text(subject.storage, there)
        if there is None or not text:
            self._refuse_extents()
            report_lost(subject, there, header, self._folder, self._name, None)
            self._sparse(subject, FileKind.HOSTED, None)
            return
        self._described(subject, text, there)

    def _described(self, subject: Subject, raw: bytes, header: HostedHeader | None) -> None:
        """A link by its descriptor; ``header`` is that of the extent around it."""
        label = subject.file.label
        at = 0 if header is None else header.descriptor_sector * SECTOR
        room = None if header is None else header.descriptor_sectors * SECTOR
        try:
            descriptor = Descriptor.parse(raw, label)
        except Unsupported:
            raise
        except VmdkError as error:
            if header is None:
                subject.error("bad-descriptor", error.message, NOT_OPEN, _BY_HAND)
            else:
                report_lost(subject, header, header, self._folder, self._name, error.message)
                self._sparse(subject, FileKind.HOSTED, None)
            return
        if descriptor.encrypted or descriptor.native_snapshot:
            self._refuse_extents()
        if room is None and subject.storage.size > len(descriptor.to_bytes()):
            room = subject.storage.size  # NULs behind the text
        text = Text(subject.file, descriptor, at, room)
        self.facts.text = text
        self.facts.sectors = descriptor.total_sectors
        self._has_parent = subject.child = self._has_parent or descriptor.has_parent
        check_descriptor(subject, text, self.facts.folder)
        lines = [line for line in descriptor.extents if line.sectors]
        if not lines:
            subject.error("bad-descriptor", "the descriptor names no extents", NOT_OPEN, _BY_HAND)
        own = (
            None if header is None or header.is_wrapper or not lines else own_line(self._name, lines, header)
        )
        if own is None:
            self._ranges[subject.file.identity] = [(0, subject.storage.size, False)]
        start = 0
        for line in lines:
            self._line(subject, text, line, start, is_own=line is own)
            start += line.sectors * SECTOR

    def _line(self, link: Subject, text: Text, line: ExtentLine, start: int, *, is_own: bool) -> None:
        """One extent line."""
        if is_own:
            self._extent(self._subject(link.file, link.storage, start, line.sectors), text, line)
            return
        if line.type == "ZERO" or line.access == "NOACCESS":
            return
        if line.type in _ELSEWHERE or line.name is None:
            where = _ELSEWHERE.get(line.type)
            what = f"line {line.line}: a {line.type} extent names no file"
            if where is not None:
                what = f"line {line.line}: the data of {line.name} lies {where}, not in a file"
            link.error("unsupported", what, NOT_OPEN, "it can't be had from here", guest=start)
            return
        try:
            storage, name = _open_named(self._folder, line.name)
        except FileMissing:
            report_missing(link, text, self.facts.folder, line, start)
            return
        except VmdkError as error:
            link.error(error.slug, str(error), NOT_OPEN, error.hint or _BY_HAND, guest=start)
            return
        try:
            file = ImageFile.of(storage, self._folder, name)
            self._note(storage, file)
            self._extent(self._subject(file, storage, start, line.sectors), text, line)
        finally:
            storage.close()

    def _extent(self, subject: Subject, text: Text, line: ExtentLine) -> None:
        """An extent whose file is there."""
        try:
            if line.is_raw:
                self._flat(subject, line)
                return
            head = head_of(subject.storage)
            kind = identify(head)
            if kind not in SPARSE_KINDS:
                from nbd_vmdk.ops.check.hosted import find_footer

                if find_footer(subject.storage) is None:
                    what = (
                        f"the file is no {line.type} extent: it begins with {head[:4].hex(' ') or 'nothing'}"
                    )
                    why = "the right file must be put in its place"
                    subject.error("extent-kind", what, NOT_OPEN, why, guest=subject.start)
                    return
            elif SPARSE_KINDS[kind] != line.type and (kind, line.type) != (FileKind.COWD, "SPARSE"):
                what = f"the file is a {kind.value}, and line {line.line} calls it {line.type}"
                effect = "none here; other readers refuse it, or misread it"
                subject.warning("extent-kind", what, effect, _BY_HAND)
            self._claim(subject, (0, subject.storage.size), is_raw=False)
            self._sparse(subject, kind, (text, line))
        except VmdkError as error:
            # A table that is out of reach although it looked in order: the file is changing.
            again = "check it again when nobody writes it"
            subject.error(error.slug, str(error), "the check of this file stopped here", again)

    def _claim(self, subject: Subject, part: tuple[int, int], *, is_raw: bool) -> bool:
        """Note which bytes of a file an extent takes; two extents must not share any.  Whether none does."""
        others = self._ranges.setdefault(subject.file.identity, [])
        shared = [raw for begin, end, raw in others if part[0] < end and begin < part[1]]
        if shared and all(shared) and is_raw:
            what = "two extent lines name the same part of this file"
            effect = "both parts of the disk show the same data, and a write to either would change both"
            subject.warning("extents-overlap", what, effect, _BY_HAND, guest=subject.start)
        elif shared:
            what = "two extent lines name this file, and it holds more than the raw data of one"
            effect = "a write to one place of the disk would change where another is found"
            subject.error("extents-overlap", what, effect, _BY_HAND, guest=subject.start)
        others.append((*part, is_raw))
        return not shared

    def _flat(self, subject: Subject, line: ExtentLine) -> None:
        """A piece of a raw file must be in the file."""
        begin = line.offset_sectors * SECTOR
        end = begin + line.sectors * SECTOR
        size = subject.storage.size
        alone = self._claim(subject, (begin, end), is_raw=True)
        if end <= size:
            if alone and not getattr(subject.storage, "is_device", False):
                subject.check_whole_sectors(tail_is_data=False)
            return
        subject.error(
            "file-short",
            f"the file has {size} bytes, and line {line.line} of the descriptor needs {end}",
            f"the last {min(end - size, end - begin)} bytes of the extent are lost",
            Repair(f"lengthen it to {end} bytes", (Resize(subject.file, end),), "what is lost becomes zeros"),
            guest=subject.start + max(size - begin, 0),
        )

    def _sparse(self, subject: Subject, kind: FileKind, described: tuple[Text, ExtentLine] | None) -> None:
        """An extent with tables; its kind is what its magic says."""
        # These need numpy, which takes a tenth of a second to come.
        from nbd_vmdk.ops.check.cowd import check_cowd
        from nbd_vmdk.ops.check.hosted import check_hosted
        from nbd_vmdk.ops.check.sesparse import check_sesparse

        grain = 1
        if kind is FileKind.COWD:
            cowd = check_cowd(subject)
            capacity, grain = (None, 1) if cowd is None else (cowd.capacity_sectors, cowd.grain_sectors)
        elif kind is FileKind.SESPARSE:
            sesparse = check_sesparse(subject)
            capacity = None if sesparse is None else sesparse.capacity_sectors
            grain = 1 if sesparse is None else sesparse.grain // SECTOR
        else:
            hosted = check_hosted(subject)
            capacity, grain = (None, 1) if hosted is None else (hosted.capacity_sectors, hosted.grain_sectors)
        if capacity is None:
            return
        if described is None:
            self.facts.sectors = self.facts.sectors or capacity
        else:
            check_size(subject, *described, capacity, grain)


def _open_named(folder: Folder, name: str) -> tuple[Storage, str]:
    """Open an extent as the opener does: as written, with slashes turned, or beside the descriptor."""
    first: VmdkError | None = None
    for spelling in spellings(name):
        try:
            return folder.open(spelling), spelling
        except (FileMissing, TrustError) as error:
            first = first or error
    assert first is not None
    raise first


def _tolerant_header(head: bytes, label: str) -> HostedHeader | None:
    """The header of a hosted extent, line-end bytes disregarded; None if it is damaged otherwise."""
    from nbd_vmdk.ondisk.hosted import NEWLINES

    try:
        return parse_header(head[:73] + NEWLINES + head[77:], label)
    except VmdkError:
        return None
