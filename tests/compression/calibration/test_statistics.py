"""Statistics that cannot be collected are refused by the name of the site."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from odd_models import (
    Q,
    Sub,
    batches,
    model,
    statistics_of,
)
from torch import nn

from compression import (
    Statistics,
    collect,
    discover_sites,
)
from compression.calibration import statistics
from compression.calibration.triangles import mirror_upper_
from compression.numerics.products import products_of


def test_statistics_that_are_not_finite_or_missing_are_refused_by_name() -> None:
    broken = torch.eye(4)
    broken[1, 2] = math.inf
    found = Statistics({"b": broken}, {"a": "a", "b": "a"}, {"a": torch.eye(4), "b": broken}, 10)
    assert found.gradient("a").shape == (4, 4)
    with pytest.raises(ValueError, match="site b: the second moment of its inputs has NaN or infinite"):
        found.input("b")
    with pytest.raises(ValueError, match="site b: the second moment of its gradients has NaN or infinite"):
        found.gradient("b")
    for ask in (found.input, found.gradient):
        with pytest.raises(ValueError, match="site c: no second moment"):
            ask("c")


def test_activations_that_overflow_are_refused_at_the_first_site_they_reach() -> None:
    dense = model()
    dense.get_submodule("layers.0.down").bias.fill_(math.nan)
    with pytest.raises(ValueError, match=f"site {Q}: the second moment of its inputs"):
        statistics_of(dense)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda inner, x: x, "never reached by the calibration text"),
        (lambda inner, x: inner(x.detach()), "no gradient of the prediction reaches it"),
        (lambda inner, x: x + 0 * inner(x).detach(), "no gradient of the prediction reaches it"),
        (
            lambda inner, x: inner(x.flatten(0, 1)[:7]).sum() + x,
            r"one row per token to be calibrated, reads shape \(7, 12\)",
        ),
        (lambda inner, x: inner(input=x), "one row per token to be calibrated, reads a keyword argument"),
    ],
)
def test_a_linear_map_that_cannot_be_calibrated_is_refused_by_name(
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor], reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"site {Q}\.inner: .*{reason}"):
        statistics_of(model(q_proj=Sub(call)))


def test_rows_that_arrive_flattened_count_as_tokens_with_their_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def smooth(logits: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return logits.softmax(-1) * mask[..., None]

    # The two products may differ by rounding, and a rounding error can make a token be sampled that otherwise is not.
    monkeypatch.setattr(statistics, "sampled_gradient", smooth)
    flat = model(q_proj=Sub(lambda inner, x: inner(x.flatten(0, 1)).reshape(x.shape)))
    plain = model(q_proj=Sub(lambda inner, x: inner(x)))
    [(ids, mask)] = batches()
    mask[:, 30:] = False
    seen = [
        collect(dense, discover_sites(dense), [(ids, mask)], torch.Generator().manual_seed(2))
        for dense in (flat, plain)
    ]
    torch.testing.assert_close(seen[0].input(f"{Q}.inner"), seen[1].input(f"{Q}.inner"))
    torch.testing.assert_close(seen[0].gradient(f"{Q}.inner"), seen[1].gradient(f"{Q}.inner"))


def test_weighted_moments_of_bfloat16_stay_semidefinite_beside_massive_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 1, generator=generator) @ torch.randn(1, 512, generator=generator)
    rows = (rows * 100 + torch.randn(2000, 512, generator=generator) * 0.01).bfloat16().float()
    weights = torch.randn(2000, generator=generator).exp()
    total = torch.zeros(512, 512)
    with products_of(torch.bfloat16):
        statistics._add_upper_gram_(total, rows, weights)
    moment = mirror_upper_(total).double()
    lowest = float(torch.linalg.eigvalsh(moment)[0])
    assert lowest > -1e-6 * float(moment.trace())
    exact = (rows * weights[:, None]).double().T @ rows.double()
    assert torch.allclose(moment, exact, rtol=0, atol=1e-3 * float(exact.diagonal().max()))
