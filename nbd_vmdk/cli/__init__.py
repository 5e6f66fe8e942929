"""The command line: ``nbd-vmdk VERB IMAGE``.

Each verb is a thin module that asks the engine and shows the answer.  Only the one that runs is imported, and
the engine not before it runs, so that ``--help`` answers at once.

Results go to stdout, all else to stderr, as ``error: FILE: what``, ``hint: what to do``, ``warning: what``.
With ``--json`` an error is one JSON object on stdout as well.  Exit codes: 0 done, 1 failed, 2 the command
line makes no sense, 3 the image is damaged, 4 only something harmless was found, 5 in use by another
process, 130 interrupted, 141 the reader of the output went away, 128 and its number after a signal.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

import click

from nbd_vmdk import __version__
from nbd_vmdk.cli import output
from nbd_vmdk.cli.completion import PROGRAM, answer
from nbd_vmdk.cli.signals import AskedToEnd, orderly_end
from nbd_vmdk.errors import OptionError, StorageError, VmdkError

INTERRUPTED = 130
READER_GONE = 141

#: Where each verb is: its module in this package, and its name there.
_VERBS: Final = {
    "attach": ("attach", "attach"),
    "check": ("check", "check"),
    "checksum": ("checksum", "checksum"),
    "clone": ("clone", "clone"),
    "compact": ("compact", "compact"),
    "compare": ("compare", "compare"),
    "completion": ("completion", "completion"),
    "convert": ("convert", "convert"),
    "create": ("create", "create"),
    "delete": ("delete", "delete"),
    "detach": ("attach", "detach"),
    "doctor": ("doctor", "doctor"),
    "info": ("info", "info"),
    "map": ("map", "map_"),
    "mount": ("attach", "mount"),
    "read": ("read", "read"),
    "rename": ("rename", "rename"),
    "repair": ("repair", "repair"),
    "resize": ("resize", "resize"),
    "serve": ("serve", "serve"),
    "snapshot": ("snapshot", "snapshot"),
    "stats": ("stats", "stats"),
    "umount": ("attach", "umount"),
    "write": ("write", "write"),
}

#: An option in a hint that is to be added to what was typed; of another command's it says so itself.
_OPTION: Final = re.compile(
    r"(?:\badd |\bwith |: )"
    r"(-r|--(?:parent|ignore-cid|salvage|write-parent|drop-ctk|allow-dir|allow-devices))\b"
)

#: What click raises for a group without a verb.  Before 8.2 it has no such error: it shows the help itself.
_NOTHING_ASKED: type[click.UsageError] | tuple[()] = getattr(click.exceptions, "NoArgsIsHelpError", ())


def _closest(word: str) -> str | None:
    from difflib import get_close_matches  # seldom needed

    return next(iter(get_close_matches(word, _VERBS, 1)), None)


def _show_plugin_path(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from nbd_vmdk.serving.server import plugin_path

        click.echo(plugin_path())
        context.exit()


class Verbs(click.Group):
    """All verbs, imported when asked for; who forgets one and names an image at once is told of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """See Group."""
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """See Group."""
        if cmd_name not in _VERBS:
            return None
        module, name = _VERBS[cmd_name]
        verb = getattr(import_module(f"nbd_vmdk.cli.{module}"), name)
        assert isinstance(verb, click.Command)
        return verb

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """See Group; OptionError for a file instead of a verb, and for a verb with a slip in it."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            if os.path.exists(args[0]):
                word = shlex.quote(args[0])
                hint = f"nbd-vmdk serve {word} puts it on the network, nbd-vmdk info {word} shows what it is"
                raise OptionError(None, why=f"{args[0]} is a file, and no verb", hint=hint) from None
            if close := _closest(args[0]):
                why, hint = f"no such command '{args[0]}'", f"did you mean nbd-vmdk {close}?"
                raise OptionError(None, why=why, hint=hint) from None
            raise


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Begin with: nbd-vmdk info disk.vmdk; nbd-vmdk serve disk.vmdk.  Examples of each verb: "
    "man nbd-vmdk-VERB, or docs/EXAMPLES.md.",
)
@click.version_option(__version__, prog_name="nbd-vmdk", message="%(prog)s %(version)s")
@click.option(
    "--plugin-path",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_plugin_path,
    help="Show the file for 'nbdkit python FILE file=disk.vmdk' and exit.",
)
def root() -> None:
    """Put any VMware virtual disk (VMDK) on the network with NBD, in place, without converting it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code.  Nothing but a bug leaves a traceback."""
    chosen = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in chosen
    output.prepare()
    try:
        try:
            code: object = answer(root)
            if code is None:
                with orderly_end(), output.Messages(), root.make_context(PROGRAM, chosen) as context:
                    code = root.invoke(context)
        except click.exceptions.Exit as left:
            code = left.exit_code
        sys.stdout.flush()
    except _NOTHING_ASKED as empty:
        click.echo(empty.format_message(), err=True)
        return OptionError.exit_code
    except click.UsageError as wrong:
        return _usage(wrong, as_json)
    except VmdkError as error:
        return _failed(_of_this_verb(output.advised(error), chosen), as_json)
    except BrokenPipeError:
        output.abandon()
        return READER_GONE
    except OSError as error:
        if isinstance(error.filename, (str, bytes)):
            return _failed(StorageError.of(error, os.fsdecode(error.filename), "failed"), as_json)
        # The engine names the files that it meets errors in, so this one comes from printing.
        return _failed(StorageError.of(error, "stdout", "write"), as_json)
    except AskedToEnd as asked:
        return asked.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _usage(wrong: click.UsageError, as_json: bool) -> int:
    """A command line that click does not understand, told as our own errors are."""
    path = wrong.ctx.command_path if wrong.ctx else "nbd-vmdk"
    why = " ".join(wrong.format_message().split()).rstrip(".")
    error = OptionError(None, why=why, hint=f"'{path} --help' tells more")
    return _failed(error, as_json)


def _of_this_verb(error: VmdkError, chosen: Sequence[str]) -> VmdkError:
    """The error; if its hint is to add an option that this verb has not, the hint says which verb has.

    What opens an image gives the hint, and knows nothing of who asks.
    """
    wanted = _OPTION.findall(error.hint or "")
    if not wanted:
        return error
    command: click.Command = root
    context = click.Context(root)
    path = []
    for word in chosen:
        if not isinstance(command, click.Group) or (inner := command.get_command(context, word)) is None:
            break
        command = inner
        path.append(word)
    known = {option for parameter in command.params for option in parameter.opts}
    if strange := [option for option in dict.fromkeys(wanted) if option not in known]:
        which = "an option" if len(strange) == 1 else "options"
        error.hint = f"{error.hint} ({' and '.join(strange)}: {which} of serve, not of {' '.join(path)})"
    return error


def _failed(error: VmdkError, as_json: bool) -> int:
    try:
        if as_json:
            output.json_object({"error": error.as_dict()})
        sys.stdout.flush()
    except OSError:
        output.abandon()
    try:
        output.error(error)
    except OSError:
        pass  # nobody is left to be told
    return error.exit_code
