"""Compares the constant shrinkage of the second moments, 0.01, with other values, judged on other calibration text.

    python -m benchmarks.shrinkage [--quick] [--write] [--every 5]

The calibration batches are divided into two halves, each with its own token-weighted moments. A site is decomposed in
the shrunk metric of one half and truncated to a kept fraction. Its error E is judged by ½·tr(G E C Eᵀ) with the
unshrunk moments of the other half. Then the halves change roles. The same is done with half of each half, to show how
the best shrinkage changes with the number of tokens; a real run has twice the tokens of a half. No other text is used.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from benchmarks.report import Bar, markdown, publish
from compression import Site, Statistics, collect, resolve
from compression.decomposition.factors import lowrank_cores
from compression.numerics.whitening import shrink
from compression.sites import dense_weight
from search.config import Config
from search.experiment.calibration import calibration_batches
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model

SHRINKAGE = Config().shrinkage
SHRINKAGES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.05, 0.1)
KEPT = (0.8, 0.5)
SIDES = ("both", "input", "output")
"""The sides that are shrunk by the tried value; the other side is shrunk by the constant."""
Moments = tuple[torch.Tensor, torch.Tensor]
Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


def held_out_costs(
    weight: torch.Tensor,
    known: Moments,
    unknown: Moments,
    shrinkages: Sequence[tuple[float, float]],
    chis: Sequence[int],
) -> np.ndarray:
    """Computes ½·tr(G E C Eᵀ) with the `unknown` moments, for the error E of truncation in the shrunk `known` moments.

    Args:
        weight: W, (out, in).
        known: C (in, in) and G (out, out) in which the matrix is decomposed.
        unknown: C (in, in) and G (out, out) by which the error is judged.
        shrinkages: pairs of the shrinkages of C and G.
        chis: bond dimensions to truncate to.

    Returns:
        Costs in nats per token, float64, (shrinkages, χ).
    """
    weight = weight.double()
    inputs = {value: shrink(known[0], value) for value in {pair[0] for pair in shrinkages}}
    outputs = {value: shrink(known[1], value) for value in {pair[1] for pair in shrinkages}}
    other_inputs, other_gradients = (moment.double() for moment in unknown)
    result = np.empty((len(shrinkages), len(chis)))
    for row, (of_inputs, of_outputs) in enumerate(shrinkages):
        cores, _ = lowrank_cores(weight, inputs[of_inputs], outputs[of_outputs], None)
        left, right = cores[0][0, :, 0, :], cores[1][:, 0, :, 0]
        for column, chi in enumerate(chis):
            error = weight - left[:, :chi] @ right[:chi]
            result[row, column] = 0.5 * float(((other_gradients @ error @ other_inputs) * error).sum())
    return result


def against(costs: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Ratio of the sum of `costs` to that of `reference`, (sites,) each, and the standard error of the ratio.

    The standard error is that of the paired difference over sites.
    """
    difference = (costs - reference) / reference.sum()
    return 1 + float(difference.sum()), math.sqrt(len(difference)) * float(difference.std(ddof=1))


def trials(sides: Sequence[str]) -> dict[tuple[str, float], tuple[float, float]]:
    """Shrinkages of C and G by side and tried value."""
    return {
        (side, value): (SHRINKAGE if side == "output" else value, SHRINKAGE if side == "input" else value)
        for side in sides
        for value in SHRINKAGES
    }


def weighted(model: torch.nn.Module, sites: Sequence[Site], batches: Batches, seed: int) -> Statistics:
    """Moments weighted with the token weights that a first pass over the same batches gives."""
    device, first = batches[0][0].device, None
    for _ in range(2):
        first = collect(model, sites, batches, torch.Generator(device).manual_seed(seed), first=first)
    assert first is not None
    return first


def measure(
    model: torch.nn.Module, sites: Sequence[Site], known: Statistics, unknown: Statistics, sides: Sequence[str]
) -> dict[tuple[str, float], np.ndarray]:
    """Costs (sites, kept fractions) by side and tried value."""
    tried = trials(sides)
    distinct = sorted(set(tried.values()))
    found = []
    for site in sites:
        legs = resolve("pivoted-lowrank", site.out_features, site.in_features)
        chis = [legs.largest_chi(math.floor(kept * site.parameters)) for kept in KEPT]
        weight = dense_weight(model.get_submodule(site.name))
        moments = [(each.input(site.name), each.gradient(site.name)) for each in (known, unknown)]
        found.append(held_out_costs(weight, moments[0], moments[1], distinct, chis))
    costs = np.stack(found)
    return {key: costs[:, distinct.index(pair)] for key, pair in tried.items()}


def ratios(costs: Mapping[tuple[str, float], np.ndarray]) -> str:
    """Formats costs relative to the constant's, with both sides shrunk, by value and kept fraction, for progress."""
    totals = {value: costs["both", value].sum(0) / costs["both", SHRINKAGE].sum(0) for value in SHRINKAGES}
    return ", ".join(f"{value}: {' '.join(f'{each:.3f}' for each in total)}" for value, total in totals.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="use 4,096 tokens, every 10th site, and no quarters")
    parser.add_argument("--write", action="store_true", help="write the tables to results/")
    parser.add_argument("--every", type=int, default=5, help="measure one site in every N (default: 5)")
    arguments = parser.parse_args()
    config = Config(calibration_tokens=4096) if arguments.quick else Config()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded, sites = open_model(config, device)
    text = Experiment.of(config, loaded, sites, device).splits.calibration
    chosen = [site for site in sites if not site.dense_because][:: 10 if arguments.quick else arguments.every]
    batches, start, model = list(calibration_batches(loaded, text, config.seed)), time.perf_counter(), loaded.model
    halves = [weighted(model, chosen, batches[part::2], config.seed) for part in (0, 1)]
    print(f"moments of the halves after {time.perf_counter() - start:.0f} s", flush=True)
    results: dict[str, list[dict[tuple[str, float], np.ndarray]]] = {"half": [], "quarter": []}
    sides = SIDES[:1] if arguments.quick else SIDES
    for part in (0, 1):
        results["half"].append(measure(model, chosen, halves[part], halves[1 - part], sides))
        print(f"half {part + 1} after {time.perf_counter() - start:.0f} s: {ratios(results['half'][-1])}", flush=True)
    for part in () if arguments.quick else (0, 1):
        known = weighted(model, chosen, batches[part::4], config.seed)
        results["quarter"].append(measure(model, chosen, known, halves[1 - part], ("both",)))
        print(
            f"quarter {part + 1} after {time.perf_counter() - start:.0f} s: {ratios(results['quarter'][-1])}",
            flush=True,
        )
    body, bars = report(results)
    counts = (
        f"Measured on {len(chosen)} of {len(sites)} sites of SmolLM2-135M-Instruct with `pivoted-lowrank` and "
        f"{text.tokens:,} calibration tokens in {len(batches)} batches, {halves[0].tokens:,} and "
        f"{halves[1].tokens:,} of them in the halves."
    )
    publish("benchmarks.shrinkage", "Shrinkage of the second moments", f"{counts}\n\n{body}", bars, arguments.write)


def report(results: Mapping[str, Sequence[Mapping[tuple[str, float], np.ndarray]]]) -> tuple[str, list[Bar]]:
    """Returns a table per kept fraction with the best values in words, and a bar for the best value of each column."""
    columns = {f"half, {side}": ("half", side) for side in SIDES if (side, SHRINKAGE) in results["half"][0]}
    if results["quarter"]:
        columns["quarter, both"] = ("quarter", "both")
    blocks, bars, words = [], [], []
    for at, kept in enumerate(KEPT):
        cells: dict[str, list[tuple[float, float]]] = {}
        for header, (part, side) in columns.items():
            total = {value: sum(each[side, value][:, at] for each in results[part]) for value in SHRINKAGES}
            cells[header] = [against(total[value], total[SHRINKAGE]) for value in SHRINKAGES]
        medians, whole = [], results["half"]
        for value in SHRINKAGES:
            ratios = [each["both", value][:, at] / each["both", SHRINKAGE][:, at] for each in whole]
            medians.append(float(np.median(np.concatenate(ratios))))
        rows = [
            [value, *(f"{found[row][0]:.3f} ± {found[row][1]:.3f}" for found in cells.values()), f"{medians[row]:.3f}"]
            for row, value in enumerate(SHRINKAGES)
        ]
        table = markdown(["shrinkage", *columns, "half, both, median of sites"], rows)
        title = f"Kept {kept}: cost relative to that with {SHRINKAGE}, ± one standard error over sites, paired:"
        blocks.append(f"{title}\n\n{table}")
        for header, found in cells.items():
            best = min(range(len(SHRINKAGES)), key=lambda row: found[row][0])
            ratio, error = found[best]
            constant = f"{ratio - 1:+.1%} ± {error:.1%} in cost relative to the constant"
            verdict = "which is the constant" if SHRINKAGES[best] == SHRINKAGE else constant
            words.append(f"* kept {kept}, {header}: {SHRINKAGES[best]} is best, {verdict}.")
            bars.append(Bar(f"best_over_constant_{header.replace(', ', '_')}_{kept}", ratio, ">=", 0.99))
    explained = (
        "The moments come from a half or a quarter of the calibration text and are judged by the other half. In the "
        "columns `input` and `output`, only that side is shrunk by the value in the row, the other by "
        f"{SHRINKAGE}. Costs are summed over sites and over both roles of the halves, as a schedule sums them; the "
        "median over sites gives small costs the same weight as large ones. The best values are:"
    )
    return "\n\n".join([explained, "\n".join(words), *blocks]), bars


if __name__ == "__main__":
    main()
