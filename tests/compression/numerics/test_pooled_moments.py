"""Moments from few rows are shrunk towards what they have in common, as far as the data say."""

from __future__ import annotations

import torch

from compression.numerics.pooled_moments import MomentSum, pooled_moments


def sums(rows: torch.Tensor) -> MomentSum:
    return MomentSum(rows.T @ rows, float(rows.square().sum(1).square().sum()), len(rows))


def test_a_moment_without_rows_is_the_common_one_and_one_of_many_rows_is_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    many, other = (torch.randn(4000, 6, generator=generator) * scale for scale in (1.0, torch.arange(1.0, 7.0)))
    given = {"many": sums(many), "other": sums(other), "none": sums(many[:0]), "single": sums(many[:1])}
    found = pooled_moments(given, aligned=True)
    everything = torch.cat([many, other, many[:1]])
    torch.testing.assert_close(found["none"], everything.T @ everything / len(everything))
    assert torch.equal(found["single"], found["none"])
    torch.testing.assert_close(found["many"], many.T @ many / len(many), rtol=0, atol=0.01)


def test_shrinking_brings_moments_of_few_rows_closer_to_the_true_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    shape = torch.randn(12, 12, generator=generator)
    for aligned in (True, False):
        true = [
            shape @ shape.T / 12 if aligned else torch.diag(torch.rand(12, generator=generator) + 0.5) for _ in "abcd"
        ]
        rows = [torch.randn(20, 12, generator=generator) @ torch.linalg.cholesky(each).T for each in true]
        found = pooled_moments({str(n): sums(each) for n, each in enumerate(rows)}, aligned)
        shrunk = sum(float((found[str(n)] - each).square().sum()) for n, each in enumerate(true))
        plain = sum(float((x.T @ x / 20 - each).square().sum()) for x, each in zip(rows, true, strict=True))
        assert shrunk < 0.6 * plain


def test_moments_in_other_coordinates_have_only_their_scale_in_common() -> None:
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(2)) * torch.arange(1.0, 6.0)
    found = pooled_moments({"a": sums(rows), "b": sums(rows[:0])}, aligned=False)
    torch.testing.assert_close(found["b"], torch.eye(5) * rows.square().mean())
