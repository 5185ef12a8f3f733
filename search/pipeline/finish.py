"""What a run ends with beside its table: benchmarks of its models, and the result as a folder that others load.

Knows a finished run's folder. A model that was benchmarked before is not again; the folder is always that of the run's
last result, since a resumed run repairs and heals anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from search.config import Config
from search.runtime.console import Console

__all__ = ["SCHEDULES", "TASKS", "finish"]

TASKS = ("arc_easy", "arc_challenge", "piqa", "sciq", "winogrande", "hellaswag", "boolq", "mmlu_answer")
"""Those that say something about small models and need no generation."""
SCHEDULES = ("dense", "uniform", "lagrangian", "searched")
"""Those that are measured, and with them what the run ends with."""


def finish(run: Path, config: Config, console: Console) -> list[str]:
    """Do what the configuration asks for; returns what a person should read.

    Raises:
        ValueError, DataUnavailable: as `search.benchmarking.run.benchmark` and `search.export.run.export_run`.
    """
    from search.reporting.run_report import REPORT, report
    from search.runtime.run_folder import RunFolder

    said = []
    if config.benchmark_items:
        said.append(_benchmarks(run, config, console))  # which takes the folder's lock itself
    with RunFolder(run) as opened:
        if config.export != "none":
            said.append(_exported(run, config, console))
        if said:
            opened.write_text(REPORT, report([run]))
    return said


def _benchmarks(run: Path, config: Config, console: Console) -> str:
    from search.benchmarking.run import BenchmarkRequest, benchmark

    last = "healed" if config.heal_minutes else "repaired"
    request = BenchmarkRequest(
        (str(run),), TASKS, config.benchmark_items, (*SCHEDULES, last), seed=config.seed, device=config.device
    )
    return benchmark(request, console).text()


def _exported(run: Path, config: Config, console: Console) -> str:
    """Export what the run ends with now, in the place of an earlier end."""
    from search.export.run import Form, export_run
    from search.priors.format import Prior
    from search.runtime.run_folder import PRIOR

    folder = run / config.export
    shutil.rmtree(folder, ignore_errors=True)
    if all(choice.is_dense for _, choice in Prior.read(run / PRIOR).schedule):
        return "nothing is compressed in the result, so that it is not exported"
    return export_run(run, folder, Form(config.export, device=config.device), console)
