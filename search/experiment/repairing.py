"""Repair the model of a run as a stage of its work, which continues where an interrupted process stopped.

Knows experiments and the cache; does not know run folders.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compression.decomposition.unfinished_repair import UnfinishedRepair
from compression.schedule import Schedule
from compression.storage.factor_cache import cache_key
from search.experiment.experiment import Experiment
from search.experiment.preparation import advancing
from search.runtime.console import Console
from search.runtime.memory import give_back_memory

__all__ = ["repaired_", "unfinished_repair"]


def repaired_(experiment: Experiment, schedule: Schedule, console: Console) -> Mapping[str, nn.Module]:
    """Apply `schedule` to the dense model and repair it; returns the modules it replaced.

    Every block that is done is stored in the cache. Whoever has stored the result, or does not keep it, drops these
    with `unfinished_repair`.

    Raises:
        ValueError: as for `compression.decomposition.repair.repair_`.
        OSError: the disk is full or not writable.
    """
    unfinished = unfinished_repair(experiment, schedule)
    give_back_memory()  # what scoring took; the moments of a large block take much again
    blocks, done = 1 + max(site.block for site in experiment.sites), unfinished.blocks
    if done:
        console.note(f"repair: {done} blocks of an interrupted run are continued")
    with console.stage("repair", blocks, "blocks", done) as stage:
        return experiment.repair_(schedule, experiment.config.repair_tokens, advancing(stage, done), unfinished)


def unfinished_repair(experiment: Experiment, schedule: Schedule) -> UnfinishedRepair:
    """What the cache holds of the repair of a schedule in this run."""
    key = cache_key(
        kind="repair",
        format=2,  # 1: computed in the type of the model
        model=experiment.loaded.digest,
        schedule=schedule.digest,
        statistics=experiment.calibration.key,
        shrinkage=experiment.config.shrinkage,
        tokens=experiment.config.repair_tokens,
    )
    return UnfinishedRepair(experiment.calibration.cache, key)
