"""What a run may end with beside its table: benchmarks of its models, and the result as a folder that others load.

Knows a finished run's folder. What is there already is not made again, so that a resumed run only adds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from search.config import Config
from search.console import Console

if TYPE_CHECKING:
    from search.benchmarking.run import Request

__all__ = ["TASKS", "check", "finish"]

TASKS = ("arc_easy", "arc_challenge", "piqa", "sciq", "winogrande", "hellaswag", "boolq", "mmlu_answer")
"""Those that say something about small models and need no generation."""


def check(config: Config) -> None:
    """Refuse what could not be done at the end.

    Raises:
        ValueError: one item a benchmark, or lm-eval is not installed.
    """
    if config.benchmark_items:
        from search.benchmarking.run import check_request

        check_request(_request("results", config))


def finish(run: Path, config: Config, console: Console) -> list[str]:
    """Do what the configuration asks for; returns what a person should read.

    Raises:
        ValueError, DataUnavailable: as `search.benchmarking.run.benchmark` and `search.export_run.export_run`.
    """
    said = []
    if config.benchmark_items:
        from search.benchmarking.run import benchmark

        said.append(benchmark(_request(str(run), config), console).text())
    folder = run / config.export
    if config.export != "none" and not folder.exists():
        from search.export_run import Form, export_run

        said.append(export_run(run, folder, Form(config.export, device=config.device), console))
    if said:
        from search.report import REPORT, report
        from search.runfolder import RunFolder

        with RunFolder(run) as opened:
            opened.write_text(REPORT, report([run]))
    return said


def _request(run: str, config: Config) -> Request:
    from search.benchmarking.run import Request

    last = "healed" if config.heal_minutes else "repaired"
    schedules = ("dense", "uniform", "lagrangian", "searched", last)
    return Request((run,), TASKS, config.benchmark_items, schedules, seed=config.seed, device=config.device)
