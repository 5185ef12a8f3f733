"""`search.py`, or `search.py search`: the main job."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from search.commands.exits import DONE, FAILURES, complain, explain, resumed
from search.commands.flags import Parser, add_fields, configuration, parse, set_threads
from search.reporting.tables import json_text, lines_text, text_table
from search.runtime.console import Console

__all__ = ["add_flags", "run", "start"]

_INTRODUCTION = """\
Make a language model smaller: replace its weight matrices by products of thinner ones, and search how thin each
may be. Loads the model, collects statistics on text, lets an agent propose schedules (how much every matrix keeps),
measures each, and makes a table of the best one beside simple baselines.

Then repairs and trains that one a little, measures all on a few items of eight benchmarks, and writes a folder to
load. Started without any flag it takes a small model that it fetches itself, and some 45 minutes on two cores."""

_EXAMPLES = """\
examples:
  python search.py                                          the default job
  python search.py --quick                                  everything once, small, in some ten minutes
  python search.py --dry-run                                what would run, and how long, without running it
  python search.py --target-kept 0.7 --budget 500           smaller result, longer search
  python search.py --model ./my-llama --proxy exam.jsonl    your own model and questions
  python search.py --evaluators 4                           four at once; --ray-address for a cluster
  python search.py resume results/RUN                       continue after an interruption; also --resume

other commands:
  python search.py apply --prior FILE                       a compression prior on this or another model
  python search.py compare                                  several agents at equal cost, --help says how
  python search.py heal results/RUN                         train the compressed model for a while, --help says how
  python search.py report results/RUN                       one page with tables and figures, again or of several runs
  python search.py benchmark results/RUN                    MMLU, HellaSwag and others on its models
  python search.py profile                                  what every matrix costs by itself at several χ
  python search.py prior show|diff|validate FILE...         look at compression priors
  python search.py export RUN --format hf                   its result as a folder for transformers and other tools
  python search.py generate DIR --prompt "Hello"            talk to a model; push DIR OWNER/NAME uploads one
  python search.py data                                     only fetch the model and the texts of the default job
  python search.py doctor                                   can this machine run it, and what to do if not
  python search.py completion bash                          complete commands and flags in a shell

exit codes: 0 done, 2 refused (input, data or device that is not there), 4 finished with failures, 130 interrupted"""


def run(words: list[str]) -> int:
    """Returns the exit code."""
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
    """The job as these flags say; returns the exit code."""
    shown = Console(quiet=given.pop("quiet"))
    as_json, dry = given.pop("json"), given.pop("dry_run")
    try:
        config = configuration(given)
        set_threads(config)
        from search.pipeline.dry_run import plan
        from search.pipeline.finish import finish
        from search.pipeline.run import run

        if dry:
            planned: Mapping[str, object] = plan(config)
            print(json_text(planned) if as_json else lines_text(planned))
            return DONE
        with shown:
            summary = run(config, shown)
        print(json_text(summary.document) if as_json else f"\n{text_table(summary.rows)}")
        with shown:
            more = finish(summary.folder, summary.experiment, shown)
    except BaseException as error:
        return explain(error, resumed(shown.folder), shown.folder)
    if not as_json:
        print(*more, summary.folder, sep="\n")
    if summary.failures:
        complain(f"finished, but {summary.failures} failed: see {summary.folder}")
    return FAILURES if summary.failures else DONE


def add_flags(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Flags, groups and help of `Config`'s fields, and of what concerns the command only."""
    output = add_fields(parser, without)
    for flag, about in (
        ("--dry-run", "Say what would run and stop."),
        ("--json", "Print the result as JSON instead of a table."),
    ):
        output.add_argument(flag, action="store_true", default=False, help=about)
