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

from compression.numerics.large_moments import brief_cholesky, brief_product, cholesky
from compression.refusal import Refusal

__all__ = ["Elimination", "eliminate", "indices_of", "refit"]

_WINDOWS, _FRESH = 8, 2
"""Number of times that removed values are dropped from the arrays, and that W and P are computed afresh then, against
the growth of rounding errors."""
_INFLATED = 1e4
"""Largest C_ii P_ii for which P of a large C is computed, and all arrays updated, in float32. C_ii P_ii is 1 for
uncorrelated values and says how much larger errors of P become. For two MLPs of Qwen2.5-0.5B, whose C has a condition
of 1e4, costs with P from float64 and updates in float32 differ by at most 4e-4 from those of float64, at width 0, and
by 1e-7 where a quarter or more of the values is kept."""


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
    metric, target = gradients.double(), weight.double()
    groups = size // group
    window = -(-groups // (step * _WINDOWS)) * step  # groups removed before the arrays are made smaller
    left = torch.arange(groups, device=weight.device)
    state = torch.empty(0, 0)  # W, G W and P, one above the other, with a column per value left
    order: list[torch.Tensor] = []
    lost = [0.0]
    for turn in range(-(-groups // window)):
        alive = indices_of(left, group)
        if turn % (_WINDOWS // _FRESH) == 0:
            inverse = _inverse(inputs[alive][:, alive])
            current = target.to(inverse) @ inputs[:, alive].to(inverse) @ inverse if turn else target
            state = torch.cat([each.to(inverse) for each in (current, metric @ current.double(), inverse)])
        present = torch.ones(len(left), dtype=torch.bool, device=weight.device)
        for _ in range(0, min(window, len(left)), step):
            current, pulled, inverse = state[:outputs], state[outputs : 2 * outputs], state[2 * outputs :]
            single = _costs(current, pulled, inverse, present)
            first = single.argsort(stable=True)[: min(step, int(present.sum()))]
            places = indices_of(first, group)
            columns, crossing = state[:, places], inverse[places]
            solved = torch.linalg.solve(crossing[:, places], torch.cat([current[:, places].mT, crossing], dim=1))
            cost = max(0.0, 0.5 * float((pulled[:, places].mT * solved[:, :outputs]).sum(dtype=torch.float64)))
            share = single[first].cumsum(0, dtype=torch.float64)
            parts = share / share[-1] if float(share[-1]) > 0 else torch.linspace(0, 1, len(first) + 1)[1:]
            lost += (lost[-1] + cost * parts).tolist()
            order.append(left[first])
            present[first] = False
            state.addmm_(columns, solved[:, outputs:], alpha=-1)
        kept = indices_of(present.nonzero().flatten(), group)
        left = left[present]
        state = torch.cat([state[: 2 * outputs][:, kept], state[2 * outputs :][kept][:, kept]])
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
    removed = torch.ones(len(inputs), dtype=torch.bool, device=weight.device).index_fill_(0, index, False)
    matrix, rows = weight.double(), inputs[index]
    factor = brief_cholesky(rows[:, index])
    crossed = brief_product(rows[:, removed], matrix[:, removed].mT)
    return matrix[:, index] + torch.cholesky_solve(crossed.to(factor), factor).double().mT


def indices_of(groups: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the indices of the hidden values in some groups of `size`, int64 (groups · size,)."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _inverse(moment: torch.Tensor) -> torch.Tensor:
    """Returns P: of a large C in float32, if its errors stay small, and otherwise in float64."""
    factor = brief_cholesky(moment)
    inverse = torch.cholesky_inverse(factor)
    if factor.dtype == torch.float32 and float((moment.diagonal() * inverse.diagonal()).max()) > _INFLATED:
        inverse = torch.cholesky_inverse(cholesky(moment.double()))
    return inverse


def _costs(current: torch.Tensor, pulled: torch.Tensor, inverse: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Returns twice the cost of removing each group alone, (groups,), infinite for those no longer `present`.

    `pulled` is G times the refitted W.
    """
    groups = len(present)
    group = len(inverse) // groups
    if group == 1:
        costs = (current * pulled).sum(0) / inverse.diagonal()
    else:
        left, right = (values.mT.reshape(groups, group, -1) for values in (current, pulled))
        places = torch.arange(groups, device=inverse.device)
        blocks = inverse.reshape(groups, group, groups, group)[places, :, places, :]
        blocks = blocks.where(present[:, None, None], torch.eye(group, dtype=blocks.dtype, device=blocks.device))
        solved: torch.Tensor = torch.cholesky_solve(left @ right.mT, torch.linalg.cholesky(blocks))  # P_JJ⁻¹ W_Jᵀ G W_J
        costs = solved.diagonal(dim1=1, dim2=2).sum(1)
    return costs.where(present, torch.inf)
