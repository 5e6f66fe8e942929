"""Entries that say "zeros" in a file whose header does not declare what that value means."""

from nbd_vmdk.ondisk.hosted import FLAG_ZEROED_GRAINS, FLAGS_AT, VERSION_AT, HostedHeader
from nbd_vmdk.ops.check.entries import Rules, Survey
from nbd_vmdk.ops.check.findings import Repair, Stage


def report_zeros(rules: Rules, header: HostedHeader, found: Survey, entries: int, footer: int = 0) -> None:
    """Value 1 needs a flag that declares its meaning; ``footer`` is the byte of the header's copy."""
    if not found.zeros or header.zeroed_grains:
        return
    subject = rules.subject
    table, entry = divmod(found.first_zero, entries)
    flags = (header.flags | FLAG_ZEROED_GRAINS).to_bytes(4, "little")
    changes = []
    for at in (0, footer) if footer else (0,):
        changes.append(subject.write(at + FLAGS_AT, flags, Stage.POINTERS))
        if header.version < 2:
            changes.append(subject.write(at + VERSION_AT, (2).to_bytes(4, "little"), Stage.POINTERS))
    subject.warning(
        "undeclared-zeros",
        f"{found.zeros} entries say that a grain is zeros, in a file whose header does not declare that",
        "none here; QEMU shows the descriptor in their place",
        Repair(
            "declare them in the header (version 2, which VirtualBox does not open)"
            if header.version < 2
            else "declare them in the header",
            tuple(changes),
        ),
        table=table,
        entry=entry,
        guest=rules.guest(found.first_zero),
    )
