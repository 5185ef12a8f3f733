"""Merges compressed modules into dense ones.

Knows torch modules only. The result computes the same as the compressed model and is as large as the dense model.
"""

from __future__ import annotations

import torch
from torch import nn

from compression.layers.experts import experts_apart
from compression.layers.fused import FusedLinear
from compression.layers.heads import HeadLinear
from compression.layers.kept import kept, widened
from compression.layers.mpo_linear import MPOLinear
from compression.layers.packed import PackedEmbedding, PackedLinear, PackedMPO
from compression.layers.sparse_linear import SparseLinear
from compression.sites import dense_weight

__all__ = ["dense_layer", "merge_"]

_COMPRESSED = (MPOLinear, HeadLinear, FusedLinear, PackedMPO, PackedLinear, PackedEmbedding, SparseLinear)


@torch.no_grad()
def merge_(model: nn.Module, skeleton: nn.Module, only: str = "") -> list[str]:
    """Replace every compressed module by a dense one, and every linear layer whose type differs in `skeleton`.

    Rows and columns that were removed come back as zeros, and so do the biases of such rows. Experts that were taken
    apart are fused again.

    Args:
        model: changed in place.
        skeleton: the dense model without values. It gives every module its type, so a weight that the architecture
            stores transposed is stored transposed again. Its experts are taken apart where those of the model are.
        only: the name of a single module to replace; empty for all.

    Returns:
        The names of the replaced modules.
    """
    names: list[str] = []
    apart = experts_apart(model)
    for name in apart.keys() - experts_apart(skeleton).keys():
        skeleton.set_submodule(name, type(apart[name])(skeleton.get_submodule(name)))
    for name, module in list(model.named_modules()):
        if (only and name != only) or any(name.startswith(f"{other}.") for other in names):
            continue
        dense = skeleton.get_submodule(name) if isinstance(module, (*_COMPRESSED, nn.Linear)) else module
        if isinstance(module, _COMPRESSED) or type(dense) is not type(module) or kept(module):
            model.set_submodule(name, dense_layer(module, dense))
            names.append(name)
    for name, experts in apart.items() if not only else ():
        model.set_submodule(name, experts.fused())
        names.append(name)
    return names


def dense_layer(module: nn.Module, skeleton: nn.Module) -> nn.Module:
    """Fills `skeleton`, a dense module, so that it computes the same as a compressed or linear one; returns it."""
    shape = skeleton.weight if isinstance(skeleton, nn.Embedding) else dense_weight(skeleton)
    assert isinstance(shape, torch.Tensor)
    weight, bias = widened(module, *_values(module), tuple(shape.shape))
    weight = weight if isinstance(skeleton, nn.Linear | nn.Embedding) else weight.T
    skeleton.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        skeleton.bias = nn.Parameter(bias, requires_grad=False)
    return skeleton.train(module.training)


def _values(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the weight (out, in) and bias of a compressed or linear module."""
    if isinstance(module, HeadLinear):
        weights, biases = zip(*(_values(part) for part in module), strict=True)
        if module.along_output:
            return torch.cat(weights), None if biases[0] is None else torch.cat(biases)
        return torch.cat(weights, dim=1), biases[0]
    if isinstance(module, FusedLinear):
        weights, biases = zip(*(_values(part) for part in module.children()), strict=True)
        return module.joined(weights, 0), None if biases[0] is None else module.joined(biases, 0)
    bias = getattr(module, "bias", None)
    assert bias is None or isinstance(bias, torch.Tensor)
    weight = module.weight if isinstance(module, _COMPRESSED) else dense_weight(module)
    assert isinstance(weight, torch.Tensor)
    return weight.detach(), None if bias is None else bias.detach()
