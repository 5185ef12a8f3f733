"""Second moments: whitening, shrinkage, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from compression import (
    Whitening,
    shrink,
)
from compression.numerics.whitening import lowrank


@pytest.mark.parametrize("shrinkage", [1e-12, 0.003, 1.0])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_moments_of_any_rank_have_a_whitening_that_undoes_itself(scale: float, shrinkage: float) -> None:
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * scale**0.5
    moment = rows.T @ rows / 3
    rounded = moment - torch.diag(moment.diagonal() * 8 * torch.finfo(torch.float32).eps)
    assert torch.linalg.eigvalsh(rounded.double())[0] < 0
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for side in (moment, rounded, torch.zeros(64, 64)):
        whitening = Whitening.of(side, side, shrinkage)
        assert torch.isfinite(whitening.apply(weight).float()).all()
        undone = whitening.undo_right(whitening.undo_left(whitening.apply(weight)))
        assert torch.allclose(undone, weight, rtol=1e-6, atol=1e-6)


def test_shrinking_keeps_the_trace_of_an_ordinary_moment() -> None:
    rows = torch.randn(100, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = rows.T @ rows
    assert shrink(moment, 0.1).trace().item() == pytest.approx(moment.trace().item())
    assert torch.allclose(shrink(moment, 1.0), torch.eye(8, dtype=torch.float64) * moment.trace() / 8)


def test_a_moment_that_is_none_is_refused() -> None:
    moment = torch.eye(3)
    moment[0, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        shrink(moment, 0.1)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        shrink(torch.diag(torch.tensor([2.0, -1.0])), 0.1)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)])
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
def test_low_rank_in_a_metric_is_the_truncated_svd_of_the_whitened_matrix(
    shape: tuple[int, int], sides: tuple[bool, bool]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator)
    moments = [
        shrink(rows.T @ rows / 100, 0.05) if there else None
        for there, size in zip(sides, reversed(shape), strict=True)
        for rows in (torch.randn(100, size, generator=generator) * torch.logspace(0, -2, size),)
    ]
    whitening = Whitening(*(None if each is None else torch.linalg.cholesky(each) for each in moments))
    left, values, right = torch.linalg.svd(whitening.apply(weight), full_matrices=False)
    found = lowrank(weight, *moments)
    assert torch.allclose(found[2], values, rtol=1e-6, atol=1e-8 * float(values[0]))
    for chi in (1, 5, 12):
        cut = whitening.undo_right(whitening.undo_left(left[:, :chi] * values[:chi]) @ right[:chi])
        assert torch.allclose(found[0][:, :chi] @ found[1][:chi], cut, rtol=1e-5, atol=1e-6)
    factors = lowrank(weight, *moments, chi=5)
    assert factors[0].shape == (shape[0], 5)
    assert factors[1].shape == (5, shape[1])
    assert torch.equal(factors[2], found[2])
