"""Rounds a matrix to a grid in the metric of its inputs and output gradients.

Takes tensors and returns tensors; does not know how integers are stored. An error E of the matrix costs
½·tr(G E C Eᵀ) = ½·‖Pᵀ E Q‖² nats per token, where G = P Pᵀ and C = Q Qᵀ with lower triangular P and Q. Entry (i, j) of
Pᵀ E Q depends on the errors in row i and below, and in column j and to the right of it. So entries are rounded from the
last row and column to the first, each to the point of the grid nearest to W_ij less what the errors so far leave in
entry (i, j): the nearest plane of Babai (1986). With the identity for G this is what GPTQ does (Frantar et al. 2022);
YAQA (Tseng et al. 2025) rounds with both factors.

Entries on an antidiagonal do not depend on each other. They are rounded together, in square tiles, between which errors
are carried by matrix products. Rows and columns are taken in the order of their moments, the largest first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression.numerics.finite import is_finite
from compression.refusal import Refusal

__all__ = ["Triangle", "nearest_plane"]

_TILE = 32
_DAMPING = 1e-4  # added to the diagonal of a moment, relative to its mean


@dataclass(frozen=True, eq=False)
class Triangle:
    """A moment M as D·Tᵀ·T·D up to the order of its rows, for rounding.

    Attributes:
        order: the indices of M in ascending order of their diagonal.
        factor: lower triangular with ones on its diagonal, float32, padded in front to a multiple of the tile.
    """

    order: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, moment: torch.Tensor) -> Triangle:
        """Returns the factor of a moment (n, n).

        Raises:
            ValueError: the moment is not positive definite although a ten-thousandth of its mean was added.
        """
        order = moment.diagonal().argsort()
        damped = moment.double()[order][:, order]
        damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp_min(1e-12))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed or not is_finite(factor):
            raise Refusal("a second moment is not positive definite; shrink it first")
        space = -len(order) % _TILE
        padded = torch.eye(space + len(order), device=moment.device)
        padded[space:, space:] = (factor / factor.diagonal()).float()
        return cls(order, padded)


@torch.no_grad()
def nearest_plane(
    target: torch.Tensor,
    steps: torch.Tensor,
    low: int,
    high: int,
    inputs: Triangle,
    gradients: Triangle | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns integers (out, in), float32, from `low` to `high`; times `steps` they are the rounded matrix.

    Args:
        target: W (out, in), float32.
        steps: distance of the points of the grid at every entry (out, in), float32, not 0.
        inputs: of C (in, in).
        gradients: of G (out, out). None rounds the rows independently.
        mask: entries that are rounded, bool (out, in); the others are taken to have no error. None rounds all.
    """
    rows = torch.arange(len(target), device=target.device) if gradients is None else gradients.order
    columns = inputs.order
    below = 0 if gradients is None else len(gradients.factor) - len(rows)
    before = len(inputs.factor) - len(columns)

    def padded(values: torch.Tensor, fill: float) -> torch.Tensor:
        whole = values.new_full((below + len(rows), before + len(columns)), fill)
        whole[below:, before:] = values[rows[:, None], columns]
        return whole

    free = torch.ones_like(target) if mask is None else mask.float()
    grid = _Grid(padded(target, 0.0), padded(steps, 1.0), padded(free, 0.0), low, high)
    codes = _by_rows(grid, inputs.factor) if gradients is None else _by_tiles(grid, inputs.factor, gradients.factor)
    result = torch.empty_like(target)
    result[rows[:, None], columns] = codes[below:, before:]
    return result


@dataclass(frozen=True, eq=False)
class _Grid:
    """What is rounded: target W, distance of grid points, 1 where an entry is rounded and 0 elsewhere; (out, in)."""

    target: torch.Tensor
    steps: torch.Tensor
    free: torch.Tensor
    low: int
    high: int

    def rounded(self, values: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """The integers of the grid nearest to values."""
        return (values / steps).round_().clamp_(self.low, self.high)


def _by_rows(grid: _Grid, factor: torch.Tensor) -> torch.Tensor:
    """Rounds the rows independently."""
    errors, codes = torch.zeros_like(grid.target), torch.empty_like(grid.target)
    for start in range(len(factor) - _TILE, -1, -_TILE):
        stop = start + _TILE
        carried = errors[:, stop:] @ factor[stop:, start:stop]
        for column in range(stop - 1, start - 1, -1):
            target, steps = grid.target[:, column], grid.steps[:, column]
            codes[:, column] = grid.rounded(target - carried[:, column - start], steps)
            error = (codes[:, column] * steps - target) * grid.free[:, column]
            errors[:, column] = error
            carried += error[:, None] * factor[column, start:stop]
    return codes


def _by_tiles(grid: _Grid, right: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Rounds with the factors of C (`right`) and G (`left`).

    Tiles of columns are held in reverse order, so that those of an antidiagonal are on a diagonal, of which torch has
    views, and follow each other in rows and columns.
    """
    height, width = len(left) // _TILE, len(right) // _TILE

    def tiles(values: torch.Tensor) -> torch.Tensor:  # (height, tile, width, tile)
        return values.view(height, _TILE, width, _TILE).flip(2)

    target, steps, free = tiles(grid.target), tiles(grid.steps), tiles(grid.free)
    errors, seen, codes = (torch.zeros_like(target) for _ in range(3))  # E, E Q and the integers
    below = left.T.contiguous().view(height, _TILE, -1)  # what each row leaves in the tiles
    beside = right.view(width, _TILE, width, _TILE).flip(0, 2).reshape(-1, width, _TILE).transpose(0, 1).contiguous()
    own_rows = torch.stack([left[at : at + _TILE, at : at + _TILE] for at in range(0, len(left), _TILE)])
    own_columns = torch.stack([right[at : at + _TILE, at : at + _TILE] for at in range(0, len(right), _TILE)]).flip(0)
    for offset in range(1 - height, width):
        count = min(height - max(0, -offset), width - max(0, offset))
        rows = slice(max(0, -offset), max(0, -offset) + count)
        columns = slice(max(0, offset), max(0, offset) + count)

        def here(values: torch.Tensor, offset: int = offset) -> torch.Tensor:  # (count, tile, tile), a view
            return values.diagonal(offset, 0, 2).permute(2, 0, 1)

        from_right = torch.bmm(errors.view(height, _TILE, -1)[rows], beside[columns])
        finished = seen[:, :, columns].permute(2, 0, 1, 3).reshape(count, -1, _TILE)
        carried = torch.bmm(below[rows], finished) + torch.bmm(own_rows[rows].mT, from_right)
        of_tiles = here(target), here(steps), here(free)
        found, error = _in_tiles(grid, of_tiles, carried, own_rows[rows], own_columns[columns])
        here(codes).copy_(found)
        here(errors).copy_(error)
        here(seen).copy_(from_right + torch.bmm(error, own_columns[columns]))
    return codes.flip(2).reshape(grid.target.shape)


def _in_tiles(
    grid: _Grid,
    tiles: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    carried: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds tiles that do not depend on each other; all tensors are (tiles, tile, tile). Returns integers and errors.

    With the columns in reverse order an antidiagonal is a diagonal, of which torch has views.

    Args:
        tiles: target, steps and free entries of the grid.
        carried: what the errors of other tiles leave in these.
        left, right: factors of the tiles' rows and columns.
    """
    wanted, steps, free = (each.flip(2) for each in tiles)
    wanted_less, right = wanted - carried.flip(2), right.flip(1, 2)
    codes, errors = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for offset in range(_TILE - 1, -_TILE, -1):
        row, column, count = max(0, offset), max(0, -offset), _TILE - abs(offset)  # where the diagonal begins
        code = wanted_less.diagonal(-offset, 1, 2) / steps.diagonal(-offset, 1, 2)
        code.round_().clamp_(grid.low, grid.high)
        error = (code * steps.diagonal(-offset, 1, 2)).sub_(wanted.diagonal(-offset, 1, 2))
        error.mul_(free.diagonal(-offset, 1, 2))
        codes.diagonal(-offset, 1, 2).copy_(code)
        errors.diagonal(-offset, 1, 2).copy_(error)
        weighted = left[:, row : row + count] * error[:, :, None]
        wanted_less.baddbmm_(weighted.mT, right[:, column : column + count], alpha=-1)
    return codes.flip(2), errors.flip(2)
