"""Factors of large second moments."""

from __future__ import annotations

import pytest
import torch

from compression.numerics import large_moments
from compression.numerics.elimination import refit
from compression.numerics.large_moments import brief_cholesky
from compression.numerics.whitening import lowrank


def moment(noise: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shared, own = (torch.randn(400, count, generator=generator, dtype=torch.float64) for count in (8, 96))
    rows = (shared.repeat(1, 12) + noise * own) * torch.logspace(-4, 4, 96, dtype=torch.float64)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize(
    ("large", "noise", "dtype"),
    [(96, 1.0, torch.float32), (97, 1.0, torch.float64), (96, 1e-5, torch.float64)],
)
def test_large_moments_are_factorized_in_float32_where_that_works(
    large: int, noise: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_moments, "LARGE", large)
    given = moment(noise)
    factor = brief_cholesky(given)
    assert factor.dtype == dtype
    scale = given.diagonal().sqrt()
    error = (factor.double() @ factor.double().T - given) / scale[:, None] / scale
    assert float(error.abs().max()) < (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("large", [3, 4])
def test_a_moment_that_is_not_positive_definite_is_refused(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_moments, "LARGE", large)
    with pytest.raises(ValueError, match="not positive definite"):
        brief_cholesky(torch.diag(torch.tensor([1.0, -1.0, 1.0]).double()))


@pytest.mark.parametrize("large", [48, 1000])
def test_large_metrics_lead_to_the_same_matrices(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gradients, inputs = torch.randn(96, 20).double(), moment(1.0), moment(1.0)[30:50, 30:50]
    left, right, values = lowrank(weight, inputs, gradients, 7)
    narrowed = refit(weight.mT, gradients, range(60))
    monkeypatch.setattr(large_moments, "LARGE", large)
    found = lowrank(weight, inputs, gradients, 7)
    torch.testing.assert_close(found[2], values, rtol=1e-4, atol=1e-4 * float(values[0]))
    errors = [weight - product for product in (left @ right, found[0] @ found[1])]
    best, other = (float((gradients @ error @ inputs * error).sum()) for error in errors)
    assert other == pytest.approx(best, rel=1e-4)
    again = refit(weight.mT, gradients, range(60))
    apart = torch.cat((again - narrowed, torch.zeros(20, 36)), 1)
    assert float((apart @ gradients * apart).sum()) < 1e-6 * float((weight.mT @ gradients * weight.mT).sum())
