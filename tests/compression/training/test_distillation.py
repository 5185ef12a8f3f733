"""Distillation losses: the plain KL with its gradient, a bound of it with few targets, close to it when sampled."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compression.training.distillation import Distributions, Head, divergence, labels, likeliest

VOCABULARY, WIDTH, ROWS = 300, 16, 600


@pytest.fixture
def subject() -> tuple[Head, torch.Tensor, torch.Tensor]:
    """A head with bias, dense hidden states and those of a student; more rows than are computed at a time."""
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(VOCABULARY, WIDTH, generator=generator), torch.randn(VOCABULARY, generator=generator))
    dense = torch.randn(ROWS, WIDTH, generator=generator)
    return head, dense, (dense + 0.5 * torch.randn(ROWS, WIDTH, generator=generator)).requires_grad_()


def plain(hidden: torch.Tensor, dense: torch.Tensor, head: Head) -> torch.Tensor:
    wanted, given = (functional.linear(h, head.weight, head.bias).log_softmax(-1) for h in (dense, hidden))
    return (wanted.exp() * (wanted - given)).sum()


def gradient(loss: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    (result,) = torch.autograd.grad(loss, hidden)
    return result


@pytest.mark.parametrize("whole", [False, True])
def test_with_all_tokens_as_targets_it_is_the_kl_over_the_vocabulary_with_its_gradient(
    subject: tuple,  # type: ignore[type-arg]
    whole: bool,
) -> None:
    head, dense, hidden = subject
    targets = Distributions(dense, head) if whole else likeliest(dense, head, VOCABULARY)
    loss, expected = divergence(hidden, head, targets), plain(hidden, dense, head)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gradient(2 * loss, hidden), gradient(2 * expected, hidden), rtol=1e-3, atol=1e-3)


def test_distributions_that_are_not_finite_are_refused(subject: tuple) -> None:  # type: ignore[type-arg]
    head, dense, hidden = subject
    with pytest.raises(ValueError, match="NaN or infinite logits; nothing can be learned"):
        divergence(hidden, head, Distributions(dense * float("nan"), head))


@pytest.mark.parametrize(("scale", "cap"), [(0.25, None), (1.0, 3.0), (0.5, 2.0)])
@pytest.mark.parametrize("sample", [0, 290])
def test_scaled_and_capped_logits_have_their_kl_and_gradient(
    subject: tuple,  # type: ignore[type-arg]
    scale: float,
    cap: float | None,
    sample: int,
) -> None:
    plain_head, dense, hidden = subject
    head = Head(plain_head.weight, plain_head.bias, scale, cap)

    def logs(states: torch.Tensor) -> torch.Tensor:
        values = scale * functional.linear(states, head.weight, head.bias)
        return (values if cap is None else cap * torch.tanh(values / cap)).log_softmax(-1)

    wanted, given = logs(dense), logs(hidden)
    expected = (wanted.exp() * (wanted - given)).sum()
    slopes = gradient(expected, hidden)
    for targets in (likeliest(dense, head, VOCABULARY), Distributions(dense, head)):
        loss = divergence(hidden, head, targets, sample, torch.Generator().manual_seed(0))
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(gradient(loss, hidden), slopes, rtol=1e-3, atol=1e-3)


def test_with_a_rest_it_is_the_kl_of_the_coarser_distributions_and_never_above_the_full_one(subject: tuple) -> None:  # type: ignore[type-arg]
    head, dense, hidden = subject
    targets = likeliest(dense, head, 20)
    loss = divergence(hidden, head, targets)

    def coarse(states: torch.Tensor) -> torch.Tensor:
        chances = functional.linear(states, head.weight, head.bias).softmax(-1)
        top = chances.gather(1, targets.tokens)
        return torch.cat((top, 1 - top.sum(1, keepdim=True)), 1)

    wanted, given = coarse(dense), coarse(hidden)
    expected = (wanted * (wanted / given).log()).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gradient(loss, hidden), gradient(expected, hidden), rtol=1e-3, atol=1e-3)
    assert float(loss.detach()) < float(plain(hidden, dense, head).detach())


def test_with_labels_it_is_the_cross_entropy(subject: tuple) -> None:  # type: ignore[type-arg]
    head, _, hidden = subject
    wanted = torch.arange(ROWS) % VOCABULARY
    loss = divergence(hidden, head, labels(wanted))
    expected = functional.cross_entropy(functional.linear(hidden, head.weight, head.bias), wanted, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, hidden), gradient(expected, hidden), rtol=1e-4, atol=1e-4)


def test_a_sampled_normalizer_comes_close_and_closer_with_more_samples(subject: tuple) -> None:  # type: ignore[type-arg]
    _, dense, hidden = subject
    vocabulary = 4000
    head = Head(0.3 * torch.randn(vocabulary, WIDTH, generator=torch.Generator().manual_seed(1)))
    few = likeliest(dense, head, 4)
    exact = gradient(divergence(hidden, head, few), hidden)
    errors = []
    for sample in (5, 2000, vocabulary):
        generator = torch.Generator().manual_seed(0)
        sampled = gradient(divergence(hidden, head, few, sample, generator), hidden)
        errors.append(float((sampled - exact).norm() / exact.norm()))
    assert errors[2] < 1e-6 < errors[1] < 0.1 < 1 < errors[0], (
        errors
    )  # no more others than the sample: all are computed


def test_a_student_that_is_the_dense_model_has_nothing_to_learn(subject: tuple) -> None:  # type: ignore[type-arg]
    head, dense, _ = subject
    same = dense.clone().requires_grad_()
    loss = divergence(same, head, likeliest(dense, head, 30))
    assert abs(float(loss.detach())) < 1e-2
    assert float(gradient(loss, same).abs().max()) < 1e-4


def test_a_dense_model_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        likeliest(torch.full((2, 3), torch.nan), Head(torch.ones(5, 3)), 2)
