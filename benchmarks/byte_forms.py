"""Measures which forms of a matrix are worth their bytes, by the cost that they predict; results/byte_forms.md.

    python -m benchmarks.byte_forms [--write] [--blocks 2 14 26]

Every form is made of all matrices of some blocks of the default model, at several sizes, and its predicted costs
½·tr(G E C Eᵀ) and bytes are added up; masks, indices and scales count. The last column is the cost over that of
`rounded` at the same bytes, which is interpolated in the logarithm of its cost.

* rounded: integers of 8 to 2 bits in groups of 64 with one scale, rounded in the metric of C and G.
* pruned: single entries removed in that metric, the others refitted; 16 bits, or rounded to 4 or 3.
* 2:4: the same with two of every four neighbours kept, whose places take two bits each.
* lowrank: factors of the best low rank in the metric, 16 bits; lowrank, rounded: the same in 8 or 4 bits.
* lowrank+sparse: a low rank and a pruned residual, each fitted to what the other leaves, twice; 16 bits, or the
  residual in 4 and the factors in 8.
* mpo+sparse: the same with an MPO of two cores, fitted in the metric, in 16 bits; the residual in 16 or 4. Saten (arXiv
  2505.14871) puts such a residual on a tensor train.
* rounded+lowrank: a matrix of 3 or 2 bits, and the best low rank of its error in the metric, 16 bits.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.report import Bar, markdown, publish
from compression.decomposition.measured import Matrix
from compression.numerics.bitmask import bitmask_bytes
from compression.numerics.cores import contract
from compression.numerics.fit import fit
from compression.numerics.group_integers import Codes, Metric, dequantize, quantize
from compression.numerics.legs import Legs, resolve
from compression.numerics.packed_size import GROUP, packed_bytes
from compression.numerics.pruning import Pruned, prune, refit_pruned
from compression.numerics.whitening import Whitening, shrink
from search.config import Config
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model

_DENSITIES = (0.8, 0.6, 0.45, 0.3, 0.2)
_RANKS = (0.5, 0.25, 0.12)
"""Ranks, relative to that at which factors have as many entries as the matrix."""


class Forms:
    """The forms of one matrix: (name, size of the form, predicted cost, bytes)."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix, self.metric = matrix, Metric(matrix.inputs, matrix.gradients)
        self.rows, self.columns = matrix.weight.shape
        self.mask_bytes = bitmask_bytes(self.rows, self.columns)
        self.whitening = Whitening(torch.linalg.cholesky(matrix.inputs), torch.linalg.cholesky(matrix.gradients))

    def cost(self, made: torch.Tensor) -> float:
        error = made.double() - self.matrix.weight
        return 0.5 * float((self.matrix.gradients @ error @ self.matrix.inputs * error).sum())

    def rounded(self, weight: torch.Tensor, bits: int) -> torch.Tensor:
        return _values(quantize(weight, bits, GROUP, self.metric), self.columns, bits)

    def entries(self, pruned: Pruned, bits: int) -> tuple[torch.Tensor, int]:
        """The entries of a pruned matrix in so many bits, and their bytes without those of their places."""
        count = int(pruned.mask.sum())
        if bits == 16:
            return pruned.matrix, 2 * count
        values = _values(quantize(pruned.matrix, bits, GROUP, self.metric, pruned.mask), count, bits)
        return torch.zeros_like(pruned.matrix).masked_scatter_(pruned.mask, values), packed_bytes(1, count, bits)

    def low_rank(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (out, rank) and (rank, in) of the best matrix of a rank in the metric."""
        left, values, right = torch.linalg.svd(self.whitening.apply(weight.double()), full_matrices=False)
        roots = values[:rank].sqrt()
        return self.whitening.undo_left(left[:, :rank] * roots), self.whitening.undo_right(
            roots[:, None] * right[:rank]
        )

    def factor_bytes(self, rank: int, bits: int) -> int:
        if bits == 16:
            return 2 * rank * (self.rows + self.columns)
        return packed_bytes(self.rows, rank, bits) + packed_bytes(rank, self.columns, bits)

    def rounded_factors(self, left: torch.Tensor, right: torch.Tensor, bits: int) -> torch.Tensor:
        """The product of rounded factors; the left one is solved again for the rounded right one."""
        inputs = self.matrix.inputs
        inner = _values(quantize(right.float(), bits, GROUP, Metric(inputs)), self.columns, bits).double()
        seen = inner @ inputs @ inner.T
        seen.diagonal().add_(1e-6 * seen.diagonal().mean())
        outer = torch.linalg.solve(seen, inner @ inputs @ (left @ right).T).T
        metric = Metric(seen, self.matrix.gradients)
        return _values(quantize(outer.float(), bits, GROUP, metric), len(inner), bits).double() @ inner

    def made(self) -> Iterator[tuple[str, str, float, int]]:
        weight, count = self.matrix.weight.float(), self.rows * self.columns
        kept = [int(density * count) for density in _DENSITIES]
        for bits in (8, 6, 5, 4, 3, 2):
            yield "rounded", f"{bits} bits", self.cost(self.rounded(weight, bits)), packed_bytes(*weight.shape, bits)
        for density, pruned in zip(_DENSITIES, self.pruned(weight, kept), strict=True):
            for bits in (16, 4, 3):
                made, size = self.entries(pruned, bits)
                yield f"pruned, {bits} bits", f"density {density}", self.cost(made), size + self.mask_bytes
        half = self.two_of_four(weight)
        for bits in (16, 8, 4, 3):
            made, size = self.entries(half, bits)
            yield f"2:4, {bits} bits", "density 0.5", self.cost(made), size + count // 8
        whole = count // (self.rows + self.columns)
        for share in _RANKS:
            rank = max(1, int(share * whole))
            left, right = self.low_rank(weight, rank)
            yield "lowrank", f"rank {share}", self.cost(left @ right), self.factor_bytes(rank, 16)
            for bits in (8, 4):
                made = self.rounded_factors(left, right, bits)
                yield f"lowrank, {bits} bits", f"rank {share}", self.cost(made), self.factor_bytes(rank, bits)
        rank = max(1, int(_RANKS[-1] * whole))
        for density in (0.45, 0.2):
            low, residual = left @ right, None
            for _ in range(2):
                [residual] = self.pruned((weight - low).float(), [int(density * count)])
                left, right = self.low_rank(weight - residual.matrix, rank)
                low = left @ right
            for bits, of_factors in ((16, 16), (4, 8)):
                made, size = self.entries(residual, bits)
                product = low if of_factors == 16 else self.rounded_factors(left, right, of_factors)
                size += self.mask_bytes + self.factor_bytes(rank, of_factors)
                yield f"lowrank+sparse, {bits} bits", f"density {density}", self.cost(product + made), size
        legs = resolve("mpo2", self.rows, self.columns)
        chi = legs.largest_chi(int(_RANKS[-1] * count))
        for density in (0.45, 0.2):
            train, residual = self.tensor_train(weight, legs, chi), None
            for _ in range(2):
                [residual] = self.pruned(weight - train, [int(density * count)])
                train = self.tensor_train(weight - residual.matrix, legs, chi)
            for bits in (16, 4):
                made, size = self.entries(residual, bits)
                size += self.mask_bytes + 2 * legs.parameters(chi)
                yield f"mpo+sparse, {bits} bits", f"density {density}", self.cost(train + made), size
        for bits in (3, 2):
            made = self.rounded(weight, bits)
            small = max(1, rank // 4)
            left, right = self.low_rank(weight - made, small)
            size = packed_bytes(*weight.shape, bits) + self.factor_bytes(small, 16)
            yield f"rounded+lowrank, {bits} bits", f"rank {_RANKS[-1] / 4}", self.cost(made + left @ right), size

    def tensor_train(self, weight: torch.Tensor, legs: Legs, chi: int) -> torch.Tensor:
        """The best MPO of these legs and χ in the metric, as a matrix."""
        moments = self.matrix.gradients[None], self.matrix.inputs[None]
        return contract([core[0] for core in fit(weight[None], *moments, legs, chi).cores])

    def pruned(self, weight: torch.Tensor, kept: list[int]) -> list[Pruned]:
        return list(prune(weight, self.matrix.inputs, self.matrix.gradients, kept))

    def two_of_four(self, weight: torch.Tensor) -> Pruned:
        """Two of every four neighbours in a row, by what removing one costs if three of four others replace it."""
        worth = weight.double().square()
        for axis, moment in enumerate((self.matrix.gradients, self.matrix.inputs)):
            scale = moment.diagonal().sqrt()
            damped = 0.75 * moment / scale / scale[:, None]
            damped.diagonal().fill_(1.0)
            alone = torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal() / scale.square()
            worth /= alone[:, None] if axis == 0 else alone
        order = worth.view(self.rows, -1, 4).argsort(2, descending=True)
        mask = torch.zeros_like(worth, dtype=torch.bool).view(self.rows, -1, 4).scatter_(2, order[..., :2], True)
        mask = mask.view(self.rows, self.columns)
        return refit_pruned(weight, self.matrix.inputs, self.matrix.gradients, Pruned(weight * mask, mask, 0.0))


def _values(codes: Codes, columns: int, bits: int) -> torch.Tensor:
    return dequantize(codes.codes, codes.scales.float(), columns, bits, GROUP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 14, 26], help="blocks whose matrices are taken")
    given = parser.parse_args()
    config = Config(dtype="float32")
    loaded, sites = open_model(config, torch.device("cpu"))
    experiment = Experiment.of(config, loaded, sites, torch.device("cpu"))
    statistics = experiment.calibration()
    costs, sizes, entries = defaultdict[tuple[str, str], float](float), defaultdict[tuple[str, str], int](int), 0
    for site in sites:
        if site.block not in given.blocks or site.dense_because:
            continue
        weight = loaded.model.get_submodule(site.name).weight.detach().double()
        moments = (shrink(each(site.name), config.shrinkage) for each in (statistics.input, statistics.gradient))
        with torch.no_grad():
            for form, how, cost, size in Forms(Matrix(weight, *moments)).made():
                costs[form, how] += cost
                sizes[form, how] += size
        entries += site.parameters
        print(site.name, flush=True)
    curve = sorted((sizes[key], costs[key]) for key in costs if key[0] == "rounded")
    bits, logs = np.array([8 * size / entries for size, _ in curve]), np.log([cost for _, cost in curve])

    def rounded(size: float) -> float:
        if size < bits[0]:  # below two bits, as it falls from three to two
            return float(np.exp(logs[0] + (logs[0] - logs[1]) / (bits[1] - bits[0]) * (bits[0] - size)))
        return float(np.exp(np.interp(size, bits, logs)))

    rows, ratios = [], {}
    for (form, how), cost in costs.items():
        size = 8 * sizes[form, how] / entries
        ratios[form, how] = cost / rounded(size)
        mark = "" if size >= bits[0] else " (extrapolated)"
        rows.append([form, how, f"{size:.2f}", f"{cost:.5f}", f"{ratios[form, how]:.2f}{mark}"])
    best = min(ratio for (form, _), ratio in ratios.items() if form != "rounded")
    bars = [Bar("least-cost-over-rounded", best, "<=", 1.0)]
    columns = ("form", "at", "bits an entry", "predicted cost, nats", "cost over rounded")
    publish("benchmarks.byte_forms", "Forms of a matrix by their bytes", markdown(columns, rows), bars, given.write)


if __name__ == "__main__":
    main()
