"""First-order changes of the KL against finite differences, on a tiny model."""

from __future__ import annotations

import pytest
import torch
from tiny_evaluator import evaluator_of, everywhere
from torch import nn

from compression import Choice, Schedule
from compression.calibration.slopes import watch_slopes
from search.model.loading import LoadedModel, load_model


@pytest.fixture
def loaded() -> LoadedModel:
    return load_model("random:tiny-llama", "cpu")


class Small(nn.Module):
    """Two linear maps in a row, with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.second = nn.Embedding(7, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(self.embedding(ids))))  # type: ignore[no-any-return]


def test_a_slope_is_the_directional_derivative_summed_over_passes() -> None:
    model, other = Small(), nn.Linear(5, 4)
    other.bias = model.first.bias
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with watch_slopes(model, {"first": other}) as sums:
        for _ in range(2):
            model(ids).square().sum().backward()
    parameter = model.first.weight
    loss = model(ids).square().sum()
    (gradient,) = torch.autograd.grad(loss, parameter)
    expected = float((gradient * (other.weight - parameter).detach()).sum())
    assert sums["first"] == pytest.approx(2 * expected, rel=1e-4)
    assert parameter.requires_grad
    assert parameter.grad is None
    assert not model.embedding._forward_hooks
    assert not model.first._forward_hooks


def test_slopes_of_the_evaluator_agree_with_small_steps(loaded: LoadedModel) -> None:
    evaluator, store = evaluator_of(loaded)
    low, high = everywhere(store, 6), everywhere(store, 7)
    slopes = evaluator.slopes(low, high)
    assert slopes.keys() == {site.name for site in store.sites}
    [base] = evaluator.evaluate([low])
    name = max(slopes, key=lambda site: abs(slopes[site]))
    # A step of one direction is small enough for the first order to show, though not alone to count.
    stepped = Schedule(tuple((site, high[site] if site == name else choice) for site, choice in low))
    [score] = evaluator.evaluate([stepped])
    assert score.kl - base.kl == pytest.approx(slopes[name], rel=0.8)
    assert (score.kl < base.kl) == (slopes[name] < 0)


def test_slopes_leave_scores_and_model_as_they_are(loaded: LoadedModel) -> None:
    evaluator, store = evaluator_of(loaded)
    low = everywhere(store, 4)
    [before] = evaluator.evaluate([low])
    slopes = evaluator.slopes(low, Schedule(tuple((name, Choice("dense", 0, "none")) for name, _ in low)))
    [after] = evaluator.evaluate([low])
    assert before.kl == after.kl
    assert evaluator.slopes(low, low) == {}
    assert evaluator.slopes(low, Schedule(tuple((name, Choice("dense", 0, "none")) for name, _ in low))) == slopes
    # Towards the dense matrices KL falls, in total.
    assert sum(slopes.values()) < 0
