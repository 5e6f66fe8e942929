"""Shell completion: verbs, options, their values and files, in bash, zsh and fish.

The mechanism is click's.  A shell that completes runs ``nbd-vmdk`` with the words so far in its environment,
and ``_NBD_VMDK_COMPLETE`` saying in which form it wants the answer; :func:`answer` gives it before a command
line is looked at.  Nothing but click is imported for it, as for ``--help``: it must be there while one types.
"""

import os

import click

PROGRAM = "nbd-vmdk"

#: What shells ask through; the name is the one that click makes of the program's.
VARIABLE = "_NBD_VMDK_COMPLETE"

SHELLS = ("bash", "zsh", "fish")


def answer(root: click.Command) -> int | None:
    """Answer a shell that asks; the exit code, or None where none asks."""
    asked = os.environ.get(VARIABLE)
    if not asked:
        return None
    from click.shell_completion import shell_complete

    return shell_complete(root, {}, PROGRAM, VARIABLE, asked)


@click.command(short_help="Print the script that lets a shell complete nbd-vmdk's command lines.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> int:
    """Print the script that lets SHELL complete the verbs, options and files of nbd-vmdk.

    Nothing is to be done where a package of the distribution has installed it.  Elsewhere, in ~/.bashrc or
    ~/.zshrc: eval "$(nbd-vmdk completion bash)" (or zsh); for fish:
    nbd-vmdk completion fish > ~/.config/fish/completions/nbd-vmdk.fish
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(context.find_root().command, {}, PROGRAM, VARIABLE).source(), nl=False)
    return 0
