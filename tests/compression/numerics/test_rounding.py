"""Rounding in a metric: against the same rule entry by entry, and what it costs beside rounding to nearest."""

from __future__ import annotations

import pytest
import torch

from compression.numerics.rounding import Triangle, nearest_plane


def moment(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * size, size, generator=generator, dtype=torch.float64) * torch.linspace(0.3, 2, size)
    mixed = rows @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    return mixed.T @ mixed / len(rows)


def entry_by_entry(
    weight: torch.Tensor, step: float, low: int, high: int, c: torch.Tensor, g: torch.Tensor | None, mask: torch.Tensor
) -> torch.Tensor:
    """The rule as it is stated: each entry in turn, from what all errors so far leave in its entry of Pᵀ E Q."""
    g = torch.eye(len(weight), dtype=torch.float64) if g is None else g
    rows, columns = g.diagonal().argsort(), c.diagonal().argsort()
    damped = []
    for each, order in ((g, rows), (c, columns)):
        ordered = each[order][:, order].clone()
        ordered.diagonal().add_(1e-4 * ordered.diagonal().mean())
        damped.append(torch.linalg.cholesky(ordered))
    p, q = damped
    wanted, free = weight.double()[rows][:, columns], mask[rows][:, columns]
    error, codes = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for i in reversed(range(len(rows))):
        for j in reversed(range(len(columns))):
            left = float((p[i:, i] / p[i, i]) @ error[i:, j:] @ (q[j:, j] / q[j, j]))
            codes[i, j] = ((wanted[i, j] - left) / step).round().clamp(low, high)
            if free[i, j]:
                error[i, j] = codes[i, j] * step - wanted[i, j]
    result = torch.empty_like(codes)
    result[rows[:, None], columns] = codes
    return result


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(40, 70), (33, 5), (7, 64), (1, 1)])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_tiles_give_what_the_rule_gives_entry_by_entry(rows: int, columns: int, both: bool, density: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < density
    c, g = moment(columns, 1), moment(rows, 2) if both else None
    steps = torch.full_like(weight, 0.5)
    found = nearest_plane(weight, steps, -4, 3, Triangle.of(c), None if g is None else Triangle.of(g), mask)
    expected = entry_by_entry(weight, 0.5, -4, 3, c, g, mask).float()
    # Where a sum is next to half a step, float32 may round to the other side, and later entries then differ too.
    assert ((found == expected) | ~mask).float().mean() > 0.97
    assert _cost(found * 0.5 - weight, c, g, mask) == pytest.approx(
        _cost(expected * 0.5 - weight, c, g, mask), rel=0.02
    )


def _cost(error: torch.Tensor, c: torch.Tensor, g: torch.Tensor | None, mask: torch.Tensor) -> float:
    error = error.double() * mask
    return float(((error if g is None else g @ error) @ c * error).sum())


def test_each_moment_that_is_known_lowers_the_cost_in_their_metric() -> None:
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(3))
    c, g, every = moment(80, 1), moment(48, 2), torch.ones(48, 80, dtype=torch.bool)
    steps = torch.full_like(weight, 0.5)
    nearest = (weight / 0.5).round().clamp(-8, 7)
    one, both = (nearest_plane(weight, steps, -8, 7, Triangle.of(c), each) for each in (None, Triangle.of(g)))
    costs = [_cost(codes * 0.5 - weight, c, g, every) for codes in (nearest, one, both)]
    assert costs[2] < 0.5 * costs[1] < 0.25 * costs[0]


def test_integers_stay_within_their_bounds_and_a_grid_point_stays_where_it_is() -> None:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-4, 4, (20, 50), generator=generator).float()
    steps = torch.rand(20, 50, generator=generator) + 0.1
    metric = Triangle.of(moment(50, 1)), Triangle.of(moment(20, 2))
    assert torch.equal(nearest_plane(codes * steps, steps, -4, 3, *metric), codes)
    far = nearest_plane(1000 * codes, steps, -4, 3, *metric)
    assert far.min() >= -4
    assert far.max() <= 3


def test_a_moment_that_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive definite; shrink it first"):
        Triangle.of(torch.diag(torch.tensor([1.0, -1.0])))
