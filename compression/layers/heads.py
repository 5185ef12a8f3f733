"""Splits attention matrices into one matrix per head, so that every head has its own sites.

Knows torch modules only. A matrix that produces heads (q, k, v) is split along its output, the one that reads them (o)
along its input. Every part is an ordinary linear layer, which is found, profiled and compressed like any other.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from compression.bonds import linear_layer
from compression.sites import Site, dense_weight

__all__ = ["HeadLinear", "split_heads_"]


class HeadLinear(nn.ModuleList):
    """Computes a linear map in parts of equal size: concatenates parts of the output, or adds up parts of the input.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        size: features of a part; must divide the side that is split.
        along_output: whether the output is split; otherwise the input is.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, size: int, along_output: bool) -> None:
        weights = torch.split(weight, size, dim=0 if along_output else 1)
        biases: list[torch.Tensor | None] = [None] * len(weights)
        if bias is not None and along_output:
            biases = list(torch.split(bias, size))
        elif bias is not None:
            biases[0] = bias
        super().__init__(linear_layer(*pair) for pair in zip(weights, biases, strict=True))
        self.size = size
        self.along_output = along_output

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """Maps (…, in) to (…, out)."""
        if self.along_output:
            return torch.cat([part(activations) for part in self], dim=-1)
        pieces = torch.split(activations, self.size, dim=-1)
        result: torch.Tensor = self[0](pieces[0])
        for part, piece in zip(list(self)[1:], pieces[1:], strict=True):
            result = result + part(piece)
        return result


def split_heads_(model: nn.Module, sites: Iterable[Site], size: int) -> list[str]:
    """Split every attention matrix that consists of several whole heads into its heads, in place.

    The model computes the same as before. In each attention module the last matrix is taken to read the heads, the
    others to produce them.

    Args:
        model: changed in place.
        sites: sites of the model. Only those with "attn" or "attention" in their name are considered.
        size: features of a head.

    Returns:
        The names of the matrices that were split. Call `discover_sites` again afterwards.
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
