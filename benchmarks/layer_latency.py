"""Compares the latency of compressed layers, and of a model made of them, with that of dense ones.

    python -m benchmarks.layer_latency [--quick] [--write] [--model default] [--device auto] [--form factors]

Measures a whole model of `pivoted-lowrank` layers with one kept fraction at every site, in prefill and in decoding with
a KV cache, and then each route of single layers by number of tokens and kept fraction. With `--form plain`, MLPs and
attentions have fewer hidden units and heads instead, and single layers are left out. Dense and compressed versions
take turns in one process. The weights are random, since time does not depend on them. On a GPU, arithmetic is bfloat16,
and batches of prompts are measured too, since a single prompt leaves most of a GPU idle.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.report import Bar, markdown, publish
from compression.bonds import bonds_by_kind, with_bonds
from compression.decomposition.joint_menu import multiple_of
from compression.layers.planner import Planned, Planner, random_layer
from compression.layers.routes import Plan, Route, modelled, routes
from compression.numerics.legs import Legs, resolve
from compression.sites import Site, Unit, dense_weight, discover_sites, put_modules, units
from search.evaluation.latency import decode, prefill, timed
from search.model.devices import resolve_device
from search.model.loading import load_model

SLOWEST, SPEEDUP = {"factors": 1.05, "plain": 1.0}, 1.25
"""Largest time over that of the dense model, by form, and least speed of prompts of 512 tokens at kept 0.6."""
_COLD = 1 << 26  # bytes of weights used in turn, so that a layer's weights are not in a CPU cache when it runs


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements: layer shapes, topologies with kept fractions, token counts, times and rounds."""

    shapes: tuple[tuple[int, int], ...] = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))
    topologies: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("pivoted-lowrank", (0.2, 0.4, 0.6, 0.8, 0.9)),
        ("lowrank", (0.2, 0.6, 0.9)),
        ("mpo2", (0.2, 0.6)),
        ("mpo3", (0.2,)),
    )
    tokens: tuple[int, ...] = (1, 8, 64, 512, 2048)
    seconds: float = 0.25
    kept: tuple[float, ...] = (0.9, 0.8, 0.6, 0.4)
    rounds: int = 7
    steps: int = 32


QUICK = Sizes(
    shapes=((576, 576), (1536, 576)),
    topologies=(("pivoted-lowrank", (0.6, 0.9)), ("mpo2", (0.2,))),
    tokens=(1, 64, 512),
    seconds=0.15,
    kept=(0.9, 0.6),
    rounds=5,
)


def layer_rows(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[list[str]]:
    """Returns one row per layer and route with its time relative to the dense layer for each token count."""
    rows = []
    for out_features, in_features in sizes.shapes:
        for topology, kept_fractions in sizes.topologies:
            legs = resolve(topology, out_features, in_features)
            for kept in kept_fractions:
                chi = chi_at(legs, kept)
                ratios = {
                    tokens: layer_ratios(legs, chi, tokens, sizes.seconds, device, dtype) for tokens in sizes.tokens
                }
                for route in routes(legs):
                    if any(route in each for each in ratios.values()):
                        cells = [f"{each[route]:.2f}" if route in each else "" for each in ratios.values()]
                        rows.append([f"{out_features}×{in_features} {topology} {kept:g}", str(chi), route, *cells])
    return rows


def layer_ratios(
    legs: Legs, chi: int, tokens: int, seconds: float, device: torch.device, dtype: torch.dtype
) -> dict[Route, float]:
    """Median time relative to the dense layer in the same turn, for routes within 6 times the lowest estimate."""
    estimates = modelled(legs, chi, tokens)
    ways = [route for route in routes(legs) if estimates[route] <= 6 * min(estimates.values())]
    copies = max(2, min(32, _COLD // (legs.parameters(chi) * dtype.itemsize)))
    layers = [random_layer(legs, chi, dtype, device) for _ in range(copies)]
    for layer in layers:
        layer.plan = Plan(tuple(enumerate(ways)))
    dense = [
        nn.Linear(layers[0].in_features, layers[0].out_features, bias=False, device=device, dtype=dtype)
        for _ in range(copies)
    ]
    activations = torch.randn(tokens, layers[0].in_features, device=device).to(dtype)
    found: dict[Route, list[float]] = {route: [] for route in ways}
    end, turn = time.perf_counter() + seconds, 0
    while turn < 4 or (time.perf_counter() < end and turn < 8 * copies):
        linear = dense[turn % copies]
        reference = timed(partial(linear, activations), device)
        for number, route in enumerate(ways, 1):
            layer = layers[(turn + number * (copies // (len(ways) + 1))) % copies]
            found[route].append(timed(partial(layer.run, activations, route), device) / reference)
        turn += 1
    return {route: median(each[1:]) for route, each in found.items()}


@dataclass(frozen=True)
class ModelRow:
    """A whole model at one kept fraction: medians of milliseconds and of paired time ratios, per kind of work."""

    kept: float
    optimize: str
    milliseconds: Mapping[str, float]
    ratios: Mapping[str, float]
    planned: Planned


def model_rows(name: str, form: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[ModelRow]:
    """Measures the model dense and compressed, in turns, at every kept fraction.

    Factors are planned for memory and for latency; plain matrices need no plan.
    """
    model = load_model(name, device, dtype).model
    sites = discover_sites(model)
    if form == "plain":
        sites = with_bonds(sites, bonds_by_kind(model, sites))
    dense = {site.name: model.get_submodule(site.name) for site in sites}
    rows = []
    for kept in sizes.kept:
        sides: dict[str, dict[str, nn.Module]] = {"dense": dense}
        planned = {}
        if form == "plain":
            sides[form] = narrower(sites, dense, kept)
            taken = sum(parameter.nbytes for layer in sides[form].values() for parameter in layer.parameters())
            planned[form] = Planned(taken, taken, {})
        else:
            layers = {site.name: compressed(site, kept, device, dtype) for site in sites}
            for optimize in ("memory", "latency"):
                sides[optimize] = {name: copy.deepcopy(layer) for name, layer in layers.items()}
                planned[optimize] = Planner(optimize).plan_(nn.ModuleList(sides[optimize].values()))
            del layers
        times = {
            "prefill 512": prefill(model, sides, 512, sizes.rounds, device),
            "prefill 64": prefill(model, sides, 64, 2 * sizes.rounds, device),
            "decode": decode(model, sides, sizes.steps, device),
        }
        if device.type == "cuda":
            times["prefill 16×512"] = prefill(model, sides, 512, sizes.rounds, device, 16)
        for optimize in planned:
            milliseconds = {work: 1e3 * median(each[optimize]) for work, each in times.items()}
            paired = {work: zip(each[optimize], each["dense"], strict=True) for work, each in times.items()}
            ratios = {work: median(mine / other for mine, other in pairs) for work, pairs in paired.items()}
            rows.append(ModelRow(kept, optimize, milliseconds, ratios, planned[optimize]))
        put_modules(model, dense)
    return rows


def compressed(site: Site, kept: float, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Makes a random compressed layer with the shape of a site."""
    legs = resolve("pivoted-lowrank", site.out_features, site.in_features)
    return random_layer(legs, chi_at(legs, kept), dtype, device)


def narrower(sites: Sequence[Site], dense: Mapping[str, nn.Module], kept: float) -> dict[str, nn.Module]:
    """Makes random dense layers in which every bond keeps the fraction `kept` of its groups, at least 1.

    Widths are what is fast on the device; layers that no bond cuts are those of `dense`.
    """
    layers = dict(dense)
    for unit in units(sites):
        if not isinstance(unit, Unit):
            continue
        weight = dense_weight(dense[unit.sites[0].name])
        step = multiple_of(unit, None, weight.device.type)
        width = max(1, round(kept * unit.groups / step)) * step
        for site in unit.sites:
            rows, columns = site.shape((width,))
            bias = getattr(dense[site.name], "bias", None) is not None
            layers[site.name] = nn.Linear(columns, rows, bias, device=weight.device, dtype=weight.dtype)
    return layers


def chi_at(legs: Legs, kept: float) -> int:
    """The largest χ that keeps at most the fraction `kept` of the parameters, at least 1."""
    chis = range(1, max(legs.full_bonds) + 1)
    return max((chi for chi in chis if legs.parameters(chi) <= kept * legs.dense_parameters), default=1)


def body(name: str, form: str, rows: Sequence[ModelRow], layers: Sequence[Sequence[str]], sizes: Sizes) -> str:
    work = list(rows[0].ratios)
    header = ["kept fraction, optimized for", *(f"{name}, ms" for name in work), *(f"{name}, ratio" for name in work)]
    whole = [
        [
            f"{row.kept:g}, {row.optimize}",
            *(f"{row.milliseconds[name]:.1f}" for name in work),
            *(f"{row.ratios[name]:.2f}" for name in work),
            f"{row.planned.stored_bytes / 1e6:.0f}",
            f"{row.planned.resident_bytes / 1e6:.0f}",
        ]
        for row in rows
    ]
    made = (
        "every MLP and attention keeping one fraction of its hidden units and heads"
        if form == "plain"
        else "every matrix as `pivoted-lowrank` at one kept fraction"
    )
    parts = [
        f"Model {name} with {made}. A ratio is the time relative to the dense model in the same round, median over "
        "rounds; below 1 is faster. MB count the compressed matrices as stored and as held in memory.",
        markdown([*header, "stored, MB", "resident, MB"], whole),
    ]
    if layers:
        parts += [
            "Single layers: time relative to a dense layer by route and number of tokens. A route is left out if its "
            "estimated cost is more than six times the lowest.",
            markdown(["layer, kept fraction", "χ", "route", *map(str, sizes.tokens)], layers),
        ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="use fewer layers and rounds; below 5 minutes on 2 cores")
    parser.add_argument("--write", action="store_true", help="write results/layer_latency.md")
    parser.add_argument("--model", default="default", help="as for search.py")
    parser.add_argument("--device", default="auto", help="as for search.py")
    parser.add_argument("--form", choices=tuple(SLOWEST), default="factors", help="factors, or plain smaller matrices")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else Sizes()
    device = resolve_device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.no_grad():
        rows = model_rows(arguments.model, arguments.form, sizes, device, dtype)
        layers = layer_rows(sizes, device, dtype) if arguments.form == "factors" else []
    fast = [row for row in rows if row.optimize != "memory"]
    [at_bar] = [row for row in fast if row.kept == 0.6]
    slowest = max(ratio for row in fast for ratio in row.ratios.values())
    bars = [Bar("slowest_over_dense", slowest, "<=", SLOWEST[arguments.form])]
    for work, ratio in at_bar.ratios.items():
        if "512" in work:
            bars.append(Bar(f"{work.replace(' ', '_')}_speedup_at_0.6", 1 / ratio, ">=", SPEEDUP))
    title = f"Latency of compressed layers: {device.type}, {str(dtype).removeprefix('torch.')}"
    named = ("" if arguments.model == "default" else Path(arguments.model).name, arguments.form.removeprefix("factors"))
    text = body(arguments.model, arguments.form, rows, layers, sizes)
    publish("benchmarks.layer_latency", title, text, bars, arguments.write, "-".join(filter(None, named)))


if __name__ == "__main__":
    main()
