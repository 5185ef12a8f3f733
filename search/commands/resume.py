"""`search.py resume`: an interrupted search goes on; the same as `search.py --resume`."""

from __future__ import annotations

import argparse

from search.commands.flags import Parser, parse
from search.commands.search import add_flags, start

__all__ = ["run"]

_EXAMPLES = """\
examples:
  python search.py resume results/RUN                  go on with what is missing
  python search.py resume results/RUN --budget 500     with more trials than it had"""


def run(words: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(
        prog="search.py resume",
        description="Continue a search where it was interrupted, or with a larger budget, in its own folder.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage="python search.py resume RUN [FLAGS]",
    )
    parser.add_argument("resume", metavar="RUN", help="Folder of the search.")
    add_flags(parser, without=("resume", "out"))
    return start(parse(parser, words))
