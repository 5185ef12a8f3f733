"""The baseline schedules that every run is compared with."""

from __future__ import annotations

import math

from compression.allocation.closed_form import uniform_schedule
from compression.schedule import Schedule
from search.experiment.experiment import Experiment
from search.runtime.console import Console

__all__ = ["baseline_schedules"]


def baseline_schedules(experiment: Experiment, console: Console) -> dict[str, Schedule]:
    """Schedules of one χ everywhere at the target: plain sequential-SVD MPO, input-whitened and two-sided low rank.

    A baseline that cannot reach the target with these shapes, such as an MPO of prime dimensions, is skipped with a
    note.
    """
    target = math.floor(experiment.budget.target_kept * sum(site.parameters for site in experiment.sites) + 1e-6)
    kinds = {
        "uniform-plain": ("mpo2", "plain"),
        "uniform-whitened": ("lowrank", "input"),
        "uniform": ("lowrank", "two-sided"),
    }
    baselines = {}
    for name, (topology, metric) in kinds.items():
        try:
            baselines[name] = uniform_schedule(experiment.sites, topology, metric, target)
        except ValueError as error:
            console.note(f"baseline {name} ({topology}, {metric}) is skipped: {error}")
    return baselines
