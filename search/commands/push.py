"""`search.py push`: upload an exported folder to the model hub. No other command uploads anything."""

from __future__ import annotations

from pathlib import Path

from search.commands.exits import DONE, explain, say
from search.commands.flags import Parser, parse
from search.runtime.console import Console

__all__ = ["run"]


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        prog="search.py push",
        description="Upload an exported folder to the Hugging Face hub with the account of `hf auth login`. The "
        "repository is private unless --public is given.",
        allow_abbrev=False,
        usage="python search.py push DIR OWNER/NAME [--public]",
    )
    parser.add_argument("folder", metavar="DIR", help="Folder that `search.py export` wrote.")
    parser.add_argument("repository", metavar="OWNER/NAME", help="Repository; it is created if it does not exist.")
    parser.add_argument("--public", action="store_true", help="Make the repository public.")
    parser.add_argument("--quiet", action="store_true", help="Show no progress, only the result and errors.")
    given = parse(parser, words)
    try:
        with Console(quiet=given["quiet"]) as shown, shown.stage("push"):
            from search.export.upload import push

            address = push(Path(given["folder"]), given["repository"], public=given["public"])
    except BaseException as error:
        return explain(error)
    say(address)
    return DONE
