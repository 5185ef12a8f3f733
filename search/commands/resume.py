"""`search.py resume`: continue an interrupted search; the same as `search.py --resume`."""

from __future__ import annotations

import argparse

from search.commands.flags import Parser, parse
from search.commands.search import add_flags, start

__all__ = ["run"]

_EXAMPLES = """\
examples:
  python search.py resume results/RUN                  continue an interrupted search
  python search.py resume results/RUN --budget 500     continue with a larger budget"""


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        prog="search.py resume",
        description="Continue a search in its own folder where it was interrupted, or with a larger budget.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage="python search.py resume RUN [FLAGS]",
    )
    parser.add_argument("resume", metavar="RUN", help="Folder of the search.")
    add_flags(parser, without=("resume", "out"))
    return start(parse(parser, words))
