"""Heads: attention matrices taken apart into one matrix per head, so that heads are sites of their own.

Knows torch modules only. A matrix that makes heads (q, k, v) is cut along its output, the one that reads them (o) along
its input; every part is an ordinary linear layer, found, profiled and compressed like any other.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from compression.sites import Site, dense_weight

__all__ = ["HeadLinear", "split_heads_"]


class HeadLinear(nn.ModuleList):
    """A linear map in parts of equal size: parts of its output side by side, or the sum over parts of its input.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        size: features of a part; divides the side that is cut.
        along_output: which side that is.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, size: int, along_output: bool) -> None:
        weights = torch.split(weight, size, dim=0 if along_output else 1)
        biases: list[torch.Tensor | None] = [None] * len(weights)
        if bias is not None and along_output:
            biases = list(torch.split(bias, size))
        elif bias is not None:
            biases[0] = bias
        super().__init__(_linear(*pair) for pair in zip(weights, biases, strict=True))
        self.size = size
        self.along_output = along_output

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out)."""
        if self.along_output:
            return torch.cat([part(activations) for part in self], dim=-1)
        pieces = torch.split(activations, self.size, dim=-1)
        result: torch.Tensor = self[0](pieces[0])
        for part, piece in zip(list(self)[1:], pieces[1:], strict=True):
            result = result + part(piece)
        return result


def split_heads_(model: nn.Module, sites: Iterable[Site], size: int) -> list[str]:
    """Cut every attention matrix of several whole heads into its heads, in place; the model computes the same.

    In each attention module the last matrix reads the heads, the others make them.

    Args:
        sites: of the model; those whose name has "attn" or "attention" in it are looked at.
        size: features of a head.

    Returns:
        Names of the matrices that were cut; the sites of the model have to be discovered again.
    """
    attention: dict[str, list[Site]] = {}
    for site in sites:
        if not site.dense_because and ("attn" in site.name or "attention" in site.name):
            attention.setdefault(site.name.rpartition(".")[0], []).append(site)
    cut = []
    for group in attention.values():
        for site in group:
            along_output = site is not group[-1] or len(group) == 1
            heads, rest = divmod(site.out_features if along_output else site.in_features, size)
            if rest or heads < 2:
                continue
            module = model.get_submodule(site.name)
            bias = module.bias
            assert bias is None or isinstance(bias, torch.Tensor)
            model.set_submodule(site.name, HeadLinear(dense_weight(module), bias, size, along_output))
            cut.append(site.name)
    return cut


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
