"""Compares the bonds inside attention heads with pivoted low rank at equal parameters: predicted cost and measured KL.

    python -m benchmarks.attention_bonds [--quick] [--write] [--blocks 1 8 15 22 28]

For each block, two matrices at a time (v and o, or q and k) are left with a kept fraction of their parameters:

* low rank: both by pivoted low rank, with the split of the parameters that costs least.
* bond: the V–O bond with the same rank in all groups, or the Q–K bond without some pairs of each group; nothing else.
* bond + low rank: the same for what the bond leaves, at the best of several widths.

The KL of one block's change is measured on texts of the search text, never on held-out text.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.report import Bar, markdown, publish
from compression import Site
from compression.allocation.menu import tail_costs
from compression.bonds import Bond, discover_bonds, linear_layer
from compression.decomposition.measured import Matrix
from compression.head_coordinates import head_coordinates
from compression.numerics.attention_bonds import (
    cut_reader,
    cut_writer,
    eliminate_directions,
    eliminate_pairs,
    pair_rows,
    rotary_pairs,
)
from compression.numerics.elimination import refit
from compression.numerics.whitening import shrink
from compression.sites import dense_weight, put_modules
from search.config import Config
from search.evaluation.workload import Workload
from search.experiment.experiment import Experiment, workload_sequences
from search.experiment.open_model import open_model

KEPT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
MEASURED = (0.8, 0.6, 0.4)
METHODS = ("low rank", "bond", "bond + low rank")
_WIDTHS, _TEXTS = 12, 8
"""Number of widths of a bond at which what is left is decomposed, and of the texts that the KL is measured on."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two matrices of one attention, with their metrics, and how both are rewritten in the model's own shapes.

    Attributes:
        first, second: v and o with their values in the kept coordinates, or q and k with their kept rows.
        cost: predicted cost of the bond, nats per token.
        lift_first, lift_second: matrices that multiply the first from the left and the second from the left or, for o,
            from the right, and give them their full shapes back.
        of_values: whether the matrices are v and o.
    """

    first: Matrix
    second: Matrix
    cost: float
    lift_first: torch.Tensor
    lift_second: torch.Tensor
    of_values: bool

    @property
    def parameters(self) -> int:
        return self.first.weight.numel() + self.second.weight.numel()

    def full(self, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns two matrices of these shapes in the full shapes."""
        first, second = weights
        return self.lift_first @ first, second @ self.lift_second if self.of_values else self.lift_second @ second


def values(value: Matrix, output: Matrix, groups: int, size: int, widths: Sequence[int]) -> Iterator[Pair]:
    """Yields v and o at some ranks of the V–O bond."""
    found = eliminate_directions(output.weight, output.inputs, output.gradients, groups, size)
    heads = output.weight.shape[1] // (groups * size)
    for width in widths:
        ranks = found.ranks[width]
        kept = [rows[:width] for rows in found.basis]
        thin, wide = (torch.block_diag(*(rows for rows in kept for _ in range(count))) for count in (1, heads))
        reader = cut_reader(output.weight, output.inputs, found.basis, ranks)
        writer = cut_writer(value.weight, found.basis, ranks)
        first = Matrix(writer, value.inputs, thin @ value.gradients @ thin.mT)
        second = Matrix(reader, wide @ output.inputs @ wide.mT, output.gradients)
        yield Pair(first, second, float(found.cost[width]), thin.mT, wide, True)


def scores(query: Matrix, key: Matrix, groups: int, pairs: torch.Tensor, widths: Sequence[int]) -> Iterator[Pair]:
    """Yields q and k without some pairs of each group, by the number of pairs of all groups."""
    found = eliminate_pairs(query.weight, query.inputs, query.gradients, groups, pairs, shared=False)
    heads = len(query.weight) // len(key.weight)
    for width in widths:
        rows, places = (pair_rows(pairs, found.kept(width), count, shared=False) for count in (heads, 1))
        fitted = refit(query.weight.mT, query.gradients, rows).mT
        # The error of q is that of Qᵀ with refitted columns, so the rows that are left out stay 0.
        first = Matrix(fitted, query.inputs, query.gradients[rows][:, rows])
        second = Matrix(key.weight[places], key.inputs, key.gradients[places][:, places])
        lifts = (torch.eye(len(each.weight)).double()[:, at] for each, at in ((query, rows), (key, places)))
        yield Pair(first, second, float(found.cost[width]), *lifts, of_values=False)


Curve = tuple[NDArray[np.int64], NDArray[np.float64]]


def curve(matrix: Matrix) -> Curve:
    """Returns parameters and predicted cost of pivoted low rank by rank; the full rank is the dense matrix."""
    left, right = torch.linalg.cholesky(matrix.gradients), torch.linalg.cholesky(matrix.inputs)
    white = left.mT @ matrix.weight @ right
    gram = white @ white.mT if len(white) < white.shape[1] else white.mT @ white
    costs = tail_costs(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt().numpy())
    ranks = np.arange(len(costs))
    return ranks * (sum(matrix.weight.shape) - ranks), costs


def best_split(pair: Pair, curves: Sequence[Curve], budget: int) -> tuple[float, tuple[int, int]]:
    """Returns the least cost of both matrices by low rank within so many parameters, and the two ranks."""
    (sizes, costs), (others, others_cost) = curves
    rank = np.searchsorted(others, budget - sizes, side="right") - 1
    total = np.where(rank >= 0, costs + others_cost[rank], np.inf)
    at = int(total.argmin())
    return pair.cost + float(total[at]), (at, int(rank[at]))


def truncated(matrix: Matrix, rank: int) -> torch.Tensor:
    """Returns the best matrix of a rank in the metric of a matrix."""
    left, right = torch.linalg.cholesky(matrix.gradients), torch.linalg.cholesky(matrix.inputs)
    u, s, v = torch.linalg.svd(left.mT @ matrix.weight @ right, full_matrices=False)
    outer = torch.linalg.solve_triangular(left.mT, u[:, :rank] * s[:rank], upper=True)
    found: torch.Tensor = outer @ torch.linalg.solve_triangular(right, v[:rank], upper=False, left=False)
    return found


Result = tuple[float, tuple[torch.Tensor, torch.Tensor]]


def compared(pairs: Sequence[Pair], curves: Sequence[Sequence[Curve]], kept: float) -> dict[str, Result]:
    """Returns the predicted cost and the two full matrices by method at one kept fraction. The first pair is whole."""
    budget = int(kept * pairs[0].parameters)
    found: dict[str, Result] = {}
    splits = [best_split(pair, each, budget) for pair, each in zip(pairs, curves, strict=True)]
    at = min(range(len(pairs)), key=lambda number: splits[number][0])
    for method, number in (("low rank", 0), ("bond + low rank", at)):
        pair, (cost, ranks) = pairs[number], splits[number]
        made = [truncated(each, rank) for each, rank in zip((pair.first, pair.second), ranks, strict=True)]
        found[method] = cost, pair.full(made)
    return found


def measured_kl(model: nn.Module, workload: Workload, names: Sequence[str], weights: Sequence[torch.Tensor]) -> float:
    """Returns the KL after two matrices of the model are replaced, and puts the old ones back."""
    taken = {name: model.get_submodule(name) for name in names}
    new = {
        name: linear_layer(weight.to(dense_weight(taken[name])), taken[name].bias)
        for name, weight in zip(names, weights, strict=True)
    }
    try:
        put_modules(model, new)
        return workload.measure(model).kl
    finally:
        put_modules(model, taken)


def evenly(most: int) -> list[int]:
    """Returns widths from the full one down to a quarter of it."""
    return [round(most * (1 - 0.75 * number / _WIDTHS)) for number in range(_WIDTHS + 1)]


def block_results(
    experiment: Experiment, bond: Bond, workload: Workload
) -> tuple[dict[tuple[str, str, float], float], dict[tuple[str, str, float], float]]:
    """Returns predicted cost and measured KL of one attention by matrices, method and kept fraction."""
    model, statistics = experiment.loaded.model, experiment.calibration()
    layout = head_coordinates(model, bond)
    query, key, value, output = (
        Matrix(
            dense_weight(model.get_submodule(name)).detach().double(),
            shrink(statistics.input(name), experiment.calibration.shrinkage),
            shrink(statistics.gradient(name), experiment.calibration.shrinkage),
        )
        for name in bond.sites
    )
    groups, size = bond.groups, bond.rows[2]
    cases = {}
    if layout.values:
        names = bond.sites[2:]
        cases["v + o"] = names, lambda widths: values(value, output, groups, size, widths), size
    if layout.scores in ("half", "interleaved"):
        pairs = rotary_pairs(bond.rows[1], layout.scores == "interleaved")
        names = bond.sites[:2]
        cases["q + k"] = names, lambda widths: scores(query, key, groups, pairs, widths), groups * len(pairs)
    predicted, measured = {}, {}
    for label, (names, cut, most) in cases.items():
        grid = list(cut(evenly(most)))
        curves = [(curve(pair.first), curve(pair.second)) for pair in grid]
        alone = list(cut([int(kept * most) for kept in KEPT]))
        for kept, single in zip(KEPT, alone, strict=True):
            found = compared(grid, curves, kept)
            found["bond"] = single.cost, single.full((single.first.weight, single.second.weight))
            for method in METHODS:
                predicted[label, method, kept] = found[method][0]
                if kept in MEASURED:
                    kl = measured_kl(model, workload, names, found[method][1])
                    measured[label, method, kept] = kl
                    print(
                        f"{bond.name}: {label}, {method}, kept {kept}: {found[method][0]:.6f}, KL {kl:.6f}", flush=True
                    )
    return predicted, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="measure one block on two texts")
    parser.add_argument("--write", action="store_true", help="write the tables to results/")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 8, 15, 22, 28], help="blocks to measure")
    arguments = parser.parse_args()
    config = Config(calibration_tokens=8192)
    device = torch.device("cpu")
    loaded, sites = open_model(config, device)
    experiment = Experiment.of(config, loaded, sites, device)
    blocks = arguments.blocks[:1] if arguments.quick else arguments.blocks
    text = experiment.splits.search_text.labelled[: 2 if arguments.quick else _TEXTS]
    workload = Workload(workload_sequences(loaded, [], config.proxy, config.proxy_form, text), loaded.model)
    workload.reference(loaded.model)
    start, predicted, measured = time.perf_counter(), {}, {}
    for bond in heads(loaded.model, sites, blocks):
        predicted[bond.block], measured[bond.block] = block_results(experiment, bond, workload)
        print(f"block {bond.block} after {time.perf_counter() - start:.0f} s", flush=True)
    body, bars = report(predicted, measured)
    counts = (
        f"Attentions of the blocks {', '.join(map(str, predicted))} of SmolLM2-135M-Instruct, with "
        f"{config.calibration_tokens:,} calibration tokens. KL in nats per token on {workload.tokens:,} tokens of the "
        "search text."
    )
    publish("benchmarks.attention_bonds", "Bonds inside attention heads", f"{counts}\n\n{body}", bars, arguments.write)


def heads(model: nn.Module, sites: Sequence[Site], blocks: Sequence[int]) -> list[Bond]:
    """Returns the bonds of the heads of some blocks."""
    inside = [site for site in sites if site.block in blocks]
    return [bond for bond in discover_bonds(model, inside) if bond.kind == "heads"]


Table = dict[int, dict[tuple[str, str, float], float]]


def report(predicted: Table, measured: Table) -> tuple[str, list[Bar]]:
    """Returns a table per pair of matrices, the agreement of prediction and measurement, and the bars."""
    parts, bars = [], []
    for label in dict.fromkeys(label for found in predicted.values() for label, _, _ in found):
        rows = []
        for block, found in predicted.items():
            for method in METHODS:
                cells = [f"{found[label, method, kept]:.6f}" for kept in KEPT]
                seen = [f"{measured[block][label, method, kept]:.6f}" for kept in MEASURED]
                rows.append([f"{block}: {method}", *cells, *seen])
        head = ["block", *(f"{kept}" for kept in KEPT), *(f"KL at {kept}" for kept in MEASURED)]
        parts.append(f"Predicted cost of {label} by kept fraction, and measured KL:\n\n{markdown(head, rows)}")
        for kept in MEASURED:
            ratios = [
                found[label, "bond + low rank", kept] / found[label, "low rank", kept] for found in measured.values()
            ]
            name = f"kl_of_bond_over_low_rank_{label.replace(' + ', '_')}_{kept}"
            bars.append(Bar(name, float(np.median(ratios)), "<=", 1))
    rows = []
    for method in METHODS:
        points = [
            (predicted[block][key], kl)
            for block, found in measured.items()
            for key, kl in found.items()
            if key[1] == method
        ]
        guess, truth = np.array(points).T
        slope = float(np.exp(np.mean(np.log(np.maximum(truth, 1e-9)) - np.log(np.maximum(guess, 1e-9)))))
        ranks = [values.argsort().argsort() for values in (guess, truth)]
        rows.append([method, len(points), f"{np.corrcoef(*ranks)[0, 1]:.3f}", f"{slope:.2f}"])
    head = ["method", "cases", "rank correlation", "KL / predicted (geometric mean)"]
    parts.append(f"How measured KL follows the prediction:\n\n{markdown(head, rows)}")
    return "\n\n".join(parts), bars


if __name__ == "__main__":
    main()
