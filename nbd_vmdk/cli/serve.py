"""``nbd-vmdk serve``: images on the network, until a signal or the end of a command."""

from typing import Any

import click

from nbd_vmdk.cli.opening import ImagePath, Number, json_option, open_options, serve_options
from nbd_vmdk.errors import OptionError


def _mode(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """Permissions as chmod takes them in digits."""
    if text is None:
        return None
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{text!r} is no mode such as 0660", context, parameter)
    return mode


@click.command(short_help="Serve images, a VM or an appliance over NBD and print the URIs.")
@click.option("-r", "--read-only", is_flag=True, help="Serve for reading only; nothing is changed.")
@click.option(
    "--snapshot", metavar="NAME", help="Of a .vmx or .vmsd: the disks of this snapshot (name or number)."
)
@click.option("--skip-broken", is_flag=True, help="Leave out what can't be opened, and serve the rest.")
@click.option(
    "--scratch", is_flag=True, help="Leave the images as they are; what is written vanishes at the end."
)
@click.option(
    "--scratch-dir",
    type=click.Path(),
    metavar="DIR",
    help="With --scratch: keep what is written here meanwhile.  [default: $TMPDIR or /var/tmp]",
)
@click.option(
    "--overlay",
    type=click.Path(),
    metavar="CHILD",
    help="Leave the image as it is; writes go to this child link, a new one or an earlier one.",
)
@click.option("--socket", type=click.Path(), metavar="PATH", help="Listen on this unix socket.")
@click.option(
    "--socket-mode", callback=_mode, metavar="MODE", help="With --socket: its permissions, such as 0660."
)
@click.option("--socket-group", metavar="GROUP", help="With --socket: the group that it belongs to.")
@click.option(
    "--port",
    type=Number(0, 65535),
    metavar="N",
    help="Listen on this TCP port; 0 takes any free one.",
)
@click.option("--bind", metavar="ADDR", help="With --port: listen on this address.  [default: 127.0.0.1]")
@click.option(
    "--vsock",
    type=Number(1, 2**32 - 2),
    metavar="PORT",
    help="Listen on this vsock port: for the guests of this machine, or for the host of this guest.",
)
@click.option(
    "--tls-certificates",
    type=click.Path(),
    metavar="DIR",
    help="Require TLS, with DIR's ca-cert.pem, server-cert.pem and server-key.pem.",
)
@click.option(
    "--tls-psk", type=click.Path(), metavar="FILE", help="Require TLS, with the pre-shared keys in FILE."
)
@click.option(
    "--tls-verify-peer",
    is_flag=True,
    help="With --tls-certificates: take only clients whose certificate ca-cert.pem vouches for.",
)
@click.option(
    "--insecure", is_flag=True, help="Listen where others can reach it without TLS: all is open to them."
)
@click.option(
    "--max-connections",
    type=Number(1),
    metavar="N",
    help="Refuse clients beyond so many at once.  [default: no limit]",
)
@click.option(
    "--stats",
    is_flag=True,
    help="Count requests, times and cache hits for 'nbd-vmdk stats'; show them at the end.",
)
@click.option(
    "--threads",
    type=Number(1, 1024),
    metavar="N",
    help="Requests of one connection taken at once: 16 for slow disks, 1 for images in memory.  [default: 8]",
)
@click.option(
    "--workers",
    type=Number(1, 64),
    default=1,
    metavar="N",
    help="With -r: serve with N processes, for many connections on many cores.  [default: 1]",
)
@click.option(
    "--no-restart",
    is_flag=True,
    help="End when nbdkit dies.  [default: start it again, 5 times in 5 minutes at most]",
)
@click.option(
    "--run", "command", metavar="CMD", help="Run CMD by the shell with $uri and $uris set, then end."
)
@click.option(
    "--pidfile",
    type=click.Path(),
    metavar="FILE",
    help="Have nbdkit's process ID in FILE as long as it answers; of several workers, the first one's.",
)
@open_options
@serve_options
@json_option
@click.argument("images", type=ImagePath(), metavar="IMAGE...", nargs=-1, required=True)
def serve(images: tuple[str, ...], command: str | None, as_json: bool, **options: Any) -> int:
    """Serve each IMAGE over NBD; print the URIs; stay until SIGINT or SIGTERM.

    IMAGE is a VMDK, a folder (its disks: all that are no extents and no parents), a .vmx (its disks in the
    order of its buses), a .vmsd with --snapshot, an .ovf or an .ova (read in place, nothing is unpacked).
    app.ova:disk1.vmdk is one disk of several.  Each disk is an export called like its file, with its folder
    before it where two are called the same; the first is also the default export.

    Without --socket, --port or --vsock the server listens on a private unix socket, or on the one that
    systemd hands over.  Disks are writable unless -r is given or the kind of the disk can't be written; those
    of appliances and snapshots are read-only.  With --scratch every disk can be written to, with --overlay
    the only one, and none changes.

    A port that other machines can reach needs TLS, or --insecure.

    Should nbdkit die, it is started again on the same address, and clients that connect anew go on, as QEMU
    does with reconnect-delay.  What they had written and not flushed may be lost, as in a power failure.

    With -r, --workers N lets N processes share the address: each new connection goes to one of them, so that
    several connections can use more than one core.  Each takes about 21 MiB and its share of --cache-size.
    When one dies the others go on.

    With --run the server lasts as long as CMD, which finds $uri (of the first disk), $uris (of all, blanks
    between), $unixsocket and $port in its environment, and whose exit code is passed on; but if nbdkit died
    meanwhile while disks could be written to, 0 becomes 1.
    """
    certificates, psk = options.pop("tls_certificates"), options.pop("tls_psk")
    verify = options.pop("tls_verify_peer")
    if command is not None and as_json:
        raise OptionError(None, why="--run leaves stdout to the command, so --json has no place")
    import asyncio

    from nbd_vmdk.cli.serving import serve_until_told
    from nbd_vmdk.serving.tls import ServerTls

    encrypted = certificates is not None or psk is not None or verify
    options["restart"] = not options.pop("no_restart")
    options["tls"] = ServerTls(certificates, psk, verify) if encrypted else None
    return asyncio.run(serve_until_told(images, options, command=command, as_json=as_json))
