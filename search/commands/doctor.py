"""`search.py doctor`: check whether this machine can run the default job, and what to do if not."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from search.commands.exits import DONE, PREFLIGHT, explain, say
from search.commands.flags import Parser, parse
from search.reporting.tables import json_text

__all__ = ["run"]

_EXAMPLES = """\
examples:
  python search.py doctor                show what is there and advise on what is missing
  python search.py doctor --json         the same as JSON, for programs and fault reports

exit codes: 0 the default job can run, 3 it cannot"""


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        prog="search.py doctor",
        description="Check Python, libraries, devices, memory, disk, data and extras. Nothing is changed, except that "
        "leftovers of killed processes are removed from the cache.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="Print the findings as JSON.")
    given = parse(parser, words)
    try:
        from search.commands.machine_check import check_machine

        findings = check_machine()
    except BaseException as error:
        return explain(error)
    problems = sum(finding.state == "problem" for finding in findings)
    if given["json"]:
        say(json_text({"problems": problems, "findings": [asdict(finding) for finding in findings]}))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            say(f"{finding.state:<7}  {finding.name:<{width}}  {finding.found}")
            if finding.advice:
                say(f"{'':<7}  {'':<{width}}  -> {finding.advice}")
        verdict = f"{problems} to solve before the default job can run." if problems else "The default job can run."
        say(f"\n{verdict}")
    return PREFLIGHT if problems else DONE
