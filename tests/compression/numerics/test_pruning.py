"""Pruning in the metric: against all masks of a tiny matrix, and by what its results say of themselves."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from compression.numerics import pruning
from compression.numerics.pruning import prune

OUT, IN = 12, 20


def case(rows: int = OUT, columns: int = IN, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix with moments whose coordinates are correlated and of different size."""
    generator = torch.Generator().manual_seed(seed)

    def moment(size: int) -> torch.Tensor:
        mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
        rows = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
        rows = rows @ (torch.eye(size) + 0.3 * mixing) * torch.linspace(0.3, 2.0, size, dtype=torch.float64)
        return rows.T @ rows / len(rows)

    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, moment(columns), moment(rows)


def cost(error: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor) -> float:
    return 0.5 * float((gradients @ error.double() @ inputs * error.double()).sum())


def least(weight: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The least costs of any matrix in each of some masks (n, entries), from the normal equations of all entries."""
    metric, flat = torch.kron(gradients, inputs), weight.flatten()
    left, removed = (torch.stack([each.nonzero().flatten() for each in kind]) for kind in (masks, ~masks))
    wanted = metric[left[:, :, None], removed[:, None, :]] @ flat[removed][:, :, None]
    change = torch.linalg.solve(metric[left[:, :, None], left[:, None, :]], wanted)[:, :, 0]
    errors = flat.repeat(len(masks), 1).scatter(1, left, -change)
    return 0.5 * (errors @ metric * errors).sum(1)


def test_the_first_entry_removed_is_the_best_of_all_and_the_rest_is_refitted_exactly(monkeypatch) -> None:
    monkeypatch.setattr(pruning, "_GAIN", 1e-7)
    for seed in range(4):
        weight, inputs, gradients = case(4, 5, seed)
        [found] = prune(weight, inputs, gradients, [19])
        masks = ~torch.eye(20, dtype=torch.bool)
        assert found.cost == pytest.approx(float(least(weight, inputs, gradients, masks).min()), rel=1e-4)


def test_the_mask_costs_little_more_than_the_best_of_all_masks() -> None:
    masks = torch.tensor([[entry in kept for entry in range(12)] for kept in combinations(range(12), 7)])
    for seed in range(1, 5):
        weight, inputs, gradients = case(2, 6, seed)
        *_, found = prune(weight, inputs, gradients, [10, 8, 7])
        best = float(least(weight, inputs, gradients, masks).min())
        assert best * (1 - 1e-5) <= found.cost <= 1.1 * best


def test_costs_are_those_of_the_results_which_are_nested_and_have_as_many_entries_as_asked_for() -> None:
    weight, inputs, gradients = case()
    wanted, before = [200, 150, 100, 40, 1], torch.ones(OUT, IN, dtype=torch.bool)
    for count, found in zip(wanted, prune(weight, inputs, gradients, wanted), strict=True):
        assert found.cost == pytest.approx(cost(weight - found.matrix, inputs, gradients), rel=1e-4)
        assert int(found.mask.sum()) == count
        assert not found.matrix[~found.mask].any()
        assert (found.mask <= before).all()
        [best] = least(weight, inputs, gradients, found.mask.view(1, -1))
        assert best * (1 - 1e-5) <= found.cost <= 1.4 * best
        before = found.mask


def test_it_beats_the_largest_entries_and_both_moments_beat_one() -> None:
    weight, inputs, gradients = case(seed=5)
    [found] = prune(weight, inputs, gradients, [140])
    [one] = prune(weight, inputs, torch.eye(OUT), [140])
    largest = torch.zeros(OUT * IN, dtype=torch.bool).index_fill(0, weight.abs().flatten().topk(140).indices, True)
    assert found.cost < 0.8 * cost(weight - one.matrix, inputs, gradients)
    assert found.cost < 0.75 * least(weight, inputs, gradients, largest[None])


@pytest.mark.parametrize("scale", [1e-24, 1e12])
def test_the_scale_of_moments_and_weights_does_not_matter(scale: float) -> None:
    weight, inputs, gradients = case()
    [plain] = prune(weight, inputs, gradients, [120])
    [scaled] = prune(1e-3 * weight, scale * inputs, scale * gradients, [120])
    assert torch.equal(plain.mask, scaled.mask)
    assert scaled.cost == pytest.approx(1e-6 * scale * scale * plain.cost, rel=1e-3)
    torch.testing.assert_close(1e3 * scaled.matrix, plain.matrix, rtol=1e-3, atol=1e-4)


def test_a_matrix_of_zeros_costs_nothing() -> None:
    _, inputs, gradients = case()
    [found] = prune(torch.zeros(OUT, IN), inputs, gradients, [7])
    assert found.cost == 0
    assert not found.matrix.any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": torch.eye(3)}, "needs moments of 20 inputs and 12 outputs"),
        ({"kept": [10, 10]}, "must descend strictly between 240 and 1"),
        ({"kept": [241]}, "must descend strictly between 240 and 1"),
        ({"kept": [0]}, "must descend strictly between 240 and 1"),
        ({"weight": torch.full((OUT, IN), torch.nan)}, "NaN or infinite"),
        ({"gradients": torch.zeros(OUT, OUT)}, "not positive definite"),
    ],
)
def test_what_cannot_be_pruned_is_refused_at_once(changes: dict, said: str) -> None:
    weight, inputs, gradients = case()
    with pytest.raises(ValueError, match=said):
        prune(**{"weight": weight, "inputs": inputs, "gradients": gradients, "kept": [9]} | changes)
