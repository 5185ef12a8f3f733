"""The elimination of the units of a bond: costs are exact, nested and those of the refitted matrix."""

from __future__ import annotations

import pytest
import torch

from compression.numerics import large_moments
from compression.numerics.elimination import eliminate, refit

OUT, IN = 6, 12


def case(size: int = IN, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, rows, other = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((OUT, size), (4 * size, size), (3 * OUT, OUT))
    )
    rows = rows * torch.linspace(0.3, 2.0, size, dtype=torch.float64)
    return weight, rows.T @ rows / len(rows), other.T @ other / len(other)


def cost(weight: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor, kept: torch.Tensor) -> float:
    """½·tr(G E C Eᵀ) of the error E that the refitted matrix makes, computed directly."""
    error = weight.clone()
    if len(kept):
        error[:, kept] -= refit(weight, inputs, kept)
    return 0.5 * float((gradients @ error @ inputs * error).sum())


@pytest.mark.parametrize("group", [1, 3])
def test_costs_of_all_widths_are_those_of_the_refitted_matrices(group: int) -> None:
    weight, inputs, gradients = case()
    found = eliminate(weight, inputs, gradients, group)
    assert sorted(found.order.tolist()) == list(range(IN // group))
    for width in range(IN // group + 1):
        kept = (found.kept(width)[:, None] * group + torch.arange(group)).flatten()
        assert float(found.cost[width]) == pytest.approx(cost(weight, inputs, gradients, kept), rel=1e-9, abs=1e-12)


def test_the_refitted_matrix_is_the_minimum() -> None:
    weight, inputs, gradients = case()
    kept = torch.tensor([0, 3, 4, 8])
    least = cost(weight, inputs, gradients, kept)
    for seed in range(5):
        error = weight.clone()
        moved = refit(weight, inputs, kept)
        moved += 0.01 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        error[:, kept] -= moved
        assert 0.5 * float((gradients @ error @ inputs * error).sum()) > least


def test_the_first_group_removed_is_the_cheapest_of_all() -> None:
    weight, inputs, gradients = case(seed=3)
    found = eliminate(weight, inputs, gradients)
    alone = [cost(weight, inputs, gradients, torch.tensor([j for j in range(IN) if j != i])) for i in range(IN)]
    assert int(found.order[0]) == min(range(IN), key=alone.__getitem__)
    assert float(found.cost[IN - 1]) == pytest.approx(min(alone), rel=1e-9)


def test_steps_of_several_units_cost_what_they_cost_together_and_little_more_than_single_ones() -> None:
    weight, inputs, gradients = case(240, seed=1)
    single, several = eliminate(weight, inputs, gradients), eliminate(weight, inputs, gradients, step=8)
    for width in range(0, 241, 8):
        exact = cost(weight, inputs, gradients, several.kept(width))
        assert float(several.cost[width]) == pytest.approx(exact, rel=1e-8, abs=1e-10)
        assert float(several.cost[width]) <= 1.05 * float(single.cost[width]) + 1e-9
    assert (several.cost.diff() <= 1e-12).all()
    assert float(several.cost[-1]) == 0


def test_redundant_units_are_free() -> None:
    weight, inputs, gradients = case()
    mixing = torch.eye(IN, dtype=torch.float64)[:, :9]
    mixing = torch.cat([mixing[:9], torch.randn(3, 9, generator=torch.Generator().manual_seed(2)).double()])
    inputs = mixing @ inputs[:9, :9] @ mixing.T + 1e-9 * torch.eye(IN, dtype=torch.float64)
    assert float(eliminate(weight, inputs, gradients).cost[9]) < 1e-6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": torch.eye(3)}, "needs moments of 12 inputs and 6 outputs"),
        ({"group": 5}, "group must divide the 12 hidden values, got 5"),
        ({"step": 0}, "step must be at least 1"),
        ({"inputs": torch.zeros(IN, IN)}, "not positive definite"),
    ],
)
def test_what_cannot_be_eliminated_is_refused(changes: dict, said: str) -> None:
    weight, inputs, gradients = case()
    with pytest.raises(ValueError, match=said):
        eliminate(**{"weight": weight, "inputs": inputs, "gradients": gradients} | changes)
    with pytest.raises(ValueError, match="width must be between 0 and 12, got 13"):
        eliminate(weight, inputs, gradients).kept(13)


def test_wide_groups_are_priced_with_several_threads() -> None:
    """A batch of large systems solved by LU fails in MKL with two threads."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1200, 576, generator=generator).double()
    inputs, weight = sample.mT @ sample / 1200, torch.randn(4, 576, generator=generator).double()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = eliminate(weight, inputs, torch.eye(4).double(), 192)
    finally:
        torch.set_num_threads(threads)
    for width in (1, 2):
        kept = (found.kept(width)[:, None] * 192 + torch.arange(192)).flatten()
        assert float(found.cost[width]) == pytest.approx(cost(weight, inputs, torch.eye(4).double(), kept))


@pytest.mark.parametrize(("noise", "exact"), [(1.0, False), (1e-4, True)])
def test_large_bonds_are_eliminated_in_float32_only_where_it_is_precise(
    noise: float, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, _, gradients = case(96)
    shared, own = (torch.randn(400, count, generator=generator, dtype=torch.float64) for count in (8, 96))
    rows = shared.repeat(1, 12) + noise * own
    inputs = rows.T @ rows / len(rows)
    with monkeypatch.context() as patched:
        patched.setattr(large_moments, "LARGE", 32)
        found = eliminate(weight, inputs, gradients, step=4)
    for width in range(0, 96, 4):  # whole steps, whose costs are exact
        there = cost(weight, inputs, gradients, found.kept(width))
        assert float(found.cost[width]) == pytest.approx(there, rel=1e-7 if exact else 1e-4)
