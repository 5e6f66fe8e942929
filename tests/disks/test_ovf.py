"""Envelopes: which disks they name, in which order, and what a hostile one may not do."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_vmdk.errors import FormatError
from nbd_vmdk.ondisk.ovf import MAX_ENVELOPE, parse_envelope

NS = "http://schemas.dmtf.org/ovf/envelope/1"


def envelope(
    files: str = "", disks: str = "", items: str = "", *, head: str = '<?xml version="1.0"?>', ns: str = NS
) -> bytes:
    return (
        f'{head}<Envelope xmlns="{ns}" xmlns:ovf="{ns}" xmlns:rasd="urn:rasd">'
        f"<References>{files}</References><DiskSection><Info>x</Info>{disks}</DiskSection>"
        f'<VirtualSystem ovf:id="vm"><VirtualHardwareSection>{items}</VirtualHardwareSection></VirtualSystem>'
        "</Envelope>"
    ).encode()


def file(number: int, href: str) -> str:
    return f'<File ovf:id="f{number}" ovf:href="{href}" ovf:size="1"/>'


def disk(number: int, more: str = 'ovf:capacity="1"') -> str:
    return f'<Disk ovf:diskId="d{number}" ovf:fileRef="f{number}" {more}/>'


def item(resource: str, kind: int = 17, tag: str = "Item") -> str:
    return (
        f"<{tag}><rasd:HostResource>{resource}</rasd:HostResource>"
        f"<rasd:ResourceType>{kind}</rasd:ResourceType></{tag}>"
    )


FILES = file(1, "a.vmdk") + file(2, "b.vmdk") + file(3, "c.vmdk") + file(4, "d.iso")
DISKS = disk(1) + disk(2) + disk(3)


def hrefs(raw: bytes) -> list[str]:
    return [found.href for found in parse_envelope(raw, "x.ovf")]


def test_order_is_the_hardwares() -> None:
    items = item("ovf:/disk/d3") + item("ovf:/file/f4", 15) + item("/disk/d1", 17, "StorageItem")
    assert hrefs(envelope(FILES, DISKS, items)) == ["c.vmdk", "a.vmdk", "b.vmdk"]
    assert hrefs(envelope(FILES, DISKS)) == ["a.vmdk", "b.vmdk", "c.vmdk"]
    assert hrefs(envelope(FILES, "", item("ovf:/file/f2"))) == ["b.vmdk"]
    assert hrefs(envelope(FILES)) == ["a.vmdk", "b.vmdk", "c.vmdk"]
    assert hrefs(envelope()) == []
    twice = item("ovf:/disk/d2") * 2
    assert hrefs(envelope(FILES, DISKS, twice)) == ["b.vmdk", "a.vmdk", "c.vmdk"]


def test_blank_disks_and_parents() -> None:
    disks = '<Disk ovf:diskId="d9" ovf:capacity="5"/>' + disk(1) + disk(2, 'ovf:parentRef="d1"')
    assert hrefs(envelope(FILES, disks, item("ovf:/disk/d9") + item("ovf:/disk/d2"))) == ["b.vmdk"]


def test_attributes_without_prefix_and_old_envelopes() -> None:
    old = "http://www.vmware.com/schema/ovf/1/envelope"
    raw = envelope('<File id="f1" href="a.vmdk"/>', '<Disk diskId="d1" fileRef="f1" capacity="7"/>', ns=old)
    (found,) = parse_envelope(raw, "x.ovf")
    assert (found.id, found.href, found.capacity) == ("d1", "a.vmdk", 7)
    other = envelope('<File xmlns:x="urn:x" ovf:id="f1" ovf:href="a.vmdk" x:href="evil"/>', disk(1))
    assert hrefs(other) == ["a.vmdk"]


@pytest.mark.parametrize(
    ("said", "capacity"),
    [
        ('ovf:capacity="12"', 12),
        ('ovf:capacity="8" ovf:capacityAllocationUnits="byte * 2^30"', 8 << 30),
        ('ovf:capacity="8" ovf:capacityAllocationUnits="byte*10^3"', 8000),
        ('ovf:capacity="3" ovf:capacityAllocationUnits="MegaBytes"', 3 << 20),
        ('ovf:capacity="${size}"', None),
        ('ovf:capacity="-1"', None),
        ('ovf:capacity="1" ovf:capacityAllocationUnits="furlongs"', None),
        ('ovf:capacity="99999999999999999999999"', None),
        ("", None),
    ],
)
def test_capacity(said: str, capacity: int | None) -> None:
    assert parse_envelope(envelope(FILES, disk(1, said)), "x")[0].capacity == capacity


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "gbk"])
def test_encodings(codec: str) -> None:
    label = {"utf-8-sig": "UTF-8", "cp1252": "windows-1252", "utf-16": "UTF-16"}.get(codec, codec)
    name = "磁盘.vmdk" if codec == "gbk" else "Größe.vmdk"
    text = envelope(file(1, name), disk(1), head=f'<?xml version="1.0" encoding="{label}"?>').decode()
    assert hrefs(text.encode(codec)) == [name]


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(10)
)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (envelope(FILES, DISKS, head=BOMB + "]>"), "document type"),
        (envelope(head='<!DOCTYPE x SYSTEM "file:///etc/passwd">'), "document type"),
        (envelope(head='<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'), "document type"),
        (envelope("&e;"), "undefined entity"),
        (b"<Envelope>" * 1000, "far too"),
        (b"<Envelope>" + b"<a/>" * 200_001 + b"</Envelope>", "far too"),
        (b" " * (MAX_ENVELOPE + 1), "which none needs"),
        (envelope(FILES, DISKS)[:-5], "is no XML"),
        (b"", "is no XML"),
        (b"<html><body/></html>", "not an OVF"),
        (envelope(file(1, "a") + file(1, "b")), "two files"),
        (envelope(FILES, disk(1) + disk(1, 'ovf:capacity="2"')), "two disks"),
        (envelope("", DISKS), "not listed"),
        (envelope("".join(file(n, f"{n}.vmdk") for n in range(1001))), "1001 disks"),
        (envelope(FILES, "", item("ovf:/disk/dx")), "does not list"),
        (envelope(FILES, "", item("ovf:/file/fx")), "does not list"),
        (envelope(head='<?xml version="1.0" encoding="zlib_codec"?>'), "not known"),
        (envelope(head='<?xml version="1.0" encoding="UTF-16"?>'), "not known"),
        (envelope(file(1, "ü")).replace("ü".encode(), b"\xfc"), "not in utf-8"),
    ],
)
def test_what_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        parse_envelope(raw, "x.ovf")


PIECES = st.sampled_from(
    [FILES, DISKS, item("ovf:/disk/d2"), "<a>", "</a>", "&lt;", "\0", "<![CDATA[", "]]>", "ü"]
)


@given(st.lists(PIECES, max_size=8).map("".join), st.lists(PIECES, max_size=8).map("".join))
def test_any_text_is_an_answer_or_an_error(one: str, two: str) -> None:
    with contextlib.suppress(FormatError):
        for found in parse_envelope(envelope(one, two), "x.ovf"):
            assert found.href
