"""The planner: which route every MPO layer takes for how many tokens, from costs measured once per machine.

Knows how to time a layer of given legs, χ, type and device, and a JSON file in which measured costs last; its caller
says where. Weights are timed as a model meets them: not in the processor's cache, by going through many copies.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import get_args

import torch
from torch import nn

from compression.layers.mpo_linear import MPOLinear
from compression.layers.routes import OPTIMIZE, TOKENS, Optimize, Plan, Route, choose, extra_entries, modelled, routes
from compression.numerics.gauge import PivotedCore
from compression.numerics.legs import Legs
from compression.numerics.pivoted_product import ALIGNED, padded
from compression.refusal import Refusal
from compression.storage.whole_files import replace_file

__all__ = ["Planned", "Planner", "measured", "random_layer"]

_FORMAT = 1
_FREE = ("first", "last", "pivoted", "transposed", "rebuild")  # keep nothing: without one there is no plan for "memory"
_LARGEST_FILE = 1 << 24  # bytes
_COLD = 1 << 26  # bytes of weights to go through so that none is in a cache when its turn comes
_HOPELESS = 6.0  # routes estimated to cost more than this many times the best are not timed
_SECONDS = 0.3  # spent on one layer and token count, about


@dataclass(frozen=True)
class Planned:
    """What a planner did to a model.

    Attributes:
        resident_bytes: of the MPO layers, what they keep beside the stored tensors included.
        stored_bytes: of their stored tensors alone.
        used: how many layers take each route for some token count.
    """

    resident_bytes: int
    stored_bytes: int
    used: Mapping[Route, int]


class Planner:
    """Plans for MPO layers.

    Args:
        optimize: "memory" keeps nothing resident but the stored tensors; "latency" also keeps merged or expanded
            weights where a layer is faster with them, so that none is slower than dense.
        file: JSON file of costs, made if missing; None measures anew in every process. A file that is torn, foreign or
            not writable is not an error: it is replaced, or left.
        tokens: token counts to plan for, at least one.
        measure: whether to time what the file does not know; otherwise its cost is estimated.

    Raises:
        ValueError: an unknown `optimize`, or no positive token counts.
    """

    def __init__(
        self, optimize: Optimize, file: Path | None = None, tokens: Sequence[int] = TOKENS, measure: bool = True
    ) -> None:
        if optimize not in OPTIMIZE:
            raise Refusal(f"optimize must be {' or '.join(OPTIMIZE)}, got {optimize!r}")
        if not tokens or min(tokens) < 1:
            raise Refusal(f"token counts to plan for must be positive, got {tuple(tokens)}")
        self._optimize = optimize
        self._file = file
        self._tokens = tuple(sorted(set(tokens)))
        self._measure = measure
        self._costs: dict[str, dict[str, dict[Route, float]]] | None = None

    def plan(self, layer: MPOLinear) -> Plan:
        """The plan for one layer, by the costs of a bond dimension like its own, see `_bucket`."""
        stored = layer.cores[-1]
        chi = _bucket(layer.legs, layer.chi)
        costs = {tokens: self._cost(layer.legs, chi, stored.dtype, stored.device, tokens) for tokens in self._tokens}
        return choose(costs, layer.legs, layer.chi, self._optimize)

    def share(self, legs: Legs, chi: int, dtype: torch.dtype, device: torch.device, tokens: int) -> float:
        """Time of a layer by its best route over that of the dense matrix, both of the same measurement.

        That is one of a bond dimension like `chi`; estimates of both make up for the difference.
        """
        like = _bucket(legs, chi)
        costs, estimates = self._cost(legs, like, dtype, device, tokens), modelled(legs, like, tokens)
        free = [route for route in costs if self._optimize == "latency" or not extra_entries(legs, like, route)]
        best = min(free, key=costs.__getitem__)
        dense = costs.get("merged") or costs[best] * estimates["merged"] / min(estimates[route] for route in costs)
        return costs[best] / dense * modelled(legs, chi, tokens)[best] / estimates[best]

    def plan_(self, model: nn.Module) -> Planned:
        """Give every MPO layer of a model its plan, and make what the plans keep."""
        resident, stored, used = 0, 0, Counter[Route]()
        for layer in model.modules():
            if isinstance(layer, MPOLinear):
                layer.plan = self.plan(layer)
                resident += layer.resident_bytes
                stored += sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
                used.update(layer.plan.used)
        return Planned(resident, stored, dict(used))

    def _cost(
        self, legs: Legs, chi: int, dtype: torch.dtype, device: torch.device, tokens: int
    ) -> Mapping[Route, float]:
        if self._costs is None:
            self._costs = _read(self._file)
        machine = self._costs.setdefault(_machine(device), {})
        sides = "x".join(".".join(map(str, side)) for side in (legs.out_legs, legs.in_legs))
        form = "pivoted" if legs.pivoted else "plain"
        kind = f"{sides} {form} chi={chi} {str(dtype).removeprefix('torch.')} {device.type}"
        key = f"{kind} threads={torch.get_num_threads()} tokens={tokens}"
        if key not in machine:
            if not self._measure:
                return modelled(legs, chi, tokens)
            machine[key] = measured(legs, chi, dtype, device, tokens)
            _write(self._file, self._costs)
        return machine[key]


def measured(
    legs: Legs, chi: int, dtype: torch.dtype, device: torch.device, tokens: int, seconds: float = _SECONDS
) -> dict[Route, float]:
    """Median seconds of a call by every route worth timing, taken in turns; about `seconds` are spent.

    Of the routes that keep nothing beside what is stored the best one always is.
    """
    estimates = modelled(legs, chi, tokens)
    limit = _HOPELESS * min(estimates.values())
    free = min((route for route in routes(legs) if not extra_entries(legs, chi, route)), key=estimates.__getitem__)
    ways = [route for route in routes(legs) if estimates[route] <= limit or route == free]
    stored, dense = (entries * dtype.itemsize for entries in (legs.parameters(chi), legs.dense_parameters))
    copies = max(2, min(64, _COLD // stored, 8 * _COLD // dense))
    layers = [random_layer(legs, chi, dtype, device) for _ in range(copies)]
    for layer in layers:
        layer.plan = Plan(tuple(enumerate(ways)))
    activations = torch.randn(tokens, layers[0].in_features, device=device).to(dtype)
    times: dict[Route, list[float]] = {route: [] for route in ways}
    end, turn = time.perf_counter() + seconds, 0
    with torch.no_grad():
        while turn < 3 or (time.perf_counter() < end and turn < 4 * copies + 16):
            for number, route in enumerate(ways):
                layer = layers[(turn + number * (copies // len(ways) + 1)) % copies]
                _wait(device)
                start = time.perf_counter()
                layer.run(activations, route)
                _wait(device)
                times[route].append(time.perf_counter() - start)
            turn += 1
    return {route: median(each[1:]) for route, each in times.items()}


def random_layer(legs: Legs, chi: int, dtype: torch.dtype, device: torch.device) -> MPOLinear:
    """A layer whose numbers mean nothing, for timing: outputs are of the size of the inputs."""
    cores: list[torch.Tensor | PivotedCore] = []
    for number, (left, right) in enumerate(pairwise(legs.bonds(chi))):
        out_leg, in_leg = legs.out_legs[number], legs.in_legs[number]
        core = torch.randn(left * out_leg * in_leg, right, device=device) / math.sqrt(in_leg * right)
        shape = (left, out_leg, in_leg, right)
        if legs.pivoted and number < len(legs.out_legs) - 1:
            order = torch.randperm(len(core), device=device)
            cores.append(PivotedCore(core[right:].to(dtype), order, shape))
        else:
            cores.append(core.to(dtype).reshape(shape))
    return MPOLinear(cores)


def _bucket(legs: Legs, chi: int) -> int:
    """The χ that stands for this one in measurements: near a sixteenth of the full one, and aligned like it or not."""
    full = max(legs.full_bonds)
    near = round(round(16 * chi / full) * full / 16)
    if padded(chi) == chi:
        return min(padded(max(1, near - ALIGNED // 2)), full - full % ALIGNED)
    odd = near | 1
    return odd if odd <= full else max(1, full - 1 + full % 2)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine(device: torch.device) -> str:
    """Version of torch and name of the processor that computes."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"torch {torch.__version__}, {name}"


def _read(file: Path | None) -> dict[str, dict[str, dict[Route, float]]]:
    """The costs in a file; nothing if it is missing, torn, too large, or not of this format."""
    try:
        if file is None or file.stat().st_size > _LARGEST_FILE:
            return {}
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        return {}
    machines = document.get("seconds")
    if not isinstance(machines, dict) or not all(isinstance(entries, dict) for entries in machines.values()):
        return {}
    return {
        machine: {key: costs for key, costs in entries.items() if _valid(costs)}
        for machine, entries in machines.items()
    }


def _valid(costs: object) -> bool:
    known = get_args(Route)
    return (
        isinstance(costs, dict)
        and any(route in costs for route in _FREE)
        and all(route in known for route in costs)
        and all(isinstance(cost, float) and math.isfinite(cost) and cost > 0 for cost in costs.values())
    )


def _write(file: Path | None, costs: Mapping[str, Mapping[str, Mapping[Route, float]]]) -> None:
    """Add costs to a file, which appears whole or not at all; what other processes wrote meanwhile is kept."""
    if file is None:
        return
    merged = _read(file)
    for machine, entries in costs.items():
        merged.setdefault(machine, {}).update({key: dict(value) for key, value in entries.items()})
    # A cache that cannot be kept costs time, not correctness.
    with suppress(OSError):
        replace_file(file, json.dumps({"format": _FORMAT, "seconds": merged}, indent=1))
