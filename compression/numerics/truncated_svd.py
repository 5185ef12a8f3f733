"""Computes truncated singular value decompositions for every χ up to a cap, by the cheapest of three methods.

Takes tensors on any device and returns tensors; does not know legs, modules or files. Let p be the smaller side:

* `svd` is LAPACK's SVD. It is used for float64 input whose whole spectrum is requested, because a Gram matrix would
  lose half the digits.
* `gram` computes eigenvectors of the p × p Gram matrix, accumulated in float64. Products of float32 numbers are exact
  in float64, so singular values are resolved down to 1e-8 of the largest one. A float32 SVD resolves only 1e-7.
* `subspace` is used for χ well below p. It is subspace iteration from a random start (Halko, Martinsson & Tropp 2011,
  algorithm 4.4) with Chebyshev filters between the Rayleigh–Ritz steps (Zhou & Saad 2007). Like block Krylov methods
  (Musco & Musco 2015) it needs only about the square root of the number of steps of plain power iteration. It applies
  the matrix, or its Gram matrix if that is cheaper.

The left factor is orthonormal and the right factor is its transpose times the matrix. For every method the squared
error is therefore exactly ‖W‖² − ‖right‖² and needs no second pass; it is accurate to rounding in the working precision
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
"""If the smaller side is at most this, the whole spectrum costs little more than a part of it."""
_SHARE = 0.3
"""If χ exceeds this fraction of the smaller side, the whole spectrum costs no more than a part of it."""
_GAIN = 5e-3
"""The iteration stops once a round lowers the squared error by less than this fraction of it."""
_RESOLVED = 1e-4
"""If the squared error is below this fraction of ‖W‖², `gram` is used; float32 rounding is a thousandth of that."""
_ROUNDS = 12
"""Number of rounds after which the iteration gives up and `gram` is used; three to five are usual."""
_GROWTH = 1e6
"""Largest ratio by which one filter may amplify one wanted direction over another; float32 resolves ratios of 1e7."""
_DEGREE = 6
"""Largest degree of a filter."""
_BLOCK = 1024
"""Number of columns that are converted to float64 at a time."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Holds the known singular values of a matrix and the norm of the remaining ones.

    Attributes:
        values: float64, descending, not negative.
        residual: sum of the squares of all singular values not in `values`; 0 if there are none.
    """

    values: torch.Tensor
    residual: float

    def discarded(self, chi: int) -> float:
        """Returns the squared Frobenius error of keeping `chi` values, 0 ≤ χ ≤ len(values)."""
        return float(self.values[chi:].square().sum()) + self.residual

    def closed(self) -> torch.Tensor:
        """Returns `values`, followed by the root of `residual` if it is not 0, so tail sums of squares are errors."""
        return torch.cat([self.values, self.values.new_tensor([sqrt(self.residual)])]) if self.residual else self.values


@dataclass(frozen=True, eq=False)
class TruncatedSVD:
    """Holds factors with W ≈ left · right.

    Attributes:
        left: (m, k), orthonormal columns, leading first.
        right: (k, n), equal to leftᵀ W. The norms of its rows are the singular values, descending.
        spectrum: spectrum of W, with at least k values.
    """

    left: torch.Tensor
    right: torch.Tensor
    spectrum: Spectrum


def choose_method(rows: int, columns: int, chi: int, dtype: torch.dtype) -> Method:
    """Returns the cheapest method for the leading `chi` singular triplets of a matrix (rows, columns)."""
    small = min(rows, columns)
    if small > _SMALL and chi <= _SHARE * small:
        return "subspace"
    return "svd" if dtype == torch.float64 else "gram"


def truncated_svd(
    matrix: torch.Tensor, chi: int | None = None, *, method: Method | None = None, seed: int = 0
) -> TruncatedSVD:
    """Compute the leading `chi` singular triplets. Slice them for a smaller χ.

    Args:
        matrix: (m, n), finite. Float64 is computed in float64, all other types in float32.
        chi: number of triplets, at least 1; None or more than min(m, n) means all.
        method: the method; None uses `choose_method`.
        seed: seed of the random start of `subspace`. The same seed gives the same result on the same machine.

    Returns:
        Factors in the precision of the computation. With `svd` and `gram` the spectrum is complete. With `subspace` it
        has χ values, none larger than the true one; the last round lowered the squared error by less than 0.5 %.

    Raises:
        ValueError: `matrix` is not a matrix with at least one entry, χ is below 1, or an entry is not finite.
    """
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise Refusal(f"expected a matrix with rows and columns, got shape {tuple(matrix.shape)}")
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
    # `wide` has the smaller side first.
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
    """Returns the left vectors (p, keep), their product with `wide`, and the whole spectrum."""
    # The result overwrites the Gram matrix; the transpose has the column order that LAPACK needs to avoid a copy.
    vectors, squares = _gram(wide, torch.float64).mT, torch.empty(0, dtype=torch.float64, device=wide.device)
    torch.linalg.eigh(vectors, out=(squares, vectors))
    left = vectors[:, -keep:].flip(1).to(wide.dtype)
    del vectors
    return left, left.T @ wide, Spectrum(squares.flip(0).clamp_min(0).sqrt(), 0.0)


def _from_basis(
    wide: torch.Tensor, keep: int, basis: torch.Tensor, energy: float
) -> tuple[torch.Tensor, torch.Tensor, Spectrum]:
    """Returns the best approximation of rank `keep` within the span of an orthonormal basis (p, l)."""
    projected = basis.T @ wide
    squares, vectors = torch.linalg.eigh(_gram(projected, torch.float64))
    rotation = vectors[:, -keep:].flip(1).to(wide.dtype)
    leading = squares[-keep:].flip(0).clamp_min(0)
    spectrum = Spectrum(leading.sqrt(), max(0.0, energy - float(leading.sum())))
    return basis @ rotation, rotation.T @ projected, spectrum


def _turned(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns Wᵀ ≈ left · right, left orthonormal, into W ≈ left' · right', left' orthonormal, triplet by triplet.

    The columns of right.T are orthogonal except for rounding, which is too large for values far below the largest one;
    then a QR decomposition makes them orthonormal.
    """
    norms = torch.linalg.vector_norm(right, dim=1)
    if float(norms.min()) > 1e-2 * float(norms.max()):
        return (right / norms[:, None]).T, norms[:, None] * left.T
    orthonormal, triangle = torch.linalg.qr(right.T)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(triangle.dtype)
    return orthonormal * signs, (signs[:, None] * triangle) @ left.T


def _dominant_subspace(wide: torch.Tensor, keep: int, energy: float, generator: torch.Generator) -> torch.Tensor | None:
    """Returns an orthonormal basis (p, l), l ≥ keep, whose span contains the leading left vectors.

    Returns None if the iteration does not converge or the squared error is too small for its precision.
    """
    rows, columns = wide.shape
    width = min(rows, keep + max(16, keep // 8))
    # Applying the matrix and its transpose costs 4·p·n·l. Applying the Gram matrix costs 2·p²·l, after 1.25·p²·n to
    # form it. About ten applications are needed.
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
            # Rounding of the Gram matrix hides the last directions; the matrix itself resolves them.
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
    """Applies a Chebyshev polynomial of an operator to `basis` and scales the columns to norm 1.

    On eigenvalues below `cut` the polynomial is at most 1 in magnitude; above, it grows fast.

    Args:
        apply: the operator, symmetric positive semidefinite.
        basis: (p, l).
        image: the operator applied to `basis`.
        largest: largest eigenvalue of the operator, which limits the degree.
        cut: upper end of the eigenvalues to suppress.
    """
    degree = max(1, min(_DEGREE, int(log(_GROWTH) / acosh(max(2 * largest / cut - 1, 1 + 1e-6)))))
    half = cut / 2
    previous, current = basis, image / half - basis
    for _ in range(degree - 1):
        previous, current = current, 2 * (apply(current) / half - current) - previous
    norms: torch.Tensor = torch.linalg.vector_norm(current, dim=0)
    return current / norms.clamp_min(torch.finfo(current.dtype).tiny)


def _gram(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns W Wᵀ (p, p), accumulated in `dtype` over blocks of columns. Multiplies only the upper block triangle."""
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
    """Returns the squared Frobenius norm, summed in float64."""
    step = max(1, _BLOCK * _BLOCK // matrix.shape[1])
    return sum(float(matrix[row : row + step].double().square().sum()) for row in range(0, matrix.shape[0], step))


def _scale_is_ordinary(energy: float, matrix: torch.Tensor) -> bool:
    """Whether fourth powers of the entries are far from the limits of float32."""
    return bool(1e-16 < energy / matrix.numel() < 1e16)
