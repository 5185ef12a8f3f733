"""Fits reach what exact alternating least squares reaches, start no worse than they end, and know their cost."""

from __future__ import annotations

import pytest
import torch

from compression.numerics.cores import contract, decompose, truncate
from compression.numerics.fit import fit
from compression.numerics.legs import Legs

TWO, THREE = Legs((3, 4), (4, 2)), Legs((3, 2, 2), (2, 2, 2))


def problem(count: int, out: int, inner: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and two badly conditioned metrics that are no Kronecker products."""
    generator = torch.Generator().manual_seed(seed)

    def metric(size: int) -> torch.Tensor:
        rows = torch.randn(count, 3 * size, size, generator=generator, dtype=torch.float64)
        rows = rows * torch.logspace(0, -1.5, size, dtype=torch.float64)
        turn = torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64))[0]
        return turn @ (rows.mT @ rows / len(rows[0])) @ turn.mT

    weights = torch.randn(count, out, inner, generator=generator, dtype=torch.float64)
    return weights, metric(out), metric(inner)


def cost_of(cores: list[torch.Tensor], weight: torch.Tensor, g: torch.Tensor, c: torch.Tensor) -> float:
    error = weight - contract([core.double() for core in cores])
    return 0.5 * float(torch.trace(g @ error @ c @ error.T))


def alternating_least_squares(
    weight: torch.Tensor, g: torch.Tensor, c: torch.Tensor, legs: Legs, chi: int, sweeps: int
) -> float:
    """An independent solver: the exact least-squares solution of one core after the other, as a dense system."""
    cores = [core.double().clone() for core in truncate(decompose(weight, legs)[0], chi)]
    metric = torch.kron(g, c)
    for _ in range(sweeps):
        for place, core in enumerate(cores):
            columns = []
            for entry in range(core.numel()):
                unit = torch.zeros(core.numel(), dtype=torch.float64)
                unit[entry] = 1
                columns.append(contract([*cores[:place], unit.reshape(core.shape), *cores[place + 1 :]]).reshape(-1))
            basis = torch.stack(columns, 1)
            solution = torch.linalg.lstsq(basis.T @ metric @ basis, basis.T @ metric @ weight.reshape(-1)).solution
            cores[place] = solution.reshape(core.shape)
    return cost_of(cores, weight, g, c)


@pytest.mark.slow
@pytest.mark.parametrize("legs, chi", [(TWO, 3), (TWO, 5), (THREE, 3)])
def test_a_fit_reaches_what_alternating_least_squares_reaches(legs: Legs, chi: int) -> None:
    weights, g, c = problem(1, 12, 8)
    result = fit(weights, g, c, legs, chi, max_evaluations=400, tolerance=1e-5)
    reference = alternating_least_squares(weights[0], g[0], c[0], legs, chi, 40)
    assert float(result.cost) <= 1.02 * reference


@pytest.mark.parametrize("legs", [TWO, THREE], ids=str)
def test_the_reported_cost_is_that_of_the_cores_and_below_the_start(legs: Legs) -> None:
    weights, g, c = problem(3, 12, 8)
    result = fit(weights, g, c, legs, 3)
    for site in range(3):
        cost = cost_of([core[site] for core in result.cores], weights[site], g[site], c[site])
        assert float(result.cost[site]) == pytest.approx(cost, rel=1e-4)
    assert (result.cost < 0.95 * result.start).all()
    assert result.evaluations <= 120


@pytest.mark.slow
def test_sites_fitted_together_come_out_as_fitted_alone() -> None:
    weights, g, c = problem(3, 12, 8)
    together = fit(weights, g, c, TWO, 4, max_evaluations=150, tolerance=1e-3).cost
    alone = [fit(weights[[s]], g[[s]], c[[s]], TWO, 4, max_evaluations=150, tolerance=1e-3).cost for s in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0.05, atol=0)


@pytest.mark.parametrize("legs", [TWO, THREE], ids=str)
def test_full_chi_is_exact(legs: Legs) -> None:
    weights, g, c = problem(1, 12, 8)
    result = fit(weights, g, c, legs, 1000)
    torch.testing.assert_close(contract([core[0].double() for core in result.cores]), weights[0], atol=1e-4, rtol=1e-4)


def test_kronecker_metrics_are_solved_by_the_start() -> None:
    weights, _, _ = problem(1, 12, 8)
    parts = [problem(1, size, size, seed)[1][0] for seed, size in enumerate((3, 4, 4, 2))]
    g, c = torch.kron(parts[0], parts[1])[None], torch.kron(parts[2], parts[3])[None]
    result = fit(weights, g, c, TWO, 4)
    assert float(result.cost) == pytest.approx(float(result.start), rel=1e-3)
    assert float(result.cost) <= alternating_least_squares(weights[0], g[0], c[0], TWO, 4, 40) * 1.001


def test_convergence_is_reported() -> None:
    weights, g, c = problem(1, 12, 8)
    assert not fit(weights, g, c, TWO, 3, max_evaluations=5).converged.any()
    assert fit(weights, g, c, TWO, 3, max_evaluations=500, tolerance=1e-3).converged.all()


def test_bad_input_is_refused() -> None:
    weights, g, c = problem(1, 12, 8)
    with pytest.raises(ValueError, match="do not fit"):
        fit(weights, c, g, TWO, 3)
    weights[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fit(weights, g, c, TWO, 3)


def test_a_zero_weight_stays_zero() -> None:
    weights, g, c = problem(1, 12, 8)
    result = fit(torch.zeros_like(weights), g, c, TWO, 3)
    assert float(result.cost) == 0
    assert all(torch.isfinite(core).all() for core in result.cores)


def test_bonds_may_have_caps_of_their_own() -> None:
    weights, g, c = problem(2, 12, 8)
    result = fit(weights, g, c, THREE, (4, 2))
    assert [core.shape[4] for core in result.cores] == [4, 2, 1]
    assert (result.cost <= fit(weights, g, c, THREE, 2).cost).all()
    assert (result.cost >= fit(weights, g, c, THREE, 4).cost).all()
    with pytest.raises(ValueError, match="one for each"):
        fit(weights, g, c, THREE, (4, 2, 1))
