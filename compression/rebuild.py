"""Layers from stored tensors: what a schedule says about a site and a state dict, made a module again.

Knows tensors and modules; no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import nn

from compression.gauge import PivotedCore
from compression.layers import MPOLinear
from compression.legs import resolve
from compression.schedule import Choice

__all__ = ["rebuilt"]


def rebuilt(choice: Choice, out_features: int, in_features: int, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """The layer of a site whose `state_dict` was `state`, without gradients.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape than the choice says.
    """
    bias = state.get("bias")
    layer: nn.Module
    if choice.is_dense:
        layer = nn.Linear(in_features, out_features, bias is not None, device="meta")
    else:
        legs = resolve(choice.topology, out_features, in_features)
        bonds = legs.bonds(choice.chi)
        last = len(legs.out_legs) - 1
        like = state.get(f"core_{last}", torch.empty(0))
        cores: list[torch.Tensor | PivotedCore] = []
        for number, (left, right) in enumerate(pairwise(bonds)):
            shape = (left, legs.out_legs[number], legs.in_legs[number], right)
            rows = shape[0] * shape[1] * shape[2]
            if legs.pivoted and number < last:
                cores.append(PivotedCore(like.new_empty(rows - right, right), torch.arange(rows), shape))
            else:
                cores.append(like.new_empty(shape))
        layer = MPOLinear(cores, bias)
    try:
        layer.load_state_dict(dict(state), assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"stored tensors do not fit {choice.topology} with χ {choice.chi}: {reason}") from None
    return layer.requires_grad_(False)
