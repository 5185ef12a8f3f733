"""Sites: which weight matrices of a model may be tensorized.

Knows the module tree of a torch model, nothing of transformers, schedules or factors. Families are discovered from the
module names inside the repeated block, not hard-coded; embeddings and the output head lie outside the blocks and stay
dense.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Site", "dense_weight", "discover_sites", "model_bytes", "model_parameters"]


@dataclass(frozen=True)
class Site:
    """One weight matrix W of shape (out_features, in_features) inside block `block` (from 0)."""

    name: str
    block: int
    family: str
    out_features: int
    in_features: int

    @property
    def parameters(self) -> int:
        """Entries of the dense matrix; a bias is never tensorized and not counted."""
        return self.out_features * self.in_features


def discover_sites(model: nn.Module) -> tuple[Site, ...]:
    """Sites of `model` in module order.

    The blocks are the longest `nn.ModuleList` of the tree whose members hold linear maps; every linear map inside one
    (`nn.Linear`, or the transposed `Conv1D` of GPT-2) is a site. A weight shared by two places counts once.

    Raises:
        ValueError: the model has no such list, or no linear map in it.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(_is_linear(inner) for inner in module.modules())
    ]
    if not lists:
        raise ValueError("no tensorizable site: the model has no nn.ModuleList of blocks that hold linear maps")
    prefix, blocks = max(lists, key=lambda pair: (len(pair[1]), -len(pair[0])))
    sites: list[Site] = []
    seen: set[int] = set()
    for index, block in enumerate(blocks):
        linears = [(path, module) for path, module in block.named_modules() if _is_linear(module)]
        families = _families([path for path, _ in linears])
        for path, module in linears:
            weight = dense_weight(module)
            if id(module.weight) in seen:
                continue
            seen.add(id(module.weight))
            if not (weight.is_meta or torch.isfinite(weight).all()):
                raise ValueError(f"site {prefix}.{index}.{path}: the weight has NaN or infinite entries")
            sites.append(Site(f"{prefix}.{index}.{path}", index, families[path], weight.shape[0], weight.shape[1]))
    return tuple(sites)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear module as (out, in), whatever way the module stores it. A view, not a copy."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight if isinstance(module, nn.Linear) else weight.T


def model_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, tied weights counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters of the whole model at their stored precision, tied weights counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.ndim == 2


def _families(paths: list[str]) -> dict[str, str]:
    """Shortest telling name per path: the leaf without `_proj`, or the whole path where leaves repeat in a block."""
    without_index = {path: re.sub(r"\.\d+(?=\.|$)", "", path) for path in paths}
    leaves = Counter(name.rsplit(".", 1)[-1] for name in set(without_index.values()))
    families = {}
    for path, name in without_index.items():
        leaf = name.rsplit(".", 1)[-1]
        families[path] = leaf.removesuffix("_proj") if leaves[leaf] == 1 else name
    return families
