"""Appliances: tar and our own reader open them, the manifest holds, VMware's order of members is kept."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tarfile
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from nbd_vmdk import Work, convert, open_disk
from nbd_vmdk.ops.ova import tar_header
from nbd_vmdk.units import GIB, MIB
from tests.convert import qemu_raw, raw_file
from tests.images.content import Content

OVF = "{http://schemas.dmtf.org/ovf/envelope/1}"
RASD = "{http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData}"


@pytest.mark.parametrize(
    ("adapter", "hwversion", "sums"),
    [("lsilogic", 10, "sha1"), ("ide", 14, "sha256"), ("buslogic", 15, "sha512")],
)
def test_appliance(tmp_path: Path, adapter: str, hwversion: int, sums: str) -> None:
    content = Content.random(5 * MIB, 1)
    raw = raw_file(tmp_path / "a.raw", content)
    made = tmp_path / "My VM & co.ova"
    convert(raw, made, create={"adapter": adapter, "hwversion": hwversion}, work=Work(verify=True))

    with open_disk(made) as disk:
        assert disk.pread(disk.size, 0) == content.read()
        assert disk.links[0].create_type == "streamOptimized"

    subprocess.run(["tar", "xf", made], cwd=tmp_path, check=True)
    names = subprocess.check_output(["tar", "tf", made], text=True).split("\n")[:-1]
    stem = "My-VM---co"
    assert names == [f"{stem}.ovf", f"{stem}.mf", f"{stem}-disk1.vmdk"]
    assert made.stat().st_size % 10240 == 0
    lines = (tmp_path / names[1]).read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        match = re.fullmatch(rf"{sums.upper()}\((.+)\)= ([0-9a-f]+)", line)
        assert match is not None
        assert hashlib.new(sums, (tmp_path / match[1]).read_bytes()).hexdigest() == match[2]
    assert qemu_raw(str(tmp_path / names[2]), tmp_path / "q.raw") == content.read()

    root = ET.fromstring((tmp_path / names[0]).read_bytes())
    file = root.find(f"{OVF}References/{OVF}File")
    disk_ = root.find(f"{OVF}DiskSection/{OVF}Disk")
    assert file is not None
    assert disk_ is not None
    assert file.get(f"{OVF}href") == names[2]
    assert int(file.get(f"{OVF}size", "")) == (tmp_path / names[2]).stat().st_size
    assert int(disk_.get(f"{OVF}capacity", "")) == content.size
    assert disk_.get(f"{OVF}fileRef") == file.get(f"{OVF}id")
    assert disk_.get(f"{OVF}format", "").endswith("vmdk.html#streamOptimized")
    items = root.findall(f".//{OVF}VirtualHardwareSection/{OVF}Item")
    fields = [{field.tag.removeprefix(RASD): field.text for field in item} for item in items]
    for item in items:
        tags = [field.tag for field in item]
        assert tags == sorted(tags), "the schema wants the fields in the order of the alphabet"
    (controller,) = [item for item in fields if item["ResourceType"] in ("5", "6")]
    assert controller.get("ResourceSubType") == (None if adapter == "ide" else adapter)
    (drive,) = [item for item in fields if item["ResourceType"] == "17"]
    assert drive["HostResource"] == f"ovf:/disk/{disk_.get(f'{OVF}diskId')}"
    assert drive["Parent"] == controller["InstanceID"]


def test_back_from_an_appliance(tmp_path: Path) -> None:
    content = Content.random(3 * MIB, 2)
    convert(raw_file(tmp_path / "a.raw", content), tmp_path / "a.ova")
    convert(tmp_path / "a.ova", tmp_path / "b.raw")
    assert (tmp_path / "b.raw").read_bytes() == content.read()
    convert(f"{tmp_path}/a.ova:a-disk1.vmdk", tmp_path / "c.raw")
    assert (tmp_path / "c.raw").read_bytes() == content.read()


@pytest.mark.parametrize("size", [0, 512, 8 * GIB - 512, 8 * GIB, 1900 * GIB])
def test_tar_header(size: int) -> None:
    header = tar_header("disk.vmdk", size)
    assert len(header) == 512
    info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")  # checks its sum
    assert (info.name, info.size, info.isreg()) == ("disk.vmdk", size, True)
