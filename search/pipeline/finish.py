"""The end of a run after its table: benchmarks of its models, and the result exported as a folder.

Knows a finished run's folder. Models that were benchmarked before are not measured again. The exported folder is
written anew, because a resumed run may end with another result.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from search.benchmarking.run import BenchmarkRequest, benchmark
from search.experiment.experiment import Experiment
from search.export.run import ExportForm, export_run
from search.priors.format import Prior
from search.reporting.run_report import REPORT, report
from search.runtime.console import Console
from search.runtime.run_folder import PRIOR, RunFolder

__all__ = ["SCHEDULES", "TASKS", "finish"]

TASKS = ("arc_easy", "arc_challenge", "piqa", "sciq", "winogrande", "hellaswag", "boolq", "mmlu_answer")
"""Tasks on which small models score above chance and that need no generation."""
SCHEDULES = ("dense", "uniform", "lagrangian", "searched")
"""The schedules that are benchmarked, besides the last result of the run."""


def finish(run: Path, experiment: Experiment, console: Console) -> list[str]:
    """Benchmark and export as the configuration asks; returns text for the user. Encoders are not benchmarked.

    Args:
        experiment: that of the run, with its dense model; exporting compresses the model in place.

    Raises:
        ValueError, DataUnavailable: as `search.benchmarking.run.benchmark` and `search.export.run.export_run`.
    """
    config, said = experiment.config, []
    if config.benchmark_items and not experiment.loaded.kind.is_encoder:
        said.append(_benchmarks(run, experiment, console))  # it takes the folder's lock itself
    with RunFolder(run) as folder:
        if config.export != "none":
            said.append(_exported(run, experiment, console))
        if said:
            folder.write_text(REPORT, report([run]))
    return said


def _benchmarks(run: Path, experiment: Experiment, console: Console) -> str:
    config = experiment.config
    last = "healed" if config.heal_minutes else "repaired"
    request = BenchmarkRequest(
        (str(run),),
        TASKS,
        config.benchmark_items,
        (*SCHEDULES, last),
        seed=config.seed,
        device=config.device,
        trusted=config.trust_remote_code,
    )
    return benchmark(request, console, experiment).text()


def _exported(run: Path, experiment: Experiment, console: Console) -> str:
    """Export the last result of the run, replacing an earlier export."""
    config = experiment.config
    folder = run / config.export
    shutil.rmtree(folder, ignore_errors=True)
    if all(choice.is_dense for _, choice in Prior.read(run / PRIOR).schedule):
        return "nothing is compressed in the result, so that it is not exported"
    return export_run(
        run,
        folder,
        ExportForm(config.export, device=config.device, trusted=config.trust_remote_code),
        console,
        opened=experiment,
    )
