"""The dry run: what a run would do, what it needs and roughly how long it would take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compression.sites import model_bytes, model_parameters
from envs import LEVELS, REACH
from search.config import Config
from search.experiment.experiment import Experiment
from search.experiment.needs import needs
from search.experiment.open_model import open_model
from search.experiment.preparation import stays_dense
from search.model.devices import working_dtype
from search.model.outline import UNREAD, outline
from search.pipeline.durations import benchmarked, durations, measured_speeds
from search.pipeline.rehearsal import rehearse
from search.trials.preflight import preflight

__all__ = ["plan"]


def plan(config: Config) -> Mapping[str, object]:
    """Describe what `search.pipeline.run.run` would do. Nothing is calibrated, evaluated or written.

    The weights of a large model are not read, see `search.model.outline`.

    Raises:
        ValueError, DataUnavailable: as `search.pipeline.run.run`.
    """
    config, device, start = preflight(config)
    place = device if config.device_map is None else torch.device("cpu")
    found = outline(config.model, place, working_dtype(config.dtype, device), config.trust_remote_code)
    loaded, sites = open_model(config, device, found)
    if start.policy is not None and loaded.digest == UNREAD:  # the run itself compares the weights
        loaded = dataclasses.replace(loaded, digest=start.policy.model)
    start.check(loaded, sites)
    notes: list[str] = []
    experiment = Experiment.of(config, loaded, sites, device, notes.append)
    rehearse(experiment, start)
    searched, [selected], [heldout] = (experiment.shards(part) for part in ("search", "selection", "heldout"))
    tokens = {
        name: sum(len(row.tokens) for row in rows)
        for name, rows in (("trial", searched[0]), ("selection", selected), ("heldout", heldout))
    }
    seconds = durations(experiment, measured_speeds(experiment), tokens)
    parameters = sum(site.parameters for site in sites)
    families = sorted({site.family for site in sites}, key=[site.family for site in sites].index)
    budget = experiment.budget
    return {
        "model": {
            "name": loaded.model_id,
            "parameters": model_parameters(loaded.model),
            "bytes": model_bytes(loaded.model),
            "sites": len(sites),
            "site_parameters": parameters,
            "stays_dense": stays_dense(sites),
            "blocks": 1 + max(site.block for site in sites),
            "families": families,
        },
        "search": {
            "agent": config.agent,
            "budget": config.budget,
            "target_kept": budget.target_kept,
            **({"size": config.size} if config.size is not None else {}),
            "reachable_kept": f"{budget.least_kept:.4f} to 1",
            "granularity": config.granularity,
            "ladder": f"{LEVELS - 1} log-price offsets from {-REACH} to {REACH} around the closed form, and dense",
            "seed": config.seed,
        },
        "data": {
            "proxy": config.proxy,
            "calibration": config.calibration or "prose and exam questions of the data packages",
            "calibration_tokens": experiment.splits.calibration.tokens,
            "tokens_per_trial": tokens["trial"],
            "selection_tokens": tokens["selection"],
            "held_out_tokens": tokens["heldout"],
            "search_items": len(experiment.splits.search_items),
            "report_items": len(experiment.splits.report_items),
            "benchmark_items": benchmarked(experiment),
            "notes": [*experiment.splits.notes, *notes],
        },
        "cost": {
            "estimated_minutes": round(sum(seconds.values()) / 60, 1),
            "statistics_cached": experiment.calibration.is_cached,
        },
        "seconds": {stage: round(duration) for stage, duration in seconds.items()},
        "needs": {
            need.stage: {"memory_gb": round(need.memory / 1e9, 1), "cache_gb": round(need.disk / 1e9, 1)}
            for need in needs(experiment)
        },
        "device": f"{_devices(loaded.model, device)}, {str(loaded.model.dtype).removeprefix('torch.')}, "
        f"{torch.get_num_threads()} threads",
        "output": str(Path(config.resume or config.out or "results").absolute()),
    }


def _devices(model: Any, main: torch.device) -> str:
    """The devices of a model, the main one first."""
    others = sorted({str(parameter.device) for parameter in model.parameters()} - {str(main)})
    return ", ".join([str(main), *others])
