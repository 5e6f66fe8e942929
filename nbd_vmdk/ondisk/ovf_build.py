"""The description of an appliance (OVF) and its manifest, as text.

What VMware's tools ask of one is little: the file and its size, the disk with its capacity and format, and a
machine whose controller has the disk.  How many processors and how much memory that machine gets is a
guess that whoever imports it changes.  Source: the OVF specification (DMTF DSP0243), envelope 1, and what
ovftool and open-vmdk's tools write.
"""

from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape, quoteattr

_FORMAT: Final = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
#: CIM's number and VMware's name of "some 64-bit system".
_OS_ID, _OS_TYPE = 102, "otherGuest64"
_PROCESSORS, _MEMORY_MIB = 1, 2048
#: The last virtual hardware before ESXi 6.5, and before ESXi 6.7 Update 2.
_LAST_SHA1, _LAST_SHA256 = 12, 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Appliance:
    """A machine with one disk.

    name       of the machine
    disk_file  the disk's file in the package, a plain name
    file_size  its bytes
    capacity   bytes of the disk
    populated  bytes of it that hold data
    adapter    ddb.adapterType of the disk
    hwversion  virtual hardware version
    """

    name: str
    disk_file: str
    file_size: int
    capacity: int
    populated: int
    adapter: str
    hwversion: int


def _item(**fields: object) -> str:
    lines = "".join(
        f"        <rasd:{key}>{escape(str(value))}</rasd:{key}>\n" for key, value in sorted(fields.items())
    )
    return f"      <Item>\n{lines}      </Item>\n"


def _controller(adapter: str) -> str:
    if adapter == "ide":
        return _item(
            Address=0, Description="IDE Controller", ElementName="IDE 0", InstanceID=3, ResourceType=5
        )
    kind = "buslogic" if adapter == "buslogic" else "lsilogic"
    return _item(
        Address=0,
        Description="SCSI Controller",
        ElementName="SCSI 0",
        InstanceID=3,
        ResourceSubType=kind,
        ResourceType=6,
    )


def build_ovf(appliance: Appliance) -> bytes:
    """The description; its elements are in the order that the schema asks for."""
    name, file = quoteattr(appliance.name), quoteattr(appliance.disk_file)
    items = (
        _item(
            AllocationUnits="hertz * 10^6",
            Description="Number of Virtual CPUs",
            ElementName=f"{_PROCESSORS} virtual CPU(s)",
            InstanceID=1,
            ResourceType=3,
            VirtualQuantity=_PROCESSORS,
        )
        + _item(
            AllocationUnits="byte * 2^20",
            Description="Memory Size",
            ElementName=f"{_MEMORY_MIB}MB of memory",
            InstanceID=2,
            ResourceType=4,
            VirtualQuantity=_MEMORY_MIB,
        )
        + _controller(appliance.adapter)
        + _item(
            AddressOnParent=0,
            ElementName="Hard Disk 1",
            HostResource="ovf:/disk/vmdisk1",
            InstanceID=4,
            Parent=3,
            ResourceType=17,
        )
    )
    text = f"""<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
    xmlns:cim="http://schemas.dmtf.org/wbem/wscim/1/common"
    xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
    xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
    xmlns:vmw="http://www.vmware.com/schema/ovf"
    xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
    xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
  <References>
    <File ovf:href={file} ovf:id="file1" ovf:size="{appliance.file_size}"/>
  </References>
  <DiskSection>
    <Info>Virtual disk information</Info>
    <Disk ovf:capacity="{appliance.capacity}" ovf:capacityAllocationUnits="byte" ovf:diskId="vmdisk1"
        ovf:fileRef="file1" ovf:format="{_FORMAT}" ovf:populatedSize="{appliance.populated}"/>
  </DiskSection>
  <VirtualSystem ovf:id={name}>
    <Info>A virtual machine</Info>
    <Name>{escape(appliance.name)}</Name>
    <OperatingSystemSection ovf:id="{_OS_ID}" vmw:osType="{_OS_TYPE}">
      <Info>The kind of installed guest operating system</Info>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Virtual hardware requirements</Info>
      <System>
        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>{escape(appliance.name)}</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>vmx-{appliance.hwversion:02}</vssd:VirtualSystemType>
      </System>
{items}    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"""
    return text.encode()


def manifest_hash(hwversion: int) -> str:
    """What the files of an appliance for that virtual hardware are summed with, as hashlib calls it.

    Products that know no newer hardware than this may know no newer sum either, and say that the manifest is
    invalid; so VMware's open-vmdk takes the sum that came with the hardware, and this is its choice.
    """
    if hwversion <= _LAST_SHA1:
        return "sha1"
    return "sha256" if hwversion <= _LAST_SHA256 else "sha512"


def build_manifest(kind: str, digests: dict[str, str]) -> bytes:
    """The manifest, from file names and the ``kind`` of sum of each in hex."""
    return "".join(f"{kind.upper()}({name})= {digest}\n" for name, digest in digests.items()).encode()
