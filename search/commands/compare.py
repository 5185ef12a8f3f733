"""`search.py compare`: compare agents at equal cost."""

from __future__ import annotations

import argparse

from search.commands.exits import DONE, explain, resumed, say
from search.commands.flags import Parser, add_fields, configuration, parse, set_threads, whole_numbers
from search.config import AFTERWARDS
from search.runtime.console import Console
from search.runtime.quick_imports import quick_imports

__all__ = ["COMPARED", "run"]

COMPARED = ("reinforce", "random")
"""The agents that are compared by default."""

_COMPARISON = """\
Compare agents at equal cost. Each agent searches once per seed, with the same budget and the same data. The schedules
that it recommends during the search and at its end are measured on held-out text and questions that no agent saw.
Writes a table, a plot and their figures into the output folder. --resume continues a comparison and may add agents or
seeds."""

_COMPARISON_EXAMPLES = """\
examples:
  python search.py compare --agents reinforce,evolution --budget 100 --out results/two
  python search.py compare --agents random --resume results/two        add an agent to the same table"""


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    given = parse(_parser(), words)
    shown = Console(quiet=given.pop("quiet"))
    try:
        names, seeds = given.pop("agents").split(","), whole_numbers("seeds", given.pop("seeds"))
        config = configuration(given)
        set_threads(config)
        with quick_imports():
            from search.comparison import contest

        with shown:
            folder, report = contest.compare(config, names, seeds, shown)
    except BaseException as error:
        return explain(error, resumed(shown.folder, "compare"), shown.folder)
    say(f"{report}\n{folder}")
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
        "--agents",
        metavar="LIST",
        default=",".join(COMPARED),
        help="Comma-separated names of agents. Default: %(default)s.",
    )
    contest.add_argument(
        "--seeds",
        metavar="LIST",
        default="0,1,2",
        help="Comma-separated seeds of the agents; --seed is the seed of the data. Default: 0,1,2.",
    )
    add_fields(parser, without=("agent", "policy", "prior", *AFTERWARDS))
    return parser
