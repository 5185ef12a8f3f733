"""`search.py compare`: agents at equal cost."""

from __future__ import annotations

import argparse

from search.commands.exits import DONE, explain, resumed
from search.commands.flags import Parser, add_fields, configuration, parse, set_threads, whole_numbers
from search.config import AFTERWARDS
from search.runtime.console import Console

__all__ = ["COMPARED", "run"]

COMPARED = ("reinforce", "random")
"""Agents that are compared unless others are named."""

_COMPARISON = """\
Compare agents at equal cost: each searches with every seed and the same budget on the same data; what they recommend
along the way and at the end is measured on held-out text and questions that none of them saw. Writes a table, a plot
and the figures behind them into the output folder. --resume continues a comparison, also with more agents or seeds."""

_COMPARISON_EXAMPLES = """\
examples:
  python search.py compare --agents reinforce,evolution --budget 100 --out results/two
  python search.py compare --agents random --resume results/two        one more agent in the same table"""


def run(words: list[str]) -> int:
    """Returns the exit code."""
    given = parse(_parser(), words)
    shown = Console(quiet=given.pop("quiet"))
    try:
        names, seeds = given.pop("agents").split(","), whole_numbers("seeds", given.pop("seeds"))
        config = configuration(given)
        set_threads(config)
        from search.comparison import contest

        with shown:
            folder, report = contest.compare(config, names, seeds, shown)
    except BaseException as error:
        return explain(error, resumed(shown.folder, "compare"), shown.folder)
    print(f"{report}\n{folder}")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="search.py compare",
        description=_COMPARISON,
        epilog=_COMPARISON_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage="python search.py compare [FLAGS]",
    )
    contest = parser.add_argument_group("comparison")
    contest.add_argument(
        "--agents", metavar="LIST", default=",".join(COMPARED), help="Names with commas between. Default: %(default)s."
    )
    contest.add_argument(
        "--seeds",
        metavar="LIST",
        default="0,1,2",
        help="Of the agents; --seed is that of the data. Default: 0,1,2.",
    )
    add_fields(parser, without=("agent", "policy", "prior", *AFTERWARDS))
    return parser
