"""Changes to the coordinates in which the plain SVD is optimal for a metric (whitening).

Takes tensors and returns tensors. With C + εI = L Lᵀ and G + εI = R Rᵀ (Cholesky), tr(G E C Eᵀ) = ‖Rᵀ E L‖². The best
rank-χ matrix in the metric is therefore the truncated SVD of A = Rᵀ W L, multiplied by R⁻ᵀ and L⁻¹ from the two sides.

Only the factor of the shorter side is needed. If W has fewer columns than rows, the right singular vectors V of A are
the eigenvectors of AᵀA = Lᵀ (Wᵀ G W) L, and since the best matrix is A V Vᵀ, its factors are W L V and Vᵀ L⁻¹: G is
multiplied with, not factorized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression.numerics.finite import is_finite
from compression.numerics.large_moments import moment_dtype
from compression.refusal import Refusal

__all__ = ["Whitening", "lowrank", "shrink"]

_ZERO = 1e-24  # if both moments are 0, weights are whitened by this factor and are still normal float32 numbers


def shrink(moment: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """Shrinks a sampled second moment M towards a multiple of the identity: (1 − s)·M + r·I.

    r is s·tr M / d. It is at least ε₃₂·tr M, the rounding error of a float32 moment, so M may have any rank. It is also
    at least 1e-24, so a zero moment still gives a metric, in which every error costs almost nothing.

    Args:
        moment: M (d, d), symmetric positive semidefinite up to rounding in float32.
        shrinkage: s in (0, 1].

    Returns:
        A new matrix of the type that `compression.numerics.large_moments.moment_dtype` names.

    Raises:
        ValueError: s is outside (0, 1], or the moment has NaN, infinite or negative diagonal entries.
    """
    if not 0 < shrinkage <= 1:
        raise Refusal(f"shrinkage must be in (0, 1], got {shrinkage}")
    if not is_finite(moment):
        raise Refusal("a second moment has NaN or infinite entries")
    result = moment.to(moment_dtype(len(moment)), copy=True)
    diagonal = result.diagonal()
    if (diagonal < 0).any():
        raise Refusal(f"the diagonal of a second moment must not be negative, got {float(diagonal.min())}")
    trace = float(diagonal.sum(dtype=torch.float64))
    result.mul_(1 - shrinkage)
    diagonal.add_(max(shrinkage * trace / len(result), torch.finfo(torch.float32).eps * trace, _ZERO))
    return result


@dataclass(frozen=True, eq=False)
class Whitening:
    """Holds the lower Cholesky factors of a metric, float64.

    Attributes:
        input: L (in, in); None leaves the input side unchanged.
        output: R (out, out); None leaves the output side unchanged.
    """

    input: torch.Tensor | None
    output: torch.Tensor | None

    @classmethod
    def of(cls, input_moment: torch.Tensor | None, output_moment: torch.Tensor | None, shrinkage: float) -> Whitening:
        """Shrinks and factorizes C (in, in) and G (out, out); None for a side that is not whitened."""
        factors = [
            None if moment is None else torch.linalg.cholesky(shrink(moment, shrinkage).double())
            for moment in (input_moment, output_moment)
        ]
        return cls(*factors)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns Rᵀ W L in float64, for W of shape (out, in)."""
        result = weight.double()
        if self.output is not None:
            result = self.output.T @ result
        return result if self.input is None else result @ self.input

    def undo_left(self, columns: torch.Tensor) -> torch.Tensor:
        """Returns R⁻ᵀ U, for U of shape (out, χ)."""
        if self.output is None:
            return columns
        solved: torch.Tensor = torch.linalg.solve_triangular(self.output.T, columns, upper=True)
        return solved

    def undo_right(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns V L⁻¹, for V of shape (χ, in)."""
        if self.input is None:
            return rows
        solved: torch.Tensor = torch.linalg.solve_triangular(self.input, rows, upper=False, left=False)
        return solved


def lowrank(
    weight: torch.Tensor, inputs: torch.Tensor | None, gradients: torch.Tensor | None, chi: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the factors of the best matrices of every rank up to χ in a metric, and the spectrum.

    The product of the first r columns and rows is the best matrix of rank r. The squares of the singular values are
    found from a Gram matrix, so that they are right down to 1e-16 of the largest square, or to 1e-7 where the longer
    side is a large one, see `compression.numerics.large_moments`.

    Args:
        weight: W (out, in).
        inputs, gradients: C (in, in) and G (out, out), positive definite; None leaves that side as it is.
        chi: χ; None or more than the shorter side means that.

    Returns:
        The factors (out, χ) and (χ, in), and all singular values of the whitened matrix, descending; float64.
    """
    if weight.shape[0] < weight.shape[1]:
        left, right, values = lowrank(weight.mT, gradients, inputs, chi)
        return right.mT, left.mT, values
    matrix = weight.to(moment_dtype(len(weight)))
    gram = (matrix.mT @ (matrix if gradients is None else gradients.to(matrix) @ matrix)).double()
    factor = None if inputs is None else torch.linalg.cholesky(inputs.double())
    if factor is not None:
        gram = factor.mT @ gram @ factor
    squares, basis = torch.linalg.eigh(gram)
    values, basis = squares.flip(0).clamp_min(0).sqrt(), basis.flip(1)[:, :chi]
    if factor is None:
        return (matrix @ basis.to(matrix)).double(), basis.mT, values
    right = torch.linalg.solve_triangular(factor, basis.mT, upper=False, left=False)
    return (matrix @ (factor @ basis).to(matrix)).double(), right, values
