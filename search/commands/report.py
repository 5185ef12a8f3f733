"""`search.py report`: the page of a run again, or of several beside each other."""

from __future__ import annotations

import argparse
from pathlib import Path

from search.commands.exits import DONE, explain
from search.commands.flags import Parser, parse

__all__ = ["run"]

_ABOUT = """\
Write report.html: one file with tables, χ map, curves and how everything was made, from what a run folder holds. With
several runs, one page compares them."""

_EXAMPLES = """\
examples:
  python search.py report results/RUN                        writes results/RUN/report.html
  python search.py report results/RUN1 results/RUN2 --out both.html"""


def run(words: list[str]) -> int:
    """Returns the exit code."""
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
    print(target)
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
    parser.add_argument("--out", metavar="FILE", help="Where to. Default: report.html in the run folder, or here.")
    return parser
