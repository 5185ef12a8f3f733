"""Prunes a matrix in the metric of its inputs and output gradients, and refits the entries that are left.

Takes tensors and returns tensors. An error E of the matrix costs ½·tr(G E C Eᵀ) nats per token. With all other entries
refitted, removing entry w_ij costs ½·w_ij² / ([G⁻¹]_ii·[C⁻¹]_jj): the optimal brain surgeon (Hassibi & Stork 1993) in a
Kronecker-factored metric. Once a share 1 − d of the entries is gone, the inverses would have to be those of what is
left, which differs from row to row. In their place stand the inverses of moments whose entries off the diagonal are
multiplied by d, the share of the others that an entry still finds. At d = 1 this is exact; as d falls to 0 it becomes
w_ij²·G_ii·C_jj, the cost of an entry that nothing can replace.

After every step conjugate gradients lower the cost over the values of the entries that are left, in coordinates in
which both moments have a diagonal of ones. The cost of a result is that of its own values, so it is exact although the
refit stops early. Each step starts from the result of the one before, so the entries of a smaller result are among
those of every larger one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from compression.numerics.finite import is_finite
from compression.refusal import Refusal

__all__ = ["Pruned", "prune", "refit_pruned"]

_GAIN = 0.02
"""The refit ends when an iteration lowers the cost by less than this share of what is left of it."""
_MOST = 100  # iterations of a refit


@dataclass(frozen=True, eq=False)
class Pruned:
    """Holds a pruned matrix.

    Attributes:
        matrix: float32 (out, in), 0 where an entry was removed.
        mask: which entries are left, bool (out, in).
        cost: ½·tr(G E C Eᵀ) of the error E, in nats per token.
    """

    matrix: torch.Tensor
    mask: torch.Tensor
    cost: float


@torch.no_grad()
def prune(weight: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor, kept: Sequence[int]) -> Iterator[Pruned]:
    """Yields the matrix with ever fewer entries. Moments are inverted in float64; all else is float32.

    Args:
        weight: W (out, in), finite.
        inputs: C (in, in), positive definite, see `compression.numerics.whitening.shrink`.
        gradients: G (out, out), positive definite. The identity prunes in the input metric alone.
        kept: numbers of entries to keep, each between 1 and all, strictly descending.

    Raises:
        ValueError: shapes disagree, numbers are out of range or order, W is not finite, or a moment is not positive
            definite.
    """
    outputs, size = weight.shape
    if inputs.shape != (size, size) or gradients.shape != (outputs, outputs):
        raise Refusal(
            f"a matrix {outputs} × {size} needs moments of {size} inputs and {outputs} outputs, "
            f"got {tuple(inputs.shape)} and {tuple(gradients.shape)}"
        )
    if any(not 1 <= number <= weight.numel() for number in kept) or any(a <= b for a, b in pairwise(kept)):
        raise Refusal(
            f"numbers of entries to keep must descend strictly between {weight.numel()} and 1, got {list(kept)}"
        )
    if not is_finite(weight):
        raise Refusal("a matrix with NaN or infinite entries cannot be pruned")
    columns, rows = _Side.of(inputs), _Side.of(gradients)
    return _steps(weight.double() * rows.scale[:, None] * columns.scale, rows, columns, kept)


@torch.no_grad()
def refit_pruned(weight: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor, pruned: Pruned) -> Pruned:
    """Returns a pruned matrix with the same mask whose values are fitted to another matrix, from their present values.

    Args:
        weight, inputs, gradients: W, C and G as for `prune`.

    Raises:
        ValueError: a moment is not positive definite.
    """
    columns, rows = _Side.of(inputs), _Side.of(gradients)
    scale = rows.scale[:, None] * columns.scale
    unit = float((weight.double() * scale).norm()) or 1.0
    target, start = ((each.double() * scale / unit).float() for each in (weight, pruned.matrix))
    values, cost = _refit(target, start, pruned.mask, rows.single, columns.single)
    return Pruned((values.double() / scale * unit).float(), pruned.mask, cost * unit * unit)


@dataclass(frozen=True, eq=False)
class _Side:
    """A moment M, scaled to a diagonal of ones.

    Attributes:
        scale: √M_ii, float64.
        moment: M_ij / (√M_ii √M_jj), float64; `single` is the same in float32.
    """

    scale: torch.Tensor
    moment: torch.Tensor
    single: torch.Tensor

    @classmethod
    def of(cls, moment: torch.Tensor) -> _Side:
        scale = moment.diagonal().double().sqrt()
        scaled = moment.double() / scale / scale[:, None]
        if not is_finite(scaled) or torch.linalg.cholesky_ex(scaled).info:
            raise Refusal("a second moment is not positive definite; shrink it first")
        return cls(scale, scaled, scaled.float())

    def alone(self, share: float) -> torch.Tensor:
        """Diagonal of the inverse of the moment whose entries off the diagonal are multiplied by `share`, float32."""
        damped = share * self.moment
        damped.diagonal().fill_(1.0)
        return torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal().float()


def _steps(scaled: torch.Tensor, rows: _Side, columns: _Side, kept: Sequence[int]) -> Iterator[Pruned]:
    """Yields the results from the matrix in scaled coordinates, float64."""
    unit = float(scaled.norm()) or 1.0  # keeps squares within the range of float32, whatever the scale of the moments
    target = (scaled / unit).float()
    current, mask = target.clone(), torch.ones_like(target, dtype=torch.bool)
    before = target.numel()
    back = unit / (rows.scale[:, None] * columns.scale)
    for number in kept:
        share = before / target.numel()
        worth = current.square() / rows.alone(share)[:, None] / columns.alone(share)
        worth.masked_fill_(~mask, torch.inf)
        removed = worth.flatten().topk(before - number, largest=False, sorted=False).indices
        mask = mask.flatten().index_fill(0, removed, False).view_as(mask)
        current, cost = _refit(target, current * mask, mask, rows.single, columns.single)
        before = number
        yield Pruned((current.double() * back).float(), mask, cost * unit * unit)


def _refit(
    target: torch.Tensor, start: torch.Tensor, mask: torch.Tensor, gradients: torch.Tensor, inputs: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Minimises ½·tr(G (W − X) C (W − X)ᵀ) over the entries of X in the mask; returns X and its cost."""
    values, error = start, target - start
    pulled = gradients @ (error @ inputs)
    cost = 0.5 * float((pulled * error).sum(dtype=torch.float64))
    residual = pulled * mask
    direction, strength = residual, float(residual.square().sum(dtype=torch.float64))
    for _ in range(_MOST):
        if strength == 0:
            break
        image = gradients @ (direction @ inputs) * mask
        step = strength / float((direction * image).sum(dtype=torch.float64))
        values = values.add(direction, alpha=step)
        gain = 0.5 * step * strength
        cost -= gain
        if gain < _GAIN * cost:
            break
        residual = residual.sub(image, alpha=step)
        last, strength = strength, float(residual.square().sum(dtype=torch.float64))
        direction = torch.add(residual, direction, alpha=strength / last)
    error = target - values
    return values, 0.5 * float((gradients @ (error @ inputs) * error).sum(dtype=torch.float64))
