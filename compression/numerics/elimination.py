"""Eliminates the units of a bond between two matrices, with an exact refit of the matrix that reads them.

Takes tensors and returns tensors. A bond joins a matrix that writes hidden values h to the matrix W that reads them,
y = W h. It is made of groups of hidden values that can only be removed together: the single hidden units of an MLP, or
the values of one attention head. With C = E[h hᵀ], G the second moment of the gradient at y, and the values S kept, the
best matrix on S is W C_{:S} C_SS⁻¹. Its predicted cost is ½·tr(G W_R (C_RR − C_RS C_SS⁻¹ C_SR) W_Rᵀ) nats per token for
the removed values R.

Removing one more group J changes the refitted W by −W_J (P_JJ)⁻¹ P_J:, where P is the inverse of C on the kept values,
and costs ½·tr((W_Jᵀ G W_J)(P_JJ)⁻¹): the optimal brain surgeon (Hassibi & Stork 1993), with a matrix per output instead
of a single loss. These costs add up exactly, so one elimination gives the cost of every width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compression.refusal import Refusal

__all__ = ["Elimination", "eliminate", "refit"]

_FRESH = 8
"""Number of times that W and P are computed afresh during an elimination, against the growth of rounding errors."""


@dataclass(frozen=True, eq=False)
class Elimination:
    """The order in which the groups of a bond are removed, and what that costs.

    Attributes:
        order: group numbers, int64 (groups,), the first removed first. The kept groups of width w are the last w.
        cost: predicted cost of every width from 0 to all groups, nats per token, float64 (groups + 1,). It falls with
            the width and is 0 for the full one.
    """

    order: torch.Tensor
    cost: torch.Tensor

    def kept(self, width: int) -> torch.Tensor:
        """Returns the numbers of the groups kept at a width, ascending, int64 (width,).

        Raises:
            ValueError: the width is not between 0 and the number of groups.
        """
        if not 0 <= width <= len(self.order):
            raise Refusal(f"width must be between 0 and {len(self.order)}, got {width}")
        return self.order[len(self.order) - width :].sort().values


@torch.no_grad()
def eliminate(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    group: int = 1,
    step: int = 1,
) -> Elimination:
    """Remove groups one after the other, each time those that cost least, until none is left.

    Args:
        weight: W (out, in).
        inputs: C (in, in), positive definite, see `compression.numerics.whitening.shrink`.
        gradients: G (out, out), positive semidefinite.
        group: number of consecutive hidden values that form one group; must divide `in`.
        step: number of groups removed at a time. The cost of the step is exact; only the choice of its groups ignores
            how they interact. Within a step the order is that of the single costs.

    Returns:
        The order and costs. The cost of a width inside a step is interpolated linearly.

    Raises:
        ValueError: shapes disagree, or `group` or `step` is out of range; or C is not positive definite.
    """
    outputs, size = weight.shape
    if inputs.shape != (size, size) or gradients.shape != (outputs, outputs):
        raise Refusal(
            f"a matrix {outputs} × {size} needs moments of {size} inputs and {outputs} outputs, "
            f"got {tuple(inputs.shape)} and {tuple(gradients.shape)}"
        )
    if group < 1 or size % group:
        raise Refusal(f"group must divide the {size} hidden values, got {group}")
    if step < 1:
        raise Refusal(f"step must be at least 1, got {step}")
    metric, target, moment = gradients.double(), weight.double(), inputs.double()
    alive = torch.arange(size, device=weight.device)  # the hidden values that are left, group by group
    until_fresh = max(1, -(-size // (group * step * _FRESH)))
    order: list[torch.Tensor] = []
    lost = [0.0]
    steps = 0
    while len(alive):
        if steps % until_fresh == 0:
            inverse = torch.cholesky_inverse(_cholesky(moment[alive][:, alive]))
            current = target @ moment[:, alive] @ inverse
            pulled = metric @ current
        steps += 1
        single = _costs(current, pulled, inverse, group)
        first = single.argsort(stable=True)[:step]
        places = (first[:, None] * group + torch.arange(group, device=first.device)).flatten()
        columns, pulled_columns, crossing = current[:, places], pulled[:, places], inverse[places]
        solved = torch.linalg.solve(crossing[:, places], torch.cat([columns.mT, crossing], dim=1))
        cost = max(0.0, 0.5 * float((pulled_columns.mT * solved[:, :outputs]).sum()))
        share = single[first].cumsum(0)
        parts = share / share[-1] if float(share[-1]) > 0 else torch.linspace(0, 1, len(first) + 1)[1:]
        lost += (lost[-1] + cost * parts).tolist()
        order.append(alive[first * group] // group)
        rest = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        rest[places] = False
        change = solved[:, outputs:][:, rest]
        alive, current = alive[rest], current[:, rest] - columns @ change
        pulled = pulled[:, rest] - pulled_columns @ change
        inverse = inverse[rest][:, rest] - crossing[:, rest].mT @ change
    return Elimination(torch.cat(order).cpu(), torch.tensor(lost[::-1], dtype=torch.float64))


def refit(weight: torch.Tensor, inputs: torch.Tensor, kept: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Returns the best matrix on the kept hidden values, W C_{:S} C_SS⁻¹ (out, kept), float64.

    Args:
        weight: W (out, in).
        inputs: C (in, in), positive definite.
        kept: indices of the kept hidden values, S.

    Raises:
        ValueError: C_SS is not positive definite.
    """
    index = torch.as_tensor(kept, device=weight.device)
    moment = inputs.double()
    factor = _cholesky(moment[index][:, index])
    solved: torch.Tensor = torch.cholesky_solve(moment[index] @ weight.double().mT, factor)
    return solved.mT


def _cholesky(moment: torch.Tensor) -> torch.Tensor:
    found = torch.linalg.cholesky_ex(moment)
    if found.info:
        raise Refusal("the second moment of a bond is not positive definite; shrink it first")
    factor: torch.Tensor = found.L
    return factor


def _costs(current: torch.Tensor, pulled: torch.Tensor, inverse: torch.Tensor, group: int) -> torch.Tensor:
    """Returns twice the cost of removing each group alone, (groups,); `pulled` is G times the refitted W."""
    if group == 1:
        return (current * pulled).sum(0) / inverse.diagonal()
    groups = len(inverse) // group
    left, right = (values.mT.reshape(groups, group, -1) for values in (current, pulled))
    places = torch.arange(groups, device=inverse.device)
    blocks = inverse.reshape(groups, group, groups, group)[places, :, places, :]
    solved: torch.Tensor = torch.cholesky_solve(left @ right.mT, torch.linalg.cholesky(blocks))  # P_JJ⁻¹ W_Jᵀ G W_J
    costs: torch.Tensor = solved.diagonal(dim1=1, dim2=2).sum(1)
    return costs
