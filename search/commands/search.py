"""The main job: `search.py`, or `search.py search`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from search.commands.exits import DONE, FAILURES, complain, explain, resumed, say
from search.commands.flags import Parser, add_fields, configuration, parse, set_threads
from search.reporting.tables import json_text, lines_text, text_table
from search.runtime.console import Console
from search.runtime.quick_imports import quick_imports

__all__ = ["add_flags", "run", "start"]

_INTRODUCTION = """\
Make a language model smaller. Weight matrices are replaced by products of thinner matrices, and a search decides how
thin each one may be. The job loads the model, collects statistics on text, lets an agent propose schedules (how much
every matrix keeps), scores each schedule, and prints a table of the best one and of simple baselines of equal size.

It then repairs the best schedule, trains it for a few minutes, measures all models on eight benchmarks, and exports the
result as a folder to load. Without flags it compresses a small model that it downloads, in about an hour on 2 cores."""

_EXAMPLES = """\
examples:
  python search.py                                          the default job
  python search.py --quick                                  a small run of everything, in about 20 minutes
  python search.py --dry-run                                print what would run and how long it takes
  python search.py --target-kept 0.7 --budget 500           a smaller result and a longer search
  python search.py --size 200MB                             weights of at most this size, for the least loss
  python search.py --model ./my-llama --proxy exam.jsonl    your own model and questions
  python search.py --evaluators 4                           four evaluators at once; --ray-address names a cluster
  python search.py resume results/RUN                       continue after an interruption; same as --resume

other commands:
  python search.py apply --prior FILE                       apply a compression prior to a model
  python search.py compare                                  compare several agents at equal cost
  python search.py heal results/RUN                         train the compressed model towards the dense one
  python search.py report results/RUN                       write the report page of one or several runs
  python search.py benchmark results/RUN                    measure its models on MMLU, HellaSwag and others
  python search.py profile                                  measure what every matrix costs alone at several χ
  python search.py prior show|diff|validate FILE...         print, compare or check compression priors
  python search.py export RUN --format hf                   export the result for transformers and other tools
  python search.py generate DIR --prompt "Hello"            talk to a model; push DIR OWNER/NAME uploads it
  python search.py data                                     only download the model and texts of the default job
  python search.py doctor                                   check whether this machine can run the job
  python search.py completion bash                          print a script for shell completion

exit codes: 0 done, 1 a fault of Chisel, 2 refused (bad input, or data or a device is missing), 4 stopped or finished
with failures, 130 interrupted"""


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        prog="search.py",
        description=_INTRODUCTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage="python search.py [FLAGS]",
    )
    add_flags(parser)
    return start(parse(parser, words))


def start(given: dict[str, Any]) -> int:
    """Run the job with these flags; returns the exit code."""
    shown = Console(quiet=given.pop("quiet"))
    as_json, dry = given.pop("json"), given.pop("dry_run")
    try:
        config = configuration(given)
        set_threads(config)
        with quick_imports():
            from search.pipeline.dry_run import plan
            from search.pipeline.finish import finish
            from search.pipeline.run import run

        if dry:
            planned: Mapping[str, object] = plan(config)
            say(json_text(planned) if as_json else lines_text(planned))
            return DONE
        with shown:
            summary = run(config, shown)
        say(json_text(summary.document) if as_json else f"\n{text_table(summary.rows)}")
        with shown:
            more = finish(summary.folder, summary.experiment, shown)
        if summary.fault is not None:
            raise summary.fault
    except BaseException as error:
        return explain(error, resumed(shown.folder), shown.folder)
    if not as_json:
        say(*more, summary.folder)
    if summary.failures:
        complain(f"finished, but {summary.failures} failed: see {summary.folder}")
    return FAILURES if summary.failures else DONE


def add_flags(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Add a flag for every field of `Config`, and the flags that only this command has."""
    output = add_fields(parser, without)
    for flag, about in (
        ("--dry-run", "Print what would run and how long it takes, then stop."),
        ("--json", "Print the result as JSON instead of a table."),
    ):
        output.add_argument(flag, action="store_true", default=False, help=about)
