"""Compares further topologies with low rank at equal parameters, by their predicted cost on held-out statistics.

    python -m benchmarks.topology_trials [--quick] [--write] [--kept 0.4]

The cost is ½·tr(G E C Eᵀ) with G and C of held-out text, relative to that of `pivoted-lowrank`. Everything is fitted on
calibration text and stored without gauge freedom.

* heads: one `pivoted-lowrank` per attention head; the Lagrangian over the heads of a matrix sets the χ of each.
* mpo2: two balanced legs per side.
* shuffled: mpo2 after a random permutation of rows and columns. The 4 bytes per row and column for the order are not
  counted.
* ordered: mpo2 after sorting rows and columns along the leading singular vectors, so that similar rows share a leg. The
  order is not counted either.
* sum: `pivoted-lowrank` with half of the parameters plus mpo2 with the rest, each fitted in turn to the residual of the
  other.
* mpo3: three balanced legs per side with the same χ at both bonds.
* mpo3 adapted: mpo3 with two different χ at equal parameters, the best of five pairs after a short fit of 20 products
  each, then fitted fully.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from statistics import median

import numpy as np
import torch

from benchmarks.report import markdown, publish
from compression import (
    Legs,
    Menu,
    Site,
    Whitening,
    collect,
    contract,
    envelope,
    fitted_topologies,
    lagrangian,
    nested_options,
    resolve,
    shrink,
)
from compression.decomposition.factors import lowrank_cores
from compression.numerics import fit
from search.config import Config
from search.experiment.calibration import calibration_batches
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.model.architecture import head_size

VARIANTS = ("heads", "mpo2", "shuffled", "ordered", "sum", "mpo3", "mpo3 adapted")
_SHRINKAGE = Config().shrinkage
_ROUNDS = 3  # alternating fits of the two parts of a sum
_GLANCE = 20  # products of a short fit


class Trial:
    """One matrix W (out, in) with its calibration metric and its number of parameters to keep."""

    def __init__(self, site: Site, weight: torch.Tensor, gradient: torch.Tensor, inputs: torch.Tensor, kept: float):
        self.site, self.weight, self.parameters = site, weight.double(), int(kept * site.parameters)
        self.gradient, self.inputs = shrink(gradient, _SHRINKAGE), shrink(inputs, _SHRINKAGE)

    def low_rank(self, weight: torch.Tensor, parameters: int) -> torch.Tensor:
        """Returns the best approximation, in the metric, of the rank that `parameters` allow."""
        chi = resolve("pivoted-lowrank", *weight.shape).largest_chi(parameters)
        cores, _ = lowrank_cores(weight, self.inputs, self.gradient, chi)
        return contract([core[..., :chi] if n == 0 else core[:chi] for n, core in enumerate(cores)])

    def mpo(
        self, weight: torch.Tensor, legs: Legs, parameters: int, orders: tuple[torch.Tensor, ...] = ()
    ) -> torch.Tensor:
        """Returns the fit of an MPO with these legs to `weight`, with rows and columns in the given orders."""
        rows, columns = orders or (torch.arange(weight.shape[0]), torch.arange(weight.shape[1]))
        cores = fit(
            weight[rows][:, columns][None],
            self.gradient[rows][:, rows][None],
            self.inputs[columns][:, columns][None],
            legs,
            legs.largest_chi(parameters),
            150,
            3e-3,
        ).cores
        result = torch.empty_like(weight)
        result[rows[:, None], columns[None, :]] = contract([core[0].double() for core in cores])
        return result

    def variant(self, name: str, heads: int | None) -> torch.Tensor | None:
        """Returns the matrix compressed by a variant, or None if the variant does not apply to the matrix."""
        names = fitted_topologies(self.site, None, (3 if "mpo3" in name else 2,))
        if not names:
            return None
        legs = resolve(names[0], *self.weight.shape)
        match name:
            case "heads":
                return self.heads(heads)
            case "mpo2" | "mpo3":
                return self.mpo(self.weight, legs, self.parameters)
            case "shuffled":
                generator = torch.Generator().manual_seed(0)
                orders = tuple(torch.randperm(side, generator=generator) for side in self.weight.shape)
                return self.mpo(self.weight, legs, self.parameters, orders)
            case "ordered":
                whitening = Whitening(torch.linalg.cholesky(self.inputs), torch.linalg.cholesky(self.gradient))
                left, _, right = torch.linalg.svd(whitening.apply(self.weight), full_matrices=False)
                orders = tuple(
                    _ordered(vectors, sizes)
                    for vectors, sizes in ((left[:, :2].T, legs.out_legs), (right[:2], legs.in_legs))
                )
                return self.mpo(self.weight, legs, self.parameters, orders)
            case "sum":
                total = torch.zeros_like(self.weight)
                for _ in range(_ROUNDS):
                    low = self.low_rank(self.weight - total, self.parameters // 2)
                    total = self.mpo(self.weight - low, legs, self.parameters - self.parameters // 2)
                return low + total
            case _:
                return self.adapted(legs)

    def heads(self, size: int | None) -> torch.Tensor | None:
        """Returns the variant `heads` for heads of `size`, or None for matrices without several heads."""
        along = self.site.family != "o"
        side = self.weight.shape[0 if along else 1]
        if self.site.family not in ("q", "k", "v", "o") or not size or side % size or side == size:
            return None
        parts, menus, factors = self.weight.split(size, 0 if along else 1), [], []
        for number, part in enumerate(parts):
            at = slice(number * size, (number + 1) * size)
            gradient = self.gradient[at, at] if along else self.gradient
            inputs = self.inputs if along else self.inputs[at, at]
            cores, spectrum = lowrank_cores(part, inputs, gradient, None)
            factors.append(cores)
            head = Site(f"{number}", 0, "", *part.shape)
            menus.append(envelope(head, nested_options("pivoted-lowrank", "two-sided", spectrum.numpy(), head)))
        menu = Menu(tuple(menus))
        made = []
        for part, cores, index, each in zip(parts, factors, lagrangian(menu, self.parameters), menu.sites, strict=True):
            choice = each.choices[index]
            chi = choice.chi
            made.append(part if choice.is_dense else contract([cores[0][..., :chi], cores[1][:chi]]))
        return torch.cat(made, 0 if along else 1)

    def adapted(self, legs: Legs) -> torch.Tensor:
        """Returns the variant `mpo3 adapted`."""
        chi, trials = legs.largest_chi(self.parameters), []
        for shift in (0.6, 0.8, 1.0, 1.25, 1.6):
            first = min(round(chi * shift), legs.full_bonds[0])
            fitting = [second for second in range(1, legs.full_bonds[1] + 1) if self._size(legs, first, second)]
            if fitting:
                trials.append((first, fitting[-1]))
        metrics = self.gradient[None], self.inputs[None]
        costs = {bonds: fit(self.weight[None], *metrics, legs, bonds, _GLANCE).cost for bonds in dict.fromkeys(trials)}
        best = min(costs, key=lambda bonds: float(costs[bonds]))
        return contract([core[0].double() for core in fit(self.weight[None], *metrics, legs, best, 150, 3e-3).cores])

    def _size(self, legs: Legs, first: int, second: int) -> bool:
        sizes = [out_leg * in_leg for out_leg, in_leg in zip(legs.out_legs, legs.in_legs, strict=True)]
        entries = sizes[0] * first + first * sizes[1] * second + second * sizes[2] - first**2 - second**2
        return entries <= self.parameters


def _ordered(vectors: torch.Tensor, legs: tuple[int, ...]) -> torch.Tensor:
    """Indices sorted into groups by the first vector, and within each group by the second."""
    groups = vectors[0].argsort().reshape(legs[0], -1)
    return torch.cat([group[vectors[1][group].argsort()] for group in groups])


def cost(matrix: torch.Tensor, dense: torch.Tensor, metric: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Computes ½·tr(G E C Eᵀ) in nats per token for the error E of `matrix`; `metric` is (G, C)."""
    error = dense.double() - matrix
    return 0.5 * float(((metric[0] @ error @ metric[1]) * error).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="measure one block")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--kept", type=float, default=0.4, help="kept fraction of every matrix (default: 0.4)")
    arguments = parser.parse_args()
    config, device = Config(heldout_tokens=6144), torch.device("cpu")
    loaded, sites = open_model(config, device)
    experiment = Experiment.of(config, loaded, sites, device)
    blocks = (14,) if arguments.quick else (1, 14, 28)
    chosen = [site for site in sites if site.block in blocks and site.family in ("q", "k", "v", "o", "down")]
    calibration = experiment.calibration()
    batches = list(calibration_batches(loaded, experiment.splits.heldout_text, config.seed))
    held_out = collect(loaded.model, chosen, batches, torch.Generator().manual_seed(0))
    heads, rows, start = head_size(loaded.model), [], time.perf_counter()
    columns: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for site in chosen:
        weight = loaded.model.get_submodule(site.name).weight.detach()
        trial = Trial(site, weight, calibration.gradient(site.name), calibration.input(site.name), arguments.kept)
        metric = held_out.gradient(site.name).double(), held_out.input(site.name).double()

        base = cost(trial.low_rank(trial.weight, trial.parameters), weight, metric)
        ratios: Mapping[str, float | None] = {
            name: None if (matrix := trial.variant(name, heads)) is None else cost(matrix, weight, metric) / base
            for name in VARIANTS
        }
        for name, ratio in ratios.items():
            columns[name] += [] if ratio is None else [ratio]
        rows.append([site.name, f"{base:.5f}", *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios.values())])
        print(*rows[-1], f"after {time.perf_counter() - start:.0f} s", flush=True)
    rows.append(["median", "", *(f"{median(values):.2f}" if values else "" for values in columns.values())])
    rows.append(["lowest", "", *(f"{np.min(values):.2f}" if values else "" for values in columns.values())])
    body = (
        f"SmolLM2-135M-Instruct at kept fraction {arguments.kept:g} of every matrix, with statistics of "
        f"{calibration.tokens:,} calibration and {held_out.tokens:,} held-out tokens. The table shows the predicted "
        "cost of `pivoted-lowrank` in nats per token, and the costs of the other variants relative to it. "
        "benchmarks/topology_trials.py explains the variants.\n\n"
        + markdown(["site", "pivoted-lowrank", *VARIANTS], rows)
    )
    publish("benchmarks.topology_trials", "Other topologies", body, [], arguments.write)


if __name__ == "__main__":
    main()
