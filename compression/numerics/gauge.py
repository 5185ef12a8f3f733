"""Removes the redundant parameters of an MPO by fixing its gauge.

Takes tensors and returns tensors. Every bond of an MPO has a gauge freedom: multiplying a core by an invertible χ × χ
matrix and its neighbour by the inverse does not change the represented matrix. This freedom makes χ² parameters per
bond redundant, so the MPOs with bond dimensions r_k form a manifold of dimension Σ_k r_{k-1}·o_k·i_k·r_k − Σ_k r_k²
(Holtz, Rohwedder & Schneider 2012, theorem 14). Here the gauge is chosen so that χ rows of each core's left unfolding
(left·out·in, right) form the identity; these rows need not be stored. For two cores this is an interpolative
decomposition (Cheng et al. 2005).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compression.refusal import Refusal

__all__ = ["PivotedCore", "pivot", "stored", "unpivot"]

_GROWTH = 1.5  # largest magnitude of the entries of a tail
_SWAPS = 200  # largest number of swaps of rows


@dataclass(frozen=True, eq=False)
class PivotedCore:
    """Holds a core whose left unfolding contains the identity among its rows.

    Attributes:
        tail: the remaining rows, (left·out·in − right, right).
        order: int64 (left·out·in,): row r of the unfolding is row order[r] of the identity with the tail below it.
        shape: (left, out, in, right).
    """

    tail: torch.Tensor
    order: torch.Tensor
    shape: tuple[int, int, int, int]

    def expand(self) -> torch.Tensor:
        """Returns the plain core, axes (left, out, in, right)."""
        identity = torch.eye(self.shape[3], dtype=self.tail.dtype, device=self.tail.device)
        return torch.cat([identity, self.tail])[self.order].reshape(self.shape)


def pivot(cores: Sequence[torch.Tensor]) -> tuple[list[PivotedCore], torch.Tensor]:
    """Returns all cores but the last in pivoted form, and the last core, which absorbs the factors removed from them.

    Rows are chosen by Gaussian elimination with partial pivoting and improved by swaps until no entry of a tail exceeds
    1.5 in magnitude (Goreinov et al. 2010) or 200 swaps have been made. Computes in float64 and returns the type of the
    cores.

    Raises:
        ValueError: a left unfolding has fewer rows than columns, so its bond is larger than any matrix needs.
    """
    pivoted: list[PivotedCore] = []
    carry = torch.ones(1, 1, dtype=torch.float64, device=cores[0].device)
    for core in cores[:-1]:
        full = torch.einsum("ab,boir->aoir", carry, core.double())
        unfolding = full.reshape(-1, full.shape[3])
        rows, bond = unfolding.shape
        if rows < bond:
            raise Refusal(
                f"a bond of {bond} needs a left core with at least {bond} rows, got shape {tuple(core.shape)}"
            )
        chosen, tail = _dominant_rows(unfolding)
        rest = torch.ones(rows, dtype=torch.bool, device=core.device)
        rest[chosen] = False
        order = torch.empty(rows, dtype=torch.int64, device=core.device)
        order[chosen] = torch.arange(bond, device=core.device)
        order[rest] = torch.arange(bond, rows, device=core.device)
        left, out_leg, in_leg, right = full.shape
        pivoted.append(PivotedCore(tail.to(core.dtype), order, (left, out_leg, in_leg, right)))
        carry = unfolding[chosen]
    last = torch.einsum("ab,boir->aoir", carry, cores[-1].double())
    return pivoted, last.to(cores[-1].dtype)


def stored(cores: Sequence[torch.Tensor], pivoted: bool) -> list[torch.Tensor | PivotedCore]:
    """Returns the cores in the form in which they are stored, as new tensors: pivoted, or plain copies."""
    if not pivoted:
        return [core.clone(memory_format=torch.contiguous_format) for core in cores]
    front, last = pivot(cores)
    return [*front, last]


def unpivot(pivoted: Sequence[PivotedCore], last: torch.Tensor) -> list[torch.Tensor]:
    """Returns the plain cores; the inverse of `pivot` up to the gauge."""
    return [*(core.expand() for core in pivoted), last]


def _dominant_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns χ rows of a (rows, χ) matrix that express the others with small coefficients, and those coefficients.

    Noise at rounding level makes a rank-deficient matrix full-rank. The coefficients of directions that do not occur
    are then arbitrary and harmless.
    """
    rows, bond = matrix.shape
    scale = matrix.norm() * torch.finfo(matrix.dtype).eps
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, bond, dtype=matrix.dtype, generator=generator).to(matrix.device)
    matrix = matrix + noise * torch.where(scale > 0, scale, torch.ones_like(scale))
    packed, swaps = torch.linalg.lu_factor(matrix)
    permutation = list(range(rows))
    for row, other in enumerate(swaps.tolist()):
        permutation[row], permutation[other - 1] = permutation[other - 1], permutation[row]
    places = torch.tensor(permutation, device=matrix.device)
    chosen, rest = places[:bond], places[bond:]
    # matrix[chosen] = L₁ U and matrix[rest] = L₂ U, so matrix[rest] = B · matrix[chosen] with B = L₂ L₁⁻¹.
    tail = torch.linalg.solve_triangular(packed[:bond], packed[bond:], upper=False, left=False, unitriangular=True)
    for _ in range(_SWAPS if len(rest) else 0):
        row, column = divmod(int(tail.abs().argmax()), bond)
        size, step = tail[row, column].clone(), tail[row].clone()
        if abs(float(size)) <= _GROWTH:
            break
        chosen[column], rest[row] = rest[row].clone(), chosen[column].clone()
        step[column] -= 1
        tail[row] = 0
        tail[row, column] = 1
        tail -= torch.outer(tail[:, column] / size, step)
    return chosen, tail[rest.argsort()]
