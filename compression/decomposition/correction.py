"""Chooses how far a matrix follows what its inputs predict of its errors, and returns that correction.

Knows the two halves of the sequences of a repair; knows no modules. The correction of W is α·Δ(λ) with

    Δ(λ) = E[r x̂ᵀ] (E[x̂ x̂ᵀ] + λ·I)⁻¹,    r = y − W x̂ the residual,

where the ridge λ and the share α in [0, 1] are those with which a correction from one half helps most on the other
half, summed over both ways, in the metric of the gradient moment G: it takes tr(G (2 α E[Δx̂ rᵀ] − α² E[Δx̂ x̂ᵀΔᵀ]))
off the error there.

Halves with more tokens than x̂ has values are held as their second moments. Otherwise they are held as their rows
X (n, in) and R (n, out), whose Δ is Rᵀ (X Xᵀ/n + λ·I)⁻¹ X/n, and what it changes on the other half needs only the
products X₁X₂ᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from compression.numerics.products import products_of

__all__ = ["FOLDS", "Deviations", "Sums", "correction", "sums"]

FOLDS = 2
_RIDGES = (0.003, 0.03, 0.3)
"""Values of λ that are tried, in units of the mean of the diagonal of E[x̂ x̂ᵀ]."""


class Deviations(Protocol):
    """What the two halves say about the residuals of a matrix."""

    def judged(self, ridge: float, fold: int, metric: torch.Tensor) -> tuple[float, float]:
        """Returns tr(G E[Δx̂ rᵀ]) and tr(G E[Δx̂ x̂ᵀΔᵀ]) on the other half, for Δ(λ) of the half `fold`.

        Args:
            ridge: λ in units of the mean of the diagonal of E[x̂ x̂ᵀ].
            metric: G (out, out), float32.
        """

    def change(self, ridge: float) -> torch.Tensor:
        """Returns Δ(λ) of both halves together (out, in), float64."""


def correction(found: Deviations, gradient: torch.Tensor) -> torch.Tensor | None:
    """Returns α·Δ(λ) (out, in), float64; None if no correction helps.

    Args:
        gradient: G (out, out).
    """
    # Judging a correction needs few digits, so float32 is enough; for G on one side even fewer are.
    metric = gradient.float()
    best, best_ridge, best_share = 0.0, 0.0, 0.0
    for ridge in _RIDGES:
        judged = [found.judged(ridge, fold, metric) for fold in range(FOLDS)]
        linear, square = (sum(values) for values in zip(*judged, strict=True))
        share = min(1.0, max(0.0, linear / square)) if square > 0 else 0.0
        gain = 2 * share * linear - share**2 * square
        if gain > best:
            best, best_ridge, best_share = gain, ridge, share
    return best_share * found.change(best_ridge) if best else None


class Sums(Protocol):
    """Adds up what two halves of the sequences say about the sites of a group, whose input is the same."""

    def add(self, fold: int, inputs: torch.Tensor, aims: torch.Tensor) -> None:
        """Takes rows of x̂ (n, in) of the half `fold`, and of what y is computed from (n, aim)."""

    def deviations(self, start: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Deviations:
        """Returns the residuals y − W x̂ − b of a site.

        Args:
            start: W (out, in), float64.
            weight: the matrix (out, aim) whose product with an aim is y − b; None if the aim is y itself.
            bias: b (out,), needed only with no `weight`.
        """


def sums(width: int, aim: int, like: torch.Tensor, tokens: int) -> Sums:
    """Returns empty sums for inputs of `width` values, aims of `aim` values and `tokens` rows, both halves together.

    Args:
        like: rows of the inputs, for their device.
    """
    return _RowSums() if tokens < FOLDS * width else _MomentSums(width, aim, like, tokens)


class _MomentSums:
    def __init__(self, width: int, aim: int, like: torch.Tensor, tokens: int) -> None:
        self._tokens = tokens
        self._inputs = like.new_zeros(FOLDS, width, width, dtype=torch.float64)
        self._mean = self._inputs.new_zeros(FOLDS, width)
        self._cross = self._inputs.new_zeros(FOLDS, aim, width)

    def add(self, fold: int, inputs: torch.Tensor, aims: torch.Tensor) -> None:
        rows = inputs.float()
        self._inputs[fold] += (rows.T @ rows).double() / self._tokens
        self._cross[fold] += (aims.float().T @ rows).double() / self._tokens
        self._mean[fold] += rows.sum(0).double() / self._tokens

    def deviations(self, start: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Deviations:
        if weight is not None and torch.equal(weight, start):  # W x − W x̂, in one product and without cancellation
            return _Moments(self._inputs, start @ (self._cross - self._inputs))
        aimed = self._cross if weight is None else weight @ self._cross
        if weight is None and bias is not None:
            aimed = aimed - bias.double()[:, None] * self._mean[:, None, :]
        return _Moments(self._inputs, aimed - start @ self._inputs)


class _RowSums:
    def __init__(self) -> None:
        self._rows: list[list[torch.Tensor]] = [[] for _ in range(FOLDS)]
        self._aims: list[list[torch.Tensor]] = [[] for _ in range(FOLDS)]

    def add(self, fold: int, inputs: torch.Tensor, aims: torch.Tensor) -> None:
        self._rows[fold].append(inputs)
        self._aims[fold].append(aims)

    @cached_property
    def _inputs(self) -> list[torch.Tensor]:
        return [torch.cat(rows).float() for rows in self._rows]

    @cached_property
    def _products(self) -> torch.Tensor:
        rows = torch.cat(self._inputs)
        return rows @ rows.T / len(rows)

    def deviations(self, start: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Deviations:
        residual = []
        for inputs, aims in zip(self._inputs, self._aims, strict=True):
            aimed = torch.cat(aims).float()
            if weight is not None and torch.equal(weight, start):  # W x − W x̂
                residual.append((aimed - inputs) @ start.float().T)
                continue
            if weight is not None:
                aimed = aimed @ weight.float().T
            elif bias is not None:
                aimed = aimed - bias.float()
            residual.append(aimed - inputs @ start.float().T)
        return _Rows(self._inputs, residual, self._products)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Two halves as their second moments, float64, whose sum over the halves is the mean over all tokens.

    Attributes:
        inputs: E[x̂ x̂ᵀ] (2, in, in).
        missing: E[r x̂ᵀ] (2, out, in).
    """

    inputs: torch.Tensor
    missing: torch.Tensor

    def judged(self, ridge: float, fold: int, metric: torch.Tensor) -> tuple[float, float]:
        own, other = self.inputs[fold].float(), self.inputs[1 - fold].float()
        change = _solved(_damped(own, ridge), self.missing[fold].float())
        pulled = _pulled(change, metric)
        linear, square = pulled * self.missing[1 - fold].float(), pulled * (change @ other)
        return float(linear.sum()), float(square.sum())

    def change(self, ridge: float) -> torch.Tensor:
        return _solved(_damped(self.inputs.sum(0), ridge), self.missing.sum(0))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Two halves as their rows.

    Attributes:
        inputs: X (n, in) of each half, float32.
        residual: R (n, out) of each half, float32.
        products: X Xᵀ / N (N, N) of all rows together, float32, N the number of both halves.
    """

    inputs: Sequence[torch.Tensor]
    residual: Sequence[torch.Tensor]
    products: torch.Tensor

    def judged(self, ridge: float, fold: int, metric: torch.Tensor) -> tuple[float, float]:
        own, other = self._part(fold), self._part(1 - fold)
        damped = _damped(self.products[own, own], ridge, self.inputs[0].shape[1])
        # Δx̂ of the rows of the other half, (out, n)
        rows = len(self.products)
        changed = _solved(damped, self.residual[fold].T) @ self.products[own, other]
        pulled = _pulled(changed, metric)
        return float((pulled * self.residual[1 - fold].T).sum()) / rows, float((pulled * changed).sum()) / rows

    def change(self, ridge: float) -> torch.Tensor:
        damped = _damped(self.products.double(), ridge, self.inputs[0].shape[1])
        weights = _solved(damped, torch.cat([rows.T for rows in self.residual], 1).double() / len(self.products))
        return (weights.float() @ torch.cat(list(self.inputs))).double()

    def _part(self, fold: int) -> slice:
        first = len(self.inputs[0])
        return slice(0, first) if fold == 0 else slice(first, None)


def _damped(moment: torch.Tensor, ridge: float, values: int | None = None) -> torch.Tensor:
    """A moment plus λ·I; `values` is the number of values of x̂ if the moment is that of rows."""
    damped = moment.clone()
    mean = damped.diagonal().sum() / (values or len(damped))
    damped.diagonal().add_(ridge * mean.clamp_min(torch.finfo(moment.dtype).tiny))
    return damped


def _solved(moment: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """B M⁻¹ of a moment M (m, m) and B (out, m)."""
    factor, failed = torch.linalg.cholesky_ex(moment)
    answer: torch.Tensor
    if failed:  # too few digits for the largest and the smallest moment
        answer = torch.linalg.solve(moment.double(), other.double().mT).mT.to(other)
    else:
        answer = torch.cholesky_solve(other.mT, factor).mT
    return answer


def _pulled(change: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    if metric is None:
        return change
    with products_of(torch.bfloat16):
        return metric @ change
