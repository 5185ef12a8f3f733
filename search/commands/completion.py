"""`search.py completion`: print a script that completes commands and flags in a shell."""

from __future__ import annotations

import argparse
from importlib import import_module

from compression.refusal import nearest
from search.commands.exits import DONE, refuse
from search.commands.flags import Parser, parse

__all__ = ["run"]

_EXAMPLES = """\
examples:
  chisel completion bash > ~/.local/share/bash-completion/completions/chisel
  chisel completion zsh >> ~/.zshrc
  chisel completion fish > ~/.config/fish/completions/chisel.fish"""


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    from search.commands import COMMANDS
    from search.commands.shell_scripts import SHELLS, parser_of, script, words_of

    parser = Parser(
        prog="search.py completion",
        description="Print a script that completes commands, flags and names in bash, zsh or fish.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", help=", ".join(SHELLS))
    shell = parse(parser, words)["shell"]
    if shell not in SHELLS:
        return refuse(f"shell must be {', '.join(SHELLS)}, got {shell!r}; the nearest is {nearest(shell, SHELLS)}")
    modules = {name: import_module(f"search.commands.{name}") for name in COMMANDS}
    print(script(shell, {name: words_of(parser_of(one.run)) for name, one in modules.items()}, COMMANDS[0]), end="")
    return DONE
