"""Corrections of a matrix from what its inputs predict of its errors."""

from __future__ import annotations

import pytest
import torch

from compression.decomposition.correction import _MomentSums, _RowSums, correction, sums

INPUTS, OUTPUTS = 24, 10


def rows_of(tokens: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of very different sizes, a change of their matrix, and what that changes of the outputs, with noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2, tokens, INPUTS, generator=generator) * torch.logspace(-1, 1, INPUTS)
    change = torch.randn(OUTPUTS, INPUTS, generator=generator)
    aims = inputs @ change.T + noise * torch.randn(2, tokens, OUTPUTS, generator=generator)
    return inputs, change, aims


def given(form: str, inputs: torch.Tensor, aims: torch.Tensor) -> _MomentSums | _RowSums:
    tokens = inputs[..., 0].numel()
    found = _RowSums() if form == "rows" else _MomentSums(INPUTS, aims.shape[-1], inputs, tokens)
    for part in (slice(0, 3), slice(3, None)):  # two batches
        for fold in range(2):
            found.add(fold, inputs[fold, part], aims[fold, part])
    return found


def metric() -> torch.Tensor:
    root = torch.randn(OUTPUTS, OUTPUTS, generator=torch.Generator().manual_seed(1)).double()
    return root @ root.T


@pytest.mark.parametrize("case", ["an aim", "an input of the dense model"])
@pytest.mark.parametrize("tokens", [8, 100])
def test_rows_and_moments_say_the_same(tokens: int, case: str) -> None:
    inputs, change, aims = rows_of(tokens, 3.0)
    start = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(2)).double()
    weight, bias = None, torch.ones(OUTPUTS)
    if case != "an aim":
        aims, weight, bias = inputs + 0.1 * inputs.roll(1, -1), change.double(), None
    found = [given(form, inputs, aims).deviations(start, weight, bias) for form in ("rows", "moments")]
    for ridge in (0.003, 0.3):
        for fold in range(2):
            one, other = (each.judged(ridge, fold, metric().float()) for each in found)
            assert one == pytest.approx(other, rel=2e-2)  # G may be rounded to bfloat16
        one, other = (each.change(ridge) for each in found)
        assert one.dtype == other.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("form", ["rows", "moments"])
def test_the_change_is_the_least_squares_solution(form: str) -> None:
    inputs, _, aims = rows_of(100, 3.0)
    found = given(form, inputs, aims).deviations(torch.zeros(OUTPUTS, INPUTS).double(), None, None)
    rows, values = inputs.reshape(-1, INPUTS).double(), aims.reshape(-1, OUTPUTS).double()
    ridge = 0.003 * float(rows.square().mean()) * len(rows)
    tall = torch.cat((rows, ridge**0.5 * torch.eye(INPUTS).double()))
    wanted = torch.linalg.lstsq(tall, torch.cat((values, torch.zeros(INPUTS, OUTPUTS).double()))).solution.T
    torch.testing.assert_close(found.change(0.003), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("form", ["rows", "moments"])
def test_a_correction_is_found_where_there_is_one_and_noise_is_not_followed(form: str) -> None:
    start, gradient = torch.zeros(OUTPUTS, INPUTS).double(), torch.eye(OUTPUTS).double()
    inputs, change, aims = rows_of(200, 0.3)
    inputs = inputs / torch.logspace(-1, 1, INPUTS)
    aims = aims - rows_of(200, 0.3)[0] @ change.T + inputs @ change.T
    found = correction(given(form, inputs, aims).deviations(start, None, None), gradient)
    assert found is not None
    assert torch.linalg.norm(found - change) < 0.1 * torch.linalg.norm(change)
    noise = 9 * torch.randn(2, 200, OUTPUTS, generator=torch.Generator().manual_seed(3))
    deviations = given(form, inputs, noise).deviations(start, None, None)
    followed = correction(deviations, gradient)
    assert followed is None or torch.linalg.norm(followed) < 0.5 * torch.linalg.norm(deviations.change(0.003))


def test_rows_are_kept_where_there_are_fewer_than_values() -> None:
    like = torch.zeros(1, INPUTS)
    assert isinstance(sums(INPUTS, OUTPUTS, like, 2 * INPUTS - 2), _RowSums)
    assert isinstance(sums(INPUTS, OUTPUTS, like, 2 * INPUTS), _MomentSums)
