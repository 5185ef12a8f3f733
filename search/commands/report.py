"""`search.py report`: write the report page of a run, or one page that compares several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from search.commands.exits import DONE, explain, say
from search.commands.flags import Parser, parse

__all__ = ["run"]

_ABOUT = """\
Write report.html from the files of a run folder: tables, a map of χ, curves and provenance on one page. Several runs
are compared on one page."""

_EXAMPLES = """\
examples:
  python search.py report results/RUN                        writes results/RUN/report.html
  python search.py report results/RUN1 results/RUN2 --out both.html"""


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    given = parse(_parser(), words)
    folders = [Path(name) for name in given["runs"]]
    try:
        from search.reporting.run_report import REPORT, report
        from search.runtime.files import write_whole
        from search.runtime.run_folder import holding

        target = Path(given["out"]) if given["out"] else (folders[0] if len(folders) == 1 else Path()) / REPORT
        text = report(folders)
        with holding(target):
            write_whole(target, text)
    except BaseException as error:
        return explain(error)
    say(target)
    return DONE


def _parser() -> Parser:
    parser = Parser(
        prog="search.py report",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python search.py report RUN [RUN ...] [--out FILE]",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="Folder of a finished run.")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="File to write. Default: report.html in the run folder; for several runs, in the working directory.",
    )
    return parser
