"""`MPOLinear`: a linear layer whose matrix is held as MPO cores.

Knows tensors and modules; not where the cores came from. It does not subclass `nn.Linear`, so that tools which rewrite
linear layers by type leave it alone instead of losing the cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import nn
from torch.nn import functional

from compression.legs import Legs
from compression.mpo import contract, contract_with

__all__ = ["MPOLinear"]


class MPOLinear(nn.Module):
    """y = Ŵ x + b with Ŵ (out, in) given by cores (left, out, in, right).

    For each call the cheaper of two exact orders is taken, by multiply-adds: contracting the cores with the
    activations, or rebuilding Ŵ once for the whole batch.

    Args:
        cores: two or more, neighbouring bonds equal, 1 at both ends. Kept as given (views stay views).
        bias: shape (out,) or None.

    Raises:
        ValueError: bonds that do not match.
    """

    def __init__(self, cores: Sequence[torch.Tensor], bias: torch.Tensor | None = None) -> None:
        super().__init__()
        bonds = [(core.shape[0], core.shape[3]) for core in cores]
        matched = all(left[1] == right[0] for left, right in pairwise(bonds))
        if bonds[0][0] != 1 or bonds[-1][1] != 1 or not matched:
            raise ValueError(f"bonds of neighbouring cores must match and end in 1, got {bonds}")
        self.cores = nn.ParameterList([nn.Parameter(core, requires_grad=False) for core in cores])
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.legs = Legs(tuple(core.shape[1] for core in cores), tuple(core.shape[2] for core in cores))
        self.chi = max(bond for bond, _ in bonds[1:])
        self.out_features, self.in_features = prod(self.legs.out_legs), prod(self.legs.in_legs)

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out)."""
        cores = list(self.cores)
        flat = activations.reshape(-1, self.in_features)
        costs = {last_first: self.legs.multiply_adds_from(self.chi, last_first) for last_first in (False, True)}
        last_first = costs[True] <= costs[False]
        rebuild = self.legs.rebuild_multiply_adds(self.chi) + flat.shape[0] * self.legs.dense_parameters
        if flat.shape[0] * costs[last_first] > rebuild:
            return functional.linear(activations, contract(cores), self.bias)
        result = contract_with(cores, flat, last_first).reshape(*activations.shape[:-1], self.out_features)
        return result if self.bias is None else result + self.bias

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix (out, in), computed; for code that reads a layer's weight."""
        return contract(list(self.cores))

    def extra_repr(self) -> str:
        return f"out={self.legs.out_legs}, in={self.legs.in_legs}, chi={self.chi}, bias={self.bias is not None}"
