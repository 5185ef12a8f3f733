"""Generates completion scripts for bash, zsh and fish from the parsers of the commands.

Knows argparse and the three shells; does not know what a command does.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compression.refusal import Refusal
from search.commands.flags import Parser
from search.config import Config

__all__ = ["SHELLS", "Flag", "parser_of", "script", "words_of"]

SHELLS = ("bash", "zsh", "fish")

PROGRAMS = ("chisel", "search.py")
"""The programs that the scripts complete: the installed one, and search.py of a checkout if it is called by name."""


@dataclass(frozen=True)
class Flag:
    """A word to complete: a flag with its help and its possible values, or the name of a positional argument."""

    word: str
    about: str
    names: tuple[str, ...] = ()


class _Found(BaseException):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def parser_of(run: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """The parser of a command. The command is called with --help and stopped before it prints."""

    def stop(self: argparse.ArgumentParser, file: object = None) -> None:
        raise _Found(self)

    printing = Parser.print_help
    Parser.print_help = stop  # type: ignore[method-assign]
    try:
        run(["--help"])
    except _Found as found:
        return found.parser
    finally:
        Parser.print_help = printing  # type: ignore[method-assign]
    raise Refusal("a command must use search.commands.flags.Parser and have --help")


def words_of(parser: argparse.ArgumentParser) -> list[Flag]:
    """The long flags of a parser and the possible values of its positional arguments, in the order of its help."""
    words = []
    for action in parser._actions:
        about = (action.help or "").partition(". ")[0].replace("%%", "%").rstrip(".")
        names = tuple(map(str, action.choices or ())) or _names(action.dest)
        if not action.option_strings:
            words += [Flag(name, about) for name in names]
        words += [Flag(option, about, names) for option in action.option_strings if option.startswith("--")]
    return words


def script(shell: str, commands: Mapping[str, Sequence[Flag]], default: str) -> str:
    """The script that a shell sources.

    Args:
        shell: one of `SHELLS`.
        commands: the words to complete after each command.
        default: the command that runs if none is named.
    """
    if shell == "fish":
        return _fish(commands, default)
    zsh = (
        "autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit\n"
        if shell == "zsh"
        else ""
    )
    return zsh + _bash(commands, default)


def _names(field: str) -> tuple[str, ...]:
    """The possible values of a field of the configuration; none if any value is allowed."""
    info = Config.model_fields.get(field)
    extra = info.json_schema_extra if info is not None else None
    rule = str(extra["rule"]) if isinstance(extra, dict) else ""
    if not rule.startswith("one of "):
        return ()
    return tuple(name for name in rule.removeprefix("one of ").split(", ") if " " not in name)


def _bash(commands: Mapping[str, Sequence[Flag]], default: str) -> str:
    flags = [f"    {name}) words={shlex.quote(' '.join(one.word for one in of))} ;;" for name, of in commands.items()]
    values: dict[str, tuple[str, ...]] = {}
    for of in commands.values():
        values |= {one.word: one.names for one in of if one.names and one.word.startswith("-")}
    named = [f"    {flag}) words={shlex.quote(' '.join(names))} ;;" for flag, names in values.items()]
    return "\n".join(
        [
            "_chisel() {",
            '  local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
            f'  local command="${{COMP_WORDS[1]}}"; [[ "$command" == -* || $COMP_CWORD -eq 1 ]] && command={default}',
            '  case "$command" in',
            *flags,
            "  esac",
            f'  [[ $COMP_CWORD -eq 1 ]] && words="{" ".join(commands)} $words"',
            '  case "$before" in',
            *named,
            "  esac",
            '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "}",
            f"complete -o default -F _chisel {' '.join(PROGRAMS)}",
            "",
        ]
    )


def _fish(commands: Mapping[str, Sequence[Flag]], default: str) -> str:
    others = " ".join(name for name in commands if name != default)
    lines = []
    for program in PROGRAMS:
        lines += [f"complete -c {program} -n __fish_use_subcommand -a {name}" for name in commands]
        for name, of in commands.items():
            seen = (
                f"not __fish_seen_subcommand_from {others}"
                if name == default
                else f"__fish_seen_subcommand_from {name}"
            )
            for one in of:
                word = f"-l {one.word[2:]}" if one.word.startswith("--") else f"-a {one.word}"
                names = f" -x -a {_quoted(' '.join(one.names))}" if one.names else ""
                lines.append(f"complete -c {program} -n {_quoted(seen)} {word}{names} -d {_quoted(one.about)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """In fish's single quotes, inside which only the quote itself and the backslash are special."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
