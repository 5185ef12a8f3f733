"""Whether all entries of a tensor are finite."""

from __future__ import annotations

import math

import pytest
import torch

from compression.numerics.finite import is_finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_entry_that_is_not_finite_is_found(value: float) -> None:
    values = torch.ones(50, 50)
    assert is_finite(values)
    values[17, 3] = value
    assert not is_finite(values)


def test_two_infinities_that_cancel_are_found_and_a_sum_that_overflows_is_not_one() -> None:
    assert not is_finite(torch.tensor([math.inf, -math.inf]))
    assert is_finite(torch.full((4,), 3e38))
    assert is_finite(torch.tensor([2.0, 3e38, 3e38, -3e38]))
