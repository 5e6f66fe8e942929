"""``nbd-vmdk doctor``: what this installation has, and what mends what it lacks."""

import sys

import click

from nbd_vmdk.cli import output
from nbd_vmdk.cli.opening import json_option

#: What is said of a check that is (ok, required), and in which colour.
_WORDS = {
    (True, True): ("ok", "green"),
    (True, False): ("ok", "green"),
    (False, True): ("error", "red"),
    (False, False): ("warning", "yellow"),
}


@click.command(short_help="Look whether all is there that serving needs.")
@json_option
def doctor(as_json: bool) -> int:
    """Look whether all is there that serving needs; say what mends the rest.

    Exit code: 0 all is there, 1 something required is missing, 4 only something optional is.
    """
    from nbd_vmdk.doctor import checks, exit_code

    found = []
    for check in checks():
        found.append(check)
        if as_json:
            continue
        word, colour = _WORDS[check.ok, check.required]
        mark = f"{word:<9}"
        mark = click.style(mark, fg=colour) if output.colourful(sys.stdout) else mark
        output.line(f"{mark}{check.name:<24}{output.clean(check.found)}")
        if check.mend is not None:
            output.line(f"{'':<33}{output.clean(check.mend)}")
        sys.stdout.flush()
    if as_json:
        output.json_object({"checks": [check.as_dict() for check in found]})
    return exit_code(found)
