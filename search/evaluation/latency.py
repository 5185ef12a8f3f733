"""Latency: how long a model takes under several sets of layers, measured in turns so that noise meets all alike."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from compression.decomposition.apply import ScheduleApplier
from compression.decomposition.factors import FactorStore
from compression.layers.planner import Planner
from compression.layers.routes import Optimize
from compression.schedule import Schedule
from compression.sites import put_modules
from search.runtime.files import cache_folder

__all__ = ["Latency", "Modules", "against_dense", "decode", "layer_costs", "prefill", "timed"]

Modules = Mapping[str, nn.Module]

_PROMPT, _ROUNDS, _STEPS = 512, 5, 24
_DENSE = "dense"


@dataclass(frozen=True)
class Latency:
    """A compressed model against the dense one on this machine, batch 1.

    Attributes:
        optimize: what layers were planned for.
        prefill_ratio: median over rounds of the time for a prompt over the dense model's in the same round.
        decode_ratio: the same for one token after a prompt of 64.
        prompt: tokens of the prompt.
        stored_bytes: of the compressed matrices.
        resident_bytes: of the same, with what their plans keep beside them.
    """

    optimize: str
    prefill_ratio: float
    decode_ratio: float
    prompt: int
    stored_bytes: int
    resident_bytes: int

    def __str__(self) -> str:
        return (
            f"time over dense, optimized for {self.optimize}: {self.prefill_ratio:.2f} for a prompt of {self.prompt} "
            f"tokens, {self.decode_ratio:.2f} for each token after it; the compressed matrices store "
            f"{self.stored_bytes / 1e6:,.0f} MB and hold {self.resident_bytes / 1e6:,.0f} MB in memory"
        )


def layer_costs() -> Path:
    """Where this user's machine keeps the planner's measured costs."""
    return cache_folder() / "layer-costs.json"


def against_dense(
    model: Any, store: FactorStore, schedules: Mapping[str, Schedule], optimize: Optimize, costs: Path | None
) -> dict[str, Latency]:
    """Time schedules, all in the same rounds; those that leave the model dense are left out.

    The model is dense again afterwards.

    Args:
        costs: the planner's file of measured costs, see `compression.layers.planner.Planner`; for "latency" what it
            does not know is measured, which takes a minute or two the first time, for "memory" it is estimated.
    """
    compressed = {side: one for side, one in schedules.items() if not all(choice.is_dense for _, choice in one)}
    names = {name for one in compressed.values() for name, choice in one if not choice.is_dense}
    if not names:
        return {}
    device = next(model.parameters()).device
    prompt = min(_PROMPT, getattr(model.config, "max_position_embeddings", None) or _PROMPT)
    planner = Planner(optimize, costs, measure=optimize == "latency")
    sides = {_DENSE: {name: model.get_submodule(name) for name in names}}
    with torch.no_grad(), ScheduleApplier(model, store, packed=True) as applier:
        planned = {}
        for side, schedule in compressed.items():
            applier.apply_(schedule)
            planned[side] = planner.plan_(model)
            sides[side] = {name: model.get_submodule(name) for name in names}
        prefilled = _over_dense(prefill(model, sides, prompt, _ROUNDS, device))
        decoded = _over_dense(decode(model, sides, _STEPS, device))
    return {
        side: Latency(optimize, prefilled[side], decoded[side], prompt, of.stored_bytes, of.resident_bytes)
        for side, of in planned.items()
    }


def _over_dense(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median over rounds of each side's time over the dense one's in the same round."""
    return {
        side: median(mine / dense for mine, dense in zip(each, times[_DENSE], strict=True))
        for side, each in times.items()
    }


def prefill(
    model: Any, sides: Mapping[str, Modules], tokens: int, rounds: int, device: torch.device, batch: int = 1
) -> dict[str, list[float]]:
    """Seconds of one forward pass over prompts that fills a cache and gives their last tokens' logits."""
    ids = torch.randint(256, (batch, tokens), device=device)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side in _rotated(sides, turn):
            put_modules(model, sides[side])
            times[side].append(timed(partial(model, ids, use_cache=True, logits_to_keep=1), device))
    return {side: each[1:] for side, each in times.items()}


def decode(
    model: Any, sides: Mapping[str, Modules], steps: int, device: torch.device, batch: int = 1
) -> dict[str, list[float]]:
    """Seconds of each step of one token a sequence after prompts of 64."""
    prompt, token = (torch.randint(256, (batch, count), device=device) for count in (64, 1))
    put_modules(model, next(iter(sides.values())))
    filled = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    caches = {side: copy.deepcopy(filled) for side in sides}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(steps + 1):
        for side in _rotated(sides, turn):
            put_modules(model, sides[side])
            step = partial(model, token, past_key_values=caches[side], use_cache=True)
            times[side].append(timed(step, device))
    return {side: each[1:] for side, each in times.items()}


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, to the end of what it started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _rotated(sides: Iterable[str], turn: int) -> list[str]:
    """The sides with another one first each turn, so that none always runs after the same other."""
    names = list(sides)
    return names[turn % len(names) :] + names[: turn % len(names)]
