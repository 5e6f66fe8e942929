"""``nbd-vmdk serve``: an image on the network, until a signal or the end of a command."""

from typing import Any

import click

from nbd_vmdk.cli.opening import image_argument, json_option, open_options, serve_options
from nbd_vmdk.errors import OptionError


@click.command(short_help="Serve an image over NBD and print its URI.")
@click.option("-r", "--read-only", is_flag=True, help="Serve for reading only; nothing is changed.")
@click.option("--socket", type=click.Path(), metavar="PATH", help="Listen on this unix socket.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    help="Listen on this TCP port; 0 takes any free one.",
)
@click.option("--bind", metavar="ADDR", help="With --port: listen on this address.  [default: 127.0.0.1]")
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Requests of one connection taken at once.  [default: 8]",
)
@click.option("--run", "command", metavar="CMD", help="Run CMD by the shell with $uri set, then end.")
@click.option("--pidfile", type=click.Path(), metavar="FILE", help="Write the server's process ID to FILE.")
@open_options
@serve_options
@json_option
@image_argument
def serve(image: str, command: str | None, as_json: bool, **options: Any) -> int:
    """Serve IMAGE over NBD; print the URI; stay until SIGINT or SIGTERM.

    Without --socket or --port the server listens on a private unix socket.  It is writable unless -r is
    given or the kind of the image can't be written.

    With --run the server lasts as long as CMD, which finds $uri, $unixsocket and $port in its environment,
    and whose exit code is passed on.
    """
    if command is not None and as_json:
        raise OptionError(None, why="--run leaves stdout to the command, so --json has no place")
    import asyncio

    from nbd_vmdk.cli.serving import serve_until_told

    return asyncio.run(serve_until_told(image, options, command=command, as_json=as_json))
