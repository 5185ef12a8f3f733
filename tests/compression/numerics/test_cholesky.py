"""Factors of large second moments."""

from __future__ import annotations

import pytest
import torch

from compression.numerics import cholesky
from compression.numerics.cholesky import brief_cholesky


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
    monkeypatch.setattr(cholesky, "LARGE", large)
    given = moment(noise)
    factor = brief_cholesky(given)
    assert factor.dtype == dtype
    scale = given.diagonal().sqrt()
    error = (factor.double() @ factor.double().T - given) / scale[:, None] / scale
    assert float(error.abs().max()) < (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("large", [3, 4])
def test_a_moment_that_is_not_positive_definite_is_refused(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "LARGE", large)
    with pytest.raises(ValueError, match="not positive definite"):
        brief_cholesky(torch.diag(torch.tensor([1.0, -1.0, 1.0]).double()))
