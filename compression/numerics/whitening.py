"""Whitening: the change of coordinates in which the plain SVD is optimal for a metric.

Tensors in, tensors out. With C + εI = L Lᵀ and G + εI = R Rᵀ (Cholesky), tr(G E C Eᵀ) = ‖Rᵀ E L‖², so the best rank-χ
matrix in the metric is the truncated SVD of Rᵀ W L with the factors undone on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression.refusal import Refusal

__all__ = ["Whitening", "shrink"]

_ZERO = 1e-24  # its root, squared for two zero sides, times any weight is still a normal float32


def shrink(moment: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """(1 − s)·M + r·I in float64: a sampled second moment pulled towards a multiple of the identity.

    r is s·tr M / d, but at least the rounding of a float32 moment, ε₃₂·tr M, so that M may have any rank; and at least
    1e-24, so that a zero moment still gives a metric, in which every error costs next to nothing.

    Args:
        moment: (d, d), symmetric positive semidefinite up to rounding in float32.
        shrinkage: s in (0, 1].

    Raises:
        ValueError: s outside (0, 1], or a moment with NaN, infinite or negative diagonal entries.
    """
    if not 0 < shrinkage <= 1:
        raise Refusal(f"shrinkage must be in (0, 1], got {shrinkage}")
    if not torch.isfinite(moment).all():
        raise Refusal("a second moment has NaN or infinite entries")
    result = moment.to(torch.float64, copy=True)
    diagonal = result.diagonal()
    if (diagonal < 0).any():
        raise Refusal(f"a second moment has no negative diagonal, got {float(diagonal.min())}")
    trace = float(diagonal.sum())
    result.mul_(1 - shrinkage)
    diagonal.add_(max(shrinkage * trace / len(result), torch.finfo(torch.float32).eps * trace, _ZERO))
    return result


@dataclass(frozen=True, eq=False)
class Whitening:
    """Lower Cholesky factors of the two sides, float64; None leaves that side as it is."""

    input: torch.Tensor | None
    output: torch.Tensor | None

    @classmethod
    def of(cls, input_moment: torch.Tensor | None, output_moment: torch.Tensor | None, shrinkage: float) -> Whitening:
        """From C (in, in) and G (out, out), each shrunk first; None for a side that is not whitened."""
        factors = [
            None if moment is None else torch.linalg.cholesky(shrink(moment, shrinkage))
            for moment in (input_moment, output_moment)
        ]
        return cls(*factors)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Rᵀ W L for W of shape (out, in), float64."""
        result = weight.double()
        if self.output is not None:
            result = self.output.T @ result
        return result if self.input is None else result @ self.input

    def undo_left(self, columns: torch.Tensor) -> torch.Tensor:
        """R⁻ᵀ U for U of shape (out, χ)."""
        if self.output is None:
            return columns
        solved: torch.Tensor = torch.linalg.solve_triangular(self.output.T, columns, upper=True)
        return solved

    def undo_right(self, rows: torch.Tensor) -> torch.Tensor:
        """V L⁻¹ for V of shape (χ, in)."""
        if self.input is None:
            return rows
        solved: torch.Tensor = torch.linalg.solve_triangular(self.input, rows, upper=False, left=False)
        return solved
