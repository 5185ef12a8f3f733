"""An optimizer whose memory does not grow with the parameters, but with their rows and columns.

Knows tensors and their gradients; does not know models. The step of an entry is its gradient divided by the root of a
running mean of its square, as in Adam and RMSprop. The running mean of a matrix is kept as the product of those of its
rows and of its columns (Adafactor, Shazeer & Stern 2018), and there is no momentum, update clipping or relative step:
short distillations go further without, see `search.healing.plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["FactoredRMSprop"]

_MEANS = "columns", "rows"  # a vector has the first alone, of every entry
_SMALLEST = 1e-16  # least running mean of a square, so that gradients of about 1e-8 are noise
_FLATTEST = 1e-6  # least running mean of a row, relative to the mean of all rows


class FactoredRMSprop(torch.optim.Optimizer):
    """Divides every gradient by the root of its running mean square, which is factored for matrices.

    A parameter of 2·n axes is a matrix whose rows are its first n axes, and whose columns are the others. A vector
    keeps the running mean of every entry. All state exists from the start and keeps its shapes. Parameters may be
    sharded (DTensor). A step uses up the gradients, which then hold the changes.

    Args:
        groups: parameter groups of `torch.optim.Optimizer`; each has its "lr", the size of a step.
        decay: share of a running mean that stays at every step, in (0, 1). The first steps are corrected for the start
            at zero.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], decay: float = 0.95) -> None:
        super().__init__([dict(group) for group in groups], {"lr": 0.0, "decay": decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                zero = torch.zeros((), device=parameter.device)
                means = [torch.zeros_like(mean) for mean in _mean_squares(torch.zeros_like(parameter))]
                self.state[parameter] = {"step": zero, **dict(zip(_MEANS, means, strict=False))}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.change_(parameter, group)

    @torch.no_grad()
    def change_(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        """Change one parameter of a group, which must have a gradient."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        state["step"] += 1
        kept, started = group["decay"], 1 - group["decay"] ** float(state["step"])
        means = [state[name] for name in _MEANS if name in state]
        for mean, now in zip(means, _mean_squares(gradient), strict=True):
            mean.lerp_(now, 1 - kept)
        columns, *rows = (mean / started for mean in means)
        for mean in rows:
            gradient.mul_((mean / mean.mean().clamp_min(_SMALLEST)).clamp_min(_FLATTEST).rsqrt_())
        gradient.mul_(columns.clamp_min(_SMALLEST).rsqrt_())
        parameter.add_(gradient, alpha=-group["lr"])


def _mean_squares(gradient: torch.Tensor) -> list[torch.Tensor]:
    """The squares of the entries of a vector, or the mean squares of the columns and of the rows of a matrix."""
    squares, half = gradient.square(), gradient.ndim // 2
    if not half:
        return [squares]
    axes = tuple(range(half)), tuple(range(half, gradient.ndim))
    return [_replicated(squares.mean(each, keepdim=True)) for each in axes]


def _replicated(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in every process, if the tensor is sharded."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(tensor, DTensor):
        return tensor
    whole: torch.Tensor = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
    return whole
