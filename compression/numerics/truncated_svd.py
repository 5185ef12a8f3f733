"""Truncated singular value decomposition for every χ up to a cap, by the cheapest of three methods.

Tensors in, tensors out, on any device; knows no legs, module or file. The methods, with p the smaller side:

* `svd`: LAPACK's. For float64 input whose whole spectrum is asked for, where a Gram matrix would lose half the digits.
* `gram`: eigenvectors of the p × p Gram matrix accumulated in float64. Products of float32 numbers are exact there, so
  singular values are resolved down to 1e-8 of the largest: finer than a float32 SVD, which resolves 1e-7.
* `subspace`: for χ well below p, subspace iteration from a random start (Halko, Martinsson & Tropp 2011, algorithm
  4.4) with Chebyshev filters between the Rayleigh–Ritz steps (Zhou & Saad 2007), which like block Krylov methods
  (Musco & Musco 2015) needs the square root of the steps that powers need. Steps are taken on the matrix, or on its
  Gram matrix where that costs less.

The left factor is orthonormal and the right one is its product with the matrix, so whatever the method found, the
squared error is ‖W‖² − ‖right‖²: an equality that needs no second pass, accurate to rounding of the working precision
times ‖W‖².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import acosh, isfinite, log, sqrt
from typing import Literal

import torch

from compression.refusal import Refusal

__all__ = ["Spectrum", "TruncatedSVD", "choose_method", "truncated_svd"]

Method = Literal["svd", "gram", "subspace"]

_SMALL = 512
"""Below this smaller side the whole spectrum costs little more than a part of it."""
_SHARE = 0.3
"""From this share of the spectrum on, the whole of it costs no more than a part."""
_GAIN = 5e-3
"""Iteration stops once a round lowers the squared error by less than this part of it."""
_RESOLVED = 1e-4
"""Below this part of ‖W‖² a squared error is left to the Gram matrix: rounding in float32 is a thousandth of it."""
_ROUNDS = 12
"""Rounds before the iteration is given up for the Gram matrix; three to five are usual."""
_GROWTH = 1e6
"""Largest ratio by which one filter may magnify one wanted direction over another: float32 tells 1e7 apart."""
_DEGREE = 6
"""Largest degree of a filter."""
_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values as far as they are known, and how much lies beyond them.

    Attributes:
        values: float64, descending, not negative.
        residual: squared Frobenius norm of what `values` leave out; 0 if they are all.
    """

    values: torch.Tensor
    residual: float

    def discarded(self, chi: int) -> float:
        """Squared Frobenius error of keeping `chi` values, 0 ≤ χ ≤ len(values)."""
        return float(self.values[chi:].square().sum()) + self.residual

    def closed(self) -> torch.Tensor:
        """`values` and one more that stands for all beyond them, so that tail sums of squares are errors."""
        return torch.cat([self.values, self.values.new_tensor([sqrt(self.residual)])]) if self.residual else self.values


@dataclass(frozen=True, eq=False)
class TruncatedSVD:
    """W ≈ left · right.

    Attributes:
        left: (m, k), orthonormal columns, leading first.
        right: (k, n), leftᵀ W: rows of descending norm, the singular values.
        spectrum: at least k values.
    """

    left: torch.Tensor
    right: torch.Tensor
    spectrum: Spectrum


def choose_method(rows: int, columns: int, chi: int, dtype: torch.dtype) -> Method:
    """The method for χ = `chi` of a matrix (rows, columns)."""
    small = min(rows, columns)
    if small > _SMALL and chi <= _SHARE * small:
        return "subspace"
    return "svd" if dtype == torch.float64 else "gram"


def truncated_svd(
    matrix: torch.Tensor, chi: int | None = None, *, method: Method | None = None, seed: int = 0
) -> TruncatedSVD:
    """Leading `chi` singular triplets, serving every smaller χ by slicing.

    Args:
        matrix: (m, n), finite; float64 and float32 are computed in their own precision, less in float32.
        chi: how many, at least 1; None or more than min(m, n) means all.
        method: None takes `choose_method`'s.
        seed: of the random start of `subspace`; the same gives the same result on one machine.

    Returns:
        Factors in the precision of the computation. The spectrum is whole with `svd` and `gram`; with `subspace` it
        has χ values, each at most the true one, and iteration has stopped at a gain in squared error below 0.5 % of
        it in one round.

    Raises:
        ValueError: not a matrix of at least one entry, χ below 1, or an entry that is not finite.
    """
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise Refusal(f"a matrix with rows and columns is needed, got shape {tuple(matrix.shape)}")
    if chi is not None and chi < 1:
        raise Refusal(f"chi must be at least 1, got {chi}")
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    energy = _energy(matrix)
    if not isfinite(energy) and not torch.isfinite(matrix).all():
        raise Refusal("the matrix has NaN or infinite entries")
    rows, columns = matrix.shape
    keep = min(chi or rows, rows, columns)
    chosen = method or choose_method(rows, columns, keep, matrix.dtype)
    if chosen == "svd":
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return TruncatedSVD(left[:, :keep], values[:keep, None] * right[:keep], Spectrum(values.double(), 0.0))
    # From here on `wide` has the smaller side first.
    tall = rows > columns
    wide = matrix.T if tall else matrix
    basis = None
    if chosen == "subspace" and _scale_is_ordinary(energy, matrix):
        basis = _dominant_subspace(wide, keep, energy, torch.Generator(matrix.device).manual_seed(seed))
    if basis is None:
        left, right, spectrum = _from_gram(wide, keep)
    else:
        left, right, spectrum = _from_basis(wide, keep, basis, energy)
    if tall:
        left, right = _turned(left, right)
    return TruncatedSVD(left, right, spectrum)


def _from_gram(wide: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor, Spectrum]:
    """Left vectors (p, keep), their product with `wide`, and the whole spectrum."""
    # The result takes the place of the Gram matrix: column by column, as LAPACK wants it, no copy of it is made.
    vectors, squares = _gram(wide, torch.float64).mT, torch.empty(0, dtype=torch.float64, device=wide.device)
    torch.linalg.eigh(vectors, out=(squares, vectors))
    left = vectors[:, -keep:].flip(1).to(wide.dtype)
    del vectors
    return left, left.T @ wide, Spectrum(squares.flip(0).clamp_min(0).sqrt(), 0.0)


def _from_basis(
    wide: torch.Tensor, keep: int, basis: torch.Tensor, energy: float
) -> tuple[torch.Tensor, torch.Tensor, Spectrum]:
    """The best of rank `keep` inside an orthonormal basis (p, l)."""
    projected = basis.T @ wide
    squares, vectors = torch.linalg.eigh(_gram(projected, torch.float64))
    rotation = vectors[:, -keep:].flip(1).to(wide.dtype)
    leading = squares[-keep:].flip(0).clamp_min(0)
    spectrum = Spectrum(leading.sqrt(), max(0.0, energy - float(leading.sum())))
    return basis @ rotation, rotation.T @ projected, spectrum


def _turned(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From W ᵀ ≈ left · right, left orthonormal, to W ≈ left' · right', left' orthonormal, column by column the same.

    The columns of right.T are orthogonal already, but for rounding: too little so for values far below the largest.
    """
    norms = torch.linalg.vector_norm(right, dim=1)
    if float(norms.min()) > 1e-2 * float(norms.max()):
        return (right / norms[:, None]).T, norms[:, None] * left.T
    orthonormal, triangle = torch.linalg.qr(right.T)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(triangle.dtype)
    return orthonormal * signs, (signs[:, None] * triangle) @ left.T


def _dominant_subspace(wide: torch.Tensor, keep: int, energy: float, generator: torch.Generator) -> torch.Tensor | None:
    """Orthonormal (p, l), l ≥ keep, that holds the leading left vectors; None if the iteration does not settle."""
    rows, columns = wide.shape
    width = min(rows, keep + max(16, keep // 8))
    # One application to the matrix costs 4·p·n·l, to its Gram matrix 2·p²·l after 1.25·p²·n; about ten are made.
    gram: torch.Tensor | None = None
    if rows * (1.25 * columns + 20 * width) < 40 * columns * width:
        gram = _gram(wide, wide.dtype)
    apply: Callable[[torch.Tensor], torch.Tensor] = (lambda x: wide @ (wide.T @ x)) if gram is None else gram.__matmul__
    start = torch.randn(rows, width, generator=generator, dtype=wide.dtype, device=wide.device)
    basis: torch.Tensor = torch.linalg.qr(apply(start))[0]
    eps, captured = torch.finfo(wide.dtype).eps, 0.0
    for _ in range(_ROUNDS):
        image = apply(basis)
        ritz, vectors = torch.linalg.eigh((basis.T @ image).double())
        before, captured = captured, float(ritz[-keep:].sum())
        if captured - before <= max(_GAIN * (energy - captured), eps * energy):
            if energy - captured < _RESOLVED * energy:
                return None
            if gram is None or float(ritz[-keep]) > 10 * eps * float(ritz[-1]):
                return basis
            # Rounding of the Gram matrix hides the last directions; the matrix itself shows them.
            gram, apply = None, lambda x: wide @ (wide.T @ x)
        rotation = vectors.flip(1).to(wide.dtype)
        largest = float(ritz[-1])
        cut = max(float(ritz[0]), eps * largest)
        basis = torch.linalg.qr(_filtered(apply, basis @ rotation, image @ rotation, largest, cut))[0]
    return None


def _filtered(
    apply: Callable[[torch.Tensor], torch.Tensor],
    basis: torch.Tensor,
    image: torch.Tensor,
    largest: float,
    cut: float,
) -> torch.Tensor:
    """Chebyshev polynomial of the operator on `basis`: at most 1 below `cut`, growing fast above; columns scaled to 1.

    Args:
        image: the operator applied to `basis`.
        largest: its largest eigenvalue, which limits the degree.
    """
    degree = max(1, min(_DEGREE, int(log(_GROWTH) / acosh(max(2 * largest / cut - 1, 1 + 1e-6)))))
    half = cut / 2
    previous, current = basis, image / half - basis
    for _ in range(degree - 1):
        previous, current = current, 2 * (apply(current) / half - current) - previous
    norms: torch.Tensor = torch.linalg.vector_norm(current, dim=0)
    return current / norms.clamp_min(torch.finfo(current.dtype).tiny)


def _gram(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W Wᵀ (p, p) accumulated in `dtype` over blocks of columns; only the upper block triangle is multiplied."""
    rows, columns = wide.shape
    total = torch.zeros(rows, rows, dtype=dtype, device=wide.device)
    panel = max(128, -(-rows // 8))
    step = columns if dtype == wide.dtype else _BLOCK
    for first in range(0, columns, step):
        block = wide[:, first : first + step].to(dtype)
        for start in range(0, rows, panel):
            stop = min(start + panel, rows)
            total[start:stop, start:].addmm_(block[start:stop], block[start:].T)
    for start in range(0, rows, panel):
        stop = min(start + panel, rows)
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def _energy(matrix: torch.Tensor) -> float:
    """Squared Frobenius norm, summed in float64."""
    step = max(1, _BLOCK * _BLOCK // matrix.shape[1])
    return sum(float(matrix[row : row + step].double().square().sum()) for row in range(0, matrix.shape[0], step))


def _scale_is_ordinary(energy: float, matrix: torch.Tensor) -> bool:
    """Whether fourth powers of the entries are far from the limits of float32."""
    return bool(1e-16 < energy / matrix.numel() < 1e16)
