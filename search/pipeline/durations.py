"""Estimate how long each stage of a run takes, from its number of passes and from two speeds of this machine.

The speeds are that of a forward pass of the model and that of a product of matrices. What the stages take in these
units was fitted to logs of the default job on 2 cores, `--quick` and full, of the quick job of Qwen2.5-0.5B, and to
results/decompose.md. Knows experiments; computes nothing but the speeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compression.numerics.packed_size import FLOATING
from compression.schedule import Schedule
from compression.sites import Site, model_bytes, model_parameters
from search.experiment.experiment import Experiment
from search.pipeline import finish
from search.trials.selection import finalist_count

__all__ = ["Speeds", "benchmarked", "durations", "measured_speeds"]

_SCORED = 1.75  # passes that scoring a token takes: the pass, the comparison with the dense model, no shared prefixes
_REUSED = 0.6  # share of them in a trial, which starts at the first block that changed
_MOMENTS = 1.8  # times the arithmetic of second moments counts, which are sums of outer products of thin matrices
_WEIGHTED = 1.45  # the second calibration pass over the first
_REPAIRED = 4.7  # passes for a token of repair
_TIMED = 23_000  # tokens of passes while speeds are compared
_BENCHMARK_TOKENS, _BENCHMARKED = 110, 1.65  # tokens of an item on average, and passes for each
_DECOMPOSED = 4.6  # times the arithmetic of a decomposition counts
_ENTRY = 3000  # operations that take as long as what is done once with each entry of a matrix: casts, digests, files
_MENUS = 1.9e5  # the same for menus: eliminations, and spectra at a ladder of widths
_SOLVED, _APPLIED = 5.4, 0.067  # decompositions of all sites: repair, applying one schedule
_NEW = 0.55  # the same that trials need at new widths, times the root of their number
_UNSEEN = 0.5  # the same that finalists need where nothing is decomposed before it is scored
_DATA, _TEXT, _START = 10.0, 6.0, 4.0  # seconds
_KEPT = 3.8e-8  # seconds of rounding and storing moments by block, for each entry
_STEP = 1.6e-4  # seconds of rounding, for each row and column
_READ, _WRITTEN = 5e8, 1e8  # bytes of a model a second
_SIZE = 1024  # rows of the matrices that are multiplied


@dataclass(frozen=True)
class Speeds:
    """How fast this machine is.

    Attributes:
        token: seconds of a forward pass for each of its tokens.
        operation: seconds of one addition or multiplication in a product of float32 matrices.
    """

    token: float
    operation: float


def measured_speeds(experiment: Experiment) -> Speeds:
    """The speeds of the model and of the device of an experiment, measured now in about a second."""
    left, right = torch.rand(2, _SIZE, _SIZE, device=experiment.device).unbind()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        float((left @ right)[0, 0])  # waits for a GPU
        times.append(time.perf_counter() - start)
    return Speeds(experiment.seconds_per_token(), min(times) / (2 * _SIZE**3))


def durations(experiment: Experiment, speeds: Speeds, tokens: Mapping[str, int]) -> dict[str, float]:
    """Seconds of every stage of a run, in the order of the stages.

    Factors count as not cached, statistics only where the cache lacks them. Loading is without the conversion of a GGUF
    file.

    Args:
        tokens: number of tokens of a shard ("trial"), of the selection data ("selection") and of the held-out data
            ("heldout").
    """
    config, calibration = experiment.config, experiment.calibration
    free = [site for site in experiment.sites if not site.dense_because]
    size, parameters = model_bytes(experiment.loaded.model), model_parameters(experiment.loaded.model)
    collected = experiment.splits.calibration.tokens
    once = 2 + _MOMENTS * sum(map(_moments, free)) / (2 * parameters)
    statistics = 0.0 if calibration.is_cached else collected * speeds.token * once
    every = speeds.operation * _DECOMPOSED * sum(map(_decomposition, free))
    scored, applied = _SCORED * speeds.token, _APPLIED * every

    def scores(schedules: int, part: str) -> float:
        return schedules * (tokens[part] * scored + applied)

    schedules = 5 if config.prior is None else 6
    repaired = min(config.repair_tokens, collected)
    entries = sum(site.out_features * site.in_features for site in free)
    stored = 0.0 if calibration.is_cached else _KEPT * sum(map(_moments, free)) / 2
    by_block = calibration.by_block  # both passes are one stage, and schedules are decomposed when they are scored
    return {
        "load": _START + size / _READ,
        "data": _DATA,
        "calibrate": (1 + _WEIGHTED) * statistics + stored if by_block else statistics,
        "weight tokens": 0.0 if by_block else _WEIGHTED * statistics,
        "decompose": speeds.operation * _MENUS * entries + _rounding(experiment, speeds),
        "baselines": 0.0 if by_block else 3 * every,
        "reference": every + experiment.references(Schedule(())) * tokens["trial"] * scored,
        "search": config.budget * _REUSED * tokens["trial"] * scored + _NEW * math.sqrt(config.budget) * every,
        # The other finalists are given up early.
        "select": scores(2 + finalist_count(config.budget) // 2, "selection") + (_UNSEEN * every if by_block else 0.0),
        "measure": scores(1 + schedules, "heldout") + (3 * every if by_block else 0.0),
        "repair": _SOLVED * every + _REPAIRED * repaired * speeds.token if repaired else 0.0,
        "judge": scores(2, "selection"),
        "heal": 60 * config.heal_minutes + _TEXT + scores(2, "heldout") if config.heal_minutes else 0.0,
        "time": _TIMED * speeds.token,
        "benchmark": benchmarked(experiment) * _BENCHMARK_TOKENS * _BENCHMARKED * speeds.token,
        "write": _START + size / _WRITTEN if config.export != "none" else 0.0,
    }


def benchmarked(experiment: Experiment) -> int:
    """Number of answers to items of benchmarks that a run scores, those of all its models together."""
    if experiment.loaded.kind.is_encoder:
        return 0
    return experiment.config.benchmark_items * len(finish.TASKS) * (len(finish.SCHEDULES) + 1)


def _moments(site: Site) -> int:
    """Arithmetic operations for each token of the second moments of a site; inputs that sites share count each time."""
    return 2 * (site.out_features**2 + site.in_features**2)


def _rounding(experiment: Experiment, speeds: Speeds) -> float:
    """Seconds of rounding every matrix to all bits that are offered: steps along its sides, and products."""
    rounded = sum(bits != FLOATING for bits in experiment.config.offered_bits)
    sides = [(site.out_features, site.in_features) for site in experiment.sites if not site.dense_because]
    products = 2 * speeds.operation * sum(rows * columns * (rows + columns) for rows, columns in sides)
    return rounded * (_STEP * sum(map(sum, sides)) + products)


def _decomposition(site: Site) -> float:
    """Arithmetic operations of whitening and decomposing a site, about."""
    rows, columns = site.out_features, site.in_features
    whitening = (rows**3 + columns**3) / 3 + rows * columns * (rows + columns)
    return whitening + rows * columns * (4 * min(rows, columns) + _ENTRY)
