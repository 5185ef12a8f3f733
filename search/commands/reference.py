"""The reference of all commands in Markdown, generated from their parsers; `make docs` writes it to docs/cli.md.

Knows argparse and Markdown; does not know what a command does.
"""

from __future__ import annotations

import argparse
from importlib import import_module

from search.commands import COMMANDS
from search.commands.shell_scripts import parser_of

__all__ = ["reference"]

_INTRODUCTION = """\
# Commands

Every command, flag and default, generated from the parsers by `make docs`. After `make setup`, run a command with
`.venv/bin/python search.py COMMAND`; installed with pip, the program is called `chisel`. A flag means the same in every
command. `python search.py COMMAND --help` prints the same text.

Exit codes: 0 done · 1 a fault of Chisel itself, with its traceback in the run folder's run.log · 2 refused input, or
data or a device that is not there · 3 `doctor` found a problem · 4 stopped, or finished with failures ·
130 interrupted.
"""


def reference() -> str:
    """The content of docs/cli.md: a table of the commands, then a section for each."""
    parsers = {name: parser_of(import_module(f"search.commands.{name}").run) for name in COMMANDS}
    lines = ["| command | what it does |", "|---|---|"]
    lines += [f"| [{name}](#{name}) | {_cell(_first_sentence(parser))} |" for name, parser in parsers.items()]
    sections = [_section(name, parser) for name, parser in parsers.items()]
    return "\n".join([_INTRODUCTION, *lines, "", *sections]).rstrip("\n") + "\n"


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    usage = parser.format_usage().removeprefix("usage: ").strip()
    parts = [
        f"## {name}",
        f"```text\n{' '.join(usage.split())}\n```",
        f"```text\n{(parser.description or '').strip()}\n```",
    ]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        title = group.title or ""
        if title not in ("positional arguments", "options"):
            parts.append(f"**{title}**")
        parts.append("\n".join(["| flag | meaning |", "|---|---|", *(_row(parser, action) for action in actions)]))
    if parser.epilog:
        parts.append(f"```text\n{parser.epilog.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    # The formatter fills in %(default)s and the like, and names what a flag takes.
    formatter = parser._get_formatter()
    invocation = formatter._format_action_invocation(action)
    return f"| `{_cell(invocation)}` | {_cell(formatter._expand_help(action) if action.help else '')} |"


def _first_sentence(parser: argparse.ArgumentParser) -> str:
    text = " ".join((parser.description or "").split("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".:") + "."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(reference(), end="")
