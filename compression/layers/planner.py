"""Plans the route of every MPO layer for every number of tokens, from costs measured once per machine.

Knows how to time a layer of given legs, χ, type and device, and how to store measured costs in a JSON file; does not
know where that file lies, which the caller states. Timing cycles through many copies of the weights, so that they are
not in the CPU cache, as in a real model.
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

from compression.layers.filled_linear import FilledLinear
from compression.layers.mpo_linear import MPOLinear
from compression.layers.routes import OPTIMIZE, TOKENS, Optimize, Plan, Route, choose, extra_entries, modelled, routes
from compression.numerics.gauge import PivotedCore
from compression.numerics.legs import Legs
from compression.numerics.pivoted_product import ALIGNED, padded
from compression.refusal import Refusal
from compression.storage.strict_json import json_digest
from compression.storage.whole_files import replace_file

__all__ = ["Planned", "Planner", "measured", "random_layer"]

_FORMAT = 1
_FREE = ("first", "last", "pivoted", "transposed", "rebuild")  # routes that keep nothing; "memory" needs one of them
_LARGEST_FILE = 1 << 24  # bytes
_COLD = 1 << 26  # bytes of weights to cycle through, so that none is in the CPU cache when it is used
_HOPELESS = 6.0  # routes whose estimated cost exceeds the best one by this factor are not timed
_SECONDS = 0.3  # approximate time spent on one layer and token count


@dataclass(frozen=True)
class Planned:
    """Summarizes the plans of a model's MPO layers and pruned matrices.

    Attributes:
        resident_bytes: memory of these layers in bytes, including what they keep besides the stored tensors.
        stored_bytes: bytes of their stored tensors alone.
        used: number of layers that take each route for some token count.
    """

    resident_bytes: int
    stored_bytes: int
    used: Mapping[Route, int]


class Planner:
    """Makes plans for MPO layers.

    Args:
        optimize: "memory" keeps only the stored tensors in memory. "latency" also keeps merged or expanded weights if a
            layer is faster with them, so no layer is slower than the dense one.
        file: JSON file of costs, created if missing; None measures again in every process. A damaged file or one of
            another format is replaced, and one that cannot be written is left as it is; neither is an error.
        tokens: token counts to plan for, at least one.
        measure: whether to measure costs that the file lacks; otherwise they are estimated.

    Raises:
        ValueError: `optimize` is unknown, or `tokens` is empty or has a count below 1.
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
        """Returns the plan of one layer, from the costs of a representative χ close to its own (see `_bucket`)."""
        stored = layer.cores[-1]
        chi = _bucket(layer.legs, layer.chi)
        costs = {tokens: self._cost(layer.legs, chi, stored.dtype, stored.device, tokens) for tokens in self._tokens}
        return choose(costs, layer.legs, layer.chi, self._optimize)

    def share(self, legs: Legs, chi: int, dtype: torch.dtype, device: torch.device, tokens: int) -> float:
        """Returns the time of a layer by its best route, divided by the time of the dense matrix.

        Both times come from one measurement at a representative χ close to `chi` (see `_bucket`); the ratio of the
        estimates at the two χ corrects for the difference.
        """
        like = _bucket(legs, chi)
        costs, estimates = self._cost(legs, like, dtype, device, tokens), modelled(legs, like, tokens)
        free = [route for route in costs if self._optimize == "latency" or not extra_entries(legs, like, route)]
        best = min(free, key=costs.__getitem__)
        dense = costs.get("merged") or costs[best] * estimates["merged"] / min(estimates[route] for route in costs)
        return costs[best] / dense * modelled(legs, chi, tokens)[best] / estimates[best]

    def plan_(self, model: nn.Module) -> Planned:
        """Set the plan of every MPO layer of a model, and build the tensors that the plans keep.

        Pruned and packed matrices are filled in and kept for "latency".
        """
        resident, stored, used = 0, 0, Counter[Route]()
        for layer in model.modules():
            if isinstance(layer, MPOLinear):
                layer.plan = self.plan(layer)
                resident += layer.resident_bytes
                stored += sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
                used.update(layer.plan.used)
            elif isinstance(layer, FilledLinear):
                layer.keeps = self._optimize == "latency"
                layer.prepare()
                resident += layer.resident_bytes
                stored += sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
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
    """Measures the median seconds of a call by every promising route, in turns, for about `seconds` in total.

    The measured routes always include the one with the lowest estimate among those that keep nothing in addition to the
    stored tensors.
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


def random_layer(
    legs: Legs, chi: int, dtype: torch.dtype, device: torch.device, bias: torch.Tensor | None = None
) -> MPOLinear:
    """Returns a layer with random numbers for timing, scaled so that outputs are about as large as inputs."""
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
    return MPOLinear(cores, bias)


def _bucket(legs: Legs, chi: int) -> int:
    """Returns the χ that represents `chi` in measurements: near a multiple of full χ / 16, and aligned like `chi`."""
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
    """Returns the version of torch and the name of the CPU or GPU."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"torch {torch.__version__}, {name}"


def _read(file: Path | None) -> dict[str, dict[str, dict[Route, float]]]:
    """Returns the costs in a file; nothing if it is missing, damaged, too large, or of another format."""
    try:
        if file is None or file.stat().st_size > _LARGEST_FILE:
            return {}
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        return {}
    machines = document.get("seconds")
    if document.get("sha256") not in (None, json_digest(machines)):  # earlier versions wrote none
        return {}
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
    """Add costs to a file atomically; costs that other processes wrote in the meantime are kept."""
    if file is None:
        return
    merged = _read(file)
    for machine, entries in costs.items():
        merged.setdefault(machine, {}).update({key: dict(value) for key, value in entries.items()})
    # A cache that cannot be written costs time, not correctness.
    with suppress(OSError):
        content = {"format": _FORMAT, "sha256": json_digest(merged), "seconds": merged}
        replace_file(file, json.dumps(content, indent=1))
