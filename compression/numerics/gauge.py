"""Gauge fixing: an MPO without its redundant parameters.

Tensors in, tensors out. Every bond of an MPO carries a gauge freedom: a core may be multiplied by an invertible χ × χ
matrix and its neighbour by the inverse. The freedom is worth χ² parameters a bond, so the MPOs of bond dimensions r_k
form a manifold of dimension Σ_k r_{k-1}·o_k·i_k·r_k − Σ_k r_k² (Holtz, Rohwedder & Schneider 2012, theorem 14). Here it
is spent on making χ rows of each core's left unfolding (left·out·in, right) the identity: those rows need not be
stored. The represented matrix is unchanged. For two cores this is an interpolative decomposition (Cheng et al. 2005).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compression.refusal import Refusal

__all__ = ["PivotedCore", "pivot", "stored", "unpivot"]

_GROWTH = 1.5  # entries of a tail are at most this large in magnitude
_SWAPS = 200


@dataclass(frozen=True, eq=False)
class PivotedCore:
    """A core whose left unfolding has an identity among its rows.

    Attributes:
        tail: the other rows, (left·out·in − right, right).
        order: int64 (left·out·in,): row r of the unfolding is row order[r] of the identity with the tail below it.
        shape: (left, out, in, right).
    """

    tail: torch.Tensor
    order: torch.Tensor
    shape: tuple[int, int, int, int]

    def expand(self) -> torch.Tensor:
        """The core, axes (left, out, in, right)."""
        identity = torch.eye(self.shape[3], dtype=self.tail.dtype, device=self.tail.device)
        return torch.cat([identity, self.tail])[self.order].reshape(self.shape)


def pivot(cores: Sequence[torch.Tensor]) -> tuple[list[PivotedCore], torch.Tensor]:
    """All cores but the last with an identity in them, and the last core, which takes up what they gave away.

    Rows are picked by Gaussian elimination with partial pivoting and improved by swaps until no entry of a tail exceeds
    1.5 in magnitude (Goreinov et al. 2010) or 200 swaps were made; computed in float64, returned in the type of the
    cores.

    Raises:
        ValueError: a left unfolding has fewer rows than columns, so that its bond is larger than any matrix needs.
    """
    pivoted: list[PivotedCore] = []
    carry = torch.ones(1, 1, dtype=torch.float64, device=cores[0].device)
    for core in cores[:-1]:
        full = torch.einsum("ab,boir->aoir", carry, core.double())
        unfolding = full.reshape(-1, full.shape[3])
        rows, bond = unfolding.shape
        if rows < bond:
            raise Refusal(f"a bond of {bond} needs a core with as many rows to its left, got {tuple(core.shape)}")
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
    """The form in which cores are stored, in tensors of its own: pivoted, or plain copies."""
    if not pivoted:
        return [core.clone(memory_format=torch.contiguous_format) for core in cores]
    front, last = pivot(cores)
    return [*front, last]


def unpivot(pivoted: Sequence[PivotedCore], last: torch.Tensor) -> list[torch.Tensor]:
    """The cores as they are contracted; inverse of `pivot` up to the gauge."""
    return [*(core.expand() for core in pivoted), last]


def _dominant_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """χ rows of a (rows, χ) matrix in which the others have small coefficients, and those coefficients.

    A matrix of deficient rank is given a full one by noise at rounding level: the coefficients of directions that do
    not occur are then arbitrary and harmless.
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
