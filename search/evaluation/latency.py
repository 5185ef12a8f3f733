"""Measure the latency of a model with several sets of layers, in alternation so that noise affects all sets equally."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from compression.bonds import linear_layer
from compression.decomposition.apply import ScheduleApplier
from compression.decomposition.factors import FactorStore
from compression.layers.planner import Planner, random_layer
from compression.layers.routes import Optimize
from compression.numerics.legs import resolve
from compression.schedule import Schedule
from compression.sites import Site, dense_weight, put_modules
from search.evaluation.logits import cache_argument
from search.runtime.files import cache_folder

__all__ = ["PROMPT", "Latency", "Modules", "against_dense", "decode", "layer_costs", "prefill", "timed"]

Modules = Mapping[str, nn.Module]

PROMPT = 512
"""Tokens of the prompt that a prefill is timed with."""
_ROUNDS, _STEPS = 5, 24
_SECONDS = 20.0  # after which no further round over prompts begins
_DENSE = "dense"


@dataclass(frozen=True)
class Latency:
    """Latency and memory of a compressed model relative to the dense one on this machine, with batch size 1.

    Attributes:
        optimize: what the execution plans of the layers optimize, "latency" or "memory".
        prefill_ratio: time for a prompt divided by the dense model's in the same round, median over the rounds.
        decode_ratio: the same ratio for one token after a prompt of 64 tokens; NaN for an encoder.
        prompt: number of tokens of the prompt.
        stored_bytes: bytes of the compressed matrices.
        resident_bytes: bytes of the compressed matrices and the additional tensors that their plans keep.
    """

    optimize: str
    prefill_ratio: float
    decode_ratio: float
    prompt: int
    stored_bytes: int
    resident_bytes: int

    def __str__(self) -> str:
        after = "" if math.isnan(self.decode_ratio) else f", {self.decode_ratio:.2f} for each token after it"
        return (
            f"time over dense, optimized for {self.optimize}: {self.prefill_ratio:.2f} for a prompt of {self.prompt} "
            f"tokens{after}; the compressed matrices store "
            f"{self.stored_bytes / 1e6:,.0f} MB and hold {self.resident_bytes / 1e6:,.0f} MB in memory"
        )


def layer_costs() -> Path:
    """The file in the user's cache that holds the planner's measured costs for this machine."""
    return cache_folder() / "layer-costs.json"


def against_dense(
    model: Any,
    store: FactorStore,
    schedules: Mapping[str, Schedule],
    optimize: Optimize,
    costs: Path | None,
    continues: bool = True,
    stand_ins: bool = False,
) -> dict[str, Latency]:
    """Measure schedules against the dense model, all in the same rounds; the model is dense again afterwards.

    Args:
        schedules: schedules by name; those that leave the whole model dense are skipped.
        optimize: what the execution plans optimize, "latency" or "memory".
        costs: the planner's file of measured costs, see `compression.layers.planner.Planner`. Costs missing from it are
            measured for "latency", which takes a minute or two the first time, and estimated for "memory".
        continues: whether the model continues text; an encoder only reads it.
        stand_ins: whether layers have random numbers in the shapes of a schedule, which nothing must be decomposed for.
            Time does not depend on the numbers. Ignored if a schedule has pruned or rounded matrices.

    Returns:
        Results by name of the schedule.
    """
    compressed = {side: one for side, one in schedules.items() if not all(choice.is_dense for _, choice in one)}
    names = {name for one in compressed.values() for name, choice in one if not choice.is_dense}
    if not names:
        return {}
    stand_ins = stand_ins and not any(choice.keeps_entries for one in compressed.values() for _, choice in one)
    device = next(model.parameters()).device
    prompt = min(PROMPT, getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT)
    planner = Planner(optimize, costs, measure=optimize == "latency")
    sides = {_DENSE: {name: model.get_submodule(name) for name in names}}
    with torch.no_grad(), ScheduleApplier(model, store, packed=True) as applier:
        planned = {}
        for side, schedule in compressed.items():
            if stand_ins:
                put_modules(model, sides[_DENSE])
                put_modules(model, _stand_ins(model, store.sites, schedule))
            else:
                applier.apply_(schedule)
            planned[side] = planner.plan_(model)
            sides[side] = {name: model.get_submodule(name) for name in names}
        try:
            prefilled = _over_dense(
                prefill(model, sides, prompt, _ROUNDS, device, seconds=_SECONDS, continues=continues)
            )
            decoded = _over_dense(decode(model, sides, _STEPS, device)) if continues else dict.fromkeys(sides, math.nan)
        finally:
            put_modules(model, sides[_DENSE])  # the applier does not know which side was timed last
    return {
        side: Latency(optimize, prefilled[side], decoded[side], prompt, of.stored_bytes, of.resident_bytes)
        for side, of in planned.items()
    }


def _stand_ins(model: nn.Module, sites: Sequence[Site], schedule: Schedule) -> dict[str, nn.Module]:
    """Returns layers with random numbers in the shapes of a schedule, by the names of the sites that it changes."""
    layers: dict[str, nn.Module] = {}
    for site in sites:
        choice, dense = schedule[site.name], model.get_submodule(site.name)
        if choice.is_dense:
            continue
        weight, (rows, columns) = dense_weight(dense), site.shape(choice.widths)
        bias = None if getattr(dense, "bias", None) is None else weight.new_zeros(rows)
        if choice.is_plain:
            layers[site.name] = linear_layer(torch.randn(rows, columns).to(weight) / math.sqrt(max(1, columns)), bias)
        else:
            legs = resolve(choice.topology, rows, columns)
            layers[site.name] = random_layer(legs, choice.chi, weight.dtype, weight.device, bias)
    return layers


def _over_dense(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Ratio of each side's time to the dense side's in the same round, median over the rounds."""
    return {
        side: median(mine / dense for mine, dense in zip(each, times[_DENSE], strict=True))
        for side, each in times.items()
    }


def prefill(
    model: Any,
    sides: Mapping[str, Modules],
    tokens: int,
    rounds: int,
    device: torch.device,
    batch: int = 1,
    seconds: float = math.inf,
    continues: bool = True,
) -> dict[str, list[float]]:
    """Seconds of a forward pass over prompts that fills a KV cache and computes logits for the last token only.

    An encoder fills no cache and computes all its predictions.

    Args:
        sides: the sets of layers to compare, by name.
        tokens: tokens per prompt.
        rounds: measurements per side, after one warm-up round.
        batch: number of prompts.
        seconds: time after which no further round begins, except the first after the warm-up.
        continues: whether the model continues text.

    Returns:
        The times of the rounds, by name of the side.
    """
    ids = torch.randint(_tokens_of(model), (batch, tokens), device=device)
    times: dict[str, list[float]] = {side: [] for side in sides}
    start = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > 1 and time.perf_counter() - start > seconds:
            break
        for side in _rotated(sides, turn):
            put_modules(model, sides[side])
            how = {"use_cache": True, "logits_to_keep": 1} if continues else {}
            times[side].append(timed(partial(model, ids, **how), device))
    return {side: each[1:] for side, each in times.items()}


def decode(
    model: Any, sides: Mapping[str, Modules], steps: int, device: torch.device, batch: int = 1
) -> dict[str, list[float]]:
    """Seconds of each decoding step of one token per sequence after prompts of 64 tokens; otherwise as `prefill`."""
    prompt, token = (torch.randint(_tokens_of(model), (batch, count), device=device) for count in (64, 1))
    caches, name = {}, cache_argument(model)
    for side, modules in sides.items():  # sides may differ in their heads, so that each fills its own cache
        put_modules(model, modules)
        caches[side] = {name: model(prompt, use_cache=True, logits_to_keep=1)[name]}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(steps + 1):
        for side in _rotated(sides, turn):
            put_modules(model, sides[side])
            step = partial(model, token, **caches[side], use_cache=True)
            times[side].append(timed(step, device))
    return {side: each[1:] for side, each in times.items()}


def _tokens_of(model: Any) -> int:
    """Number of different tokens that timed prompts consist of."""
    return min(256, int(model.config.get_text_config().vocab_size))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, including the work that it starts on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _rotated(sides: Iterable[str], turn: int) -> list[str]:
    """The names of the sides, rotated so that each turn starts with another side."""
    names = list(sides)
    return names[turn % len(names) :] + names[: turn % len(names)]
