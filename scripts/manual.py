#!/usr/bin/env python3
"""Write the manual pages, one a verb, from the command line's help and docs/EXAMPLES.md: manual.py FOLDER.

The help of click is plain text in paragraphs; a paragraph that begins with ``Exit code`` becomes the section
EXIT STATUS.  (The library click-man was tried: it escapes nothing, so that a line of help beginning with
``.vmdk`` is taken for a macro and lost.)

This file also reads the documents whose commands the tests run, because examples are in both.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "EXAMPLES.md"

_EXIT_STATUS = (
    ("0", "Done."),
    ("1", "Failed; the reason is on stderr."),
    ("2", "The command line makes no sense."),
    ("3", "The image is damaged."),
    ("4", "Only something harmless was found."),
    ("5", "Another process uses the image."),
    ("130", "Interrupted."),
    ("128+N", "Ended by the signal N; 141: the reader of its output went away."),
)
_FILES = {
    "nbd-vmdk": (
        ("IMAGE.lck", "VMware's lock, honoured: what a running machine uses is not written."),
        ("IMAGE.undo", "What 'nbd-vmdk repair --apply' has changed, for '--undo'."),
    ),
    "nbd-vmdk serve": (
        (
            "$XDG_RUNTIME_DIR/nbd-vmdk-*/socket",
            "Where the server listens without --socket and --port; in /tmp if there is no such folder.",
        ),
    ),
    "nbd-vmdk repair": (("IMAGE.undo", "What was changed, so that it can be taken back."),),
}
_ENVIRONMENT = (
    ("NBDKIT", "The nbdkit to run, if not the one on PATH."),
    ("NO_COLOR", "If it is set, and not empty, nothing is coloured."),
)
_OTHERS = ("nbdkit(1)", "nbdcopy(1)", "nbdinfo(1)", "nbd-client(8)", "qemu-img(1)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a document: its heading, the paragraph before it, its language, its file name."""

    heading: str
    before: str
    language: str
    name: str
    text: str
    line: int


def blocks(document: Path) -> Iterator[Block]:
    """The fenced blocks of a Markdown document, under headings of the second level."""
    heading, before, fence = "", "", None
    language, name, text, begin = "", "", "", 0
    for number, line in enumerate(document.read_text().splitlines(), 1):
        if fence is not None:
            if line == fence:
                yield Block(heading, " ".join(before.split()), language, name, text, begin)
                fence, before = None, ""
            else:
                text += line + "\n"
        elif line.startswith("```"):
            fence, text, begin = "```", "", number
            language, _, name = line[3:].partition(" ")
        elif line.startswith("## "):
            heading, before = line[3:].strip(), ""
        else:
            before = before + line + "\n" if line.strip() else before + "\n"


def verbs() -> Iterator[click.Context]:
    """A context for every command that there is, the program itself first, groups before what is in them."""
    sys.path.insert(0, str(ROOT))
    from nbd_vmdk.cli import root

    waiting = [click.Context(root, info_name="nbd-vmdk", **root.context_settings)]
    while waiting:
        context = waiting.pop(0)
        yield context
        for name, command in _inside(context).items():
            waiting.append(click.Context(command, context, info_name=name, **command.context_settings))


def _inside(context: click.Context) -> dict[str, click.Command]:
    """The commands of a group that are not hidden, by name."""
    group = context.command
    if not isinstance(group, click.Group):
        return {}
    found = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None and not command.hidden}


def page_name(path: str) -> str:
    """The manual page of a command: nbd-vmdk-snapshot-create."""
    return path.replace(" ", "-")


def render(context: click.Context, examples: list[Block], others: list[str], date: str) -> str:
    """The manual page of one command; ``others`` are the paths of those to refer to."""
    from nbd_vmdk import __version__

    command, path = context.command, context.command_path
    name = page_name(path)
    help_ = textwrap.dedent(command.help or "").strip().split("\n\n")
    told = [paragraph for paragraph in help_ if paragraph.startswith("Exit code")]
    lines = [
        f'.TH {name.upper()} 1 "{date}" "nbd-vmdk {__version__}" "User Commands"',
        ".SH NAME",
        rf"{_plain(name)} \- {_plain(_short(command))}",
        ".SH SYNOPSIS",
        rf"\fB{_plain(path)}\fP " + " ".join(map(_plain, command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        *_paragraphs([paragraph for paragraph in help_ if paragraph not in told]),
        ".SH OPTIONS",
    ]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            flags = re.sub(r"(?<![\w-])--?[a-z][\w-]*", lambda found: rf"\fB{found[0]}\fP", record[0])
            lines += [".TP", _plain(flags, keep=r"\\f[BP]"), _plain(record[1])]
    if inside := _inside(context):
        lines.append(".SH COMMANDS")
        for verb, each in inside.items():
            lines += [".TP", rf"\fB{_plain(page_name(f'{path} {verb}'))}\fP(1)", _plain(_short(each))]
    if examples:
        lines.append(".SH EXAMPLES")
        for block in examples:
            if block.before:
                lines += [] if lines[-1].startswith(".SH") else [".PP"]
                lines += [_plain(block.before), ".PP"]
            lines += [".RS 4", ".nf", _literal(block.text), ".fi", ".RE"]
    lines.append(".SH EXIT STATUS")
    if told:
        lines += _paragraphs(told)
    else:
        lines += _list(_EXIT_STATUS)
    if path in _FILES:
        lines += [".SH FILES", *_list(_FILES[path])]
    if context.parent is None:
        lines += [".SH ENVIRONMENT", *_list(_ENVIRONMENT)]
    references = [f"{page_name(other)}(1)" for other in others] + list(_OTHERS)
    lines += [".SH SEE ALSO", ",\n".join(re.sub(r"(.*)(\(\d\))", _reference, each) for each in references)]
    return "\n".join(lines) + "\n"


def _reference(found: re.Match[str]) -> str:
    return rf"\fB{_plain(found[1])}\fP{found[2]}"


def _short(command: click.Command) -> str:
    return (command.short_help or command.get_short_help_str(100)).rstrip(".")


def _list(entries: tuple[tuple[str, str], ...]) -> Iterator[str]:
    for term, text in entries:
        yield from (".TP", rf"\fB{_plain(term)}\fP", _plain(text))


def _paragraphs(texts: list[str]) -> Iterator[str]:
    for at, text in enumerate(texts):
        if at:
            yield ".PP"
        if text.startswith("\b\n"):  # click's mark of a paragraph whose lines stay as they are
            yield from (".nf", _literal(text[2:]), ".fi")
        else:
            yield _plain(text)


def _plain(text: str, keep: str = r"(?!)") -> str:
    """Text on one line, in which nothing is a command of troff's, but for what matches ``keep``."""
    return "".join(
        piece if re.fullmatch(keep, piece) else _escaped(piece)
        for piece in re.split(f"({keep})", " ".join(text.split()))
    )


def _literal(text: str) -> str:
    return "\n".join(_escaped(line) for line in text.rstrip("\n").split("\n"))


def _escaped(text: str) -> str:
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("`", r"\(ga")
    text = text.replace("~", r"\(ti").replace("^", r"\(ha").replace('"', r"\(dq")
    return r"\&" + text if text.startswith(".") else text


def main(folder: Path) -> None:
    """Write all pages to a folder."""
    moment = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    date = time.strftime("%Y-%m-%d", time.gmtime(moment))
    folder.mkdir(parents=True, exist_ok=True)
    examples = list(blocks(EXAMPLES))
    contexts = list(verbs())
    for context in contexts:
        path = context.command_path
        verb = path.removeprefix("nbd-vmdk").strip()
        above = context.parent
        others = [] if above is None else [above.command_path]
        others += [each.command_path for each in contexts if each is not context and each.parent is above]
        if above is None:
            others = []  # they are under COMMANDS
        own = [block for block in examples if block.heading == verb and block.language in ("sh", "console")]
        (folder / f"{page_name(path)}.1").write_text(render(context, own, others, date))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
